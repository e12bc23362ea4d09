"""The kernels: one file per op, each with its plain-torch reference, Triton kernel, launcher and registration."""

from ._library import BackendWarning, backends
from .compact import compact
from .jump import jump
from .margin import margin_stats
from .pgd import pgd_step
from .random_start import random_start
from .weights import step_size_weights, weighted_cross_entropy

__all__ = [
    "BackendWarning",
    "backends",
    "compact",
    "jump",
    "margin_stats",
    "pgd_step",
    "random_start",
    "step_size_weights",
    "weighted_cross_entropy",
]
