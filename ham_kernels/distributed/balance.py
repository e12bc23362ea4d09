"""Rebalancing: after screening some ranks have more hard rows than others, and the step waits for the largest.

    even = plan(counts)                        # counts of all ranks: every rank computes the same plan
    if pays(counts, rows=128):
        x, x_adv, y = move([x, x_adv, y], even, rank, group)
        ...                                    # attack, targets[rank] rows
        (x_adv,) = back([x_adv], even, rank, group)  # only where every rank updates on its own rows

Rows move before the update and no gradient goes with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Which rows go where, in numbers of rows. A rank with surplus sends its last rows, in order of the ranks."""

    counts: tuple[int, ...]  # of each rank before
    targets: tuple[int, ...]  # of each rank after: they differ by one at most
    transfers: tuple[tuple[int, int, int], ...]  # from rank, to rank, rows

    @property
    def moved(self) -> int:
        """Rows that change their rank: as few as any plan with these targets, or with others as even, would move."""
        return sum(rows for _, _, rows in self.transfers)

    def sends(self, rank: int) -> list[int]:
        """Rows that a rank sends to each rank; 0 to itself."""
        rows = [0] * len(self.counts)
        for source, goal, n in self.transfers:
            if source == rank:
                rows[goal] = n
        return rows

    def receives(self, rank: int) -> list[int]:
        """Rows that a rank gets from each rank; 0 from itself."""
        rows = [0] * len(self.counts)
        for source, goal, n in self.transfers:
            if goal == rank:
                rows[source] = n
        return rows


def plan(counts: Sequence[int]) -> Plan:
    """The plan for `counts`, the hard rows of each rank (at least one rank; each >= 0).

    Every rank gets total // ranks rows, and the first total % ranks by count (then by rank) one more: who has many
    rows keeps the odd one, so that fewer move. Surplus goes to deficits, both in order of the ranks.
    """
    if not counts:
        raise ValueError("counts: got none; it must hold one number for each rank")
    rows = np.asarray(counts, dtype=np.int64)
    if rows.min() < 0:
        raise ValueError(f"counts[{rows.argmin()}]: got {rows.min()}; it must be >= 0")
    base, extra = divmod(int(rows.sum()), len(rows))
    targets = np.full(len(rows), base)
    targets[np.argsort(-rows, kind="stable")[:extra]] += 1

    # Surplus and deficits laid end to end on one line: between two ends of either lies what one rank sends another.
    surplus, deficit = np.maximum(rows - targets, 0).cumsum(), np.maximum(targets - rows, 0).cumsum()
    ends = np.unique(np.concatenate(([0], surplus, deficit)))[1:]
    sources, goals = surplus.searchsorted(ends), deficit.searchsorted(ends)
    lengths = np.diff(ends, prepend=0)
    transfers = zip(sources.tolist(), goals.tolist(), lengths.tolist(), strict=True)
    return Plan(tuple(rows.tolist()), tuple(targets.tolist()), tuple(transfers))


def pays(counts: Sequence[int], rows: int) -> bool:
    """Whether moving is worth its messages. `rows`: of a rank before screening, the same number on every rank.

    It is where the fullest rank has more than 2 hard rows, or more than 2 % of `rows`, above an even share (rounded
    up), but never on one or two ranks with 256 rows or more each. docs/scaling.md has what that is worth.
    """
    if len(counts) <= 2 and rows >= 256:
        return False
    share = -(-sum(counts) // len(counts))
    return max(counts) - share > min(2, 0.02 * rows)


def move(tensors: Sequence[Tensor], plan: Plan, rank: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The rows that `rank` has after the plan: first its own that stay, then those that arrive, by rank of origin.

    All tensors of a row travel as one string of bytes, in one message to each rank that gets some.

    Args:
        tensors: (counts[rank], ...) each, of any dtype, on this rank's device. Ranks give the same number of tensors
            of the same dtypes and row shapes; memory formats may differ, and each rank's stays as it is.
        group: of len(counts) ranks; None is torch's default group.

    Returns: (targets[rank], ...) each, without gradient. On a rank that gets nothing they are views of `tensors`.
    """
    table = plan.counts[rank], plan.targets[rank], plan.sends(rank), plan.receives(rank)
    return _exchange(tensors, *table, anyone=plan.moved > 0, group=group)


def back(tensors: Sequence[Tensor], plan: Plan, rank: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Undoes `move` for what was made of each row: (targets[rank], ...) to (counts[rank], ...), in the first order."""
    table = plan.targets[rank], plan.counts[rank], plan.receives(rank), plan.sends(rank)
    return _exchange(tensors, *table, anyone=plan.moved > 0, group=group)


@torch.no_grad()
def _exchange(
    tensors: Sequence[Tensor],
    have: int,
    want: int,
    sends: list[int],
    receives: list[int],
    *,
    anyone: bool,  # on any rank sends; without, no rank waits for this one
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """The first rows of each tensor, and behind them those that arrive: `want` rows for `have`."""
    kept, tensors = min(have, want), [t.detach() for t in tensors]
    for t in tensors:
        if t.shape[:1] != (have,):
            raise ValueError(f"tensors: got shape {tuple(t.shape)}; by the plan this rank has {have} rows")
    if (kept + sum(sends), kept + sum(receives)) != (have, want):
        raise ValueError(f"sends: got {sends}, and receives {receives}; of {have} rows they do not make {want}")
    if not anyone:
        return tensors
    leaving = [_bytes(t[kept:]) for t in tensors]
    packed = torch.cat(leaving, 1)
    arriving = packed.new_empty(want - kept, packed.shape[1])
    dist.all_to_all_single(arriving, packed, receives, sends, group=group)
    if want == kept:
        return [t[:kept] for t in tensors]
    parts = arriving.split([part.shape[1] for part in leaving], 1)
    return [_joined(t, kept, part) for t, part in zip(tensors, parts, strict=True)]


def _bytes(rows: Tensor) -> Tensor:
    """(n, bytes of a row), uint8. Images are in NHWC order, whatever their format: a rank without rows may have another
    than the senders."""
    rows = rows.permute(0, 2, 3, 1) if rows.dim() == 4 else rows
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).contiguous().view(torch.uint8)


def _joined(tensor: Tensor, kept: int, arrived: Tensor) -> Tensor:
    """The first `kept` rows of a tensor and those in `arrived`, as `_bytes` has them, in the tensor's own format."""
    n, shape = kept + len(arrived), tensor.shape[1:]
    images = tensor.dim() == 4
    rows = arrived.clone(memory_format=torch.contiguous_format).view(tensor.dtype)  # of one row too, aligned anew
    rows = rows.view(-1, *shape[1:], shape[0]).permute(0, 3, 1, 2) if images else rows.view(-1, *shape)
    nhwc = images and tensor.stride(1) < tensor.stride(3)  # strides tell it even of a tensor without rows
    order = torch.channels_last if nhwc else torch.contiguous_format
    whole = torch.empty((n, *shape), dtype=tensor.dtype, device=tensor.device, memory_format=order)
    whole[:kept], whole[kept:] = tensor[:kept], rows
    return whole
