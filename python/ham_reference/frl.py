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

    Errors are of the training rows by eval-mode predictions; the authors attack held-out images.
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
        v0, v1 = (torch.tensor(self.class_factors(m), device=y.device)[y] for m in self.multipliers[:2])
        return w * (v0 * ce + self.beta * v1 * kl)

    def class_factors(self, multipliers):
        """C times the published weights 1/C + l_c - sum l / C."""
        return [1 + self.classes * value - sum(multipliers) for value in multipliers]

    def end_epoch(self):
        super().end_epoch()
        rows = [wrong for of_class in self.wrong for wrong in of_class]
        errors = []  # clean and robust error of each class; of all rows for a class without any
        for of_class in self.wrong:
            some = of_class or rows
            errors.append([sum(wrong[k] for wrong in some) / len(some) for k in range(2)])
        clean = [of_clean for of_clean, _ in errors]
        boundary = [of_robust - of_clean for of_clean, of_robust in errors]
        self.raise_multipliers(0, clean, self.rate)
        self.raise_multipliers(1, boundary, 2 * self.rate)
        self.raise_multipliers(2, boundary, self.eps_rate)
        for k in (0, 1):
            positive = [max(value, 0.0) for value in self.multipliers[k]]
            total = sum(positive)
            scale = self.most / total if total > self.most else 1.0
            self.multipliers[k] = [scale * value for value in positive]
        low, high = math.log(0.98) / 2, math.log(self.largest_eps) / 2
        self.multipliers[2] = [min(max(value, low), high) for value in self.multipliers[2]]
        self.wrong = [[] for _ in range(self.classes)]

    def raise_multipliers(self, k, errors, rate):
        mean = sum(errors) / len(errors)
        for c, error in enumerate(errors):
            self.multipliers[k][c] += rate * (error - mean - self.slack)
