"""Sections of README.md and docs/results.md, each from files in benchmarks/results/. `here` is the page's folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from pgd.results import ROWS, cells, verdict_lines

from ham_kernels.report.strength import strongest
from readme.output import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = {
    "frontier_time.png": "Worst class and average against training time",
    "frontier_forwards.png": "Worst class and average against forwards",
    "frontier_classes.png": "Change of each class against PGD-AT",
    "worst_class_time.png": "Worst-class accuracy against training time",
    "class_accuracy.png": "Robust accuracy of each class",
}
HOLDS = {True: "**holds**", False: "**does not hold**", None: "not judged"}


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


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
        f"digits, preset of `ham`, {_seeds_of(preset)} seeds": _claims_of_report(preset),
        f"10,000 CIFAR-10 images, {_seeds_of(small)} seeds": _claims_of_report(small),
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
    if (share := _stay(ham)) is not None:
        found[EASY] = _said(f"{100 * share:.0f} %", share >= 0.75)
    return found


def _stay(group: dict) -> float | None:
    """Of a group's examples that resist M = 3 steps, the share that resists all."""
    entries = (group["easy"] or {"by_m": []})["by_m"]
    return next((entry["stay_share"]["mean"] for entry in entries if entry["m"] == 3), None)


def _seeds_of(data: dict) -> int:
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


# ---------------------------------------------------------------- reports of `ham`
EARLIER = (
    " *Earlier fair* is `fair` at the commits named: today `--loss boosted_ce`, where no other is told, with "
    "`--class-strength 0.6 --trust 0 --eps-factor 1`."
)
SMALL_CIFAR = (
    "--dataset cifar10 --path cifar10-jpeg.tar.xz --model small_cnn --train-images 10000 --test-images 1000 "
    "--val-images 500 --epochs 15 --precision bf16 --channels-last on --compile on --winograd on --attacks clean pgd20 "
    "autoattack --search fast --no-masking`"
)


def report(here: Path, name: str, said: str, *, table: bool = True) -> str:
    """What a report compares, kept in benchmarks/results/: its own tables, and its figures where they are kept too.

    `said` is the sentence above it; {seeds} and {machines} stand for those of its runs.
    """
    folder = RESULTS / name
    data = json.loads((folder / "data.json").read_text())
    for section in data["sections"]:
        _check_headline(section, folder)
    failed = [run["name"] for run in data["runs"] if run["state"] != "finished"]
    seeds = " ".join(map(str, sorted({run["seed"] for run in data["runs"]})))
    parts = [
        said.format(seeds=seeds, machines=machines_of(data))
        + (f" Did not finish: {', '.join(failed)}." if failed else " All runs finished.")
        + EARLIER * any(run["group"].startswith("earlier fair") for run in data["runs"]),
    ]
    kept = [(name, words) for name, words in FIGURES.items() if (folder / name).exists()]
    parts += [f"![{words}]({os.path.relpath(folder / name, here)})" for name, words in kept]
    tables = [folder / name for name in ("frontier.md", "table.md") if (folder / name).exists()] if table else []
    return "\n\n".join([*parts, *(path.read_text().strip() for path in tables)])


def _check_headline(section: dict, folder: Path) -> None:
    """Raises: ValueError where figures and table are not by the strongest attack that all groups were judged with."""
    groups = [g for g in section["groups"] if g["finished"]]
    judged = [
        {a for a, found in g["accuracy"].get(g["weights"], {}).items() if found["average"]["n"] == len(g["runs"])}
        for g in groups
    ]
    wanted = strongest([attacks for attacks in judged if attacks])
    if section["attack"] != wanted:
        raise ValueError(
            f"{folder.name}: its figures are by {section['attack']}, but all its runs were judged by {wanted}; make "
            "the report again with `ham report`"
        )


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


def _judgements(data: dict) -> str:
    """The claims of HAM as its method is published, and what the checks for gradient masking found in each method."""
    (section,) = data["sections"]
    lines = [
        f"- {c['claim']}: {c['measured']}" + (f": {HOLDS[c['holds']]}" if c["holds"] is not None else "")
        for c in section["claims"] if c["group"] == "HAM"
    ]  # fmt: skip
    shares = {group["title"]: _stay(group) for group in section["groups"] if group["title"] in ("PGD-AT", "HAM")}
    shares = {title: share for title, share in shares.items() if share is not None}
    if shares:
        steps = next(group["easy"]["steps"] for group in section["groups"] if group["title"] == "HAM")
        words = ", ".join(f"{100 * share:.0f} % ({title})" for title, share in shares.items())
        lines.append(
            f"- of the examples that are easy at M = 3, so many resist all {steps} steps (paper: 75 %): {words}"
        )
    for group in section["groups"]:
        run = [check for check in group["masking"] if check["runs"]]
        found = [
            f"{c['check']}: suspicious in {len(c['suspicious'])} of {c['runs']} runs" for c in run if c["suspicious"]
        ]
        if run:
            lines.append(
                f"- checks for gradient masking, {group['title']}: {'; '.join(found) or f'all {len(run)} passed'}"
            )
    return "\n".join(lines)


