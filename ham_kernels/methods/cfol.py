"""CFOL (Pethick, Chrysos and Cevher, TMLR 2023): classes weighed as by an adversary who learns which one is weakest.

The adversary plays Exp3: p = gamma / C + (1 - gamma) softmax(s), and s_c grows by eta times the error of class c. Rows
weigh C p_y, C the classes that rows are of, between gamma and C - gamma (C - 1); they are not scaled. Cost: as PGD-AT,
2K + 3.

The authors draw an image's class by p; or, as here, draw images as they come and weigh them, which moves the same
expectation, with the variance of weights in place of that of a draw. The drawing form is left out: a loader makes its
order before an epoch, and resumes from it, and this one would depend on the training's state.

Other differences from their code: errors are rates, so that classes need not be of one size; s moves once an epoch, by
the epoch's rates, so that eta holds for sets of any size (theirs moves by every row: 5e-6 a row is 0.2 an epoch of
40,000); and an error is what the attack saw before its last step. Theirs keeps the best point of the attack for a whole
batch, one step late; here it is the last, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from ..common.field_types import Words
from .settings import Method


@dataclass(frozen=True)
class CFOL(Method):
    """CFOL. With early_drop, rows that stop or jump (easy) suit it: dropping weighs classes by itself."""

    name = "cfol"
    title = "CFOL"
    looks_at_classes = True
    treats_classes = True
    scales_weights = False

    gamma: Annotated[float, Ge(0), Le(1), Words("γ={}")] = 0.5
    """Share of the weight that all classes have alike."""
    eta: Annotated[float, Ge(0), Words("η={}")] = 0.2
    """By how much an epoch in which all rows of a class are wrong raises its score."""

    def remembers(self, classes):
        import torch

        own = {
            "cfol_wrong": torch.zeros(classes, 1),  # of the epoch under way
            "cfol_counts": torch.zeros(classes),
            "cfol_scores": torch.zeros(classes),  # s
            "cfol_weights": torch.ones(classes),  # C p
        }
        return super().remembers(classes) | own

    def observe(self, examples, memory):
        from .class_weights import by_class, is_hard

        super().observe(examples, memory)
        look = examples.look
        wrong, counts = by_class(is_hard(look.z, look.y)[:, None], look.y, len(memory.cfol_counts), look.ranks)
        memory.cfol_wrong += wrong
        memory.cfol_counts += counts

    def weights(self, examples, memory):
        return self.weights_with(memory.cfol_weights, examples, memory)

    def end_epoch(self, end, memory):
        import torch

        from .class_weights import above_mean, mean_by_class

        super().end_epoch(end, memory)
        if end.epoch + 1 >= self.class_from:
            errors, seen = mean_by_class(memory.cfol_wrong, memory.cfol_counts)[:, 0], memory.cfol_counts > 0
            memory.cfol_scores += self.eta * above_mean(errors, memory.cfol_counts)  # p is the same, and s stays small
            p = torch.softmax(memory.cfol_scores.masked_fill(~seen, -torch.inf), 0)
            memory.cfol_weights.copy_(torch.where(seen, self.gamma + (1 - self.gamma) * seen.sum() * p, 1.0))
        memory.cfol_wrong.zero_()
        memory.cfol_counts.zero_()
