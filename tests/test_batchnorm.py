"""The attack's BatchNorm gives torch's numbers, for every kind of layer, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from nets import small_cnn
from torch import nn

from ham_kernels.engine import eval_batchnorm
from ham_kernels.engine.eval_batchnorm import fast_eval_batchnorm


@pytest.fixture(autouse=True)
def no_layer_is_too_small(monkeypatch):
    monkeypatch.setattr(eval_batchnorm, "SMALL", 0)


def filled(layer: nn.Module) -> nn.Module:
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.1, 3.0)
    if layer.weight is not None:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias)
    return layer.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(7), (5, 7)),
        (nn.BatchNorm1d(7), (5, 7, 3)),
        (nn.BatchNorm2d(7), (5, 7, 4, 3)),
        (nn.BatchNorm2d(7, affine=False), (5, 7, 4, 3)),
        (nn.BatchNorm3d(7, eps=1e-2), (2, 7, 4, 3, 2)),
    ],
    ids=str,
)
def test_same_numbers(layer, shape):
    filled(layer)
    x, upstream = torch.randn(shape).requires_grad_(), torch.randn(shape)
    expected = layer(x)
    (expected_grad,) = torch.autograd.grad(expected, x, upstream)
    with fast_eval_batchnorm(layer):
        assert "forward" in layer.__dict__
        ours = layer(x)
        (grad,) = torch.autograd.grad(ours, x, upstream)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)
    assert "forward" not in layer.__dict__


def test_channels_last_stays_channels_last():
    layer = filled(nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    with fast_eval_batchnorm(layer):
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_left_alone():
    class Own(nn.BatchNorm2d):
        pass

    no_statistics, subclass = nn.BatchNorm2d(3, track_running_stats=False), Own(3)
    patched = nn.BatchNorm2d(3)
    patched.forward = patched.forward
    model = nn.Sequential(no_statistics, subclass, patched).eval()
    mine = patched.__dict__["forward"]
    with fast_eval_batchnorm(model):
        assert "forward" not in no_statistics.__dict__
        assert "forward" not in subclass.__dict__
        assert patched.__dict__["forward"] is mine
    assert patched.__dict__["forward"] is mine


def test_other_dtypes_and_wrong_shapes_go_to_torch():
    layer = filled(nn.BatchNorm2d(3))
    half = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    expected = layer(half)
    with fast_eval_batchnorm(layer):
        assert torch.equal(layer(half), expected)
        with pytest.raises(ValueError, match="expected 4D input"):
            layer(torch.randn(2, 3))


def test_restored_after_an_error():
    model = small_cnn().eval()
    with pytest.raises(RuntimeError, match="boom"), fast_eval_batchnorm(model):
        raise RuntimeError("boom")
    assert all("forward" not in m.__dict__ for m in model.modules())
