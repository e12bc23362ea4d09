"""Fair, our own: PGD-AT with boosted cross entropy, and weights by class from what the attack sees of each.

No paper has it. It is made of switches that every method has, and costs what PGD-AT does, 2K + 3 full-batch forwards;
with `fast` 9, whatever K is. What it was measured on, and against what, is in docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .settings import ClassRule, CrossEntropy, Method

FAST_STEPS = (2.0, 1.0, 0.5)


@dataclass(frozen=True)
class Fair(Method):
    """Fair (ours): the fairest default at the cost of PGD-AT, or, with fast, at less than half of it."""

    name = "fair"
    title = "fair"

    fast: Annotated[bool, Words(by_value=((True, "fast"),))] = False
    """Attack by three steps of 2 eps, eps and eps/2, unless step_sizes says others."""
    loss: CrossEntropy = "boosted_ce"
    """The cross entropy."""
    class_weights: ClassRule = "hard_share"
    """Weigh classes by what the attack sees of them."""
    class_strength: Annotated[float | None, Ge(0), Words("strength {}", needs="class_weights")] = 0.75
    """Of the class weights."""

    @property
    def schedule(self) -> tuple[float, ...]:
        return self.step_sizes or (FAST_STEPS if self.fast else ())
