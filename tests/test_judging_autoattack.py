"""AutoAttack by pyautoattack: at full strength, inside the ball, nothing around it changed; its fast search."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from judging_nets import EPS, STEP_SIZE, digit_batches, robust_cnn
from nets import Counting, small_cnn

import ham_kernels as ham
from ham_kernels import engine
from ham_kernels.attack.pgd import PGD
from ham_kernels.evaluation import autoattack, judge

pyautoattack = pytest.importorskip("pyautoattack")

pytestmark = pytest.mark.slow

BALLS = {"linf": PGD(EPS, STEP_SIZE, 0), "l2": PGD(1.0, 0.25, 0, "l2")}


@pytest.fixture
def quick(monkeypatch):
    """A tenth of the work or less."""
    for name, value in (("STEPS", 5), ("TARGETS", 2), ("QUERIES", 50)):
        monkeypatch.setattr(autoattack, name, value)


def found(part: str, model, x, y, pgd, seed: int = 1) -> torch.Tensor:
    return autoattack.examples(part, model, x, y, 10, pgd, seed)


def batch(images: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    return digit_batches(images)[0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("part", ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"])
def test_examples_lie_in_the_ball(quick, norm, part):
    (x, y), pgd = batch(), BALLS[norm]
    model = robust_cnn()
    with engine.attack_mode(model):
        x_adv = found(part, model, x, y, pgd)
    assert (x_adv - autoattack.projected(x_adv, x, pgd)).abs().max() < 1e-5
    assert (x_adv != x).flatten(1).any(1).sum() >= {"fab-t": 0, "square": 1}.get(part, 3)  # 5 steps, 50 queries


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
        judged = autoattack.survivors(model, x, y, BALLS[norm], name="autoattack", seed=1, precision="fp32")
        answer = model(x).argmax(1)
        expected = first = answer == y
        for part in autoattack.parts("autoattack", 10):
            rows = expected.nonzero()[:, 0]
            x_adv = found(part, model, x[rows], y[rows], BALLS[norm])
            expected = expected.clone()
            answer[rows] = model(x_adv).argmax(1)
            expected[rows] = answer[rows] == y[rows]
            assert judged.lost[part] == len(rows) - expected.sum()
    assert judged.classes == 10
    assert not judged.correct[:3].any()
    assert torch.equal(judged.correct, expected)
    assert torch.equal(judged.answers, answer)
    assert expected.sum() < first.sum()


def test_runs_at_the_published_strength(monkeypatch):
    """As the package's own "standard" does, part for part; 9 targets where there are so many classes."""
    own = pyautoattack.AutoAttack(torch.nn.Identity(), norm="Linf", eps=0.1, seed=7)
    assert autoattack.parts("autoattack", 10) == tuple(own.attacks_to_run)
    seen = {}

    def record(self, x, y):
        seen[type(self).__name__] = self
        return x

    for kind in (type(own.apgd), type(own.apgd_targeted), type(own.fab), type(own.square)):
        monkeypatch.setattr(kind, "perturb", record)
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    for part in own.attacks_to_run:
        autoattack.examples(part, small_cnn(classes=30), x, y, 30, PGD(0.1, 0.1, 0), 7)
    theirs = {type(part).__name__: part for part in (own.apgd, own.apgd_targeted, own.fab, own.square)}
    assert list(seen) == list(theirs)
    settings = ("n_iter", "n_restarts", "n_target_classes", "n_queries", "loss", "norm", "eps", "seed", "eot_iter")
    for name, part in seen.items():
        for setting in settings:
            if hasattr(theirs[name], setting):
                assert getattr(part, setting) == getattr(theirs[name], setting), (name, setting)
    assert seen["FABAttack_PT"].targeted
    autoattack.examples("apgd-t", small_cnn(classes=5), x, y, 5, PGD(0.1, 0.1, 0), 7)
    assert seen["APGDAttack_targeted"].n_target_classes == 4


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("first", [0, 7])
def test_flags_are_those_of_the_package_alone(quick, norm, first):
    """Of its own loop over the parts, with the same seed; the second batch here has the next one."""
    batches = list(zip(*(t.split(20) for t in batch(40)), strict=True))
    model, pgd = robust_cnn().eval(), BALLS[norm]
    expected = ""
    for seed, (x, y) in enumerate(batches, first):
        theirs = pyautoattack.AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=pgd.eps, seed=seed)
        for part in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
            part.n_iter, part.n_target_classes = autoattack.STEPS, autoattack.TARGETS
        theirs.square.n_queries = autoattack.QUERIES
        x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=len(y))
        expected += "".join(str(int(right)) for right in model(x_adv).argmax(1) == y)
    how = {"classes": 10, "eps": pgd.eps, "step_size": pgd.step_size, "norm": norm, "seed": first}
    found = judge(model, batches, ["autoattack"], **how)["autoattack"]
    assert found["correct"] == expected
    assert 0 < expected.count("1") < 40


def test_agrees_with_the_package_alone():
    """The same images survive at full strength as in pyautoattack's own loop."""
    x, y = batch(40)
    model = robust_cnn().eval()
    autoattack_of = pyautoattack.AutoAttack(model, norm="Linf", eps=EPS, seed=0)
    for name, part in (("n_queries", autoattack_of.square), ("n_target_classes", autoattack_of.fab)):
        setattr(part, name, {"n_queries": 100, "n_target_classes": 2}[name])  # parts that take long and find nothing
    x_adv, _ = autoattack_of.run_standard_evaluation(x, y, batch_size=40)
    found = judge(model, [(x, y)], ["apgd"], classes=10, eps=EPS, step_size=STEP_SIZE)["apgd"]
    assert found["correct"] == "".join(str(int(right)) for right in model(x_adv).argmax(1) == y)


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

    def __init__(self, classes: int = 4):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return x.flatten(1)[:, : self.classes] * 3


