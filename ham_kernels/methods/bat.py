"""BAT (Sun et al., AAAI 2023, arXiv 2209.07534): trained on two points of an attack, before a row turns and past it.

One path of an attack on KL(p(x) || p): x_lc is the last point before a row is wrong for the first time, x_fa where it
is wrong for the second time, and stays. A row that is wrong from the start has x_lc = x^0; one that is never wrong has
x_lc = x_fa = x^K. With u the uniform prediction,
loss = CE(f(x_lc), y) + beta KL(p(x) || p(x_fa)) + entropy (KL(p(x_lc) || u) + KL(p(x_fa) || u)). The last two lower the
model's confidence, so that an attack by cross entropy is the weaker one: judge it by AutoAttack. Cost in full-batch
forwards: 1 + 2K + 9; rows that stay at x_fa are not taken out of the attack, which would save a part of it.

As released; the paper itself was not read. Differences from the authors' code: both points are of one path (theirs: of
two attacks with different noise, so that they need not be neighbours, each of which differentiates its clean pass in
every step, up to 10K + 11); the attack starts uniformly in the eps-ball as everywhere here (theirs: 0.001 * N(0, 1));
and the clean images pass first in the update (theirs: last), which BatchNorm alone notices. Of rows that screening lets
leave both points are where they leave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .settings import Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BAT(Method):
    """BAT. With early_drop, rows that stop or jump (easy) suit it: its clean accuracy rests on their term at x_lc."""

    name = "bat"
    title = "BAT"
    keeps_last_right = True
    target_forwards = 1
    update_forwards = 9
    course = 200

    beta: Annotated[float, Ge(0), Words("β={}")] = 6.0
    """Weight of the divergence."""
    entropy: Annotated[float, Ge(0), Words("entropy {}")] = 1.0
    """Weight of the two divergences from the uniform prediction."""

    def attack(self, pgd):
        return replace(pgd, loss="kl", patience=1)

    def loss_of(self, model, examples, memory):
        from .losses import divergence, logits_at, row_ce, weighted_mean

        at = (examples.x, examples.last_right, examples.x_adv)
        clean, right, wrong = (logits_at(model, examples, x) for x in at)
        confidence = from_uniform(right) + from_uniform(wrong)
        losses = row_ce(self, right, examples.y) + self.beta * divergence(clean, wrong) + self.entropy * confidence
        return weighted_mean(losses, examples.weights)


def from_uniform(z: Tensor) -> Tensor:
    """(n,): KL(softmax(z) || uniform) of logits (n, classes)."""
    import math

    from torch.nn import functional as F

    log_p = F.log_softmax(z, 1)
    return (log_p.exp() * log_p).sum(1) + math.log(z.shape[1])
