"""A teacher's soft labels: RSLAD (Zi et al., ICCV 2021), Fair-ARD (Yue et al., NeurIPS 2023), ABSLD (Zhao et al.)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .base import PGDAT
from .losses import cross_entropy, row_divergence


@dataclass
class RSLAD(PGDAT):
    """(1 - clean_share) KL(t || p(x')) + clean_share KL(t || p(x)), t the teacher's prediction of the clean images.

    The attack raises KL(t || p). The teacher is in eval mode.
    """

    teacher: nn.Module | None = None
    clean_share: float = 1 / 6

    raises = "kl"

    def taught(self, x):
        """Logits of the teacher."""
        with torch.no_grad():
            return copy.deepcopy(self.teacher).to(x.dtype).eval()(x).to(x.dtype)

    def target(self, x, y, seed, step):
        return F.softmax(self.taught(x), 1)

    def each(self, model, x, x_adv, y, w, epoch):
        t = F.softmax(self.taught(x), 1)
        clean, adversarial = model(x).to(x.dtype), model(x_adv).to(x.dtype)
        both = (1 - self.clean_share) * row_divergence(t, adversarial) + self.clean_share * row_divergence(t, clean)
        return w * both


@dataclass
class FairARD(RSLAD):
    """T^2 KL(t_T || p_T(x')) on ARD; or RSLAD. Classes weigh by kappa^-power, their mean number of right points."""

    base: str = "ard"
    temperature: float = 30.0
    power: float = 2.0

    as_is = True

    def __post_init__(self):
        super().__post_init__()
        self.raises = "kl" if self.base == "rslad" else "ce"
        self.v = [1.0] * self.classes
        self.right = [[] for _ in range(self.classes)]  # right points of this epoch's rows

    def target(self, x, y, seed, step):
        return super().target(x, y, seed, step) if self.base == "rslad" else None

    def observe(self, attacked, y, epoch):
        super().observe(attacked, y, epoch)
        for label, right in zip(y.tolist(), attacked.right_looks.tolist(), strict=True):
            self.right[label].append(right)

    def row_weights(self, attacked, y, epoch):
        return super().row_weights(attacked, y, epoch) * torch.tensor(self.v, device=y.device)[y]

    def each(self, model, x, x_adv, y, w, epoch):
        if self.base == "rslad":
            return super().each(model, x, x_adv, y, w, epoch)
        t = F.softmax(self.taught(x) / self.temperature, 1)
        return w * self.temperature**2 * row_divergence(t, model(x_adv).to(x.dtype) / self.temperature)

    def end_epoch(self):
        super().end_epoch()
        v = {c: (sum(some) / len(some) + 1e-5) ** -self.power for c, some in enumerate(self.right) if some}
        mean = sum(v.values()) / len(v)
        self.v = [min(max(v.get(c, mean) / mean, 5 / 6), 5 / 2) for c in range(self.classes)]
        self.right = [[] for _ in range(self.classes)]


@dataclass
class ABSLD(RSLAD):
    """RSLAD with t = softmax(teacher / T_y), temperatures of their own for attacked and clean images."""

    rate: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        self.temperatures = [[1.0] * self.classes for _ in range(2)]  # attacked, clean
        self.losses = [[[] for _ in range(self.classes)] for _ in range(2)]
        self.last = None  # of the forward that was made last: that of the update comes after that of a perturbation

    def softened(self, x, y, k):
        temperature = torch.tensor(self.temperatures[k], dtype=x.dtype, device=y.device)[y]
        return F.softmax(self.taught(x) / temperature[:, None], 1)

    def target(self, x, y, seed, step):
        self.note()
        return self.softened(x, y, 0)

    def each(self, model, x, x_adv, y, w, epoch):
        clean, adversarial = model(x).to(x.dtype), model(x_adv).to(x.dtype)
        self.last = y.tolist(), [cross_entropy(z.detach(), y).tolist() for z in (adversarial, clean)]
        attacked = row_divergence(self.softened(x, y, 0), adversarial)
        return w * (
            (1 - self.clean_share) * attacked + self.clean_share * row_divergence(self.softened(x, y, 1), clean)
        )

    def note(self):
        """Takes the losses of the last update."""
        if self.last is not None:
            labels, both = self.last
            for k in range(2):
                for label, value in zip(labels, both[k], strict=True):
                    self.losses[k][label].append(value)
        self.last = None

    def end_epoch(self):
        super().end_epoch()
        self.note()
        for k in range(2):
            found = {c: sum(some) / len(some) for c, some in enumerate(self.losses[k]) if some}
            mean = sum(found.values()) / len(found)
            largest = max(abs(value - mean) for value in found.values()) or 1.0
            self.temperatures[k] = [
                min(max(t - self.rate * (found.get(c, mean) - mean) / largest, 0.5), 5.0)
                for c, t in enumerate(self.temperatures[k])
            ]
            self.losses[k] = [[] for _ in range(self.classes)]
