"""Figures with one value per class: (section of data.json, styles) -> matplotlib Figure, or None without data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..comparing.over_seeds import reach
from ..text_format import MANY_CLASSES, attack_title
from . import names
from .figures import MANY_GROUPS, Section, Styles, handles_of, legend_below, shown, style_of

BRIGHT = 43  # percent from which viridis needs black letters
USUAL = 4  # times the usual change: where the colours of a heat map end
MOST = 15.0  # points that an axis reaches beyond the changes; error bars may end outside
ROUNDING = 1e-9  # bars that end at a multiple of ten need no more room


def class_bars(section: Section, styles: Styles) -> Figure | None:
    """Robust accuracy of each class; dashed: each group's worst class."""
    rows = [(g, acc["per_class"], acc["worst"]["mean"]) for g in section["groups"] if (acc := shown(g, section))]
    return _by_class(rows, section, styles, f"accuracy under {attack_title(section['attack'])}, %") if rows else None


def class_differences(section: Section, styles: Styles) -> Figure | None:
    """What each class gains or loses against the baseline, in points."""
    rows = [(g, g["differences"], None) for g in section["groups"] if g["differences"]]
    base = names.titles(section, 24).get(section["baseline"])
    label = f"{attack_title(section['attack'])}: gain over\n{base}, points"
    return _by_class(rows, section, styles, label, signed=True) if rows else None


def overconfident(section: Section, styles: Styles) -> Figure | None:
    """Share of each class's adversarial examples that are over-confident."""
    rows = [(g, g["confidence"]["overconfident"], None) for g in section["groups"] if g["confidence"]]
    return _by_class(rows, section, styles, "over-confident\nadversarial examples, %") if rows else None


def mapped(rows: Sequence) -> bool:
    """Whether so many methods are a heat map, which has no error bars."""
    return len(rows) > MANY_GROUPS


def _by_class(rows: list[tuple], section: Section, styles: Styles, label: str, signed: bool = False) -> Figure:
    order = list(range(len(section["classes"])))
    if len(order) > MANY_CLASSES:
        order = _extremes(rows) if signed else _worst_first(section, rows)
    below = "class"
    if len(order) > MANY_CLASSES:
        below = f"{len(order)} classes, sorted by the first method's accuracy under {attack_title(section['attack'])}"
    elif len(order) < len(section["classes"]):
        below = f"class: the {of_extremes(len(section['classes']))}"
    if mapped(rows):
        return _heat_map(rows, section, order, label, below, signed)
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    if len(order) > MANY_CLASSES:
        _steps(axes, rows, order, styles)
    else:
        _bars(axes, rows, order, styles)
    _name_classes(axes, section, order)
    if signed:
        axes.axhline(0, color="black", linestyle="dashed", linewidth=0.8)
        axes.set_ylim(*_near(rows, order))
    else:
        top = _top(rows, order)
        axes.set_ylim(0, 1.04 * top)  # bars and errors that reach it are seen whole
        axes.set_yticks(range(0, top + 1, 2 if top == 10 else 5 if top <= 30 else 10 if top <= 50 else 20))
        if {spreads[c]["mean"] for _, spreads, _ in rows for c in order} - {None} == {0}:
            axes.text(0.5, 0.5, "0 % in all classes", transform=axes.transAxes, ha="center", va="center")
    axes.grid(axis="x", visible=False)
    axes.set(xlabel=below, ylabel=label)
    lines = len(order) > MANY_CLASSES
    look = {"marker": ""} if lines else {"marker": "s", "linestyle": "none"}
    handles = handles_of([g for g, _, _ in rows], section, styles, **look)
    if signed:  # the line at 0
        handles = [*handles_of([section["groups"][0]], section, styles, marker="", color="black"), *handles]
    legend_below(figure, handles, lines)
    return figure


def _top(rows: list[tuple], order: Sequence[int]) -> int:
    """Percent up to which bars and their errors reach, rounded up to tens, from 10 to 100."""
    found = [_percent([spreads[c] for c in order]) for _, spreads, _ in rows]
    highest = max(np.nanmax(mean + np.nan_to_num(error[1]), initial=0.0) for mean, error in found)
    return min(100, max(10, 10 * math.ceil(highest / 10 - ROUNDING)))


def _near(rows: list[tuple], order: Sequence[int]) -> tuple[float, float]:
    """Ends of an axis of changes: all of them, and of the error bars what is not far beyond; those of few seeds are."""
    mean, error = map(np.array, zip(*(_percent([spreads[c] for c in order]) for _, spreads, _ in rows), strict=True))
    changes, (below, above) = np.nan_to_num(mean), np.nan_to_num(error).swapaxes(0, 1)
    low = max(min(0.0, (changes - below).min()), changes.min() - MOST)
    high = min(max(0.0, (changes + above).max()), changes.max() + MOST)
    room = max(0.05 * (high - low), 0.5)
    return low - room, high + room


def _worst_first(section: Section, rows: list[tuple]) -> list[int]:
    """Classes from the one with the lowest robust accuracy of the first group on; those without a value last."""
    first = next((acc["per_class"] for g in section["groups"] if (acc := shown(g, section))), rows[0][1])
    values = [np.inf if spread["mean"] is None else spread["mean"] for spread in first]
    return sorted(range(len(values)), key=lambda c: values[c])


