"""CFA (Wei et al., CVPR 2023, arXiv 2303.14460): budget and regularisation of each class by its robust accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .trades import TRADES

LAM_EPS = {"trades": 0.3, "pgd_at": 0.5}


@dataclass
class CFA(TRADES):
    """eps_c = (lam_eps + r_c) * eps and beta_c = (lam_beta + r_c) * beta, r_c the share right in the last epoch.

    Rows are judged on the eval-mode logits that the attack saw, under their own eps; the authors take the update's.
    """

    base: str = "trades"
    class_from: int = 10
    lam_eps: float | None = None
    lam_beta: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        self.raises = "kl" if self.base == "trades" else "ce"
        self.robust = [None] * self.classes  # of the last epoch
        self.right = [[] for _ in range(self.classes)]  # of this one

    def factor(self, y, epoch, lam):
        """lam + r_c of each row; 1 before class_from, and for classes of which the last epoch had no row."""
        if epoch < self.class_from:
            return torch.ones(len(y), device=y.device)
        return torch.tensor([1.0 if r is None else lam + r for r in self.robust], device=y.device)[y]

    def budget(self, y, epoch):
        lam = LAM_EPS[self.base] if self.lam_eps is None else self.lam_eps
        return self.factor(y, epoch, lam) * self.eps, self.step_size

    def observe(self, attacked, y, epoch):
        super().observe(attacked, y, epoch)
        right = ~attacked.hard
        for label, value in zip(y.tolist(), right.tolist(), strict=True):
            self.right[label].append(value)

    def each(self, model, x, x_adv, y, w, epoch):
        if self.base == "pgd_at":
            return w * self.classification(model(x_adv), y)
        ce, kl = self.terms(model, x, x_adv, y)
        beta = self.factor(y, epoch, self.lam_beta) * self.beta
        return w * (ce + beta * kl) / (1 + beta)

    def end_epoch(self):
        super().end_epoch()
        self.robust = [sum(of_class) / len(of_class) if of_class else None for of_class in self.right]
        self.right = [[] for _ in range(self.classes)]
