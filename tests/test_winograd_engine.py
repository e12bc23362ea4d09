"""The engine's Winograd option: whom it serves, what it leaves behind, and that training stays the reference's."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from engine_helpers import (
    CPU,
    Compiler,
    assert_reference,
    assert_same_model,
    engine_warnings,
    ragged_batches,
    trainer_of,
)
from nets import Broken, Counting, sgd
from torch import nn
from torch.nn.utils import prune

from ham_kernels.engine import Engine, EngineError, EngineOptions, EngineWarning, winograd
from ham_kernels.ops.winograd import status

needs_library = pytest.mark.skipif(status()[0] is None, reason=status()[1])


@pytest.fixture(scope="module")
def batches():
    return ragged_batches()


def net(seed: int = 0) -> nn.Module:
    """A layer that it serves with a bias, one without, and between them layers that it does not.

    No ReLU: behind dead ones gradients of digits are exactly zero, where Winograd's are rounding noise with a sign.
    """
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 32, 3, padding="same", bias=False),
        nn.BatchNorm2d(32),
        nn.SiLU(),
        nn.Conv2d(32, 16, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def served(model: nn.Module) -> list[str]:
    layers = {id(layer.conv) for layer in winograd.WinogradLayers(model).layers}
    return [name for name, m in model.named_modules() if id(m) in layers]


@pytest.fixture
def calls(monkeypatch):
    """Counts what runs by Winograd's algorithm."""
    seen = []
    own = winograd._Layer.forward

    def forward(self, x):
        seen.append(tuple(x.shape))
        return own(self, x)

    monkeypatch.setattr(winograd._Layer, "forward", forward)
    return seen


# ---------------------------------------------------------------- whom it serves
def test_layers_that_it_serves():
    assert served(net()) == ["3", "5"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    "change",
    [
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": (3, 1)},
        {"stride": 2},
        {"stride": (1, 2)},
        {"dilation": 2, "padding": 2},
        {"dilation": 2},
        {"dilation": 2, "padding": "same"},
        {"in_channels": 0},
        {"padding": 0},
        {"padding": "valid"},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"in_channels": 24},
        {"out_channels": 24},
        {"dtype": torch.float64},
        {"device": "meta"},
    ],
    ids=str,
)
def test_layers_that_it_leaves_alone(change):
    given = {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1}
    assert served(nn.Sequential(nn.Conv2d(**given))) == ["0"]
    assert served(nn.Sequential(nn.Conv2d(**given | change))) == []


def test_layers_with_a_forward_of_their_own_are_left_alone():
    class Mine(nn.Conv2d):
        pass

    patched = nn.Conv2d(16, 16, 3, padding=1)
    patched.forward = lambda x: x
    assert served(nn.Sequential(Mine(16, 16, 3, padding=1), patched)) == []
    before = patched.forward
    with winograd.WinogradLayers(nn.Sequential(patched)).in_place():
        pass
    assert patched.forward is before


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ],
    ids=["parametrized", "weight_norm", "spectral_norm", "pruned"],
)
def test_weights_that_each_forward_makes_anew_are_left_alone(norm):
    assert served(nn.Sequential(norm(nn.Conv2d(16, 16, 3, padding=1)))) == []


