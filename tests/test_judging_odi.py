"""ODI: what each restart does, that its examples are examples, and that it is as strong as it should be."""

from __future__ import annotations

import math

import pytest
import torch
from judging_nets import varied_cnn
from nets import small_cnn

import ham_kernels as ham
from ham_kernels import engine
from ham_kernels.attack.pgd import PGD
from ham_kernels.evaluation import judge, odi
from ham_kernels.evaluation.named_attacks import plans
from ham_kernels.ops import random_start

HOW = {"eps": 0.02, "step_size": 0.008}


@pytest.fixture
def batch():
    """Images with the labels that the model gives them."""
    x = torch.rand(60, 1, 8, 8)
    model = varied_cnn(x).eval()
    return model, x, model(x).argmax(1)


def flags(model, x, y, name, **how):
    return judge(model, [(x, y)], [name], classes=10, **{**HOW, **how})[name]["correct"]


def test_an_answer_that_is_no_number_is_no_success(batch):
    model, x, y = batch

    class OffTheData(torch.nn.Module):
        def forward(self, images):
            z = model(images)
            moved = torch.cdist(images.flatten(1), x.flatten(1)).amin(1) > 1e-3
            return z.masked_fill(moved[:, None], torch.nan)

    with pytest.raises(engine.NonFiniteError, match="NaN or infinite logits"):
        flags(OffTheData(), x, y, "odi2")


def by_hand(model, x, y, x_adv, toward, eps):
    """One restart on one row in plain PyTorch, as the paper's steps are written; the point where it ends."""
    for k in range(32):
        x_in = x_adv.clone().requires_grad_()
        z = model(x_in[None])[0]
        others = torch.cat([z[:y], z[y + 1 :]])
        if z[y] <= others.max():
            return x_adv
        value = (z * toward).sum() if k < 7 else others.max() - z[y]
        (grad,) = torch.autograd.grad(value, x_in)
        size = 1.0 if k < 7 else 0.001 + 0.999 * (1 + math.cos(math.pi * (k - 7) / 26)) / 2
        x_adv = torch.clamp(x_adv + eps * size * grad.sign(), x - eps, x + eps).clamp(0, 1)
    return x_adv


def test_a_restart_goes_as_it_is_written(batch):
    model, x, y = batch
    x, y = x[:12], y[:12]
    toward = 2 * torch.rand(12, 10) - 1
    begun = random_start(x, 0.02, norm="linf", seed=1, step=2)
    walk = odi._Walk(model, x, y, begun.clone(), toward, PGD(0.02, 0.02, 32), engine.plain("fp32"))
    expected = torch.stack([by_hand(model, *row, 0.02) for row in zip(x, y, begun, toward, strict=True)])
    apart = (walk.points - expected).abs().flatten(1).amax(1)
    assert (apart < 1e-6).float().mean() >= 0.9  # rounding may turn the sign of a gradient that is nearly 0


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.3)])
def test_its_examples_lie_in_the_ball(batch, norm, eps):
    model, x, y = batch
    toward = 2 * torch.rand(len(y), 10) - 1
    begun = random_start(x, eps, norm=norm, seed=1, step=2)
    walk = odi._Walk(model, x, y, begun, toward, PGD(eps, eps, 32, norm), engine.plain("fp32"))
    delta = (walk.points - x).flatten(1)
    size = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    assert size.max() <= eps * (1 + 1e-5)
    assert walk.points.min() >= 0
    assert walk.points.max() <= 1
    lost = model(walk.points).argmax(1) != y
    assert torch.equal(lost[~walk.resisted], torch.ones(int((~walk.resisted).sum()), dtype=torch.bool))
    assert lost.sum() > 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_restarts_take_more_and_it_is_as_strong_as_cw(batch, norm):
    model, x, y = batch
    how = {"norm": norm} if norm == "linf" else {"norm": norm, "eps": 0.05, "step_size": 0.02}
    found = {name: flags(model, x, y, name, **how) for name in ("odi1", "odi2", "odi6", "cw20")}
    for fewer, more in (("odi1", "odi2"), ("odi2", "odi6")):
        assert all(a >= b for a, b in zip(found[fewer], found[more], strict=True))
    assert found["odi6"].count("1") <= found["cw20"].count("1")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_logits_of_any_scale_are_attacked(batch):
    """The cross entropy of such logits has no gradient; the margin has."""
    model, x, y = batch

    class Scaled(torch.nn.Module):
        def forward(self, x):
            return 2.0**30 * model(x)  # a power of two: no rounding

    assert flags(Scaled(), x, y, "odi3") == flags(model, x, y, "odi3")
    assert flags(Scaled(), x, y, "odi3").count("1") <= flags(Scaled(), x, y, "pgd20").count("1")


