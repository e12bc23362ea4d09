"""From the files that the stages of gpu_suite.py leave to one summary: goal, measured, held or not. Nothing is guessed.

`summarise` reads files only; `markdown` needs the summary only, so that the same page can be made of it later.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu.runs import ALL, ARMS, BASE, WEIGHTS
from gpu.stages import Options, Stage

ATTACKS = {"clean": "clean", "pgd20": "PGD-20", "cw20": "CW-20", "autoattack": "AutoAttack"}
TITLES = {
    "pgd_at": "PGD-AT", "ham": "HAM", "ham_frozen_bn": "HAM, frozen BN", "fair": "fair", "fair_fast": "fair, fast",
    "fair_long": "fair, fast, in PGD-AT's time", "trades": "TRADES",
}  # fmt: skip
AVERAGES = {"ema": "weight average", "last": "last weights"}
HOLDS = {True: "holds", False: "does not hold", None: "not measured"}
TIME, EASY_M, EASY_STAY = -0.45, 3, 0.75  # the paper's, as in ham_kernels/report/comparing/claims.py
PAPER = "Claims of the paper"


def summarise(o: Options, plan: Sequence[Stage], command: str) -> dict[str, Any]:
    results = {stage.name: read(o.out / "stages" / f"{stage.name}.json") for stage in plan}
    about = results.get("environment") or {}
    runs = [run for seed in o.seeds for arm in ALL if (run := _run(o.out / "cifar", arm, seed))]
    table = o.out / "report" / "table.md"
    return {
        "format": 1,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "smoke": o.smoke,
        "environment": {key: about.get(key) for key in ("facts", "driver", "backends")},
        "commits": sorted({r["commit"] for r in results.values() if r and r.get("commit")}),
        "gpus": sorted({r["gpu"] for r in results.values() if r and r.get("gpu")}),
        "settings": read(o.out / "cifar" / "options.json"),
        "table": [*_goals(plan, results), *_claims(o.out, runs)],
        "stages": [_stage(stage, results[stage.name]) for stage in plan],
        "failures": [f | {"stage": name} for name, r in results.items() for f in (r or {}).get("failures", [])],
        "runs": runs,
        "report_table": table.read_text().strip() if table.exists() else None,
    }


def read(path: Path) -> dict | None:
    """JSON, or None where there is none, or no whole one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


# ---------------------------------------------------------------- goals and claims
def _row(section: str, goal: str, measured: str, verdict: str) -> dict[str, str]:
    return {"section": section, "goal": goal, "measured": measured, "verdict": verdict}


def _stage(stage: Stage, result: dict | None) -> dict[str, Any]:
    result = result or {"state": "not run"}
    keys = ("state", "seconds", "started", "gpu", "line", "reason")
    return {"stage": stage.name, **{key: result.get(key) for key in keys}}


def _goals(plan: Sequence[Stage], results: dict[str, dict | None]) -> Iterator[dict]:
    for stage in plan:
        result = results[stage.name]
        if result is None or result["state"] != "done":
            why = "not run yet" if result is None else f"failed: {result['reason']}"
            yield _row("Stages without a result", stage.name, why, HOLDS[None])
        for goal in (result or {}).get("goals", []):
            yield _row(stage.name, goal["goal"], goal["measured"], goal["state"])


def _claims(out: Path, runs: list[dict]) -> Iterator[dict]:
    """Those that `ham report` judges, the time of a usual epoch, and easy examples; then what could not be judged."""
    sections = (read(out / "report" / "data.json") or {}).get("sections", [])
    judged = [claim for section in sections for claim in section["claims"]]
    for c in judged:
        seeds = f" ({c['seeds']} seed{'s' * (c['seeds'] != 1)})"
        words = "undecided" if c["holds"] is None and c["value"] is not None else HOLDS[c["holds"]]
        yield _row(PAPER, f"{c['group']}: {c['claim']}", c["measured"] + seeds, words)
    for arm in ARMS:
        if arm != BASE:
            yield _usual_epoch(arm, runs)
    for arm in ARMS:
        yield from _easy(arm, runs)
    for what in ("training time", *(title for attack, title in ATTACKS.items() if attack != "clean")):
        if not any(what in c["claim"] for c in judged):
            claim = "−45 %" if what == "training time" else "worst class +3.2 points, std over classes −22 %"
            yield _row(PAPER, f"{what}: {claim}", "no judged runs of both HAM and PGD-AT", HOLDS[None])