SWEEP = (
    "`ham sweep ablations --seeds {seeds} --attacks clean pgd20 cw20` on the digits (and `ham evaluate RUN --attacks "
    "autoattack` for PGD-AT and HAM, then `ham report runs/sweep-digits`); {machines}. The other core had other work "
    "now and then."
)


def sweep(here: Path) -> str:
    return "\n\n".join([report(here, "sweep_digits", f"Made by {SWEEP}"), _judgements(read("sweep_digits/data.json"))])


def sweep_figure(here: Path) -> str:
    return report(here, "sweep_digits", f"A real figure of such a report, made by {SWEEP}", table=False)


def methods_digits(here: Path) -> str:
    return report(
        here, "sweep_methods_digits",
        "`ham sweep methods --seeds {seeds} --out runs/methods-digits --attacks clean pgd20 cw20` on the digits, `ham "
        "sweep frontier --only pgd_at-steps2-1-0.5` and `ham sweep ablations --only '*drop_only' '*reweight_only' "
        "'*random_rows'` likewise, `ham evaluate RUN --attacks autoattack --search fast --batch-size 600 "
        "--no-analyses` of each run, on all 517 test images, and `ham report` of them; {machines}. CPU times are of "
        "one thread; the other core had other work.",
    )  # fmt: skip


def field_digits(here: Path) -> str:
    return report(
        here, "sweep_field_digits",
        "`ham train --method trades --model small_cnn --seed 9 --out runs/teacher`, then `ham sweep methods --only "
        "pgd_at fair fsr frl cfol fair_tat mail bat fat rslad fair_ard absld free_at atta --seeds {seeds} --teacher "
        "runs/teacher --attacks clean pgd20 cw20 autoattack --search fast --out runs/field-digits` on the digits; for "
        "fine-tuned models `ham train --from runs/field-digits/pgd_at-seedN --method frl` (fsr, faal, fair), and for "
        "ATTA with the switches of `fair` `ham train --method atta --step-sizes 1 --loss boosted_ce --class-weights "
        "hedge`, both judged by `ham evaluate` likewise. AutoAttack on all 517 test images; {machines}. CPU times are "
        "of one thread, the other core had other work; those of a teacher's training are not in them.",
    )  # fmt: skip


def long_digits(here: Path) -> str:
    return report(
        here, "sweep_long_digits",
        "`ham sweep methods --only pgd_at fair-fast-long --seeds {seeds} --attacks clean pgd20 cw20 autoattack "
        "--search fast --no-masking --out runs/long-digits` on the digits, then `ham sweep frontier --only "
        "pgd_at-steps2-1-0.5-long` with the same flags: an attack of three large steps, in as many epochs as take the "
        "time of PGD-AT's 24; `ham train --method fair --loss ce --fast --time 0.95` and `ham train --method pgd_at "
        "--step-sizes 2 1 0.5 --eps-factor 1.25 --time 0.95`, judged by `ham evaluate` likewise. AutoAttack on all "
        "517 test images; {machines}. CPU times are of one thread; the other core had other work.",
    )  # fmt: skip


def fair_digits(here: Path) -> str:
    return report(
        here, "sweep_fair_digits",
        "`ham sweep methods --only pgd_at fair fair-fast-long fair-fast --seeds {seeds} --attacks clean pgd20 cw20 "
        "autoattack --search fast --out runs/fair-digits` on the digits: `fair` as it is now. AutoAttack on all 517 "
        "test images; {machines}. CPU times are of one thread; the other core had other work.",
    )  # fmt: skip


