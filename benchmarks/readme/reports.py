"""Sections from the reports of `ham` that are kept in benchmarks/results/sweep_NAME/: what each compares, and how its
runs were made. `here` is the page's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from ham_kernels.report.strength import strongest
from readme import measured
from readme.measured import HOLDS, machines_of, minus, read, seeds_of, stay
from readme.output import markdown

FIGURES = {
    "frontier_time.png": "Worst class and average against training time",
    "frontier_forwards.png": "Worst class and average against forwards",
    "frontier_classes.png": "Change of each class against PGD-AT",
    "worst_class_time.png": "Worst-class accuracy against training time",
    "class_accuracy.png": "Robust accuracy of each class",
}
SMALL_CIFAR = (
    "--dataset cifar10 --path cifar10-jpeg.tar.xz --model small_cnn --train-images 10000 --test-images 1000 "
    "--val-images 500 --epochs 15 --precision bf16 --channels-last on --compile on --winograd on --attacks clean pgd20 "
    "autoattack --search fast --no-masking"
)
HOW = {  # the runs of each were made; {small_cifar} stands for those flags, {seeds} and {machines} for theirs
    "methods_digits": (
        "`ham sweep methods --seeds {seeds} --out runs/methods-digits --attacks clean pgd20 cw20` on the digits, `ham "
        "sweep frontier --only pgd_at-steps2-1-0.5` and `ham sweep ablations --only '*drop_only' '*reweight_only' "
        "'*random_rows'` likewise, `ham evaluate RUN --attacks autoattack --search fast --batch-size 600 "
        "--no-analyses` of each run, on all 517 test images, and `ham report` of them; {machines}. CPU times are of "
        "one thread; the other core had other work."
    ),
    "field_digits": (
        "`ham train --method trades --model small_cnn --seed 9 --out runs/teacher`, then `ham sweep methods --only "
        "pgd_at fair fsr frl cfol fair_tat mail bat fat rslad fair_ard absld free_at atta --seeds {seeds} --teacher "
        "runs/teacher --attacks clean pgd20 cw20 autoattack --search fast --out runs/field-digits` on the digits; for "
        "fine-tuned models `ham train --from runs/field-digits/pgd_at-seedN --method frl` (fsr, faal, fair), and for "
        "ATTA with the switches of `fair` `ham train --method atta --step-sizes 1 --loss boosted_ce --class-weights "
        "hedge`, both judged by `ham evaluate` likewise. AutoAttack on all 517 test images; {machines}. CPU times are "
        "of one thread, the other core had other work; those of a teacher's training are not in them."
    ),
    "long_digits": (
        "`ham sweep methods --only pgd_at fair-fast-long --seeds {seeds} --attacks clean pgd20 cw20 autoattack "
        "--search fast --no-masking --out runs/long-digits` on the digits, then `ham sweep frontier --only "
        "pgd_at-steps2-1-0.5-long` with the same flags: an attack of three large steps, in as many epochs as take the "
        "time of PGD-AT's 24; `ham train --method fair --loss ce --fast --time 0.95` and `ham train --method pgd_at "
        "--step-sizes 2 1 0.5 --eps-factor 1.25 --time 0.95`, judged by `ham evaluate` likewise. AutoAttack on all "
        "517 test images; {machines}. CPU times are of one thread; the other core had other work."
    ),
    "fair_digits": (
        "`ham sweep methods --only pgd_at fair fair-fast-long fair-fast --seeds {seeds} --attacks clean pgd20 cw20 "
        "autoattack --search fast --out runs/fair-digits` on the digits: `fair` as it is now. AutoAttack on all 517 "
        "test images; {machines}. CPU times are of one thread; the other core had other work."
    ),
    "methods_cifar10": (
        "`ham sweep methods --only pgd_at ham-M3-lam1 fair fair-fast dafa wat trades --seeds {seeds} {small_cifar}`; "
        "`ham train --method fair --loss ce --fast --epochs 36` with the same flags; `ham train --from RUN --method "
        "fsr` (faal, offsets) of PGD-AT's runs, both judged by `ham evaluate` likewise; {machines}. CPU times are of "
        "one thread; the other core had other work."
    ),
    "fair_cifar10": (
        "`ham sweep methods --only pgd_at fair-fast --seeds {seeds} {small_cifar}`; `ham train --method fair --fast "
        "--epochs 36` with the same flags, judged by `ham evaluate` likewise: `fair` as it is now; {machines}. CPU "
        "times are of one thread; the other core had other work."
    ),
    "field_cifar10": (
        "`ham train --method trades --seed 9 --out runs/teacher` with the flags below, without those of judging; `ham "
        "sweep methods --only pgd_at free_at atta n_fgsm fgsm_rs fair_tat mart cfol frl mail fat bat fsr rslad "
        "fair_ard absld --seeds {seeds} --teacher runs/teacher {small_cifar}`; {machines}. CPU times are of one "
        "thread; the other core had other work."
    ),
    "numerics": (
        "`ham sweep baseline --seeds {seeds} --attacks clean pgd20 cw20 --out runs/numerics/fp32` on the digits, `ham "
        "sweep ham` with the same flags, both again with `--winograd require`, with `--precision bf16`, and with both, "
        "each kind in a folder of its own, then `ham report` of the four folders; {machines}."
    ),
    "cheaper": (
        "`ham sweep cheaper --seeds {seeds} --attacks clean pgd20 cw20 --out runs/sweep-cheaper` on the digits; "
        "{machines}."
    ),
    "digits": (
        "`ham sweep ablations --seeds {seeds} --attacks clean pgd20 cw20` on the digits (and `ham evaluate RUN "
        "--attacks autoattack` for PGD-AT and HAM, then `ham report runs/sweep-digits`); {machines}. The other core "
        "had other work now and then."
    ),
    "cifar_small": (
        "A small CNN, 10,000 training and 2,000 test images, 20 epochs. The tar holds class folders of slightly lossy "
        "JPEG copies; without `--path`, torchvision downloads the published images. `ham sweep baseline --seeds "
        "{seeds} --dataset cifar10 --path cifar10-jpeg.tar.xz --model small_cnn --train-images 10000 --test-images "
        "2000 --val-images 500 --epochs 20 --precision bf16 --channels-last on --compile on --winograd on --attacks "
        "clean pgd20 cw20 --out runs/cifar-small`, then `ham sweep ham` with the same flags, `ham evaluate RUN "
        "--attacks autoattack --images 400 --no-masking --no-analyses` of each run, and `ham report runs/cifar-small`; "
        "{machines}. The other core had other work, so that times are rough."
    ),
}
EARLIER = (
    " *Earlier fair* is `fair` at the commits named: today `--loss boosted_ce`, where no other is told, with "
    "`--class-strength 0.6 --trust 0 --eps-factor 1`."
)


def kept(name: str) -> Callable[[Path], str]:
    """One of HOW."""
    return lambda here: report(here, f"sweep_{name}", HOW[name])


def sweep(here: Path) -> str:
    told = report(here, "sweep_digits", f"Made by {HOW['digits']}")
    return f"{told}\n\n{_judgements(read('sweep_digits/data.json'))}"


def sweep_figure(here: Path) -> str:
    return report(here, "sweep_digits", f"A real figure of such a report, made by {HOW['digits']}", table=False)


def cifar_small(here: Path) -> str:
    told = report(here, "sweep_cifar_small", HOW["cifar_small"])
    return f"{told}\n\n{_judgements(read('sweep_cifar_small/data.json'))}"


def report(here: Path, name: str, said: str, *, table: bool = True) -> str:
    """What a report compares, kept in benchmarks/results/: its own tables, and its figures where they are kept too.

    `said` is the sentence above it; {seeds} and {machines} stand for those of its runs.
    """
    folder = measured.RESULTS / name
    data = json.loads((folder / "data.json").read_text())
    for section in data["sections"]:
        _check_headline(section, folder)
    failed = [run["name"] for run in data["runs"] if run["state"] != "finished"]
    seeds = " ".join(map(str, sorted({run["seed"] for run in data["runs"]})))
    parts = [
        said.format(seeds=seeds, machines=machines_of(data), small_cifar=SMALL_CIFAR)
        + (f" Did not finish: {', '.join(failed)}." if failed else " All runs finished.")
        + EARLIER * any(run["group"].startswith("earlier fair") for run in data["runs"]),
    ]
    figures = [(folder / name, words) for name, words in FIGURES.items()]
    parts += [f"![{words}]({os.path.relpath(path, here)})" for path, words in figures if path.exists()]
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


def _judgements(data: dict) -> str:
    """The claims of HAM as its method is published, and what the checks for gradient masking found in each method."""
    (section,) = data["sections"]
    lines = [
        f"- {c['claim']}: {c['measured']}" + (f": {HOLDS[c['holds']]}" if c["holds"] is not None else "")
        for c in section["claims"] if c["group"] == "HAM"
    ]  # fmt: skip
    shares = {group["title"]: stay(group) for group in section["groups"] if group["title"] in ("PGD-AT", "HAM")}
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
        f"{seeds_of(data)} seeds, all 517 test images. ODI-10 leaves less than AutoAttack in {lower} of {len(apart)} "
        f"methods; the difference of the averages is {minus(f'{min(apart):+.1f}')} to "
        f"{minus(f'{max(apart):+.1f}')} points. The time of both: `bench_autoattack.py`, below.\n\n"
        f"{markdown([head, *rows])}"
    )
