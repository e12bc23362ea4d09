"""Means over seeds with what is known of their error, and differences of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student_t

from ..reading.evaluations import Interval

Spread = dict[str, Any]  # see `spread`


def spread(values: Sequence[Interval | float | None]) -> Spread:
    """Mean over seeds with its spread: {"mean", "std", "low", "high", "n", "values"}.

    Of several values std is the sample standard deviation and low, high are mean -+ std. Of one value there is no
    std, and low, high are its interval over images, None where it has none.
    """
    intervals = [v if isinstance(v, Interval) else Interval(v) for v in values]
    known = [v for v in intervals if v.value is not None]
    out: Spread = {"mean": None, "std": None, "low": None, "high": None, "n": len(known)}
    out["values"] = [v.value for v in intervals]
    if len(known) > 1:
        mean, std = statistics.fmean(v.value for v in known), statistics.stdev(v.value for v in known)
        out |= {"mean": mean, "std": std, "low": mean - std, "high": mean + std}
    elif known:
        out |= {"mean": known[0].value, "low": known[0].low, "high": known[0].high}
    return out


def pairs(ours: Spread, theirs: Spread) -> list[tuple[float, float]]:
    """Values of the seeds that both have, for spreads over the same seeds."""
    both = zip(ours["values"], theirs["values"], strict=True)
    return [(a, b) for a, b in both if a is not None and b is not None]


def difference(ours: Spread, base: Spread, paired: bool) -> Spread:
    """ours - base. Paired (spreads over the same seeds): mean and std of the differences, of the seeds that both have;
    else, or where they have none in common, the two spreads, squares added."""
    out: Spread = {"mean": None, "std": None, "low": None, "high": None, "n": min(ours["n"], base["n"])}
    if ours["mean"] is None or base["mean"] is None:
        return out
    each = [a - b for a, b in pairs(ours, base)] if paired else []
    if each and max(ours["n"], base["n"]) > 1:
        return {k: v for k, v in spread(each).items() if k != "values"}
    out["mean"] = ours["mean"] - base["mean"]
    if ours["std"] is not None and base["std"] is not None:
        out["std"] = math.hypot(ours["std"], base["std"])
    sides = [ours["low"], ours["high"], base["low"], base["high"]]
    if None not in sides:  # the interval of a difference from the intervals of its sides (MOVER)
        (our_low, our_high), (base_low, base_high) = reach(ours), reach(base)
        out["low"] = out["mean"] - math.hypot(our_low, base_high)
        out["high"] = out["mean"] + math.hypot(our_high, base_low)
    return out


def mean_interval(values: Sequence[float], exact: bool = False) -> tuple[float, float] | None:
    """95 % confidence interval of the mean of independent values, by Student's t; None of fewer than two.

    None too where all are alike, as shares of few images may be by chance; `exact` values, such as costs, are not.
    """
    if len(values) < 2 or (len(set(values)) == 1 and not exact):
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(student_t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def own_interval(side: Spread, exact: bool = False) -> tuple[float | None, float | None]:
    """95 % interval of a mean over seeds, of one seed over test images; (None, None) where it is not known."""
    known = [value for value in side["values"] if value is not None]
    return mean_interval(known, exact) or ((side["low"], side["high"]) if len(known) == 1 else (None, None))


def interval_of_difference(
    ours: Spread, theirs: Spread, paired: bool, exact: bool = False
) -> tuple[float, float] | None:
    """95 % interval of ours - theirs: seed by seed where they pair, else from both sides' intervals; None unknown.

    A side's interval is its `own_interval`.
    """
    each = [a - b for a, b in pairs(ours, theirs)] if paired else []
    found = difference(_with_interval(ours, exact), _with_interval(theirs, exact), paired=False)
    return mean_interval(each, exact) or (None if found["low"] is None else (found["low"], found["high"]))


def interval_of_ratio(ours: Spread, theirs: Spread, exact: bool = False) -> tuple[float, float] | None:
    """95 % interval of ours / theirs from both sides' intervals, as of the difference of logarithms; None unknown."""
    sides = [_with_interval(side, exact) for side in (ours, theirs)]
    if any(side["low"] is None or side["mean"] <= 0 for side in sides):
        return None
    logs = [
        side | {end: math.log(side[end]) if side[end] > 0 else -math.inf for end in ("mean", "low", "high")}
        for side in sides
    ]
    found = difference(*logs, paired=False)
    return math.exp(found["low"]), math.exp(found["high"])


def _with_interval(side: Spread, exact: bool) -> Spread:
    return side | dict(zip(("low", "high"), own_interval(side, exact), strict=True))


def half(value: Mapping[str, Any]) -> float:
    """Half of a 95 % interval around its mean; of one that is cut at 0 or 1, or is not even, its longer side."""
    return max(reach(value))


def reach(value: Mapping[str, Any]) -> tuple[float, float]:
    """How far a spread reaches below and above its mean; NaN, of which nothing is drawn, where that is not known.

    0 on a side where it does not: an interval of before, of resampled images, may lie below its value.
    """
    if value["low"] is None or value["high"] is None:
        return math.nan, math.nan
    return max(0.0, value["mean"] - value["low"]), max(0.0, value["high"] - value["mean"])
