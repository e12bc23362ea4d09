"""MART (Wang et al., ICLR 2020): boosted cross entropy at x_adv, and a divergence that weighs rows that are not sure.

loss = BCE(f(x'), y) + beta * (1 - p_y(x)) * KL(p(x) || p(x')), gradients through all of it, the weight 1 - p_y and p(x)
included. Cost in full-batch forwards: 2K + 6.

Differences from the authors' code: the attack starts uniformly in the eps-ball as everywhere here (theirs:
0.001 * N(0, 1)); all of the loss is computed in fp32, where their constants are not lost. beta is 5, as
their script has it. They train a ResNet-18 with a learning rate of 0.01 and a weight decay of 3.5e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .settings import CrossEntropy, Method


@dataclass(frozen=True)
class MART(Method):
    """MART. With early_drop, rows that stop or jump (easy) suit it: their divergence weighs little anyway."""

    name = "mart"
    title = "MART"
    update_forwards = 6

    beta: Annotated[float, Ge(0), Words("β={}")] = 5.0
    """Weight of the divergence."""
    loss: CrossEntropy = "boosted_ce"
    """Its first term at x_adv: the boosted cross entropy of the paper, or the plain one."""

    def loss_of(self, model, examples, memory):
        from .losses import logits_at, row_ce, unsure_divergence, weighted_mean

        clean, adversarial = logits_at(model, examples, examples.x), logits_at(model, examples, examples.x_adv)
        unsure = unsure_divergence(clean, adversarial, examples.y)
        return weighted_mean(row_ce(self, adversarial, examples.y) + self.beta * unsure, examples.weights)
