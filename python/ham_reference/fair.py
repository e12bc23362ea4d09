"""Fair: boosted cross entropy, and classes hedged by the hard shares of past epochs."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PGDAT


@dataclass
class FAIR(PGDAT):
    """PGD-AT with both; fast: with three steps of falling size."""

    loss: str = "boosted_ce"
    class_weights: str = "hedge"
    fast: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.fast and not self.step_sizes:
            self.step_sizes = (2.0, 1.0, 0.5)
