"""The jump: kernel against reference, and both against repetitions of a step."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same_bits, every_pair, in_layout, per_row

from ham_kernels import ops

pytest.importorskip("triton")
from ham_kernels.ops.jump import jump_launch, jump_reference

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, which interprets, on sums that are meant to overflow
]

SHAPES = [
    (0, 3, 8, 8),  # no rows
    (1, 1, 8, 8),  # one program
    (31, 3, 3, 3),  # 27 elements a row: no multiple of 16, less than a block
    (33, 1, 8, 8),  # one row more than a warp
    (2, 1, 1, 1023),  # a block less one, exactly, and one more
    (2, 1, 1, 1024),
    (2, 1, 5, 205),
    (4, 3, 32, 32),  # three blocks a row
    (1, 3, 96, 96),  # many blocks
]
L2_TOLERANCE = {torch.float32: 4e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # as of the PGD step


def batch(shape, dtype=torch.float32, eps=0.1):
    """(x_adv, x, before): images in [0, 1], some at the edges; points around them, a step of up to eps/4 apart."""
    x = (torch.rand(shape) * 1.2 - 0.1).clamp(0, 1)
    before = (x + torch.empty(shape).uniform_(-eps, eps)).clamp(0, 1)
    x_adv = (before + torch.empty(shape).uniform_(-eps / 4, eps / 4)).clamp(0, 1)
    return x_adv.to(dtype), x.to(dtype), before.to(dtype)


def jump_both(x_adv, x, before, stays, device, *, factor=3.5, eps=0.1, norm="linf", layouts=("contiguous",) * 3):
    """x_adv after a jump by the kernel on `device`, and by the reference on the CPU."""
    eps, eps_rows = per_row(eps)
    by_reference = x_adv.clone()
    jump_reference(by_reference, x, before, stays, factor, eps, eps_rows, 0.0, 1.0, norm == "l2")
    images = [in_layout(t.to(device), layout) for t, layout in zip((x_adv, x, before), layouts, strict=True)]
    rows = None if eps_rows is None else eps_rows.to(device)
    jump_launch(*images, stays.to(device), factor, eps, rows, 0.0, 1.0, norm == "l2")
    assert_same_bits(images[1], x)  # only x_adv is written
    assert_same_bits(images[2], before)
    return images[0], by_reference


def check(by_kernel, by_reference, norm):
    if norm == "linf":
        assert_same_bits(by_kernel, by_reference)  # one rounding: bit for bit
    else:
        tolerance = L2_TOLERANCE[by_reference.dtype]
        torch.testing.assert_close(by_kernel.cpu(), by_reference, rtol=0, atol=tolerance, check_stride=False)


@pytest.mark.parametrize(
    ("shape", "norm", "dtype", "rows"), every_pair(SHAPES, ("linf", "l2"), DTYPES, (False, True)), ids=str
)
def test_kernel_is_reference(shape, norm, dtype, rows, device):
    unit = math.prod(shape[1:]) ** 0.5 if norm == "l2" else 1.0  # so that some rows are inside their ball, some not
    eps = torch.rand(shape[0]) * 0.2 * unit if rows else 0.1 * unit
    stays = torch.rand(shape[0]) > 0.5
    by_kernel, by_reference = jump_both(*batch(shape, dtype), stays, device, eps=eps, norm=norm)
    check(by_kernel, by_reference, norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moved", [0, 1, 2, None], ids=["x_adv", "x", "before", "all three"])
def test_memory_layouts(layout, moved, norm, device):
    layouts = [layout if moved in (i, None) else "contiguous" for i in range(3)]
    stays = torch.tensor([True, False, False, True, False])
    check(*jump_both(*batch((5, 3, 9, 7)), stays, device, layouts=layouts, norm=norm), norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("stays", [True, False])
def test_rows_that_stay_are_not_touched(stays, norm, device):
    x_adv, x, before = batch((6, 3, 8, 8))
    before = before.where(torch.rand(x.shape) > 0.1, torch.nan) if stays else before  # nothing of them counts
    by_kernel, by_reference = (
        ops.jump(t, x.to(t.device), before.to(t.device), torch.full((6,), stays, device=t.device), 2.0, 0.1, norm=norm)
        for t in (x_adv.to(device, copy=True), x_adv.clone())
    )
    check(by_kernel, by_reference, norm)
    assert torch.equal(by_reference, x_adv) == stays


@pytest.mark.parametrize("factor", [0, 1, 2, 7])
def test_linf_is_where_repetitions_of_the_step_lead(factor):
    """Each of them projected and clipped: a pixel that has met a bound stays there."""
    x_adv, x, before = (t.double() for t in batch((16, 3, 8, 8)))
    step, expected = x_adv - before, x_adv
    for _ in range(factor):
        expected = torch.clamp(expected + step, x - 0.1, x + 0.1).clamp(0, 1)
    moved = x_adv.float()
    ops.jump(moved, x.float(), before.float(), torch.zeros(16, dtype=torch.bool), factor, 0.1)
    start_inside = ((x_adv - x).abs() <= 0.1).double()  # a start outside the ball is only brought back by a step
    wanted = expected if factor else torch.clamp(x_adv, x - 0.1, x + 0.1)
    torch.testing.assert_close(moved.double() * start_inside, wanted * start_inside, rtol=0, atol=2e-6)


def test_l2_by_hand():
    """From (0.5, 0.4), one step behind at (0.5, 0.5), three steps on: (0.5, 0.1), 0.4 off, and back to 0.2."""
    x = torch.tensor([[[[0.5, 0.5]]]])
    x_adv, before = torch.tensor([[[[0.5, 0.4]]]]), x.clone()
    ops.jump(x_adv, x, before, torch.tensor([False]), 3.0, 0.2, norm="l2")
    torch.testing.assert_close(x_adv, torch.tensor([[[[0.5, 0.3]]]]))


@pytest.mark.parametrize("factor", [1.0, 1e10, 1e22, 1e38, 1e300])
@pytest.mark.parametrize("last", [1e-30, 1e-13, 0.1])
@pytest.mark.parametrize("eps", [1e-20, 0.2])
def test_l2_jumps_of_any_length(eps, last, factor, device):
    """Projected on the sphere of radius eps, if they reach it, however short the last step and long the jump."""
    x, direction = torch.zeros(1, 1, 4, 4, device=device), torch.rand(1, 1, 4, 4, device=device) + 0.1
    direction /= direction.norm()
    stays = torch.tensor([False], device=device)
    expected = direction.double() * min(eps, last * (1 + min(factor, 3e38)))
    by_op, by_kernel = last * direction, last * direction
    ops.jump(by_op, x, x, stays, factor, eps, norm="l2")
    jump_launch(by_kernel, x, x, stays, min(factor, 3e38), eps, None, 0.0, 1.0, True)
    for got in (by_op, by_kernel):
        torch.testing.assert_close(got.double(), expected, rtol=4e-6, atol=0)


def test_no_graph_and_no_surprise_for_autograd():
    x_adv, x, before = batch((2, 1, 4, 4))
    x_adv.requires_grad_()
    version = x_adv._version
    assert ops.jump(x_adv, x, before, torch.tensor([False, True]), 1.0, 0.1) is x_adv
    assert x_adv._version > version
    assert x_adv.grad_fn is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.rand(2, 1, 4, 5)}, ValueError, "x: got shape"),
        ({"x_adv": torch.rand(2, 1, 1, 4).expand(2, 1, 4, 4)}, ValueError, "x_adv: has strides.*share memory"),
        ({"before": torch.rand(2, 1, 4, 4).half()}, TypeError, "before: got torch.float16"),
        ({"stays": torch.tensor([1, 0])}, TypeError, "stays: got torch.int64; it must be bool"),
        ({"stays": torch.tensor([True])}, ValueError, r"stays: got shape \(1,\); it must be \(2,\)"),
        ({"stays": [True, False]}, TypeError, "stays: got"),
        ({"factor": -1.0}, ValueError, "factor: got -1.0"),
        ({"factor": float("inf")}, ValueError, "factor: got inf"),
        ({"eps": -0.1}, ValueError, "eps: got -0.1"),
        ({"eps": torch.rand(3)}, ValueError, "eps: got a tensor of shape"),
        ({"norm": "l1"}, ValueError, "norm: got 'l1'"),
        ({"lo": 2.0}, ValueError, "lo: got 2.0 with hi=1.0"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    x_adv, x, before = batch((2, 1, 4, 4))
    arguments = {
        "x_adv": x_adv,
        "x": x,
        "before": before,
        "stays": torch.tensor([True, False]),
        "factor": 1.0,
        "eps": 0.1,
        **change,
    }
    kept = x_adv.clone()
    with pytest.raises(error, match=message):
        ops.jump(**arguments)
    assert torch.equal(x_adv, kept)
