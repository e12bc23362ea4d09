"""Loss and gradients are judged before a step; where anything raises, all is as after the last good step."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from nets import sgd, small_cnn
from torch import nn

import ham_kernels as ham
from ham_kernels.training.ema import WeightAverage

HOW = {"eps": 0.1, "step_size": 0.03, "steps": 3, "screen_steps": 1, "start_epoch": 1}


@pytest.fixture
def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(24, 1, 8, 8, generator=g), torch.randint(0, 10, (24,), generator=g)


class BadBackward(torch.autograd.Function):
    """The identity on weights, whose gradient is `value` where `when` says so."""

    @staticmethod
    def forward(ctx, w, model):
        ctx.model = model
        return w.clone()

    @staticmethod
    def backward(ctx, grad):
        return (torch.full_like(grad, ctx.model.value) if ctx.model.bad else grad), None


class Faulty(nn.Module):
    """A forward that counts and replaces buffers; its weight gradient is bad where told, its loss is not."""

    def __init__(self, value: float):
        super().__init__()
        self.net, self.scale, self.bad, self.value = small_cnn(), nn.Parameter(torch.ones(10)), False, value
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.seen += 1
        self.mean = 0.9 * self.mean + x.mean()
        return self.net(x) * BadBackward.apply(self.scale, self)


def state_of(trainer) -> dict:
    return copy.deepcopy(trainer.state_dict())


def assert_same(a, b, where="state"):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (p, q) in enumerate(zip(a, b, strict=True)):
            assert_same(p, q, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", [ham.methods.HAM(), ham.methods.TRADES(early_drop=True, easy="jump")], ids=str)
def test_a_finite_loss_with_a_bad_gradient_makes_no_step(value, method, batch):
    model = Faulty(value)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer = ham.Trainer(model, optimizer, method, eps=0.1, step_size=0.03, steps=4, ema_decay=0.9)
    trainer.train_step(*batch, epoch=1)
    before = state_of(trainer)
    model.bad = True
    with pytest.raises(ham.NonFiniteError, match=r"model: the gradient of the training loss \([\d.]+\) is NaN or inf"):
        trainer.train_step(*batch, epoch=1)
    assert_same(state_of(trainer), before)
    assert all(p.grad is None for p in model.parameters())
    model.bad = False
    trainer.train_step(*batch, epoch=1)  # and it goes on
    assert trainer.steps_done == 2


def test_a_large_gradient_is_no_bad_one(batch):
    """Its norm overflows in fp32, none of its entries does."""
    model = Faulty(1e30)
    trainer = ham.HAMTrainer(model, torch.optim.SGD(model.parameters(), 1e-32), **HOW)
    model.bad = True
    trainer.train_step(*batch, epoch=1)
    assert trainer.steps_done == 1


@pytest.mark.parametrize("when", ["attack", "update"])
def test_buffers_are_as_before_an_error(when, batch):
    model = Faulty(0.0)
    trainer = ham.HAMTrainer(model, sgd(model), **HOW)
    trainer.train_step(*batch, epoch=1)
    before = state_of(trainer)
    forwards = 0

    def fail(module, inputs):
        nonlocal forwards
        forwards += 1
        if forwards == 2 or (when == "update" and module.training):
            if when == "update" and not module.training:
                return
            raise RuntimeError("a forward of its own")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a forward of its own"):
        trainer.train_step(*batch, epoch=1)
    assert_same(state_of(trainer), before)


def test_nothing_to_train_is_an_error(batch):
    for freeze in (lambda m: m.requires_grad_(False), lambda m: m[-1].requires_grad_(False)):
        model = small_cnn()
        trainer = ham.HAMTrainer(model, torch.optim.SGD(model[-1].parameters(), 0.1), **HOW)
        freeze(model)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="optimizer: none of its parameters got a gradient"):
            trainer.train_step(*batch, epoch=1)
        assert_same(dict(model.state_dict()), dict(before))


# ---------------------------------------------------------------- modes
class Tuned(nn.Module):
    """A backbone that a train() of the model's own keeps in eval mode."""

    def __init__(self, own_train: bool):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Sequential(nn.Flatten(), nn.Linear(288, 10))
        self.own_train = own_train
        self.train()
        self.backbone.eval()

    def train(self, mode=True):
        super().train(mode)
        if getattr(self, "own_train", False):
            self.backbone.eval()
        return self

    def forward(self, x):
        return self.head(self.norm(self.backbone(x)))


