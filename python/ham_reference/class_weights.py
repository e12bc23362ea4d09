"""Class statistics kept over batches, and the weights v_c of classes made of them.

In double precision with loops over classes. p is the softmax of the eval-mode logits that the attack saw.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from .losses import cross_entropy, largest_wrong
from .method import is_hard

STRENGTH = {  # where none is told
    "hard_share": 0.5, "kl_ball": 0.1, "chi2": 0.1, "exponentiated": 1.0, "hedge": 0.6, "dafa": 1.0,
}  # fmt: skip


class ClassStatistics:
    """Sums over the rows of each class; those of earlier batches count `memory` times for every batch since."""

    def __init__(self, classes, memory):
        self.classes, self.memory = classes, memory
        self.rows = torch.zeros(classes, dtype=torch.float64)
        self.hard = torch.zeros(classes, dtype=torch.float64)
        self.margin = torch.zeros(classes, dtype=torch.float64)  # max_{k != y} p_k - p_y
        self.ce = torch.zeros(classes, dtype=torch.float64)
        self.totals = torch.zeros(classes + 1, dtype=torch.float64)  # hard shares of past epochs, the last of all rows
        self.epoch = [[] for _ in range(classes)]  # of the epoch under way
        self.predicted = torch.zeros(classes, classes, dtype=torch.float64)  # row c: the sum of p over rows of class c

    def add(self, seen, y):
        """One batch: logits (n, classes) and labels."""
        seen, y = seen.detach().double().cpu(), y.cpu()
        p = F.softmax(seen, 1)
        per_row = {
            "rows": torch.ones(len(y), dtype=torch.float64),
            "hard": is_hard(seen, y).double(),
            "margin": largest_wrong(p, y) - p.gather(1, y[:, None]).squeeze(1),
            "ce": cross_entropy(seen, y),
            "predicted": p,
        }
        for name, values in per_row.items():
            sums = getattr(self, name)
            if name == "hard":
                for label, value in zip(y.tolist(), values.tolist(), strict=True):
                    self.epoch[label].append(value)
            for c in range(self.classes):
                sums[c] = self.memory * sums[c] + values[y == c].sum(0)

    def end_epoch(self):
        """Hedge: totals fade from epoch to epoch."""
        everything = [value for of_class in self.epoch for value in of_class]
        of_all = sum(everything) / max(len(everything), 1)
        for c, of_class in enumerate([*self.epoch, everything]):
            share = sum(of_class) / len(of_class) if of_class else of_all
            self.totals[c] = self.memory * self.totals[c] + share
        self.epoch = [[] for _ in range(self.classes)]

    def seen(self):
        """The classes that rows were of."""
        return [c for c in range(self.classes) if self.rows[c] > 0]

    def mean(self, name):
        """Mean of each class that rows were of."""
        return torch.stack([getattr(self, name)[c] / self.rows[c] for c in self.seen()])


def weights(statistics, rule, strength=None):
    """v, (classes,), by a rule's name."""
    strength = STRENGTH[rule] if strength is None else strength
    if rule == "hard_share":
        return hard_share(statistics.hard, statistics.rows, strength)
    if rule == "hedge":
        return hedge(statistics.totals, strength)
    seen = statistics.seen()
    if rule == "kl_ball":
        of_seen = kl_ball(statistics.mean("margin"), strength)
    elif rule == "chi2":
        of_seen = chi2(statistics.mean("ce"), strength)
    elif rule == "exponentiated":
        of_seen = exponentiated(statistics.mean("ce"), strength)
    else:
        of_seen = dafa(statistics.mean("predicted")[:, seen], strength)
    v = torch.ones(statistics.classes, dtype=torch.float64)
    v[seen] = of_seen
    return v


def hard_share(hard, rows, strength):
    """h_c^strength, where h_c counts one row more than there are, of the mean hard share."""
    of_all = hard.sum() / rows.sum()
    if of_all == 0:
        return torch.ones_like(hard)
    return ((hard + of_all) / (rows + 1)) ** strength


def kl_ball(a, radius):
    """C * p, p the distribution that maximises sum_c p_c a_c where KL(uniform || p) <= radius.

    Lagrange: p_c is proportional to 1 / (nu - a_c), nu > max a. KL falls in nu, and is the radius at the solution.
    """
    classes = len(a)
    spread = float(a.max() - a.min())
    if spread == 0 or radius == 0:
        return torch.ones_like(a)
    gap = ((a.max() - a) / spread).tolist()  # neither a shift nor a scale of a matters

    def distribution(log_nu):
        parts = [1 / (math.exp(log_nu) + g) for g in gap]
        return [part / sum(parts) for part in parts]

    low, high = -300.0, 50.0  # nu - max a, in units of the spread
    for _ in range(200):
        middle = (low + high) / 2
        kl = sum(math.log(1 / (classes * p)) for p in distribution(middle)) / classes
        low, high = (middle, high) if kl > radius else (low, middle)
    return classes * torch.tensor(distribution(high), dtype=a.dtype)


def chi2(cost, strength):
    """1 + sqrt(2 * strength) * (L_c - mean L) / std L, at least 0."""
    std = ((cost - cost.mean()) ** 2).mean().sqrt()
    if std == 0:
        return torch.ones_like(cost)
    return (1 + math.sqrt(2 * strength) * (cost - cost.mean()) / std).clamp_min(0)


def exponentiated(cost, strength):
    """C * softmax(strength * L)."""
    return len(cost) * F.softmax(strength * cost, 0)


def hedge(totals, eta):
    """w_c + w_mean, w = C * softmax(eta * totals) over the classes and their mean."""
    w = (len(totals) - 1) * F.softmax(eta * totals, 0)
    return w[:-1] + w[-1]


def dafa(similarity, strength):
    """Distance-aware weights (DAFA, ICLR 2024): S[i, j] is the mean probability of class j on rows of class i.

    A class gains from each class that is easier than itself, and the easier one loses the same; at least .05 is left.
    """
    s = similarity
    w = torch.ones(len(s), dtype=s.dtype)
    for i in range(len(s)):
        for j in range(len(s)):
            if j == i:
                continue
            if s[i, i] < s[j, j]:
                w[i] += strength * s[i, j] * s[j, j]
            else:
                w[i] -= strength * s[j, i] * s[i, i]
    return w.clamp_min(0.05)
