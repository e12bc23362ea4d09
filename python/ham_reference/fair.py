"""Fair: boosted cross entropy, and class weights by the square root of the running hard share."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PGDAT


@dataclass
class FAIR(PGDAT):
    """PGD-AT with both; fast: with three steps of falling size."""

    loss: str = "boosted_ce"
    class_weights: str = "hard_share"
    fast: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.fast and not self.step_sizes:
            self.step_sizes = (1.0, 0.5, 0.25)
