"""FAIR-TAT (Medi, Jung and Keuper, WACV 2025, arXiv 2410.23142): attacks towards classes, eps by class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .base import PGDAT
from .noise import uniform


@dataclass
class FAIRTAT(PGDAT):
    """PGD-AT whose attack goes to a class drawn by softmax(temperature f), f_c the share of errors that fell on c.

    Errors are shares of classes, at the eval-mode logits that the attack saw in the last epoch.
    """

    class_from: int = 2
    temperature: float = 2.0
    adaptive_eps: bool = True
    lam_eps: float = 0.5

    raises = "target"

    def __post_init__(self):
        super().__post_init__()
        self.odds = [1.0] * self.classes
        self.factors = [1.0] * self.classes  # of eps
        self.predicted = [[] for _ in range(self.classes)]  # of this epoch's rows, by label

    def budget(self, y, epoch):
        if not self.adaptive_eps:
            return self.eps, self.step_size
        return torch.tensor(self.factors, device=y.device)[y] * self.eps, self.step_size

    def target(self, x, y, seed, step):
        numbers = uniform(len(y), 1, seed, step, stream=3)[0][:, 0].tolist()
        drawn = [self.draw(label, u) for label, u in zip(y.tolist(), numbers, strict=True)]
        return F.one_hot(torch.tensor(drawn, device=y.device), self.classes).to(x.dtype)

    def draw(self, label, u):
        """A class other than the label; u in [0, 1) goes through the others' odds from the first on."""
        others = [c for c in range(self.classes) if c != label]
        left = u * sum(self.odds[c] for c in others)
        for c in others:
            left -= self.odds[c]
            if left < 0:
                return c
        return others[-1]

    def observe(self, attacked, y, epoch):
        super().observe(attacked, y, epoch)
        for label, z in zip(y.tolist(), attacked.seen, strict=True):
            self.predicted[label].append(int(z.argmax()))

    def end_epoch(self):
        super().end_epoch()
        fallen = [0.0] * self.classes
        for label, predicted in enumerate(self.predicted):
            wrong = [p for p in predicted if p != label]
            for p in wrong:
                fallen[p] += 1 / len(predicted)
            self.factors[label] = self.lam_eps + 1 - len(wrong) / len(predicted) if predicted else 1.0
        total = sum(fallen) or 1.0
        e = [math.exp(self.temperature * share / total) for share in fallen]
        self.odds = [value / sum(e) for value in e]
        self.predicted = [[] for _ in range(self.classes)]
