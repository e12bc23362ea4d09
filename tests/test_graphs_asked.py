"""Logits and gradients as replays, for attacks whose steps are not ours."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import CPU
from graph_helpers import Recorder, rerun
from judging_nets import EPS, STEP_SIZE, digit_batches, robust_cnn
from nets import small_cnn
from torch import nn

from ham_kernels import engine
from ham_kernels.engine import EngineOptions, EngineWarning, logits_of
from ham_kernels.engine import graphs as graphs_module
from ham_kernels.evaluation import judge

HOW = {"classes": 10, "eps": EPS, "step_size": STEP_SIZE}


def graphed(capture=None, **options) -> engine.Engine:
    return engine.Engine(EngineOptions(cuda_graphs=True, **options), CPU, capture=capture or Recorder())


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def gradient_of(logits, x, weights, keep: bool = False):
    return torch.autograd.grad(logits, x, weights, retain_graph=keep)[0]


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"precision": "bf16"}])
def test_logits_and_gradients_are_the_models(options):
    """Whatever number of rows is asked, with and without a gradient, in any order."""
    model, recorder = small_cnn(), Recorder()
    by, eager = graphed(recorder, **options), engine.Engine(EngineOptions(**options), CPU)
    for n in (16, 3, 16, 11, 5, 16, 3):
        x, weights = images(n, seed=n), torch.randn(n, 10)
        with by.attacking(model):
            asked = logits_of(model, by, 16)
            point = x.clone().requires_grad_()
            z = asked(point)
            gradient = gradient_of(z, point, weights)
            with torch.no_grad():
                look = asked(x)
        with eager.attacking(model):
            point = x.clone().requires_grad_()
            expected = logits_of(model, eager, 16)(point)
        for got, right in ((z, expected), (look, expected), (gradient, gradient_of(expected, point, weights))):
            torch.testing.assert_close(got, right, rtol=1e-2 if options.get("precision") else 1e-4, atol=1e-5)
        assert z.dtype == torch.float32
        assert not look.requires_grad
    if not options:
        assert recorder.captures == 2 * len({graphs_module.bucket_of(n, 16) for n in (16, 11, 5, 3)})


def test_a_gradient_asked_late_or_twice_is_right():
    """What the forward left is written over by any replay; the gradient is then made from a forward of its own."""
    model, by = small_cnn(), graphed()
    with by.attacking(model):
        asked = logits_of(model, by, 8)
        points = [images(8, seed=s).requires_grad_() for s in range(2)]
        weights = torch.randn(8, 10)
        z = [asked(p) for p in points]
        with torch.no_grad():
            asked(images(8, seed=5))
        late = [gradient_of(z[i], points[i], weights, keep=True) for i in (0, 1, 0)]
        expected = [gradient_of(model(p), p, weights) for p in points]
    for got, right in zip(late, (*expected, expected[0]), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)


def test_new_weights_are_seen():
    model, by = small_cnn(), graphed()
    for seed in (1, 2):
        model.load_state_dict(small_cnn(seed=seed).state_dict())
        with by.attacking(model), torch.no_grad():
            torch.testing.assert_close(logits_of(model, by, 8)(images(8)), model(images(8)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_capture_that_fails_is_given_up(fails_at):
    model, by = small_cnn(), graphed(Recorder(fails_at))

    def ask():
        with by.attacking(model):
            asked = logits_of(model, by, 8)
            with torch.no_grad():
                look = asked(images(8))
            point = images(8).requires_grad_()
            z = asked(point)
            gradient_of(z, point, torch.ones_like(z))
        return look, z

    with pytest.warns(EngineWarning, match="cuda_graphs: the capture failed"):
        look, z = ask()
    torch.testing.assert_close(look, z.detach(), rtol=1e-4, atol=1e-5)
    assert by.graphs is None


class Blind(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = small_cnn()

    def forward(self, x):
        return self.inner(x.detach())


def test_a_model_that_hides_its_images_is_told():
    model, by = Blind(), graphed()
    with by.attacking(model), pytest.raises(ValueError, match="no gradient reaches the images"):
        logits_of(model, by, 8)(images(8).requires_grad_())


@pytest.mark.parametrize(
    "capture", [pytest.param(Recorder, id="tape", marks=pytest.mark.slow), pytest.param(lambda: rerun, id="rerun")]
)
def test_odi_by_replays_finds_the_same(capture, monkeypatch):
    model, data = robust_cnn(), digit_batches(4)[:1]
    plain = judge(model, data, ["odi2"], **HOW)["odi2"]
    monkeypatch.setattr(engine, "fast", lambda device: graphed(capture()))
    fast = judge(model, data, ["odi2"], search="fast", **HOW)["odi2"]
    assert fast["correct"] == plain["correct"]


@pytest.mark.slow
def test_autoattack_by_replays_finds_the_same(monkeypatch):
    pytest.importorskip("pyautoattack")
    from ham_kernels.evaluation import autoattack

    for name, value in (("STEPS", 5), ("TARGETS", 2), ("QUERIES", 50)):
        monkeypatch.setattr(autoattack, name, value)
    model, data, recorder = robust_cnn(), digit_batches(20)[:1], Recorder()
    plain = judge(model, data, ["autoattack"], **HOW)["autoattack"]
    monkeypatch.setattr(engine, "fast", lambda device: graphed(recorder))
    fast = judge(model, data, ["autoattack"], search="fast", **HOW)["autoattack"]
    assert fast["correct"] == plain["correct"]
    assert 0 < recorder.captures <= 2 * len(graphs_module.BUCKETS)