def _usual_epoch(arm: str, runs: list[dict]) -> dict:
    """Medians, since the first epoch of each process also compiles, and short runs are mostly first epochs."""
    goal = f"{TITLES[arm]}: training time −45 %, median epoch of the HAM phase"
    times = {(run["arm"], run["seed"]): _mining(run, runs) for run in runs if run["finished"]}
    seeds = [s for a, s in times if a == arm and (BASE, s) in times]
    gpus = {gpu for run in runs if run["seed"] in seeds and run["arm"] in (arm, BASE) for gpu in _gpus(run, runs)}
    if len(gpus) > 1:
        return _row(PAPER, goal, f"trained on {' and '.join(sorted(gpus))}", HOLDS[None])
    pairs = [(times[arm, s], times[BASE, s]) for s in seeds]
    pairs = [(statistics.median(ours), statistics.median(base)) for ours, base in pairs if ours and base]
    if not pairs:
        return _row(PAPER, goal, "no finished runs of both", HOLDS[None])
    # here, since the suite itself runs where the package cannot be imported yet
    from ham_kernels.report.comparing.claims import verdict
    from ham_kernels.report.comparing.over_seeds import mean_interval

    each = [ours / base - 1 for ours, base in pairs]
    ours, base = (statistics.mean(side) for side in zip(*pairs, strict=True))
    seeds = f"{len(pairs)} seed{'s' * (len(pairs) != 1)}"
    words = f"{100 * (ours / base - 1):+.0f} % ({ours:.2f} s against {base:.2f} s, {seeds})".replace("-", "−")
    holds, why = verdict(ours / base - 1, mean_interval(each, exact=True), TIME, below=True)
    why += "; one run each: other work on the machine would change it" * (len(pairs) == 1)
    return _row(PAPER, goal, words + why, "undecided" if holds is None else HOLDS[holds])


def _mining_epochs(seed: int, runs: list[dict]) -> set[int]:
    """Those in which the HAM runs of this seed mine."""
    return {e["epoch"] for run in runs if run["seed"] == seed for e in run["epochs"] if e["mined"]}


def _mining(run: dict, runs: list[dict]) -> list[float]:
    """Seconds of these epochs in a run."""
    epochs = _mining_epochs(run["seed"], runs)
    return [e["seconds"] for e in run["epochs"] if e["epoch"] in epochs]


def _gpus(run: dict, runs: list[dict]) -> set[str]:
    """That trained these epochs: each session until the next one took over."""
    epochs, found = _mining_epochs(run["seed"], runs), set()
    ends = [s["from_epoch"] - (s["from_batch"] == 0) for s in run["sessions"][1:]] + [len(run["epochs"])]
    for session, end in zip(run["sessions"], ends, strict=True):
        if epochs & set(range(session["from_epoch"], end + 1)):
            found.add(session["gpu"])
    return found


def _easy(arm: str, runs: list[dict]) -> Iterator[dict]:
    found = [run["judged"]["ema"]["easy"] for run in runs if run["arm"] == arm and "ema" in run["judged"]]
    found = [entry for entry in found if entry]
    goal = f"{TITLES[arm]}: {EASY_STAY:.0%} of the examples easy at M = {EASY_M} stay easy (weight average)"
    if not found:
        yield _row(PAPER, goal, "not judged", HOLDS[None])
        return
    easy, stay = (sum(entry[key] for entry in found) for key in ("easy", "stay"))
    words = f"{stay} of {easy} training images stay, {easy - stay} succeed by K = {found[0]['steps']}"
    if not easy:
        yield _row(PAPER, goal, "no example was easy", HOLDS[None])
        return
    yield _row(PAPER, goal, f"{stay / easy:.1%} ({words})", HOLDS[stay / easy >= EASY_STAY])


# ---------------------------------------------------------------- runs
def _run(folder: Path, arm: str, seed: int) -> dict[str, Any] | None:
    path = folder / f"{arm}-seed{seed}"
    status = read(path / "status.json")
    if status is None:
        return None
    lines = (path / "metrics.jsonl").read_text().splitlines() if (path / "metrics.jsonl").exists() else []
    epochs = [json.loads(line) for line in lines]
    judged = {w: read(path / "evaluation" / f"{w}.json") for w in WEIGHTS}
    sessions = (read(path / "environment.json") or {}).get("sessions", [])
    return {
        "arm": arm, "seed": seed, "finished": status["state"] == "finished",
        "sessions": [_session(s) for s in sessions],
        "epochs": [{key: e[key] for key in ("epoch", "phase", "mined", "seconds", "hard_fraction")} for e in epochs],
        "classes": (read(path / "data.json") or {}).get("classes", []),
        "counts": (read(path / "data.json") or {}).get("counts", {}),
        "judged": {w: _judged(found) for w, found in judged.items() if found},
    }  # fmt: skip


def _session(session: dict) -> dict[str, Any]:
    return {key: session[key] for key in ("from_epoch", "from_batch")} | {"gpu": session["machine"]["gpu"]}


def _judged(found: dict) -> dict[str, Any]:
    def value(interval):
        return interval["value"] if isinstance(interval, dict) else interval

    attacks = {
        name: {
            "n": a["n"], **{key: value(a[key]) for key in ("accuracy", "worst_class", "std")},
            "per_class": [value(v) for v in a["per_class"]],
        }
        for name, a in found["attacks"].items()
    }  # fmt: skip
    easy = found.get("easy") or {}
    at = next(({**e, "steps": easy["steps"]} for e in easy.get("by_m", []) if e["m"] == EASY_M), None)
    return {"attacks": attacks, "easy": at}


