"""On which images runs were trained and judged, in words: why sections are apart, and what is taken on trust."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..reading.evaluations import Attack, Evaluation
from ..reading.flags import class_images
from ..reading.runs import Run
from .groups import Section

FEWEST = 32  # images of the smallest class: of fewer, one weighs more than the claim on the worst class


def apart(section: Section, sections: Sequence[Section]) -> list[str]:
    """Why runs on a data set of the same name stand in another section, and which runs do not tell their images."""
    notes = []
    for other in sections:
        same = (other.dataset, other.norm, other.eps) == (section.dataset, section.norm, section.eps)
        if other is not section and same:
            notes.append(f"Not compared with “{other.title}”: {_difference(_runs(section), _runs(other))}.")
    runs = _runs(section)
    silent = [run.name for run in runs if not run.images]
    if silent and len(runs) > 1:
        notes.append(
            f"No digest of the images is kept by {', '.join(silent)}: taken for the same images, as the data set's "
            "name, the classes and the budget are the same."
        )
    names = sorted({run.dataset or "unknown data" for run in runs})
    if len(names) > 1:
        notes.append(f"The same images under several names: {', '.join(names)}.")
    return notes


def _runs(section: Section) -> list[Run]:
    return [run for group in section.groups for run in group.runs]


def _difference(ours: Sequence[Run], theirs: Sequence[Run]) -> str:
    """In what the images of two sections differ, as far as their runs tell."""
    for what, words in (("classes", "other classes"), ("counts", "other numbers of images")):
        a, b = (next((run.data[what] for run in runs if what in run.data), None) for runs in (ours, theirs))
        if None not in (a, b) and a != b:
            return f"{words} ({_words(a)} against {_words(b)})"
    if all(run.images for run in (*ours, *theirs)):
        return "other images or labels, as their digests tell"
    return "other classes"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def smallest_class(run: Run, evaluation: Evaluation, attack: Attack) -> int | None:
    """Images of the smallest class that has any, under an attack; None where labels were not kept."""
    counts = class_images(attack)
    if counts is None and attack.n == evaluation.images:
        told = run.data.get("class_counts")
        counts = told.get(evaluation.part) if isinstance(told, dict) else None
    counts = counts if isinstance(counts, list) else None
    return min((n for n in counts or () if isinstance(n, int) and n > 0), default=None)
