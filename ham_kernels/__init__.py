"""Hard adversarial example mining for PyTorch: fair adversarial training at a fraction of the cost.

Public names load on first use, so that the command line can print its help without waiting for torch.
`torch.ops.ham_kernels` is filled by the first use of any of them, or by `import ham_kernels.ops`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import names_of

if TYPE_CHECKING:
    from . import data, models, ops, recipes
    from .attack import PGD, pgd_attack
    from .commands.assemble import load_model
    from .commands.train import resume, train
    from .engine import EngineError, EngineWarning, NonFiniteError
    from .history import EpochReport, StepReport
    from .judging import ClassAccuracy, evaluate
    from .overfitting import OverfittingWarning
    from .presets import preset
    from .recipes import ham_loss
    from .settings import TrainSettings
    from .trainer import HAMTrainer

__version__ = "0.1.0"

_HOMES = {
    "PGD": "attack",
    "pgd_attack": "attack",
    "EngineError": "engine",
    "EngineWarning": "engine",
    "NonFiniteError": "engine",
    "ClassAccuracy": "judging",
    "evaluate": "judging",
    "ham_loss": "recipes",
    "EpochReport": "history",
    "OverfittingWarning": "overfitting",
    "HAMTrainer": "trainer",
    "StepReport": "history",
    "TrainSettings": "settings",
    "load_model": "commands.assemble",
    "preset": "presets",
    "resume": "commands.train",
    "train": "commands.train",
}
_MODULES = ("data", "models", "ops", "recipes")

__all__ = [
    "PGD",
    "ClassAccuracy",
    "EngineError",
    "EngineWarning",
    "EpochReport",
    "HAMTrainer",
    "NonFiniteError",
    "OverfittingWarning",
    "StepReport",
    "TrainSettings",
    "data",
    "evaluate",
    "ham_loss",
    "load_model",
    "models",
    "ops",
    "pgd_attack",
    "preset",
    "recipes",
    "resume",
    "train",
]


__getattr__, __dir__ = names_of(__name__, globals(), _HOMES, _MODULES)
