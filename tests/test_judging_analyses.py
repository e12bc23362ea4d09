"""The paper's analyses: by hand on models whose answers are known, and against attacks of their own."""

from __future__ import annotations

import json

import pytest
import torch
from judging_nets import EPS, STEP_SIZE, digit_batches, robust_cnn
from nets import Broken, Constant, Counting, small_cnn
from torch import nn

import ham_kernels as ham
from ham_kernels import engine
from ham_kernels.attack.pgd import PGD
from ham_kernels.evaluation import confidence, easy_stays_easy
from ham_kernels.evaluation.named_attacks import walk

HOW = {"eps": EPS, "step_size": STEP_SIZE}


class Ramp(nn.Module):
    """Two classes told apart by the mean pixel: each step of an attack moves it by the step size."""

    def forward(self, x):
        m = 10 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-m, m], dim=1)


# ---------------------------------------------------------------- confidence
def test_confidence_by_hand():
    """Softmax of (log 19, 0, -100) is (0.95, 0.05, 0): class 0 is over-confident, the others wrong with confidence."""
    model = Constant([torch.log(torch.tensor(19.0)).item(), 0.0, -100.0])
    y = torch.tensor([0, 0, 1, 1, 1])
    result = confidence(model, [(torch.rand(5, 1, 4, 4), y)], steps=2, **HOW, bins=10)
    assert result["classes"] == 3
    assert result["n"] == [2, 3, 0]
    assert result["overconfident"] == [1.0, 0.0, None]
    assert result["wrong_confident"] == [0.0, 1.0, None]
    assert result["overconfident_all"] == pytest.approx(2 / 5)
    assert result["wrong_confident_all"] == pytest.approx(3 / 5)
    assert result["histogram"] == [[0] * 9 + [2], [3] + [0] * 9, [0] * 10]
    assert result["histogram_all"] == [3] + [0] * 8 + [2]
    assert result["edges"] == pytest.approx([i / 10 for i in range(11)])
    sure = confidence(model, [(torch.rand(5, 1, 4, 4), y)], steps=2, **HOW, threshold=0.96)
    assert sure["overconfident_all"] == sure["wrong_confident_all"] == 0.0


def test_certainty_belongs_to_the_last_bin():
    result = confidence(Constant([200.0, 0.0]), [(torch.rand(4, 1, 4, 4), torch.tensor([0, 0, 1, 1]))], steps=1, **HOW)
    assert result["histogram"][0][-1] == 2
    assert result["histogram"][1][0] == 2


@pytest.mark.slow
def test_confidence_is_that_of_the_examples_of_one_attack():
    model, data = robust_cnn(), digit_batches()
    result = confidence(model, data, steps=10, **HOW, threshold=0.8)
    own, y = [], torch.cat([y for _, y in data])
    with engine.attack_mode(model), torch.no_grad():
        for b, (x, labels) in enumerate(data):
            with torch.enable_grad():
                attack, _ = walk(model, x, labels, PGD(EPS, STEP_SIZE, 10), seed=0, batch=b, precision="fp32")
            own.append(model(attack.rows.x_adv).softmax(1)[torch.arange(len(labels)), labels])
    own = torch.cat(own)
    for c in range(10):
        mine = own[y == c]
        assert result["overconfident"][c] == pytest.approx((mine >= 0.8).float().mean().item())
        expected = torch.histc(mine, 20, 0.0, 1.0).int().tolist()
        assert sum(abs(a - b) for a, b in zip(result["histogram"][c], expected, strict=True)) <= 2  # at an edge
    assert 0 < result["overconfident_all"] < 1
    assert max(result["overconfident"]) - min(result["overconfident"]) > 0.1  # the paper's point
    assert json.loads(json.dumps(result, allow_nan=False)) == result


