"""Models held against requirements: a pass or a fail, with the interval of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..strength import CLEAN
from ..text_format import attack_title
from .over_seeds import Spread, mean_interval
from .requirements import CLASS, MEASURES, RATIOS, Requirement


def audit(
    groups: Sequence[dict[str, Any]], classes: Sequence[str], headline: str | None, asked: Sequence[Requirement]
) -> list[dict[str, Any]]:
    """Each group held against each requirement: [{"group", "requirement", "measured", "value", "low",
    "high", "passes"}].

    The value passes or fails, the mean over seeds where there are several; low and high are the ends of its 95 %
    interval, over images for one seed. What was not measured fails. Raises: ValueError naming `require` for a class
    that is not there.
    """
    for one in asked:
        if one.measure.startswith(CLASS) and one.measure.removeprefix(CLASS) not in classes:
            raise ValueError(f"require: {one.text!r} names no class of these: {', '.join(classes)}")
    return [_held(group, classes, one.attack or headline, one) for group in groups for one in asked]


def _held(group: dict, classes: Sequence[str], attack: str | None, asked: Requirement) -> dict[str, Any]:
    out = {"group": group["title"], "requirement": asked.text, "value": None, "low": None, "high": None}
    accuracy = group["accuracy"].get(group["weights"], {}).get(attack)
    if accuracy is None:
        words = f"not judged by {attack_title(attack)}" if attack else "not judged by any attack"
        return out | {"measured": words, "passes": False}
    if not group["finished"]:
        return out | {"measured": "not judged: training is not finished", "passes": False}
    found = _measure(accuracy, classes, asked.measure)
    if found["mean"] is None:
        return out | {"measured": "no value", "passes": False}
    low, high = _interval(found)
    if low is not None:  # that of a spread over few images, by draws, may leave its own value out
        low, high = min(low, found["mean"]), max(high, found["mean"])
    value, low, high = (None if v is None else asked.unit * v for v in (found["mean"], low, high))
    passes = asked.met_by(value)
    out |= {"value": value, "low": low, "high": high, "passes": passes}
    return out | {"measured": f"{_words(value, low, high, asked, attack)}{_open(low, high, asked, passes)}"}


def _measure(accuracy: dict, classes: Sequence[str], measure: str) -> Spread:
    if measure.startswith(CLASS):
        return accuracy["per_class"][list(classes).index(measure.removeprefix(CLASS))]
    return accuracy[MEASURES[measure]]


def _interval(found: Spread) -> tuple[float | None, float | None]:
    if found["n"] < 2:
        return found["low"], found["high"]
    return mean_interval([v for v in found["values"] if v is not None])


def _words(value: float, low: float | None, high: float | None, asked: Requirement, attack: str) -> str:
    digits, unit = (3, "") if asked.measure in RATIOS else (1, " %")
    where = "on clean images" if attack == CLEAN else f"under {attack_title(attack)}"
    interval = "" if low is None else f" (95 % interval {low:.{digits}f} to {high:.{digits}f})"
    return f"{value:.{digits}f}{unit}{interval} {where}"


def _open(low: float | None, high: float | None, asked: Requirement, passes: bool) -> str:
    """Whether images or seeds leave it open."""
    if low is None:
        return "; no interval is known"
    sure = all(asked.met_by(end) == passes for end in (low, high))
    return "" if sure else "; the interval leaves it open"
