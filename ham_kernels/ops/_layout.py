"""Memory layout of a batch of images: rows that are dense inside may be read as flat vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def row_layout(t: Tensor) -> str | None:
    """How one row of `t` lies in memory: "contiguous", "channels_last" (4-D only), or None for neither."""
    shape, stride = t.shape[1:], t.stride()[1:]
    if _dense(shape, stride, range(len(shape) - 1, -1, -1)):
        return "contiguous"
    if len(shape) == 3 and _dense(shape, stride, (0, 2, 1)):
        return "channels_last"
    return None


def as_layout(t: Tensor, layout: str) -> Tensor:
    """`t` itself when its rows lie as `layout` says, else a copy that does."""
    if row_layout(t) == layout:
        return t
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    # a copy by hand: `.contiguous()` may return `t` unchanged where sizes of 1 make its strides ambiguous
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


def _dense(shape, stride, fastest_first) -> bool:
    expected = 1
    for d in fastest_first:
        if shape[d] != 1 and stride[d] != expected:  # the stride of a dimension of size 1 is never used
            return False
        expected *= shape[d]
    return True
