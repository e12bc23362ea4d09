"""Rows weighed by how far the model still trusts their label under attack, each against the others of its class.

The generalised cross entropy (Zhang and Sabuncu, NeurIPS 2018, arXiv 1805.07836) has p^q times the gradient of the
plain one, p being the label's probability: a row that cannot be won moves little. Here p is that of the attack's look,
in eval mode, and p^q is divided by its mean over the rows of the class, so that classes weigh what they did. These
means fade from batch to batch. It costs no forward, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .class_weights import by_class, cross_entropy, for_rows, mean_by_class
from .mining import TINY, Examples

KEEP = 0.99  # of sums and counts, from batch to batch: slow, since a batch may have few rows of a class


def empty_state(classes: int) -> dict[str, Tensor]:
    return {"trust_sums": torch.zeros(classes, 1), "trust_counts": torch.zeros(classes)}


def observe(memory: nn.Module, examples: Examples, power: float) -> None:
    look = examples.look
    trust = (-power * cross_entropy(look.z, look.y)).exp()
    sums, counts = by_class(trust[:, None], look.y, len(memory.trust_counts), look.ranks)
    memory.trust_sums.mul_(KEEP).add_(sums)
    memory.trust_counts.mul_(KEEP).add_(counts)


def weights(memory: nn.Module, examples: Examples, power: float) -> Tensor:
    """(n_kept,): of mean 1 over the rows that a class has had."""
    of_class = mean_by_class(memory.trust_sums, memory.trust_counts)[:, 0].clamp_min(TINY)
    return (-power * examples.label_ce).exp() / for_rows(of_class, examples.y)
