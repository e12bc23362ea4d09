"""The engine's options: what they cost and change, where they are refused, and what they leave behind."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import shutil
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from nets import Broken, Counting, sgd, small_cnn
from torch import nn

import ham_kernels as ham
import ham_reference as reference
from ham_kernels import active, data
from ham_kernels.attack import pgd_attack
from ham_kernels.engine import (
    Engine,
    EngineError,
    EngineOptions,
    EngineWarning,
    core,
    memory,
    plain,
)
from ham_kernels.engine.options import half_problem

CPU = torch.device("cpu")
SETTINGS = {"eps": 0.2, "step_size": 0.05, "steps": 5, "screen_steps": 2, "start_epoch": 2}
RAGGED = (64, 40, 64, 37, 1)


@pytest.fixture(scope="module")
def batches():
    images = data.digits()
    x, y = images.x_train[:320].float() / 255, images.y_train[:320]
    starts = [sum(RAGGED[:i]) for i in range(len(RAGGED))]
    return [(x[i : i + n], y[i : i + n]) for i, n in zip(starts, RAGGED, strict=True)]


@pytest.fixture
def any_half(monkeypatch):
    """Half precisions are served although this processor may have to emulate them."""
    monkeypatch.setattr(core, "half_problem", lambda *_: None)


def trainer_of(model: nn.Module, **choices) -> ham.HAMTrainer:
    return ham.HAMTrainer(model, sgd(model), **SETTINGS | choices)


def tiny(seed: int = 0) -> nn.Module:
    """What a compiler works on for seconds, not for half a minute."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)
    )


class Viewing(nn.Module):
    """Flattens with view, which asks for rows in NCHW order; or asks for it by an assertion of its own."""

    def __init__(self, asserts: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.asserts = asserts
        self.conv, self.bn, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 10)

    def forward(self, x):
        h = torch.relu(self.bn(self.conv(x)))
        if self.asserts:
            assert h.is_contiguous(), "not viewable"
        return self.head(h.view(len(x), -1))


class Compiler:
    """A backend of torch.compile that runs what it is given, and counts; or refuses, from number `fails_at` on."""

    def __init__(self, fails_at: int | None = None):
        self.compiled, self._fails_at = 0, fails_at

    def __call__(self, graph, inputs):
        self.compiled += 1
        if self._fails_at is not None and self.compiled >= self._fails_at:
            raise RuntimeError("no compiler here")
        return graph.forward

    def install(self, monkeypatch) -> Compiler:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=self))
        return self


def engine_warnings(caught) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, EngineWarning)]


def assert_same_model(ours: nn.Module, theirs: nn.Module, rtol=1e-3, atol=1e-4):
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=name)


def assert_reference(ours: ham.HAMTrainer, twin: nn.Module, batches, choices=(), *, step_by_step: bool = False):
    """The reference's hard rows, losses (1e-4; a gradient's sign that turns weighs more in few rows) and weights.

    step_by_step: each step from the reference's weights, where arithmetic in another order turns signs of gradients
    that are all but zero, which training would carry on.
    """
    theirs = reference.HAMTrainer(twin, sgd(twin), **SETTINGS | dict(choices))
    for epoch in (1, 2, 2, 3):
        for x, y in batches:
            a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
            assert (a.n, a.n_hard) == (b.n, b.n_hard)
            assert a.loss == pytest.approx(b.loss, rel=1e-4 * max(1, 32 / max(a.n_hard, 1)))
            if step_by_step:
                assert_same_model(ours.model, twin)
                ours.model.load_state_dict(twin.state_dict())
    assert_same_model(ours.model, twin)


