"""Columns of a table of methods: what each holds, how it is ranked, and which values are marked as best."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..comparing.accuracies import judged
from ..comparing.claims import same_seeds
from ..comparing.comparable import judged_unlike, same_work
from ..comparing.over_seeds import interval_of_difference
from ..strength import CLEAN
from ..text_format import NONE, attack_title, mean_std, mean_std_time, shortened
from .table import Cell, Table

Group = dict[str, Any]
MEASURES: dict[str, tuple[str, Callable]] = {
    "avg": ("average", max), "worst": ("worst", max), "worst3": ("worst_three", max), "range": ("range", min),
    "std": ("std", min), "nstd": ("nstd", min), "gini": ("gini", min),
}  # fmt: skip
RATIOS = ("nstd", "gini")  # the others are in percent
SHORT = 14  # letters of a baseline's title that an article has room for
COSTS = ("time", "relative", "forwards")


class Column(NamedTuple):
    span: str
    name: str
    cell: Callable[[Group], Cell]
    best: Callable  # max or min
    alike: Callable[[Sequence[Group]], bool]  # whether these groups may be ranked
    attack: str | None = None


def accuracy(attack: str, name: str, span: str | None = None) -> Column:
    """One of MEASURES under an attack, for the weights shown."""
    measure, best = MEASURES[name]

    def alike(ranked: Sequence[Group]) -> bool:
        return not judged_unlike(judged(g, attack) for g in ranked)

    def cell(group: Group) -> Cell:
        found = share(judged(group, attack), measure)
        lost = best is min and not judged(group, attack).get("average", {}).get("mean")
        return replace(found, value=None) if lost else found  # where every image is lost, all classes are equal

    words = {"worst3": "worst 3", "gini": "Gini"}.get(name, name)
    return Column(span or f"{title_of(attack)}, %", words, cell, best, alike, attack)


def cost(name: str, baseline: str | None, unit: tuple[float, str] | None = None) -> Column:
    """One of COSTS. `unit`: seconds in one, and its name, where times are numbers of it."""
    if name == "forwards":
        return Column("Forwards", "a step", _forwards, min, lambda _: True)
    if name == "relative":
        return Column(
            "Training", f"/ {baseline if unit is None else shortened(baseline, SHORT)}", _relative, min, _same_work
        )
    if unit is None:
        return Column("Training", "time", _time, min, _same_work)
    return Column("Training", f"time, {unit[1]}", lambda g: _in_units(g["time"], unit[0]), min, _same_work)


def asked(names: Sequence[str], attacks: Sequence[str] | None = None) -> list[tuple[str | None, str]]:
    """(attack, measure) of columns by name, such as "clean.avg", "worst", "time"; None is the attack of the headline.

    Raises: ValueError naming `columns`; for an attack that is not among `attacks`, where they are given.
    """
    found = []
    for name in names:
        attack, _, measure = name.rpartition(".")
        if measure not in (*MEASURES, *COSTS) or (attack and measure in COSTS):
            known = f"{', '.join(MEASURES)}, each alone or as in clean.avg; {', '.join(COSTS)}"
            raise ValueError(f"columns: got {name!r}; they are {known}")
        if attack and attacks is not None and attack not in attacks:
            raise ValueError(f"columns: got {name!r}; these runs were judged by {', '.join(attacks) or 'no attack'}")
        found.append((attack or None, measure))
    return found


def share(accuracies: dict | None, measure: str) -> Cell:
    """In percent, but for RATIOS."""
    if not accuracies:
        return Cell(NONE)
    found = accuracies[measure]
    shown = mean_std(found, 1, 3) if measure in RATIOS else mean_std(found)
    return Cell(*shown, found["mean"], spread=found)


def _same_work(groups: Sequence[Group]) -> bool:
    return same_work(g["training"] for g in groups)


def _time(group: Group) -> Cell:
    return Cell(*mean_std_time(group["time"]), group["time"]["mean"], spread=group["time"])


def _in_units(time: dict, seconds: float) -> Cell:
    return Cell(*mean_std(time, 1 / seconds), time["mean"], spread=time)


def _relative(group: Group) -> Cell:
    ratio = group["relative_time"]
    return Cell(NONE) if ratio is None else Cell(f"{ratio:.2f}", value=ratio, spread=group["time"])


def _forwards(group: Group) -> Cell:
    found = group["forwards"]["mean"]
    return Cell(NONE) if found is None else Cell(f"{found:.1f}", value=found, spread=group["forwards"])


def title_of(attack: str) -> str:
    return "Clean" if attack == CLEAN else attack_title(attack)


# ---------------------------------------------------------------- the best
def mark_best(table: Table, columns: Sequence[Column], groups: Sequence[Group]) -> None:
    """In each column (after that of the names) the best value, and those that cannot be told from it.

    That is where the 95 % interval of a difference holds 0: over seeds, with one seed over images. Where no interval
    is known, or nothing can be told from the best, nothing is marked.
    """
    for i, column in enumerate(columns, 1):
        ranked = [r for r, g in enumerate(groups) if is_ranked(g) and table.rows[r][i].value is not None]
        if len(ranked) < 2 or not column.alike([groups[r] for r in ranked]):
            continue
        best = column.best(ranked, key=lambda r: table.rows[r][i].value)
        like = [r for r in ranked if not _apart(groups, table.rows, i, r, best, exact=column.attack is None)]
        if len(like) < len(ranked):
            for r in like:
                table.rows[r][i] = replace(table.rows[r][i], best=True)


def is_ranked(group: Group) -> bool:
    """Neither what is not trained to the end, nor a model that answers one class."""
    return group["finished"] and group["weights"] not in group["one_class"]


def _apart(groups: Sequence[Group], rows: Sequence[list[Cell]], column: int, row: int, best: int, exact: bool) -> bool:
    ours, theirs = (rows[r][column] for r in (row, best))
    if ours.value == theirs.value or None in (ours.spread, theirs.spread):
        return False
    found = interval_of_difference(ours.spread, theirs.spread, same_seeds(groups[row], groups[best]), exact)
    return found is not None and not found[0] <= 0 <= found[1]


# ---------------------------------------------------------------- LaTeX
def latex_column(table: Table, column: int) -> str:
    """Of siunitx, with the digits that its numbers have; text is broken where it must be."""
    numbers = [row[column] for row in table.rows if _number(row[column])]
    if not numbers or any(row[column].words for row in table.rows):
        return r">{\raggedright\arraybackslash}X"
    whole, part = (
        max(len(half) for half in halves) for halves in zip(*(_halves(c.text) for c in numbers), strict=True)
    )
    errors = [max(1, len(c.error.removeprefix(" ± ").replace(".", "").lstrip("0"))) for c in numbers if c.error]
    uncertain = f"({max(errors)})" if errors else ""
    return f"S[table-format={whole}.{part}{uncertain}]" if part else f"S[table-format={whole}{uncertain}]"


def latex_cell(cell: Cell) -> str | None:
    """A number as siunitx reads it; None where it is text."""
    if not _number(cell):
        return None
    number = cell.text.replace("−", "-") + cell.error.replace(" ± ", " +- ")
    return rf"\bfseries {number}" if cell.best else number


def _number(cell: Cell) -> bool:
    return re.fullmatch(r"[-−+]?[0-9]+(\.[0-9]+)?", cell.text) is not None


def _halves(number: str) -> tuple[str, str]:
    whole, _, part = number.partition(".")
    return whole, part
