"""Which figures a report has, what is said under them, and their PNG files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ..comparing.frontier import as_compared
from ..text_format import attack_title
from . import by_class, captions, curves, failures, figures, findings, frontier, names
from .figures import Section
from .plot import Plot

UNDER = " under …"  # in a title: the section's attack


class _Entry(NamedTuple):
    name: str
    title: str  # ends with UNDER where it is about one attack
    draw: Callable
    caption: Callable[[Section], str]
    finding: Callable[[Section], str]  # the text for those who do not see it
    of_many: str = ""  # its title where the classes are too many to show all
    frontier: bool = False  # on the page of the frontier, and of the section as that has it
    of_classes: bool = False  # beside what the models are worth


def plots(data: dict[str, Any], pdf: bool) -> tuple[list[list[Plot]], list[list[str]]]:
    """(figures, titles of those without data), one entry of each per section of data.json."""
    drawn, absent = [], []
    with figures.drawing(_texts(data["sections"])):
        for i, section in enumerate(data["sections"], 1):
            prefix = f"{i}_{_slug(section['title'])}_" if len(data["sections"]) > 1 else ""
            of = {False: section, True: as_compared(section)}
            found = [(e, e.draw(of[e.frontier], data["styles"]) if of[e.frontier] else None) for e in ENTRIES]
            drawn.append([_plot(e, figure, of[e.frontier], prefix, pdf) for e, figure in found if figure])
            absent.append(
                [
                    _titled(e.title, section)
                    for e, figure in found
                    if not (figure or e.frontier or _is_a_table(e, section))
                ]
            )
    return drawn, absent


def _is_a_table(entry: _Entry, section: Section) -> bool:
    """Confusions of many classes are told, not drawn."""
    return entry.name == "confusion" and any(g["confusion"] for g in section["groups"])


def _texts(sections: list[Section]) -> list[str]:
    """All names that figures may show."""
    return [name for s in sections for name in (*s["classes"], *(g["title"] for g in s["groups"]))]


def _plot(entry: _Entry, figure: Figure, section: Section, prefix: str, pdf: bool) -> Plot:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=figures.DPI)
    title = _titled(entry.of_many if entry.of_many and captions.many(section) else entry.title, section)
    return Plot(
        file=f"figures/{prefix}{entry.name}.png",
        title=title,
        caption=entry.caption(section) + names.key(section),
        alt=f"{title}. {entry.finding(section)}",
        png=png.getvalue(),
        pdf=_as_pdf(figure) if pdf else None,
        frontier=entry.frontier,
        of_classes=entry.of_classes,
    )


def _as_pdf(figure: Figure) -> bytes:
    """Of a figure that was saved before, and so is laid out."""
    pdf = io.BytesIO()
    figure.set_layout_engine("none")
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})  # the same file from the same numbers
    return pdf.getvalue()


def _titled(title: str, section: Section) -> str:
    return title.replace(UNDER, f" under {attack_title(section['attack'])}" if section["attack"] else "")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("ε", "eps")).strip("-")[:40]


ENTRIES = (
    _Entry(
        "frontier_time", f"Accuracy against training time{UNDER}", frontier.against_time, captions.frontier,
        findings.frontier("time"), frontier=True,
    ),
    _Entry(
        "frontier_forwards", f"Accuracy against forwards{UNDER}", frontier.against_forwards, captions.frontier,
        findings.frontier("forwards"), frontier=True,
    ),
    _Entry(
        "frontier_classes", f"What each class gains or loses{UNDER}", by_class.class_differences, captions.changes,
        findings.changes, f"Classes that gain or lose most{UNDER}", frontier=True,
    ),
    _Entry(
        "class_accuracy", f"Robust accuracy of each class{UNDER}", by_class.class_bars, captions.bars,
        findings.lowest_class, of_classes=True,
    ),
    _Entry(
        "class_differences", "What each class gains or loses", by_class.class_differences, captions.differences,
        findings.changes, "Classes that gain or lose most", of_classes=True,
    ),
    _Entry(
        "confusion", "Which class is taken for which", failures.confusion, captions.confusion,
        findings.confusion, of_classes=True,
    ),
    _Entry(
        "over_eps", "Accuracy over ε", failures.over_eps, captions.over_eps, findings.over_eps,
        of_classes=True,
    ),
    _Entry(
        "worst_class_time", "Worst class against training time", figures.worst_against_time, captions.time,
        findings.worst_and_time,
    ),
    _Entry(
        "confidence", "Confidence at adversarial examples", figures.confidence, captions.confidence,
        findings.overconfidence,
    ),
    _Entry(
        "overconfident", "Over-confident adversarial examples", by_class.overconfident, captions.overconfident,
        findings.overconfidence,
    ),
    _Entry(
        "examples", "Images and their perturbation", failures.examples, captions.examples, findings.examples,
        of_classes=True,
    ),
    _Entry(
        "hard_fraction", "Hard fraction over epochs", curves.hard_fraction, captions.hard,
        findings.last_of("hard_fraction", "Images trained on"),
    ),
    _Entry("training", "Training curves", curves.training, captions.training, findings.training),
    _Entry("easy", "Do easy examples stay easy?", curves.easy, captions.easy, findings.easy),
)  # fmt: skip
