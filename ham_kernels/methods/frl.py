"""FRL (Xu et al., ICML 2021, arXiv 2010.06121): classes whose errors exceed the mean by too much gain weight and eps.

Of class c, R_c is the error on clean images and B_c the boundary error, clean less robust accuracy. After each epoch
the multipliers l0_c += rate (R_c - mean R - slack) and l1_c += 2 rate (B_c - mean B - slack), each cut off at 0 and
scaled to a sum of at most `most`, weigh classes in
loss = v0_y CE(f(x), y) + beta v1_y KL(p(x) || p(x')), v_c = 1 + C l_c - sum l, over the C classes that rows are of.
With `remargin` another, l2_c += eps_rate (B_c - mean B - slack), sets eps_c = exp(2 l2_c) eps, from 0.98 to largest_eps
times eps; steps are as long as those of the largest (with step_sizes, in units of the class's own eps). Cost: as
TRADES, 2K + 7.

Meant for a robust model: `--from RUN --epochs 40` with a small learning rate; theirs is 0.001. Both errors are of
the training rows, as the attack saw them in eval mode, at clean images and before its last step: that is free, needs no
images held out, and works in a loop of one's own. Training rows flatter classes that are overfitted; the authors attack
300 held-out images per class by PGD-20 before each epoch.

Other differences from their code: weights are divided by their mean over classes, not over the rows of a batch; the
mean of an error is over classes; the largest step is that of all classes, not of those in the batch; and l2 stays where
its bounds act, so that a class that was good for long need not climb back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge, Le

from ..common.field_types import Words
from .trades import TRADES

LEAST_EPS = 0.98  # times eps


@dataclass(frozen=True)
class FRL(TRADES):
    """FRL. With early_drop, rows that stop or jump (easy) suit it: dropping takes the weight from classes again."""

    name = "frl"
    title = "FRL"
    looks_at_classes = True
    treats_classes = True
    course = 40

    beta: Annotated[float, Ge(0), Words("β={}")] = 1.5
    """Weight of the divergence."""
    remargin: Annotated[bool, Words(by_value=((False, "reweighting alone"),))] = True
    """Classes also have an eps of their own."""
    rate: Annotated[float, Ge(0), Words("rate {}")] = 0.05
    """Of the multipliers that weigh classes; those of the boundary errors have twice as much."""
    eps_rate: Annotated[float, Ge(0), Words("rate of ε {}", needs="remargin")] = 0.2
    """Of the multipliers that set eps."""
    slack: Annotated[float, Ge(0), Le(1), Words("slack {}")] = 0.07
    """By how much a class's error may exceed the mean."""
    most: Annotated[float, Ge(0), Le(1), Words("multipliers up to {}")] = 0.5
    """Largest sum of the multipliers of a term: no class weighs less than 1 less this."""
    largest_eps: Annotated[float, Ge(1), Words("ε up to {}", needs="remargin")] = 3.0
    """Times eps, what a class may have."""

    def remembers(self, classes):
        import torch

        own = {
            "frl_sums": torch.zeros(classes, 2),  # wrong at clean images, wrong at the attack's last look; this epoch
            "frl_counts": torch.zeros(classes),
            "frl_multipliers": torch.zeros(3, classes),  # l0, l1, l2
            "frl_weights": torch.ones(2, classes),  # v0, v1
        }
        return super().remembers(classes) | own

    def attack_on(self, pgd, y, memory):
        from .class_weights import for_rows

        if not self.remargin or not memory.has_memory:
            return pgd
        factors = (2 * memory.frl_multipliers[2]).exp()
        longest = (factors.max() * pgd.step_size).expand(len(y))
        return replace(pgd, eps=for_rows(factors, y) * pgd.eps, step_size=longest)

    def observe(self, examples, memory):
        import torch

        from .class_weights import by_class, is_hard

        super().observe(examples, memory)
        look = examples.look
        wrong = torch.stack([is_hard(look.target, look.y), is_hard(look.z, look.y)], 1)
        sums, counts = by_class(wrong, look.y, len(memory.frl_counts), look.ranks)
        memory.frl_sums += sums
        memory.frl_counts += counts

    def loss_of(self, model, examples, memory):
        from .class_weights import for_rows
        from .losses import weighted_mean

        ce, kl = self.terms(model, examples)
        v0, v1 = (for_rows(v, examples.y) for v in memory.frl_weights)
        losses = v0 * ce + self.beta * v1 * kl
        return weighted_mean(losses, examples.weights)

    def end_epoch(self, end, memory):
        import torch

        from .class_weights import above_mean, mean_by_class

        super().end_epoch(end, memory)
        if end.epoch + 1 >= self.class_from:
            clean, robust = mean_by_class(memory.frl_sums, memory.frl_counts).unbind(1)
            boundary = robust - clean
            rates = ((clean, self.rate), (boundary, 2 * self.rate), (boundary, self.eps_rate))
            excess = [rate * (above_mean(error, memory.frl_counts) - self.slack) for error, rate in rates]
            multipliers = memory.frl_multipliers.add_(torch.stack(excess))
            weighing = multipliers[:2].clamp_min_(0)
            weighing.mul_((self.most / weighing.sum(1, keepdim=True).clamp_min(1e-30)).clamp_max(1))
            memory.frl_weights.copy_(1 + (memory.frl_counts > 0).sum() * weighing - weighing.sum(1, keepdim=True))
            multipliers[2].clamp_(math.log(LEAST_EPS) / 2, math.log(self.largest_eps) / 2)
        memory.frl_sums.zero_()
        memory.frl_counts.zero_()
