"""BAT (Sun et al., AAAI 2023, arXiv 2209.07534): one path of an attack, two points of it in the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.nn import functional as F

from .losses import row_divergence
from .trades import TRADES


@dataclass
class BAT(TRADES):
    """CE(f(x_lc), y) + beta KL(p(x) || p(x_fa)) + entropy (KL(p(x_lc) || u) + KL(p(x_fa) || u)), u uniform.

    x_lc: the last point still right; x_fa: the second wrong one, at which the row stays.
    """

    entropy: float = 1.0

    def patience(self, epoch):
        return 1

    def observe(self, attacked, y, epoch):
        super().observe(attacked, y, epoch)
        rows = attacked.hard if self.early_drop and self.easy == "drop" else slice(None)
        self.x_lc = attacked.last_right[rows]

    def each(self, model, x, x_adv, y, w, epoch):
        clean, right, wrong = model(x).float(), model(self.x_lc.to(x.dtype)).float(), model(x_adv).float()
        p, p_lc, p_fa = (F.softmax(z, 1) for z in (clean, right, wrong))
        log_classes = math.log(clean.shape[1])
        confident = sum(log_classes + (p * p.log()).sum(1) for p in (p_lc, p_fa))
        return w * (self.classification(right, y) + self.beta * row_divergence(p, wrong) + self.entropy * confident)
