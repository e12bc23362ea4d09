"""Rows weighed by how far the model still trusts their label under attack, each against the others of its class.

The generalised cross entropy (Zhang and Sabuncu, NeurIPS 2018, arXiv 1805.07836) has p^q times the gradient of the
plain one, p being the label's probability: a row that cannot be won moves little. Here p is that of the attack's look,
in eval mode, and p^q is divided by its mean over the rows of the class in the batch, so that each class weighs what it
did, whatever becomes of the model; by a mean over earlier batches, one that the model forgets would lose it. It costs
no forward, and nothing waits for the device.
"""

from __future__ import annotations

from torch import Tensor

from .class_weights import by_class, for_rows
from .mining import TINY, Examples


def weights_by_trust(examples: Examples, power: float) -> Tensor:
    """(n_kept,): of mean 1 over the rows of each class in the loss, over all processes; 1 for a row alone in it."""
    trust = (-power * examples.label_ce).exp().clamp_min(TINY)
    sums, counts = by_class(trust[:, None], examples.y, examples.look.z.shape[1], examples.ranks)
    return trust / for_rows((sums[:, 0] / counts.clamp_min(1)).float(), examples.y)
