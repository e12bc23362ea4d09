"""MAIL (Wang et al., NeurIPS 2021, arXiv 2106.07904): rows weigh by their probability margin in the update itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .losses import boosted_cross_entropy, largest_wrong, row_divergence
from .trades import TRADES


@dataclass
class MAIL(TRADES):
    """w = 3 sigmoid(slope (PM + bias)), PM = max_{k != y} p'_k - p'_y, held constant and not normalised.

    It multiplies the cross entropy of PGD-AT, the divergence of TRADES, or the boosted cross entropy of MART. Ones
    before mail_from.
    """

    base: str = "trades"
    beta: float | None = None
    slope: float = 1.0
    bias: float = -1.5
    mail_from: int = 76

    def __post_init__(self):
        super().__post_init__()
        self.raises = "kl" if self.base == "trades" else "ce"
        if self.beta is None:
            self.beta = 5.0 if self.base == "mart" else 6.0

    def each(self, model, x, x_adv, y, w, epoch):
        clean = None if self.base == "pgd_at" else model(x).float()
        adversarial = model(x_adv).float()
        p_adv = F.softmax(adversarial, 1)
        own = torch.ones(len(y), device=y.device)
        if epoch >= self.mail_from:
            with torch.no_grad():
                margin = largest_wrong(p_adv, y) - p_adv.gather(1, y[:, None]).squeeze(1)
                own = 3 / (1 + torch.exp(-self.slope * (margin + self.bias)))
        if self.base == "pgd_at":
            return w * own * self.classification(adversarial, y)
        p = F.softmax(clean, 1)
        if self.base == "trades":
            return w * (self.classification(clean, y) + self.beta * own * row_divergence(p, adversarial))
        kl = (p * (F.log_softmax(clean, 1) - torch.log(p_adv + 1e-12))).sum(1)
        doubt = 1.0000001 - p.gather(1, y[:, None]).squeeze(1)
        boosted = boosted_cross_entropy(adversarial, y, self.label_smoothing)
        return w * (own * boosted + self.beta * doubt * kl)
