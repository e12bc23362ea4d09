"""PGD adversarial training (Madry et al., ICLR 2018): every row, all K steps, plain cross entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .settings import Method


@dataclass(frozen=True)
class PGDAT(Method):
    """PGD-AT."""

    name = "pgd_at"
    title = "PGD-AT"

    start_epoch: Annotated[int, Ge(1), Words("from epoch {}", scales=True)] = 50
    """First epoch (1-based) behind a cheaper warm-up."""
