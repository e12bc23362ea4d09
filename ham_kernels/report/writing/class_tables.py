"""What each class is worth: tables of the page, and classes.csv with an exact interval for every run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from ..comparing.groups import Section
from ..reading.evaluations import WEIGHTS
from ..reading.flags import class_images
from ..text_format import NONE
from .columns import title_of
from .table import Cell, Table

HEAD = (
    "section", "method", "run", "seed", "weights", "attack", "class", "images", "correct", "accuracy", "low", "high",
)  # fmt: skip


def class_tables(section: dict[str, Any]) -> list[Table]:
    """One per group that is evaluated: each class's images and accuracy under every attack, in percent."""
    found = []
    for group in section["groups"]:
        accuracy = group["accuracy"].get(group["weights"], {})
        if not accuracy:
            continue
        seeds = max(a["average"]["n"] for a in accuracy.values())
        counts = next((a["class_images"] for a in accuracy.values() if a["class_images"]), None)
        head = [("", "Class"), ("", "Images"), *(("", _head(name, a, counts)) for name, a in accuracy.items())]
        table = Table(head, caption=f"{group['title']}; {WEIGHTS[group['weights']]}; {_errors(seeds)}.")
        for c, name in enumerate(section["classes"]):
            row = [Cell(name, words=True), Cell(NONE if counts is None else str(counts[c]))]
            table.rows.append([*row, *(_share(a["per_class"][c]) for a in accuracy.values())])
        table.rows.append(
            [
                Cell("all"),
                Cell(str(sum(counts)) if counts else NONE),
                *(_share(a["average"]) for a in accuracy.values()),
            ]
        )
        found.append(table)
    return found


def _head(name: str, accuracy: dict, counts: list[int] | None) -> str:
    """The attack, and how many images it was made on where these are not those that the table tells."""
    other = accuracy["class_images"] if accuracy["class_images"] != counts else None
    return f"{title_of(name)}, %" + (f" (of {sum(other)} images)" if other else "")


def _errors(seeds: int) -> str:
    if seeds > 1:
        return f"mean over {seeds} seeds ± standard deviation; each seed's exact intervals are in classes.csv"
    return "in brackets the exact 95 % interval over test images (Clopper and Pearson)"


def _share(value: dict) -> Cell:
    if value["mean"] is None:
        return Cell(NONE)
    text = f"{100 * value['mean']:.1f}"
    if value["std"] is not None:
        return Cell(text, f" ± {100 * value['std']:.1f}", value["mean"])
    known = value["low"] is not None
    return Cell(text, f" [{100 * value['low']:.1f}, {100 * value['high']:.1f}]" if known else "", value["mean"])


def classes_csv(sections: Iterable[Section]) -> str:
    """A row per run, kind of weights, attack and class; accuracies and ends of 95 % intervals as fractions of 1."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(HEAD)
    for row in (row for section in sections for row in _rows(section)):
        write(["" if cell is None else cell for cell in row])
    return text.getvalue()


def _rows(section: Section) -> Iterable[Sequence[Any]]:
    for group in section.groups:
        for run in group.runs:
            for weights, judged in run.evaluations.items():
                for name, attack in judged.attacks.items():
                    counts = class_images(attack) or [None] * len(section.classes)
                    for of, images, share in zip(judged.classes, counts, attack.per_class, strict=True):
                        right = None if None in (images, share.value) else round(images * share.value)
                        yield (
                            section.title, group.title, run.name, run.seed, weights, name, of, images, right,
                            share.value, share.low, share.high,
                        )  # fmt: skip