def _extremes(rows: list[tuple]) -> list[int]:
    """Classes with the largest losses, then those with the largest gains, by the mean over the rows."""
    found = {}
    for c in range(len(rows[0][1])):
        known = [spreads[c]["mean"] for _, spreads, _ in rows if spreads[c]["mean"] is not None]
        if known:
            found[c] = statistics.fmean(known)
    order = sorted(found, key=found.__getitem__)
    half = MANY_CLASSES // 2
    return order if len(order) <= MANY_CLASSES else [*order[:half], *order[-half:]]


def of_extremes(classes: int) -> str:
    """What a figure of differences shows of many classes."""
    half = MANY_CLASSES // 2
    return f"{half} largest losses and {half} largest gains of {classes} classes"


def _bars(axes: Axes, rows: list[tuple], order: Sequence[int], styles: Styles) -> None:
    width = 0.84 / len(rows)
    for i, (group, spreads, worst) in enumerate(rows):
        look = style_of(group, styles)
        at = np.arange(len(order)) + (i - (len(rows) - 1) / 2) * width
        mean, error = _percent([spreads[c] for c in order])
        axes.bar(at, mean, width * 0.94, color=look["color"])
        axes.errorbar(at, mean, error, fmt="none", ecolor="#333333", elinewidth=0.8, capsize=min(2.0, 16 * width))
        if worst is not None:
            axes.axhline(100 * worst, color=look["color"], linewidth=1, linestyle="dashed")
    for position, c in enumerate(order):
        if all(spreads[c]["mean"] is None for _, spreads, _ in rows):
            axes.text(position, 0, " no value", rotation=90, ha="center", va="bottom", fontsize=7, color="#555555")


def _steps(axes: Axes, rows: list[tuple], order: Sequence[int], styles: Styles) -> None:
    for group, spreads, worst in rows:
        look = style_of(group, styles)
        mean, error = _percent([spreads[c] for c in order])
        at = np.arange(len(order))
        line = {key: look[key] for key in ("color", "linestyle", "zorder")}
        axes.step(at, mean, where="mid", **line)
        low, high = np.clip((mean - error[0], mean + error[1]), 0, 100)
        axes.fill_between(at, low, high, step="mid", color=look["color"], alpha=0.12, lw=0)
        if worst is not None:
            axes.axhline(100 * worst, color=look["color"], linewidth=1, linestyle="dashed")
    axes.set_xlim(-0.5, len(order) - 0.5)


def _heat_map(
    rows: list[tuple], section: Section, order: Sequence[int], label: str, below: str, signed: bool
) -> Figure:
    values = np.array([_percent([spreads[c] for c in order])[0] for _, spreads, _ in rows])
    figure = Figure(figsize=(6.5, 1.6 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    top = _strongest_shade(values)
    limits = {"cmap": "PuOr", "vmin": -top, "vmax": top} if signed else {"cmap": "viridis", "vmin": 0, "vmax": 100}
    image = axes.imshow(values, aspect="auto", **limits)
    axes.grid(visible=False)
    titles = names.titles(section, 38)
    axes.set_yticks(range(len(rows)), [titles[g["title"]] for g, _, _ in rows])
    _name_classes(axes, section, order)
    axes.set_xlabel(below)
    if len(order) <= 12:
        for (i, j), value in np.ndenumerate(values):
            dark = abs(value) > 0.6 * top if signed else value < BRIGHT
            if np.isfinite(value):
                ink = "white" if dark else "black"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color=ink)
    beyond = "both" if signed and np.nanmax(np.abs(values), initial=0.0) > top else "neither"
    figure.colorbar(
        image, ax=axes, extend=beyond, label=label.replace("\n", " "), location="top", shrink=0.7, aspect=40
    )
    return figure


def _strongest_shade(values: np.ndarray) -> float:
    """Of changes: that of the largest, but no more than a few times the usual one, so that the others are seen."""
    sizes = np.abs(values[np.isfinite(values)])
    usual = np.median(sizes[sizes > 0]) if sizes.any() else 1.0
    return max(1.0, min(sizes.max(initial=1.0), USUAL * usual))


def _percent(spreads: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Means (n,) and errors below and above (2, n) in percent; NaN where there is none."""
    mean = np.array([np.nan if s["mean"] is None else 100 * s["mean"] for s in spreads])
    error = np.array([(np.nan, np.nan) if s["mean"] is None else reach(s) for s in spreads]).reshape(-1, 2).T
    return mean, 100 * error


def _name_classes(axes: Axes, section: Section, order: Sequence[int]) -> None:
    """A tick at each class, or at every k-th of more than fit."""
    called, every = names.classes(section), math.ceil(len(order) / MANY_CLASSES)
    words = [called[c] for c in order[::every]]
    crowded = (max(map(len, words)) + 1) * len(words) >= 70
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(0, len(order), every), words, **turned)
    if turned:  # takes no room from what is drawn
        width, height = axes.figure.get_size_inches()
        axes.figure.set_size_inches(width, height + 0.05 * max(map(len, words)))
