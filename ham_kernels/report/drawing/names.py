"""Names as figures can show them: cut so that they differ, in fonts that have their letters, else numbered."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import font_manager

from ..text_format import distinct

FONT = "DejaVu Sans"  # comes with matplotlib
NO_FONT = "Last Resort"  # begins the name of fonts that have a box for every letter


def titles(section: dict[str, Any], length: int = 40) -> dict[str, str]:
    """{title: what a figure shows} of a section's groups."""
    whole = [group["title"] for group in section["groups"]]
    return dict(zip(whole, _shown(whole, length), strict=True))


def classes(section: dict[str, Any], length: int = 16) -> list[str]:
    """What a figure shows of the names of a section's classes."""
    return _shown(section["classes"], length)


def key(section: dict[str, Any]) -> str:
    """What the numbers stand for that figures show instead of names; empty where all names can be drawn."""
    told = {"Methods": [group["title"] for group in section["groups"]], "Classes": section["classes"]}
    words = [
        f" {what} (no font here has all letters): {', '.join(f'#{i} {names[i - 1]}' for i in numbers)}."
        for what, names in told.items()
        if (numbers := [i for i, name in enumerate(names, 1) if not _drawable(name)])
    ]
    return "".join(words)


def families(texts: Iterable[str]) -> list[str]:
    """Fonts that together have all letters of the texts that any font here has, matplotlib's own first."""
    return [FONT, *dict.fromkeys(filter(None, map(_family, sorted(_lacking("".join(texts))))))]


def _shown(names: Sequence[str], length: int) -> list[str]:
    found = distinct(names, length)
    return [cut if _drawable(name) else f"#{i}" for i, (name, cut) in enumerate(zip(names, found, strict=True), 1)]


def _drawable(name: str) -> bool:
    return all(map(_family, _lacking(name)))


def _lacking(text: str) -> set[str]:
    """The letters that matplotlib's own font has not."""
    return {letter for letter in text if not letter.isspace() and ord(letter) not in _letters(FONT)}


@functools.cache
def _family(letter: str) -> str | None:
    """The name of a font that has this letter."""
    return next((name for name in sorted(_files()) if ord(letter) in _letters(name)), None)


@functools.cache
def _files() -> dict[str, str]:
    """{name: file} of upright fonts of usual weight."""
    fonts = [f for f in font_manager.fontManager.ttflist if f.style == "normal" and f.weight in (400, 500)]
    return {f.name: f.fname for f in fonts if not f.name.startswith(NO_FONT)}


@functools.cache
def _letters(name: str) -> frozenset[int]:
    """The letters, as code points, of a font; none where it cannot be read."""
    try:
        return frozenset(font_manager.get_font(_files()[name]).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
