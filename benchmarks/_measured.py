"""Sections of README.md and docs/results.md, each from files in benchmarks/results/. `here` is the page's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import mean

import _kernel_report
import _training_report
import bench_winograd
from _results import CLAIM_TIME, ROWS, cells, markdown, spread, verdict_lines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = {
    "worst_class_time.png": "Worst-class accuracy against training time",
    "class_accuracy.png": "Robust accuracy of each class",
}
HOLDS = {True: "**holds**", False: "**does not hold**", None: "not judged"}


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


# ---------------------------------------------------------------- the claims of the paper
PHASE, WHOLE = "training time −45 %, mining epochs alone", "training time −45 %, whole run"
WORST, STD = "worst class +3.2 points (weight average, {})", "std over classes −22 % (weight average, {})"
JUDGES = {"PGD-20": "pgd20", "CW-20": "cw20", "AutoAttack": "autoattack"}
EASY = "75 % of the examples easy at M = 3 resist all K steps"
Claims = dict[str, str]  # {claim: measured, and whether it holds}


def claims(here: Path) -> str:
    """One line per claim, one column per setting in which it was judged, HAM against PGD-AT.

    What bench_pgd.py does not judge on the digits comes from the report of `ham`, whose preset has other batches.
    """
    preset = _claims_of_report(read("sweep_digits/data.json"))
    digits, small, gpu = read("bench_pgd_digits.json"), read("sweep_cifar_small/data.json"), _gpu_summary()
    preset = {claim: f"{words} (`ham` preset)" for claim, words in preset.items()}
    columns = {
        f"digits, small CNN, {digits['settings']['seeds']} seeds": preset | _claims_of_bench_pgd(digits),
        f"10,000 CIFAR-10 images, small CNN, {_seeds_of(small)} seeds": _claims_of_report(small),
        "CIFAR-10, PreActResNet-18": {} if gpu is None else _claims_of_gpu(gpu),
    }
    asked = [PHASE, WHOLE, *(text.format(title) for title in JUDGES for text in (WORST, STD)), EASY]
    rows = [[claim, *(found.get(claim, "not measured") for found in columns.values())] for claim in asked]
    return _left(["claim of the paper", *columns], rows)


def _claims_of_bench_pgd(result: dict) -> Claims:
    """In the words of `ham report`."""
    ham, base = result["table"]["ham"], result["table"]["pgd_at"]
    found = {claim: _time(mean(ham[f"{key}_ratio"]) - 1) for claim, key in ((PHASE, "phase"), (WHOLE, "whole"))}
    for title, key in JUDGES.items():
        if f"ema_{key}_worst" not in ham:
            continue
        gain = [100 * (a - b) for a, b in zip(ham[f"ema_{key}_worst"], base[f"ema_{key}_worst"], strict=True)]
        average = 100 * (mean(ham[f"ema_{key}_robust"]) - mean(base[f"ema_{key}_robust"]))
        words = f"{mean(gain):+.1f} ± {spread(gain):.1f} points (average over all images {average:+.1f})"
        judged = {c["claim"]: c["holds"] for c in result["claims"]}
        found[WORST.format(title)] = _said(words, judged[f"worst class +3.2 points (weight average, {title})"])
        change = mean(ham[f"ema_{key}_std"]) / mean(base[f"ema_{key}_std"]) - 1
        found[STD.format(title)] = _said(f"{change:+.0%}", judged[f"class std -22 % (weight average, {title})"])
    return found


def _time(change: float) -> str:
    return _said(f"{change:+.0%}", change <= CLAIM_TIME + 1e-9)


def _claims_of_report(data: dict) -> Claims:
    """Those of its group "HAM"."""
    (section,) = data["sections"]
    found = {c["claim"]: _said(c["measured"], c["holds"]) for c in section["claims"] if c["group"] == "HAM"}
    (ham,) = (group for group in section["groups"] if group["title"] == "HAM")
    for entry in (ham["easy"] or {"by_m": []})["by_m"]:
        if entry["m"] == 3:
            share = entry["stay_share"]["mean"]
            found[EASY] = _said(f"{share:.0%}", share >= 0.75)
    return found


def _seeds_of(data: dict) -> int:
    return len({run["seed"] for run in data["runs"]})


def _claims_of_gpu(summary: dict) -> Claims:
    rows = {r["goal"]: f"{r['measured']}: **{r['verdict']}**" for r in summary["table"]}
    found = {goal.removeprefix("HAM: "): words for goal, words in rows.items() if goal.startswith("HAM: ")}
    easy = next((words for claim, words in found.items() if "stay easy" in claim), None)
    return found if easy is None else found | {EASY: easy}


def _said(measured: str, holds: bool | None) -> str:
    return f"{measured}: {HOLDS[holds]}".replace("-", "−").replace("%:", " %:").replace("  %", " %")


def _left(head: list[str], rows: list[list[str]]) -> str:
    """A table of words."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gpu_summary() -> dict | None:
    return read("gpu/summary.json") if (RESULTS / "gpu" / "summary.json").exists() else None


