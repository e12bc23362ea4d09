"""ABSLD (Zhao et al., arXiv 2312.05508): RSLAD whose teacher is softened for easy classes, and sharpened for hard ones.

t of a row is softmax(teacher / T_y), with temperatures T of their own for the attacked and for the clean images; the
attack has that of the attacked ones. After each epoch T_c falls by rate (L_c - mean L) / max |L - mean L|, L_c the
class's mean cross entropy in the update, and stays within 0.5 ... 5. Cost: as RSLAD, 2K + 6, and one forward of the
teacher.

Differences from the authors' code: theirs divides one tensor by both temperatures, so that both terms have the teacher
over their product; L_c are means, so that classes need not be of one size (theirs: sums); rate stays as it is (theirs
falls with the learning rate); divergences are sums over classes (theirs: a C-th of them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .rslad import RSLAD

LEAST, MOST = 0.5, 5.0  # temperatures


@dataclass(frozen=True)
class ABSLD(RSLAD):
    """ABSLD. With early_drop, rows that stop or jump (easy) suit it: dropping loses the teacher's word on them."""

    name = "absld"
    title = "ABSLD"
    treats_classes = True
    remembers_first = True

    rate: Annotated[float, Ge(0), Words("rate {}")] = 0.1
    """By how much the temperature of the hardest class, or of the easiest, moves in an epoch."""

    def remembers(self, classes):
        import torch

        own = {
            # attacked, clean; of the epoch under way; in fp64, since their differences are divided by the largest
            "absld_losses": torch.zeros(2, classes, dtype=torch.float64),
            "absld_counts": torch.zeros(classes, dtype=torch.float64),
            "absld_temperatures": torch.ones(2, classes),
        }
        return super().remembers(classes) | own

    def teacher_target(self, z, y, memory):
        from .class_weights import for_rows
        from .losses import softened

        return softened(z, for_rows(memory.absld_temperatures[0], y)).exp()

    def loss_of(self, model, examples, memory):
        import torch
        from torch.nn import functional as F

        from .class_weights import by_class, cross_entropy, for_rows
        from .losses import logits_at, softened, weighted_mean

        y = examples.y
        clean, adversarial = logits_at(model, examples, examples.x), logits_at(model, examples, examples.x_adv)
        found = torch.stack([cross_entropy(z.detach(), y) for z in (adversarial, clean)], 1)
        sums, counts = by_class(found, y, len(memory.absld_counts), examples.ranks)
        memory.absld_losses += sums.T
        memory.absld_counts += counts
        losses = 0
        for z, of_classes, share in zip(
            (adversarial, clean), memory.absld_temperatures, (1 - self.clean_share, self.clean_share), strict=True
        ):
            taught = softened(examples.teacher, for_rows(of_classes, y))
            losses = losses + share * F.kl_div(F.log_softmax(z, 1), taught, reduction="none", log_target=True).sum(1)
        return weighted_mean(losses, examples.weights)

    def end_epoch(self, end, memory):
        import torch

        from .class_weights import above_mean, mean_by_class

        super().end_epoch(end, memory)
        if end.epoch + 1 >= self.class_from:
            gap = above_mean(mean_by_class(memory.absld_losses.T, memory.absld_counts).T, memory.absld_counts)
            largest = gap.abs().amax(1, keepdim=True)
            moved = memory.absld_temperatures - self.rate * gap / torch.where(largest > 0, largest, 1.0)
            memory.absld_temperatures.copy_(moved.clamp(LEAST, MOST))
        memory.absld_losses.zero_()
        memory.absld_counts.zero_()
