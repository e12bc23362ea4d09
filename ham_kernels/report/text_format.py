"""How names, numbers and times are written, alike in figures, tables and page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from .strength import base_attack

NONE = "–"
BEFORE = 4  # letters shown before two names differ
MANY_CLASSES = 20  # above: not all are shown beside each other


def attack_title(name: str | None) -> str:
    """ "pgd20" -> "PGD-20", "pgd20-r5" -> "PGD-20, 5 restarts"; a name not known stays as it is."""
    if name is None:
        return "no attack"
    base, restarts = base_attack(name)
    if base != name:
        return f"{attack_title(base)}, {restarts} restarts"
    known = {"fgsm": "FGSM", "autoattack": "AutoAttack", "apgd": "APGD"}
    for prefix in ("pgd", "cw", "apgd", "odi"):
        if name.startswith(prefix) and name[len(prefix) :].isdecimal():
            return f"{prefix.upper()}-{name[len(prefix) :]}"
    return known.get(name, name)


def shortened(text: str, length: int = 40) -> str:
    """One line of at most `length` characters; the middle is left out, as names often begin alike."""
    text = " ".join(text.split())
    end = length // 2
    return text if len(text) <= length else f"{text[: length - 1 - end].rstrip()}…{text[-end:].lstrip()}"


def distinct(names: Sequence[str], length: int = 40) -> list[str]:
    """`shortened`, no two alike: those that would be begin shortly before where they differ, or end with a number."""
    whole = [" ".join(name.split()) for name in names]
    out = [shortened(name, length) for name in whole]
    for _ in names:  # those still alike share a longer beginning
        for alike in [name for name, count in Counter(out).items() if count > 1]:
            members = [i for i, name in enumerate(out) if name == alike]
            letters = zip(*(whole[i] for i in members), strict=False)
            start = max(0, len(list(takewhile(lambda at: len(set(at)) == 1, letters))) - BEFORE)
            for i in members:
                rest = f"…{whole[i][start:]}"
                out[i] = rest if len(rest) <= length else f"{rest[: length - 1]}…"
    count = Counter(out)
    tags = [f" #{i}" if count[name] > 1 else "" for i, name in enumerate(out, 1)]
    return [shortened(n, length - len(tag)) + tag if tag else n for n, tag in zip(out, tags, strict=True)]


def mean_std(spread: dict[str, Any], scale: float = 100.0, digits: int = 1) -> tuple[str, str]:
    """("61.4", " ± 1.1"); the second is empty for one seed, the first a dash where there is no value."""
    if spread["mean"] is None:
        return NONE, ""
    error = "" if spread["std"] is None else f" ± {scale * spread['std']:.{digits}f}"
    return f"{scale * spread['mean']:.{digits}f}", error


def signed(value: float, digits: int) -> str:
    """ "+3.2", "−0.4"; what rounds to nothing is "0.0"."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def markdown(text: str) -> str:
    """Text of users as one line of Markdown, in a table too."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|*_`\[\]])", r"\\\1", text)


def duration(seconds: float | None) -> str:
    """ "13.6 s", "12 min 18 s", "3 h 12 min"."""
    if seconds is None:
        return NONE
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60} min"


def unit_of_time(seconds: float) -> tuple[float, str]:
    """(seconds in one, its name) of the unit for times up to this."""
    return (1.0, "s") if seconds < 120 else (60.0, "min") if seconds < 7200 else (3600.0, "h")


def mean_std_time(spread: dict[str, Any]) -> tuple[str, str]:
    """Mean and spread, as in `mean_std`."""
    if spread["std"] is None:
        return duration(spread["mean"]), ""
    unit, size = ("s", 1) if spread["mean"] < 3600 else ("min", 60)
    digits = 1 if spread["mean"] < 60 or spread["std"] < size else 0
    return duration(spread["mean"]), f" ± {spread['std'] / size:.{digits}f} {unit}"