def test_wrong_rows_are_lost_and_no_budget_takes_none(batch):
    model, x, y = batch
    wrong = y.clone()
    wrong[:5] = (y[:5] + 1) % 10
    assert flags(model, x, wrong, "odi2").startswith("00000")
    assert flags(model, x, wrong, "odi2", eps=0.0) == "0" * 5 + "1" * 55


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    torch.manual_seed(0)
    x = torch.rand(40, 1, 8, 8)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
    y = model(x).argmax(1)
    found = judge(model, [(x, y)], ["odi4"], classes=classes, eps=0.05, step_size=0.1)["odi4"]
    w = model[1].weight.detach()
    z = model(x)
    margins = torch.stack([(z[i, y[i]] - z[i]) for i in range(40)])
    reach = torch.stack([0.05 * (w[y[i]] - w).abs().sum(1) for i in range(40)])
    beyond = ((margins >= reach) | (torch.arange(classes) == y[:, None])).all(1)  # of a linear model, but for [0, 1]
    assert all(flag == "1" for flag, kept in zip(found["correct"], beyond, strict=True) if kept)
    assert found["correct"].count("1") <= beyond.sum() + 4


class Blinded(engine.Engine):
    """Searches on a model that answers class 0 for half of the rows: for it they are lost already."""

    def forward(self, model, x):
        z = model(x)
        blind = torch.arange(len(x)) % 2 == 0
        return torch.where(blind[:, None], 0 * z + 9.0 * torch.eye(10)[0], z)


@pytest.mark.filterwarnings("ignore:model. odi4 had no gradient")
def test_what_the_form_searched_on_takes_for_lost_is_attacked_on_the_plain_one(batch):
    model, x, y = batch
    blinded = flags(model, x, y, "odi4", search=Blinded(device=torch.device("cpu")))
    plain = flags(model, x, y, "odi4")
    assert abs(blinded.count("1") - plain.count("1")) <= 3  # 30 more if they were left alone


def test_what_is_kept_names_the_attack_and_its_answers(batch):
    model, x, y = batch
    found = judge(model, [(x, y)], ["odi3"], classes=10, **HOW)["odi3"]
    assert found["settings"]["restarts"] == 3
    assert {"eps", "norm", "directed", "steps"} <= set(found["settings"])
    answers = torch.tensor([int(a) for a in found["answers"].split()])
    assert [a == b for a, b in zip(answers, y, strict=True)] == [flag == "1" for flag in found["correct"]]
    assert found["no_gradient"] == 0


@pytest.mark.parametrize("name", ["odi", "odi0", "odi1000", "odi3x"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"attacks: got '{name}'"):
        plans([name], eps=0.1, step_size=0.1, norm="linf")


def test_the_same_flags_again_and_from_python(batch):
    model, x, y = batch
    found = ham.evaluate(model, [(x, y)], ["odi2"], **HOW)["odi2"]
    assert found.accuracy == pytest.approx(flags(model, x, y, "odi2").count("1") / 60)
    assert not any(p.grad is not None for p in small_cnn().parameters())
