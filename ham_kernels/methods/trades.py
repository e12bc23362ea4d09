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

    def attack(self, pgd):
        return replace(pgd, loss="kl")

    def loss(self, model, examples, memory):
        from torch.nn import functional as F

        from .objective import logits_at, weighted_mean

        clean, adversarial = logits_at(model, examples, examples.x), logits_at(model, examples, examples.x_adv)
        q, p = F.log_softmax(clean, 1), F.log_softmax(adversarial, 1)
        kl = F.kl_div(p, q, reduction="none", log_target=True).sum(1)
        return weighted_mean(F.cross_entropy(clean, examples.y, reduction="none") + self.beta * kl, examples.weights)
