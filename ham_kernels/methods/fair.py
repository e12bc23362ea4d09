"""Fair, our own: PGD-AT with boosted cross entropy, and classes hedged by how many of their rows the attack turns.

No paper has it. Its parts are known: MART's first term, and the experts of WAT, here on the hard shares of past epochs,
which fade and cost nothing. Each is a switch of every method. It costs what PGD-AT does, 2K + 3 full-batch forwards;
with `fast` 9, whatever K is. What it was measured on, and against what, is in docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

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
    class_weights: ClassRule = "hedge"
    """Weigh classes by what the attack sees of them."""

    @property
    def schedule(self) -> tuple[float, ...]:
        return self.step_sizes or (FAST_STEPS if self.fast else ())