def gpu(here: Path) -> str:
    """Goals on a GPU, from the summary that docs/gpu-results.md is made of."""
    summary = _gpu_summary()
    if summary is None:
        return (
            "Nothing has been measured on a GPU yet. `python benchmarks/gpu_suite.py --out DIR --data CIFAR10.tar` "
            "does it all, in slots of some minutes."
        )
    paper = ("Claims of the paper", "Stages without a result")
    rows = [[r["goal"], r["measured"], f"**{r['verdict']}**"] for r in summary["table"] if r["section"] not in paper]
    page = os.path.relpath(ROOT / "docs" / "gpu-results.md", here)
    where = f"{' and '.join(summary['gpus'])}, {summary['made'][:10]}; [all of it]({page})."
    return f"{where}\n\n{_left(['goal on a GPU', 'measured', 'held or not'], rows)}"


# ---------------------------------------------------------------- bench_pgd.py
def bench_pgd_setup(result: dict) -> str:
    s, m = result["settings"], result["machine"]
    return (
        f"Digits, 1×8×8, ε {s['eps']:g}, step {s['step_size']:g}, K {s['steps']}, M {s['screen_steps']}, "
        f"λ {s['lam']:g}, {s['warmup']} warm-up epochs of {s['epochs']}, {s['seeds']} seeds, mean ± std. "
        f"Machine: {m['cpu']}, cores: {m['cores']}, GPU: {m['gpu']}; Python {m['python']}, torch {m['torch']}, "
        f"torchattacks {m['torchattacks']}; {m['date']}."
    )


def bench_pgd(here: Path) -> str:
    result = read("bench_pgd_digits.json")
    lines = [f"- {line}" for line in verdict_lines(result)]
    return "\n\n".join([bench_pgd_setup(result), markdown(cells(result["table"])), "\n".join(lines)])


def bench_pgd_short(here: Path) -> str:
    """Ratios, and accuracies of the weight average."""
    result = read("bench_pgd_digits.json")
    head, *rows = cells(result["table"])
    short = [
        row for (key, *_), row in zip(ROWS, rows, strict=True)
        if key in ("h", "predicted_ratio", "phase_ratio", "whole_ratio") or key.startswith("ema_")
    ]  # fmt: skip
    return f"{bench_pgd_setup(result)}\n\n{markdown([head, *short])}"


# ---------------------------------------------------------------- reports of `ham`
def report(here: Path, name: str, said: str, *, table: bool = True) -> str:
    """What a report compares, kept in benchmarks/results/: its own table, and its figures where they are kept too.

    `said` is the sentence above it; {seeds} and {machines} stand for those of its runs.
    """
    folder = RESULTS / name
    data = json.loads((folder / "data.json").read_text())
    failed = [run["name"] for run in data["runs"] if run["state"] != "finished"]
    seeds = " ".join(map(str, sorted({run["seed"] for run in data["runs"]})))
    parts = [
        said.format(seeds=seeds, machines=_machines_of(data))
        + (f" Did not finish: {', '.join(failed)}." if failed else " All runs finished."),
    ]
    kept = [(name, words) for name, words in FIGURES.items() if (folder / name).exists()]
    parts += [f"![{words}]({os.path.relpath(folder / name, here)})" for name, words in kept]
    return "\n\n".join([*parts, (folder / "table.md").read_text().strip()] if table else parts)


def _machines_of(data: dict) -> str:
    """Where and when the runs of a report were made."""
    machines = sorted({run["machine"] for run in data["runs"]})
    versions = sorted({run["versions"].get("torch", "unknown") for run in data["runs"]})
    return f"{'; '.join(machines)}; torch {', '.join(versions)}; {data['made'][:10]}"


SWEEP = (
    "`ham sweep ablations --seeds {seeds} --attacks clean pgd20 cw20` on the digits (and `ham evaluate RUN --attacks "
    "autoattack --images 100` for PGD-AT and HAM, then `ham report runs/sweep-digits`); {machines}."
)


