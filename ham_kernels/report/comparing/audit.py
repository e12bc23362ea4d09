"""Models held against requirements: a pass or a fail, with the interval of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..strength import CLEAN
from ..text_format import attack_title
from .accuracies import judged
from .over_seeds import Spread, own_interval
from .requirements import MEASURES, RATIOS, Requirement


def audit(
    groups: Sequence[dict[str, Any]], classes: Sequence[str], headline: str | None, asked: Sequence[Requirement]
) -> list[dict[str, Any]]:
    """Each group held against each requirement: [{"group", "requirement", "measured", "value", "low",
    "high", "passes"}].

    The value passes or fails, the mean over seeds where there are several; low and high are the ends of its 95 %
    interval, over images for one seed. What was not measured fails. A class that is not among these is asked of others.
    """
    of_here = [one for one in asked if one.of_class is None or _number_of(one.of_class, classes) is not None]
    return [_held(group, classes, one.attack or headline, one) for group in groups for one in of_here]


def check_classes(asked: Sequence[Requirement], classes: Sequence[Sequence[str]]) -> None:
    """Raises: ValueError naming `require` for a class that no section has."""
    for one in asked:
        if one.of_class is not None and all(_number_of(one.of_class, names) is None for names in classes):
            known = ", ".join(dict.fromkeys(name for names in classes for name in names))
            raise ValueError(f"require: {one.text!r} names no class of these: {known or 'no run is judged'}")


def _number_of(name: str, classes: Sequence[str]) -> int | None:
    return next((i for i, known in enumerate(classes) if known.strip() == name), None)


def _held(group: dict, classes: Sequence[str], attack: str | None, asked: Requirement) -> dict[str, Any]:
    out = {"group": group["title"], "requirement": asked.text, "value": None, "low": None, "high": None}
    accuracy = judged(group, attack)
    if not accuracy:
        words = f"not judged by {attack_title(attack)}" if attack else "not judged by any attack"
        return out | {"measured": words, "passes": False}
    if not group["finished"]:
        return out | {"measured": "not judged: training is not finished", "passes": False}
    of_class = asked.of_class and _number_of(asked.of_class, classes)
    found = accuracy[MEASURES[asked.measure]] if of_class is None else accuracy["per_class"][of_class]
    if found["mean"] is None:
        return out | {"measured": "no value", "passes": False}
    value = asked.unit * found["mean"]
    passes = asked.met_by(value)
    low, high = _interval(found, asked)
    out |= {"value": value, "low": low, "high": high, "passes": passes}
    return out | {"measured": f"{_words(value, low, high, asked, attack)}{_open(low, high, found, asked, passes)}"}


def _interval(found: Spread, asked: Requirement) -> tuple[float | None, float | None]:
    """Within what can be; that of a spread over few images, by draws, may leave its own value out."""
    ends = own_interval(found)
    if None in ends:
        return None, None
    low, high = min(ends[0], found["mean"]), max(ends[1], found["mean"])
    return max(0.0, asked.unit * low), min(asked.most, asked.unit * high)


def _words(value: float, low: float | None, high: float | None, asked: Requirement, attack: str) -> str:
    digits, unit = (3, "") if asked.measure in RATIOS else (1, " %")
    where = "on clean images" if attack == CLEAN else f"under {attack_title(attack)}"
    interval = "" if low is None else f" (95 % interval {low:.{digits}f} to {high:.{digits}f})"
    return f"{value:.{digits}f}{unit}{interval} {where}"


def _open(low: float | None, high: float | None, found: Spread, asked: Requirement, passes: bool) -> str:
    """Whether images or seeds leave it open."""
    if low is None:
        return "; all seeds alike, which says nothing of others" if found["n"] > 1 else "; no interval is known"
    sure = all(asked.met_by(end) == passes for end in (low, high))
    return "" if sure else "; the interval leaves it open"
