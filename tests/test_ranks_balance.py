"""Rebalancing of hard rows: the plan alone, and rows on their way between processes."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from rank_helpers import on_ranks

from ham_kernels.distributed.balance import Plan, back, move, pays, plan


def some_counts(rng: random.Random) -> list[int]:
    """2 to 64 ranks, from a few rows in all to 1024 each; some ranks empty, or all but a few."""
    most, empty = rng.choice([1, 2, 16, 128, 1024]), rng.choice([0.0, 0.1, 0.9])
    return [rng.randint(0, most) * (rng.random() >= empty) for _ in range(rng.randint(2, 64))]


@pytest.mark.slow  # 10,000 plans
def test_plans_keep_every_row_and_move_as_few_as_they_can(seed):
    rng = random.Random(seed)
    for _ in range(10_000):
        counts = some_counts(rng)
        even, ranks = plan(counts), range(len(counts))
        assert plan(list(counts)) == even  # each rank's own
        assert even.counts == tuple(counts)
        assert sum(even.targets) == sum(counts)
        assert all(abs(t - sum(counts) / len(counts)) < 1 for t in even.targets)
        base, extra = divmod(sum(counts), len(counts))
        richest = sorted(ranks, key=lambda r: counts[r], reverse=True)  # stable, so ties go by rank
        assert [r for r in richest if even.targets[r] > base] == richest[:extra]
        assert even.moved == sum(max(n - t, 0) for n, t in zip(counts, even.targets, strict=True))
        assert even.moved == fewest_moves(counts)
        sends, receives = [even.sends(r) for r in ranks], [even.receives(r) for r in ranks]
        assert list(zip(*sends, strict=True)) == list(map(tuple, receives))
        for r in ranks:
            assert sends[r][r] == 0
            assert counts[r] - sum(sends[r]) + sum(receives[r]) == even.targets[r]
            assert not (any(sends[r]) and any(receives[r]))
        receivers = [goal for row in sends for goal, n in enumerate(row) if n]
        assert receivers == sorted(receivers)  # surplus in order of the ranks to deficits in order of the ranks


def fewest_moves(counts: list[int]) -> int:
    """Whoever holds the extra rows, a rank cannot keep more than its target; the fullest ranks profit from one more."""
    base, extra = divmod(sum(counts), len(counts))
    could_keep_one_more = sum(n > base for n in counts)
    return sum(counts) - sum(min(n, base) for n in counts) - min(extra, could_keep_one_more)


def test_a_plan_by_hand():
    even = plan([5, 0, 9, 2])  # 16 rows: 4 each
    assert even == Plan((5, 0, 9, 2), (4, 4, 4, 4), ((0, 1, 1), (2, 1, 3), (2, 3, 2)))
    assert even.sends(2) == [0, 3, 0, 2]
    assert even.receives(1) == [1, 0, 3, 0]
    assert plan([2, 3, 3]).targets == (2, 3, 3)
    assert plan([3, 1, 3, 3, 1]).targets == (3, 2, 2, 2, 2)  # of equals the first rank keeps the extra row
    assert plan([7]).moved == plan([0, 0]).moved == 0


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="counts: got none"):
        plan([])
    with pytest.raises(ValueError, match=r"counts\[1\]: got -1; it must be >= 0"):
        plan([3, -1])


def test_moving_pays_where_the_fullest_rank_is_well_above_its_share():
    assert not pays([40], 128)  # nobody to share with
    assert not pays([30, 32, 28, 30], 128)  # 2 above 30
    assert pays([30, 33, 27, 30], 128)
    assert not pays([15, 16, 14, 15], 64)  # 1 above; 2 % of 64 are 1.28
    assert pays([15, 17, 13, 15], 64)
    assert pays([5, 6, 4, 5], 16)  # 2 % of 16 are less than one row
    assert not pays([5, 6, 5, 6], 16)  # as even as they can be
    assert not pays([40, 100], 256)  # two ranks with enough rows each
    assert pays([40, 100], 255)
    assert pays([40, 100, 70], 256)
    assert not pays([0, 0, 0], 16)


# ---------------------------------------------------------------- between processes
IMAGES = (3, 4, 5)  # all sizes unlike, so that no order of dimensions passes for another
COUNTS = {
    2: [(5, 0), (0, 9), (7, 3), (4, 4), (0, 0), (1, 0), (4, 5)],
    3: [(5, 0, 9), (0, 0, 7), (0, 0, 0), (1, 1, 7), (6, 2, 1), (0, 1, 0), (3, 3, 4)],
}
DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.bool)


def make(world: int, counts: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[list[torch.Tensor]]:
    """x, x_adv, y, max_step of every rank; every rank makes them alike."""
    g = torch.Generator().manual_seed(seed)

    def images(n: int) -> torch.Tensor:
        x = torch.rand(n, *IMAGES, generator=g)
        return x > 0.4 if dtype == torch.bool else x.to(dtype) if dtype.is_floating_point else (256 * x).to(dtype)

    return [
        [images(n), images(n), torch.randint(10, (n,), generator=g), torch.rand(n, generator=g)] for n in counts[:world]
    ]


def as_rows(tensors: list[torch.Tensor]) -> list[bytes]:
    """Each row of all tensors together, as bytes."""
    flat = [t.contiguous().view(len(t), t[0].numel() if len(t) else 1).view(torch.uint8) for t in tensors]
    return [bytes(row.tolist()) for row in torch.cat(flat, 1)]


def check_moves(rank: int, world: int, seed: int) -> None:
    cases = [(counts, dtype, nhwc) for counts in COUNTS[world] for dtype in DTYPES for nhwc in (False, True)]
    for case, (counts, dtype, nhwc) in enumerate(cases):
        order = torch.channels_last if nhwc else torch.contiguous_format
        every = make(world, counts, dtype, seed + case)
        mine = [t.contiguous(memory_format=order) if t.dim() == 4 else t for t in every[rank]]
        if dtype.is_floating_point:
            mine[1].requires_grad_()
        copies, even = [t.detach().clone() for t in mine], plan(counts)
        moved = move(mine, even, rank, None)
        assert all(map(torch.equal, mine, copies))
        assert [len(t) for t in moved] == [even.targets[rank]] * 4
        for old, new in zip(mine, moved, strict=True):
            assert (new.dtype, new.shape[1:], new.requires_grad) == (old.dtype, old.shape[1:], False)
        for images in moved[:2]:
            assert images.is_contiguous(memory_format=order)
            assert (images.stride(1) < images.stride(3)) == nhwc

        # Which rows, and in which order: own ones first, then by rank of origin, whose last rows they were.
        want = as_rows(every[rank])[: even.targets[rank]]
        for source, n in enumerate(even.receives(rank)):
            start = even.targets[source] + sum(even.sends(source)[:rank])
            want += as_rows(every[source])[start : start + n]
        got = as_rows(moved)
        assert got == want, (counts, dtype, nhwc)

        gathered = [None] * world
        dist.all_gather_object(gathered, got)
        assert sorted(row for rows in gathered for row in rows) == sorted(
            row for tensors in every for row in as_rows(tensors)
        )

        home = back(moved, even, rank, dist.group.WORLD)
        assert all(map(torch.equal, home, copies))
        assert all(t.is_contiguous(memory_format=order) for t in home[:2])

    # A rank without rows has its images in another format than the senders.
    counts = (6, *[0] * (world - 1))
    every, even = make(world, counts, torch.float32, seed), plan(counts)
    x = every[rank][0].contiguous(memory_format=torch.channels_last if rank == 0 else torch.contiguous_format)
    (moved,) = move([x], even, rank, None)
    first = 0 if rank == 0 else even.targets[0] + sum(even.sends(0)[:rank])
    assert torch.equal(moved, every[0][0][first : first + even.targets[rank]])

    with pytest.raises(ValueError, match=r"got shape \(1,\); by the plan this rank has 2 rows"):
        move([torch.zeros(1)], plan([2] * world), rank, None)


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("world", [2, 3])
def test_rows_arrive_whole_and_come_home(world, tmp_path, seed):
    on_ranks(world, check_moves, tmp_path, world, seed)
