"""Figures of the frontier: (section `as_compared`, styles) -> Figure, or None without data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.markers import CARETDOWNBASE
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from ..comparing.frontier import GAINS, undominated
from ..comparing.over_seeds import reach
from ..text_format import attack_title
from . import names
from .by_class import MOST
from .figures import BASELINE, Section, Styles, style_of, unit_of_time

GREY = "#a6a6a6"  # what something dominates
LETTERS = 34  # of a name in the figure
FAR = 1 / 3  # of the best average: what has less, such as natural training, stands at the edge with its value
EDGE = 4.0  # points below the others
NEAR = 8  # points: names farther away have a line to their point
DARKER = 0.7  # letters than points, which are larger
HALO = [patheffects.withStroke(linewidth=2, foreground="white")]  # names are read over lines
PLACES = (  # of a name beside its point: (x, y) in points, and how the text lies there
    *((sign * 7, up, "left" if sign > 0 else "right", "center") for up in (0, 6, -6) for sign in (1, -1)),
    *(
        (sign * 4, up, "left" if sign > 0 else "right", "bottom" if up > 0 else "top")
        for up in (8, -8, 16, -16, 26, -26, 36, -36)
        for sign in (1, -1)
    ),
)
WORDS = {"worst": "worst class", "average": "average"}  # the panels, from the top


class Spot(NamedTuple):
    """Where a method is drawn in a panel, in units of its axes."""

    method: dict[str, Any]
    x: float
    y: float
    ahead: bool  # nothing dominates it
    far: bool  # at the edge, as its value is far below the others
    named: bool
    text: str  # beside it: its name, or its number in the table


def against_time(section: Section, styles: Styles) -> Figure | None:
    """Worst class and average against the training time of whole runs."""
    times = [m["time"]["mean"] for m in _known(section, "time")]
    scale, unit = unit_of_time(max(times, default=0.0))
    return _figure(section, styles, "time", scale, f"{time_words(section)} of the whole run, {unit}")


def time_words(section: Section) -> str:
    return "CPU time" if section["frontier"]["clock"] == "cpu_time" else "training time"


def against_forwards(section: Section, styles: Styles) -> Figure | None:
    """The same against the forwards of the cost model."""
    words = "forwards of the whole run for each training image (cost model)"
    return _figure(section, styles, "forwards", 1.0, words)


# ---------------------------------------------------------------- accuracy against a cost
def _known(section: Section, cost: str) -> list[dict[str, Any]]:
    return [m for m in section["frontier"]["methods"] if None not in (m[n]["mean"] for n in (cost, *GAINS))]


def _figure(section: Section, styles: Styles, cost: str, scale: float, xlabel: str) -> Figure | None:
    if len(_known(section, cost)) < 2:
        return None
    figure = Figure(figsize=(6.5, 7.0), layout="constrained")
    FigureCanvasAgg(figure)  # names are laid where they fit, which takes a canvas
    panels = figure.subplots(2, 1, sharex=True)
    spots = {gain: _spots(section, cost, scale, gain) for gain in WORDS}
    for axes, gain in zip(panels, WORDS, strict=True):
        _panel(axes, section, styles, spots[gain], cost, scale, gain)
        axes.set_ylabel(f"{WORDS[gain]} under\n{attack_title(section['attack'])}, %")
    panels[1].set_xlabel(xlabel)
    ends = [spot.x for spot in spots["worst"]]
    room = 0.06 * (max(ends) - min(ends)) or 0.06 * max(ends)
    panels[0].set_xlim(0 if min(ends) < max(ends) / 2 else min(ends) - room, max(ends) + room)
    figure.draw_without_rendering()  # fixes where the axes are
    for axes, gain in zip(panels, WORDS, strict=True):
        _name(axes, section, styles, spots[gain])
    return figure


def _spots(section: Section, cost: str, scale: float, gain: str) -> list[Spot]:
    methods, titles = _known(section, cost), names.titles(section, LETTERS)
    numbers = {m["title"]: str(i) for i, m in enumerate(section["frontier"]["methods"], 1)}
    best = {m["title"] for m in undominated(methods, cost)}
    values = [100 * m[gain]["mean"] for m in methods]
    floor = min(
        value
        for m, value in zip(methods, values, strict=True)
        if m["baseline"] or gain != "average" or value >= FAR * max(values)
    )
    named = _named(methods, cost, gain)
    out = []
    for m, value in zip(methods, values, strict=True):
        ahead, far = m["title"] in best, value < floor
        text = (titles if m["title"] in named else numbers)[m["title"]] + (f": {value:.1f}" if far else "")
        y = max(floor - EDGE, 0.0) if far else value
        out.append(Spot(m, m[cost]["mean"] / scale, y, ahead, far, m["title"] in named, text))
    return out


def _named(methods: list[dict], cost: str, gain: str) -> set[str]:
    """The baseline, and what is the most that its cost buys in this panel; above, also what is so in no panel.

    So each that nothing dominates is named at least once, and names stay few where many are close.
    """

    def most(m: dict, gain: str) -> bool:
        gains = [(m[cost]["mean"] - o[cost]["mean"], o[gain]["mean"] - m[gain]["mean"]) for o in methods]
        return not any(min(pair) >= 0 and max(pair) > 0 for pair in gains)

    best = undominated(methods, cost)
    here = [m for m in best if most(m, gain) or (gain == "worst" and not any(most(m, name) for name in WORDS))]
    return {m["title"] for m in (*here, *methods) if m in here or m["baseline"]}


def _panel(axes: Axes, section: Section, styles: Styles, spots: list[Spot], cost: str, scale: float, gain: str) -> None:
    groups = {g["title"]: g for g in section["groups"]}
    for spot in spots:
        look = style_of(groups[spot.method["title"]], styles)
        look = {
            "color": look["color"] if spot.ahead or spot.method["baseline"] else GREY,
            "marker": CARETDOWNBASE if spot.far else look["marker"],
        }
        order = 3.0 if spot.ahead or spot.far else 2.2
        if not spot.far:
            bars = {"ecolor": look["color"], "elinewidth": 0.9, "capsize": 2, "alpha": 0.55, "zorder": order - 0.1}
            errors = _reach(spot.method[gain], 100), _reach(spot.method[cost], 1 / scale)
            axes.errorbar(spot.x, spot.y, *errors, fmt="none", **bars)
        look |= {"markersize": 8 if spot.ahead else 6, "markeredgecolor": "white", "markeredgewidth": 0.7}
        axes.plot(spot.x, spot.y, linestyle="none", zorder=order, **look)
        if spot.method["baseline"]:
            cross = {"color": BASELINE["color"], "linewidth": 0.8, "linestyle": "dotted", "zorder": 1}
            axes.axvline(spot.x, **cross)
            axes.axhline(spot.y, **cross)
    axes.step(*_most(spots), where="post", color="#444444", linewidth=0.8, zorder=1.5)
    _limit(axes, spots, gain)


def _most(spots: list[Spot]) -> tuple[np.ndarray, np.ndarray]:
    """(costs, the most that each buys)."""
    x, y = np.array(sorted((spot.x, spot.y) for spot in spots)).T
    return x, np.maximum.accumulate(y)


def _limit(axes: Axes, spots: list[Spot], gain: str) -> None:
    """All spots, and of the error bars what is not far from them: those of two seeds reach over the whole axis."""
    at = [spot.y for spot in spots]
    near = [spot.method[gain] for spot in spots if not spot.far]
    ends = [100 * value[end] for value in near for end in ("low", "high") if value[end] is not None]
    low = max(min([*at, *ends]), min(at) - MOST)
    high = min(max([*at, *ends]), max(at) + MOST)
    room = max(0.06 * (high - low), 1.0)
    axes.set_ylim(max(low - room, -1.5), high + room)


def _reach(value: dict, scale: float) -> np.ndarray:
    """(2, 1) lengths of an error bar; NaN where there is none."""
    return scale * np.array(reach(value))[:, None]


# ---------------------------------------------------------------- names beside the points
def _name(axes: Axes, section: Section, styles: Styles, spots: list[Spot]) -> None:
    """Names first, so that the numbers find room after them; in the colour of their points, as others may be near."""
    colours = {g["title"]: np.array(to_rgb(style_of(g, styles)["color"])) for g in section["groups"]}
    marks = [_box((x, y), (x, y), 7) for x, y in axes.transData.transform([(spot.x, spot.y) for spot in spots])]
    x, y = _most(spots)
    corners = axes.transData.transform(np.stack([np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]], 1))
    taken = [_box(a, b, 1) for a, b in pairwise(corners)]
    for i, spot in sorted(enumerate(spots), key=lambda entry: not entry[1].named):
        look = {"fontsize": 8 if spot.named else 6.5, "color": "#6f6f6f"}
        if spot.named or spot.ahead:
            look["color"] = DARKER * colours[spot.method["title"]]
        taken.append(_beside(axes, spot, [*taken, *marks[:i], *marks[i + 1 :]], look))


def _beside(axes: Axes, spot: Spot, taken: Sequence[Bbox], look: dict) -> Bbox:
    """Writes where least is covered, nearest first. Returns the box of the text, in pixels."""
    renderer, inside = axes.figure.canvas.get_renderer(), axes.get_window_extent()
    look |= {"textcoords": "offset points", "path_effects": HALO, "zorder": 5}
    found: list[tuple[float, int, Bbox]] = []
    for i, (x, y, ha, va) in enumerate(PLACES):
        note = axes.annotate(spot.text, (spot.x, spot.y), (x, y), ha=ha, va=va, **look)
        box = note.get_window_extent(renderer)
        note.remove()
        outside = box.width * box.height - _shared(box, inside)
        found.append((10 * outside + sum(_shared(box, other) for other in taken), i, box))
        if found[-1][0] == 0:
            break
    _, i, box = min(found, key=lambda place: place[:2])
    x, y, ha, va = PLACES[i]
    if abs(y) > NEAR:  # others may lie between
        look["arrowprops"] = {"arrowstyle": "-", "color": look["color"], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    note: Annotation = axes.annotate(spot.text, (spot.x, spot.y), (x, y), ha=ha, va=va, **look)
    note.set_in_layout(False)
    return box


def _box(a: Sequence[float], b: Sequence[float], room: float) -> Bbox:
    low, high = np.minimum(a, b) - room, np.maximum(a, b) + room
    return Bbox([low, high])


def _shared(a: Bbox, b: Bbox) -> float:
    """Area of what two boxes share."""
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else both.width * both.height
