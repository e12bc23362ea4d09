"""FAAL (Zhang et al., CVPR 2024): class weights from the worst distribution in a KL ball, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PGDAT


@dataclass
class FAAL(PGDAT):
    """PGD-AT weighed by C * p_y, p of the margins of this batch alone, and not scaled further."""

    class_weights: str = "kl_ball"
    class_strength: float | None = 0.5
    class_memory: float = 0.0

    as_is = True
