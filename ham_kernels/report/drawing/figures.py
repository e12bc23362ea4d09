"""What figures share, and those of one point or line per method: (section of data.json, styles) -> Figure or None."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.colors
import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..comparing.accuracies import judged
from ..comparing.over_seeds import reach
from ..text_format import attack_title, unit_of_time
from . import names

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = ("o", "^", "D", "v", "P", "X", "<")
BASELINE = {"color": "#7f7f7f", "marker": "s", "zorder": 2.1}  # above the lines of others, which are at 2
DASH = 4.5  # of the baseline, in line widths; its gaps are as long
MANY_GROUPS = 6  # above: a heat map instead of bars
LONG = 4.5  # of the lines in a legend, in its font size, so that their dashes are seen
DPI = 150
SETTINGS = {
    "pdf.fonttype": 42,  # letters stay letters in a paper
    "text.parse_math": False,  # a class may be called $a$
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "lines.linewidth": 1.4, "savefig.dpi": DPI,
}  # fmt: skip

Section = dict[str, Any]
Styles = dict[str, int]


def drawing(texts: Iterable[str] = ()):
    """The context in which figures that hold these texts are drawn and saved, whatever the user's matplotlibrc says."""
    return matplotlib.style.context(["default", SETTINGS | {"font.family": names.families(texts)}])


def style_of(group: dict[str, Any], styles: Styles) -> dict[str, Any]:
    """Colour, marker and dashes of a group: the same in all figures of a report."""
    per_gap = max(1, math.ceil(len(styles) / 2))
    dash = max(DASH, per_gap)
    if group["baseline"]:
        return BASELINE | {"linestyle": (0, (dash, dash))}
    i = styles[group["title"]]
    return {
        "color": PALETTE[i % len(PALETTE)],
        "marker": MARKERS[(i + i // len(PALETTE)) % len(MARKERS)],
        "linestyle": _dashes(i, per_gap, dash),
        "zorder": 2.0,
    }


def _dashes(i: int, per_gap: int, dash: float) -> Any:
    """Line i shows a part of every line below it, and the baseline's dashes leave a part of each: none is covered.

    All repeat after two dashes and two gaps of the baseline. Each ends a piece before the one below it: the first
    `per_gap` lines in the second gap, the others in the first.
    """
    piece = dash / per_gap
    if i == 0:
        return "solid"
    if i <= per_gap:
        return 0, (4 * dash - i * piece, i * piece)
    short = (i - per_gap) * piece
    return 0, (2 * dash - short, short, dash, dash)


def shown(group: dict[str, Any], section: Section) -> dict[str, Any]:
    """The group's accuracies under the section's attack, for the weights shown; empty where there are none."""
    return judged(group, section["attack"])


def timed(section: Section) -> list[tuple[dict, dict, dict]]:
    """(group, time, worst class) of those that have both."""
    return [
        (g, g["time"], found["worst"])
        for g in section["groups"]
        if (found := shown(g, section)) and g["time"]["mean"] is not None and found["worst"]["mean"] is not None
    ]


# ---------------------------------------------------------------- worst class against time
def worst_against_time(section: Section, styles: Styles) -> Figure | None:
    """One small point per run, one large per group with its spread; the baseline's cross of dotted lines."""
    found = timed(section)
    if not found:
        return None
    scale, unit = unit_of_time(max(time["mean"] for _, time, _ in found))
    swept, handles = _sweep([g for g, _, _ in found])
    figure = Figure(figsize=(6.5, 4.0), layout="constrained")
    axes = figure.subplots()
    for group, time, worst in found:
        look = swept.get(group["title"]) or {"markersize": 8, **style_of(group, styles)}
        look = look | {"linestyle": "none", "zorder": 4 - look["markersize"] / 20}  # small over large
        x, y = time["mean"] / scale, 100 * worst["mean"]
        x_error, y_error = np.array([reach(time)]).T / scale, 100 * np.array([reach(worst)]).T
        bars = {"fmt": "none", "ecolor": look["color"], "elinewidth": 1, "capsize": 2, "alpha": 0.7}
        axes.errorbar(x, y, y_error, x_error, **bars)
        axes.plot(x, y, markeredgecolor="white", markeredgewidth=0.7, **look)
        runs = [
            (t / scale, 100 * w) for t, w in zip(time["values"], worst["values"], strict=True) if None not in (t, w)
        ]
        if len(runs) > 1:
            axes.plot(*zip(*runs, strict=True), ".", color=look["color"], markersize=4, alpha=0.6)
        if group["baseline"]:
            cross = {"color": BASELINE["color"], "linewidth": 0.8, "linestyle": "dotted"}
            axes.axvline(x, **cross)
            axes.axhline(y, **cross)
    axes.set(xlabel=f"training time, {unit}", ylabel=f"worst class under {attack_title(section['attack'])}, %")
    ends = [t / scale for _, time, _ in found for t in _reached(time)]
    axes.set_xlim(0 if min(ends) < max(ends) / 2 else 0.8 * min(ends), 1.04 * max(ends))
    low, high = axes.get_ylim()
    apart = max(0.0, 4 - (high - low)) / 2  # differences below a point or so are not blown up
    axes.set_ylim(max(-1.0, low - apart), high + apart)  # a marker at 0 is seen whole
    handles += handles_of([g for g, _, _ in found if g["title"] not in swept], section, styles, linestyle="none")
    legend_below(figure, handles, lines=False)
    return figure


def _reached(time: dict) -> list[float]:
    """All times drawn of a group: its runs, its mean and the ends of its error bar."""
    ends = (time["mean"] + side for side in np.array(reach(time)) * (-1, 1))
    return [t for t in (*time["values"], time["mean"], *ends) if t is not None and np.isfinite(t)]


def _sweep(groups: list[dict]) -> tuple[dict[str, dict], list[Line2D]]:
    """Looks and legend of HAM groups that differ in M and λ alone: colour by M, shape and size by λ; else nothing."""
    swept = ("method.screen_steps", "method.lam")
    members: list[dict] = []
    for group in groups:
        if not (group["mines_hard_rows"] and all(isinstance(group["settings"].get(k), (int, float)) for k in swept)):
            continue
        rest = {k: v for k, v in group["settings"].items() if k not in swept}
        if not members or rest == {k: v for k, v in members[0]["settings"].items() if k not in swept}:
            members.append(group)
    if len(members) < 3:
        return {}, []
    m_values, lam_values = (sorted({g["settings"][k] for g in members}) for k in swept)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(m_values)))
    by_m = {m: {"color": matplotlib.colors.to_hex(shade)} for m, shade in zip(m_values, shades, strict=True)}
    by_lam = {
        lam: {"marker": MARKERS[i % len(MARKERS)], "markersize": 6 + 6 * i / max(1, len(lam_values) - 1)}
        for i, lam in enumerate(lam_values)
    }
    looks = {g["title"]: by_m[g["settings"][swept[0]]] | by_lam[g["settings"][swept[1]]] for g in members}
    blank = {"linestyle": "none", "markeredgecolor": "white"}
    handles = [Line2D([], [], label=f"M={m}", marker="o", markersize=8, **blank, **look) for m, look in by_m.items()]
    handles += [Line2D([], [], label=f"λ={lam:g}", color="#444444", **blank, **look) for lam, look in by_lam.items()]
    return looks, handles


