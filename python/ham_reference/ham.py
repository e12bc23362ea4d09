"""HAM (Lin et al., arXiv 2308.01823) with every switch that methods have in common."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PGDAT


@dataclass
class HAM(PGDAT):
    """PGD-AT whose easy rows leave, and whose hard rows are weighed by the attack's largest step."""

    early_drop: bool = True
    reweight: bool = True
