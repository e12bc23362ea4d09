"""What flags "this image is classified correctly" tell: accuracies class by class, and how sure they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from .. import engine
from ..common import checks
from ..common.class_measures import gini, value_range, worst_mean
from ..common.one_class import answers_one_class

_ops = torch.ops.ham_kernels
MANY = 20  # classes: of more, the extremes are so by luck


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracies in [0, 1]; also readable by key, as in result["worst_class"]."""

    accuracy: float  # over all images
    per_class: tuple[float, ...]  # NaN for a class without images
    worst_class: float  # smallest of per_class
    std: float  # standard deviation over the classes (population)
    n: int  # images
    no_gradient: int = 0  # images whose attack began without a gradient to follow: they were not attacked
    one_class: int | None = None  # of clean images: the class that nearly all are taken for
    nstd: float = field(init=False, compare=False)  # std / mean over the classes; NaN where the mean is 0

    def __post_init__(self):
        present = [a for a in self.per_class if not math.isnan(a)]
        mean = math.fsum(present) / len(present) if present else 0.0
        object.__setattr__(self, "nstd", self.std / mean if mean > 0 else math.nan)

    @property
    def worst3(self) -> float:
        """Mean of the three worst classes."""
        return worst_mean(self.per_class)

    @property
    def range(self) -> float:
        """Best minus worst class."""
        return value_range(self.per_class)

    @property
    def gini(self) -> float:
        """Gini coefficient over the classes; NaN where the mean is 0."""
        return gini(self.per_class)

    def __getitem__(self, key: str):
        if key not in (*self.__dataclass_fields__, "worst3", "range", "gini"):
            raise KeyError(key)
        return getattr(self, key)


@dataclass(frozen=True)
class Interval:
    """A value and its interval (see `intervals`); NaN where there is nothing to measure."""

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


@torch.no_grad()
def logits_at(model: nn.Module, x: Tensor, precision: str) -> Tensor:
    """One forward of the plain model without a graph."""
    with engine.autocast(precision, x.device):
        z = model(x)
    checks.model_output(z, x.shape[0])
    return z


def answers(z: Tensor, y: Tensor, correct: Tensor) -> Tensor:
    """(n,) int64, the class that each row answers: y where it is correct, else the largest of the other classes."""
    is_label = y[:, None] == torch.arange(z.shape[1], device=z.device)  # no index: y may be no class, unread on a GPU
    return torch.where(correct, y, z.masked_fill(is_label, -torch.inf).argmax(1))


def summary(
    correct: Tensor, labels: Tensor, classes: int, no_gradient: int = 0, answered: Tensor | None = None
) -> ClassAccuracy:
    """The accuracies of flags (n,) bool with labels (n,); `answered`: (n,) the classes that a model gives."""
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
        no_gradient=no_gradient,
        one_class=None if answered is None else answers_one_class(per_class.tolist(), answered.tolist()),
    )


