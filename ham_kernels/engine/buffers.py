"""Buffers of modules as they were: what forwards have moved or replaced is put back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LastWrite:
    """The rows of a buffer that were written last, as they were before: a large one need not be copied to be undone.

    A module has it as `rows_written[name of the buffer]`, and writes this buffer once a step, behind `note`.
    """

    def __init__(self):
        self.writes = 0

    def note(self, buffer: Tensor, rows: Tensor) -> None:
        """These rows, (r,) int64, will be written."""
        self.writes += 1
        self._last = buffer, rows, buffer.index_select(0, rows)

    def undo(self) -> None:
        buffer, rows, values = self._last
        buffer.index_copy_(0, rows, values)


class Buffers:
    """The buffers of a model and of `memories` as they are now, copied with one launch per dtype, but for those that
    note rows."""

    def __init__(self, model: nn.Module, *memories: nn.Module):
        self._memories = [m for memory in memories for m in memory.modules()]
        modules = [*model.modules(), *self._memories]
        noted = {(m, name): rows for m in modules for name, rows in getattr(m, "rows_written", {}).items()}
        self._noted = [(rows, rows.writes) for rows in noted.values()]
        self._slots = [(m, name, b) for m in modules for name, b in m._buffers.items()]
        # a view that repeats its memory cannot be written in place, so that it cannot have moved either
        copied = [b for m, name, b in self._slots if b is not None and (m, name) not in noted]
        self._here = [b for b in copied if b.numel() < 2 or 0 not in b.stride()]
        self._values = [torch.empty_like(b) for b in self._here]
        _copy(self._values, self._here)

    def undo(self) -> None:
        """Puts back values, and tensors that a forward has replaced. A memory loses buffers that are new since.

        A model keeps those: it may have noted elsewhere that it has them.
        """
        known = {(m, name) for m, name, _ in self._slots}
        for m in self._memories:
            for name in [name for name in m._buffers if (m, name) not in known]:
                del m._buffers[name]
        for m, name, b in self._slots:
            if m._buffers.get(name, b) is not b:
                m._buffers[name] = b
        _copy(self._here, self._values)
        for rows, writes in self._noted:
            if rows.writes > writes:
                rows.undo()


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for dtype in {t.dtype for t in to}:
        mine = [i for i, t in enumerate(to) if t.dtype == dtype]
        torch._foreach_copy_([to[i] for i in mine], [source[i] for i in mine])
