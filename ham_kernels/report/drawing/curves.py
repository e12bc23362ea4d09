"""Figures over epochs and over attack steps: (section of data.json, styles) -> Figure, or None without data."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..comparing.claims import EASY_M, EASY_STAY
from ..comparing.over_seeds import reach
from ..text_format import attack_title
from .figures import MANY_GROUPS, Section, Styles, handles_of, legend_below, style_of

LEAST = 10.0  # percent that an axis of accuracies reaches, where all of them are about 0


def hard_fraction(section: Section, styles: Styles) -> Figure | None:
    """Share of the training images that each epoch trained on."""
    found = [g for g in section["groups"] if "hard_fraction" in g["curves"]]
    if not found:
        return None
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for group in found:
        _curve(axes, group, "hard_fraction", styles, 100, band=has_bands(section))
    axes.set(xlabel="epoch", ylabel="images trained on\n(hard fraction), %", ylim=(0, 103))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _mark_start(axes, section)
    legend_below(figure, handles_of(found, section, styles, marker=""))
    return figure


def training(section: Section, styles: Styles) -> Figure | None:
    """Loss, and validation accuracy (clean and robust, average and worst class) of raw and averaged weights."""
    attack = section["val_attack"]
    panels = []
    for name, title in (("clean", "clean"), (attack, attack_title(attack))) if attack else (("clean", "clean"),):
        panels += [
            (f"{name}.accuracy", f"validation, {title}, %", "average"),
            (f"{name}.worst_class", f"validation, {title}, %", "worst class"),
        ]
    panels.append(("loss", "training loss", ""))
    used = [panel for panel in panels if any(_names(group, panel[0]) for group in section["groups"])]
    if not used:
        return None
    figure = Figure(figsize=(6.5, 2.1 * ((len(used) + 1) // 2) + 0.5), layout="constrained")
    grid = figure.subplots((len(used) + 1) // 2, 2, squeeze=False).ravel()
    for axes, (key, label, title) in zip(grid, used, strict=False):
        for group in section["groups"]:
            names = _names(group, key)
            for name in names:
                raw = name.startswith("val.") and len(names) > 1
                band = not raw and has_bands(section)
                _curve(axes, group, name, styles, 1 if key == "loss" else 100, band=band, pale=raw)
        axes.set(xlabel="epoch", ylabel=label)
        if key != "loss":
            axes.set_ylim(0, max(axes.get_ylim()[1], LEAST))
        axes.set_title(title, loc="left")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _mark_start(axes, section)
    for axes in grid[len(used) :]:
        axes.axis("off")
    found = [g for g in section["groups"] if any(_names(g, key) for key, _, _ in used)]
    handles = handles_of(found, section, styles, marker="")
    if any(name.startswith("val_ema.") for g in found for name in g["curves"]):
        handles += [
            Line2D([], [], color="#444444", linewidth=1.6, label="weight average"),
            Line2D([], [], color="#444444", linewidth=0.8, alpha=0.6, label="raw weights"),
        ]
    legend_below(figure, handles)
    return figure


def easy(section: Section, styles: Styles) -> Figure | None:
    """Of the examples that resist m steps, the share that resists all; and how many they are."""
    found = [g for g in section["groups"] if g["easy"]]
    if not found:
        return None
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for group in found:
        look = style_of(group, styles)
        for axes, key in ((left, "stay_share"), (right, "easy_fraction")):
            points = [(entry["m"], entry[key]) for entry in group["easy"]["by_m"] if entry[key]["mean"] is not None]
            if points:
                error = 100 * np.array([reach(value) for _, value in points]).T
                mean = [100 * value["mean"] for _, value in points]
                axes.errorbar(
                    [m for m, _ in points], mean, error if np.isfinite(error).any() else None, markersize=4,
                    capsize=2, elinewidth=0.8, **look,
                )  # fmt: skip
    star = left.plot(EASY_M, 100 * EASY_STAY, "*", color="black", markersize=11, label="paper: 75 % at M=3")
    last = {group["easy"]["steps"] for group in found} - {None}
    steps = f"all {last.pop()} steps" if len(last) == 1 else "all steps"
    left.set(xlabel="M, attack steps", ylabel=f"of those easy at M,\nresist {steps}, %", ylim=(None, 101))
    right.set(xlabel="M, attack steps", ylabel="easy at M, % of all", ylim=(0, 101))
    ends = [entry["m"] for group in found for entry in group["easy"]["by_m"]]
    for axes in (left, right):
        axes.set_xticks(_counts(max([*ends, EASY_M])))
    legend_below(figure, [*handles_of(found, section, styles), *star])
    return figure


# ---------------------------------------------------------------- parts
def has_bands(section: Section) -> bool:
    """Whether curves have bands: those of many groups would hide each other."""
    return sum(bool(g["curves"]["epoch"]) for g in section["groups"]) <= MANY_GROUPS


def _names(group: dict, key: str) -> list[str]:
    """The curves of a panel that a group has, raw weights first."""
    return [name for name in (key, f"val.{key}", f"val_ema.{key}") if name in group["curves"]]


def _curve(axes: Axes, group: dict, name: str, styles: Styles, scale: float, *, band: bool, pale: bool = False) -> None:
    look = style_of(group, styles)
    curve = {key: _numbers(values, scale) for key, values in group["curves"][name].items()}
    epochs = np.array(group["curves"]["epoch"])
    known = np.isfinite(curve["mean"])  # validation may have run after some epochs only
    epochs, curve = epochs[known], {key: values[known] for key, values in curve.items()}
    weight = {"linewidth": 0.8, "alpha": 0.6, "zorder": look["zorder"] - 0.2} if pale else {"linewidth": 1.6}
    marker = "." if len(epochs) == 1 else ""
    label = None if pale else group["title"]
    axes.plot(epochs, curve["mean"], label=label, **look | {"marker": marker} | weight)
    if band:
        low, high = curve["low"], curve["high"]
        if name != "loss":
            low, high = np.clip((low, high), 0, scale)
        axes.fill_between(epochs, low, high, color=look["color"], alpha=0.13, linewidth=0)


def start_of_mining(section: Section) -> int | None:
    """The first epoch that mines, if it is the same for all groups that do."""
    starts = set()
    for group in section["groups"]:
        curves = group["curves"]
        mining = [e for e, mines in zip(curves["epoch"], curves["mines"], strict=True) if mines]
        starts |= set(mining[:1])
    return starts.pop() if len(starts) == 1 else None


def _mark_start(axes: Axes, section: Section) -> None:
    start = start_of_mining(section)
    if start is not None:
        axes.axvline(start - 0.5, color="#444444", linewidth=0.8, linestyle="dotted")


def _counts(last: int) -> list[int]:
    """Ticks at 1 to `last`, all of a few, and at the paper's M in any case."""
    return sorted({EASY_M, *range(1, last + 1, 1 + last // 13)})


def _numbers(values: list, scale: float) -> np.ndarray:
    return np.array([np.nan if v is None else scale * v for v in values], dtype=float)