def intervals(
    correct, labels, classes: int, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, Interval | list[Interval]]:
    """Accuracies and the intervals that know how few images there are.

    accuracy and per_class: Clopper and Pearson's (1934), exact for binomial counts. worst_class: the smallest lower and
    the smallest upper limit of all classes' intervals at level 1 - (1 - level) / classes: these hold together, so that
    the smallest of the true accuracies lies inside whichever class it is. std, nstd, worst3, range and gini: draws of
    each class's accuracy from Beta(k + 1/2, n - k + 1/2) (Jeffreys), freed of what classes seem to differ by counting
    few images (see `_spread_intervals`). Of more than 20 classes worst3 and range, which are of the luckiest and least
    lucky then, have no interval.

    Args:
        correct: (n,) flags: tensor, array or list.  labels: (n,) class numbers in 0..classes-1.
        resamples, seed: of the draws.
        level: share of all cases in which an interval holds what it should, above 0 and below 1.
    Returns: {"accuracy", "worst_class", "std", "nstd", "worst3", "range", "gini": Interval, "per_class":
        [Interval, ...]}; the last three as in `common.class_measures`. A class without images is NaN and never the
        worst; nstd and gini are NaN where every image fails.
    Raises: TypeError, ValueError naming the argument.
    """
    checks.integer("resamples", resamples, 1)
    checks.integer("seed", seed, 0)
    if not 0 < checks.real("level", level, 0.0, 1.0) < 1:
        raise ValueError(f"level: got {level}; it must be above 0 and below 1")
    right, total = _counts(correct, labels, classes)
    present = np.flatnonzero(total)
    right, total = right[present], total[present]
    tail = (1 - level) / 2
    by_class = [Interval(math.nan, math.nan, math.nan)] * classes
    for c, k, n in zip(present, right, total, strict=True):
        by_class[c] = exact(k, n, tail)
    together = [exact(k, n, tail / len(present)) for k, n in zip(right, total, strict=True)]
    draws = np.random.default_rng(seed).beta(right + 0.5, total - right + 0.5, size=(resamples, len(total)))
    return {
        "accuracy": exact(right.sum(), total.sum(), tail),
        "per_class": by_class,
        "worst_class": Interval(*(min(getattr(i, side) for i in together) for side in ("value", "low", "high"))),
        **_spread_intervals(right / total, total, draws, tail),
    }


def exact(k: int, n: int, tail: float) -> Interval:
    """Clopper and Pearson's interval of k of n, with a probability of `tail` beyond each limit."""
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return Interval(float(k / n), low, high)


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


def _spread(per_class: np.ndarray) -> dict[str, np.ndarray]:
    """Of each row of accuracies, (rows, classes); the last three are those of `common.class_measures`."""
    rising, n = np.sort(per_class, axis=1), per_class.shape[1]
    mean, std = per_class.mean(1), per_class.std(1)
    pairs = rising @ (2 * np.arange(1, n + 1) - n - 1) / n**2

    def over_mean(values: np.ndarray) -> np.ndarray:
        return np.divide(values, mean, out=np.full_like(std, np.nan), where=mean > 0)

    return {
        "std": std, "nstd": over_mean(std), "worst3": rising[:, :3].mean(1), "range": rising[:, -1] - rising[:, 0],
        "gini": over_mean(pairs),
    }  # fmt: skip


def _spread_intervals(shares: np.ndarray, total: np.ndarray, draws: np.ndarray, tail: float) -> dict[str, Interval]:
    """The measures of `_spread` with their intervals, by squares, in which errors of counting add up.

    The variance of the shares over classes is that of the true accuracies plus, on average, the mean of
    p (1 - p) / (n - 1). The draws hold it twice: the square of each is moved so that their mean is what is left of the
    measured square. Of worst3 it is the distance to the mean that is squared. The measured value is always inside.
    """
    classes = len(shares)
    counting = float(np.mean(shares * (1 - shares) / np.maximum(total - 1, 1))) * (1 - 1 / classes)
    real = 1 - counting / shares.var() if shares.var() > 0 else 0.0  # share of the measured variance
    found, drawn = _spread(shares[None]), _spread(draws)
    mean, means = shares.mean(), draws.mean(1)
    found["below"], drawn["below"] = mean - found["worst3"], means - drawn["worst3"]
    out = {}
    for name in ("std", "nstd", "worst3", "range", "gini"):
        value, of = float(found[name][0]), "below" if name == "worst3" else name
        if math.isnan(value) or (name in ("worst3", "range") and classes > MANY):
            out[name] = Interval(value, math.nan, math.nan)
            continue
        squares = drawn[of] ** 2
        moved = np.sqrt(np.maximum(squares - np.nanmean(squares) + real * found[of][0] ** 2, 0))
        if name == "worst3":
            moved = means - means.mean() + mean - moved
        low, high = map(float, np.nanquantile(moved, (tail, 1 - tail)))
        out[name] = Interval(value, min(max(low, 0.0), value), max(high, value))
    return out
