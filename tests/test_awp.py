"""Adversarial weight perturbation by hand; what an error, a skipped step and BatchNorm leave. The gated average."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import sgd, small_cnn
from torch.nn import functional as F

import ham_kernels as ham
from ham_kernels.common.troubles import HamWarning
from ham_kernels.methods.awp import perturbed
from ham_kernels.runs.settings import DataSettings, TrainSettings

ATTACK = {"eps": 0.2, "step_size": 0.05, "steps": 2}


@pytest.fixture
def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(24, 1, 8, 8, generator=g), torch.randint(0, 10, (24,), generator=g)


def test_one_update_by_hand(batch):
    """Ascent in train mode without moving BatchNorm, update there, back; weight decay acts on the perturbed weights."""
    x, y = batch
    model = small_cnn()
    twin = copy.deepcopy(model)
    trainer = ham.Trainer(model, sgd(model), ham.methods.PGDAT(start_epoch=1, awp=0.02), **ATTACK, seed=3)
    objective = ham.methods.Objective(trainer.method, trainer.phases.method.pgd)
    x_adv = objective.examples(twin, x, y, seed=3, step=0).x_adv
    trainer.train_step(x, y, epoch=1)

    proxy = copy.deepcopy(twin).train()
    F.cross_entropy(proxy(x_adv), y).backward()
    shifts = {}
    with torch.no_grad():
        for (name, p), q in zip(proxy.named_parameters(), twin.parameters(), strict=True):
            if "weight" in name and p.dim() > 1:
                shifts[name] = 0.02 * p.norm() / p.grad.norm() * p.grad
                q += shifts[name]
    assert len(shifts) > 1
    optimizer = sgd(twin)
    loss = F.cross_entropy(twin.train()(x_adv), y)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name in shifts:
                p -= shifts[name]
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_an_error_restores_the_weights_bit_by_bit(batch):
    x, y = batch
    model = small_cnn()
    trainer = ham.Trainer(model, sgd(model), ham.methods.TRADES(awp=0.3), **ATTACK)
    trainer.train_step(x, y, epoch=1)
    before = copy.deepcopy(model.state_dict())

    def fails(*_, **__):
        raise RuntimeError("in the step")

    trainer.optimizer.register_step_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in the step"):
        trainer.train_step(x, y, epoch=1)
    for name, b in model.state_dict().items():
        assert torch.equal(b, before[name]), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_shifts_nothing(bad):
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with perturbed(model, lambda ps: [torch.full_like(p, bad) for p in ps], 0.1):
        assert torch.equal(model.weight, before)
    with perturbed(model, lambda ps: [None for _ in ps], 0.1):
        assert torch.equal(model.weight, before)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_trains_in_every_precision(precision, batch):
    model = small_cnn()
    trainer = ham.Trainer(model, sgd(model), ham.methods.MART(awp=0.01), **ATTACK, precision=precision, ema_decay=0.5)
    for _ in range(3):
        assert 0 < trainer.train_step(*batch, epoch=1).loss < 100
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_loss_in_somebodys_loop_says_that_it_cannot(batch):
    with pytest.raises(ValueError, match=r"awp: got 0\.01; it acts around the optimiser's step"):
        ham.loss(ham.methods.TRADES(awp=0.01), small_cnn(), *batch, **ATTACK)


# ---------------------------------------------------------------- the gate
def gated(gate: float, worst: list[float], epochs: int):
    """Trained where the validation's worst class is told; (trainer, the average after each epoch, the model's)."""
    torch.manual_seed(0)
    model = small_cnn()
    trainer = ham.Trainer(model, sgd(model), ham.methods.PGDAT(start_epoch=1, gate=gate), **ATTACK, ema_decay=0.9)
    g = torch.Generator().manual_seed(1)
    data = [(torch.rand(24, 1, 8, 8, generator=g), torch.randint(0, 10, (24,), generator=g)) for _ in range(3)]

    class Judged:
        def __init__(self, worst):
            self.accuracy, self.worst_class = worst, worst

    trainer.judged = lambda *_: {"clean": Judged(1.0), "pgd20": Judged(worst[trainer.epoch])}
    seen = []
    trainer.fit(data, epochs, val_loader=data, on_epoch_end=lambda _: seen.append(states(trainer)))
    return trainer, seen


def states(trainer):
    return [{k: v.clone() for k, v in m.state_dict().items()} for m in (trainer.ema_model, trainer.model)]


def equal(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


def test_the_gate_opens_and_closes():
    trainer, seen = gated(0.3, [0.1, 0.4, 0.2, 0.3], 4)
    (ema1, model1), (ema2, model2), (ema3, model3), (ema4, _) = seen
    assert equal(ema1, model1)  # closed at first: the average is the model, and not the weights of the start
    assert equal(ema2, model2)
    assert not equal(ema3, model3)  # opened by epoch 2
    assert not equal(ema3, ema2)
    assert equal(ema4, ema3)  # closed by epoch 3
    assert trainer.average.updates == 3


def test_without_a_gate_all_updates_enter():
    trainer, _ = gated(0.0, [0.0, 0.0], 2)
    assert trainer.average.updates == 6


def test_a_gate_that_never_opens_is_told():
    with pytest.warns(HamWarning, match=r"gate: is 0\.3, which the worst .* not reach in 3 epochs \(at most 0\.2\)"):
        trainer, _ = gated(0.3, [0.1, 0.2, 0.0], 3)
    assert trainer.average.updates == 0


def test_a_gate_needs_validation_images():
    model = small_cnn()
    trainer = ham.Trainer(model, sgd(model), ham.methods.CFA(), **ATTACK, ema_decay=0.5)
    with pytest.warns(HamWarning, match=r"gate: is 0\.2, and there are no validation images"):
        trainer.fit([(torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,)))] * 3, epochs=1)
    settings = TrainSettings(data=DataSettings(val_images=0), method=ham.methods.CFA())
    with pytest.raises(ValueError, match=r"gate: got 0\.2 with val_images=0"):
        settings.check()


def test_a_course_too_short_for_its_classes():
    model = small_cnn()
    trainer = ham.Trainer(model, sgd(model), ham.methods.DAFA(), **ATTACK)
    with pytest.warns(HamWarning, match="class_from: is 71, and DAFA ends with epoch 1"):
        trainer.fit([(torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,)))], epochs=1)
    with pytest.raises(ValueError, match="class_from: got 200 with epochs=120"):
        TrainSettings(method=ham.methods.DAFA(class_from=200)).check()


def test_weights_that_the_step_leaves_alone_come_back_bit_by_bit(batch):
    model = small_cnn()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(list(model.parameters())[-1:], 0.1)
    trainer = ham.Trainer(model, optimizer, ham.methods.PGDAT(start_epoch=1, awp=0.3), **ATTACK)
    trainer.train_step(*batch, epoch=1)
    for name, p in list(model.named_parameters())[:-1]:
        assert torch.equal(p, before[name]), name


def test_nothing_to_perturb(batch):
    """Biases and BatchNorm alone are trained; or the gradient is zero, in fp16 too."""
    model = small_cnn()
    for p in model.parameters():
        p.requires_grad_(p.dim() == 1)
    trainer = ham.Trainer(model, sgd(model), ham.methods.PGDAT(start_epoch=1, awp=0.01), **ATTACK)
    assert trainer.train_step(*batch, epoch=1).loss > 0
    half = torch.nn.Linear(3, 2).half()
    weight = half.weight.detach().clone()
    with perturbed(half, lambda ps: [torch.zeros_like(p) for p in ps], 0.1):
        assert torch.equal(half.weight, weight)
