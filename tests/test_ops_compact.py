"""Stream compaction against plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ham_kernels import ops

pytest.importorskip("triton")
from ham_kernels.ops.compact import compact_launch, compact_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SIZES = [
    0,  # no rows: the count is still written
    1,
    *(31, 32, 33),  # around a warp
    *(1023, 1024, 1025),  # around a full block of threads
    *(8191, 8192, 8193),  # around a tile of the kernel: from here on the count is carried over
    65536,  # the largest batch meant for one launch: eight tiles
]


def expected(flags: list[bool]) -> tuple[list[int], int]:
    kept = [i for i, flag in enumerate(flags) if flag]
    dropped = [i for i, flag in enumerate(flags) if not flag]
    return kept + dropped[::-1], len(kept)


def check(result, flags):
    index, count = result
    assert index.dtype == count.dtype == torch.int32
    assert count.shape == (1,)
    assert index.device == count.device == flags.device
    wanted_index, wanted_count = expected(flags.tolist())
    assert index.tolist() == wanted_index
    assert count.tolist() == [wanted_count]


@pytest.mark.parametrize("run", [compact_launch, compact_reference, ops.compact], ids=lambda f: f.__name__)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_against_python(n, share, run, device):
    flags = torch.rand(n, device=device) < share
    check(run(flags), flags)


@pytest.mark.parametrize("slicing", [slice(None, None, 2), slice(1, None, 3), slice(1, None)])
def test_slices(slicing, device):
    flags = (torch.rand(100, device=device) < 0.5)[slicing]
    check(ops.compact(flags), flags)
    columns = (torch.rand(40, 5, device=device) < 0.5)[:, 2]
    check(ops.compact(columns), columns)


def test_flags_made_of_other_bytes(device):
    """A bool seen through another dtype may hold any byte; everything but 0 is True."""
    flags = torch.arange(300, device=device).to(torch.uint8).view(torch.bool)
    index, count = compact_launch(flags)
    check((index, count), torch.arange(300, device=device).remainder(256) != 0)


@given(flags=st.lists(st.booleans(), max_size=200))
def test_any_flags(device, flags):
    flags = torch.tensor(flags, dtype=torch.bool, device=device)
    check(compact_launch(flags), flags)
    index, count = ops.compact(flags)
    assert sorted(index.tolist()) == list(range(len(flags)))  # a permutation
    assert flags[index.long()[: int(count)]].all()
    assert not flags[index.long()[int(count) :]].any()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ([True], TypeError, "flags: got"),
        (torch.ones(3), TypeError, "flags: got torch.float32; it must be bool"),
        (torch.ones(3, 1) > 0, ValueError, r"flags: got shape \(3, 1\); it must be \(n,\)"),
        (torch.tensor(True), ValueError, r"flags: got shape \(\)"),
        (torch.ones(3, device="meta") > 0, ValueError, "flags: is on device meta"),
    ],
    ids=["list", "float", "2-D", "0-D", "meta"],
)
def test_bad_input(flags, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ops.compact(flags)