def test_model_without_parameters_and_bf16(quick, capsys):
    x = torch.rand(12, 1, 8, 8)
    y = x.flatten(1)[:, :4].argmax(1)
    for precision in ("fp32", "bf16"):
        result = ham.evaluate(Linear(), [(x, y)], ["clean", "autoattack"], eps=0.2, precision=precision)
        assert result["autoattack"].accuracy < result["clean"].accuracy == 1.0
    assert "device" not in capsys.readouterr().out
    for attack in ("autoattack", "apgd"):
        with pytest.raises(TypeError, match="x: got bfloat16; AutoAttack needs images and weights in float32"):
            ham.evaluate(copy.deepcopy(robust_cnn()).bfloat16(), [(x.bfloat16(), y)], [attack], eps=0.2)
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
    assert (resumed["correct"], resumed["answers"]) == (whole["correct"], whole["answers"])
    assert whole["settings"]["steps"] == 5
    assert "step_size" not in whole["settings"]


@pytest.mark.parametrize(("classes", "runs"), [
    (2, ["apgd-ce", "fab-t", "square"]), (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
    (4, ["apgd-ce", "apgd-t", "fab-t", "square"]),
])  # fmt: skip
def test_few_classes_are_attacked_by_the_parts_that_can(quick, classes, runs):
    """And the result says which."""
    torch.manual_seed(0)
    x = torch.rand(24, 1, 8, 8)
    model = Linear(classes)
    y = model(x).argmax(1)
    found = judge(model, [(x, y)], ["clean", "autoattack"], classes=classes, eps=0.4, step_size=0.1)
    assert found["autoattack"]["settings"]["parts"] == runs
    assert found["autoattack"]["accuracy"]["value"] < found["clean"]["accuracy"]["value"] == 1.0
    assert set(found["autoattack"]["lost"]) <= set(runs)


def test_what_cannot_be_attacked_is_said():
    with pytest.raises(ValueError, match="x: got shape"):
        ham.evaluate(Linear(), [(torch.rand(4, 64), torch.arange(4))], ["autoattack"], eps=0.1)
    with pytest.raises(ValueError, match="x: got images 4 high; Square under l2 needs at least 5"):
        ham.evaluate(small_cnn(), [(torch.rand(4, 1, 4, 4), torch.arange(4))], ["autoattack"], eps=0.1, norm="l2")
    with pytest.raises(ValueError, match="search: got 'quick'"):
        ham.evaluate(small_cnn(), [batch()], ["pgd2"], eps=0.1, search="quick")


# ------------------------------------------------------------ on a faster form of the model
@pytest.mark.parametrize("attack", ["pgd20", "apgd"])
def test_fast_search_is_judged_by_the_plain_model(quick, attack):
    """The same flags within one image of 60; weights, their order and the model's layers as they were."""
    data, model = [batch(60)], robust_cnn()
    before = {k: (v.clone(), v.is_contiguous()) for k, v in model.state_dict().items()}
    how = {"classes": 10, "eps": EPS, "step_size": STEP_SIZE}
    fast, plain = (judge(model, data, [attack], search=s, **how)[attack] for s in ("fast", "plain"))
    assert sum(a != b for a, b in zip(fast["correct"], plain["correct"], strict=True)) <= 1
    assert fast["settings"]["search"]["channels_last"]
    assert "search" not in plain["settings"]
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k][0])
        assert v.is_contiguous() == before[k][1]
    assert not any("forward" in vars(m) for m in model.modules())


class Blinded(engine.Engine):
    """Searches on a model that answers class 0 for half of the rows: for it they are lost already."""

    def forward(self, model, x):
        z = model(x)
        blind = torch.arange(len(x)) % 2 == 0
        return torch.where(blind[:, None], torch.nn.functional.one_hot(torch.zeros(len(x), dtype=int), 10) * 9.0, z)


def test_what_the_fast_form_takes_for_lost_is_searched_on_the_plain_one(quick):
    data, model = [batch(40)], robust_cnn()
    how = {"classes": 10, "eps": EPS, "step_size": STEP_SIZE}
    blinded = judge(model, data, ["apgd"], search=Blinded(device=torch.device("cpu")), **how)["apgd"]
    plain = judge(model, data, ["apgd"], **how)["apgd"]
    assert blinded["accuracy"]["value"] < plain["accuracy"]["value"] + 0.12  # 0.25 more if they were left alone


def test_missing_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    model = Counting(small_cnn())
    with pytest.raises(ImportError, match=r'"autoattack" .*need pyautoattack.*pip install "ham_kernels\[autoattack\]"'):
        judge(model, [batch()], ["clean", "autoattack"], classes=10, eps=EPS, step_size=STEP_SIZE)
    assert model.forward_rows == 0


def test_at_full_strength_it_is_at_least_as_strong_as_pgd():
    attacks = ["clean", "pgd20", "cw20", "autoattack"]
    result = ham.evaluate(robust_cnn(), [batch(12)], attacks, eps=EPS, step_size=STEP_SIZE)
    strongest = min(result["pgd20"].accuracy, result["cw20"].accuracy)
    assert result["autoattack"].accuracy <= strongest < result["clean"].accuracy