# ---------------------------------------------------------------- the page
def markdown(s: dict[str, Any]) -> str:
    """summary.md, and docs/gpu-results.md."""
    parts = ["# Results on a GPU" if not s["smoke"] else "# Smoke run: tiny sizes on a CPU, no result", _about(s)]
    rows = [[r["goal"] if r["section"] == PAPER else f"{r['section']}: {r['goal']}", r["measured"],
             f"**{r['verdict']}**"] for r in s["table"]]  # fmt: skip
    parts += ["## Goals and claims", _table(["goal", "measured", "held or not"], rows)]
    if s["runs"]:
        parts += ["## CIFAR-10", _setup(s)]
        parts += [s["report_table"]] if s["report_table"] else []
        parts += ["### Time and hard fraction", _times(s["runs"]), _hard(s["runs"])]
        parts += ["### Accuracy, %", _accuracies(s["runs"])]
    parts += ["## Stages", _stages(s)]
    if s["failures"]:
        failures = "\n\n".join(f"`{f['test']}`\n\n```\n{f['text']}\n```" for f in s["failures"])
        parts += ["## Failed tests", failures]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def _stages(s: dict) -> str:
    several = ["gpu"] if len(s["gpus"]) > 1 else []
    rows = []
    for t in s["stages"]:
        seconds = "" if t["seconds"] is None else f"{t['seconds']:.0f}"
        where = [t[key] or "" for key in several]
        rows.append([t["stage"], t["state"], seconds, *where, t["reason"] or t["line"] or ""])
    return _table(["stage", "state", "s", *several, "in short"], rows)


def _about(s: dict) -> str:
    facts = s["environment"]["facts"] or {"machine": {}, "versions": {}, "cuda": None}
    m, v = facts["machine"], facts["versions"]
    versions = ", ".join(f"{name} {number}" for name, number in v.items())
    gpus = " and ".join(s["gpus"]) or m.get("gpu", "machine unknown")
    if len(s["gpus"]) > 1:
        gpus += " (which stage ran where: below)"
    return (
        f"{gpus}, {m.get('cpu', '')}, cores: {m.get('cores', '')}; {versions}, CUDA "
        f"{facts['cuda']}, driver {s['environment']['driver'] or 'none'}; commit "
        f"{', '.join(s['commits']) or 'unknown'}; {s['made'][:10]}. Made by `{s['command']}`."
    )


def _setup(s: dict) -> str:
    o, first = s["settings"] or {}, s["runs"][0]
    counts = ", ".join(f"{n:,} {part}" for part, n in first["counts"].items())
    judged = [w["attacks"].get("autoattack") for run in s["runs"] for w in run["judged"].values()]
    images = sorted({a["n"] for a in judged if a})
    auto = f"AutoAttack: {' or '.join(f'{n:,}' for n in images)} test images, class shares kept. " if images else ""
    return (
        f"The paper's settings in {o.get('epochs')} epochs, learning rate one_cycle, engine {o.get('engine')}; images: "
        f"{counts}, from {o.get('data')}. The weight average and the last weights are judged "
        f"in fp32 (convolutions in TF32, torch's default). {auto}PGD-AT and HAM of a seed share their "
        "warm-up, whose time counts in each."
    )


def _title(run: dict) -> str:
    return f"{TITLES[run['arm']]}, seed {run['seed']}"


def _times(runs: list[dict]) -> str:
    rows = []
    for run in runs:
        seconds, mining = [e["seconds"] for e in run["epochs"]], _mining(run, runs)
        median = f"{statistics.median(mining):.2f}" if mining else "–"
        state = "" if run["finished"] else " (not finished)"
        rows.append([_title(run) + state, len(seconds), f"{sum(seconds):.1f}", f"{sum(mining):.1f}", median])
    return _table(["run", "epochs", "whole run, s", "HAM phase, s", "its median epoch, s"], rows)


def _hard(runs: list[dict]) -> str:
    """h of each epoch that mines."""
    mined = [run for run in runs if any(e["mined"] for e in run["epochs"])]
    if not mined:
        return "No run has mined yet."
    hard = [{e["epoch"]: e["hard_fraction"] for e in run["epochs"] if e["mined"]} for run in mined]
    epochs = sorted(set().union(*hard))
    rows = [[epoch, *(f"{h[epoch]:.3f}" if epoch in h else "–" for h in hard)] for epoch in epochs]
    return _table(["epoch: h", *map(_title, mined)], rows)


def _accuracies(runs: list[dict]) -> str:
    classes = next((run["classes"] for run in runs if run["judged"]), [])
    rows = []
    for run in runs:
        for weights, judged in run["judged"].items():
            for attack, a in judged["attacks"].items():
                numbers = [a["accuracy"], a["worst_class"], a["std"], *a["per_class"]]
                cells = ["–" if v is None else f"{100 * v:.1f}" for v in numbers]
                rows.append([_title(run), AVERAGES[weights], ATTACKS.get(attack, attack), f"{a['n']:,}", *cells])
    head = ["run", "weights", "attack", "images", "average", "worst class", "std", *classes]
    return _table(head, rows) if rows else "No run has been judged yet."
