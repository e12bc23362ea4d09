"""What a training step minimises: one small file per method."""

from .base import Recipe, weighted_ce
from .ham import ham, ham_loss
from .pgd_at import pgd_at

__all__ = ["Recipe", "ham", "ham_loss", "pgd_at", "weighted_ce"]
