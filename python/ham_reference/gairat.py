"""GAIRAT (Zhang et al., ICLR 2021): rows that are wrong after few steps weigh more."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import PGDAT


@dataclass
class GAIRAT(PGDAT):
    """w = (1 + tanh(shift + 5 * (1 - 2 kappa / K))) / 2, kappa the number of looks at which the row was right."""

    shift: float = -1.0

    def row_weights(self, attacked, y, epoch):
        steps = len(self.step_sizes) or self.steps
        kappa = attacked.right_looks
        geometric = (1 + torch.tanh(self.shift + 5 * (1 - 2 * kappa / steps))) / 2
        return super().row_weights(attacked, y, epoch) * geometric
