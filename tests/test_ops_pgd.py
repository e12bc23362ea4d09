"""The PGD step: kernel against reference, and both against the formula."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same_bits, every_pair, in_layout, per_row
from hypothesis import given
from hypothesis import strategies as st

from ham_kernels import ops
from ham_reference import method

pytest.importorskip("triton")
from ham_kernels.ops._layout import as_layout, row_layout
from ham_kernels.ops.pgd import pgd_step_launch, pgd_step_reference

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, which interprets, on sums that are meant to overflow
]

SHAPES = [
    (0, 3, 8, 8),  # no rows
    (1, 1, 8, 8),  # the smallest images: one program
    (31, 3, 3, 3),  # 27 elements a row: no multiple of 16, less than a block
    (33, 1, 8, 8),  # one row more than a warp
    (2, 1, 1, 1023),  # a block less one, exactly, and one more
    (2, 1, 1, 1024),
    (2, 1, 5, 205),
    (4, 3, 32, 32),  # three blocks a row
    (1, 3, 224, 224),  # 147 blocks
]
# L2: a sum of squares in another order is off by some 1e-6 of itself, and so are the step and the shrinkage,
# which are below 1 here; then one rounding, which near a tie may go to the other neighbour: one unit below 1.
L2_TOLERANCE = {torch.float32: 4e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def batch(shape, dtype=torch.float32, eps=0.1):
    """(x_adv, x, grad): images in [0, 1], some at the edges; x_adv around x; grad with some zeros."""
    x = (torch.rand(shape) * 1.2 - 0.1).clamp(0, 1)
    x_adv = (x + torch.empty(shape).uniform_(-2 * eps, 2 * eps)).clamp(0, 1)
    grad = torch.randn(shape) * (torch.rand(shape) > 0.1)
    return x_adv.to(dtype), x.to(dtype), grad.to(dtype)


def step_both(x_adv, x, grad, device, *, eps=0.1, step_size=0.03, index=None, count=None, norm="linf", layouts=None):
    """x_adv after a step by the kernel on `device`, and by the reference on the CPU."""
    layouts = layouts or ("contiguous",) * 3
    (eps, eps_rows), (step_size, step_rows) = per_row(eps), per_row(step_size)
    by_reference = x_adv.clone()
    numbers = (0.0, 1.0, norm == "l2")
    pgd_step_reference(by_reference, x, grad, index, count, eps, step_size, eps_rows, step_rows, *numbers)
    images = [in_layout(t.to(device), layout) for t, layout in zip((x_adv, x, grad), layouts, strict=True)]
    index, count, eps_rows, step_rows = (t if t is None else t.to(device) for t in (index, count, eps_rows, step_rows))
    pgd_step_launch(*images, index, count, eps, step_size, eps_rows, step_rows, *numbers)
    assert_same_bits(images[1], x)  # only x_adv is written
    assert_same_bits(images[2], grad)
    return images[0], by_reference


def check(by_kernel, by_reference, norm):
    if norm == "linf":
        assert_same_bits(by_kernel, by_reference)  # one rounding: bit for bit
    else:
        tolerance = L2_TOLERANCE[by_reference.dtype]
        torch.testing.assert_close(
            by_kernel.cpu(), by_reference, rtol=0, atol=tolerance, equal_nan=True, check_stride=False
        )


@pytest.mark.parametrize(
    ("shape", "norm", "dtype", "rows"), every_pair(SHAPES, ("linf", "l2"), DTYPES, (False, True)), ids=str
)
def test_kernel_is_reference(shape, norm, dtype, rows, device):
    unit = math.prod(shape[1:]) ** 0.5 if norm == "l2" else 1.0  # so that some rows are inside their ball, some not
    eps = torch.rand(shape[0]) * 0.2 * unit if rows else 0.1 * unit
    step_size = torch.rand(shape[0]) * 0.1 * unit if rows else 8 / 255 * unit
    check(*step_both(*batch(shape, dtype), device, eps=eps, step_size=step_size, norm=norm), norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moved", [0, 1, 2, None], ids=["x_adv", "x", "grad", "all three"])
def test_memory_layouts(layout, moved, norm, device):
    layouts = [layout if moved in (i, None) else "contiguous" for i in range(3)]
    by_kernel, by_reference = step_both(*batch((5, 3, 9, 7)), device, layouts=layouts, norm=norm)
    check(by_kernel, by_reference, norm)
    if by_kernel._base is not None and layout != "transposed":
        assert by_kernel._base.isnan().sum() == by_kernel.numel(), "memory between the rows was written"


@pytest.mark.parametrize("shape", [(5, 3, 9, 7), (2, 1, 5, 4), (2, 3, 1, 1), (2, 3, 1, 5), (1, 3, 4, 4)], ids=str)
def test_which_layouts_are_read_without_a_copy(shape):
    x = torch.rand(shape)
    same_in_both = shape[1] == 1 or shape[2] == shape[3] == 1
    expected = {
        "contiguous": "contiguous",
        "channels_last": "contiguous" if same_in_both else "channels_last",
        "every other row": "contiguous",
    }
    for layout, name in expected.items():
        t = in_layout(x, layout)
        assert row_layout(t) == name
        assert as_layout(t, name) is t
    for name in ("contiguous", "channels_last"):
        copied = as_layout(in_layout(x, "every other channel"), name)
        assert torch.equal(copied, x)
        assert row_layout(copied) == expected[name]


def test_mixed_layouts_and_dtypes(device):
    x_adv, x, grad = batch((5, 3, 9, 7), torch.float16)
    layouts = ("channels_last", "every other row", "transposed")
    for grad_dtype in DTYPES:  # autocast gives gradients of another dtype than the images
        check(*step_both(x_adv, x, grad.to(grad_dtype), device, layouts=layouts), "linf")


@pytest.mark.parametrize("dims", [(7, 33), (7, 5, 9), (3, 2, 2, 3, 5)], ids=str)
def test_any_number_of_dimensions(dims, device):
    x = torch.rand(dims)
    x_adv, grad = x.clone().to(device), torch.randn(dims)
    pgd_step_launch(x_adv, x.to(device), grad.to(device), None, None, 0.1, 0.05, None, None, 0.0, 1.0, False)
    assert_same_bits(x_adv, (x + 0.05 * grad.sign()).clamp(0, 1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every other row"])
@pytest.mark.parametrize("count", [0, 1, 4, 6, 100, None])
def test_active_set(count, layout, norm, device):
    n, m = 9, 6
    x_adv, x, _ = batch((n, 3, 9, 7))
    grad = torch.randn(m, 3, 9, 7)
    index = torch.randperm(n)[: m + 1].int()  # longer than grad, which is allowed
    active = index[:m] if count is None else index[: min(count, m)]
    eps, step_size = torch.rand(n) * 0.1, torch.rand(n) * 0.1
    if count is not None:  # what lies beyond count must not be looked at
        index[min(count, m + 1) :] = torch.randint(-(2**31), 2**31 - 1, (len(index[min(count, m + 1) :]),))
        grad[count:] = torch.nan
    by_kernel, by_reference = step_both(
        x_adv, x, grad, device, eps=eps, step_size=step_size, index=index, norm=norm,
        count=None if count is None else torch.tensor([count], dtype=torch.int32), layouts=(layout,) * 3,
    )  # fmt: skip
    check(by_kernel, by_reference, norm)
    untouched = torch.ones(n, dtype=torch.bool)
    untouched[active.long()] = False
    assert torch.equal(by_kernel.cpu()[untouched], x_adv[untouched])
    dense = torch.zeros_like(x).index_copy(0, active.long(), grad[: len(active)])
    pgd_step_reference(x_adv, x, dense, None, None, 0.0, 0.0, eps, step_size, 0.0, 1.0, norm == "l2")
    check(by_kernel.cpu()[~untouched], x_adv[~untouched], norm)  # the same step without an index


@pytest.mark.parametrize("count", [0, 2])
def test_count_without_index(count, device):
    x_adv, x, grad = batch((4, 1, 8, 8))
    by_kernel, by_reference = step_both(x_adv, x, grad, device, count=torch.tensor([count], dtype=torch.int32))
    check(by_kernel, by_reference, "linf")
    assert torch.equal(by_kernel.cpu()[count:], x_adv[count:])


@pytest.mark.parametrize("value", [0.0, torch.nan], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_that_move_nothing(norm, value, device):
    x = torch.rand(3, 3, 9, 7)
    x_adv = (x + 0.05 * torch.randn_like(x).sign() / (14 if norm == "l2" else 1)).clamp(0, 1)  # inside the ball
    by_kernel, by_reference = step_both(x_adv, x, torch.full_like(x, value), device, norm=norm)
    check(by_kernel, by_reference, norm)
    check(by_kernel, x_adv, norm)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_not_finite_harms_no_other_pixel(norm, bad, device):
    x_adv, x, grad = batch((3, 3, 9, 7))
    spoiled = grad.clone()
    spoiled[1, 0, 4, 4] = bad
    grad[1, 0, 4, 4] = 0.0 if norm == "l2" or bad != bad else bad
    by_kernel, by_reference = step_both(x_adv, x, spoiled, device, norm=norm)
    check(by_kernel, by_reference, norm)
    check(by_kernel, step_both(x_adv, x, grad, device, norm=norm)[1], norm)


def by_ham_reference(x_adv, x, grad, eps, step_size):
    x_adv.copy_(method.pgd_step(x_adv, x, grad, eps, step_size, "l2"))


def by_op(x_adv, x, grad, eps, step_size):
    ops.pgd_step(x_adv, x, grad, eps, step_size, lo=-1.0, norm="l2")


def by_launcher(x_adv, x, grad, eps, step_size):
    pgd_step_launch(x_adv, x, grad, None, None, eps, step_size, None, None, -1.0, 1.0, True)


L2_STEPS = pytest.mark.parametrize("step", [by_op, by_launcher, by_ham_reference])


@L2_STEPS
@pytest.mark.parametrize("scale", [1e-42, 1e-40, 1e-38, 1e-30, 1e-20, 1e-13, 1e-6, 1e6, 1e19, 1e30, 3e38])
def test_an_l2_step_is_a_full_one_whatever_the_size_of_the_gradient(scale, step, device):
    x = torch.full((3, 3, 8, 8), 0.5, device=device)
    x_adv, grad = x.clone(), torch.randn(x.shape, device=device, dtype=torch.float64)
    grad = grad / grad.flatten(1).abs().amax(1).view(-1, 1, 1, 1) * scale
    grad[2] = 0.0
    step(x_adv, x, grad.float(), 0.5, 0.1)
    exact = grad.float().double()  # denormal numbers are rounded, and that is what counts
    direction = exact / exact.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, 1, 1, 1)
    torch.testing.assert_close((x_adv - x).double(), 0.1 * direction, rtol=0, atol=1e-6)
    assert torch.equal(x_adv[2], x[2])


@L2_STEPS
@pytest.mark.parametrize("eps", [1e-20, 1e-13, 1e-6, 0.5])
def test_an_l2_ball_of_any_radius(eps, step, device):
    """A point within it is not moved, and one far outside lands on its sphere."""
    x = torch.zeros(2, 3, 8, 8, device=device)
    direction = torch.rand_like(x) + 0.1
    direction /= direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x_adv = direction * torch.tensor([0.9 * eps, 0.9], device=device).view(-1, 1, 1, 1)
    step(x_adv, x, torch.zeros_like(x), eps, 1.0)
    expected = direction.double() * torch.tensor([0.9 * eps, min(eps, 0.9)], device=device).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_adv.double(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("step_size", [1e30, 3e38, 1e300])
def test_a_huge_l2_step_ends_on_the_sphere(step_size, device):
    x = torch.full((2, 1, 4, 4), 0.5, device=device)
    x_adv, grad = x.clone(), torch.zeros_like(x)
    grad[0, 0, 0, 0] = 1e-30
    ops.pgd_step(x_adv, x, grad, 0.25, step_size, norm="l2")
    expected = x.clone()
    expected[0, 0, 0, 0] = 0.75
    torch.testing.assert_close(x_adv, expected)


def test_by_hand(device):
    x = torch.tensor([[0.5, 0.5, 0.5, 0.0, 1.0]], device=device)
    x_adv = torch.tensor([[0.5, 0.75, 0.5, 0.0, 1.0]], device=device)
    grad = torch.tensor([[3.0, 2.0, 0.0, -1.0, 1e-9]], device=device)
    ops.pgd_step(x_adv, x, grad, eps=0.25, step_size=0.125)
    assert x_adv.tolist() == [[0.625, 0.75, 0.5, 0.0, 1.0]]

    x = torch.full((2, 2), 0.5, device=device)
    x_adv = x.clone()
    grad = torch.tensor([[3.0, 4.0], [-3.0, 4.0]], device=device)
    ops.pgd_step(x_adv, x, grad, eps=torch.tensor([1.0, 0.05], device=device), step_size=0.1, norm="l2")
    expected = torch.tensor([[0.56, 0.58], [0.47, 0.54]])  # the second row is pulled back onto its sphere
    torch.testing.assert_close(x_adv.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_public_op(norm, device):
    x_adv, x, grad = (t.to(device) for t in batch((4, 3, 8, 8), eps=0.02))
    x_adv.requires_grad_()  # an attack steps on the very leaf it differentiates with respect to
    before, version = x_adv.detach().clone(), x_adv._version
    returned = ops.pgd_step(x_adv, x, grad, 0.1, 0.03, lo=0.2, hi=0.8, norm=norm)
    assert returned is x_adv
    assert x_adv.is_leaf
    assert x_adv.requires_grad
    assert x_adv._version > version, "a graph that holds the old x_adv must notice"
    assert not torch.equal(x_adv, before)
    assert x_adv.min() >= 0.2
    assert x_adv.max() <= 0.8


def test_launcher_moves_the_version(device):
    for layout in ("contiguous", "every other channel"):
        x_adv, x, grad = (in_layout(t.to(device), layout) for t in batch((2, 2, 4, 4)))
        version = x_adv._version
        pgd_step_launch(x_adv, x, grad, None, None, 0.1, 0.03, None, None, 0.0, 1.0, False)
        assert x_adv._version > version


@given(data=st.data())
def test_any_step(device, data):
    """Random shapes, dtypes, layouts and active sets: kernel == reference, and the result is valid."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31), "seed"))
    shape = tuple(draw(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))))
    n = shape[0]
    dtype, norm = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["linf", "l2"]))
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    m = draw(st.integers(0, n))
    index = torch.randperm(n)[:m].int() if draw(st.booleans(), "index") else None
    count = torch.tensor([draw(st.integers(0, n))], dtype=torch.int32) if draw(st.booleans(), "count") else None
    eps = torch.rand(n) if draw(st.booleans(), "eps per row") else draw(st.floats(0, 1, width=32))
    step_size = torch.rand(n) if draw(st.booleans(), "step per row") else draw(st.floats(0, 1, width=32))
    x_adv, x, grad = batch(shape, dtype)
    grad = grad if index is None else grad[:m]
    by_kernel, by_reference = step_both(
        x_adv,
        x,
        grad,
        device,
        eps=eps,
        step_size=step_size,
        index=index,
        count=count,
        norm=norm,
        layouts=layouts,
    )
    check(by_kernel, by_reference, norm)

    rows = torch.arange(n) if index is None else index.long()
    rows = rows if count is None else rows[: int(count)]
    radius = torch.as_tensor(eps).expand(n)[rows]
    delta = (by_kernel.cpu()[rows].float() - x[rows].float()).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    unit = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    slack = unit * (1 if norm == "linf" else delta.shape[1] ** 0.5) + 1e-5  # one rounding of each pixel
    assert (size <= radius + slack).all()
    assert ((by_kernel.cpu()[rows] >= 0) & (by_kernel.cpu()[rows] <= 1)).all()


