"""Fair, our own: PGD-AT at a larger eps, with classes hedged by their hard rows, and rows trusted within their class.

No paper has it. Its parts are known: the experts of WAT, here on the hard shares of past epochs, which fade; the
weighing of the generalised cross entropy, here by what the attack sees; and an eps of its own to train at. Each is a
switch of every method, and none costs a forward: with PGD-AT it is 2K + 3 of the full batch; with `fast` 9, whatever K
is. What it was measured on, and against what, is in docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from ..common.field_types import Words
from .settings import ClassRule, Method

FAST_STEPS = (2.0, 1.0, 0.5)


@dataclass(frozen=True)
class Fair(Method):
    """Fair (ours): the fairest default at the cost of PGD-AT, or, with fast, at less than half of it."""

    name = "fair"
    title = "fair"

    fast: Annotated[bool, Words(by_value=((True, "fast"),))] = False
    """Attack by three steps of 2, 1 and 1/2 of the eps that it trains at, unless step_sizes says others."""
    class_weights: ClassRule = "hedge"
    """Weigh classes by what the attack sees of them."""
    class_strength: Annotated[float | None, Ge(0), Words("strength {}", needs="class_weights")] = 1.0
    """Of the class weights; 0: all alike. None (TOML: false): the rule's own."""
    trust: Annotated[float, Ge(0), Words("trust {}")] = 0.5
    """Weigh rows by their label's probability under attack to this power, against their class: lost rows move less."""
    eps_factor: Annotated[float, Gt(0), Words("trained at {} ε")] = 1.25
    """Train on attacks within so many times eps, their steps as many times as long; whoever judges keeps to eps."""

    @property
    def schedule(self) -> tuple[float, ...]:
        return self.step_sizes or (FAST_STEPS if self.fast else ())
