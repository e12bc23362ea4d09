"""Two models judged on the same images: their differences image by image."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..reading.evaluations import Attack
from ..reading.flags import by_class

RESAMPLES, SEED, TAILS = 2000, 0, (0.025, 0.975)


def paired(ours: Attack, theirs: Attack) -> dict[str, Any] | None:
    """95 % intervals of what one model is better by, over images: a percentile bootstrap within classes, in pairs.

    Each resample draws as many images of each class as there are, with the flags that both models have at them; that
    is one multinomial draw of (both right, only ours, only theirs, none) per class. A class in which the two never
    differ has an interval of width 0.
    Returns: {"per_class": [(low, high) or None without images], "worst": (low, high) of the difference of the worst
        classes, "std": of the ratio of the std over classes minus 1, None where that of the second may be 0}; None
        where it is not known that both were judged on the same images, or flags are missing.
    """
    same = (
        ours.images_sha256 is not None and ours.images_sha256 == theirs.images_sha256 and ours.labels == theirs.labels
    )
    if not same or ours.labels is None or None in (ours.correct, theirs.correct):
        return None
    draw = np.random.default_rng(SEED)
    per_class, shares = [], []
    for a, b in zip(by_class(ours), by_class(theirs), strict=True):
        if not a:
            per_class.append(None)
            continue
        pairs = list(zip(a, b, strict=True))
        counts = np.array([pairs.count(pair) for pair in (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0"))])
        drawn = draw.multinomial(len(a), counts / len(a), size=RESAMPLES) / len(a)
        shares.append(drawn[:, [0, 0]] + drawn[:, [1, 2]])
        per_class.append(_interval(shares[-1][:, 0] - shares[-1][:, 1]))
    mine, other = np.moveaxis(np.array(shares), 2, 0)  # (classes, resamples) each
    std = other.std(0)
    return {
        "per_class": per_class,
        "worst": _interval(mine.min(0) - other.min(0)),
        "std": _interval(mine.std(0) / std - 1) if std.all() else None,
    }


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, TAILS)
    return float(low), float(high)
