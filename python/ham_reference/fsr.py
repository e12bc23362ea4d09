"""FSR (Jin et al., ICLR 2025, arXiv 2501.13273): confusions weighed by what they add to a spectral norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .losses import cross_entropy, row_divergence
from .trades import TRADES


@dataclass
class FSR(TRADES):
    """(1 - share) CE(f(x), y) + beta KL(p(x) || p(x')) + share G[pred(x'), y] CE(f(x'), y).

    G is of the confusions of the last epoch, at the eval-mode logits that the attack saw: the authors attack all
    images once more. Ones in the first epoch.
    """

    share: float = 0.3
    lowered: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        self.g = torch.ones(self.classes, self.classes, dtype=torch.float64)  # by prediction and label
        self.taken_for = [[] for _ in range(self.classes)]  # predictions of this epoch's rows, by label

    def observe(self, attacked, y, epoch):
        super().observe(attacked, y, epoch)
        for label, z in zip(y.tolist(), attacked.seen.clone(), strict=True):
            z[label] -= self.lowered * z[label].abs()
            self.taken_for[label].append(int(z.argmax()))

    def each(self, model, x, x_adv, y, w, epoch):
        clean, adversarial = model(x).float(), model(x_adv).float()
        of_now = self.g if epoch >= self.class_from else torch.ones_like(self.g)
        g = of_now.float().to(y.device)[adversarial.argmax(1), y]
        kl = row_divergence(F.softmax(clean, 1), adversarial)
        ce = (1 - self.share) * self.classification(clean, y) + self.share * g * cross_entropy(adversarial, y)
        return w * (ce + self.beta * kl)

    def end_epoch(self):
        super().end_epoch()
        shares = torch.zeros(self.classes, self.classes, dtype=torch.float64)
        for label, taken in enumerate(self.taken_for):
            for predicted in taken:
                if predicted != label:
                    shares[predicted, label] += 1 / len(taken)
        self.g = spectral_weights(shares)
        self.taken_for = [[] for _ in range(self.classes)]


def spectral_weights(shares):
    """The leading singular vectors' product u v^T, scaled to 0.01 ... 2.01."""
    u, _, vh = torch.linalg.svd(shares)
    g = torch.outer(u[:, 0], vh[0])
    if g.max() == g.min():
        return torch.ones_like(g)
    return 0.01 + 2 * (g - g.min()) / (g.max() - g.min())
