"""Hard adversarial example mining (Lin et al., arXiv 2308.01823): PGD-AT whose easy rows leave, hard rows weighed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .settings import Method


@dataclass(frozen=True)
class HAM(Method):
    """HAM: two switches that every method has, on by default."""

    name = "ham"
    title = "HAM"

    start_epoch: Annotated[int, Ge(1), Words("from epoch {}", scales=True)] = 50
    """First epoch (1-based) with mining; the warm-up before."""
    early_drop: Annotated[bool, Words(by_value=((False, "no early drop"),))] = True
    """Let easy examples leave."""
    reweight: Annotated[bool, Words(by_value=((False, "no reweighting"),))] = True
    """Weigh hard examples."""

    def check(self) -> None:
        super().check()
        if not self.mines:
            raise ValueError("method: ham without early_drop and reweight is PGD-AT; say method pgd_at")
