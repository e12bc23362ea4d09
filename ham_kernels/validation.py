"""What a trainer judges after each epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from .active import PGD
from .judging import ClassAccuracy, evaluate
from .judging.attacks import plans

VAL_ATTACKS = ("clean", "pgd20")


class Validation:
    """Judges a model on `loader` under `attacks`, within the budget of training.

    Args: passes: over the loader, in all.
    Raises: ValueError naming val_attacks or val_loader, where it would else show after an epoch only.
    """

    def __init__(
        self, loader: Iterable, attacks: Sequence[str], pgd: PGD, *, passes: int, device: torch.device,
        precision: str, seed: int,
    ):  # fmt: skip
        budget = {"eps": pgd.eps, "step_size": pgd.step_size, "norm": pgd.norm}
        plans(attacks, **budget)
        if isinstance(loader, Iterator) and passes > 1:
            raise ValueError(
                f"val_loader: is an iterator, which is spent after one of {passes} passes; give a list or a DataLoader"
            )
        self._loader, self._attacks = loader, attacks
        self._how = {**budget, "device": device, "precision": precision, "seed": seed}

    def __call__(self, model: nn.Module) -> dict[str, ClassAccuracy]:
        return evaluate(model, self._loader, self._attacks, **self._how)
