"""Class offsets: the reference's updates, what they reach, what they leave alone, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from nets import sgd, small_cnn
from torch import nn

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD
from ham_kernels.distributed import Ranks
from ham_kernels.methods import Objective, Offsets
from ham_kernels.methods.offsets import last_bias
from ham_kernels.runs.presets import preset
from ham_reference import Offsets as Reference

CLASSES = 5
L2 = {"eps": 0.6, "step_size": 0.2, "steps": 4, "norm": "l2"}
pytestmark = pytest.mark.usefixtures("one_thread")


def smooth_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.Linear(6 * 36, CLASSES)
    )  # fmt: skip


class Points(nn.Module):
    """Logits that are the first pixels, and offsets."""

    def __init__(self, classes: int):
        super().__init__()
        self.head = nn.Linear(classes, classes)
        self.head.weight.data.copy_(torch.eye(classes))
        self.head.bias.data.zero_()

    def forward(self, x):
        return self.head(x.flatten(1)[:, : self.head.out_features])


@pytest.fixture
def batches(seed):
    """The third has no row of the last class."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(30, 1, 6, 6, generator=g), torch.randint(0, CLASSES - (i == 2), (30,), generator=g))
        for i in range(7)
    ]


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_same_updates_as_the_reference(floor, optimizer, batches):
    """Neither the optimiser nor its rate matters."""
    model = smooth_net()
    made = sgd(model) if optimizer == "sgd" else torch.optim.AdamW(model.parameters(), lr=0.3, weight_decay=0.5)
    trainer = ham.Trainer(model, made, Offsets(floor=floor), **L2, seed=5)
    twin = copy.deepcopy(model)
    reference = Reference(twin[-1].bias.detach(), **L2, floor=floor)
    untouched = {name: value.clone() for name, value in model.state_dict().items() if name != "4.bias"}
    kept = 0
    for x, y in batches:
        _, least_margin = copy.deepcopy(reference).step(twin, x, y, 5, trainer.steps_done)
        if least_margin < 1e-5:  # rounding may decide whether a row is right
            continue
        kept += 1
        loss, _ = reference.step(twin, x, y, 5, trainer.steps_done)
        # margins are rounded to 1e-7, and divided by a width of some 0.02; prices multiply what that leaves
        assert trainer.train_step(x, y, 1).loss == pytest.approx(loss, abs=3e-5)
        torch.testing.assert_close(model[-1].bias.detach(), reference.bias, rtol=0, atol=1e-5)
        prices = trainer.phases.method.class_prices
        torch.testing.assert_close(prices, torch.tensor(reference.prices), rtol=0, atol=2e-6)
    assert kept >= 4
    for name, value in untouched.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_no_class_stays_behind():
    """Of three classes alike, offsets have taken most from one: they go back."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 3
    x = 0.5 + 0.1 * torch.randn(600, 1, 2, 2, generator=g)
    x[torch.arange(600), 0, y // 2, y % 2] += 0.12  # a class is told by its pixel, if not by far
    x = x.clamp(0, 1)

    def shares(model) -> list[float]:
        found = ham.evaluate(model, [(x, y)], ("pgd10",), eps=0.02, step_size=0.005)["pgd10"]
        return [float(share) for share in found.per_class]

    model = Points(3)
    model.head.bias.data.copy_(torch.tensor([0.15, 0.0, -0.25]))
    begun = shares(model)
    assert begun[2] < 0.2
    trainer = ham.Trainer(model, sgd(model), Offsets(), eps=0.02, step_size=0.005, steps=4, ema_decay=0.99)
    for epoch in range(1, 5):
        for i in range(0, 600, 60):
            trainer.train_step(x[i : i + 60], y[i : i + 60], epoch)
    reached = shares(trainer.ema_model)
    mean = sum(reached) / 3
    assert min(reached) >= 0.5 * mean
    assert mean > sum(begun) / 3 + 0.02
    assert trainer.phases.method.class_prices.max() < 1


def test_a_floor_of_all_makes_classes_alike():
    g = torch.Generator().manual_seed(1)
    y = torch.arange(600) % 3
    x = 0.5 + 0.1 * torch.randn(600, 1, 2, 2, generator=g)
    x[torch.arange(600), 0, y // 2, y % 2] += torch.tensor([0.3, 0.15, 0.02])[y]
    x = x.clamp(0, 1)
    spread = {}
    for floor in (0.0, 1.0):
        model = Points(3)
        trainer = ham.Trainer(model, sgd(model), Offsets(floor=floor), eps=0.02, step_size=0.005, steps=4)
        for step in range(60):
            rows = slice(60 * (step % 10), 60 * (step % 10 + 1))
            trainer.train_step(x[rows], y[rows], 1 + step // 10)
        found = ham.evaluate(model, [(x, y)], ("pgd10",), eps=0.02, step_size=0.005)["pgd10"]
        spread[floor] = float(max(found.per_class) - min(found.per_class))
    assert 2 * spread[1.0] < spread[0.0]


def test_a_batch_that_nothing_resists_or_that_is_of_one_logit(batches):
    model = smooth_net()
    nn.init.zeros_(model[-1].weight)
    trainer = ham.Trainer(model, sgd(model), Offsets(), **{**L2, "eps": 0.0, "step_size": 0.0})
    with pytest.warns(ham.HamWarning):
        trainer.train_step(*batches[0], 1)
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_update_that_fails_moves_nothing(batches):
    model = smooth_net()
    trainer = ham.Trainer(model, sgd(model), Offsets(), **L2)
    trainer.train_step(*batches[0], 1)
    before = model[-1].bias.detach().clone()
    x, y = batches[1]
    with pytest.raises(ValueError, match="x: "):
        trainer.train_step(x.masked_fill(x > 0.9, torch.nan), y, 1)
    assert torch.equal(model[-1].bias, before)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize("switch", [
    {"early_drop": True}, {"reweight": True}, {"freeze_bn": True}, {"loss": "boosted_ce"}, {"label_smoothing": 0.1},
    {"class_weights": "hedge"}, {"awp": 0.01}, {"gate": 0.1},
])  # fmt: skip
def test_switches_without_a_meaning(switch):
    (name,) = switch
    with pytest.raises(ValueError, match=f"{name}: got .*class offsets move the last biases alone"):
        Offsets(**switch)


def test_a_model_without_such_a_bias(batches):
    known = small_cnn()
    assert last_bias(known, 10) is list(known.parameters())[-1]
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES, bias=False))
    trainer = ham.Trainer(model, sgd(model), Offsets(), **L2)
    with pytest.raises(ValueError, match="model: class offsets need a last linear layer with a bias for each of its 5"):
        trainer.train_step(*batches[0], 1)


def test_fp16_scales_what_it_steps_by(batches):
    model = smooth_net()
    objective = Objective(Offsets(), PGD(**L2))
    made = objective.examples(model, *batches[0], seed=1, step=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert objective.loss(model, made).isfinite()
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="precision: got 'fp16'"):
        objective.loss(model, made)


def test_no_training_from_the_start():
    with pytest.raises(ValueError, match="method: got 'offsets', which trains no model from the start; give --from"):
        replace(preset("digits"), method=Offsets()).check()


def test_neither_a_loss_alone_nor_several_processes(batches):
    with pytest.raises(ValueError, match="method: got 'offsets'; it replaces the optimiser's step"):
        ham.loss(Objective(Offsets(), PGD(**L2)), smooth_net(), *batches[0])
    several = Ranks(0, 2, None)
    with pytest.raises(ValueError, match="method: got 'offsets' on several processes"):
        Objective(Offsets(), PGD(**L2), ranks=several)
