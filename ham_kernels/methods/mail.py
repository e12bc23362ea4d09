"""MAIL (Wang et al., NeurIPS 2021, arXiv 2106.07904): rows weighed by the probability margin that the attack leaves.

w = 3 sigmoid(slope (m + bias)), m the largest probability of another class less that of the label, at x', of the
update's own logits, held constant: a row that is wrong by far weighs 3 sigmoid(slope (1 + bias)), one that is right by
far 3 sigmoid(slope (bias - 1)). Weights are not scaled. Where they are depends on the base: on PGD-AT,
loss = w CE(f(x'), y); on TRADES, CE(f(x), y) + beta w KL(p(x) || p(x')); on MART,
w BCE(f(x'), y) + beta (1 - p_y(x)) KL(p(x) || p(x')). Rows weigh alike before mail_from. The weights are free: 2K + 7
on TRADES, 2K + 6 on MART, 2K + 3 on PGD-AT.

As released, where the paper's constants could not be read: slope, bias and the factor 3 are those of the authors'
script. Differences from their code: the attack on TRADES computes q once (theirs in every step, 3K + 6); it starts
uniformly in the eps-ball as everywhere here (theirs: 0.001 * N(0, 1)); any number of classes. The margins are of
logits in train mode, as theirs, so that no screening changes them. Like every weighting of a cross entropy it may lower
the margins of rows that weigh little more than it raises others: judge it by AutoAttack.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .on_base import Base, OnBase

if TYPE_CHECKING:
    from torch import Tensor

FACTOR = 3.0


@dataclass(frozen=True)
class MAIL(OnBase):
    """MAIL. With early_drop, rows that stop or jump (easy) suit it: of rows that are dropped there is none to weigh."""

    name = "mail"
    title = "MAIL"
    course = 120

    base: Base = "trades"
    """Whose attack and loss it has. On mart the weighed cross entropy is the boosted one, whatever loss says."""
    slope: Annotated[float, Ge(0), Words("slope {}")] = 1.0
    """Of the margin within the sigmoid; 0: all rows weigh alike."""
    bias: Annotated[float, Words("bias {}")] = -1.5
    """Added to the margin: the lower, the more only rows that are wrong weigh."""
    mail_from: Annotated[int, Ge(1), Words("weights from epoch {}", off=1, scales=True)] = 76
    """First epoch (1-based) with weights; the base before."""

    def attack(self, pgd):
        return replace(pgd, loss="kl") if self.base == "trades" else pgd

    def begins(self):
        return (*super().begins(), ("mail_from", self.mail_from, "rows"))

    def loss_form(self, memory):
        return memory.epoch >= self.mail_from

    def loss_of(self, model, examples, memory):
        from .losses import logits_at, row_ce, two_terms, weighted_mean

        y = examples.y
        clean = None if self.base == "pgd_at" else logits_at(model, examples, examples.x)
        adversarial = logits_at(model, examples, examples.x_adv)
        own = self.margin_weights(adversarial.detach(), y) if self.loss_form(memory) else 1.0
        if self.base == "pgd_at":
            return weighted_mean(own * row_ce(self, adversarial, y), examples.weights)
        ce, divergence = two_terms(self, self.base, clean, adversarial, y)
        beta = self.divergence_weight
        losses = ce + beta * own * divergence if self.base == "trades" else own * ce + beta * divergence
        return weighted_mean(losses, examples.weights)

    def margin_weights(self, z: Tensor, y: Tensor) -> Tensor:
        """(n,) of logits (n, classes)."""
        from .class_weights import probability_margin

        return FACTOR * (self.slope * (probability_margin(z, y) + self.bias)).sigmoid()
