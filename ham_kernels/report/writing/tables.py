"""The table for a paper, and others of the page: rows of cells, which a template of each format writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

from ..comparing.comparable import judged_unlike, same_work
from ..reading.evaluations import WEIGHTS
from ..strength import CLEAN, of_each_family
from ..text_format import NONE, attack_title, mean_std, mean_std_time


@dataclass(frozen=True)
class Cell:
    text: str
    error: str = ""  # " ± 1.1"
    value: float | None = None  # what the column is ranked by
    best: bool = False
    std: float | None = None  # of `value`
    words: bool = False  # text, which may be broken


@dataclass
class Table:
    """`head` is (what spans several columns or "", what is said of each)."""

    head: list[tuple[str, str]]
    rows: list[list[Cell]] = field(default_factory=list)
    caption: str = ""

    @property
    def spans(self) -> list[tuple[str, list[int]]]:
        """(words, the columns that they are over, counted from 1)."""
        columns = groupby(enumerate(self.head, 1), key=lambda column: column[1][0])
        return [(span, [i for i, _ in members]) for span, members in columns]

    @property
    def names(self) -> list[str]:
        """Of the columns, where nothing can span them."""
        return [f"{span.removesuffix(', %')} {name}" if span else name for span, name in self.head]


def paper_table(section: dict[str, Any]) -> Table:
    """Method, average and worst class of clean accuracy and that under each attack, std, nstd, time; best marked."""
    groups = [g for g in section["groups"] if g["accuracy"] or g["time"]["mean"] is not None]
    columns = _columns(section, groups)
    table = Table([("", "Method"), *((c.span, c.name) for c in columns)], caption=_caption(section, groups, columns))
    mixed = len({g["weights"] for g in groups if not g["adopted"]} - {None}) > 1
    table.rows = [[Cell(_method(g, mixed)), *(c.cell(g) for c in columns)] for g in groups]
    for i, column in enumerate(columns, 1):
        ranked = [r for r, g in enumerate(groups) if is_ranked(g) and table.rows[r][i].value is not None]
        if len(ranked) > 1 and column.alike([groups[r] for r in ranked]):
            _mark_best([table.rows[r] for r in ranked], i, column.best)
    return table


def is_ranked(group: dict) -> bool:
    """Neither what is not trained to the end, nor a model that answers one class."""
    return group["finished"] and group["weights"] not in group["one_class"]


def all_accuracies(section: dict[str, Any]) -> Table:
    """Every attack and every kind of weights that was evaluated."""
    attacks = list(dict.fromkeys(a for g in section["groups"] for acc in g["accuracy"].values() for a in acc))
    head = [("", "Method"), ("", "Weights"), ("", "Seeds")]
    head += [(f"{attack_title(a)}, %", name) for a in attacks for name in ("avg", "worst", "std", "nstd")]
    table = Table(head)
    for group in section["groups"]:
        for weights, accuracies in group["accuracy"].items():
            seeds = max((acc["average"]["n"] for acc in accuracies.values()), default=0)
            row = [Cell(group["title"]), Cell(WEIGHTS[weights]), Cell(str(seeds))]
            for attack in attacks:
                row += [_accuracy(accuracies.get(attack), m) for m in ("average", "worst", "std", "nstd")]
            table.rows.append(row)
    return table


def _accuracy(accuracies: dict | None, measure: str) -> Cell:
    """In percent, but for nstd, which is a ratio."""
    if not accuracies:
        return Cell(NONE)
    found = accuracies[measure]
    shown = mean_std(found, 1, 3) if measure == "nstd" else mean_std(found)
    return Cell(*shown, found["mean"], std=found["std"])


# ---------------------------------------------------------------- columns of the paper's table
class _Column(NamedTuple):
    span: str
    name: str
    cell: Callable[[dict], Cell]  # of a group
    best: Callable  # max or min
    alike: Callable[[Sequence[dict]], bool]  # whether these groups may be ranked
    attack: str | None = None


def _columns(section: dict, groups: Sequence[dict]) -> list[_Column]:
    """Those that have a value in some group."""

    def judged(span: str, name: str, best: Callable, attack: str, measure: str) -> _Column:
        def alike(ranked: Sequence[dict]) -> bool:
            return not judged_unlike(_judged(g, attack) for g in ranked)

        return _Column(span, name, lambda g: _accuracy(_judged(g, attack), measure), best, alike, attack)

    robust = section["attack"]
    judged_by = [list(g["accuracy"].get(g["weights"], {})) for g in groups]
    attacks = [CLEAN] if any(CLEAN in names for names in judged_by) else []
    attacks += reversed(of_each_family(judged_by, robust))
    columns: list[_Column] = []
    for attack in attacks:
        span = f"{_title(attack)}, %"
        columns += [judged(span, "avg", max, attack, "average"), judged(span, "worst", max, attack, "worst")]
    if robust in attacks:
        span = f"{attack_title(robust)} over classes"
        columns += [judged(span, name, min, robust, name) for name in ("std", "nstd")]
    if any(g["time"]["mean"] is not None for g in groups):
        columns.append(_Column("Training", "time", _time, min, _same_work))
    if any(g["relative_time"] is not None and not g["baseline"] for g in groups):
        columns.append(_Column("Training", f"/ {section['baseline']}", _relative, min, _same_work))
    return columns


def _judged(group: dict, attack: str) -> dict:
    return group["accuracy"].get(group["weights"], {}).get(attack) or {}


def _same_work(groups: Sequence[dict]) -> bool:
    return same_work(g["training"] for g in groups)


def _time(group: dict) -> Cell:
    return Cell(*mean_std_time(group["time"]), group["time"]["mean"], std=group["time"]["std"])


def _relative(group: dict) -> Cell:
    ratio = group["relative_time"]
    return Cell(NONE) if ratio is None else Cell(f"{ratio:.2f}", value=ratio)


def _mark_best(rows: Sequence[list[Cell]], column: int, best: Callable) -> None:
    """The best value, all that look the same at the digits shown, and all within its standard deviation."""
    winner = best((row[column] for row in rows), key=lambda cell: cell.value)
    for row in rows:
        cell = row[column]
        near = cell.text == winner.text or abs(cell.value - winner.value) <= (winner.std or 0.0)
        row[column] = replace(cell, best=near)


# ---------------------------------------------------------------- words
def _title(attack: str) -> str:
    return "Clean" if attack == "clean" else attack_title(attack)


def _method(group: dict, mixed: bool) -> str:
    weights = f" [{WEIGHTS[group['weights']]}]" if mixed and group["weights"] and not group["adopted"] else ""
    one_class = " (answers one class)" if group["weights"] in group["one_class"] else ""
    return f"{group['title']}{weights}{one_class}{'' if group['finished'] else ' (not finished)'}"


def _caption(section: dict, groups: Sequence[dict], columns: Sequence[_Column]) -> str:
    counts = {len(g["runs"]) for g in groups}
    if not counts:
        return section["title"]
    seeds, best = "one seed", "Best values in bold."
    if counts != {1}:
        seeds = f"{_range(counts)} seeds, mean ± standard deviation"
        best = "Bold: the best value, and those within its standard deviation."
    weights = {g["weights"] for g in groups if not g["adopted"]} - {None}
    of = f"; {WEIGHTS[weights.pop()]}" if len(weights) == 1 else ""
    return f"{section['title']}; {seeds}{of}{_images(groups, columns)}{_no_gradient(groups, columns)}. {best}"


def _images(groups: Sequence[dict], columns: Sequence[_Column]) -> str:
    """Where attacks or methods differ in them: "; images: 517 (Clean, PGD-20), 40 to 60 (AutoAttack)"."""
    attacks: dict[str, list[str]] = {}
    for attack in dict.fromkeys(c.attack for c in columns if c.attack):
        found = {n for g in groups for n in _judged(g, attack).get("images", ())} - {None}
        attacks.setdefault(_range(found) or "unknown", []).append(_title(attack))
    if len(attacks) < 2 and not any(" to " in images for images in attacks):
        return ""
    return "; images: " + ", ".join(f"{images} ({', '.join(names)})" for images, names in attacks.items())


def _no_gradient(groups: Sequence[dict], columns: Sequence[_Column]) -> str:
    """ "; gradient missing: HAM under PGD-20 for 12 images", of the run that has most."""
    found = [
        f"{g['title']} under {_title(attack)} for {max(rows.values())} images"
        for attack in dict.fromkeys(c.attack for c in columns if c.attack)
        for g in groups
        if (rows := _judged(g, attack).get("no_gradient"))
    ]
    return "; gradient missing: " + ", ".join(found) if found else ""


def _range(numbers: set[int]) -> str:
    """ "40 to 60", "40" where all are the same, "" of none."""
    return " to ".join(str(n) for n in sorted({min(numbers), max(numbers)})) if numbers else ""
