"""CFOL (Pethick, Chrysos and Cevher, TMLR 2023): an adversary learns online which class is weakest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .base import PGDAT


@dataclass
class CFOL(PGDAT):
    """Rows weigh C p_y, p = gamma / C + (1 - gamma) softmax(s), s the sum of eta times the errors of past epochs."""

    gamma: float = 0.5
    eta: float = 0.2

    as_is = True

    def __post_init__(self):
        super().__post_init__()
        self.scores = [0.0] * self.classes
        self.wrong = [[] for _ in range(self.classes)]  # of this epoch's rows

    def observe(self, attacked, y, epoch):
        super().observe(attacked, y, epoch)
        for label, hard in zip(y.tolist(), attacked.hard.tolist(), strict=True):
            self.wrong[label].append(hard)

    def row_weights(self, attacked, y, epoch):
        e = [math.exp(s) for s in self.scores]
        p = [self.gamma / self.classes + (1 - self.gamma) * value / sum(e) for value in e]
        return super().row_weights(attacked, y, epoch) * self.classes * torch.tensor(p, device=y.device)[y]

    def end_epoch(self):
        super().end_epoch()
        rows = [hard for of_class in self.wrong for hard in of_class]
        for c, of_class in enumerate(self.wrong):
            some = of_class or rows
            self.scores[c] += self.eta * sum(some) / len(some)
        mean = sum(self.scores) / self.classes  # of no consequence
        self.scores = [s - mean for s in self.scores]
        self.wrong = [[] for _ in range(self.classes)]
