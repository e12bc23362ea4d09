"""evaluate: counts class by class, full-strength attacks, nothing about the model changed."""

from __future__ import annotations

import math

import pytest
import torch
from nets import Constant, Counting, small_cnn

import ham_kernels as ham


def test_counts_by_hand():
    """Always class 1 of 3: right on the two images of class 1 among five, and class 2 has no image."""
    model = Constant([0.0, 1.0, 0.5])
    y = torch.tensor([0, 1, 0, 1, 0])
    loader = [(torch.rand(3, 1, 4, 4), y[:3]), (torch.rand(2, 1, 4, 4), y[3:])]
    result = ham.evaluate(model, loader, ("clean",))["clean"]
    assert result.accuracy == pytest.approx(0.4)
    assert result.per_class[:2] == (0.0, 1.0)
    assert math.isnan(result.per_class[2])
    assert result.worst_class == 0.0
    assert result.std == pytest.approx(0.5)
    assert result.n == 5
    assert result["worst_class"] == result.worst_class
    with pytest.raises(KeyError):
        result["median"]


def test_agrees_with_an_attack_and_a_count():
    model = small_cnn()
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 10  # every class is there: a missing one is NaN, never equal
    result = ham.evaluate(model, [(x, y)], ("clean", "pgd3"), eps=0.2, step_size=0.1)
    model.eval()
    assert result["clean"].accuracy == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    assert result["pgd3"].accuracy <= result["clean"].accuracy
    again = ham.evaluate(model, [(x, y)], ("clean", "pgd3"), eps=0.2, step_size=0.1)
    assert again == result


def test_every_image_gets_every_step():
    """No early stopping: images that are already misclassified are attacked on."""
    model = Counting(small_cnn())
    ham.evaluate(model, [(torch.rand(10, 1, 8, 8), torch.randint(0, 10, (10,)))])
    assert model.input_backward_rows == 20 * 10 + 10  # and the first look
    assert model.forward_rows == (1 + 20 + 1 + 2) * 10


def test_model_is_left_as_it_was():
    model = small_cnn()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ham.evaluate(model, [(torch.rand(10, 1, 8, 8), torch.randint(0, 10, (10,)))], ("clean", "pgd2"))
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
