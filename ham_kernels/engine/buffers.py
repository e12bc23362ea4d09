"""Buffers of modules as they were: what forwards have moved or replaced is put back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Buffers:
    """The buffers of these modules as they are now, copied with one launch per dtype."""

    def __init__(self, *tops: nn.Module):
        self._modules = [m for top in tops for m in top.modules()]
        self._slots = [(m, name, b) for m in self._modules for name, b in m._buffers.items() if b is not None]
        # a view that repeats its memory cannot be written in place, so that it cannot have moved either
        self._here = [b for _, _, b in self._slots if b.numel() < 2 or 0 not in b.stride()]
        self._values = [torch.empty_like(b) for b in self._here]
        _copy(self._values, self._here)

    def undo(self) -> None:
        """Puts back values, tensors that a forward has replaced, and removes buffers that are new since."""
        known = {(m, name) for m, name, _ in self._slots}
        for m in self._modules:
            for name in [name for name, b in m._buffers.items() if b is not None and (m, name) not in known]:
                del m._buffers[name]
        for m, name, b in self._slots:
            if m._buffers[name] is not b:
                m._buffers[name] = b
        _copy(self._here, self._values)


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for dtype in {t.dtype for t in to}:
        mine = [i for i, t in enumerate(to) if t.dtype == dtype]
        torch._foreach_copy_([to[i] for i in mine], [source[i] for i in mine])
