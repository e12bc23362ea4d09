"""FSR (Jin et al., ICLR 2025, arXiv 2501.13273): TRADES, and a cross entropy weighed by how classes are confused.

N[i, j] is the share of class j's rows that the attack has the model take for another class i; u and v are its leading
singular vectors, and G is u v^T scaled to 0.01 ... 2.01: what each confusion adds to the spectral norm of N, which
bounds the error of the worst class. Then
loss = (1 - share) CE(f(x), y) + beta KL(p(x) || p(x')) + share * G[argmax p(x'), y] * (-log p'_y). Cost: as TRADES,
2K + 7.

Meant for the last epochs of a training, as `--from RUN --epochs 3`. G comes from what the attack saw in the epoch
before; the first one has none, in which all confusions weigh 1.

Differences from the authors' code: theirs attacks all training images once more before each epoch, from copies of the
model (74 in all), ours carries N over; they count confusions, where shares allow classes of unlike sizes; before they
count they lower the label's logit to 0.9 of itself, which raises a negative one: here it falls by a tenth of its size.
As theirs, G also weighs rows that are right, by its diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from ..common.field_types import Words
from .trades import TRADES

if TYPE_CHECKING:
    from torch import Tensor

LEAST, RANGE = 0.01, 2.0  # of the weights of confusions
SQUARINGS = 12  # of N^T N: 4096 power iterations


@dataclass(frozen=True)
class FSR(TRADES):
    """FSR. With early_drop, rows that stop or jump (easy) suit it: confusions are then those at x^M."""

    name = "fsr"
    title = "FSR"
    looks_at_classes = True
    treats_classes = True

    share: Annotated[float, Ge(0), Le(1), Words("share {}")] = 0.3
    """Of the term that confusions weigh; the clean cross entropy has the rest."""
    lowered: Annotated[float, Ge(0), Words("lowered by {}")] = 0.1
    """By how much of its size the label's logit is lowered before a confusion is looked for."""

    def remembers(self, classes):
        import torch

        own = {
            "fsr_confused": torch.zeros(classes, classes),  # of the epoch under way: row j, the rows of class j
            "fsr_counts": torch.zeros(classes),
            "fsr_weights": torch.ones(classes, classes),  # G of the last epoch, by (prediction, label)
        }
        return super().remembers(classes) | own

    def observe(self, examples, memory):
        from torch.nn import functional as F

        from .class_weights import by_class, labels_of

        super().observe(examples, memory)
        z, y = examples.look.z, examples.look.y
        of_label = labels_of(z, y)
        lowered = z - self.lowered * z.abs() * of_label
        taken = F.one_hot(lowered.argmax(1), z.shape[1]).masked_fill(of_label, 0)
        confused, counts = by_class(taken, y, len(memory.fsr_counts), examples.ranks)
        memory.fsr_confused += confused
        memory.fsr_counts += counts

    def loss_of(self, model, examples, memory):
        from .class_weights import cross_entropy
        from .losses import divergence, logits_at, row_ce, weighted_mean

        y = examples.y
        clean, adversarial = logits_at(model, examples, examples.x), logits_at(model, examples, examples.x_adv)
        confusion = memory.fsr_weights[adversarial.argmax(1), y.clamp(0, len(memory.fsr_counts) - 1)]
        losses = (1 - self.share) * row_ce(self, clean, y) + self.beta * divergence(clean, adversarial)
        return weighted_mean(losses + self.share * confusion * cross_entropy(adversarial, y), examples.weights)

    def end_epoch(self, end, memory):
        super().end_epoch(end, memory)
        if end.epoch + 1 >= self.class_from:
            shares = memory.fsr_confused / memory.fsr_counts[:, None].clamp_min(1)
            memory.fsr_weights.copy_(confusion_weights(shares.T))
        memory.fsr_confused.zero_()
        memory.fsr_counts.zero_()


def confusion_weights(shares: Tensor) -> Tensor:
    """G (classes, classes) of the shares N, which are not negative; ones where nothing is confused.

    v is the limit of power iterations on N^T N from all ones, which every leading vector of such a matrix has a part
    in; squared again and again, it takes no decomposition that the host would wait for.
    """
    import torch

    n = shares.double()
    power = n.T @ n
    for _ in range(SQUARINGS):
        power = power / power.diagonal().sum().clamp_min(torch.finfo(n.dtype).tiny)
        power = power @ power
    v = power.sum(1)
    g = torch.outer(n @ v, v)
    width = g.max() - g.min()
    g = LEAST + RANGE * (g - g.min()) / torch.where(width > 0, width, 1.0)
    return torch.where(width > 0, g, 1.0).to(shares.dtype)
