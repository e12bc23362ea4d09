"""What --preset stands for, and the line of evidence that chose each: the kept report of `ham sweep methods`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ham_kernels.commands.flag_base import PRESETS
from ham_kernels.methods.registry import class_of
from ham_kernels.report.text_format import attack_title
from readme import measured
from readme.frontier import SWEEPS, methods_of, share
from readme.output import markdown

OWN = ("fair", "earlier fair", "HAM")  # not of a paper about fairness; HAM's has its own page
Method = dict
NEAR = 0.02  # of a worst class: one of the 50 or so test images that a class of the digits has
# The rule, and whom it asks: the best worst class of these is the preset; of those so near to it, the best average.
RULES: dict[str, tuple[str, Callable[[Method, Method], bool]]] = {
    "fair": (
        "best worst class, average within a point of PGD-AT's",
        lambda m, base: m["average"]["mean"] >= base["average"]["mean"] - 0.01,
    ),
    "fast": (
        "best worst class in at most 0.45 of PGD-AT's time, average within two points",
        lambda m, base: (m["relative_time"] or 1.0) <= 0.45 and m["average"]["mean"] >= base["average"]["mean"] - 0.02,
    ),
    "paper": (
        "best worst class of the methods as published",
        lambda m, _: not m["title"].startswith(OWN) and "early drop" not in m["title"],
    ),
}


def chosen(asked: list[Method]) -> Method:
    highest = max(m["worst"]["mean"] for m in asked)
    return max((m for m in asked if m["worst"]["mean"] >= highest - NEAR), key=lambda m: m["average"]["mean"])


def presets(_: Path) -> str:
    """Raises: ValueError where a rule does not choose what the flag stands for."""
    folders = SWEEPS[0]
    data = [measured.read(f"{name}/data.json") for name in folders]
    (section,), methods = data[0]["sections"], methods_of(folders)
    base = next(m for m in methods if m["baseline"])
    attack = attack_title(section["frontier"]["attack"])
    rows = [["`--preset`", "is", "chosen as", f"average %, {attack}", "worst class %", "time / PGD-AT"]]
    for name, (rule, asks) in RULES.items():
        best = chosen([m for m in methods if asks(m, base)])
        method, switches, time = PRESETS[name]
        wanted = class_of(method)(**switches).describe()
        title, longer = re.subn(r", \d+ epochs$", "", best["title"])
        if (title.replace(", ", " (", 1) + ")" * (", " in title), bool(longer)) != (wanted, time is not None):
            raise ValueError(f"presets: --preset {name} is {wanted}, and the rule chooses {best['title']}")
        told = " ".join(
            [f"`--method {method}`", *(f"`--{switch}`" for switch in switches)]
            + [f"`--time {time}`"] * (time is not None)
        )
        numbers = [share(best["average"]), share(best["worst"]), f"{best['relative_time']:.2f}"]
        rows.append([f"`{name}`", told, rule, *numbers])
    rows.append(["", "PGD-AT", "", share(base["average"]), share(base["worst"]), "1.00"])
    said = (
        f"{section['dataset']}, ε {section['eps']:.3g}, {base['seeds']} seeds, ± half the 95 % interval over them; "
        f"{measured.machines_of(*data)}."
    )
    return f"{said}\n\n{markdown(rows)}"
