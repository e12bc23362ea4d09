"""TRADES (Zhang et al., ICML 2019, arXiv 1901.08573): clean cross entropy, and divergence from the clean prediction.

loss = CE(f(x), y) + beta * KL(p(x) || p(x')), where the attack raises the same KL from q = p(x), which is computed once
in eval mode. Gradients of the update pass through both arguments. Cost in full-batch forwards: 2K + 1 + 6; the authors'
code, which computes q in every step and the clean pass twice, needs 3K + 9.

Differences from that code: the attack starts uniformly in the eps-ball as everywhere here (theirs: 0.001 * N(0, 1), at
which p - q is hardly more than rounding), and the KL is taken in its log-target form, whose gradient stays finite where
a clean probability underflows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .settings import Method


@dataclass(frozen=True)
class TRADES(Method):
    """TRADES. With early_drop, rows that stop or jump (easy) suit it: dropping loses their clean term too."""

    name = "trades"
    title = "TRADES"

    beta: Annotated[float, Ge(0), Words("β={}")] = 6.0
    """Weight of the divergence."""

    target_forwards = 1
    update_forwards = 6

    def attack(self, pgd):
        return replace(pgd, loss="kl")

    def loss_of(self, model, examples, memory):
        from .losses import weighted_mean

        ce, kl = self.terms(model, examples)
        return weighted_mean(ce + self.beta * kl, examples.weights)

    def terms(self, model, examples):
        """(CE at x, KL(p(x) || p(x'))), (n_kept,) each."""
        from .losses import divergence, logits_at, row_ce

        clean, adversarial = logits_at(model, examples, examples.x), logits_at(model, examples, examples.x_adv)
        return row_ce(self, clean, examples.y), divergence(clean, adversarial)