@pytest.mark.parametrize("own_train", [True, False])
@pytest.mark.parametrize("judged_between", [False, True])
@pytest.mark.parametrize("freeze_bn", [False, True])
def test_a_layer_kept_in_eval_mode_is_never_trained(own_train, judged_between, freeze_bn, batch):
    model = Tuned(own_train)
    trainer = ham.HAMTrainer(model, sgd(model), **HOW, freeze_bn=freeze_bn)
    modes = []
    model.backbone.register_forward_hook(lambda m, *_: modes.append({layer.training for layer in m.modules()}))
    frozen, free = (model.backbone[1].running_mean.clone(), model.norm.running_mean.clone())
    for epoch in (1, 2):
        if judged_between:
            model.eval()  # a user's evaluation that forgets to go back
        trainer.train_step(*batch, epoch=epoch)
    assert set(map(frozenset, modes)) == {frozenset({False})}
    assert torch.equal(model.backbone[1].running_mean, frozen)
    assert torch.equal(model.norm.running_mean, free) is freeze_bn


def test_a_model_in_eval_mode_as_a_whole_is_trained(batch):
    model = small_cnn().eval()
    before = copy.deepcopy(dict(model.named_buffers()))
    ham.HAMTrainer(model, sgd(model), **HOW).train_step(*batch, epoch=1)
    assert not model.training
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers())


# ---------------------------------------------------------------- the weight average
def test_the_average_forgets_its_start():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.999)
    start = model.weight.detach().clone()
    share = 1.0  # of the start in the average
    for t in range(1, 101):
        with torch.no_grad():
            model.weight += 1.0
        average.update(model)
        share *= min(0.999, (1 + t) / (10 + t))
    assert share < 1e-8
    assert (average.model.weight - start).min() > 85  # about the last tenth of 100 updates
    slow = WeightAverage(model, 0.5)
    for _ in range(30):
        slow.update(model)
    assert slow.updates == 30
    torch.testing.assert_close(slow.model.weight, model.weight)


def test_the_average_goes_on_bit_by_bit(batch):
    def trainer():
        model = small_cnn()
        return ham.HAMTrainer(model, sgd(model), **HOW, ema_decay=0.95)

    whole, first, second = trainer(), trainer(), trainer()
    for _ in range(4):
        whole.train_step(*batch, epoch=1)
    for _ in range(2):
        first.train_step(*batch, epoch=1)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.train_step(*batch, epoch=1)
    assert_same(dict(whole.ema_model.state_dict()), dict(second.ema_model.state_dict()))


def test_a_state_of_before_keeps_its_plain_decay(batch):
    model = small_cnn()
    trainer = ham.HAMTrainer(model, sgd(model), **HOW, ema_decay=0.95)
    state = trainer.state_dict()
    del state["ema_updates"]
    trainer.load_state_dict(state)
    before = [p.clone() for p in trainer.ema_model.parameters()]
    trainer.train_step(*batch, epoch=1)
    for old, new, average in zip(before, model.parameters(), trainer.ema_model.parameters(), strict=True):
        torch.testing.assert_close(average, 0.95 * old + 0.05 * new.detach())


