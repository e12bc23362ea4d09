"""What only a GPU can show: determinism, streams, CUDA graphs, no hidden syncs, very large tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ham_kernels import ops
from ham_kernels.ops.compact import compact_reference
from ham_kernels.ops.margin import margin_stats_reference
from ham_kernels.ops.pgd import pgd_step_reference
from ham_kernels.ops.random_start import random_start_reference
from ham_kernels.ops.weights import step_size_weights_reference, weighted_cross_entropy_reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]


def inputs(n=200, device="cuda") -> dict[str, torch.Tensor]:
    x = torch.rand(n, 3, 32, 32)
    batch = {
        "x": x,
        "x_adv": (x + torch.empty_like(x).uniform_(-0.1, 0.1)).clamp(0, 1),
        "grad": torch.randn_like(x),
        "eps": torch.rand(n) * 0.1,
        "z": torch.randn(n, 10),
        "prev": torch.randn(n, 10),
        "y": torch.randint(10, (n,)),
        "step": torch.rand(n) * 10,
        "index": torch.randperm(n).int(),
        "count": torch.tensor([n // 3], dtype=torch.int32),
    }
    return {name: t.to(device) for name, t in batch.items()}


def moved(b, **kwargs):
    return ops.pgd_step(b["x_adv"].clone(), b["x"], b["grad"], b["eps"], 0.02, **kwargs)


OPS = {
    "pgd_step": lambda b: moved(b),
    "pgd_step, numbers": lambda b: ops.pgd_step(b["x_adv"].clone(), b["x"], b["grad"], 0.1, 0.02),
    "pgd_step, active set": lambda b: moved(b, index=b["index"], count=b["count"]),
    "pgd_step, l2": lambda b: moved(b, index=b["index"], count=b["count"], norm="l2"),
    "random_start": lambda b: ops.random_start(b["x"], b["eps"], seed=3),
    "random_start, l2": lambda b: ops.random_start(b["x"], b["eps"], seed=3, norm="l2"),
    "margin_stats": lambda b: ops.margin_stats(b["z"], b["y"], b["prev"], b["step"]),
    "step_size_weights": lambda b: ops.step_size_weights(b["step"], 1.0),
    "weighted_cross_entropy": lambda b: ops.weighted_cross_entropy(b["z"], b["y"], b["step"]),
    "compact": lambda b: ops.compact(b["step"] > 5),
}
REFERENCES = {  # as HAM_BACKEND=torch runs them; the arguments are those of the op itself
    "pgd_step_": lambda b, adv: pgd_step_reference(
        adv, b["x"], b["grad"], b["index"], b["count"], 0.0, 0.02, b["eps"], None, 0.0, 1.0, False
    ),
    "random_start": lambda b, adv: random_start_reference(b["x"], 0.0, b["eps"], 3, 1, 0.0, 1.0, False),
    "margin_stats": lambda b, adv: margin_stats_reference(b["z"], b["y"], b["prev"], b["step"], True),
    "step_size_weights": lambda b, adv: step_size_weights_reference(b["step"], 1.0),
    "weighted_cross_entropy": lambda b, adv: weighted_cross_entropy_reference(b["z"], b["y"], b["step"]),
    "compact": lambda b, adv: compact_reference(b["step"] > 5),
}


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- CPU and GPU
@pytest.mark.parametrize("name", OPS)
def test_same_result_on_cpu_and_gpu(name):
    batch = inputs()
    on_gpu = tensors(OPS[name](batch))
    on_cpu = tensors(OPS[name]({k: t.cpu() for k, t in batch.items()}))
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        exact = ours.dtype in (torch.bool, torch.int32) or name in (
            "pgd_step",
            "pgd_step, numbers",
            "random_start",
        )
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 4e-6, "atol": 4e-6}
        torch.testing.assert_close(ours.cpu(), theirs, **tolerance)


@pytest.mark.parametrize("name", REFERENCES)
def test_references_on_the_gpu_need_no_sync(name):
    batch = inputs()
    there, here = batch["x_adv"].clone(), batch["x_adv"].cpu()
    REFERENCES[name](batch, batch["x_adv"].clone())  # the first call may load libraries
    with no_sync():
        result = REFERENCES[name](batch, there)
    expected = REFERENCES[name]({k: t.cpu() for k, t in batch.items()}, here)
    pairs = [(there, here)] if result is None else zip(tensors(result), tensors(expected), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.cpu(), theirs, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("count", [0, 1, 200])
def test_reference_on_the_gpu_with_garbage_beyond_count(count):
    batch = inputs()
    batch["count"].fill_(count)
    batch["index"][count:] = 2**31 - 1
    batch["grad"][count:] = torch.nan
    there, here = batch["x_adv"].clone(), batch["x_adv"].cpu()
    REFERENCES["pgd_step_"](batch, there)
    REFERENCES["pgd_step_"]({k: t.cpu() for k, t in batch.items()}, here)
    assert torch.equal(there.cpu(), here)


# ---------------------------------------------------------------- how ops run on a GPU
@pytest.mark.parametrize("name", OPS)
def test_deterministic(name):
    batch = inputs()
    first = tensors(OPS[name](batch))
    for _ in range(20):
        for ours, before in zip(tensors(OPS[name](batch)), first, strict=True):
            assert torch.equal(ours, before)


@pytest.mark.parametrize("name", OPS)
def test_no_sync(name):
    batch = inputs()
    expected = tensors(OPS[name](batch))  # the first call compiles, which may sync
    with no_sync():
        result = tensors(OPS[name](batch))
    for ours, before in zip(result, expected, strict=True):
        assert torch.equal(ours, before)


@pytest.mark.parametrize("name", OPS)
def test_side_stream(name):
    """On a stream of its own an op waits for what that stream did before, and for nothing else."""
    ready = inputs()
    expected = tensors(OPS[name](ready))
    late = {k: torch.zeros_like(t) for k, t in ready.items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms: a launch on the default stream would see the zeros
        for k, t in late.items():
            t.copy_(ready[k])
        result = tensors(OPS[name](late))
    stream.synchronize()
    for ours, wanted in zip(result, expected, strict=True):
        assert torch.equal(ours, wanted)


def test_cuda_graph_with_a_count_on_the_device():
    """One captured step of mining: flags, compaction and an attack step on the rows that it names."""
    static = inputs()
    x_adv = static["x_adv"].clone()

    def step():
        grad_z, hard, max_step = ops.margin_stats(static["z"], static["y"], static["prev"], static["step"])
        index, count = ops.compact(hard)
        ops.pgd_step(x_adv, static["x"], static["grad"], static["eps"], 0.02, index=index, count=count)
        return grad_z, hard, max_step, index, count, ops.step_size_weights(max_step, 1.0)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    for _ in range(3):  # other data, other counts
        fresh = inputs()
        fresh["z"][torch.arange(200, device="cuda"), fresh["y"]] += torch.rand((), device="cuda") * 4
        for k, t in fresh.items():
            static[k].copy_(t)
        x_adv.copy_(fresh["x_adv"])
        graph.replay()
        replayed, moved_to = [t.clone() for t in captured], x_adv.clone()
        x_adv.copy_(fresh["x_adv"])
        for ours, wanted in zip(replayed, step(), strict=True):
            assert torch.equal(ours, wanted)
        assert torch.equal(moved_to, x_adv)
        assert not torch.equal(moved_to, fresh["x_adv"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPS)
def test_a_gpu_that_is_not_the_current_one(name):
    batch = inputs()
    other = {k: t.to("cuda:1") for k, t in batch.items()}
    for ours, wanted in zip(tensors(OPS[name](other)), tensors(OPS[name](batch)), strict=True):
        assert ours.device.index == 1
        assert torch.equal(ours.cpu(), wanted.cpu())


def test_tensors_on_two_devices():
    batch = inputs()
    with pytest.raises(ValueError, match="grad: is on device cpu; it must be on that of x, cuda:0"):
        ops.pgd_step(batch["x_adv"], batch["x"], batch["grad"].cpu(), 0.1, 0.02)
    with pytest.raises(ValueError, match="count: is on device cpu"):
        moved(batch, index=batch["index"], count=batch["count"].cpu())
    with pytest.raises(ValueError, match="y: is on device cpu"):
        ops.margin_stats(batch["z"], batch["y"].cpu())


# ---------------------------------------------------------------- size
def test_more_programs_than_a_grid_has_along_its_second_axis():
    x = torch.rand(2**15, 1, 64, 64, device="cuda", dtype=torch.float16)  # 2**17 programs of 1024 elements
    x_adv = x.clone()
    ops.pgd_step(x_adv, x, torch.ones_like(x), 0.1, 0.0625)
    assert torch.equal(x_adv, (x.float() + 0.0625).clamp_(max=1).half())


@pytest.mark.parametrize("active", [False, True], ids=["all rows", "active set"])
def test_offsets_beyond_32_bits(active):
    n, width = 2**16 + 8, 2**15  # 2**31 elements and eight rows more
    if torch.cuda.mem_get_info()[0] < 8 * 2 * n * width:
        pytest.skip("needs 35 GB of free GPU memory")
    x = torch.full((n, width), 0.5, device="cuda", dtype=torch.float16)
    x_adv, grad = x.clone(), torch.full_like(x, -1.0)
    grad[-1] = 1.0
    index = torch.arange(n - 1, -1, -1, device="cuda", dtype=torch.int32) if active else None
    count = torch.tensor([5], device="cuda", dtype=torch.int32) if active else None
    ops.pgd_step(x_adv, x, grad, 0.25, 0.125, index=index, count=count)
    middle = 0.5 if active else 0.375
    assert (x_adv[0] == middle).all()
    assert (x_adv[n // 2] == middle).all()
    assert (x_adv[-5:-1] == 0.375).all()
    assert (x_adv[-1] == (0.375 if active else 0.625)).all()  # with the index, row n-1 goes by row 0 of grad
