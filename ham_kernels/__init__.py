"""Hard adversarial example mining for PyTorch: fair adversarial training at a fraction of the cost."""

from . import ops, recipes
from .attack import PGD, pgd_attack
from .engine import NonFiniteError
from .evaluate import ClassAccuracy, evaluate
from .recipes import ham_loss
from .trainer import EpochReport, HAMTrainer, StepReport

__version__ = "0.1.0"

__all__ = [
    "PGD",
    "ClassAccuracy",
    "EpochReport",
    "HAMTrainer",
    "NonFiniteError",
    "StepReport",
    "evaluate",
    "ham_loss",
    "ops",
    "pgd_attack",
    "recipes",
]
