"""A figure as the page embeds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plot:
    """A figure as it is embedded."""

    file: str
    title: str
    caption: str
    png: bytes
    frontier: bool = False  # on the page of the frontier
