"""Fair-ARD (Yue et al., NeurIPS 2023): distillation, classes weighed by how few steps of the attack turn their rows.

On ARD: loss = v_y T^2 KL(t_T || p_T(x')), t and p softened by the temperature T, the attack on the label; on RSLAD, its
attack and its two divergences, weighed. kappa_c is the mean number of the attack's K points at which rows of class c
were right in the last epoch; v_c = kappa_c^-power, scaled to a mean of 1 over the classes that rows are of, then
clipped to 5/6 ... 5/2. In the first epoch all weigh 1. Cost: 2K + 3 on ARD, 2K + 6 on RSLAD, and one forward of the
teacher; kappa is free.

Differences from the authors' code: the attack runs in eval mode (theirs in train mode, and moves BatchNorm);
divergences are sums over classes (theirs: a C-th of them); kappa_c is divided by the rows of the class (theirs: by
rows / C), and is 1e-5 at least on RSLAD too, where theirs divides by 0. Their second learning-rate drop never takes
effect; here milestones are the training's. Rows that screening lets leave count as right at all K points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from ..common.field_types import Words
from .rslad import RSLAD

LEAST, MOST = 5 / 6, 5 / 2  # of the class weights


@dataclass(frozen=True)
class FairARD(RSLAD):
    """Fair-ARD. clean_share is of rslad alone, temperature of ard."""

    name = "fair_ard"
    title = "Fair-ARD"
    looks_at_classes = True
    treats_classes = True
    counts_right = True
    scales_weights = False
    course = 200

    base: Annotated[Literal["ard", "rslad"], Words(by_value=(("rslad", "on RSLAD"),))] = "ard"
    """Whose attack and loss it has."""
    temperature: Annotated[float, Gt(0), Words("T={}")] = 30.0
    """Of both predictions, on ard."""
    power: Annotated[float, Ge(0), Words("power {}")] = 2.0
    """Of the number of right points; 0: classes weigh alike."""

    def idle(self):
        return super().idle() | {"clean_share" if self.base == "ard" else "temperature"}

    @property
    def update_forwards(self) -> float:
        return 6 if self.base == "rslad" else 3

    def attack(self, pgd):
        return super().attack(pgd) if self.base == "rslad" else pgd

    def teacher_target(self, z, y, memory):
        return super().teacher_target(z, y, memory) if self.base == "rslad" else None

    def remembers(self, classes):
        import torch

        own = {
            "ard_right": torch.zeros(classes, 1),  # of the epoch under way
            "ard_counts": torch.zeros(classes),
            "ard_weights": torch.ones(classes),  # v
        }
        return super().remembers(classes) | own

    def observe(self, examples, memory):
        from .class_weights import by_class

        super().observe(examples, memory)
        y = examples.look.y
        right, kept = by_class(examples.right[:, None], examples.y, len(memory.ard_counts), examples.ranks)
        _, counts = by_class(y[:, None], y, len(memory.ard_counts), examples.ranks)
        memory.ard_right += right + memory.pgd.steps * (counts - kept)[:, None]  # those that left the loss
        memory.ard_counts += counts

    def weights(self, examples, memory):
        return self.weights_with(memory.ard_weights, examples, memory)

    def loss_of(self, model, examples, memory):
        from torch.nn import functional as F

        from .losses import logits_at, softened, weighted_mean

        if self.base == "rslad":
            return super().loss_of(model, examples, memory)
        both = logits_at(model, examples, examples.x_adv), examples.teacher
        p, t = (softened(z.double(), self.temperature) for z in both)  # T^2 would magnify the rounding of fp32
        losses = F.kl_div(p, t, reduction="none", log_target=True).sum(1)
        return weighted_mean(self.temperature**2 * losses.float(), examples.weights)

    def end_epoch(self, end, memory):
        from .class_weights import above_mean, mean_by_class

        super().end_epoch(end, memory)
        if end.epoch + 1 >= self.class_from:
            kappa = mean_by_class(memory.ard_right, memory.ard_counts)[:, 0]
            v = (kappa + 1e-5).double() ** -self.power
            mean = v - above_mean(v, memory.ard_counts)  # of a class without rows its own
            memory.ard_weights.copy_((v / mean).clamp(LEAST, MOST))
        memory.ard_right.zero_()
        memory.ard_counts.zero_()
