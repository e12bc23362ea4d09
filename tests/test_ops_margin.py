"""margin_stats: the gradient against autograd, the flags against Python, the kernel against the reference."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from helpers import DTYPES, every_pair
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ham_kernels import ops

pytest.importorskip("triton")
from ham_kernels.ops.margin import margin_stats_launch, margin_stats_reference

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, which interprets, on NaN and infinity
]

SIZES = [
    (0, 10),  # no rows
    (1, 2),  # the fewest classes
    (31, 3),  # classes that fill no power of two; less than one program's rows
    (33, 10),
    (127, 10),  # a program's 128 rows less one, exactly, and one more
    (128, 10),
    (129, 10),
    (40, 100),  # three programs of 16 rows
    (5, 1000),  # one row in two programs... of 2 rows each, the last half empty
    (2, 2049),  # more classes than a program has elements for two rows
]
COMBINATIONS = [(False, False), (True, False), (False, True), (True, True)]  # (prev, max_step)


def sample(n, classes, device, prev=True, max_step=True, dtype=torch.float32, spread=4.0):
    z = torch.randn(n, classes) * spread
    before = (z + torch.randn(n, classes)).to(dtype) if prev else None
    largest = torch.rand(n) * 2 * classes if max_step else None  # about half of the rows have a larger one already
    y = torch.randint(classes, (n,))
    return [t if t is None else t.to(device) for t in (z.to(dtype), y, before, largest)]


def both(z, y, prev, max_step, probs=False):
    """Results of the kernel and of the reference, all on the CPU."""
    by_kernel = margin_stats_launch(z, y, prev, max_step, probs)
    on_cpu = [t if t is None else t.cpu() for t in (z, y, prev, max_step)]
    return [t.cpu() for t in by_kernel], margin_stats_reference(*on_cpu, probs)


def check(by_kernel, by_reference):
    grad, hard, max_step = by_kernel
    wanted_grad, wanted_hard, wanted_max = by_reference
    # exp and the sums are some fp32 roundings apart; half precision adds one (the interpreter truncates)
    atol = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[grad.dtype]
    torch.testing.assert_close(grad, wanted_grad, rtol=0, atol=atol, equal_nan=True)
    assert torch.equal(hard, wanted_hard)
    torch.testing.assert_close(max_step, wanted_max, rtol=2e-6, atol=2e-6, equal_nan=True)


# ---------------------------------------------------------------- kernel and reference
@pytest.mark.parametrize(
    ("size", "given", "probs", "dtype"), every_pair(SIZES, COMBINATIONS, (False, True), DTYPES), ids=str
)
def test_kernel_is_reference(size, given, probs, dtype, device):
    check(*both(*sample(*size, device, *given, dtype), probs))


@pytest.mark.parametrize("probs", [False, True], ids=["logits", "probs"])
def test_slices(probs, device):
    z, y, prev, max_step = sample(66, 24, device)
    y = y.remainder(10)[::2]
    sliced, rest = z[::2, 2:12], (y, prev[::2, 2:12], max_step[::2])
    expected = both(sliced.clone(), *(t.clone() for t in rest), probs)[1]
    # strided rows with dense classes are read as they are; every other class, a transposed batch are copied
    check(both(sliced, *rest, probs)[0], expected)
    check(both(z.T.contiguous().T[::2, 2:12], *rest, probs)[0], expected)
    check(both(sliced.repeat_interleave(2, dim=1)[:, ::2], *rest, probs)[0], expected)


def test_one_row_for_all(device):
    z, y, _, _ = sample(5, 10, device)
    expected = both(z[:1].repeat(5, 1), y, None, None)[1]
    check(both(z[:1].expand(5, 10), y, None, None)[0], expected)


NAN, INF = math.nan, math.inf
SPECIAL = [  # (logits, label, hard)
    ([1.0, 1.0, 0.0], 0, True),  # a tie for the top
    ([0.0, 0.0, 0.0], 1, True),
    ([1.0, 0.0, 0.0], 0, False),  # a tie below the top does not matter
    ([1.0, 2.0, 0.0], 0, True),
    ([NAN, 1.0, 0.0], 0, True),  # NaN anywhere
    ([5.0, NAN, 0.0], 0, True),
    ([5.0, 0.0, NAN], 0, True),
    ([NAN, NAN, NAN], 2, True),
    ([INF, 1.0, 0.0], 0, False),
    ([INF, INF, 0.0], 0, True),
    ([0.0, INF, 0.0], 0, True),
    ([1.0, -INF, -INF], 0, False),
    ([-INF, 1.0, 0.0], 0, True),
    ([-INF, -INF, -INF], 0, True),
    ([3e38, -3e38, 0.0], 0, False),  # no overflow on the way
    ([-3e38, -3e38, -3.1e38], 0, True),
]


@pytest.mark.parametrize("probs", [False, True], ids=["logits", "probs"])
def test_special_rows(probs, device):
    z = torch.tensor([row for row, _, _ in SPECIAL], device=device)
    y = torch.tensor([label for _, label, _ in SPECIAL], device=device)
    wanted = [hard for _, _, hard in SPECIAL]
    prev, max_step = torch.zeros_like(z), torch.ones(len(z), device=device)
    by_kernel, by_reference = both(z, y, prev, max_step, probs)
    assert by_reference[1].tolist() == wanted
    check(by_kernel, by_reference)


def test_nan_steps_stay(device):
    z, y, prev, max_step = sample(4, 10, device)
    max_step[0] = torch.nan  # NaN from before
    prev[1, 3] = torch.nan  # NaN now
    by_kernel, by_reference = both(z, y, prev, max_step)
    check(by_kernel, by_reference)
    assert by_kernel[2].isnan().tolist() == [True, True, False, False]
    assert both(z, y, prev, None)[0][2].isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_good_as_pytorch(dtype, device):
    z, y, prev, _ = sample(64, 100, device, dtype=dtype)
    grad, _, step = both(z, y, prev, None)[0]
    # the interpreter truncates to bf16, which alone doubles the error of rounding
    factor = 2 if z.is_cuda or dtype == torch.float16 else 3
    z, y, prev = z.cpu(), y.cpu(), prev.cpu()
    one_hot = F.one_hot(y, 100)
    exact = z.double().softmax(1) - one_hot
    ours, pytorchs = (grad - exact).abs().max(), (z.softmax(1) - one_hot.to(dtype) - exact).abs().max()
    assert ours <= factor * pytorchs
    exact = (z.double() - prev.double()).abs().sum(1)
    ours, pytorchs = (step - exact).abs().max(), ((z - prev).abs().sum(1) - exact).abs().max()
    assert ours <= 2 * pytorchs


# ---------------------------------------------------------------- the meaning of the results
@pytest.mark.parametrize(("n", "classes"), [(7, 2), (33, 10), (5, 1000)])
def test_gradient_is_that_of_the_summed_cross_entropy(n, classes, device):
    z, y, _, _ = sample(n, classes, device)
    z.requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), z)
    grad, hard, max_step = ops.margin_stats(z, y)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-6)
    assert max_step is None
    assert not grad.requires_grad
    assert torch.equal(hard, z.argmax(1) != y)


@given(data=st.data())
def test_any_logits(device, data):
    """Few distinct values make ties common."""
    n, classes = data.draw(st.integers(0, 6)), data.draw(st.integers(2, 6))
    value = st.sampled_from([0.0, 1.0, -2.0, 3.5, NAN, INF, -INF])
    rows = data.draw(st.lists(st.lists(value, min_size=classes, max_size=classes), min_size=n, max_size=n))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    dtype, probs = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    z = torch.tensor(rows, dtype=dtype, device=device).view(n, classes)
    y = torch.tensor(labels, dtype=torch.int64, device=device)
    prev = z.roll(1, 0) if data.draw(st.booleans()) else None
    max_step = torch.rand(n, device=device) * 4 if data.draw(st.booleans()) else None
    by_kernel, by_reference = both(z, y, prev, max_step, probs)
    check(by_kernel, by_reference)
    for hard, row, label in zip(by_kernel[1].tolist(), rows, labels, strict=True):
        others = [value for j, value in enumerate(row) if j != label]
        assert hard == (not all(row[label] > other for other in others))


@pytest.mark.parametrize("space", ["logits", "probs"])
def test_running_maximum_over_steps(space, device):
    path = [torch.randn(6, 10, device=device) for _ in range(5)]
    y = torch.randint(10, (6,), device=device)
    max_step, untouched = None, torch.full((6,), 3.0, device=device)
    for before, now in pairwise(path):
        _, _, max_step = ops.margin_stats(now, y, before, max_step, space=space)
    points = [p.softmax(1) if space == "probs" else p for p in path]
    expected = torch.stack([(b - a).abs().sum(1) for a, b in pairwise(points)]).amax(0)
    torch.testing.assert_close(max_step, expected, rtol=1e-5, atol=1e-6)
    _, _, same = ops.margin_stats(path[0], y, None, untouched, space=space)
    assert torch.equal(same, untouched)
    assert same.data_ptr() != untouched.data_ptr()


def test_without_the_flags(device):
    """The steps of an attack do not ask for them; all else is the same."""
    arguments = sample(9, 10, device)
    for run in (margin_stats_launch, margin_stats_reference):
        grad, hard, max_step = run(*arguments, False, False)
        assert hard.shape == (0,)
        assert hard.dtype == torch.bool
        assert torch.equal(grad, run(*arguments, False)[0])
        assert torch.equal(max_step, run(*arguments, False)[2])


def test_inputs_stay_as_they_are(device):
    arguments = sample(9, 10, device)
    before = [t.clone() for t in arguments]
    ops.margin_stats(*arguments)
    margin_stats_launch(*arguments, True)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_a_label_that_is_no_class_is_hard(device):
    """On a GPU labels are not looked at beforehand; the kernel must not crash nor call such a row easy."""
    z = torch.randn(4, 10, device=device)
    y = torch.tensor([-1, 10, 2**40, -100], device=device)
    grad, hard, _ = margin_stats_launch(z, y, None, None, False)
    assert hard.all()
    assert grad.isfinite().all()


Z, Y = torch.randn(4, 10), torch.tensor([0, 3, 9, 1])
BAD = [
    ({"logits": Z.tolist()}, TypeError, "logits: got list"),
    ({"logits": Z.double()}, TypeError, "logits: got torch.float64"),
    ({"logits": Z[0]}, ValueError, r"logits: got shape \(10,\)"),
    ({"logits": Z[:, :1]}, ValueError, r"logits: got shape \(4, 1\)"),
    ({"logits": Z.to("meta")}, ValueError, "logits: is on device meta"),
    ({"y": Y.int()}, TypeError, "y: got torch.int32; labels must be int64"),
    ({"y": Y[:3]}, ValueError, r"y: got shape \(3,\); it must be \(4,\), one label per row of logits"),
    ({"y": F.one_hot(Y)}, ValueError, r"y: got shape \(4, 10\)"),
    ({"y": Y + 1}, ValueError, r"y: labels run from 1 to 10; the model knows classes 0\.\.9"),
    ({"y": Y - 1}, ValueError, "y: labels run from -1 to 8"),
    ({"y": Y.to("meta")}, ValueError, "y: is on device meta"),
    ({"prev": Z[:3]}, ValueError, "prev: got shape"),
    ({"prev": Z.half()}, TypeError, "prev: got torch.float16; it must be that of logits"),
    ({"prev": 0.0}, TypeError, "prev: got 0.0"),
    ({"max_step": torch.zeros(3)}, ValueError, r"max_step: got shape \(3,\); it must be \(4,\)"),
    ({"max_step": Y}, TypeError, "max_step: got torch.int64; it must be floating point"),
    ({"max_step": torch.zeros(4, device="meta")}, ValueError, "max_step: is on device meta"),
    ({"max_step": torch.tensor([0, 1, -1e-30, 2])}, ValueError, "max_step: holds -1e-30; step sizes must be >= 0"),
    ({"max_step": torch.tensor([0, 1, NAN, -2])}, ValueError, "max_step: holds NaN"),
    ({"space": "softmax"}, ValueError, "space: got 'softmax'; allowed are 'logits', 'probs'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else None)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ops.margin_stats(**{"logits": Z, "y": Y, **change})