X = torch.rand(4, 3, 8, 8)
INDEX, COUNT = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
BAD = [
    ({"x_adv": X.numpy()}, TypeError, "x_adv: got ndarray; it must be a torch.Tensor"),
    ({"x_adv": X.to("meta")}, ValueError, "x_adv: is on device meta"),
    ({"x_adv": X.double()}, TypeError, r"x_adv: got torch\.float64"),
    ({"x_adv": (X * 255).byte()}, TypeError, "x_adv: got torch.uint8.*divide by 255"),
    ({"x_adv": torch.rand(4)}, ValueError, r"x_adv: got shape \(4,\)"),
    ({"x": X[:3]}, ValueError, r"x: got shape \(3, 3, 8, 8\); it must be that of x_adv"),
    ({"x": X.half()}, TypeError, "x: got torch.float16; it must be that of x_adv"),
    ({"x": None}, TypeError, "x: got None"),
    ({"norm": "l1"}, ValueError, "norm: got 'l1'; allowed are 'linf', 'l2'"),
    ({"grad": [1.0]}, TypeError, r"grad: got \[1.0\] \(list\)"),
    ({"grad": X.long()}, TypeError, "grad: got torch.int64"),
    ({"grad": X[:2]}, ValueError, r"grad: got shape \(2, 3, 8, 8\); it must be \(4, 3, 8, 8\)"),
    ({"grad": X.to("meta")}, ValueError, "grad: is on device meta"),
    ({"grad": X[:2], "index": INDEX.long()}, TypeError, "index: got torch.int64; it must be int32"),
    ({"grad": X[:2], "index": INDEX[None]}, ValueError, r"index: got shape \(1, 2\); it must be \(k,\)"),
    ({"grad": X[:1], "index": INDEX[::2].expand(2)}, ValueError, r"index: .*contiguous"),
    ({"grad": X[:3], "index": INDEX}, ValueError, "grad: has 3 rows but index only 2 entries"),
    ({"grad": X[:2], "index": INDEX + 1}, ValueError, "index: names rows 1 to 4; it must stay in 0..3"),
    ({"grad": X[:2], "index": INDEX - 1}, ValueError, "index: names rows -1 to 2"),
    ({"grad": X[:2], "index": [0, 3]}, TypeError, "index: got"),
    ({"x_adv": X[:1].expand(4, -1, -1, -1)}, ValueError, r"x_adv: has strides \(0, 64, 8, 1\).*share memory"),
    ({"x_adv": X[..., :1].expand(-1, -1, -1, 8)}, ValueError, "x_adv: has strides.*share memory"),
    ({"x_adv": torch.rand(195).unfold(0, 192, 1).view(4, 3, 8, 8)}, ValueError, "x_adv: has strides"),
    ({"grad": X[:2], "index": INDEX * 0}, ValueError, "index: names row 0 2 times; each row may be named once"),
    ({"count": COUNT * -1}, ValueError, r"count: got -2; it must be in 0\.\.4, the rows of grad"),
    ({"count": COUNT + 3}, ValueError, r"count: got 5; it must be in 0\.\.4"),
    ({"grad": X[:1], "index": INDEX, "count": COUNT}, ValueError, r"count: got 2; it must be in 0\.\.1, the rows"),
    ({"count": 3}, TypeError, r"count: got 3 \(int\)"),
    ({"count": torch.tensor([1.0])}, TypeError, "count: got torch.float32; it must be int32"),
    ({"count": torch.tensor(1, dtype=torch.int32)}, ValueError, r"count: got shape \(\); it must be \(1,\)"),
    ({"count": INDEX}, ValueError, r"count: got shape \(2,\)"),
    ({"eps": -0.1}, ValueError, "eps: got -0.1; it must be finite and >= 0"),
    ({"eps": float("nan")}, ValueError, "eps: got nan"),
    ({"eps": "8/255"}, TypeError, "eps: got '8/255'"),
    ({"eps": True}, TypeError, "eps: got True"),
    ({"eps": torch.rand(3)}, ValueError, r"eps: got a tensor of shape \(3,\).*shape \(4,\)"),
    ({"eps": torch.ones(4, dtype=torch.int64)}, TypeError, "eps: got a tensor of torch.int64"),
    ({"eps": torch.rand(4) - 2}, ValueError, "eps: got values from -"),
    ({"eps": torch.rand(4, device="meta")}, ValueError, "eps: is on device meta"),
    ({"step_size": float("inf")}, ValueError, "step_size: got inf"),
    ({"step_size": torch.tensor([0, 1, 2, torch.nan])}, ValueError, "step_size: got values"),
    ({"lo": 1.0, "hi": 1.0}, ValueError, "lo: got 1.0 with hi=1.0"),
    ({"hi": float("inf")}, ValueError, "hi: got inf; it must be finite"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else None)
def test_bad_input(change, error, message):
    arguments = {"x_adv": X.clone(), "x": X, "grad": X, "eps": 0.1, "step_size": 0.02, **change}
    with pytest.raises(error, match=f"^{message}"):
        ops.pgd_step(**arguments)


def test_memory_that_is_the_rows_own():
    """Slices, transposes and memory formats are written in place; dimensions of size 1 may have any stride."""
    for layout in LAYOUTS:
        t = in_layout(X, layout)
        assert ops.pgd_step(t, X, X, 0.1, 0.02) is t
    ops.pgd_step(
        torch.rand(3, 1, 8, 8).expand(3, 1, 8, 8)[:, :, 2:7:2, 1:], X[:3, :1, :3, :7], X[:3, :1, :3, :7], 0.1, 0.1
    )
    ops.pgd_step(torch.rand(1, 3).as_strided((1, 3), (0, 1)), X[0, 0, :1, :3], X[0, 0, :1, :3], 0.1, 0.1)
    ops.pgd_step(X[:0, :1].expand(0, 3, 8, 8), X[:0], X[:0], 0.1, 0.1)


def test_rows_may_be_named_again_where_nobody_looks():
    x_adv, index = X.clone(), torch.tensor([2, 2, 2, -7], dtype=torch.int32)
    ops.pgd_step(x_adv, X, X, 0.1, 0.02, index=index, count=COUNT - 1)
    assert (x_adv != X).flatten(1).any(1).tolist() == [False, False, True, False]


def test_bad_input_changes_nothing():
    x_adv = X.clone()
    with pytest.raises(ValueError, match="index"):
        ops.pgd_step(x_adv, X, X[:2], 0.1, 0.02, index=INDEX + 1)
    assert torch.equal(x_adv, X)