# ---------------------------------------------------------------- cost
@pytest.mark.parametrize(
    "options",
    [{"channels_last": True}, {"precision": "bf16"}, {"channels_last": True, "precision": "bf16", "compile": True}],
    ids=lambda o: ",".join(o),
)
def test_options_cost_no_forward(batches, options, any_half, monkeypatch):
    """2K+3 for PGD-AT, 2M+1+2h(K-M)+3h for HAM, in full-batch forwards, once the first batch has judged the options.

    The compiler gives back what it got, since the counters of a traced model would be compiled anew at every call.
    """
    monkeypatch.setattr(torch, "compile", lambda fn: fn)
    x = torch.cat([x for x, _ in batches[:3]])[:128]
    y = torch.cat([y for _, y in batches[:3]])[:128]
    counting = Counting(small_cnn())
    trainer = trainer_of(counting, **options)
    for _ in range(25):
        trainer.train_step(x, y, epoch=1)
    assert [name for name, on in trainer.engine.active.items() if on not in (False, "fp32")] == [
        name for name in ("precision", "channels_last", "compile") if name in options
    ]
    counting.__init__(counting.inner)
    trainer.train_step(x, y, epoch=1)
    assert counting.full_batch_forwards(128) == 2 * 5 + 3
    counting.__init__(counting.inner)
    h = trainer.train_step(x, y, epoch=2).hard_fraction
    assert 0 < h < 1
    assert counting.full_batch_forwards(128) == pytest.approx(2 * 2 + 1 + 2 * h * (5 - 2) + 3 * h)


