"""What a training step minimises: one small file per method."""

from .base import Recipe, weighted_ce
from .ham import ham, ham_loss
from .natural import natural
from .one_step import fgsm_rs, n_fgsm
from .pgd_at import pgd_at

__all__ = ["Recipe", "fgsm_rs", "ham", "ham_loss", "n_fgsm", "natural", "pgd_at", "weighted_ce"]
