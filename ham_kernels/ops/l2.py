"""Lengths of rows under L2, right for entries of any size: a plain sum of squares is 0 below 1e-23 and inf above 1e19.

Rows are scaled by a power of two first, which rounds nothing: where a plain sum would do, the bits are those it gives.
Triton keeps the sums of squares at three scales, in the one pass over a row that a plain sum needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import jit, tl

LARGEST = torch.finfo(torch.float32).max
_SMALLEST = torch.finfo(torch.float32).tiny  # a scaled length is 0 or at least 2**-23


def scaled(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(t * k, |t * k|, k) for fp32 rows t (n, ...); k is the power of two that brings the largest entry to [1, 2)."""
    column = (-1,) + (1,) * (t.dim() - 1)
    if t.numel() == 0:
        one = t.new_ones(t.shape[0]).view(column)
        return t, one, one
    exponent = t.flatten(1).abs().amax(1).view(torch.int32) >> 23
    k = ((254 - exponent).clamp(1, 253) << 23).view(torch.float32).view(column)  # 1 / k is a normal number too
    t = t * k
    return t, torch.linalg.vector_norm(t.flatten(1), dim=1).view(column), k


def ratio(numerator: float | Tensor, length: Tensor) -> Tensor:
    """numerator / length, finite also where the length is 0: the vector that it multiplies is 0 there.

    At most 2**126, so that a scaled row, whose entries are below 2, does not become infinite.
    """
    return (numerator / length.clamp_min(_SMALLEST)).clamp_max(2.0**126)


def move(t: Tensor, distance: float | Tensor) -> Tensor:
    """distance * t / |t| for fp32 rows t, `distance` a number or a column; 0 where t is 0."""
    t, length, _ = scaled(t)
    return t.mul_(ratio(distance, length))


def shorten(delta: Tensor, eps: float | Tensor) -> Tensor:
    """The fp32 rows `delta` cut to a length of at most eps, a number or a column."""
    delta, length, k = scaled(delta)
    return delta.mul_(torch.minimum(ratio(eps, length), 1.0 / k))


@jit
def add_squares(low, middle, high, v):
    """The three sums with the squares of v, one for each scale that `row_norm` may choose."""
    small, large = v * 8.077935669463161e-28, v * 1.2379400392853803e27  # 2**-90, 2**90
    return low + large * large, middle + v * v, high + small * small


@jit
def row_norm(low, middle, high):
    """(k, |k * v|), k the power of two that brings the length to [1, 2), from the first sum that is finite."""
    low, middle, high = tl.sum(low), tl.sum(middle), tl.sum(high)
    inf = float("inf")
    total = tl.where(low < inf, low, tl.where(middle < inf, middle, high))
    scale = tl.where(low < inf, 1.2379400392853803e27, tl.where(middle < inf, 1.0, 8.077935669463161e-28))
    length = tl.sqrt(total)
    exponent = length.to(tl.int32, bitcast=True) >> 23
    to_one = (tl.minimum(tl.maximum(254 - exponent, 1), 253) << 23).to(tl.float32, bitcast=True)
    # 1 / k is a normal number too: 2**-126 to 2**126
    k = tl.minimum(tl.maximum(scale * to_one, 1.1754943508222875e-38), 8.507059173023462e37)
    return k, length * tl.div_rn(k, scale)  # `/` might not be exact


@jit
def row_ratio(numerator, length):
    """As `ratio`."""
    return tl.minimum(numerator / tl.maximum(length, 1.1754943508222875e-38), 8.507059173023462e37)


@jit
def row_shrink(eps, k, length):
    """What k * delta, of that length, is to be multiplied with: 1 / k inside the ball."""
    return tl.minimum(row_ratio(eps, length), tl.div_rn(1.0, k))
