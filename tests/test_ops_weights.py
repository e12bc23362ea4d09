"""Step-size weights, and the weighted cross entropy with the gradient that it makes in its forward."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ham_kernels import ops

pytest.importorskip("triton")
from ham_kernels.ops.weights import (
    step_size_weights_launch,
    step_size_weights_reference,
    weighted_cross_entropy_launch,
    weighted_cross_entropy_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WEIGHTS = [step_size_weights_launch, step_size_weights_reference, ops.step_size_weights]
ROWS = [
    1,
    31,
    33,
    4095,
    4096,
    4097,
    10_000,
]  # one row; around a warp; around the kernel's block; several blocks


# ---------------------------------------------------------------- weights
@pytest.mark.parametrize("run", WEIGHTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 20.0])
@pytest.mark.parametrize("n", ROWS)
def test_formula(n, lam, run, device):
    s = torch.rand(n, device=device) * 4
    w = run(s, lam)
    exact = torch.sigmoid(lam * s.double())
    exact = exact / exact.mean()
    assert w.dtype == torch.float32
    torch.testing.assert_close(w.double(), exact, rtol=4e-6, atol=0)
    assert abs(w.double().mean() - 1) < 4e-6
    if lam == 0.0:
        assert torch.equal(w, torch.ones_like(w))


@pytest.mark.parametrize("run", WEIGHTS, ids=lambda f: f.__name__)
def test_no_weights(run, device):
    assert run(torch.rand(0, device=device), 1.0).shape == (0,)


@pytest.mark.parametrize("run", WEIGHTS, ids=lambda f: f.__name__)
def test_larger_steps_weigh_more(run, device):
    w = run(torch.linspace(0, 3, 50, device=device), 1.0)
    assert (w.diff() > 0).all()
    assert w[0] < 1 < w[-1]


def test_higher_lam_is_more_uniform(device):
    """Once lam * s is beyond the bend of the sigmoid, every weight comes close to 1."""
    s = torch.linspace(1, 5, 50, device=device)
    spread = [ops.step_size_weights(s, lam).std().item() for lam in (1.0, 2.0, 4.0, 8.0)]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 1e-3


@pytest.mark.parametrize("run", WEIGHTS[:2], ids=lambda f: f.__name__)
def test_weights_of_special_steps(run, device):
    w = run(torch.tensor([0.0, torch.inf], device=device), 1.0)
    torch.testing.assert_close(w.cpu(), torch.tensor([2 / 3, 4 / 3]))
    assert run(torch.tensor([1.0, torch.nan], device=device), 1.0).isnan().all()  # a NaN cannot hide


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_public_weights_of_any_dtype_and_stride(dtype, device):
    s = torch.rand(20, device=device, dtype=dtype, requires_grad=True)
    w = ops.step_size_weights(s[::2], 1.0)
    assert w.dtype == torch.float32
    assert not w.requires_grad
    torch.testing.assert_close(w, step_size_weights_reference(s.detach()[::2].float(), 1.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_step": [1.0]}, TypeError, "max_step: got"),
        ({"max_step": torch.arange(3)}, TypeError, "max_step: got torch.int64"),
        ({"max_step": torch.rand(3, 1)}, ValueError, r"max_step: got shape \(3, 1\)"),
        ({"max_step": torch.rand(3, device="meta")}, ValueError, "max_step: is on device meta"),
        ({"max_step": torch.tensor([1.0, -0.5])}, ValueError, "max_step: holds -0.5; step sizes must be >= 0"),
        ({"max_step": torch.tensor([1.0, math.nan])}, ValueError, "max_step: holds NaN; step sizes must be >= 0"),
        ({"lam": -1}, ValueError, "lam: got -1.0; it must be finite and >= 0"),
        ({"lam": math.inf}, ValueError, "lam: got inf"),
        ({"lam": None}, TypeError, "lam: got None"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_weights(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ops.step_size_weights(**{"max_step": torch.rand(3), "lam": 1.0, **change})


# ---------------------------------------------------------------- weighted cross entropy
SIZES = [
    (0, 10),
    (1, 2),
    (31, 3),
    (33, 10),
    (129, 10),
    (40, 100),
    (5, 1000),
    (2, 2049),
]  # as for margin_stats


def sample(n, classes, device, dtype=torch.float32, weighted=True):
    z = (torch.randn(n, classes) * 4).to(dtype).to(device)
    return z, torch.randint(classes, (n,)).to(device), (torch.rand(n) * 2).to(device) if weighted else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "classes"), SIZES)
def test_kernel_is_reference(n, classes, weighted, dtype, device):
    z, y, w = sample(n, classes, device, dtype, weighted)
    by_kernel = weighted_cross_entropy_launch(z, y, w)
    by_reference = weighted_cross_entropy_reference(z.cpu(), y.cpu(), None if w is None else w.cpu())
    for actual, expected in zip(by_kernel, by_reference, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.cpu(), expected, rtol=4e-6, atol=1e-6)


def test_slices(device):
    z, y, w = sample(30, 12, device)
    expected = weighted_cross_entropy_reference(z[::2, 1:11].cpu(), y[::2].cpu() % 10, w[::2].cpu())
    for logits in (z[::2, 1:11], z.T.contiguous().T[::2, 1:11]):
        by_kernel = weighted_cross_entropy_launch(logits, (y % 10)[::2], w[::2].contiguous())
        for actual, wanted in zip(by_kernel, expected, strict=True):
            torch.testing.assert_close(actual.cpu(), wanted, rtol=4e-6, atol=1e-6)


def test_logits_as_large_as_they_get(device):
    """exp of these overflows and underflows unless the maximum is taken out first."""
    z = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -2e4, -1e4], [5.0, -torch.inf, 5.0]], device=device)
    y = torch.tensor([0, 1, 2], device=device)
    losses, gradient = (t.cpu() for t in weighted_cross_entropy_launch(z, y, None))
    torch.testing.assert_close(losses, torch.tensor([0.0, 1e4, math.log(2)]) / 3)
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.0, -1.0, 1.0], [0.5, 0.0, -0.5]]) / 3
    torch.testing.assert_close(gradient, expected)


def exact_loss(z, y, w):
    """The same loss and gradient by autograd, in fp64."""
    z = z.detach().double().requires_grad_()
    losses = F.cross_entropy(z, y, reduction="none")
    loss = (losses if w is None else losses * w.double()).sum() / max(len(y), 1)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (33, 10), (5, 1000)])
def test_loss_and_gradient_are_those_of_autograd(n, classes, weighted, device):
    z, y, w = sample(n, classes, device, weighted=weighted)
    z.requires_grad_()
    loss = ops.weighted_cross_entropy(z, y, w)
    (loss * 3).backward()  # a loss that is used further on
    expected, gradient = exact_loss(z, y, w)
    # log(1 + r) for a small r is known to two roundings of 1
    torch.testing.assert_close(loss.double(), expected, rtol=4e-6, atol=2 * 2.0**-23)
    # p - 1 near p = 1 is known to two roundings of 1, whatever is left of it
    torch.testing.assert_close(z.grad.double(), 3 * gradient, rtol=1e-5, atol=3 * 2.0**-23)
    if not weighted:
        torch.testing.assert_close(loss, F.cross_entropy(z, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_good_as_pytorch(dtype, device):
    z, y, _ = sample(64, 100, device, dtype)
    exact, exact_gradient = exact_loss(z, y, None)

    def errors(loss):
        z.grad = None
        loss.backward()
        return (loss - exact).abs(), (z.grad - exact_gradient).abs().max()

    z.requires_grad_()
    for ours, pytorchs in zip(errors(ops.weighted_cross_entropy(z, y)), errors(F.cross_entropy(z, y)), strict=True):
        assert ours <= 2 * pytorchs


def test_a_loss_scale_reaches_small_fp16_gradients(device):
    """p / n here is 5e-9, below the smallest fp16; multiplied by the loss scale it is not."""
    z = torch.tensor([[0.0, -14.5]], dtype=torch.float16, device=device).repeat(100, 1).requires_grad_()
    y = torch.zeros(100, dtype=torch.int64, device=device)
    (ops.weighted_cross_entropy(z, y) * 2.0**16).backward()
    expected = torch.full((100,), 2.0**16 / 100 / (1 + math.exp(14.5)), device=device)
    torch.testing.assert_close(z.grad[:, 1].float(), expected, rtol=2e-3, atol=0)


def test_a_gradient_of_its_gradient_is_refused(device):
    """It would lack the part that goes through the saved gradient, without a word."""
    z = torch.randn(4, 3, device=device, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0], device=device)
    with pytest.raises(RuntimeError, match=r"weighted_cross_entropy: is differentiable once"):
        torch.autograd.grad(ops.weighted_cross_entropy(z, y), z, create_graph=True)


@pytest.mark.parametrize("weights", [None, torch.rand(0)], ids=["no weights", "weights"])
def test_no_rows_no_loss(weights, device):
    layer = torch.nn.Linear(4, 10, device=device)
    z = layer(torch.rand(0, 4, device=device))
    loss = ops.weighted_cross_entropy(
        z, torch.zeros(0, dtype=torch.int64, device=device), None if weights is None else weights.to(device)
    )
    loss.backward()
    assert loss == 0
    assert layer.weight.grad.abs().max() == 0


@given(data=st.data())
def test_any_loss(device, data):
    n, classes = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 6))
    number = st.floats(-50, 50, width=32)
    rows = data.draw(st.lists(st.lists(number, min_size=classes, max_size=classes), min_size=n, max_size=n))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    weights = data.draw(st.lists(st.floats(0, 10, width=32), min_size=n, max_size=n))
    z, y, w = (
        torch.tensor(rows, device=device),
        torch.tensor(labels, device=device),
        torch.tensor(weights).to(device),
    )
    losses, gradient = weighted_cross_entropy_launch(z, y, w)
    expected, expected_gradient = exact_loss(z, y, w)
    torch.testing.assert_close(losses.double().sum(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


Z, Y = torch.randn(4, 10), torch.tensor([0, 3, 9, 1])
BAD = [
    ({"logits": Z.long()}, TypeError, "logits: got torch.int64"),
    ({"logits": Z[None]}, ValueError, r"logits: got shape \(1, 4, 10\)"),
    ({"y": Y.float()}, TypeError, "y: got torch.float32"),
    ({"y": Y[:2]}, ValueError, r"y: got shape \(2,\)"),
    ({"y": Y * 2}, ValueError, "y: labels run from 0 to 18"),
    ({"y": None}, TypeError, "y: got None"),
    ({"weights": torch.ones(3)}, ValueError, r"weights: got shape \(3,\)"),
    ({"weights": Y}, TypeError, "weights: got torch.int64"),
    ({"weights": 1.0}, TypeError, "weights: got 1.0"),
    ({"weights": torch.ones(4, device="meta")}, ValueError, "weights: is on device meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else None)
def test_bad_loss(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ops.weighted_cross_entropy(**{"logits": Z, "y": Y, **change})