# ---------------------------------------------------------------- channels_last
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"norm": "l2", "eps": 1.0, "step_size": 0.25},
        {"reweight": False},
        {"freeze_bn": True, "ema_decay": 0.9},
    ],
    ids=lambda c: ",".join(c) or "defaults",
)
def test_channels_last_is_the_reference(batches, choices):
    """Coloured images, since with one channel both orders are one."""
    model = small_cnn(channels=3)
    twin = copy.deepcopy(model)
    coloured = [(x.expand(-1, 3, -1, -1) * torch.tensor([1.0, 0.7, 0.4]).view(3, 1, 1), y) for x, y in batches]
    ours = trainer_of(model, channels_last="require", **choices)
    assert_reference(ours, twin, coloured[:4], choices, step_by_step=True)
    assert model[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[4].weight.is_contiguous()
    if ours.ema_model is not None:  # torch averages lists of weights in one launch where their orders agree
        assert ours.ema_model[4].weight.stride() == model[4].weight.stride()


def test_channels_last_reaches_the_model_in_attack_and_update():
    seen = []

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_cnn(channels=3)

        def forward(self, x):
            seen.append((self.training, len(x), x.is_contiguous(memory_format=torch.channels_last)))
            return self.inner(x)

    model = Looking()
    trainer = trainer_of(model, channels_last="require", group=2)
    g = torch.Generator().manual_seed(0)
    group = [(torch.rand(16, 3, 8, 8, generator=g), torch.randint(0, 10, (16,), generator=g)) for _ in range(2)]
    for epoch in (1, 2):
        trainer.train_group(group, epoch)
    assert {training for training, *_ in seen} == {True, False}
    assert all(last for *_, last in seen)
    assert {rows for _, rows, _ in seen} > {2, 32}  # the trial, the group, its hard rows
    other = Looking()
    trainer.model, trainer.optimizer = other, sgd(other)
    trainer.train_group(group, 2)
    assert other.inner[4].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wanted", [True, "require"])
@pytest.mark.parametrize("asserts", [False, True], ids=["views", "asserts"])
def test_a_model_that_cannot_run_channels_last(batches, wanted, asserts):
    model = Viewing(asserts)
    model.bn.eval()
    model.conv.weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    ours, theirs = trainer_of(model, channels_last=wanted), trainer_of(twin)
    modes = [m.training for m in model.modules()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if wanted == "require":
            with pytest.raises(
                EngineError, match=r"channels_last: was required, but the model cannot run with it .*view"
            ):
                ours.train_step(*batches[0], epoch=1)
        else:
            for epoch in (1, 2, 2):
                for x, y in batches:
                    assert ours.train_step(x, y, epoch=epoch).loss == theirs.train_step(x, y, epoch=epoch).loss
    if wanted is True:
        (message,) = engine_warnings(caught)
        error = "AssertionError: not viewable" if asserts else "RuntimeError: view"
        assert message.startswith(f"channels_last: the model cannot run with it ({error}")
        assert ours.engine.active["channels_last"] is False
    assert_same_model(model, twin, rtol=0, atol=0)
    assert all(p.is_contiguous() for p in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in twin.parameters()]


def test_images_that_are_not_four_dimensional():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    twin = copy.deepcopy(model)
    g = torch.Generator().manual_seed(0)
    batches = [(torch.rand(24, 64, generator=g), torch.randint(0, 10, (24,), generator=g)) for _ in range(2)]
    ours, theirs = trainer_of(model, channels_last=True), trainer_of(twin)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        histories = [t.fit(batches, 3) for t in (ours, theirs)]
    assert [r.loss for r in histories[0]] == [r.loss for r in histories[1]]
    (message,) = engine_warnings(caught)
    assert message.startswith("channels_last: it is an order of (n, C, H, W), and the images are (24, 64)")
    with pytest.raises(EngineError, match="channels_last: was required"):
        trainer_of(twin, channels_last="require").train_step(*batches[0], epoch=1)


def test_another_model_is_placed_and_compiled_anew(batches, any_half, monkeypatch):
    """trainer.model = other, with an optimizer of its own: nothing of the first model is used any more."""
    Compiler().install(monkeypatch)
    ours = trainer_of(tiny(), channels_last=True, compile="require", precision="bf16")
    theirs = trainer_of(tiny(1), precision="bf16", seed=0)
    for _ in range(2):
        ours.train_step(*batches[0], epoch=1)
    ours.model = tiny(1)
    ours.optimizer = sgd(ours.model)
    ours.steps_done = 0
    for epoch in (1, 1, 2):
        a, b = ours.train_step(*batches[0], epoch=epoch), theirs.train_step(*batches[0], epoch=epoch)
        assert a.n_hard == b.n_hard
        assert a.loss == pytest.approx(b.loss, rel=2e-2)
    assert_same_model(ours.model, theirs.model, rtol=0.05, atol=0.02)
    assert not torch.equal(ours.model[0].weight, tiny(1)[0].weight)


# ---------------------------------------------------------------- compile
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="torch.compile needs a C++ compiler"
)


@needs_compiler
@pytest.mark.slow
def test_compiled_attack_is_the_reference(batches):
    """Really compiled; numbers of rows that change, fewer than are worth it, and one."""
    torch._dynamo.reset()
    model = tiny()
    twin = copy.deepcopy(model)
    assert_reference(trainer_of(model, compile="require"), twin, batches, step_by_step=True)


@pytest.mark.parametrize("choices", [{}, {"freeze_bn": True, "channels_last": True}], ids=["", "channels_last"])
def test_any_number_of_rows_is_compiled_once(batches, choices, monkeypatch):
    """A step and a look are two forms; neither other rows nor other weights are a reason for a third."""
    compiler = Compiler().install(monkeypatch)
    model = tiny()
    twin = copy.deepcopy(model)
    ours = trainer_of(model, compile="require", **choices)
    choices = {n: v for n, v in choices.items() if n != "channels_last"}
    assert_reference(ours, twin, batches, choices)
    assert compiler.compiled == 2


def test_half_weights_are_compiled_once(batches, any_half, monkeypatch):
    compiler = Compiler().install(monkeypatch)
    model = tiny()
    ours = trainer_of(model, compile="require", precision="bf16")
    theirs = trainer_of(copy.deepcopy(model), precision="bf16")
    for epoch in (1, 1, 2, 2):
        for x, y in batches:
            a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
            assert abs(a.n_hard - b.n_hard) <= 1
            assert a.loss == pytest.approx(b.loss, rel=1e-2)
    assert compiler.compiled == 2


def refuses_at_once(monkeypatch):
    """As torch does on a Python that it cannot compile for."""

    def refuse(fn):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refuse)


def refuses_to_run(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda fn: refuse)


REFUSALS = {
    "at once": refuses_at_once,
    "at the first call": refuses_to_run,
    "for the step": lambda patch: Compiler(1).install(patch),
    "for the look": lambda patch: Compiler(2).install(patch),
}


