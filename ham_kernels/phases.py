"""Which recipe each epoch trains by: natural, then the warm-up, then mining; and the watch over one-step warm-ups."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from . import _check
from .active import PGD
from .overfitting import OverfittingCheck, OverfittingWarning, Reading
from .recipes import Recipe, fgsm_rs, n_fgsm, natural, pgd_at

WARM_UPS = {"pgd_at": pgd_at, "n_fgsm": n_fgsm, "fgsm_rs": fgsm_rs}


class Phases:
    """The course of a training.

    Args:
        pgd: the attack of PGD-AT and of mining.
        mining: the recipe from start_epoch on; None for PGD-AT there too.
        start_epoch: 1-based.
        warm_up: before start_epoch: "pgd_at", or "n_fgsm" or "fgsm_rs", which are watched for catastrophic overfitting.
            Where it is found, the rest of the warm-up is PGD-AT.
        natural_epochs: so many epochs of the warm-up, the first, train on clean images.
        seed: of the training.
    Raises: TypeError, ValueError naming the argument.
    """

    def __init__(self, pgd: PGD, mining: Recipe | None, start_epoch: int, warm_up: str, natural_epochs: int, seed: int):
        _check.choice("warm_up", warm_up, tuple(WARM_UPS))
        self.start_epoch = _check.integer("start_epoch", start_epoch, 1)
        self.natural_epochs = _check.integer("natural_epochs", natural_epochs, 0, self.start_epoch - 1)
        self._warm_up = warm_up
        self._recipes = {"natural": natural(), "pgd_at": pgd_at(pgd), warm_up: WARM_UPS[warm_up](pgd)}
        if mining is not None:
            self._recipes["ham"] = mining
        self._check = None if warm_up == "pgd_at" else OverfittingCheck(self._recipes[warm_up].pgd, pgd, seed)
        self._batch: tuple[Tensor, Tensor] | None = None

    def name(self, epoch: int) -> str:
        """ "natural", "pgd_at", "n_fgsm", "fgsm_rs" or "ham"."""
        if epoch >= self.start_epoch:
            return "ham" if "ham" in self._recipes else "pgd_at"
        if epoch <= self.natural_epochs:
            return "natural"
        overfitted = self._check is not None and self._check.overfitted_at is not None
        return "pgd_at" if overfitted else self._warm_up

    def recipe(self, epoch: int) -> Recipe:
        return self._recipes[self.name(epoch)]

    # ------------------------------------------------------------ the watch
    def watched(self, epoch: int) -> bool:
        return self.name(epoch) in ("n_fgsm", "fgsm_rs")

    def remember(self, x: Tensor, y: Tensor) -> None:
        """A batch of the epoch under way; the last one that is no smaller than that before is judged by."""
        if self._batch is None or len(y) >= len(self._batch[1]):
            self._batch = x, y

    def end_epoch(self, model: nn.Module, epoch: int, precision: str) -> Reading:
        """Looks at the model after a watched epoch. Warns, and goes over to PGD-AT, where it has overfitted."""
        reading = self._check(model, *self._batch, epoch=epoch, precision=precision)
        self._batch = None
        if self._check.overfitted_at == epoch:
            warnings.warn(
                f"warm_up: epoch {epoch} of {self._warm_up} has overfitted to its attack ({reading}); the rest of the "
                "warm-up is PGD-AT",
                OverfittingWarning,
                stacklevel=2,
            )
        return reading

    def state_dict(self) -> dict[str, Any] | None:
        return None if self._check is None else self._check.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Raises: ValueError naming what is missing; then nothing has changed."""
        self._batch = None
        if self._check is not None and state is not None:
            self._check.load_state_dict(state)
