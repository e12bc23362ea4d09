"""Fair: boosted cross entropy, and class weights by the running hard share to the power of 3/4."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PGDAT


@dataclass
class FAIR(PGDAT):
    """PGD-AT with both; fast: with three steps of falling size."""

    loss: str = "boosted_ce"
    class_weights: str = "hard_share"
    class_strength: float | None = 0.75
    fast: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.fast and not self.step_sizes:
            self.step_sizes = (2.0, 1.0, 0.5)