@pytest.mark.parametrize("wanted", [True, "require"])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_model_that_cannot_be_compiled(batches, refusal, wanted, monkeypatch):
    REFUSALS[refusal](monkeypatch)
    model = tiny()
    twin = copy.deepcopy(model)
    model[1].eval()
    ours, theirs = trainer_of(model, compile=wanted), trainer_of(twin)
    twin[1].eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if wanted == "require":
            with pytest.raises(EngineError, match=r"compile: was required, but .*no compiler here"):
                ours.fit(batches[:2], 2)
        else:
            for epoch in (1, 2, 2):
                for x, y in batches:
                    a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
                    assert a.n_hard == b.n_hard
                    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    if wanted is True:
        (message,) = engine_warnings(caught)
        assert message.startswith("compile: ")
        assert "no compiler here" in message
        assert ours.engine.active["compile"] is False
        assert_same_model(model, twin, rtol=1e-5, atol=1e-6)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(p.requires_grad for p in model.parameters())
    assert "forward" not in vars(model[1])


# ---------------------------------------------------------------- precision
def test_bf16_trains_as_fp32(batches, any_half):
    """bf16 rounds to 8 bits (0.4 %); over three layers and ten steps losses stay within 2 %, hard rows within 5."""
    half, full = trainer_of(small_cnn(), precision="bf16", channels_last=True), trainer_of(small_cnn())
    for epoch in (1, 1, 2, 2, 2):
        for x, y in batches[::2][:2]:
            a, b = half.train_step(x, y, epoch=epoch), full.train_step(x, y, epoch=epoch)
            assert abs(a.n_hard - b.n_hard) <= 5
            assert a.loss == pytest.approx(b.loss, rel=0.02)
            assert a.loss != b.loss
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


@pytest.mark.parametrize("asked", ["bf16", "fp16"])
def test_a_processor_without_halves(batches, asked, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    with pytest.warns(EngineWarning, match=f"precision: this CPU has no {asked} arithmetic") as caught:
        ours = trainer_of(small_cnn(), precision=asked)
    assert len(engine_warnings(caught)) == 1
    assert ours.precision == ours.engine.active["precision"] == "fp32"
    theirs = trainer_of(small_cnn())
    for epoch in (1, 2):
        assert ours.train_step(*batches[0], epoch=epoch).loss == theirs.train_step(*batches[0], epoch=epoch).loss
    assert ours.state_dict()["loss_scale"] is None
    with pytest.raises(EngineError, match=f"precision: was required, but this CPU has no {asked}"):
        trainer_of(small_cnn(), precision=f"require-{asked}")


@pytest.mark.parametrize(
    ("precision", "flag"), [("bf16", "avx512_bf16"), ("bf16", "amx_bf16"), ("fp16", "avx512_fp16")]
)
def test_processors_that_have_halves(precision, flag, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True}, raising=False)
    assert half_problem(precision, CPU) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: False}, raising=False)
    assert "emulate" in half_problem(precision, CPU)


def steep(slope: float) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model whose last step is a product with `slope`, images, and the classes it sees in them."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model = Broken(inner, lambda z: slope * z)
    x = torch.rand(64, 1, 8, 8)
    return model, x, model(x).argmax(1)


def leads(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = model(x).detach()
    return z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)


def moved(x_adv: torch.Tensor, x: torch.Tensor) -> float:
    return (x_adv != x).float().mean().item()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fp16_gradients_are_lifted(norm, monkeypatch):
    """Right by far: softmax - onehot is below the smallest number of fp16, 6e-8, and well within fp32."""
    model, x, y = steep(200.0)
    sure = (leads(model, x, y) > 20) & (leads(model, x, y) < 80)  # e^-20 is 2e-9; fp32 ends at e^-103
    assert sure.sum() >= 10
    x, y = x[sure], y[sure]
    settings = {"random_start": False, "norm": norm, "steps": 5}
    settings |= {"eps": 0.05, "step_size": 0.02} if norm == "linf" else {"eps": 0.5, "step_size": 0.2}
    full, half = (pgd_attack(model, x, y, precision=p, **settings) for p in ("fp32", "fp16"))
    won = [(leads(model, x_adv, y) <= 0).float().mean().item() for x_adv in (full, half)]
    assert won[0] > 0.2
    assert won[1] == pytest.approx(won[0], abs=0.1)
    monkeypatch.setattr(active, "_lifted", lambda z_grad: z_grad)
    assert moved(pgd_attack(model, x, y, precision="fp16", **settings), x) < 0.1


