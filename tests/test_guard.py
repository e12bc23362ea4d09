"""The tools of this test suite can fail: poisoned memory is poisoned, and the guard sees what it must."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="there is no interpreter to guard")


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n_load, n_store, BLOCK_SIZE: tl.constexpr):
    i = tl.arange(0, BLOCK_SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n_load, other=0.0), mask=i < n_store)


@interpreted
@pytest.mark.parametrize(("n_load", "n_store", "what"), [(9, 8, "load"), (8, 9, "store")])
def test_guard_catches_one_element_too_many(n_load, n_store, what):
    memory = torch.zeros(32)  # the neighbours exist, so nothing crashes without the guard
    x, out = memory[:8], memory[16:24]
    _copy_kernel[(1,)](x, out, 8, 8, BLOCK_SIZE=16)
    with pytest.raises(Exception, match=f"{what} of 1 elements outside"):
        _copy_kernel[(1,)](x, out, n_load, n_store, BLOCK_SIZE=16)


def test_fresh_memory_is_poisoned(poisoned_memory, device):
    x = torch.zeros(4, device=device)
    assert torch.empty(100, device=device).isnan().all()
    assert torch.empty_like(x).isnan().all()
    assert x.new_empty(3).isnan().all()
    assert (x.new_empty(3, dtype=torch.int32) == 2**31 - 1).all()


def test_memory_is_not_poisoned_elsewhere():
    assert not torch.are_deterministic_algorithms_enabled()