@needs_library
@pytest.mark.parametrize(
    ("shape", "runs", "suits"),
    [
        ((8, 4, 4), True, True),
        ((7, 4, 4), False, True),  # too few tiles
        ((64, 2, 2), False, False),  # a quarter of the tile
        ((64, 5, 5), False, False),  # 25 of 64 pixels
        ((64, 7, 7), True, True),
        ((2, 32, 32), True, True),
    ],
)
def test_images_that_pay(shape, runs, suits, monkeypatch):
    n, h, w = shape
    conv = nn.Conv2d(16, 16, 3, padding=1)
    layers = winograd.WinogradLayers(nn.Sequential(conv))
    x = torch.randn(n, 16, h, w)
    expected = conv(x)
    with layers.in_place():
        y = conv(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(y, expected) is not runs
    assert layers.layers[0].suits is suits
    assert (layers.problem is None) is suits


# ---------------------------------------------------------------- training
@needs_library
@pytest.mark.parametrize(
    "choices", [{}, {"norm": "l2", "eps": 1.0, "step_size": 0.25}, {"freeze_bn": True, "ema_decay": 0.9}], ids=str
)
@pytest.mark.parametrize("options", [{}, {"channels_last": True}], ids=["", "channels_last"])
def test_training_is_the_reference(batches, choices, options, calls):
    model = net()
    twin = copy.deepcopy(model)
    ours = trainer_of(model, winograd="require", **options, **choices)
    assert_reference(ours, twin, batches[:3], choices, step_by_step=True)
    assert len(calls) > 100
    assert ours.engine.active["winograd"] is True


@needs_library
def test_attack_and_update_both_use_it_with_the_weights_of_the_moment(batches, calls):
    model = net()
    ours, theirs = trainer_of(model, winograd="require"), trainer_of(copy.deepcopy(model))
    x, y = batches[0]
    ours.train_step(x, y, epoch=1)
    assert len(calls) == 2 * (5 + 1)  # two layers; five steps of the attack and the update
    theirs.train_step(x, y, epoch=1)
    for trainer in (ours, theirs):
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.data.mul_(0.7)  # behind the back of version counters
    a, b = ours.train_step(x, y, epoch=2), theirs.train_step(x, y, epoch=2)
    assert a.n_hard == b.n_hard
    assert a.loss == pytest.approx(b.loss, rel=1e-4)
    ours.model.load_state_dict(net(1).state_dict())
    theirs.model.load_state_dict(net(1).state_dict())
    a, b = ours.train_step(x, y, epoch=1), theirs.train_step(x, y, epoch=1)
    assert a.loss == pytest.approx(b.loss, rel=1e-4)


@needs_library
def test_another_model_and_moved_weights(batches):
    ours = trainer_of(net(), winograd="require")
    ours.train_step(*batches[0], epoch=1)
    other = net(1)
    theirs = trainer_of(copy.deepcopy(other), seed=0)
    ours.model, ours.optimizer, ours.steps_done = other, sgd(other), 0
    assert ours.train_step(*batches[0], epoch=1).loss == pytest.approx(
        theirs.train_step(*batches[0], epoch=1).loss, rel=1e-4
    )
    for trainer in (ours, theirs):
        with torch.no_grad():
            trainer.model[5].weight = nn.Parameter(trainer.model[5].weight * 0.5)
    assert ours.train_step(*batches[0], epoch=1).loss == pytest.approx(
        theirs.train_step(*batches[0], epoch=1).loss, rel=1e-4
    )


@needs_library
def test_bf16(batches, monkeypatch, calls):
    """Weights stay in fp32 for it, images and gradients are bf16: as near to fp32 as bf16 is without it."""
    monkeypatch.setattr("ham_kernels.engine.engine.half_problem", lambda *_: None)
    trainers = [
        trainer_of(net(), precision="bf16", winograd="require"), trainer_of(net(), precision="bf16"), trainer_of(net()),
    ]  # fmt: skip
    for epoch in (1, 1, 2, 2):
        for x, y in batches[:2]:
            a, _, c = (t.train_step(x, y, epoch=epoch) for t in trainers)
            assert abs(a.n_hard - c.n_hard) <= 5
            assert a.loss == pytest.approx(c.loss, rel=0.02)
    assert calls


@needs_library
def test_it_costs_no_forward(batches):
    counting = Counting(net())
    trainer = trainer_of(counting, winograd="require")
    trainer.train_step(*batches[0], epoch=1)
    assert counting.full_batch_forwards(64) == 2 * 5 + 3


@pytest.mark.slow
@needs_library
def test_it_is_compiled_once(batches, monkeypatch):
    """Its forwards are put in and taken out for every batch; what was compiled with them serves for good."""
    compiler = Compiler().install(monkeypatch)
    model = net()
    twin = copy.deepcopy(model)
    ours = trainer_of(model, compile="require", winograd="require")
    assert_reference(ours, twin, batches[:4], step_by_step=True)
    assert compiler.compiled == 2


# ---------------------------------------------------------------- what it leaves behind
@needs_library
def test_nothing_of_it_stays_in_the_model(batches):
    model = Broken(net(), lambda z: z * float("nan"), after=4)
    trainer = trainer_of(model, winograd="require")
    with pytest.raises(ValueError, match="loss is nan"):
        trainer.train_step(*batches[0], epoch=1)
    assert all("forward" not in vars(m) for m in model.modules())
    pickle.loads(pickle.dumps(net()))
    engine = copy.deepcopy(trainer.engine)
    assert engine.active == trainer.engine.active


@needs_library
def test_nothing_of_it_stays_after_an_error_inside(batches):
    def fail(z):
        raise RuntimeError("mine")

    for after in (2, 5):  # in the attack, in the update
        model = Broken(net(), fail, after=after)
        trainer = trainer_of(model, winograd="require")
        with pytest.raises(RuntimeError, match="mine"):
            trainer.train_step(*batches[0], epoch=1)
        assert all("forward" not in vars(m) for m in model.modules())


@needs_library
def test_another_model_of_the_same_tensors():
    """Two models may share every parameter and buffer: what is made for one holds its layers, not the other's."""
    one, two = net(), net()
    for a, b in zip(one.modules(), two.modules(), strict=True):
        b._parameters, b._buffers = a._parameters, a._buffers
    engine = Engine(EngineOptions(winograd="require"), CPU)
    for model, other in ((one, two), (two, one), (one, two)):
        with engine.attacking(model):
            assert "forward" in vars(model[3])
            assert "forward" not in vars(other[3])


@needs_library
@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_it_takes_and_gives_bf16(bias, monkeypatch):
    """As torch's convolution does: images are rounded first, and what comes out is bf16, bias and all."""
    seen = []
    own = torch.ops.ham_kernels.winograd
    monkeypatch.setattr(torch.ops.ham_kernels, "winograd", lambda x, *rest: seen.append(x.dtype) or own(x, *rest))
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=bias)
    x = torch.randn(8, 16, 8, 8)
    with winograd.WinogradLayers(nn.Sequential(conv)).in_place(), torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    assert seen == [torch.bfloat16]
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(y, conv(x), rtol=2e-2, atol=2e-2)