# ---------------------------------------------------------------- confidence
def confidence(section: Section, styles: Styles) -> Figure | None:
    """Histogram of the true class's probability at adversarial examples, one line per group."""
    found = [(g, g["confidence"]) for g in section["groups"] if g["confidence"]]
    if not found:
        return None
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for group, part in found:
        look = style_of(group, styles)
        line = {key: look[key] for key in ("color", "linestyle", "zorder")} | {"linewidth": 1.6}
        axes.stairs(100 * np.array(part["shares"]), part["edges"], baseline=None, label=group["title"], **line)
    for threshold in {part["threshold"] for _, part in found} - {None}:
        axes.axvline(threshold, color="#444444", linewidth=1, linestyle="dashed")
        axes.annotate(
            f"over-confident: ≥ {threshold:g}", (threshold, 1), (-4, -2), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="right", va="top", fontsize=8,
        )  # fmt: skip
    axes.set(xlabel="probability of the true class", ylabel="adversarial examples, %", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    legend_below(figure, handles_of([g for g, _ in found], section, styles, marker=""))
    return figure


# ---------------------------------------------------------------- shared
def handles_of(groups: Sequence[dict], section: Section, styles: Styles, **changed: Any) -> list[Line2D]:
    """What a legend shows of these groups, looks changed as told."""
    shown_as = names.titles(section)
    return [Line2D([], [], label=shown_as[g["title"]], markersize=7, **style_of(g, styles) | changed) for g in groups]


def legend_below(figure: Figure, handles: Sequence[Artist], lines: bool = True) -> None:
    """As many columns as fit beside each other in 6.5 inches. A figure of many groups grows with its legend."""
    labels = [handle.get_label() for handle in handles]
    columns = max(1, min(len(labels), 88 // (max(map(len, labels), default=1) + (12 if lines else 7))))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * max(0, math.ceil(len(labels) / columns) - 3))
    # Labels are given, as matplotlib leaves out those that begin with "_" where it looks for them.
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=LONG if lines else None)
