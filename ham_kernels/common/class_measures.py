"""How unequal the classes are: one number from one value per class, such as accuracies in [0, 1].

None and NaN are classes without images and do not count. NaN is a measure of nothing. Range and Gini coefficient of
per-class robustness are those of arXiv 2604.12757 (RDI, NRGC), here of accuracies. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def worst_mean(per_class: Sequence[float | None], k: int = 3) -> float:
    """Mean of the k lowest values, of fewer where there are fewer classes; from the lowest value to the mean."""
    lowest = _known(per_class)[:k]
    return math.fsum(lowest) / len(lowest) if lowest else math.nan


def value_range(per_class: Sequence[float | None]) -> float:
    """Best minus worst; of accuracies from 0 (all equal) to 1."""
    known = _known(per_class)
    return known[-1] - known[0] if known else math.nan


def gini(per_class: Sequence[float | None]) -> float:
    """Gini coefficient sum_ij |a_i - a_j| / (2 n^2 mean) of n values >= 0; NaN where their mean is 0.

    From 0 (all equal) to 1 - 1/n (one class has all).
    """
    known = _known(per_class)
    n, total = len(known), math.fsum(known)
    # in rising order the value at rank i is the larger one of i - 1 pairs and the smaller one of n - i
    return math.fsum((2 * i - n - 1) * a for i, a in enumerate(known, 1)) / (n * total) if total > 0 else math.nan


def _known(per_class: Sequence[float | None]) -> list[float]:
    """In rising order."""
    return sorted(a for a in per_class if a is not None and not math.isnan(a))
