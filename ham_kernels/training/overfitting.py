"""Catastrophic overfitting: a model trained with one-step attacks resists those, and suddenly nothing else.

Within a few hundred steps its accuracy under PGD falls to almost 0, while that under the attack it trains with stays,
or rises (Wong, Rice and Kolter, arXiv 2001.03994, who stop training then). Some epochs of PGD-AT bring the
robustness back (Li et al., "Towards understanding fast adversarial training", arXiv 2006.03089).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attack.pgd import PGD
from ..common import checks
from ..distributed import ALONE, Meeting, Ranks
from ..engine import PRECISIONS, attack_mode
from ..evaluation.class_accuracy import correct_rows
from ..evaluation.named_attacks import walk
from ..methods.mining import WHOLE, Place

ROWS = 256  # of a batch, at most
STEPS = 10  # of PGD, at least: fewer may not leave the region that a one-step attack has seen
HIGH = 1 / 4
FALLEN = 1 / 2
NEVER_ROBUST = 1 / 4
PATIENCE = 2  # readings


class OverfittingWarning(UserWarning):
    """A one-step warm-up has overfitted to its attack."""


@dataclass(frozen=True)
class Reading:
    """How many images of one batch are classified correctly under either attack."""

    rows: int
    one_step: int
    multi_step: int

    def __str__(self) -> str:
        one_step, multi_step = 100 * self.one_step / self.rows, 100 * self.multi_step / self.rows
        return (
            f"{one_step:.1f} % of {self.rows} training images resist the one-step attack, {multi_step:.1f} % resist PGD"
        )


@dataclass(frozen=True)
class Past:
    """What earlier readings left behind."""

    best: float = 0.0  # best share of images that resisted PGD
    doubts: int = 0  # readings in succession, the last one included, that found hardly any robustness


def judge(reading: Reading, past: Past) -> tuple[bool, Past]:
    """Whether a model has overfitted to its one-step attack, and the past of the next reading.

    It has if at least 1/4 of the images resist the one-step attack, and
      - less than 1/2 as many resist PGD, and less than 1/2 of the best reading so far: it has lost what it had; or
      - less than 1/4 as many resist PGD, twice in succession: it never had any, or lost it before the first reading.
    "Less" means beyond chance: three standard deviations of a count with that expectation (Poisson). So a batch of 128
    tells at once, one of 64 mostly, and one of fewer than 19 never.
    """
    one_step, multi_step, best = reading.one_step, reading.multi_step, past.best * reading.rows
    high = one_step >= HIGH * reading.rows
    fell = high and _below(multi_step, FALLEN * one_step) and _below(multi_step, FALLEN * best)
    doubts = past.doubts + 1 if high and _below(multi_step, NEVER_ROBUST * one_step) else 0
    return fell or doubts >= PATIENCE, Past(max(past.best, multi_step / reading.rows), doubts)


def _below(count: int, expected: float) -> bool:
    return count < expected - 3.0 * math.sqrt(expected)


class OverfittingCheck:
    """Watches a model that trains with a one-step attack; one call per epoch.

    Args:
        one_step: the attack that it trains with.
        multi_step: PGD within the budget that the training is for; run for at least 10 steps.
        seed: of the training, >= 0.

    `overfitted_at` is the first epoch found to have overfitted, None before. A reading costs 2 + 1 + 2K + 1 forwards of
    at most 256 images. It changes neither model nor training: its noise is keyed on ~seed, which is negative and
    therefore no seed of a training or an evaluation, and on the epoch.
    """

    def __init__(self, one_step: PGD, multi_step: PGD, seed: int = 0, ranks: Ranks = ALONE):
        self.one_step = one_step
        self.multi_step = replace(multi_step, steps=max(multi_step.steps, STEPS))
        self.seed = checks.integer("seed", seed, 0, 2**63 - 1)
        self.overfitted_at: int | None = None
        self._past = Past()
        self._ranks = ranks

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, epoch: int, precision: str = "fp32", place: Place = WHOLE
    ) -> Reading:
        """Measures and judges.

        Args:
            model: classifier, in any mode; left as it is.
            x: training images (n, C, H, W) in [0, 1], of which the first 256 are used.  y: (n,) int64 labels.
            epoch: 1-based, the one that has just been trained.
            precision: "fp32", "bf16" or "fp16" (autocast).
            place: which rows of a batch these are, where other processes have the others; the counts are over all.
        Raises: TypeError, ValueError naming the argument; NonFiniteError where the model's logits are not finite.
        """
        checks.batch(x, y, empty=place.ranks.several)
        checks.integer("epoch", epoch, 1, 2**31 - 1)
        checks.choice("precision", precision, PRECISIONS)
        here = slice(max(ROWS - place.first_row, 0))
        x, y = x[here], y[here]
        with Meeting(self._ranks, x.device, what="the watch over one-step attacks") as meeting, attack_mode(model):
            resist = [
                self._resisting(model, x, y, pgd, epoch, precision, place.first_row)
                for pgd in (self.one_step, self.multi_step)
            ]
            counts = meeting.table([len(y), *torch.stack(resist).tolist()])
        reading = Reading(*(int(sum(column)) for column in zip(*counts, strict=True)))
        self.add(reading, epoch)
        return reading

    def add(self, reading: Reading, epoch: int) -> None:
        """Judges a reading of this epoch."""
        overfitted, self._past = judge(reading, self._past)
        if overfitted and self.overfitted_at is None:
            self.overfitted_at = epoch

    def _resisting(
        self, model: nn.Module, x: Tensor, y: Tensor, pgd: PGD, epoch: int, precision: str, first_row: int
    ) -> Tensor:
        _, at = walk(model, x, y, pgd, seed=~self.seed, batch=epoch, precision=precision, first_row=first_row)
        return correct_rows(at[pgd.steps], y).sum()

    # ------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self._past), "overfitted_at": self.overfitted_at}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises: ValueError naming what is missing."""
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(
                f"state: lacks {', '.join(sorted(missing))}; it must come from OverfittingCheck.state_dict()"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError naming what is missing; then nothing has changed."""
        self.check_state(state)
        self._past, self.overfitted_at = Past(state["best"], state["doubts"]), state["overfitted_at"]
