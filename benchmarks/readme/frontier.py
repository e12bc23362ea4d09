"""The first section of README.md: which method for which time, from the kept reports of `ham sweep methods` and
`ham sweep frontier`."""

from __future__ import annotations

from pathlib import Path

from ham_kernels.report.text_format import attack_title
from readme import measured
from readme.output import markdown

SWEEPS = ("sweep_methods_digits", "sweep_methods_cifar10")  # folders below results/; one that is missing is left out
IMAGES = {"cifar10-jpeg.tar.xz": "10,000 CIFAR-10 images (small CNN, 15 epochs, judged on 1,000)"}
SHOWN = ("PGD-AT", "HAM", "TRADES", "WAT", "DAFA", "FAAL", "MART", "CFA, on PGD-AT", "fair", "fair, fast")  # always
PROMISED = ("fair", "fair, fast")


def frontier(here: Path) -> str:
    found = [measured.read(f"{name}/data.json") for name in SWEEPS if (measured.RESULTS / name / "data.json").exists()]
    return "\n\n".join(text for data in found for text in _of_sweep(data))


def _of_sweep(data: dict) -> list[str]:
    (section,) = data["sections"]
    f, images = section["frontier"], IMAGES.get(section["dataset"], section["dataset"])
    methods = {m["title"]: m for m in f["methods"]}
    shown = [m for m in methods.values() if m["title"] in SHOWN or not m["dominated_by"]["time"]]
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
    said = (
        f"{images}, ε {section['eps']:.3g}, {counted} seeds, ± half the 95 % interval over them; bold: no "
        f"other method here is better in time, average and worst class; {measured.machines_of(data)}."
    )
    promises = [_promise(images, methods[name], methods["PGD-AT"]) for name in PROMISED if name in methods]
    return [said, markdown(rows), "\n".join(promises)]


def _name(m: dict) -> str:
    return m["title"] if m["dominated_by"]["time"] else f"**{m['title']}**"


def share(value: dict) -> str:
    return f"{100 * value['mean']:.1f} ± {50 * (value['high'] - value['low']):.1f}"


def _promise(images: str, m: dict, base: dict) -> str:
    average, worst = (100 * (m[k]["mean"] - base[k]["mean"]) for k in ("average", "worst"))
    std = 100 * (m["std"]["mean"] / base["std"]["mean"] - 1)
    title = m["title"].replace(", ", "` with `--")
    if m["relative_time"] is None:
        cost = f"{m['relative_forwards']:.2f} of the forwards"
    else:
        cost = f"{m['relative_time']:.2f} of the time"
    return measured.minus(
        f"- `{title}` against PGD-AT on {images}: average {average:+.1f} points, worst class {worst:+.1f}, std over "
        f"classes {std:+.0f} %, at {cost}."
    )
