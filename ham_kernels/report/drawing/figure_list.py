"""Which figures a report has, what is said under them, and their PNG files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ..text_format import attack_title
from . import by_class, curves, figures, frontier, names
from .plot import Plot

Section = dict[str, Any]
UNDER = " under …"  # in a title: the section's attack


class _Entry(NamedTuple):
    name: str
    title: str  # ends with UNDER where it is about one attack
    draw: Callable
    caption: Callable[[Section], str]
    of_many: str = ""  # its title where the classes are too many to show all
    frontier: bool = False  # on the page of the frontier


def plots(data: dict[str, Any]) -> tuple[list[list[Plot]], list[list[str]]]:
    """(figures, titles of those without data), one entry of each per section of data.json."""
    drawn, absent = [], []
    with figures.drawing(_texts(data["sections"])):
        for i, section in enumerate(data["sections"], 1):
            prefix = f"{i}_{_slug(section['title'])}_" if len(data["sections"]) > 1 else ""
            found = [(entry, entry.draw(section, data["styles"])) for entry in ENTRIES]
            drawn.append([_plot(entry, figure, section, prefix) for entry, figure in found if figure])
            absent.append([_titled(e.title, section) for e, figure in found if not (figure or e.frontier)])
    return drawn, absent


def _texts(sections: list[Section]) -> list[str]:
    """All names that figures may show."""
    return [name for s in sections for name in (*s["classes"], *(g["title"] for g in s["groups"]))]


def _plot(entry: _Entry, figure: Figure, section: Section, prefix: str) -> Plot:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=figures.DPI)
    title = entry.of_many if entry.of_many and _many(section) else entry.title
    file = f"figures/{prefix}{entry.name}.png"
    caption = entry.caption(section) + names.key(section)
    return Plot(file, _titled(title, section), caption, png.getvalue(), entry.frontier)


def _titled(title: str, section: Section) -> str:
    return title.replace(UNDER, f" under {attack_title(section['attack'])}" if section["attack"] else "")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("ε", "eps")).strip("-")[:40]


# ---------------------------------------------------------------- captions
def _errors(section: Section, drawn: str = "Error bars") -> str:
    counts = {len(g["runs"]) for g in section["groups"]}
    several = "one standard deviation over seeds"
    one = "the 95 % interval over test images"
    if counts == {1}:
        return f"{drawn}: {one} (one seed each)."
    return f"{drawn}: {several}." if 1 not in counts else f"{drawn}: {several}; with one seed, {one}."


def _mapped(section: Section, key: str) -> bool:
    """Whether a figure over classes is a heat map, which has no error bars."""
    return sum(bool(g[key]) for g in section["groups"]) > figures.MANY_GROUPS


MAPPED = "Means over seeds; their errors are in data.json."


def _many(section: Section) -> bool:
    return len(section["classes"]) > by_class.MANY_CLASSES


def _bars(section: Section) -> str:
    what = f"Accuracy of each class under {attack_title(section['attack'])}."
    if _mapped(section, "accuracy"):
        return f"{what} {MAPPED}"
    return (
        f"{what} {_errors(section, _of_classes(section))} Level dashed lines: the worst class, as in the table (mean "
        "over seeds of each run's worst; below the class that is lowest on average where seeds differ in it)."
    )


def _of_classes(section: Section) -> str:
    return "Bands" if _many(section) else "Error bars"


def _differences(section: Section) -> str:
    what = (
        f"Accuracy under {attack_title(section['attack'])} minus that of {section['baseline']}, for the same weights."
    )
    if _many(section):
        several = sum(bool(g["differences"]) for g in section["groups"]) > 1
        what += (
            f" The {by_class.of_extremes(len(section['classes']))}{', by the mean of the methods' if several else ''}: "
            "of many classes, the extremes owe part of their size to chance."
        )
    if _mapped(section, "differences"):
        return f"{what} {MAPPED}"
    return (
        f"{what} Error bars: standard deviation of the differences seed by seed; with one seed each and the same "
        "images, a 95 % bootstrap interval of both answers in pairs; else both sides' spreads combined (squares added)."
    )


def _time(section: Section) -> str:
    spread = "; ".join(sorted({f"{len(g['runs'])} run{'s' * (len(g['runs']) > 1)}" for g in section["groups"]}))
    return (
        f"Upper left is better. Large: mean of a method ({spread} each), small: its runs. {_errors(section)} "
        "Dotted lines: the baseline. Time is that of the training steps."
    )


def _confidence(section: Section) -> str:
    return f"Softmax probability of the true class at adversarial examples ({_examples(section)}), mean over seeds."


def _examples(section: Section) -> str:
    """ "PGD-10, 2048 training images"."""
    names = {"train": "training", None: "unknown"}
    parts = [g["confidence"] for g in section["groups"] if g["confidence"]]
    told = {f"PGD-{p['steps'] or '?'}, {p['images']} {names.get(p['part'], p['part'])} images" for p in parts}
    return "; ".join(sorted(told))


def _overconfident(section: Section) -> str:
    bounds = sorted({g["confidence"]["threshold"] for g in section["groups"] if g["confidence"]} - {None})
    above = f" of {' or '.join(f'{b:g}' for b in bounds)} or more" if bounds else " above the threshold"
    errors = MAPPED if _mapped(section, "confidence") else _spread(_of_classes(section))
    return (
        f"Share of each class's adversarial examples ({_examples(section)}) whose true class has a "
        f"probability{above}. {errors}"
    )


def _spread(drawn: str = "Error bars") -> str:
    return f"{drawn}: one standard deviation over seeds, where there are several."


def _hard(section: Section) -> str:
    dotted = " Dotted: the first epoch that mines." if curves.start_of_mining(section) is not None else ""
    return f"{_band(section)}{dotted}"


def _training(section: Section) -> str:
    mines = any(g["mines_hard_rows"] and "loss" in g["curves"] for g in section["groups"])
    loss = " Where a method mines, its loss is of the rows that stay: not comparable with others." if mines else ""
    return f"{_hard(section)}{loss}"


def _band(section: Section) -> str:
    if not curves.has_bands(section):
        return (
            f"Means over seeds. Bands are left out for more than {figures.MANY_GROUPS} methods; they are in data.json."
        )
    return f"{_spread('Bands')} Those of shares are cut at 0 and 100 %."


def _easy(section: Section) -> str:
    return (
        "Left: of the examples that resist M attack steps, the share that resists to the end; the star is the "
        f"paper's figure. Right: how many resist M steps. {_spread()}"
    )


def _frontier(section: Section) -> str:
    return (
        "Upper left is better. In colour: what nothing dominates, named at least once, numbered as in the table where "
        "another has more in this panel at no more cost. Grey: another method costs no more and is no worse in average "
        "and worst class. Bars: 95 % intervals of the mean over seeds (Student's t), with one seed over test images; "
        "long ones end outside. Solid: the most that so much buys. Dotted: the baseline. A triangle at the lower edge "
        "stands for a value far below, which is beside it."
    )


def _frontier_classes(section: Section) -> str:
    return f"{_differences(section)} 95 % intervals are in the table."


ENTRIES = (
    _Entry("frontier_time", f"Accuracy against training time{UNDER}", frontier.against_time, _frontier, frontier=True),
    _Entry(
        "frontier_forwards", f"Accuracy against forwards{UNDER}", frontier.against_forwards, _frontier, frontier=True
    ),
    _Entry(
        "frontier_classes",
        f"What each class gains or loses{UNDER}",
        frontier.class_changes,
        _frontier_classes,
        f"Classes that gain or lose most{UNDER}",
        frontier=True,
    ),
    _Entry("class_accuracy", f"Robust accuracy of each class{UNDER}", by_class.class_bars, _bars),
    _Entry(
        "class_differences",
        "What each class gains or loses",
        by_class.class_differences,
        _differences,
        "Classes that gain or lose most",
    ),
    _Entry("worst_class_time", "Worst class against training time", figures.worst_against_time, _time),
    _Entry("confidence", "Confidence at adversarial examples", figures.confidence, _confidence),
    _Entry("overconfident", "Over-confident adversarial examples", by_class.overconfident, _overconfident),
    _Entry("hard_fraction", "Hard fraction over epochs", curves.hard_fraction, _hard),
    _Entry("training", "Training curves", curves.training, _training),
    _Entry("easy", "Do easy examples stay easy?", curves.easy, _easy),
)
