"""Stream compaction: which rows stay in the batch, as indices, without the host having to know how many."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import checks
from ._library import jit, on_device_of, register, tl, triton


def compact_reference(flags: Tensor) -> tuple[Tensor, Tensor]:
    """index = positions of True in order, then positions of False from the back; count = how many are True."""
    n = flags.numel()
    rank = torch.cumsum(flags, 0, dtype=torch.int32)
    position = torch.arange(n, dtype=torch.int32, device=flags.device)
    # a False at position p has p - rank False before it, so it lands that far from the end
    slot = torch.where(flags, rank - 1, n - 1 - position + rank)
    index = torch.empty_like(position).scatter_(0, slot.long(), position)
    return index, rank[-1:].clone() if n else torch.zeros(1, dtype=torch.int32, device=flags.device)


@jit
def _compact_kernel(flags_ptr, index_ptr, count_ptr, n, BLOCK_SIZE: tl.constexpr):
    """One program walks over the tiles and carries the number of True flags so far."""
    before = 0
    for start in range(0, n, BLOCK_SIZE):
        position = start + tl.arange(0, BLOCK_SIZE)
        mask = position < n
        flag = tl.load(flags_ptr + position, mask=mask, other=0).to(tl.int32)
        flag = tl.where(flag != 0, 1, 0)
        rank = before + tl.cumsum(flag, axis=0)
        slot = tl.where(flag != 0, rank - 1, n - 1 - position + rank)
        tl.store(index_ptr + slot, position, mask=mask)
        before += tl.sum(flag)
    tl.store(count_ptr, before)


def compact_launch(flags: Tensor) -> tuple[Tensor, Tensor]:
    n = flags.numel()
    index = torch.empty(n, dtype=torch.int32, device=flags.device)
    count = torch.empty(1, dtype=torch.int32, device=flags.device)
    block = min(8192, max(16, triton.next_power_of_2(n)))
    with on_device_of(flags):
        _compact_kernel[(1,)](
            flags.view(torch.int8), index, count, n, BLOCK_SIZE=block, num_warps=8, enable_fp_fusion=False
        )
    return index, count


register(
    "compact",
    "(Tensor flags) -> (Tensor index, Tensor count)",
    reference=compact_reference,
    launcher=compact_launch,
    fake=lambda flags: (flags.new_empty(flags.numel(), dtype=torch.int32), flags.new_empty(1, dtype=torch.int32)),
    in_extension=True,
)


def compact(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Splits the rows of a batch by a flag, in one launch on CUDA, without a host sync.

    Args:
        flags: (n,) bool; n may be 0.
    Returns:
        index: int32 (n,). index[:count] are the positions of True in increasing order; the rest are the positions
            of False in decreasing order, so that index is always a permutation of 0..n-1.
        count: int32 (1,), how many flags are True, on the device of flags.
    Raises: TypeError, ValueError naming the argument.
    """
    checks.tensor("flags", flags)
    if flags.dtype != torch.bool:
        raise TypeError(f"flags: got {flags.dtype}; it must be bool")
    if flags.dim() != 1:
        raise ValueError(f"flags: got shape {tuple(flags.shape)}; it must be (n,)")
    return torch.ops.ham_kernels.compact(flags.contiguous())
