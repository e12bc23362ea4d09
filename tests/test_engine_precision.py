"""bf16 and fp16: the same training, gradients and losses in range, and weights rounded once a batch."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from engine_helpers import (
    CPU,
    assert_same_model,
    engine_warnings,
    ragged_batches,
    serve_any_half,
    trainer_of,
)
from nets import Broken, small_cnn
from torch import nn

from ham_kernels.attack import step
from ham_kernels.attack.pgd import pgd_attack
from ham_kernels.engine import (
    Engine,
    EngineError,
    EngineOptions,
    EngineWarning,
    plain,
)
from ham_kernels.engine.options import half_problem


@pytest.fixture(scope="module")
def batches():
    return ragged_batches()


@pytest.fixture
def any_half(monkeypatch):
    serve_any_half(monkeypatch)


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
    monkeypatch.setattr(step, "_lifted", lambda z_grad: z_grad)
    assert moved(pgd_attack(model, x, y, precision="fp16", **settings), x) < 0.1


def test_fp16_gradients_are_not_lifted_out_of_range(monkeypatch):
    """A steep model wrong everywhere: its gradient fits fp16 as it is, and must not overflow for having been lifted."""
    model, x, y = steep(400.0)
    y = (y + 1) % 10
    settings = {"random_start": False, "eps": 0.05, "step_size": 0.01, "steps": 5}
    lifted = pgd_attack(model, x, y, precision="fp16", **settings)
    monkeypatch.setattr(step, "_lifted", lambda z_grad: z_grad)
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


def test_fp16_gradients_are_clipped_behind_their_scale(batches, any_half):
    """By the scale alone they would be thousands of times too long, and no update would be more than rounding."""

    def first_step(**more) -> torch.Tensor:
        trainer = trainer_of(small_cnn(), **more)
        before = trainer.model[1].weight.detach().clone()
        trainer.train_step(*batches[0], epoch=1)
        return trainer.model[1].weight.detach() - before

    half, full = first_step(precision="fp16", grad_clip=0.1), first_step(grad_clip=0.1)
    assert half.norm().item() == pytest.approx(full.norm().item(), rel=0.02)
    assert torch.equal(first_step(precision="fp16", grad_clip=1e6), first_step(precision="fp16"))


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
