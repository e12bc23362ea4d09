"""Weights by class from numbers that the attack has anyway: six rules, all on the statistics of one look a batch.

Each rule sums numbers of the rows by class, and divides by how many rows a class had, so that classes need not be of
one size; a class without rows has no say in the weights of the others. Sums and counts fade by `class_memory` from
batch to batch; of "hedge" they are those of an epoch, and its totals over epochs fade. All stays on the device, in
fp64: a rule may live on small differences of large means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed import ALONE, Ranks
from ..ops import step_size_weights
from .mining import Examples, Look

LEAST = 0.05  # of DAFA's weights, which its formula does not bound


@dataclass(frozen=True)
class Rule:
    """What is summed by class, and how the sums become weights of the classes.

    rows: of the logits and labels, (n, k).  weigh(sums (C, k), counts (C,), strength): (C,), up to a factor.
    strength: where none is told.
    by_epoch: `weigh` has the totals of the epochs in place of the sums: (C + 1,), of all rows last.
    """

    strength: float
    rows: Callable[[Tensor, Tensor], Tensor]
    weigh: Callable[[Tensor, Tensor, float], Tensor]
    by_epoch: bool = False


# ---------------------------------------------------------------- the state
def empty_state(rule: str, classes: int) -> dict[str, Tensor]:
    columns = classes if rule == "dafa" else 1
    sizes = {"class_sums": (classes, columns), "class_counts": (classes,)}
    sizes |= {"class_totals": (classes + 1,)} if RULES[rule].by_epoch else {}
    return {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}


@torch.no_grad()
def observe(memory: nn.Module, look: Look, rule: str, keep: float) -> None:
    """Adds a batch; of what was there before, the share `keep` stays."""
    sums, counts = by_class(RULES[rule].rows(look.z, look.y), look.y, len(memory.class_counts), look.ranks)
    keep = 1.0 if RULES[rule].by_epoch else keep
    memory.class_sums.mul_(keep).add_(sums)
    memory.class_counts.mul_(keep).add_(counts)


@torch.no_grad()
def weights_of(memory: nn.Module, rule: str, strength: float | None) -> Tensor:
    """(C,), up to a factor."""
    chosen = RULES[rule]
    sums = memory.class_totals if chosen.by_epoch else memory.class_sums
    return chosen.weigh(sums, memory.class_counts, chosen.strength if strength is None else strength).float()


@torch.no_grad()
def end_epoch(memory: nn.Module, rule: str, keep: float) -> None:
    """Of the totals that were there before, the share `keep` stays."""
    if RULES[rule].by_epoch:
        memory.class_totals.mul_(keep)
        add_epoch(memory.class_totals, memory.class_sums, memory.class_counts)


def add_epoch(totals: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Adds an epoch's mean of each class, and that of all rows, to the totals (C + 1,); sums and counts begin anew."""
    everywhere = sums.sum(0) / counts.sum().clamp_min(1)
    totals += torch.cat([mean_by_class(sums, counts)[:, 0], everywhere])
    sums.zero_()
    counts.zero_()


# ---------------------------------------------------------------- rows and classes
def labels_of(z: Tensor, y: Tensor) -> Tensor:
    """(n, C) bool. Compares, since an index by a label that has not been judged yet could reach anywhere."""
    return y[:, None] == torch.arange(z.shape[1], device=z.device)


