"""Friendly-AT (Zhang et al., ICML 2020, arXiv 2002.11242): rows stay at their first errors, and none is attacked far.

A row stays where the look before a step finds it wrong for the time number tau + 1; tau begins with 0 and grows by 1
in each epoch of tau_from. The loss is that of PGD-AT, TRADES or MART at these points. HAM spends its steps on the
rows that this one stops: a baseline, whose worst class is among the lowest under AutoAttack. Rows that stay are
masked, and not taken out of the attack, so that it costs what its base does, 2K + 3, 2K + 7 or 2K + 6; taken out, 2K
would be twice the sum of the shares that go on.

As released; the paper itself was not read. Differences from the authors' code: no noise of 0.001 N(0, 1) is added after
each step on PGD-AT; the attack on TRADES and MART starts uniformly in the eps-ball as everywhere here (theirs:
0.001 * N(0, 1)); rows keep their order. The default of tau_from is theirs on PGD-AT, of 120 epochs, on every base; on
TRADES they have 31 51 71 of 85 epochs, on MART 21 41 61 81 of 90.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .on_base import OnBase


@dataclass(frozen=True)
class FAT(OnBase):
    """Friendly-AT. With early_drop, rows wrong at x^M stay there while tau is 0: all train on their weakest points."""

    name = "fat"
    title = "Friendly-AT"
    course = 120

    tau_from: Annotated[tuple[int, ...], Ge(1), Words("τ from epochs {}", off=(), scales=True)] = (51, 91)
    """Epochs (1-based) from each of which on a row may be wrong once more before it stays; none: it stays at once."""

    def begins(self):
        return (*super().begins(), *(("tau_from", epoch, "rows") for epoch in sorted(self.tau_from)[:1]))

    def attack(self, pgd):
        return replace(pgd, loss="kl" if self.base == "trades" else "ce", patience=0)

    def attack_on(self, pgd, y, memory):
        return replace(pgd, patience=sum(memory.epoch >= epoch for epoch in self.tau_from))

    def loss_of(self, model, examples, memory):
        from .losses import adversarial_ce, logits_at, two_terms, weighted_mean

        if self.base == "pgd_at":
            return adversarial_ce(self, model, examples)
        clean, adversarial = logits_at(model, examples, examples.x), logits_at(model, examples, examples.x_adv)
        ce, divergence = two_terms(self, self.base, clean, adversarial, examples.y)
        return weighted_mean(ce + self.divergence_weight * divergence, examples.weights)
