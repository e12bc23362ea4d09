"""CFOL (Pethick, Chrysos and Cevher, TMLR 2023): an adversary learns online which class is weakest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .base import PGDAT


@dataclass
class CFOL(PGDAT):
    """Rows weigh C p_y, p = gamma / C + (1 - gamma) softmax(s), s the sum of eta times the errors of past epochs.

    C counts the classes that the epoch has rows of.
    """

    gamma: float = 0.5
    eta: float = 0.2

    as_is = True

    def __post_init__(self):
        super().__post_init__()
        self.scores = [0.0] * self.classes
        self.weights = [1.0] * self.classes
        self.wrong = [[] for _ in range(self.classes)]  # of this epoch's rows

    def observe(self, attacked, y, epoch):
        super().observe(attacked, y, epoch)
        for label, hard in zip(y.tolist(), attacked.hard.tolist(), strict=True):
            self.wrong[label].append(hard)

    def row_weights(self, attacked, y, epoch):
        return super().row_weights(attacked, y, epoch) * torch.tensor(self.weights, device=y.device)[y]

    def end_epoch(self):
        super().end_epoch()
        errors = {c: sum(some) / len(some) for c, some in enumerate(self.wrong) if some}
        mean = sum(errors.values()) / len(errors)  # of no consequence
        for c, error in errors.items():
            self.scores[c] += self.eta * (error - mean)
        e = {c: math.exp(self.scores[c]) for c in errors}
        self.weights = [1.0] * self.classes
        for c in errors:
            self.weights[c] = self.gamma + (1 - self.gamma) * len(errors) * e[c] / sum(e.values())
        self.wrong = [[] for _ in range(self.classes)]
