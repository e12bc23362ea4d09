"""Hard adversarial example mining in plain, slow, obvious PyTorch.

Written to be read beside arXiv 2308.01823. It shares no code with ham_kernels, which tests and benchmarks compare
against it; the public names, signatures and random numbers are the same.
"""

from .method import ham_loss, hard_examples, pgd_attack, step_size_weights
from .trades import trades_loss
from .trainer import HAMTrainer

__all__ = ["HAMTrainer", "ham_loss", "hard_examples", "pgd_attack", "step_size_weights", "trades_loss"]
