"""Models, batches and a counting compiler that the tests of the engine share."""

from __future__ import annotations

import functools

import pytest
import torch
from nets import sgd
from torch import Tensor, nn

import ham_kernels as ham
import ham_reference as reference
from ham_kernels import data
from ham_kernels.engine import EngineWarning, engine

CPU = torch.device("cpu")
SETTINGS = {"eps": 0.2, "step_size": 0.05, "steps": 5, "screen_steps": 2, "start_epoch": 2}
RAGGED = (64, 40, 64, 37, 1)


def digits(n: int) -> tuple[Tensor, Tensor]:
    images = data.digits()
    return images.x_train[:n].float() / 255, images.y_train[:n]


def ragged_batches(rows: tuple[int, ...] = RAGGED) -> list[tuple[Tensor, Tensor]]:
    """Digits in batches of so many rows."""
    x, y = digits(sum(rows))
    return list(zip(x.split(rows), y.split(rows), strict=True))


def serve_any_half(monkeypatch) -> None:
    """Half precisions are served although this processor may have to emulate them."""
    monkeypatch.setattr(engine, "half_problem", lambda *_: None)


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


def refuses_at_once(monkeypatch):
    """As torch does on a Python that it cannot compile for."""

    def refuse(fn):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refuse)


def refuses_to_run(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda fn: refuse)


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