@needs_library
def test_other_images_run_as_they_did():
    conv = nn.Conv2d(16, 16, 3, padding=1)
    layers = winograd.WinogradLayers(nn.Sequential(conv))
    three = torch.randn(16, 8, 8).repeat(1, 2, 2)
    with layers.in_place():
        assert torch.equal(conv(three), nn.Conv2d.forward(conv, three))
        assert layers.layers[0].suits is False
        conv(three[None])
        assert layers.layers[0].suits is True
        with pytest.raises(RuntimeError, match="type"):  # torch's own words
            conv(three[None].double())
    assert layers.layers[0].suits is False


@needs_library
def test_evaluation_and_attacks_elsewhere_do_not_use_it(batches, calls):
    trainer = trainer_of(net(), winograd="require", ema_decay=0.9)
    trainer.train_step(*batches[0], epoch=1)
    del calls[:]
    trainer.model(batches[0][0])
    trainer.ema_model(batches[0][0])
    assert not calls


# ---------------------------------------------------------------- refused
def attacked_twice(wanted, options: dict, device, model) -> Engine:
    engine = Engine(EngineOptions(winograd=wanted, **options), device)
    for _ in range(0 if model is None else 2):
        with engine.attacking(model):
            pass
    return engine


def gives_up(reason: str, options: dict, device=CPU, model=None):
    """Required: an error. On: one warning that names the reason, and going on without it."""
    with pytest.raises(EngineError, match=f"winograd: was required, but {reason}"):
        attacked_twice("require", options, device, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EngineWarning)
        engine = attacked_twice(True, options, device, model)
    (message,) = engine_warnings(caught)
    assert message.startswith("winograd: ")
    assert engine.active["winograd"] is False


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_other_devices(device):
    gives_up(f"the model is on {device}", {}, torch.device(device))


