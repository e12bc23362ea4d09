"""Training methods, one file each: `methods.names()`, `methods.TRADES(beta=6.0, early_drop=True, easy="stop")`.

Every module here that is not machinery is a method, and is imported with the package; none imports torch by itself.
`Objective` and `loss` do, and load on first use.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..common.lazy import names_of
from .registry import class_of, names
from .settings import Method

_MACHINERY = {
    "settings", "registry", "objective", "mining", "batch_loss", "class_weights", "trust", "awp", "losses",
}  # fmt: skip

_found = {module.name for module in pkgutil.iter_modules(__path__)} - _MACHINERY
for _name in sorted(_found):
    importlib.import_module(f".{_name}", __name__)
_CLASSES = {class_of(name).__name__: class_of(name) for name in names()}
globals().update(_CLASSES)

_HOMES = {
    "EpochEnd": "objective",
    "Objective": "objective",
    "count_weights": "class_weights",
    "weighted_ce": "losses",
    "ham_loss": "batch_loss",
    "loss": "batch_loss",
}
__all__ = [*_CLASSES, *_HOMES, "Method", "names"]

__getattr__, __dir__ = names_of(__name__, globals(), _HOMES)