def sweep(here: Path) -> str:
    return report(here, "sweep_digits", f"Made by {SWEEP}")


def sweep_figure(here: Path) -> str:
    return report(here, "sweep_digits", f"A real figure of such a report, made by {SWEEP}", table=False)


def cheaper(here: Path) -> str:
    said = "`ham sweep cheaper --seeds {seeds} --attacks clean pgd20 cw20` on the digits; {machines}."
    return report(here, "sweep_cheaper", said)


def cifar_small(here: Path) -> str:
    (section,) = read("sweep_cifar_small/data.json")["sections"]
    lines = [f"- {c['claim']}: {c['measured']}: {HOLDS[c['holds']]}" for c in section["claims"]]
    stay = {
        group["title"]: entry["stay_share"]["mean"]
        for group in section["groups"]
        for entry in group["easy"]["by_m"]
        if entry["m"] == 3
    }
    shares = ", ".join(f"{100 * share:.0f} % ({title})" for title, share in stay.items())
    lines.append(f"- of the examples that are easy at M=3, so many resist all {section['groups'][0]['easy']['steps']} "
                 f"steps (paper: 75 %): {shares}")  # fmt: skip
    table = report(
        here, "sweep_cifar_small",
        "A small CNN, 10,000 training and 2,000 test images (of a slightly lossy JPEG copy), 20 epochs. `ham sweep "
        "baseline --seeds {seeds} --dataset cifar10 --path cifar10-jpeg.tar.xz --model small_cnn --train-images 10000 "
        "--test-images 2000 --val-images 500 --epochs 20 --precision bf16 --channels-last on --compile on --winograd "
        "on --attacks clean pgd20 cw20 --out runs/cifar-small`, then `ham sweep ham` with the same flags, `ham "
        "evaluate RUN --attacks autoattack --images 100 --no-masking --no-analyses` of each run, and `ham report "
        "runs/cifar-small`; {machines}. The other core had other work, so that times are rough.",
    )  # fmt: skip
    return "\n\n".join([table, "\n".join(lines)])


def numerics(here: Path) -> str:
    return report(
        here, "sweep_numerics",
        "`ham sweep baseline --seeds {seeds} --attacks clean pgd20 cw20 --out runs/numerics/fp32` on the digits, `ham "
        "sweep ham` with the same flags, both again with `--winograd require`, with `--precision bf16`, and with both, "
        "each kind in a folder of its own, then `ham report` of the four folders; {machines}.",
    )  # fmt: skip


# ---------------------------------------------------------------- speed
def devices(pattern: str) -> list[dict]:
    """One result per device, those of a GPU first."""
    found = sorted(RESULTS.glob(pattern), key=lambda p: (p.stem.endswith("_cpu"), p.name))
    return [json.loads(path.read_text()) for path in found]


def training(here: Path) -> str:
    return "\n\n".join(_training_report.readme_section(result) for result in devices("bench_training_*.json"))


def training_short(here: Path) -> str:
    return "\n\n".join(_training_report.readme_short(result) for result in devices("bench_training_*.json"))


def kernels(here: Path) -> str:
    found = [_kernel_report.readme_section(result) for result in devices("kernels_*.json")]
    return "\n\n".join(found) or "The kernels have not been timed on a GPU yet (`python benchmarks/bench_kernels.py`)."


def winograd(here: Path) -> str:
    return bench_winograd.readme_section(read("bench_winograd_cpu.json"))


def costs(here: Path) -> str:
    """What a run costs beside its training."""
    loading, run = read("bench_input_cpu.json"), read("bench_run_cpu.json")
    m, saved, memory = run["machine"], run["checkpoint"], loading["memory"]
    share = next(v for v in run["verdicts"] if v["goal"].startswith("checkpoint"))
    return (
        f"On {m['cpu']}, cores: {m['cores']}, torch {m['torch']}, {m['date']}: "
        f"{memory['median']:,.0f} CIFAR-sized images/s cropped and flipped from memory (`bench_input.py`); a "
        f"checkpoint of PreActResNet-18 with its weight average ({saved['bytes'] / 1e6:.0f} MB), and both "
        f"kinds of best weights, take {saved['median']:.1f} s, {share['measured']} of an epoch of PGD-AT here; "
        f"`ham --help` {run['help']['ham --help']['median']:.2f} s (`bench_run.py`)."
    )