# ---------------------------------------------------------------- easy stays easy
def test_easy_stays_easy_by_hand():
    """Class 1 at mean pixel 0.5 + d falls when the attack has moved the mean by d.

    After k steps of 0.1 from a start u in U(-0.3, 0.3) that is E[max(u - 0.1 k, -0.3)] = 0, -0.092, -0.167, -0.225,
    with a deviation of 0.003 over so many pixels.
    """
    x = torch.stack([torch.full((1, 64, 64), 0.5 + d) for d in (0.05, 0.13, 0.2, 0.3, -0.05)])
    y = torch.tensor([1, 1, 1, 1, 1])
    result = easy_stays_easy(Ramp(), [(x, y)], steps=3, eps=0.3, step_size=0.1)
    assert result["steps"] == 3
    assert result["easy"] == [4, 3, 2, 1]
    first, second = result["by_m"]
    assert first == {
        "m": 1, "easy": 3, "easy_fraction": 3 / 5, "stay": 1, "stay_share": 1 / 3, "per_class": [None, 1 / 3],
    }  # fmt: skip
    assert (second["m"], second["easy"], second["stay"]) == (2, 2, 1)


def test_a_tie_is_hard():
    result = easy_stays_easy(Constant([1.0, 1.0]), [(torch.rand(4, 1, 4, 4), torch.zeros(4).long())], steps=2, **HOW)
    assert result["easy"] == [0, 0, 0]
    assert result["by_m"][0]["stay_share"] is None


def test_ends_agree_with_evaluate():
    """Of the digits: easy at K is robust accuracy, and who is hard at M may be easy at K but is never counted."""
    model, data = robust_cnn(), digit_batches()
    result = easy_stays_easy(model, data, steps=10, **HOW)
    accuracy = ham.evaluate(model, data, ["pgd10"], **HOW)["pgd10"].accuracy
    assert result["easy"][10] == round(accuracy * 517)
    assert [m["m"] for m in result["by_m"]] == list(range(1, 10))
    for m in result["by_m"]:
        assert m["easy"] == result["easy"][m["m"]]
        assert m["stay"] <= min(m["easy"], result["easy"][10])
        assert m["stay_share"] == pytest.approx(m["stay"] / m["easy"])
    shares = [m["stay_share"] for m in result["by_m"]]
    assert shares[-1] > shares[0]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


# ---------------------------------------------------------------- both
@pytest.mark.parametrize("analysis", [confidence, easy_stays_easy])
def test_one_pass_of_one_attack(analysis):
    model = Counting(small_cnn())
    analysis(model, [(torch.rand(12, 1, 8, 8), torch.arange(12) % 10)], steps=5, **HOW)
    assert model.forward_rows == 6 * 12
    assert model.input_backward_rows == 5 * 12
    assert not any(training for _, training in model.batches)


@pytest.mark.parametrize("analysis", [confidence, easy_stays_easy])
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(analysis, fails):
    def boom(z):
        raise RuntimeError("boom")

    model = Broken(small_cnn(), boom, after=3 if fails else 10**9)
    model.inner[2].eval()
    modes, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    data = [(torch.rand(8, 1, 8, 8), torch.arange(8))]
    if fails:
        with pytest.raises(RuntimeError, match="boom") as caught:
            analysis(model, data, steps=5, **HOW)
        assert modes == [m.training for m in model.modules()], caught  # although the traceback is still alive
    else:
        analysis(model, data, steps=5, **HOW)
    assert modes == [m.training for m in model.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("analysis", "change", "message"),
    [
        (confidence, {"threshold": 0.5}, "threshold: got 0.5"),
        (confidence, {"threshold": 1.1}, "threshold: got 1.1"),
        (confidence, {"bins": 0}, "bins: got 0"),
        (confidence, {"steps": 0}, "steps: got 0"),
        (confidence, {"loader": []}, "loader: gave no batch"),
        (easy_stays_easy, {"steps": 1}, "steps: got 1"),
        (easy_stays_easy, {"eps": -1.0}, "eps: got -1"),
        (easy_stays_easy, {"precision": "fp16"}, "precision: got 'fp16'"),
        (easy_stays_easy, {"loader": []}, "loader: gave no batch"),
    ],
)
def test_bad_input(analysis, change, message):
    data = [(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=message):
        analysis(**({"model": Constant([0.0, 1.0]), "loader": data} | HOW | change))
