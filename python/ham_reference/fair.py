"""Fair: boosted cross entropy, and class weights by the square root of the running hard share."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PGDAT


@dataclass
class FAIR(PGDAT):
    """PGD-AT with both."""

    loss: str = "boosted_ce"
    class_weights: str = "hard_share"


@dataclass
class FAIRFast(FAIR):
    """The same with three steps of falling size."""

    step_sizes: tuple[float, ...] = (1.0, 0.5, 0.25)
