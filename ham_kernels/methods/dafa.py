"""DAFA (Lee et al., ICLR 2024, arXiv 2401.12532): TRADES with more weight and eps for hard classes.

In the epoch before class_from, the mean prediction S of each class is taken; then
W_i = 1 + strength * (sum of S_ij S_jj over classes j safer than i, less S_ji S_ii over the others). From class_from on
eps, step size and cross entropy of a row are multiplied by W_y, its divergence is not. Cost: as TRADES, 2K + 7.

This is the paper's formula; the authors' code had another until September 2024. Differences from it: S comes from what
the attack saw in eval mode before its last step (theirs: the update's logits), and W is at least 0.05. A class that the
model knows and no row was of takes no part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .trades import TRADES


@dataclass(frozen=True)
class DAFA(TRADES):
    """DAFA."""

    name = "dafa"
    title = "DAFA"
    looks_at_classes = True
    treats_classes = True
    course = 110

    strength: Annotated[float, Ge(0), Words("λ={}")] = 1.0
    """Lambda of the class weights: 1, or 1.5 for CIFAR-100."""
    class_from: Annotated[int, Ge(1), Words("classes from epoch {}", scales=True)] = 71
    """First epoch (1-based) with weights; TRADES before."""

    def check(self) -> None:
        super().check()
        if self.class_from <= self.start_epoch:
            raise ValueError(
                f"class_from: got {self.class_from} with start_epoch={self.start_epoch}; DAFA's weights come from "
                "an epoch of its own before class_from"
            )

    def remembers(self, classes):
        import torch

        own = {
            "dafa_sums": torch.zeros(classes, classes),
            "dafa_counts": torch.zeros(classes),
            "dafa_weights": torch.ones(classes),
        }
        return super().remembers(classes) | own

    def attack_on(self, pgd, y, memory):
        from .class_weights import for_rows

        if not memory.has_memory:
            return pgd
        w = for_rows(memory.dafa_weights, y)
        return replace(pgd, eps=w * pgd.eps, step_size=w * pgd.step_size)

    def observe(self, examples, memory):
        from torch.nn import functional as F

        from .class_weights import by_class

        super().observe(examples, memory)
        if memory.epoch == self.class_from - 1:
            look = examples.look
            sums, counts = by_class(F.softmax(look.z, 1), look.y, len(memory.dafa_counts), look.ranks)
            memory.dafa_sums += sums
            memory.dafa_counts += counts

    def loss_of(self, model, examples, memory):
        from .class_weights import for_rows
        from .losses import weighted_mean

        ce, kl = self.terms(model, examples)
        return weighted_mean(for_rows(memory.dafa_weights, examples.y) * ce + self.beta * kl, examples.weights)

    def end_epoch(self, end, memory):
        from .class_weights import dafa_weights, mean_by_class

        super().end_epoch(end, memory)
        if end.epoch == self.class_from - 1:
            s, seen = mean_by_class(memory.dafa_sums, memory.dafa_counts), memory.dafa_counts > 0
            memory.dafa_weights.copy_(dafa_weights(s, self.strength, seen))
