"""RSLAD (Zi et al., ICCV 2021, arXiv 2108.07969): a student follows a robust teacher's prediction of clean images.

loss = (1 - clean_share) KL(t || p(x')) + clean_share KL(t || p(x)), t the teacher's prediction at x; the attack raises
KL(t || p) from the same t. No label is in it. Cost: 2K + 6, and one forward of the teacher, in eval mode.

Differences from the authors' code: divergences are sums over classes, as in the paper (theirs: a C-th of them, which is
as much as a learning rate a C-th as large, but for weight decay), and the attack starts uniformly in the eps-ball.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge, Le

from ..common.field_types import Words
from .settings import Method


@dataclass(frozen=True)
class RSLAD(Method):
    """RSLAD. With early_drop, rows that stop or jump (easy) suit it: dropping loses the teacher's word on them."""

    name = "rslad"
    title = "RSLAD"
    needs_teacher = True
    update_forwards = 6
    course = 300

    clean_share: Annotated[float, Ge(0), Le(1), Words("clean share {}")] = 1 / 6
    """Weight of the clean images' divergence; that of the attacked ones has the rest."""

    def check(self) -> None:
        super().check()
        for name, none in (("loss", "ce"), ("label_smoothing", 0)):
            if getattr(self, name) != none:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}; {self.title} follows its teacher: its loss has no cross "
                    "entropy"
                )

    def attack(self, pgd):
        return replace(pgd, loss="kl")

    def teacher_target(self, z, y, memory):
        import torch

        return torch.softmax(z, 1)

    def loss_of(self, model, examples, memory):
        from .losses import divergence, logits_at, weighted_mean

        clean, adversarial = logits_at(model, examples, examples.x), logits_at(model, examples, examples.x_adv)
        taught, share = examples.teacher, self.clean_share
        losses = (1 - share) * divergence(taught, adversarial) + share * divergence(taught, clean)
        return weighted_mean(losses, examples.weights)
