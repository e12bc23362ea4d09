"""What flags "this image is classified correctly" tell: accuracies class by class, and how sure they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..common import (
    checks,
)

_ops = torch.ops.ham_kernels
STATISTICS = ("accuracy", "per_class", "worst_class", "std", "nstd")


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracies in [0, 1]; also readable by key, as in result["worst_class"]."""

    accuracy: float  # over all images
    per_class: tuple[float, ...]  # NaN for a class without images
    worst_class: float  # smallest of per_class
    std: float  # standard deviation over the classes (population)
    n: int  # images
    nstd: float = field(init=False, compare=False)  # std / mean over the classes; NaN where the mean is 0

    def __post_init__(self):
        present = [a for a in self.per_class if not math.isnan(a)]
        mean = math.fsum(present) / len(present) if present else 0.0
        object.__setattr__(self, "nstd", self.std / mean if mean > 0 else math.nan)

    def __getitem__(self, key: str):
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)


@dataclass(frozen=True)
class Interval:
    """A value and the interval that its resamples fall into; NaN where there is nothing to measure."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """JSON knows no NaN: null."""
        return {name: None if math.isnan(v) else v for name, v in vars(self).items()}


def correct_rows(z: Tensor, y: Tensor) -> Tensor:
    """(n,) bool, rows whose true logit is strictly the largest: a tie is lost, as in HAM's screening.

    argmax would give ties, which are common in bf16, to the class with the lower number.
    """
    return ~_ops.margin_stats(z, y, None, None, probs=False)[1]


def summary(correct: Tensor, labels: Tensor, classes: int) -> ClassAccuracy:
    """The accuracies of flags (n,) bool with labels (n,)."""
    right, total = _counts(correct, labels, classes)
    with np.errstate(invalid="ignore"):
        per_class = right / total  # 0/0 is NaN: the class has no images
    present = per_class[total > 0]
    return ClassAccuracy(
        accuracy=float(right.sum() / total.sum()),
        per_class=tuple(per_class.tolist()),
        worst_class=float(present.min()),
        std=float(present.std()),
        n=int(total.sum()),
    )


def intervals(
    correct, labels, classes: int, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, Interval | list[Interval]]:
    """Percentile bootstrap of accuracies, resampling the images of each class among themselves.

    For flags such a resample is one binomial draw per class, so no image is ever looked at twice. Two things to
    know when reading: the smallest of several noisy accuracies is biased downwards, and resampling adds that bias
    once more, so that the interval of worst_class may lie below its value (and those of std and nstd above); and a
    class without a single failure, or without a single success, has an interval of width 0.

    Args:
        correct: (n,) flags: tensor, array or list.  labels: (n,) class numbers in 0..classes-1.
        resamples, seed: how many draws, and of which generator.
        level: share of the resamples inside each interval, 0 to 1.
    Returns: {"accuracy", "worst_class", "std", "nstd": Interval, "per_class": [Interval, ...]}. A class without
        images is NaN and never the worst; nstd is NaN where every image fails, and its interval is that of the
        resamples which have one.
    Raises: TypeError, ValueError naming the argument.
    """
    checks.integer("resamples", resamples, 1)
    checks.integer("seed", seed, 0)
    checks.real("level", level, 0.0, 1.0)
    right, total = _counts(correct, labels, classes)
    present = total > 0
    right, total = right[present], total[present]
    draws = np.random.default_rng(seed).binomial(total, right / total, size=(resamples, len(total)))
    values, resampled = _statistics(right[None], total), _statistics(draws, total)
    tails = ((1 - level) / 2, (1 + level) / 2)
    found: dict[str, Interval | list[Interval]] = {
        name: _interval(values[name], resampled[name], tails) for name in STATISTICS if name != "per_class"
    }
    by_class = [Interval(math.nan, math.nan, math.nan)] * classes
    for column, c in enumerate(np.flatnonzero(present)):
        by_class[c] = _interval(values["per_class"][:, column], resampled["per_class"][:, column], tails)
    return {name: by_class if name == "per_class" else found[name] for name in STATISTICS}


def _counts(correct, labels, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Correct images and all images of each class."""
    checks.integer("classes", classes, 1)
    correct, labels = _array("correct", correct), _array("labels", labels)
    if correct.dtype != bool and not np.isin(correct, (0, 1)).all():
        raise ValueError("correct: holds something besides 0 and 1; it must be one flag per image")
    if correct.ndim != 1 or correct.size == 0 or labels.shape != correct.shape:
        raise ValueError(
            f"correct: got shape {correct.shape} with labels of shape {labels.shape}; both must be (n,) with n >= 1"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels: got {labels.dtype}; they must be integers")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels: run from {labels.min()} to {labels.max()}; they must be in 0..{classes - 1}")
    return np.bincount(labels[correct.astype(bool)], minlength=classes), np.bincount(labels, minlength=classes)


def _array(name: str, value) -> np.ndarray:
    if isinstance(value, str):
        raise TypeError(f"{name}: got a str; it must be a tensor, an array or a list")
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _statistics(right: np.ndarray, total: np.ndarray) -> dict[str, np.ndarray]:
    """Each statistic of each resample: right (resamples, classes), total (classes,), all classes with images."""
    per_class = right / total
    mean, std = per_class.mean(1), per_class.std(1)
    return {
        "accuracy": right.sum(1) / total.sum(),
        "per_class": per_class,
        "worst_class": per_class.min(1),
        "std": std,
        "nstd": np.divide(std, mean, out=np.full_like(std, np.nan), where=mean > 0),
    }


def _interval(value: np.ndarray, resampled: np.ndarray, tails: tuple[float, float]) -> Interval:
    value, resampled = float(value[0]), resampled[~np.isnan(resampled)]
    if math.isnan(value) or resampled.size == 0:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(resampled, tails)
    return Interval(value, float(low), float(high))