@pytest.mark.parametrize("precision", ["fp16", "require-fp16"])
def test_fp16(precision, monkeypatch):
    monkeypatch.setattr("ham_kernels.engine.engine.half_problem", lambda *_: None)
    gives_up("it takes images in fp32 or bf16", {"precision": precision})


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(winograd, "status", lambda: (None, "_cpu.so is not there"))
    gives_up("_cpu.so is not there", {})


@needs_library
def test_a_model_without_such_a_layer():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(16, 2))
    gives_up("the model has no 3x3 convolution", {}, model=model)


@needs_library
def test_a_model_whose_images_are_too_small_there():
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    engine = Engine(EngineOptions(winograd="require"), CPU)
    for rows, side in ((1, 4), (64, 5)):  # too few rows are no reason; the images are
        with engine.attacking(model):
            model(torch.rand(rows, 1, side, side))
    with pytest.raises(EngineError, match="winograd: was required, but the images at the model's 3x3"):
        engine.attacking(model).__enter__()


@needs_library
def test_one_layer_that_suits_is_enough():
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.MaxPool2d(4),
        nn.Conv2d(16, 16, 3, padding=1),
    )
    engine = Engine(EngineOptions(winograd="require"), CPU)
    for _ in range(2):
        with engine.attacking(model):
            model(torch.rand(8, 1, 8, 8))
            assert "forward" in vars(model[1])


def test_an_engine_of_no_device_judges_by_the_model(monkeypatch):
    monkeypatch.setattr(winograd, "status", lambda: (None, "_cpu.so is not there"))
    gives_up("_cpu.so is not there", {}, device=None, model=net())


def test_an_engine_of_no_device_in_fp16():
    gives_up("it takes images in fp32 or bf16", {"precision": "fp16"}, device=None, model=net())


def test_what_is_given_up_is_not_in_place(monkeypatch):
    monkeypatch.setattr(winograd, "status", lambda: (None, "_cpu.so is not there"))
    model = net()
    with pytest.warns(EngineWarning, match="not there"), Engine(EngineOptions(winograd=True)).attacking(model):
        assert all("forward" not in vars(m) for m in model.modules() if isinstance(m, nn.Conv2d))


@needs_library
def test_the_same_layers_twice_at_once():
    """The inner one leaves what the outer one has put in place."""
    model = net()
    layers = winograd.WinogradLayers(model)
    with layers.in_place():
        with layers.in_place():
            pass
        assert model[3].forward == layers.layers[0].forward
    assert "forward" not in vars(model[3])


@needs_library
def test_models_that_change_their_activations_in_place(batches):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))

        def forward(self, x):
            out = self.second(torch.relu_(self.first(x)))
            out += x
            return out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), Block(), nn.Flatten(), nn.Linear(1024, 10))
    ours, theirs = trainer_of(model, winograd="require"), trainer_of(copy.deepcopy(model))
    for epoch in (1, 2):
        a, b = (t.train_step(*batches[0], epoch=epoch) for t in (ours, theirs))
        assert a.loss == pytest.approx(b.loss, rel=0.02)  # ReLUs: see net


@pytest.mark.parametrize("value", ["fast", None, 2])
def test_values_that_are_no_choice(value):
    with pytest.raises((TypeError, ValueError), match="winograd"):
        EngineOptions(winograd=value)


@needs_library
def test_a_model_as_it_was_after_a_refusal(batches):
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(512, 10))
    twin = copy.deepcopy(model)
    with pytest.warns(EngineWarning, match="no 3x3 convolution"):
        trainer_of(model, winograd=True).train_step(*batches[0], epoch=1)
    trainer_of(twin).train_step(*batches[0], epoch=1)
    assert_same_model(model, twin, rtol=0, atol=0)
