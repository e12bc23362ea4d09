"""A table as rows of cells, which a template of each format writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Cell:
    text: str
    error: str = ""  # " ± 1.1"
    value: float | None = None  # what the column is ranked by
    best: bool = False
    spread: Mapping[str, Any] | None = None  # of `value`, see `over_seeds.spread`
    words: bool = False  # text, which may be broken


@dataclass
class Table:
    """`head` is (what spans several columns or "", what is said of each); `label` is LaTeX's."""

    head: list[tuple[str, str]]
    rows: list[list[Cell]] = field(default_factory=list)
    caption: str = ""
    label: str = ""

    @property
    def of_words(self) -> set[int]:
        """The columns that hold text."""
        return {i for row in self.rows for i, cell in enumerate(row) if cell.words}

    @property
    def spans(self) -> list[tuple[str, list[int]]]:
        """(words, the columns that they are over, counted from 1)."""
        columns = groupby(enumerate(self.head, 1), key=lambda column: column[1][0])
        return [(span, [i for i, _ in members]) for span, members in columns]

    @property
    def names(self) -> list[str]:
        """Of the columns, where nothing can span them."""
        return [f"{span.removesuffix(', %')} {name}" if span else name for span, name in self.head]
