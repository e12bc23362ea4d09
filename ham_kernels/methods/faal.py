"""FAAL (Zhang et al., CVPR 2024, arXiv 2402.17729): the worst distribution over classes within a KL ball.

Class weights C * p_c, p the distribution within KL(uniform || p) <= class_strength whose mean margin is worst. It is
PGD-AT with three switches that every method has, so that `TRADES(class_weights="kl_ball")` is FAAL on TRADES. The
weights have a closed form here; the authors solve a problem of cvxpy for every batch.

Meant for the last epochs of a training: start_epoch with any warm-up, or from the first.

Differences from the authors' code: margins are those that the attack saw in eval mode before its last step, and cost
nothing; a class's margin is its mean, not its sum, so that the batch's composition has no say; and p is a
distribution over the classes that have been seen, where theirs ranks an absent one above every class that is right on
average. Any unfairness, however small,
uses the whole ball: with class_memory above 0 it is not that of one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt

from ..common.field_types import Words
from .settings import ClassRule, Method


@dataclass(frozen=True)
class FAAL(Method):
    """FAAL."""

    name = "faal"
    title = "FAAL"
    scales_weights = False

    class_weights: ClassRule = "kl_ball"
    """The rule."""
    class_strength: Annotated[float | None, Ge(0), Words("strength {}", needs="class_weights")] = 0.5
    """Radius of the ball."""
    class_memory: Annotated[float, Ge(0), Lt(1), Words("memory {}", needs="class_weights")] = 0.0
    """Share of the margins that stays from batch to batch; 0: of this batch alone."""
