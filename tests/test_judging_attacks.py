"""Attacks by name, and restarts."""

from __future__ import annotations

import pytest
import torch
from judging_nets import varied_cnn
from nets import Counting, small_cnn

import ham_kernels as ham
from ham_kernels import engine
from ham_kernels.attack.pgd import PGD
from ham_kernels.evaluation.named_attacks import RESTART_STRIDE, plans, survivors, walk

BUDGET = {"eps": 0.02, "step_size": 0.008, "norm": "linf"}


@pytest.fixture
def batch():
    """Images with the labels that the model gives them, so that an attack has something to take away."""
    x = torch.rand(60, 1, 8, 8)
    model = varied_cnn(x).eval()
    return model, x, model(x).argmax(1)


def test_fgsm_is_one_step_of_eps(batch):
    model, x, y = batch
    x_in = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(model(x_in), y, reduction="sum").backward()
    by_hand = (x + 0.02 * x_in.grad.sign()).clamp(0, 1)
    expected = (model(by_hand).argmax(1) == y).float().mean().item()
    result = ham.evaluate(model, [(x, y)], ("clean", "fgsm"), eps=0.02, step_size=0.5)
    assert result["clean"].accuracy == 1.0
    assert result["fgsm"].accuracy == pytest.approx(expected)
    assert expected < 1.0


def test_cw_attacks_the_margin(batch):
    model, x, y = batch
    result = ham.evaluate(model, [(x, y)], ("pgd5", "cw5"), **BUDGET)
    plan = plans(["cw5"], **BUDGET)["cw5"]
    assert (plan.pgd.loss, plan.pgd.steps) == ("cw", 5)
    assert result["cw5"].accuracy < 1.0
    assert abs(result["cw5"].accuracy - result["pgd5"].accuracy) < 0.3


def test_restarts_are_the_worst_case_over_starts(batch):
    """By hand: R attacks on the whole batch, each with its own noise; lost is what any of them turns."""
    model, x, y = batch
    pgd = PGD(0.02, 0.008, 2)
    with engine.attack_mode(model):
        ends = [walk(model, x, y, pgd, seed=3, batch=5 + r * RESTART_STRIDE, precision="fp32")[1][2] for r in range(3)]
        by_hand = [z.argmax(1) == y for z in ends]
        for restarts in (1, 2, 3):
            plan = plans(["pgd2"], **BUDGET, restarts=restarts)["pgd2"]
            found = survivors(model, x, y, plan, seed=3, batch=5, precision="fp32")
            assert torch.equal(found.correct, torch.stack(by_hand[:restarts]).all(0))
            expected = y.clone()  # the answer to the first restart that turned the image
            for z in reversed(ends[:restarts]):
                expected = torch.where(z.argmax(1) == y, expected, z.argmax(1))
            assert torch.equal(found.answers, expected)
            assert (found.classes, found.no_gradient) == (10, 0)
    assert not torch.equal(ends[0], ends[1])


def test_restarts_never_help_and_spare_what_is_lost(batch):
    inner, x, y = batch
    accuracies, rows = [], []
    for restarts in (1, 4):
        model = Counting(inner)
        accuracies.append(ham.evaluate(model, [(x, y)], ("pgd3",), **BUDGET, restarts=restarts)["pgd3"].accuracy)
        rows.append(model.forward_rows)
    assert accuracies[1] <= accuracies[0] < 1.0
    look = 2 * 16
    assert rows[0] == 4 * 60 + look
    assert rows[0] < rows[1] < 4 * rows[0]
    again = ham.evaluate(inner, [(x, y)], ("pgd3",), **BUDGET)["pgd3"]
    assert again.accuracy == accuracies[0]


def test_walk_shows_every_point_of_the_attack(batch):
    """The logits at x^k of a long attack are those at the end of an attack of k steps from the same start."""
    model, x, y = batch
    with engine.attack_mode(model):
        _, at = walk(model, x, y, PGD(0.02, 0.008, 4), seed=1, batch=0, precision="fp32", look_at=range(4))
        for k in range(5):
            _, alone = walk(model, x, y, PGD(0.02, 0.008, k), seed=1, batch=0, precision="fp32")
            torch.testing.assert_close(at[k], alone[k])
    assert list(at) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attacks": ("cw",)}, ValueError, "attacks: got 'cw'"),
        ({"attacks": ("pgd0",)}, ValueError, "attacks: got 'pgd0'"),
        ({"attacks": "pgd20"}, TypeError, "attacks: got 'pgd20'"),
        ({"attacks": ()}, ValueError, "attacks: got none"),
        ({"attacks": (20,)}, ValueError, "attacks: got 20"),
        ({"restarts": 0}, ValueError, "restarts: got 0"),
        ({"eps": -1.0}, ValueError, "eps: got -1"),
        ({"norm": "l1"}, ValueError, "norm: got 'l1'"),
        ({"precision": "fp64"}, ValueError, "precision: got 'fp64'"),
        ({"precision": "fp16", "attacks": ("autoattack",)}, ValueError, "precision: got 'fp16'"),
    ],
)
def test_bad_input_before_work_starts(change, error, message):
    model = Counting(small_cnn())
    with pytest.raises(error, match=message):
        ham.evaluate(model, [(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))], **change)
    assert model.forward_rows == 0
