"""The first section of README.md: which method for which time, from the kept reports of `ham sweep methods` and
`ham sweep frontier`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ham_kernels.report.comparing.frontier import better
from ham_kernels.report.comparing.over_seeds import half
from ham_kernels.report.text_format import attack_title
from readme import measured
from readme.output import markdown

# folders below results/, those of one setting together; one that is missing is left out
SWEEPS = (
    ("sweep_methods_digits", "sweep_field_digits", "sweep_long_digits", "sweep_fair_digits"),
    ("sweep_methods_cifar10", "sweep_fair_cifar10", "sweep_field_cifar10"),
)
IMAGES = {"cifar10-jpeg.tar.xz": "10,000 CIFAR-10 images (small CNN, 15 epochs, judged on 1,000)"}
SHOWN = (  # always
    "PGD-AT", "HAM", "TRADES", "WAT", "DAFA", "FAAL", "MART", "CFA, on PGD-AT", "fair", "fair, fast",
    "PGD-AT, steps of 2 1 0.5 ε, 58 epochs", "PGD-AT, steps of 2 1 0.5 ε, trained at 1.25 ε, 58 epochs",
)  # fmt: skip
PROMISED = re.compile(r"fair(?P<fast>, fast)?(, (?P<epochs>\d+) epochs)?")
APART = 0.01, 0.04  # average and worst class of one run: AutoAttack's random parts change with the batch size


def frontier(here: Path) -> str:
    found = [folders for names in SWEEPS if (folders := [name for name in names if _data(name).exists()])]
    return "\n\n".join(text for folders in found for text in _of_setting(folders))


def _data(folder: str) -> Path:
    return measured.RESULTS / folder / "data.json"


def methods_of(folders: Sequence[str]) -> list[dict]:
    """The methods of kept reports of one setting, each once, with what is better in "worse_than".

    One that was trained on another machine than its report's PGD-AT is compared by the forwards of its training.
    Raises: ValueError where a seed of what two of them have differs: they were not trained or judged alike.
    """
    found: dict[str, dict] = {}  # each with PGD-AT of its own report in "base"
    accuracies: dict[tuple[str, int], tuple[float, float]] = {}
    for folder in folders:
        (section,) = measured.read(f"{folder}/data.json")["sections"]
        methods = section["frontier"]["methods"]
        base = next(m for m in methods if m["baseline"])
        for m in methods:
            found.setdefault(m["title"], m | {"base": base})
        for run, accuracy in _by_seed(section):
            first = accuracies.setdefault(run, accuracy)
            if any(abs(a - b) > much for a, b, much in zip(first, accuracy, APART, strict=True)):
                raise ValueError(f"{folder}: its {run[0]} of seed {run[1]} is not that of {folders[0]}")
    for m in found.values():  # absolute times are of their own report
        m["time"], m["forwards"] = {"mean": m["relative_time"]}, {"mean": m["relative_forwards"]}
    for m in found.values():
        m["worse_than"] = [other["title"] for other in found.values() if better(other, m, _cost(other, m))]
    return list(found.values())


def _cost(*methods: dict) -> str:
    return "forwards" if any(m["relative_time"] is None for m in methods) else "time"


def _by_seed(section: dict) -> Iterator[tuple[tuple[str, int], tuple[float, float]]]:
    """((title, seed), (average, worst class)) of each run that was judged by the strongest attack."""
    for group in section["groups"]:
        judged = group["accuracy"].get(group["weights"], {}).get(section["frontier"]["attack"])
        if judged is not None and len(judged["average"]["values"]) == len(group["seeds"]):
            values = zip(judged["average"]["values"], judged["worst"]["values"], strict=True)
            yield from zip(((group["title"], seed) for seed in group["seeds"]), values, strict=True)


def _of_setting(folders: Sequence[str]) -> list[str]:
    data = [measured.read(f"{name}/data.json") for name in folders]
    (section,) = data[0]["sections"]
    f, images = section["frontier"], IMAGES.get(section["dataset"], section["dataset"])
    methods = {m["title"]: m for m in methods_of(folders)}
    shown = [m for m in methods.values() if m["title"] in SHOWN or not m["worse_than"]]
    shown = [m for m in shown if m["title"] != "natural"]
    shown.sort(key=lambda m: m["relative_time"] or m["relative_forwards"])
    attack, seeds = attack_title(f["attack"]), sorted({m["seeds"] for m in methods.values()})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    head = [
        "training time / PGD-AT",
        "forwards / PGD-AT",
        "method",
        f"average %, {attack}",
        "worst class %",
        "std over classes",
    ]
    rows = [head] + [
        [
            "–" if m["relative_time"] is None else f"{m['relative_time']:.2f}",
            f"{m['relative_forwards']:.2f}",
            _name(m),
            *(share(m[key]) for key in ("average", "worst", "std")),
        ]
        for m in shown
    ]
    elsewhere = any(m["relative_time"] is None for m in methods.values())
    said = (
        f"{images}, ε {section['eps']:.3g}, {counted} seeds, ± half the 95 % interval over them; bold is not "
        "best: no other method that was measured is better in time"
        + " (where one was trained on another processor than its PGD-AT, in forwards)" * elsewhere
        + f", average and worst class at once; {measured.machines_of(*data)}."
    )
    promises = [_promise(images, m) for m in methods.values() if PROMISED.fullmatch(m["title"])]
    return [said, markdown(rows), "\n".join(promises)]


def _name(m: dict) -> str:
    return m["title"] if m["worse_than"] else f"**{m['title']}**"


def share(value: dict) -> str:
    known = None not in (value["low"], value["high"])
    return f"{100 * value['mean']:.1f}" + (f" ± {100 * half(value):.1f}" if known else "")


def _promise(images: str, m: dict) -> str:
    base = m["base"]
    average, worst = (100 * (m[k]["mean"] - base[k]["mean"]) for k in ("average", "worst"))
    std = 100 * (m["std"]["mean"] / base["std"]["mean"] - 1)
    found = PROMISED.fullmatch(m["title"])
    title = "`fair`" + " with `--fast`" * bool(found["fast"])
    title += f" in {found['epochs']} epochs" * bool(found["epochs"])
    if m["relative_time"] is None:
        cost = f"{m['relative_forwards']:.2f} of the forwards"
    else:
        cost = f"{m['relative_time']:.2f} of the time"
    return measured.minus(
        f"- {title} against PGD-AT of the same sweep, on {images}: average {average:+.1f} points, worst class "
        f"{worst:+.1f}, std over classes {std:+.0f} %, at {cost}."
    )
