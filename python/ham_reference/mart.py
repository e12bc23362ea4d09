"""MART (Wang et al., ICLR 2020): boosted cross entropy at x', and a KL that weighs rows which are wrong when clean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .base import PGDAT


@dataclass
class MART(PGDAT):
    """BCE(p', y) + beta * (1.0000001 - p_y(x)) * KL(p(x) || p'); nothing is held constant in the gradient."""

    loss: str = "boosted_ce"
    beta: float = 5.0

    def each(self, model, x, x_adv, y, w, epoch):
        clean, adversarial = model(x).float(), model(x_adv).float()
        p, p_adv = F.softmax(clean, 1), F.softmax(adversarial, 1)
        kl = (p * (F.log_softmax(clean, 1) - torch.log(p_adv + 1e-12))).sum(1)
        doubt = 1.0000001 - p.gather(1, y[:, None]).squeeze(1)
        return w * (self.classification(adversarial, y) + self.beta * doubt * kl)
