"""PGD adversarial training (Madry et al., ICLR 2018): every row, all K steps, plain cross entropy."""

from __future__ import annotations

from ..active import PGD
from .base import Recipe


def pgd_at(pgd: PGD) -> Recipe:
    return Recipe(pgd)
