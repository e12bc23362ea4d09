"""DAFA (Lee et al., ICLR 2024): one look at which classes are alike, then budget and weight by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import class_weights
from .trades import TRADES


@dataclass
class DAFA(TRADES):
    """TRADES. In epoch class_from - 1 it learns W; then eps, step size and cross entropy are W_y times as large.

    The KL is not weighed. S is of the eval-mode predictions that the attack saw, where the authors take the update's.
    """

    class_from: int = 71
    strength: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.w = torch.ones(self.classes, dtype=torch.float64)
        self.predictions = [[] for _ in range(self.classes)]  # of epoch class_from - 1, by label

    def observe(self, attacked, y, epoch):
        super().observe(attacked, y, epoch)
        if epoch == self.class_from - 1:
            for label, p in zip(y.tolist(), F.softmax(attacked.seen.double(), 1).cpu(), strict=True):
                self.predictions[label].append(p)

    def budget(self, y, epoch):
        w = self.w.float().to(y.device)[y]
        return w * self.eps, w * self.step_size

    def each(self, model, x, x_adv, y, w, epoch):
        ce, kl = self.terms(model, x, x_adv, y)
        return w * (self.w.float().to(y.device)[y] * ce + self.beta * kl)

    def end_epoch(self):
        super().end_epoch()
        seen = [c for c, of in enumerate(self.predictions) if of]
        if not seen:
            return
        s = torch.stack([torch.stack(self.predictions[c]).mean(0)[seen] for c in seen])
        self.w[seen] = class_weights.dafa(s, self.strength)
        self.predictions = [[] for _ in range(self.classes)]
