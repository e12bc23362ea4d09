"""AutoAttack by torchattacks: at full strength, inside the ball, and nothing around it changed."""

from __future__ import annotations

import sys

import pytest
import torch
from judging_nets import EPS, STEP_SIZE, digit_batches, robust_cnn
from nets import Counting, small_cnn

import ham_kernels as ham
from ham_kernels import engine
from ham_kernels.attack.pgd import PGD
from ham_kernels.evaluation import autoattack, judge

torchattacks = pytest.importorskip("torchattacks")

pytestmark = pytest.mark.slow

BALLS = {"linf": PGD(EPS, STEP_SIZE, 0), "l2": PGD(1.0, 0.25, 0, "l2")}


@pytest.fixture
def quick(monkeypatch):
    """A tenth of the work or less."""
    for name, value in (("STEPS", 5), ("TARGETS", 2), ("QUERIES", 50)):
        monkeypatch.setattr(autoattack, name, value)


def batch(images: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    return digit_batches(images)[0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_examples_lie_in_the_ball(quick, norm):
    (x, y), pgd = batch(), BALLS[norm]
    model = robust_cnn()
    with engine.attack_mode(model):
        wrapped = autoattack._Fp32Logits(model, x.device, "fp32")
        x_adv = autoattack.examples(wrapped, x, y, 10, pgd, seed=1)
    assert (x_adv - autoattack.projected(x_adv, x, pgd)).abs().max() < 1e-5
    assert (x_adv != x).flatten(1).any(1).sum() >= 3


def test_what_is_outside_is_brought_back():
    x = torch.full((4, 1, 2, 2), 0.5)
    x_adv = x + torch.tensor([0.1, 0.15, 0.0, -0.3]).view(4, 1, 1, 1)
    x_adv[2, 0, 0, 0] = float("nan")
    moved = torch.tensor([0.1, 0.1, 0.0, -0.1]).view(4, 1, 1, 1)
    torch.testing.assert_close(autoattack.projected(x_adv, x, PGD(0.1, 0.1, 0)), x + moved)
    torch.testing.assert_close(autoattack.projected(x_adv, x, PGD(0.2, 0.1, 0, "l2")), x + moved)  # four pixels
    far = torch.tensor([1e-25, 1e-14, 1e15, torch.inf]).view(4, 1, 1, 1) * torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    black = torch.zeros_like(x)
    back = autoattack.projected(far, black, PGD(0.2, 0.1, 0, "l2"))
    torch.testing.assert_close(back[:, 0, 0, 0], torch.tensor([1e-25, 1e-14, 0.2, 0.2]), rtol=1e-6, atol=0)
    edge = torch.full((1, 1, 2, 2), 0.99)
    assert autoattack.projected(edge + 0.02, edge, PGD(0.1, 0.1, 0)).max() == 1.0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_survivors_are_what_the_examples_leave(quick, norm):
    """Lost: what is wrong without an attack, and every row whose example is wrong; no others."""
    (x, y), model = batch(), robust_cnn()
    y = y.clone()
    y[:3] = (y[:3] + 1) % 10  # wrong from the start
    with engine.attack_mode(model):
        correct, classes = autoattack.survivors(model, x, y, BALLS[norm], seed=1, precision="fp32")
        wrapped = autoattack._Fp32Logits(model, x.device, "fp32")
        rows = (model(x).argmax(1) == y).nonzero()[:, 0]
        x_adv = autoattack.examples(wrapped, x[rows], y[rows], 10, BALLS[norm], seed=1)
        expected = torch.zeros(len(y), dtype=torch.bool)
        expected[rows] = model(x_adv).argmax(1) == y[rows]
    assert classes == 10
    assert not correct[:3].any()
    assert torch.equal(correct, expected)
    assert correct.sum() < len(rows)


def test_runs_at_the_published_strength(monkeypatch):
    """torchattacks' own standard version has 10 steps and all targets; the paper's has 100 and 9."""
    seen = {}

    def record(self, images, labels):
        for part in self._autoattack.attacks:
            seen[type(part).__name__] = part
        return images

    monkeypatch.setattr(torchattacks.AutoAttack, "forward", record)
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    model = small_cnn(classes=30).eval()
    wrapped = autoattack._Fp32Logits(model, x.device, "fp32")
    autoattack.examples(wrapped, x, y, 30, PGD(0.1, 0.1, 0), seed=7)
    assert list(seen) == ["APGD", "APGDT", "FAB", "Square"]
    assert [seen[n].steps for n in ("APGD", "APGDT", "FAB")] == [100] * 3
    assert [seen[n].n_target_classes for n in ("APGDT", "FAB")] == [9, 9]
    assert seen["Square"].n_queries == 5000
    assert {part.seed for part in seen.values()} == {7}
    assert {part.eps for part in seen.values()} == {0.1}


def test_rows_lost_anyway_are_not_attacked():
    x, _ = batch()
    model = Counting(small_cnn().eval())
    wrong = (model(x).argmax(1) + 1) % 10
    model.forward_rows = 0
    result = ham.evaluate(model, [(x, wrong)], ["autoattack"], eps=EPS)
    assert result["autoattack"].accuracy == 0.0
    assert model.forward_rows == 20 + 32  # and the first look


def test_without_a_budget_it_is_clean_accuracy():
    x, y = batch()
    result = ham.evaluate(robust_cnn(), [(x, y)], ["clean", "autoattack"], eps=0.0)
    assert result["autoattack"].accuracy == result["clean"].accuracy > 0.8


def test_nothing_around_it_changes(quick, capsys):
    """The global generator, modes, requires_grad, .grad, BatchNorm; and it prints nothing."""
    x, y = batch()
    model = small_cnn()
    model[2].eval()
    model[1].weight.requires_grad_(False)
    y = model.eval()(x).argmax(1)
    model.train()
    model[2].eval()
    modes, learned = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    ham.evaluate(model, [(x, y)], ["autoattack"], eps=0.05)
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert learned == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert capsys.readouterr().out == ""


class Linear(torch.nn.Module):
    """No parameters, so that nothing says on which device it lives."""

    def forward(self, x):
        return x.flatten(1)[:, :4] * 3


def test_model_without_parameters_and_bf16(quick, capsys):
    x = torch.rand(12, 1, 8, 8)
    y = x.flatten(1)[:, :4].argmax(1)
    for precision in ("fp32", "bf16"):
        result = ham.evaluate(Linear(), [(x, y)], ["clean", "autoattack"], eps=0.2, precision=precision)
        assert result["autoattack"].accuracy < result["clean"].accuracy == 1.0
    assert "device" not in capsys.readouterr().out
    model = robust_cnn()
    result = ham.evaluate(model, [batch()], ["autoattack"], eps=EPS, precision="bf16")
    assert result["autoattack"].accuracy < 1.0


def test_judged_twice_alike_and_resumed(quick, tmp_path):
    data = [tuple(t[i : i + 8] for t in batch()) for i in (0, 8, 16)]
    how = {"classes": 10, "eps": EPS, "step_size": STEP_SIZE}
    whole = judge(robust_cnn(), data, ["autoattack"], **how)["autoattack"]

    def stop(name, done, total):
        if done == 8:
            raise KeyboardInterrupt

    store = tmp_path / "flags.json"
    with pytest.raises(KeyboardInterrupt):
        judge(robust_cnn(), data, ["autoattack"], **how, store=store, progress=stop)
    resumed = judge(robust_cnn(), data, ["autoattack"], **how, store=store)["autoattack"]
    assert resumed["correct"] == whole["correct"]
    assert whole["settings"]["steps"] == 5
    assert "step_size" not in whole["settings"]


def test_needs_four_classes_and_images():
    x = torch.rand(4, 1, 8, 8)
    with pytest.raises(ValueError, match="model: knows 3 classes; AutoAttack's targeted loss needs at least 4"):
        ham.evaluate(small_cnn(classes=3), [(x, torch.arange(4) % 3)], ["autoattack"], eps=0.1)
    with pytest.raises(ValueError, match="x: got shape"):
        ham.evaluate(Linear(), [(x.flatten(1), torch.arange(4))], ["autoattack"], eps=0.1)


def test_missing_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    model = Counting(small_cnn())
    with pytest.raises(ImportError, match=r'"autoattack" needs torchattacks.*pip install "ham_kernels\[bench\]"'):
        judge(model, [batch()], ["clean", "autoattack"], classes=10, eps=EPS, step_size=STEP_SIZE)
    assert model.forward_rows == 0


def test_at_full_strength_it_is_at_least_as_strong_as_pgd():
    attacks = ["clean", "pgd20", "cw20", "autoattack"]
    result = ham.evaluate(robust_cnn(), [batch(12)], attacks, eps=EPS, step_size=STEP_SIZE)
    strongest = min(result["pgd20"].accuracy, result["cw20"].accuracy)
    assert result["autoattack"].accuracy <= strongest < result["clean"].accuracy
