"""GAIRAT (Zhang et al., ICLR 2021, arXiv 2010.01736): PGD-AT that weighs rows by how few steps turn them wrong.

A negative control: its authors concede that it fails under AutoAttack, and HAM's dropping is its weighting at the
limit. kappa counts the points x^0, ..., x^(K-1) at which a row is right; then
w = (1 + tanh(shift + 5 (1 - 2 kappa / K))) / 2, scaled to mean 1. The counts ride on the
attack's own looks: 2K + 3 full-batch forwards.

Differences from the authors' code: K odd is no other formula (theirs halves it as an integer); rows that screening lets
leave count as right at all K points, which most of them are; the shift is one number from start_epoch on, before which
PGD-AT is the paper's burn-in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .settings import Method


@dataclass(frozen=True)
class GAIRAT(Method):
    """GAIRAT."""

    name = "gairat"
    title = "GAIRAT"
    counts_right = True

    start_epoch: Annotated[int, Ge(1), Words("from epoch {}", scales=True)] = 60
    """First epoch (1-based) with weights; the warm-up before."""
    shift: Annotated[float, Words("shift {}")] = -1.0
    """Lambda of the paper, within the tanh: the lower, the fewer rows have weight."""

    def weights(self, examples, memory):
        import torch

        kappa = examples.right / memory.pgd.steps
        own = (1 + torch.tanh(self.shift + 5 * (1 - 2 * kappa))) / 2
        others = super().weights(examples, memory)
        return self.scaled(own if others is None else own * others, examples)
