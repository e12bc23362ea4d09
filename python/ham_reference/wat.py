"""WAT (Li and Liu, AAAI 2023, arXiv 2302.04025): classes and their mean are experts, weighed by their costs so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .class_weights import hedge
from .losses import row_divergence
from .trades import TRADES


@dataclass
class WAT(TRADES):
    """TRADES, each row weighed by w_y + w_mean, w = C * softmax(eta * totals), C + 1 totals over epochs.

    The cost of a row is that of TRADES by eval-mode predictions, -log q_y + beta * KL(q || p), p those that the attack
    saw: the authors attack held-out images instead. Weights are not scaled.
    """

    eta: float = 0.1

    as_is = True

    def __post_init__(self):
        super().__post_init__()
        self.totals = torch.zeros(self.classes + 1, dtype=torch.float64)  # the last: of all rows
        self.costs = [[] for _ in range(self.classes)]  # of this epoch's rows

    def observe(self, attacked, y, epoch):
        super().observe(attacked, y, epoch)
        q = attacked.q
        cost = -q.gather(1, y[:, None]).squeeze(1).log() + self.beta * row_divergence(q, attacked.seen)
        for label, value in zip(y.tolist(), cost.tolist(), strict=True):
            self.costs[label].append(value)

    def row_weights(self, attacked, y, epoch):
        v = hedge(self.totals, self.eta if epoch >= self.class_from else 0.0).float().to(y.device)
        return super().row_weights(attacked, y, epoch) * v[y]

    def end_epoch(self):
        super().end_epoch()
        everything = [value for of_class in self.costs for value in of_class]
        if not everything:
            return
        of_all = sum(everything) / len(everything)
        for c, of_class in enumerate(self.costs):
            self.totals[c] += sum(of_class) / len(of_class) if of_class else of_all
        self.totals[-1] += of_all
        self.costs = [[] for _ in range(self.classes)]
