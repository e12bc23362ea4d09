"""Fair: attacks of a larger eps, classes hedged by the hard shares of past epochs, rows trusted within their class."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PGDAT


@dataclass
class FAIR(PGDAT):
    """PGD-AT with all three; fast: with three steps of falling size."""

    class_weights: str = "hedge"
    class_strength: float | None = 1.0
    trust: float = 0.5
    eps_factor: float = 1.25
    fast: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.fast and not self.step_sizes:
            self.step_sizes = (2.0, 1.0, 0.5)
