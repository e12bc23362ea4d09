"""What is kept in benchmarks/results/, and sections of it: the claims, the goals on a GPU, bench_pgd.py. `here` is the
page's folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from pgd.results import ROWS, cells, verdict_lines

from readme.output import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
HOLDS = {True: "**holds**", False: "**does not hold**", None: "not judged"}


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def machines_of(*reports: dict) -> str:
    """Where and when the runs of reports were made."""
    runs = [run for data in reports for run in data["runs"]]
    machines = _places({place for run in runs for place in run["machine"].split("; then ")})
    versions = sorted({run["versions"].get("torch", "unknown") for run in runs})
    commits = sorted({run["commit"] or "unknown" for run in runs})
    word = "commit" if len(commits) == 1 else "commits"
    made = sorted({data["made"][:10] for data in reports})
    return f"{'; '.join(machines)}; torch {', '.join(versions)}; {word} {', '.join(commits)}; {', '.join(made)}"


def _places(machines: Iterable[str]) -> list[str]:
    """Machines that differ by the cores that a process may take are one."""
    cores: dict[str, set[int]] = {}
    for machine in machines:
        found = re.search(r"(?<=cores: )\d+", machine)
        told = re.sub(r"(?<=cores: )\d+", "{}", machine)
        cores.setdefault(told, set()).update([int(found[0])] if found else [])
    return sorted(told.format(" or ".join(map(str, sorted(counts)))) for told, counts in cores.items())


# ---------------------------------------------------------------- the claims of the paper
PHASE, WHOLE = "training time −45 %, mining epochs alone", "training time −45 %, whole run"
WORST, STD = "worst class +3.2 points (weight average, {})", "std over classes −22 % (weight average, {})"
JUDGES = ("AutoAttack", "CW-20", "PGD-20")  # the strongest first, as in everything that is told
EASY = "75 % of the examples easy at M = 3 resist all K steps"
Claims = dict[str, str]  # {claim: measured, and whether it holds}


def claims(here: Path) -> str:
    """One line per claim, one column per setting in which it was judged, HAM against PGD-AT."""
    digits, preset, small = (
        read(name) for name in ("bench_pgd_digits.json", "sweep_digits/data.json", "sweep_cifar_small/data.json")
    )
    columns = {
        f"digits, `bench_pgd.py`, {digits['settings']['seeds']} seeds": _claims_of_bench_pgd(digits),
        f"digits, preset of `ham`, {seeds_of(preset)} seeds": _claims_of_report(preset),
        f"10,000 CIFAR-10 images, {seeds_of(small)} seeds": _claims_of_report(small),
    }
    if (found := _gpu_summary()) is not None:
        columns["CIFAR-10, PreActResNet-18"] = _claims_of_gpu(found)
    asked = [PHASE, WHOLE, *(text.format(title) for title in JUDGES for text in (WORST, STD)), EASY]
    rows = [[claim, *(found.get(claim, "not judged") for found in columns.values())] for claim in asked]
    return _left(["claim of the paper", *columns], rows)


def _claims_of_bench_pgd(result: dict) -> Claims:
    return {minus(c["claim"]): _said(c["measured"], c["holds"]) for c in result["claims"]}


def _claims_of_report(data: dict) -> Claims:
    """Those of its group "HAM"."""
    (section,) = data["sections"]
    found = {c["claim"]: _said(c["measured"], c["holds"]) for c in section["claims"] if c["group"] == "HAM"}
    (ham,) = (group for group in section["groups"] if group["title"] == "HAM")
    if (share := stay(ham)) is not None:
        found[EASY] = _said(f"{100 * share:.0f} %", share >= 0.75)
    return found


def stay(group: dict) -> float | None:
    """Of a group's examples that resist M = 3 steps, the share that resists all."""
    entries = (group["easy"] or {"by_m": []})["by_m"]
    return next((entry["stay_share"]["mean"] for entry in entries if entry["m"] == 3), None)


def seeds_of(data: dict) -> int:
    return len({run["seed"] for run in data["runs"]})


def _claims_of_gpu(summary: dict) -> Claims:
    rows = {r["goal"]: f"{r['measured']}: **{r['verdict']}**" for r in summary["table"]}
    found = {goal.removeprefix("HAM: "): words for goal, words in rows.items() if goal.startswith("HAM: ")}
    easy = next((words for claim, words in found.items() if "stay easy" in claim), None)
    return found if easy is None else found | {EASY: easy}


def _said(measured: str, holds: bool | None) -> str:
    return minus(measured if holds is None else f"{measured}: {HOLDS[holds]}")


def minus(text: str) -> str:
    return re.sub(r"(^|[ (])-(?=\d)", r"\1−", text)


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
            "Nothing has been measured on a GPU yet. `python benchmarks/gpu_suite.py --out DIR` does it all, in calls "
            "of 9 minutes: repeat it while its status is 3; with 1 a stage failed (`--retry`). torchvision downloads "
            "CIFAR-10, unless `--data` names a tar of train/CLASS/IMAGE and test/CLASS/IMAGE."
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
        f"λ {s['lam']:g}, batch {s['batch_size']}, learning rate {s['lr']:g}, {s['warmup']} warm-up epochs of "
        f"{s['epochs']}, {s['seeds']} seeds, mean ± std. Machine: {m['cpu']}, cores: {m['cores']}, GPU: {m['gpu']}; "
        f"Python {m['python']}, torch {m['torch']}, torchattacks {m['torchattacks']}, ham_kernels {m['ham_kernels']}; "
        f"{m['date']}."
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
