"""What a model must be to be believed: each fault is told once, by whoever is given it; honest models are not."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from nets import sgd, small_cnn
from torch import nn
from torch.nn import functional as F

import ham_kernels as ham
from ham_kernels.commands import train as train_command
from ham_kernels.commands.model_doctor import look_at
from ham_kernels.common.one_class import answers_one_class
from ham_kernels.common.troubles import TROUBLES, HamWarning
from ham_kernels.engine import findings, first_look
from ham_kernels.evaluation import judge, masking

HOW = {"eps": 0.1, "step_size": 0.03}
TRAIN = HOW | {"steps": 3, "screen_steps": 1}


@pytest.fixture
def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(24, 1, 8, 8, generator=g), torch.arange(24) % 10


class Through(nn.Module):
    """A small CNN with something before or behind it."""

    def __init__(self, before=lambda x: x, behind=lambda z: z, **layers):
        super().__init__()
        self.net, self.before, self.behind = small_cnn(), before, behind
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.behind(self.net(self.before(x)))


class Zeroed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def batch_statistics():
    model = small_cnn()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean = m.running_var = None
    return model


FAULTS = {
    "probabilities": lambda: Through(behind=lambda z: z.softmax(1)),
    "between_0_and_1": lambda: Through(behind=lambda z: (3 * z).sigmoid()),
    "random_output": lambda: Through(behind=lambda z: z + 0.01 * torch.randn_like(z)),
    "output_depends_on_batch": batch_statistics,
    "gradient_not_finite": lambda: Through(before=lambda x: Zeroed.apply(x, torch.nan)),
    "gradient_zero": lambda: Through(before=lambda x: Zeroed.apply(x, 0.0)),
}
ERRORS = {
    "no_way_to_the_images": (ValueError, lambda: Through(before=lambda x: x.detach())),
    "dtype": (TypeError, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10).double())),
}


def answers(model, x):
    """Labels by which no row is fooled."""
    with torch.no_grad():
        return model.eval()(x.to(next(model.parameters()).dtype)).argmax(1)


def beginning(name: str) -> str:
    return TROUBLES[name].says.split("{")[0].split(" (")[0]


def told(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, HamWarning)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_by_all_that_take_a_model(fault, batch):
    x, _ = batch
    y = answers(FAULTS[fault](), x)
    training = [
        lambda m: ham.ham_loss(m, x, y, **TRAIN),
        lambda m: ham.loss(ham.methods.TRADES(), m, x, y, **HOW, steps=2),
        lambda m: ham.HAMTrainer(m, sgd(m), **TRAIN, start_epoch=1).train_step(x, y, 1),
        lambda m: ham.Trainer(m, sgd(m), ham.methods.PGDAT(), **HOW, steps=2).fit([(x, y)], 1),
    ]
    judging = [
        lambda m: ham.evaluate(m, [(x, y)], ("clean", "pgd2"), **HOW),
        lambda m: judge(m, [(x, y)], ("fgsm",), classes=10, **HOW),
        lambda m: masking(m, [(x, y)], images=4, **HOW),
    ]
    for call in training + judging:
        model = FAULTS[fault]()
        try:
            words = told(lambda call=call, model=model: call(model))
        except ham.NonFiniteError:  # the weights' gradient: the look has told before
            continue
        assert sum(w.startswith(beginning(fault)) for w in words) == 1, (fault, words)


@pytest.mark.parametrize("fault", ERRORS)
def test_where_no_attack_can_run_there_is_an_error(fault, batch):
    x, y = batch
    kind, make = ERRORS[fault]
    for call in (
        lambda m: ham.ham_loss(m, x, y, **TRAIN),
        lambda m: ham.HAMTrainer(m, sgd(m), **TRAIN, start_epoch=1).train_step(x, y, 1),
        lambda m: ham.evaluate(m, [(x, y)], ("pgd2",), **HOW),
    ):
        with pytest.raises(kind, match=beginning(fault)):
            call(make())


@pytest.mark.parametrize(
    "make",
    [
        small_cnn,
        lambda: small_cnn().train(),  # batch statistics while it trains are as they should be
        lambda: Through(drop=nn.Dropout(0.5)),
        lambda: Through(behind=lambda z: F.log_softmax(z, 1)),  # the cross entropy is the same
        lambda: Through(behind=lambda z: 0.0 * z),  # a head that starts at zero: no gradient, and that is another fault
        lambda: Through(behind=lambda z: 1e2 * z),
    ],
    ids=["plain", "train mode", "dropout", "log_softmax", "zero head", "large logits"],
)
def test_an_honest_model_is_not_accused(make, batch):
    x, _ = batch
    model = make()
    y = answers(model, x)
    found = {name for name, _ in findings(model.train(), x, y)}
    assert found <= {"gradient_zero"} if not model(x).any() else not found


def test_rows_are_counted(batch):
    x, _ = batch
    dark = torch.zeros_like(x)
    dark[3], dark[5] = 1.0, 1.0
    half = Through(before=lambda x: torch.where(x.amax((1, 2, 3), keepdim=True) > 0.5, x, x.detach()))
    facts = dict(findings(half, dark[:8], answers(half, dark[:8])))
    assert facts["gradient_zero"] == {"rows": 6, "n": 8}


def test_one_answer_is_told_of_the_judged_not_of_the_trained(batch):
    x, y = batch[0], torch.arange(24) % 10
    constant = small_cnn()
    with torch.no_grad():
        constant[-1].bias[4] = 30.0
    words = told(lambda: ham.evaluate(constant, [(x, y)], ("clean",)))
    assert any("class 4 for (nearly) all of 24" in w for w in words)
    assert not told(lambda: ham.ham_loss(constant.train(), x, y, **TRAIN))
    assert any("class 4 for (nearly) all of 16" in w for w in told(lambda: ham.evaluate(constant, [(x, y)], ("pgd2",))))


def test_images_in_the_order_of_their_classes_make_no_constant_model():
    """The first rows, 13 of class 0 and 3 that are taken for it, have one answer; of all 130, nine tenths are right."""
    y = torch.arange(10).repeat_interleave(13)
    x = torch.eye(10)[torch.where(y == 1, 0, y)].reshape(-1, 1, 1, 10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(9 * torch.eye(10))
    for attacks in (("clean",), ("clean", "pgd2"), ("pgd2",)):
        assert not told(lambda attacks=attacks: ham.evaluate(model, [(x, y)], attacks, eps=0.1))


def test_a_look_costs_two_forwards_and_one_backward_and_leaves_no_trace(batch):
    x, y = batch
    model = small_cnn().train()
    rows, before = [], {k: v.clone() for k, v in model.state_dict().items()}
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    state = torch.random.get_rng_state()
    first_look(model, x, y)
    assert rows == [16, 16]
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_trained_model_is_looked_at_once(batch):
    x, y = batch
    model = FAULTS["probabilities"]()
    assert len(told(lambda: ham.ham_loss(model, x, y, **TRAIN))) == 1
    assert not told(lambda: ham.ham_loss(model, x, y, **TRAIN))


# ---------------------------------------------------------------- during an attack
@pytest.mark.parametrize("factor", [0.0, torch.nan, torch.inf])
def test_rows_without_a_gradient_are_counted_by_attack(factor, batch):
    x, y = batch
    model = Through(before=lambda x: Zeroed.apply(x, factor))
    found = ham.evaluate(model, [(x[:16], y[:16]), (x[16:], y[16:])], ("clean", "fgsm", "pgd3", "cw3"), **HOW)
    assert {name: a.no_gradient for name, a in found.items()} == {"clean": 0, "fgsm": 24, "pgd3": 24, "cw3": 24}
    stored = judge(model, [(x, y)], ("clean", "pgd3"), classes=10, **HOW)
    assert (stored["clean"]["no_gradient"], stored["pgd3"]["no_gradient"]) == (0, 24)
    assert any("PGD had no gradient" in w for w in told(lambda: ham.pgd_attack(model, x, y, **HOW, steps=2)))
    assert not told(lambda: ham.pgd_attack(small_cnn(), x, y, **HOW, steps=2))


def test_a_stored_judgement_keeps_the_count(batch, tmp_path):
    x, y = batch
    model = Through(before=lambda x: Zeroed.apply(x, 0.0))
    how = HOW | {"classes": 10, "store": tmp_path / "flags.json"}
    first = judge(model, [(x, y)], ("pgd3",), **how)
    assert judge(model, [(x, y)], ("pgd3",), **how) == first
    assert first["pgd3"]["no_gradient"] == 24


def test_training_counts_rows_by_epoch_and_tells_once(batch):
    x, y = batch
    model = Through(before=lambda x: Zeroed.apply(x, 0.0))
    trainer = ham.HAMTrainer(model, sgd(model), **TRAIN, start_epoch=1, group=2)
    words = told(lambda: trainer.fit([(x, y)] * 3, 2))
    assert [r.no_gradient for r in trainer.history] == [72, 72]
    assert sum("the attack of the training had no gradient" in w for w in words) == 1


# ---------------------------------------------------------------- inference mode
def test_inference_mode(batch):
    """Judging is served, as Lightning wants it; training is refused; weights made inside are told."""
    x, y = batch
    plain, model = ham.evaluate(small_cnn(), [(x, y)], ("pgd2", "fgsm"), **HOW), small_cnn()
    with torch.inference_mode():
        assert ham.evaluate(model, [(x.clone(), y.clone())], ("pgd2", "fgsm"), **HOW) == plain
        assert ham.pgd_attack(model, x.clone(), y, **HOW, steps=2).shape == x.shape
        with pytest.raises(ValueError, match=r"torch.inference_mode: is on"):
            ham.ham_loss(model, x, y, **TRAIN)
        with pytest.raises(ValueError, match=r"torch.inference_mode: is on"):
            ham.HAMTrainer(model, sgd(model), **TRAIN).train_step(x, y, 1)
        inside = small_cnn()
    with pytest.raises(ValueError, match=r"model: its weights were made inside torch.inference_mode"):
        ham.evaluate(inside, [(x, y)], ("pgd2",), **HOW)


# ---------------------------------------------------------------- the command
@pytest.mark.parametrize("fault", [*FAULTS, *ERRORS])
def test_the_doctor_finds_it(fault, tmp_path, monkeypatch):
    (tmp_path / "nets_of_a_user.py").write_text(
        "from test_first_look import ERRORS, FAULTS\n"
        f"def make():\n    return FAULTS[{fault!r}]() if {fault!r} in FAULTS else ERRORS[{fault!r}][1]()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_of_a_user", raising=False)
    found = look_at("nets_of_a_user:make", "1x8x8")
    assert not found["ok"]
    assert [entry["name"] for entry in found["findings"]] == [fault]
    assert found["findings"][0]["remedy"] in "\n".join(found["lines"])


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("nets", "1x8x8", "--model: got 'nets'"),
        ("nets:nope", "1x8x8", "--model: nets has no function 'nope'"),
        ("no_such_module:f", "1x8x8", "--model: no_such_module cannot be imported"),
        ("builtins:dict", "1x8x8", "--model: builtins:dict gave dict"),
        ("nets:small_cnn", "1x8", "--input: got '1x8'"),
        ("nets:small_cnn", "3x8x8", r"model: nets:small_cnn cannot take images of 3x8x8 \(--input\)"),
        ("nets:small_cnn", "big", "--input: got 'big'"),
    ],
)
def test_the_doctor_names_a_bad_argument(name, size, message):
    with pytest.raises((ValueError, TypeError, ImportError, RuntimeError), match=message):
        look_at(name, size)


@pytest.mark.slow
def test_the_doctors_exit_status(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def fine():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
        "def bad():\n    return nn.Sequential(fine(), nn.Softmax(1))\n"
    )
    for name, status in (("fine", 0), ("bad", 1)):
        words = [sys.executable, "-m", "ham_kernels", "doctor", "--json", "--model", f"mine:{name}", "--input", "1x8x8"]
        done = subprocess.run(words, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert json.loads(done.stdout)["ok"] is (status == 0)


def test_threads_leave_modes_as_they_were(batch):
    x, y = batch
    model = small_cnn().train()
    model[2].eval()
    before = [m.training for m in model.modules()]
    found = []

    def work(call):
        found.append(call())

    judged = lambda: ham.evaluate(model, [(x, y)] * 3, ("pgd3",), **HOW)["pgd3"]  # noqa: E731
    calls = [judged, judged, lambda: ham.pgd_attack(model, x, y, **HOW, steps=5), judged]
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [m.training for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    assert len({str(f) for f in found if isinstance(f, ham.ClassAccuracy)}) == 1


# ---------------------------------------------------------------- one answer to all
@pytest.mark.parametrize(
    ("per_class", "answer"),
    [
        ((0.0, 1.0, 0.0), 1),
        ((0.01, 0.95, 0.02), 1),
        ((0.0, None, 1.0), 2),
        ((math.nan, 0.97, 0.0), 1),
        ((0.0, 0.5, 0.0), None),
        ((0.1, 0.95, 0.0), None),
        ((0.0, 0.0), None),
        ((1.0,), None),
        ((1.0, None), None),
    ],
)
def test_one_answer_by_the_accuracies(per_class, answer):
    assert answers_one_class(per_class) == answer


def test_a_model_whose_classes_are_in_another_order_answers_many():
    assert answers_one_class((0.0, 1.0, 0.0), [2, 1, 0]) is None
    assert answers_one_class((0.0, 1.0, 0.0), [1, 1, 1]) == 1

    class Other(torch.nn.Module):
        def forward(self, x):
            return 9.0 * torch.eye(3)[[2, 1, 0]][(3 * x[:, 0, 0, 0]).long()] + 0 * x.flatten(1)[:, :3]

    x = ((torch.arange(30) % 3 + 0.5) / 3)[:, None, None, None].expand(30, 1, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ham.evaluate(Other(), [(x, torch.arange(30) % 3)], ("clean",))["clean"]
    assert (found.per_class, found.one_class) == ((0.0, 1.0, 0.0), None)


def test_clean_images_need_no_gradient():
    class Blind(torch.nn.Module):
        @torch.no_grad()
        def forward(self, x):
            return x.flatten(1)[:, :3]

    x, y = torch.rand(20, 1, 2, 2), torch.arange(20) % 3
    assert 0 <= ham.evaluate(Blind(), [(x, y)], ("clean",))["clean"].accuracy <= 1
    with pytest.raises(ValueError, match="model: no gradient reaches the images"):
        ham.evaluate(Blind(), [(x, y)], ("clean", "fgsm"))


def test_the_best_weights_are_no_constant_classifier():
    """An untrained average that answers one class can have a better worst-case number than a model that learns."""
    saved = []
    job = object.__new__(train_command._Job)
    job.settings, job.best = ham.preset("digits"), {}
    job.trainer = SimpleNamespace(model=nn.Linear(1, 1), ema_model=nn.Linear(1, 1))
    job.run = SimpleNamespace(save_best=lambda weights, state: saved.append((weights, state["epoch"])))
    attack = job.settings.run.val_attack

    def judged(*per_class):
        one = answers_one_class(per_class)
        found = ham.ClassAccuracy(sum(per_class) / 2, per_class, min(per_class), 0.1, 100, one_class=one)
        return {"clean": found, attack: found}

    constant, learning = judged(1.0, 0.0), judged(0.3, 0.4)
    for epoch, (last, average) in enumerate([(constant, constant), (learning, constant), (constant, learning)], 1):
        report = ham.EpochReport(epoch, "ham", 1.0, 10, 5, 0, 1.0, val=last, val_ema=average)
        assert job._keep_best(report) is (epoch > 1)
    assert saved == [("best", 2), ("best_ema", 3)]
