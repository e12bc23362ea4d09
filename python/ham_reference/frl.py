"""FRL (Xu et al., ICML 2021, arXiv 2010.06121): multipliers of classes whose errors exceed the mean by too much."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .method import is_hard
from .trades import TRADES


@dataclass
class FRL(TRADES):
    """v0_y CE + beta v1_y KL, v_c = 1 + C l_c - sum l, and eps_c = exp(2 l2_c) eps.

    C counts the classes that the epoch has rows of. Errors are of the training rows by eval-mode predictions; the
    authors attack held-out images.
    """

    beta: float = 1.5
    remargin: bool = True
    rate: float = 0.05
    eps_rate: float = 0.2
    slack: float = 0.07
    most: float = 0.5
    largest_eps: float = 3.0

    raises = "kl"

    def __post_init__(self):
        super().__post_init__()
        self.multipliers = [[0.0] * self.classes for _ in range(3)]
        self.wrong = [[] for _ in range(self.classes)]  # (clean, attacked) of this epoch's rows
        self.weights = [[1.0] * self.classes for _ in range(2)]

    def budget(self, y, epoch):
        if not self.remargin:
            return self.eps, self.step_size
        factors = torch.tensor([math.exp(2 * value) for value in self.multipliers[2]], device=y.device)
        return factors[y] * self.eps, (factors.max() * self.step_size).repeat(len(y))

    def observe(self, attacked, y, epoch):
        super().observe(attacked, y, epoch)
        clean = is_hard(attacked.q, y).tolist()
        for label, *wrong in zip(y.tolist(), clean, attacked.hard.tolist(), strict=True):
            self.wrong[label].append(wrong)

    def each(self, model, x, x_adv, y, w, epoch):
        ce, kl = self.terms(model, x, x_adv, y)
        v0, v1 = (torch.tensor(v, device=y.device)[y] for v in self.weights)
        return w * (v0 * ce + self.beta * v1 * kl)

    def end_epoch(self):
        super().end_epoch()
        clean, boundary = {}, {}  # errors of each class that has rows
        for c, of_class in enumerate(self.wrong):
            if of_class:
                clean[c] = sum(of_clean for of_clean, _ in of_class) / len(of_class)
                boundary[c] = sum(of_robust for _, of_robust in of_class) / len(of_class) - clean[c]
        self.raise_multipliers(0, clean, self.rate)
        self.raise_multipliers(1, boundary, 2 * self.rate)
        self.raise_multipliers(2, boundary, self.eps_rate)
        for k in (0, 1):
            positive = [max(value, 0.0) for value in self.multipliers[k]]
            total = sum(positive)
            scale = self.most / total if total > self.most else 1.0
            self.multipliers[k] = [scale * value for value in positive]
            # C times the published 1/C + l_c - sum l / C
            self.weights[k] = [1 + len(clean) * value - sum(self.multipliers[k]) for value in self.multipliers[k]]
        low, high = math.log(0.98) / 2, math.log(self.largest_eps) / 2
        self.multipliers[2] = [min(max(value, low), high) for value in self.multipliers[2]]
        self.wrong = [[] for _ in range(self.classes)]

    def raise_multipliers(self, k, errors, rate):
        mean = sum(errors.values()) / len(errors)
        for c in range(self.classes):
            self.multipliers[k][c] += rate * (errors.get(c, mean) - mean - self.slack)
