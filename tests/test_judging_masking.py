"""masking: models that hide their gradients are found out, by the checks meant for them; an honest one passes."""

from __future__ import annotations

import json

import pytest
import torch
from judging_nets import EPS, STEP_SIZE, digit_batches, robust_cnn
from nets import Constant, Counting, small_cnn
from torch import nn

from ham_kernels.evaluation import gradient_masking, masking

pytestmark = pytest.mark.slow

HOW = {"eps": EPS, "step_size": STEP_SIZE}


class Around(nn.Module):
    """A model with something before its input or after its logits."""

    def __init__(self, inner: nn.Module, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


def by_name(result: dict) -> dict[str, dict]:
    return {check["name"]: check for check in result["checks"]}


@pytest.mark.parametrize(("norm", "budget"), [("linf", HOW), ("l2", {"eps": 1.0, "step_size": 0.25})])
def test_honest_model_passes(norm, budget):
    images = 400 if norm == "linf" else 256
    result = masking(robust_cnn(), digit_batches(images), norm=norm, **budget, other=robust_cnn(1))
    assert not result["suspicious"], [c["why"] for c in result["checks"] if c["suspicious"]]
    checks = by_name(result)
    assert list(checks) == ["steps", "budget", "scale", "transfer", "noise"]
    assert {c["why"] for c in checks.values()} == {"as it should be"}
    assert checks["budget"]["values"]["accuracy"][-1] <= 0.1
    assert checks["budget"]["values"]["eps"][-1] >= (1.0 if norm == "linf" else 8.0)
    assert checks["steps"]["values"]["loss"] == sorted(checks["steps"]["values"]["loss"])
    assert checks["transfer"]["values"]["transfer"] > checks["transfer"]["values"]["plain"]
    assert result["n"] == images
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_checks_go_on_after_the_last_one_noted():
    """To the same result, but for the seconds."""
    noted = []
    whole = masking(robust_cnn(), digit_batches(32), **HOW, note=lambda found: noted.append(list(found)))
    assert [len(found) for found in noted] == [1, 2, 3, 4, 5]
    rest = masking(robust_cnn(), digit_batches(32), **HOW, known=noted[2])
    assert rest["checks"][:3] == noted[2]
    without = [{k: v for k, v in c.items() if k != "seconds"} for c in rest["checks"]]
    assert without == [{k: v for k, v in c.items() if k != "seconds"} for c in whole["checks"]]
    assert all(c["seconds"] >= 0 for c in whole["checks"])


def test_saturated_softmax_is_found():
    """Logits times 1e4: exp underflows in fp32, and with it the gradient of the cross entropy."""
    hot = Around(robust_cnn(), after=lambda z: z * 1e4)
    result = masking(hot, digit_batches(256), **HOW, other=robust_cnn(1))
    checks = by_name(result)
    assert result["suspicious"]
    for name in ("budget", "scale", "transfer", "noise"):
        assert checks[name]["suspicious"], name
    values = checks["scale"]["values"]
    assert values["cw"] < values["plain"] - 0.1
    ahead = 100 * (values["plain"] - values["cw"])
    assert f"PGD on cw fools {ahead:.1f} points more images than on the cross entropy" in checks["scale"]["why"]


def test_one_masked_class_is_found():
    """Of ten: on average over all images PGD loses little by it."""
    bench = gradient_masking._Bench(None, [(torch.zeros(500, 1), torch.arange(500) % 10)], "fp32", 0)
    plain, other = torch.ones(500).double(), torch.ones(500).double()
    assert bench.of_one_class(plain, other, "noise") == []
    other[3::10][:15] = 0  # 30 points of class 3, 3 of all
    assert bench.of_one_class(plain, other, "noise") == [], "chance is not left out"
    other[3::10][:40] = 0
    assert bench.of_one_class(plain, other, "noise") == ["in class 3 noise fools 80.0 points more images than PGD"]


def test_quantised_input_is_found():
    """The gradient is 0 everywhere: no step moves, so only what needs no gradient of this model can tell."""
    stairs = Around(robust_cnn(), before=lambda x: (x * 8).round() / 8)
    result = masking(stairs, digit_batches(256), **HOW, other=robust_cnn(1))
    checks = by_name(result)
    assert result["suspicious"]
    for name in ("steps", "budget", "transfer", "noise"):
        assert checks[name]["suspicious"], name
    assert "do not raise the loss" in checks["steps"]["why"]
    assert not checks["scale"]["suspicious"]


def test_gradient_that_misleads_is_found():
    """Its sign is turned on the way back: every step lowers the loss."""

    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return -grad

    checks = by_name(masking(Around(robust_cnn(), before=Turned.apply), digit_batches(256), **HOW))
    assert checks["steps"]["suspicious"]
    assert "the loss after 2 steps is lower than after 1" in checks["steps"]["why"]
    assert checks["budget"]["suspicious"]
    assert checks["noise"]["suspicious"]


def test_attack_that_is_not_there_yet_is_found():
    """20 steps of 0.004 come no farther than 0.08 of a budget of 0.2."""
    steps = by_name(masking(robust_cnn(), digit_batches(256), eps=EPS, step_size=0.004))["steps"]
    assert steps["suspicious"]
    accuracy = dict(zip(steps["values"]["steps"], steps["values"]["accuracy"], strict=True))
    late, ahead = 100 * (accuracy[20] - accuracy[50]), 100 * (accuracy[20] - steps["values"]["fgsm"])
    assert f"accuracy still falls by {late:.1f} points from 20 to 50 steps" in steps["why"]
    assert f"FGSM fools {ahead:.1f} points more images than 20 steps" in steps["why"]


def test_without_another_model_transfer_is_not_run():
    result = masking(robust_cnn(), digit_batches(64), **HOW)
    transfer = by_name(result)["transfer"]
    assert transfer["why"] == "not run: no other model"
    assert not transfer["suspicious"]


def test_progress_is_told_check_by_check():
    told = []
    result = masking(small_cnn(), digit_batches(32), **HOW, progress=lambda *what: told.append(what))
    assert told == [("masking", done, 5) for done in range(6)]
    assert len(result["checks"]) == 5


def test_takes_the_first_images_only_and_costs_what_it_says():
    model = Counting(small_cnn())
    data = [(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)] * 3
    result = masking(model, data, **HOW, images=30)
    assert result["n"] == 30
    assert model.input_backward_rows <= 350 * 30
    assert {rows for rows, _ in model.batches[2:]} == {20, 10}  # behind the first look


@pytest.mark.parametrize("fails", [False, True])
def test_both_models_are_left_as_they_were(fails):
    model, other = small_cnn(0), small_cnn(1)
    model[2].eval()
    other[1].weight.requires_grad_(False)

    def boom(z):
        raise RuntimeError("boom")

    given = Around(other, after=boom) if fails else other
    before = [([m.training for m in n.modules()], [p.requires_grad for p in n.parameters()]) for n in (model, other)]
    state = [{k: v.clone() for k, v in n.state_dict().items()} for n in (model, other)]
    data = [(torch.rand(8, 1, 8, 8), torch.arange(8))]
    if fails:
        with pytest.raises(RuntimeError, match="boom"):
            masking(model, data, **HOW, other=given)
    else:
        masking(model, data, **HOW, other=given)
    after = [([m.training for m in n.modules()], [p.requires_grad for p in n.parameters()]) for n in (model, other)]
    assert before == after
    for n, was in zip((model, other), state, strict=True):
        assert all(torch.equal(v, was[k]) for k, v in n.state_dict().items())
        assert all(p.grad is None for p in n.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.0}, "eps: got 0"),
        ({"step_size": 0.0}, "step_size: got 0"),
        ({"norm": "l1"}, "norm: got 'l1'"),
        ({"images": 1}, "images: got 1"),
        ({"precision": "fp16"}, "precision: got 'fp16'"),
        ({"loader": []}, "loader: gave no batch"),
    ],
)
def test_bad_input(change, message):
    data = [(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=message):
        masking(**({"model": Constant([0.0, 1.0]), "loader": data} | HOW | change))
