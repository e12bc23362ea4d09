"""A figure as the page embeds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plot:
    """A figure as it is embedded."""

    file: str
    title: str
    caption: str
    alt: str  # what it shows, for those who do not see it
    png: bytes
    pdf: bytes | None
    frontier: bool = False  # on the page of the frontier
    of_classes: bool = False  # of what the classes are worth: beside the tables that say so