def test_fp16_gradients_are_not_lifted_out_of_range(monkeypatch):
    """A steep model wrong everywhere: its gradient fits fp16 as it is, and must not overflow for having been lifted."""
    model, x, y = steep(400.0)
    y = (y + 1) % 10
    settings = {"random_start": False, "eps": 0.05, "step_size": 0.01, "steps": 5}
    lifted = pgd_attack(model, x, y, precision="fp16", **settings)
    monkeypatch.setattr(active, "_lifted", lambda z_grad: z_grad)
    plain_fp16 = pgd_attack(model, x, y, precision="fp16", **settings)
    assert moved(plain_fp16, x) > 0.9
    assert moved(lifted, x) > 0.9
    assert leads(model, lifted, y).mean() == pytest.approx(leads(model, plain_fp16, y).mean().item(), rel=0.1)


def test_loss_scale_survives_a_checkpoint(batches, any_half):
    """A resumed run is the run bit for bit, also where the scale has grown and where an update was skipped."""

    def run(trainer, steps):
        return [trainer.train_step(*batches[i % 2], epoch=1 + i % 2).loss for i in steps]

    first = trainer_of(small_cnn(), precision="fp16", ema_decay=0.9)
    first._update.load_state_dict({**first.state_dict()["loss_scale"], "growth_interval": 2, "scale": 2.0**33})
    weights = first.model[1].weight.detach().clone()
    run(first, range(1))  # the gradient overflows
    assert torch.equal(weights, first.model[1].weight)
    assert first.state_dict()["loss_scale"]["scale"] == 2.0**32
    first._update.load_state_dict({**first.state_dict()["loss_scale"], "scale": 512.0})
    run(first, range(1, 6))
    state = copy.deepcopy(first.state_dict())
    assert state["loss_scale"]["scale"] == 2048.0
    assert state["loss_scale"]["_growth_tracker"] == 1
    second = trainer_of(small_cnn(seed=1), precision="fp16", ema_decay=0.9)
    second.load_state_dict(state)
    assert run(first, range(6, 10)) == run(second, range(6, 10))
    assert_same_model(first.model, second.model, rtol=0, atol=0)
    assert first.state_dict()["loss_scale"] == second.state_dict()["loss_scale"]
    trainer_of(small_cnn(), ema_decay=0.9).load_state_dict(state)  # another precision has no use for it