def methods_cifar10(here: Path) -> str:
    return report(
        here, "sweep_methods_cifar10",
        "`ham sweep methods --only pgd_at ham-M3-lam1 fair fair-fast dafa wat trades --seeds {seeds} " + SMALL_CIFAR +
        "; `ham train --method fair --loss ce --fast --epochs 36` with the same flags; `ham train --from RUN --method "
        "fsr` (faal, offsets) of PGD-AT's runs, both judged by `ham evaluate` likewise; {machines}. CPU times are of "
        "one thread; the other core had other work.",
    )  # fmt: skip


def fair_cifar10(here: Path) -> str:
    return report(
        here, "sweep_fair_cifar10",
        "`ham sweep methods --only pgd_at fair-fast --seeds {seeds} " + SMALL_CIFAR + "; `ham train --method fair "
        "--fast --epochs 36` with the same flags, judged by `ham evaluate` likewise: `fair` as it is now; {machines}. "
        "CPU times are of one thread; the other core had other work.",
    )  # fmt: skip


def field_cifar10(here: Path) -> str:
    return report(
        here, "sweep_field_cifar10",
        "`ham sweep methods --only pgd_at free_at atta n_fgsm fgsm_rs fair_tat mart cfol frl mail fat bat --seeds "
        "{seeds} " + SMALL_CIFAR
        + "; {machines}. CPU times are of one thread; the other core had other work.",
    )  # fmt: skip


def odi(here: Path) -> str:
    """What ODI leaves beside what AutoAttack leaves, of the methods that all seeds were judged by both."""
    data = read("sweep_methods_digits/data.json")
    (section,) = data["sections"]
    rows, apart = [], []
    for group in section["groups"]:
        found = group["accuracy"].get(group["weights"], {})
        both = [found.get(name) for name in ("autoattack", "odi10")]
        if None in both or any(b["average"]["n"] < len(group["runs"]) for b in both):
            continue
        shares = [100 * b[measure]["mean"] for measure in ("average", "worst") for b in both]
        apart.append(shares[1] - shares[0])
        cells = [
            text
            for ours, other in (shares[:2], shares[2:])
            for text in (f"{ours:.1f}", f"{other:.1f}", minus(f"{other - ours:+.1f}"))
        ]
        rows.append([group["title"], *cells])
    head = [
        "method", "average %, AutoAttack", "ODI-10", "difference", "worst class %, AutoAttack", "ODI-10", "difference",
    ]  # fmt: skip
    lower = sum(gap < 0 for gap in apart)
    return (
        "`ham evaluate RUN --attacks odi10 --no-masking --no-analyses` of the runs above, "
        f"{_seeds_of(data)} seeds, all 517 test images. ODI-10 leaves less than AutoAttack in {lower} of {len(apart)} "
        f"methods; the difference of the averages is {minus(f'{min(apart):+.1f}')} to "
        f"{minus(f'{max(apart):+.1f}')} points. The time of both: `bench_autoattack.py`, below.\n\n"
        f"{markdown([head, *rows])}"
    )


def cheaper(here: Path) -> str:
    said = (
        "`ham sweep cheaper --seeds {seeds} --attacks clean pgd20 cw20 --out runs/sweep-cheaper` on the digits; "
        "{machines}."
    )
    return report(here, "sweep_cheaper", said)


def cifar_small(here: Path) -> str:
    table = report(
        here, "sweep_cifar_small",
        "A small CNN, 10,000 training and 2,000 test images, 20 epochs. The tar holds class folders of slightly lossy "
        "JPEG copies; without `--path`, torchvision downloads the published images. `ham sweep "
        "baseline --seeds {seeds} --dataset cifar10 --path cifar10-jpeg.tar.xz --model small_cnn --train-images 10000 "
        "--test-images 2000 --val-images 500 --epochs 20 --precision bf16 --channels-last on --compile on --winograd "
        "on --attacks clean pgd20 cw20 --out runs/cifar-small`, then `ham sweep ham` with the same flags, `ham "
        "evaluate RUN --attacks autoattack --images 400 --no-masking --no-analyses` of each run, and `ham report "
        "runs/cifar-small`; {machines}. The other core had other work, so that times are rough.",
    )  # fmt: skip
    return "\n\n".join([table, _judgements(read("sweep_cifar_small/data.json"))])


def numerics(here: Path) -> str:
    return report(
        here, "sweep_numerics",
        "`ham sweep baseline --seeds {seeds} --attacks clean pgd20 cw20 --out runs/numerics/fp32` on the digits, `ham "
        "sweep ham` with the same flags, both again with `--winograd require`, with `--precision bf16`, and with both, "
        "each kind in a folder of its own, then `ham report` of the four folders; {machines}.",
    )  # fmt: skip
