"""How names, numbers and times are written, alike in figures, tables and page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NONE = "–"


def attack_title(name: str | None) -> str:
    """ "pgd20" -> "PGD-20", "pgd20-r5" -> "PGD-20, 5 restarts"; a name not known stays as it is."""
    if name is None:
        return "no attack"
    base, restarts = base_attack(name)
    if base != name:
        return f"{attack_title(base)}, {restarts} restarts"
    known = {"fgsm": "FGSM", "autoattack": "AutoAttack"}
    for prefix in ("pgd", "cw"):
        if name.startswith(prefix) and name[len(prefix) :].isdecimal():
            return f"{prefix.upper()}-{name[len(prefix) :]}"
    return known.get(name, name)


def base_attack(name: str) -> tuple[str, int]:
    """ "pgd20-r5" -> ("pgd20", 5), "pgd20" -> ("pgd20", 1)."""
    base, _, restarts = name.partition("-r")
    return (base, int(restarts)) if restarts.isdecimal() else (name, 1)


def steps_of(name: str, family: str) -> int:
    """Steps of "pgd20" or "pgd20-r5" in the family "pgd"; 0 where it is of another one."""
    steps = base_attack(name)[0].removeprefix(family)
    return int(steps) if name.startswith(family) and steps.isdecimal() else 0


def margin_attack(attacks: Sequence[str]) -> str | None:
    """The CW attack with the most steps; with that many, what is there most often, with more restarts before fewer."""
    found = [a for a in attacks if steps_of(a, "cw")]
    return max(sorted(set(found)), key=lambda a: (steps_of(a, "cw"), found.count(a), base_attack(a)[1]), default=None)


def shortened(text: str, length: int = 40) -> str:
    """One line of at most `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def mean_std(spread: dict[str, Any], scale: float = 100.0, digits: int = 1) -> tuple[str, str]:
    """("61.4", " ± 1.1"); the second is empty for one seed, the first a dash where there is no value."""
    if spread["mean"] is None:
        return NONE, ""
    error = "" if spread["std"] is None else f" ± {scale * spread['std']:.{digits}f}"
    return f"{scale * spread['mean']:.{digits}f}", error


def duration(seconds: float | None) -> str:
    """ "13.6 s", "12 min 18 s", "3 h 12 min"."""
    if seconds is None:
        return NONE
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60} min"


def mean_std_time(spread: dict[str, Any]) -> tuple[str, str]:
    """Mean and spread, as in `mean_std`."""
    if spread["std"] is None:
        return duration(spread["mean"]), ""
    unit, size = ("s", 1) if spread["mean"] < 3600 else ("min", 60)
    return duration(spread["mean"]), f" ± {spread['std'] / size:.{1 if spread['mean'] < 60 else 0}f} {unit}"