def by_class(values: Tensor, y: Tensor, classes: int, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """(sums (C, k), counts (C,)) of the rows' values (n, k), over all processes, in fp64."""
    of_class = (y == torch.arange(classes, device=y.device)[:, None]).double()  # TF32 has no part in it
    sums = ranks.sum_(torch.cat([of_class @ values.double(), of_class.sum(1, keepdim=True)], 1))
    return sums[:, :-1], sums[:, -1]


def for_rows(of_class: Tensor, y: Tensor) -> Tensor:
    """(n,), each row's value by its label."""
    return of_class[y.clamp(0, len(of_class) - 1)]


def weights_by_step(examples: Examples, lam: float) -> Tensor:
    """(n_kept,), HAM's weights by the largest step of the logits, of mean 1."""
    if not examples.ranks.several:
        return step_size_weights(examples.max_step.contiguous(), lam)
    return examples.of_mean_one(torch.sigmoid(lam * examples.max_step))


def mean_by_class(sums: Tensor, counts: Tensor) -> Tensor:
    """(C, k). A class that no row was of has the mean of all rows; without any row all is 0."""
    everywhere = sums.sum(0) / counts.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(counts[:, None] > 0, sums / counts[:, None], everywhere)


def above_mean(of_class: Tensor, counts: Tensor) -> Tensor:
    """(..., C): less the mean over the classes that rows are of; of the others 0."""
    seen = counts > 0
    mean = of_class.masked_fill(~seen, 0).sum(-1, keepdim=True) / seen.sum().clamp_min(1)
    return (of_class - mean).masked_fill(~seen, 0)


def is_hard(z: Tensor, y: Tensor) -> Tensor:
    """(n,) bool: not (z_y > the largest other); a tie and a NaN are hard."""
    return torch.ops.ham_kernels.margin_stats(z, y, None, None, probs=False)[1]


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """(n,)."""
    return -F.log_softmax(z, 1).masked_fill(~labels_of(z, y), 0).sum(1)


def probability_margin(z: Tensor, y: Tensor) -> Tensor:
    """(n,): the largest probability of another class less that of the label."""
    p, of_label = F.softmax(z, 1), labels_of(z, y)
    return p.masked_fill(of_label, 0).amax(1) - p.masked_fill(~of_label, 0).amax(1)


# ---------------------------------------------------------------- known before the training
def count_weights(counts: Sequence[int]) -> list[float]:
    """n / (C n_c) for each class, from its images n_c; C classes have some, n in all. Of unlike counts the loss is then
    that of a balanced set, and the weights have mean 1 over the rows of an epoch. A class without images has 1.
    """
    rows, classes = sum(counts), sum(n > 0 for n in counts)
    return [rows / (classes * n) if n else 1.0 for n in counts]


# ---------------------------------------------------------------- the rules
def hard_share_weights(sums: Tensor, counts: Tensor, strength: float) -> Tensor:
    """The share of hard rows, to a power. One row more, as hard as the mean, keeps a class from weighing nothing."""
    share = sums.sum() / counts.sum()
    return torch.where(share > 0, (sums[:, 0] + share) / (counts + 1), 1.0) ** strength


def kl_ball_weights(margins: Tensor, radius: float, seen: Tensor | None = None) -> Tensor:
    """C * p for the p with KL(uniform || p) <= radius that makes sum_c p_c * margin_c largest (FAAL, arXiv 2402.17729).

    Over the C classes that are `seen` (all unless told); the others have 1. Its closed form:
    p_c = mu * u_c / (nu - a_c); nu, above the largest a, is the root of
    sum u log(nu - a) + log sum u / (nu - a) = radius, which falls as nu grows. Neither shift nor scale of the margins
    matters. The root lies between two of 64 points of a logarithmic grid, six times over: 36 bits.
    """
    a, seen = margins.double(), torch.ones_like(margins, dtype=torch.bool) if seen is None else seen
    highest, n = a.masked_fill(~seen, -torch.inf).max(), seen.sum()
    width = (highest - a.masked_fill(~seen, torch.inf).min()).clamp_min(0)
    below = (highest - a) / torch.where(width > 0, width, 1.0)  # nu - a_c = d + below_c
    below = below.masked_fill(~seen, torch.inf)
    low, high = a.new_full((), -250.0), a.new_full((), 25.0)  # of log d; filled there, since a copy would wait
    grid = torch.linspace(0, 1, 64, dtype=a.dtype, device=a.device)
    for _ in range(6):
        logs = low + (high - low) * grid
        d = logs.exp()[:, None] + below
        spent = d.log().masked_fill(~seen, 0).sum(1) / n + (d.reciprocal().sum(1) / n).log()
        step = (high - low) / 63
        low = low + step * ((spent > radius).sum() - 1).clamp(0, 62)
        high = low + step
    p = 1 / (low.exp() + below)
    return torch.where((width > 0) & seen, p / (p.sum() / n), 1.0).float()


def chi2_weights(losses: Tensor, radius: float, seen: Tensor | None = None) -> Tensor:
    """1 + sqrt(2 radius) * (L_c - mean) / std, at least 0: the worst case within a chi-squared ball (CODAT's set).

    Mean and std are of the classes `seen` (all unless told).
    """
    seen = torch.ones_like(losses) if seen is None else seen
    gap = above_mean(losses, seen)
    std = ((gap**2).sum() / seen.sum().clamp_min(1)).sqrt()
    return (1 + math.sqrt(2 * radius) * gap / torch.where(std > 0, std, 1.0)).clamp_min(0)


def dafa_weights(probabilities: Tensor, strength: float, seen: Tensor | None = None) -> Tensor:
    """W_i = 1 + strength * (sum of S_ij S_jj over classes j that are safer than i, less S_ji S_ii over the others).

    S (C, C): row i holds the mean probabilities of class i's rows (DAFA, arXiv 2401.12532). A class that is not `seen`
    has no such row: it neither gives nor takes, and its W is 1.
    """
    right = probabilities.diagonal()
    safer = right[None, :] > right[:, None]
    gains = probabilities * right[None, :]
    losses = (probabilities * right[None, :]).T  # S_ji S_ii
    change = torch.where(safer, gains, -losses).fill_diagonal_(0)
    if seen is not None:
        change = change.masked_fill(~(seen[:, None] & seen), 0)
    change = change.sum(1)
    return (1 + strength * change).clamp_min(LEAST)


def expert_weights(totals: Tensor, eta: float) -> Tensor:
    """Hedge with classes and the average of all rows as experts: w_c + w_average, w = C * softmax(eta * totals).

    The average keeps a class that is easy from weighing nothing (WAT, arXiv 2302.04025, with other costs).
    """
    w = (len(totals) - 1) * torch.softmax(eta * totals, 0)
    return w[:-1] + w[-1]


RULES: dict[str, Rule] = {
    "hard_share": Rule(0.5, lambda z, y: is_hard(z, y)[:, None], hard_share_weights),
    "kl_ball": Rule(
        0.1,
        lambda z, y: probability_margin(z, y)[:, None],
        lambda sums, counts, r: kl_ball_weights(mean_by_class(sums, counts)[:, 0], r, counts > 0),
    ),
    "chi2": Rule(
        0.1,
        lambda z, y: cross_entropy(z, y)[:, None],
        lambda sums, counts, r: chi2_weights(mean_by_class(sums, counts)[:, 0], r, counts > 0),
    ),
    "exponentiated": Rule(
        1.0,
        lambda z, y: cross_entropy(z, y)[:, None],
        lambda sums, counts, eta: len(counts) * torch.softmax(eta * mean_by_class(sums, counts)[:, 0], 0),
    ),
    "hedge": Rule(
        0.6, lambda z, y: is_hard(z, y)[:, None], lambda totals, _, eta: expert_weights(totals, eta), by_epoch=True
    ),
    "dafa": Rule(
        1.0,
        lambda z, y: F.softmax(z, 1),
        lambda sums, counts, s: dafa_weights(mean_by_class(sums, counts), s, counts > 0),
    ),
}
