"""Adversarial weight perturbation (Wu, Xia and Wang, NeurIPS 2020, arXiv 2004.05884), around any method's update.

The weights take one step that raises the loss of the batch, the update is made there, and the step is taken back. Each
weight tensor moves by gamma of its own length. The authors' proxy copy of the model, its optimiser and its learning
rate cancel out of that. BatchNorm's running statistics are those of the update, at the perturbed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Gradients = Callable[[list[nn.Parameter]], Sequence[Tensor | None]]  # of the loss, None where it does not depend on one
TINY = 1e-20


@contextmanager
def perturbed(model: nn.Module, gradients: Gradients, gamma: float) -> Iterator[None]:
    """w + gamma * |w| / |g| * g within the block, for weights of more than one dimension; less the same shift after it.

    An error within it leaves the weights as they were before, bit by bit.
    """
    moved = [p for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1 and "weight" in name]
    if not moved:
        yield
        return
    with torch.enable_grad():
        found = list(gradients(moved))
    with torch.no_grad():
        before = [p.clone() for p in moved]
        torch._foreach_add_(moved, _shifts(moved, found, gamma))
        there = [p.clone() for p in moved]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            torch._foreach_copy_(moved, before)
        raise
    with torch.no_grad():  # what the step left alone comes back bit by bit
        torch._foreach_add_(before, torch._foreach_sub(moved, there))
        torch._foreach_copy_(moved, before)


def _shifts(weights: list[nn.Parameter], gradients: list[Tensor | None], gamma: float) -> list[Tensor]:
    """A gradient that is zero or not finite shifts nothing: the update judges what is wrong."""
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, gradients, strict=True)]
    lengths, sizes = (torch.stack(torch._foreach_norm(ts)).float() for ts in (found, weights))
    moves = lengths.isfinite() & (lengths > 0)
    scales = (gamma * sizes / (lengths + TINY)).where(moves, 0.0)
    found = [torch.where(known, g, 0.0) for known, g in zip(moves.unbind(), found, strict=True)]
    return torch._foreach_mul(found, list(scales.unbind()))