# ---------------------------------------------------------------- half weights
def parameters_by_layer(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(p)) for m in model.modules() for name, p in m._parameters.items()]


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 10)
        self.second.weight = self.first.weight
        self.dtypes = []

    def forward(self, x):
        self.dtypes.append((self.first.weight.dtype, self.second.weight is self.first.weight))
        return self.head(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


@pytest.mark.parametrize("fails", [False, True])
def test_layers_hold_their_own_weights_again_after_an_attack(batches, fails):
    def fail(z):
        raise RuntimeError("boom")

    inner = Tied()
    model = Broken(inner, fail, after=2 if fails else 10**9)
    before, values = parameters_by_layer(model), copy.deepcopy(model.state_dict())
    if fails:
        with pytest.raises(RuntimeError, match="boom"):
            pgd_attack(model, *batches[0], precision="bf16")
    else:
        pgd_attack(model, *batches[0], precision="bf16")
    assert set(inner.dtypes) == {(torch.bfloat16, True)}
    assert parameters_by_layer(model) == before
    assert inner.second.weight is inner.first.weight
    assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_rounded_weights_give_what_autocast_gives(batches):
    """Bit for bit: they are rounded once instead of in each forward."""
    x = batches[0][0]
    model = small_cnn().eval()
    seen = {}
    engine = plain("bf16")
    with engine.attacking(model):
        seen["once"] = engine.forward(model, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen["autocast"] = model(x)
    assert seen["once"].dtype == torch.bfloat16
    assert torch.equal(seen["once"], seen["autocast"])


def test_changed_weights_are_rounded_anew(batches):
    x = batches[0][0]
    model, engine = small_cnn(), plain("bf16")
    outputs = []
    for factor in (1.0, 2.0):
        with torch.no_grad():
            model[-1].weight.mul_(factor)
            model[-1].bias.mul_(factor)
        with engine.attacking(model):
            outputs.append(engine.forward(model, x).float())
    torch.testing.assert_close(outputs[1], 2 * outputs[0])  # a power of two changes no rounding


@pytest.mark.parametrize("change", ["another size", "another layer", "another type"])
def test_replaced_weights_are_rounded_anew(batches, change):
    """A head for other classes, put in place between two attacks."""
    x, model = batches[0][0], small_cnn()

    def logits(engine):
        with engine.attacking(model):
            return engine.forward(model, x)

    engine = Engine(EngineOptions("bf16"), None)
    logits(engine)
    if change == "another size":
        model[-1].weight, model[-1].bias = nn.Parameter(torch.randn(12, 32)), nn.Parameter(torch.zeros(12))
        model[-2] = nn.Sequential(nn.Flatten(), nn.Linear(64, 32))
    elif change == "another layer":
        model[-1] = nn.Linear(64, 12)
    else:
        model[-1] = model[-1].to(torch.bfloat16)
    assert torch.equal(logits(engine), logits(Engine(EngineOptions("bf16"), None)))


def test_another_model_has_its_own_rounded_weights():
    engine = Engine(EngineOptions("bf16"), None)
    for model in (small_cnn(), small_cnn(seed=1), Tied()):
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        with engine.attacking(model):
            assert {m.weight.dtype for m in layers} == {torch.bfloat16}
        assert {m.weight.dtype for m in layers} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_attack_does_not_keep_the_model(batches, precision):
    model = small_cnn()
    pgd_attack(model, *batches[0], precision=precision)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_the_optimizer_updates_the_real_weights(batches, any_half):
    trainer = trainer_of(small_cnn(), precision="bf16")
    own = list(trainer.model.parameters())
    before = [p.detach().clone() for p in own]
    trainer.train_step(*batches[0], epoch=2)
    assert all(p is q for p, q in zip(own, trainer.model.parameters(), strict=True))
    assert all(not torch.equal(p, q) for p, q in zip(own, before, strict=True))
    assert all(p.grad.dtype == torch.float32 for p in own)


# ---------------------------------------------------------------- whose error it is
@pytest.mark.parametrize("kind", [RuntimeError, KeyError])
@pytest.mark.parametrize("wanted", [True, "require"])
@pytest.mark.parametrize("option", ["channels_last", "compile", "precision"])
def test_what_the_model_raises_is_its_own(batches, option, wanted, kind, any_half, monkeypatch):
    Compiler().install(monkeypatch)

    def fail(z):
        raise kind("the model's own")

    model = Broken(tiny(), fail)
    wanted = {True: "bf16", "require": "require-bf16"}[wanted] if option == "precision" else wanted
    trainer = trainer_of(model, **{option: wanted})
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        with pytest.raises(kind, match="the model's own") as caught:
            trainer.train_step(*batches[0], epoch=1)
    assert type(caught.value) is kind
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_options_together_warn_once_each(batches, monkeypatch):
    refuses_to_run(monkeypatch)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    model = Viewing()
    twin = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = trainer_of(model, channels_last=True, compile=True, cuda_graphs=True, precision="bf16")
        ours.fit(batches, 3)
    assert sorted(m.split(":")[0] for m in engine_warnings(caught)) == [
        "channels_last", "compile", "cuda_graphs", "precision",
    ]  # fmt: skip
    assert ours.engine.active == {
        "precision": "fp32", "channels_last": False, "compile": False, "cuda_graphs": False, "winograd": False,
    }  # fmt: skip
    theirs = trainer_of(twin)
    assert [r.loss for r in theirs.fit(batches, 3)] == pytest.approx([r.loss for r in ours.history], rel=1e-5)


# ---------------------------------------------------------------- memory
PAGE_FAULTS = """
import ctypes, importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
libc = ctypes.CDLL(None)
libc.malloc.restype, size = ctypes.c_void_p, 64 << 20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
        ctypes.memset(block, 1, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

counts = [faults()]
for change in (memory.keep_freed_memory, memory.return_freed_memory):
    if not change():
        sys.exit(77)
    faults()  # the first block of the kept memory has to be asked for
    counts.append(faults())
print(*counts)
"""


def test_freed_memory_stays_and_goes_back():
    """Pages that the system has to hand out for four blocks of 64 MiB: by default, kept, and by default again."""
    run = subprocess.run([sys.executable, "-c", PAGE_FAULTS, memory.__file__], capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip("this C library takes no advice")
    default, kept, back = map(int, run.stdout.split())
    assert kept < 0.05 * default
    assert back > 0.5 * default


@pytest.mark.parametrize(
    ("keep", "device", "kept"),
    [(True, CPU, 1), (False, CPU, 0), (True, torch.device("cuda"), 0), (True, None, 0)],
    ids=["asked for", "not asked for", "on a GPU", "nobody knows where"],
)
def test_who_keeps_memory(keep, device, kept, monkeypatch):
    calls = []
    monkeypatch.setattr(core, "keep_freed_memory", lambda: calls.append(1))
    Engine(EngineOptions(keep_memory=keep), device)
    assert len(calls) == kept
    assert plain("fp32").options.keep_memory is False  # an attack alone leaves the process as it is


# ---------------------------------------------------------------- copies
def test_a_copied_trainer_has_an_engine_of_its_own(batches, any_half, monkeypatch):
    compiler = Compiler().install(monkeypatch)
    first = trainer_of(tiny(), precision="bf16", compile="require", channels_last=True, ema_decay=0.9)
    first.train_step(*batches[0], epoch=1)
    second = copy.deepcopy(first)
    assert second.engine is not first.engine
    assert second._update._engine is second.engine
    assert second.engine.options == first.engine.options
    compiled = compiler.compiled
    pairs = [[t.train_step(*batches[0], epoch=epoch).loss for epoch in (1, 2)] for t in (first, second)]
    assert pairs[0] == pairs[1]
    assert compiler.compiled > compiled
    assert_same_model(first.model, second.model, rtol=0, atol=0)
    assert not any(
        p.data_ptr() == q.data_ptr() for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True)
    )


def test_a_pickled_engine_is_a_new_one(any_half):
    first = Engine(EngineOptions("bf16", True, "require", False, False), CPU)
    first._on.discard("channels_last")
    second = pickle.loads(pickle.dumps(first))
    assert second.options == first.options
    assert second.device == CPU
    assert second.precision == "bf16"
    assert second.active["channels_last"] is True  # it will find out for itself
    with pytest.raises(EngineError, match="compile: was required, but why"):
        second.give_up("compile", "why")


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("choices", "kind", "message"),
    [
        ({"precision": "require-fp32"}, ValueError, "precision: got 'require-fp32'"),
        ({"precision": "fp64"}, ValueError, "precision: got 'fp64'"),
        ({"precision": True}, ValueError, "precision: got True"),
        ({"channels_last": "yes"}, ValueError, "channels_last: got 'yes'; allowed are False, True, 'require'"),
        ({"compile": "max-autotune"}, ValueError, "compile: got 'max-autotune'"),
        ({"cuda_graphs": None}, ValueError, "cuda_graphs: got None"),
        ({"keep_memory": "no"}, TypeError, "keep_memory: got 'no'"),
        ({"group": 0}, ValueError, "group: got 0; it must be >= 1"),
        ({"group": 1.5}, TypeError, "group: got 1.5"),
        ({"group_updates": "both"}, ValueError, "group_updates: got 'both'; allowed are 'each', 'one'"),
        ({"round_to": 0}, ValueError, "round_to: got 0; it must be >= 1"),
        ({"round_to": "8"}, TypeError, "round_to: got '8'"),
        ({"round_to": 8, "group": 2}, ValueError, "round_to: got 8 with group=2"),
        ({"screen": "x"}, ValueError, "screen: got 'x'; allowed are 'steps', 'one_step'"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_bad_options_are_named(choices, kind, message):
    with pytest.raises(kind, match=message):
        trainer_of(small_cnn(), **choices)


def test_a_bad_precision_of_an_attack_is_named(batches):
    with pytest.raises(ValueError, match="precision: got 'require-bf16'; allowed are 'fp32', 'bf16', 'fp16'"):
        pgd_attack(small_cnn(), *batches[0], precision="require-bf16")
