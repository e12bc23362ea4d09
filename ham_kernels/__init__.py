"""Hard adversarial example mining for PyTorch: fair adversarial training at a fraction of the cost.

Public names load on first use, so that the command line can print its help without waiting for torch.
`torch.ops.ham_kernels` is filled by the first use of any of them, or by `import ham_kernels.ops`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .common.lazy import names_of

if TYPE_CHECKING:
    from . import data, distributed, methods, models, ops
    from .attack.pgd import PGD, pgd_attack
    from .commands.adopt import adopt
    from .commands.from_settings import load_model
    from .commands.train import resume, train
    from .common.troubles import HamWarning
    from .engine import EngineError, EngineWarning, NonFiniteError
    from .evaluation import ClassAccuracy, evaluate
    from .methods import ham_loss, loss
    from .runs.presets import preset
    from .runs.settings import TrainSettings
    from .training.ham_trainer import HAMTrainer
    from .training.overfitting import OverfittingWarning
    from .training.reports import EpochReport, StepReport
    from .training.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "PGD": "attack.pgd",
    "pgd_attack": "attack.pgd",
    "EngineError": "engine",
    "EngineWarning": "engine",
    "NonFiniteError": "engine",
    "ClassAccuracy": "evaluation",
    "adopt": "commands.adopt",
    "HamWarning": "common.troubles",
    "evaluate": "evaluation",
    "ham_loss": "methods",
    "loss": "methods",
    "EpochReport": "training.reports",
    "OverfittingWarning": "training.overfitting",
    "HAMTrainer": "training.ham_trainer",
    "StepReport": "training.reports",
    "TrainSettings": "runs.settings",
    "Trainer": "training.trainer",
    "load_model": "commands.from_settings",
    "preset": "runs.presets",
    "resume": "commands.train",
    "train": "commands.train",
}
_MODULES = ("data", "distributed", "methods", "models", "ops", "recipes")

__all__ = [
    "PGD",
    "ClassAccuracy",
    "EngineError",
    "EngineWarning",
    "EpochReport",
    "HAMTrainer",
    "HamWarning",
    "NonFiniteError",
    "OverfittingWarning",
    "StepReport",
    "TrainSettings",
    "Trainer",
    "adopt",
    "data",
    "distributed",
    "evaluate",
    "ham_loss",
    "load_model",
    "loss",
    "methods",
    "models",
    "ops",
    "pgd_attack",
    "preset",
    "recipes",
    "resume",
    "train",
]


__getattr__, __dir__ = names_of(__name__, globals(), _HOMES, _MODULES)
