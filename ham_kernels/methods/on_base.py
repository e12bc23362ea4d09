"""What methods share that change the loss or the attack of another one: PGD-AT, TRADES or MART."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from ..common.field_types import Words
from .settings import Method

Base = Annotated[
    Literal["pgd_at", "trades", "mart"],
    Words(by_value=(("pgd_at", "on PGD-AT"), ("trades", "on TRADES"), ("mart", "on MART"))),
]
BETAS = {"trades": 6.0, "mart": 5.0}  # of their divergences


@dataclass(frozen=True)
class OnBase(Method):
    """A method on a base, whose cost it has."""

    base: Base = "pgd_at"
    """Whose attack and loss it has. On mart the cross entropy is the boosted one, whatever loss says."""
    beta: Annotated[float | None, Ge(0), Words("β={}")] = None
    """Weight of the divergence. None (TOML: false): 6 on trades, 5 on mart; pgd_at has none."""

    def idle(self):
        return super().idle() | ({"loss"} if self.base == "mart" else set())

    @property
    def target_forwards(self) -> float:
        return 1 if self.base == "trades" else 0

    @property
    def update_forwards(self) -> float:
        return 3 if self.base == "pgd_at" else 6

    def check(self) -> None:
        super().check()
        if self.base == "pgd_at" and self.beta is not None:
            raise ValueError(f"beta: got {self.beta} with base='pgd_at', whose loss has no divergence")

    @property
    def divergence_weight(self) -> float:
        """Of trades or mart."""
        return BETAS[self.base] if self.beta is None else self.beta