def test_a_training_too_short_for_its_average_is_told(batch):
    model = small_cnn()
    trainer = ham.HAMTrainer(model, sgd(model), **HOW, ema_decay=0.99)
    with pytest.warns(UserWarning, match="ema_decay: 0.99 averages over about 100 updates, and .* has 2"):
        trainer.fit([batch], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = ham.HAMTrainer(m := small_cnn(), sgd(m), **HOW, ema_decay=0.5)
        other.fit([batch], 2)


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_cnn()
        self.register_buffer("shift", torch.tensor([0.1]).expand(8).view(1, 1, 1, 8))

    def forward(self, x):
        return self.net(x - self.shift)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_models_that_are_hard_to_copy_are_averaged(batch):
    normed = small_cnn()
    nn.utils.weight_norm(normed[-1])
    parametrized = small_cnn()
    nn.utils.parametrizations.weight_norm(parametrized[-1])
    for model in (normed, parametrized, Shifted()):
        trainer = ham.HAMTrainer(model, sgd(model), **HOW, ema_decay=0.9)
        trainer.train_step(*batch, epoch=1)
        x = batch[0][:4]
        model.eval()
        assert torch.allclose(trainer.ema_model(x), model(x), atol=1.0)
        assert not torch.equal(trainer.ema_model(x), model(x))


class Uncopied(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_cnn()

    def __deepcopy__(self, memo):
        raise TypeError("holds a socket")

    def forward(self, x):
        return self.net(x)


def test_a_model_that_cannot_be_averaged_is_refused_before_the_first_step():
    model = Uncopied()
    with pytest.raises(ValueError, match=r"ema_decay: this model cannot be averaged \(TypeError: holds a socket\)"):
        ham.HAMTrainer(model, sgd(model), ema_decay=0.9)


def test_a_trainer_can_be_pickled(batch):
    model = small_cnn()
    trainer = ham.HAMTrainer(model, sgd(model), **HOW, ema_decay=0.9, group=2)
    trainer.train_step(*batch, epoch=1)
    twin = pickle.loads(pickle.dumps(trainer))
    for t in (trainer, twin):
        t.train_step(*batch, epoch=1)
    assert_same(state_of(trainer)["model"], state_of(twin)["model"])


# ---------------------------------------------------------------- schedulers, scalers
def test_a_scheduler_of_a_metric_is_refused_before_the_first_batch(batch):
    model = small_cnn()
    trainer = ham.HAMTrainer(model, optimizer := sgd(model), **HOW)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(TypeError, match="scheduler: is a ReduceLROnPlateau"):
        trainer.fit([batch], 1, scheduler=plateau)
    assert (trainer.epoch, trainer.steps_done) == (0, 0)
    trainer.fit([batch], 2, on_epoch_end=lambda report: plateau.step(report.loss))
    assert trainer.epoch == len(trainer.history) == 2


def test_a_loss_without_a_hard_row_passes_a_scaler(batch):
    x, _ = batch
    model = small_cnn()
    with torch.no_grad():
        model[-1].bias[0] = 50.0
    y = torch.zeros(len(x), dtype=torch.int64)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        loss = ham.ham_loss(model, x, y, eps=0.01, step_size=0.01, steps=3, screen_steps=1)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert loss.item() == 0.0


# ---------------------------------------------------------------- several processes
def test_processes_that_nothing_joins_are_refused(batch, monkeypatch, capsys):
    from ham_kernels.commands.cli import main

    model = small_cnn()
    monkeypatch.setenv("WORLD_SIZE", "4")
    for call in (
        lambda: ham.HAMTrainer(model, sgd(model)),
        lambda: ham.ham_loss(model, *batch),
        lambda: ham.loss(ham.methods.TRADES(), model, *batch),
        lambda: ham.evaluate(model, [batch]),
    ):
        with pytest.raises(ValueError, match="WORLD_SIZE: is 4, and the processes are not joined"):
            call()
    for command in (["report", "somewhere"], ["export", "somewhere"], ["train", "--dry-run"]):
        assert main(command) == 2
        assert "WORLD_SIZE: is 4" in capsys.readouterr().err
    assert torch.isfinite(ham.ham_loss(model, *batch, group=None))
    assert ham.evaluate(model, [batch], ("clean",), group=None)["clean"].n == len(batch[1])
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert torch.isfinite(ham.ham_loss(model, *batch))
