"""Every method of the registry: trains, resumes bit by bit, refuses bad settings, combines with HAM's switches."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from graph_helpers import Recorder, give_graphs
from nets import Constant, Counting, sgd, small_cnn
from runs_helper import TINY

import ham_kernels as ham
from ham_kernels import methods
from ham_kernels.attack.pgd import PGD
from ham_kernels.commands.cli import main
from ham_kernels.commands.flags import parse_train
from ham_kernels.methods import settings as settings_module
from ham_kernels.methods.registry import class_of
from ham_kernels.runs.config_file import from_toml, to_toml
from ham_kernels.runs.folder import RunFolder
from ham_kernels.runs.settings import TrainSettings

ATTACK = {"eps": 0.2, "step_size": 0.05, "steps": 5}
NO_STEPS = ("natural", "fgsm_rs", "n_fgsm", "free_at")  # whose attack leaves no steps behind a screening
TOLD_IMAGES = ("atta",)  # trains on batches that tell which images they are: see test_atta.py
TUNES_ONLY = ("offsets",)  # refuses screening, and to be a loss in a loop: see test_offsets.py
every_method = pytest.mark.parametrize("name", [n for n in methods.names() if n not in TOLD_IMAGES])
loop_method = pytest.mark.parametrize("name", [n for n in methods.names() if n not in TOLD_IMAGES + TUNES_ONLY])
screenable = pytest.mark.parametrize(
    "name", [n for n in methods.names() if n not in NO_STEPS + TOLD_IMAGES + TUNES_ONLY]
)
pytestmark = pytest.mark.usefixtures("one_thread")


def method_of(name: str, **changes) -> methods.Method:
    """From the first epoch on, whatever its paper says."""
    few = {"replays": 2} if name == "free_at" else {}
    return class_of(name)(**{"start_epoch": 1, "screen_steps": 2, **few, **changes})


def plain(name: str, **changes) -> methods.Method:
    """Without HAM's switches; HAM without them is PGD-AT."""
    return method_of("pgd_at" if name == "ham" else name, **changes)


def trainer_of(method, model=None, **options) -> ham.Trainer:
    model = small_cnn() if model is None else model
    return ham.Trainer(model, sgd(model), method, **teacher_of(method), **ATTACK | options)


def objective_of(method, pgd: PGD) -> methods.Objective:
    return methods.Objective(method, pgd, **teacher_of(method))


def teacher_of(method) -> dict:
    return {"teacher": small_cnn()} if method.needs_teacher else {}


@pytest.fixture
def batches(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(n, 1, 8, 8, generator=g), torch.randint(0, 10, (n,), generator=g)) for n in (24, 24, 24, 9)]


def assert_same_state(ours, theirs):
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_names():
    assert methods.names()[:4] == ("pgd_at", "ham", "fair", "trades")
    assert {methods.HAM, methods.PGDAT, methods.TRADES, methods.NFGSM, methods.FGSMRS, methods.Natural} <= {
        class_of(name) for name in methods.names()
    }
    assert len({class_of(name).title for name in methods.names()}) == len(methods.names())


def test_the_old_name_of_the_room(batches):
    with pytest.warns(DeprecationWarning, match=r"ham_kernels\.recipes is ham_kernels\.methods now"):
        from ham_kernels import recipes
    x, y = batches[0]
    recipe = recipes.ham(PGD(**ATTACK), 2, lam=0.5)
    assert recipe.method == methods.HAM(screen_steps=2, lam=0.5)
    assert recipes.n_fgsm(PGD(**ATTACK), 1.0).method == methods.NFGSM(noise=1.0)
    assert recipes.pgd_at(PGD(**ATTACK)).examples(small_cnn(), x, y, seed=1, step=1).n_kept == len(y)
    assert recipes.ham_loss is ham.ham_loss


# ---------------------------------------------------------------- each by itself
@every_method
def test_trains_and_goes_on_bit_by_bit(name, batches):
    """Stopped within an epoch, and after one; the second trainer knows nothing but the state."""
    whole = trainer_of(method_of(name), ema_decay=0.9)
    whole.fit(batches, epochs=3)
    assert [e.phase for e in whole.history] == [name] * 3
    assert all(e.loss > 0 for e in whole.history)
    for stop_at in (3, 4, 6):
        first, second = trainer_of(method_of(name), ema_decay=0.9), trainer_of(method_of(name), ema_decay=0.9)

        def stop(_, trainer=first, stop_at=stop_at):
            if trainer.steps_done == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            first.fit(batches, epochs=3, on_batch_end=stop)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        second.fit(batches, epochs=3)
        assert_same_state(second.model, whole.model)
        assert_same_state(second.ema_model, whole.ema_model)
        assert [(e.loss, e.n_hard, e.watch) for e in second.history] == [
            (e.loss, e.n_hard, e.watch) for e in whole.history
        ]


@every_method
def test_settings_are_written_read_and_refused(name, tmp_path):
    kind = class_of(name)
    settings = TrainSettings(method=method_of(name))
    (tmp_path / "c.toml").write_text(to_toml(settings))
    assert from_toml(tmp_path / "c.toml", TrainSettings()) == settings
    assert parse_train(["--method", name]).settings.method.name == name
    for field in dataclasses.fields(kind):
        with pytest.raises((TypeError, ValueError), match=field.name):
            kind(**{field.name: object()})
    with pytest.raises(ValueError, match="start_epoch: got 0; it must be >= 1"):
        kind(start_epoch=0)
    with pytest.raises(TypeError, match="nonsense"):
        kind(nonsense=1)
    with pytest.raises(ValueError, match="group: got 0"):
        kind(group=0)
    assert method_of(name).describe().startswith(kind.title)


@every_method
def test_one_row(name, batches):
    """BatchNorm has no statistics of one row, and uses its own."""
    trainer = trainer_of(method_of(name))
    x, y = batches[0]
    before = [b.clone() for b in trainer.model.buffers()]
    report = trainer.train_step(x[:1], y[:1], epoch=1)
    assert report.n == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.buffers(), strict=True))


@loop_method
def test_a_loss_in_somebodys_loop(name, batches):
    model = small_cnn()
    method = method_of(name, easy="stop")
    loss = ham.loss(
        objective_of(method, PGD(**ATTACK)) if method.needs_teacher else method, model, *batches[0], **ATTACK
    )
    loss.backward()
    assert loss.dim() == 0
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())


@every_method
def test_graphs_change_nothing(name, batches):
    """CUDA graphs, by a stand-in that replays operations without their Python."""
    ours, theirs = trainer_of(method_of(name)), trainer_of(method_of(name))
    give_graphs(ours, Recorder())
    for _ in range(3):
        for x, y in batches:
            a, b = ours.train_step(x, y, epoch=1), theirs.train_step(x, y, epoch=1)
            assert (a.n, a.n_hard, a.n_kept) == (b.n, b.n_hard, b.n_kept)
            assert a.loss == pytest.approx(b.loss, rel=1e-4)
    assert len(ours.engine.graphs) > 0


# ---------------------------------------------------------------- with HAM's switches
@screenable
@pytest.mark.parametrize("easy", ["drop", "stop", "jump"])
@pytest.mark.parametrize("switches", [{}, {"reweight": True}, {"screen": "one_step"}, {"rows": "random"}])
def test_screening(name, easy, switches, batches):
    """Rows in the loss are the hard ones, or all; rows that stop are at x^M, and no forward moves those that jump."""
    x, y = batches[0]
    model = Counting(small_cnn())
    y = torch.where(torch.arange(len(y)) < 12, model.eval()(x).argmax(1), y)  # some are right on clean images
    model.train()
    method = method_of(name, early_drop=True, easy=easy, **{"reweight": False} | switches)
    objective = objective_of(method, PGD(**ATTACK))
    objective._prepare(model, x)  # one row, once in a training
    model.forward_rows = model.input_backward_rows = 0
    mined = objective.examples(model, x, y, seed=1, step=2)
    h, k, n = mined.n_hard / mined.n, objective.pgd.steps, mined.n
    assert 0 < mined.n_hard < n
    screening = 1 if switches.get("screen") else 2
    clean = method.target_forwards  # the prediction of the clean images
    assert model.full_batch_forwards(n) == pytest.approx(clean + 2 * screening + 1 + 2 * h * (k - 2))
    assert mined.n_kept == (mined.n_hard if easy == "drop" else n)
    weighs = method.reweight or method.counts_right or method.looks_at_classes
    assert mined.weights is None or weighs
    assert mined.weights is not None or not method.reweight
    if mined.weights is not None and method.scales_weights:
        assert mined.weights.mean().item() == pytest.approx(1.0, rel=1e-5)
    assert ((mined.x_adv - mined.x).abs() <= objective.pgd.eps + 1e-6).all()
    loss = objective.loss(model, mined)
    assert loss.isfinite()


@screenable
def test_hard_rows_are_the_same_however_easy_ones_go_on(name, batches):
    x, y = batches[0]
    model = small_cnn()
    y = torch.where(torch.arange(len(y)) < 12, model.eval()(x).argmax(1), y)
    model.train()
    found = {}
    for easy in ("drop", "stop", "jump"):
        method = method_of(name, early_drop=True, easy=easy, reweight=False)
        found[easy] = objective_of(method, PGD(**ATTACK)).examples(model, x, y, seed=1, step=2)
    hard = found["stop"].hard
    assert torch.equal(found["drop"].x_adv, found["stop"].x_adv[hard])
    assert torch.equal(found["drop"].x_adv, found["jump"].x_adv[hard])
    screened = objective_of(plain(name), PGD(**ATTACK | {"steps": 2}))
    early = screened.examples(model, x, y, seed=1, step=2).x_adv
    assert torch.equal(found["stop"].x_adv[~hard], early[~hard])
    # what three repetitions of the last step lead to, each projected and clipped
    before = objective_of(plain(name), PGD(**ATTACK | {"steps": 1}))
    step = early - before.examples(model, x, y, seed=1, step=2).x_adv
    point = early
    for _ in range(3):
        point = torch.clamp(point + step, x - before.pgd.eps, x + before.pgd.eps).clamp(0, 1)
    torch.testing.assert_close(found["jump"].x_adv[~hard], point[~hard], rtol=0, atol=1e-6)


@screenable
@pytest.mark.parametrize("easy", ["drop", "stop", "jump"])
def test_no_hard_row(name, easy, batches):
    """Dropping leaves nothing to train on; stopping and jumping leave all."""
    x, _ = batches[0]
    model = Constant([3.0] + [0.0] * 9)
    trainer = trainer_of(method_of(name, early_drop=True, easy=easy), model)
    before = copy.deepcopy(model.state_dict())
    report = trainer.train_step(x, torch.zeros(len(x), dtype=torch.int64), epoch=1)
    assert report.n_hard == 0
    assert report.n_kept == (0 if easy == "drop" else len(x))
    moved = any(not torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert moved == (easy != "drop")


@screenable
@pytest.mark.parametrize("easy", ["drop", "stop", "jump"])
@pytest.mark.parametrize("updates", ["each", "one"])
def test_groups(name, easy, updates, batches):
    method = method_of(name, early_drop=True, easy=easy, group=2, group_updates=updates, reweight=True)
    trainer = trainer_of(method)
    (report,) = trainer.fit(batches, epochs=1)
    assert report.n == 81
    assert report.n_kept == (report.n_hard if easy == "drop" else 81)
    assert trainer.steps_done == 4


@screenable
def test_a_group_is_its_batches(name, batches):
    """What one attack on two batches gives, cut into them, is what each batch's own rows became."""
    (x, y), (x2, y2) = batches[:2]
    model = small_cnn()
    y = torch.where(torch.arange(len(y)) < 12, model.eval()(x).argmax(1), y)
    model.train()
    objective = objective_of(method_of(name, early_drop=True, reweight=True), PGD(**ATTACK))
    both = torch.cat([x, x2]), torch.cat([y, y2])
    whole = objective.examples(model, *both, seed=1, step=2)
    parts = objective.group_examples(model, *both, (len(y), len(y2)), seed=1, step=2)
    assert [p.n for p in parts] == [len(y), len(y2)]
    assert sum(p.n_hard for p in parts) == whole.n_hard
    assert torch.equal(torch.cat([p.x_adv for p in parts]), whole.x_adv)
    for part, labels in zip(parts, (y, y2), strict=True):
        if objective.method.scales_weights:
            assert part.weights.mean().item() == pytest.approx(1.0, rel=1e-5)
        assert int(part.hard.sum()) == part.n_hard == part.n_kept
        assert torch.equal(part.y, labels[part.hard])


@screenable
@pytest.mark.parametrize("easy", ["drop", "jump"])
def test_step_sizes(name, easy, batches):
    """One step per size, in units of eps; screening and jumping count in them."""
    x, y = batches[0]
    sized = objective_of(plain(name, step_sizes=(0.25,) * 5), PGD(**ATTACK))
    usual = objective_of(plain(name), PGD(**ATTACK))
    model = small_cnn()
    a, b = (o.examples(model, x, y, seed=1, step=2).x_adv for o in (sized, usual))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    short = method_of(name, step_sizes=(1.0, 0.5, 0.25), early_drop=True, easy=easy, screen_steps=1)
    counted = Counting(small_cnn())
    objective = objective_of(short, PGD(**ATTACK))
    objective._prepare(counted, x)
    counted.forward_rows = counted.input_backward_rows = 0
    mined = objective.examples(counted, x, y, seed=1, step=2)
    assert ((mined.x_adv - mined.x).abs() <= objective.pgd.eps + 1e-6).all()
    clean = short.target_forwards
    assert counted.full_batch_forwards(mined.n) == pytest.approx(clean + 2 + 1 + 2 * 2 * mined.n_hard / mined.n)
    with pytest.raises(ValueError, match="screen_steps: got 3 with steps=3"):
        objective_of(dataclasses.replace(short, screen_steps=3), PGD(**ATTACK))


@pytest.mark.parametrize("name", NO_STEPS)
def test_screening_needs_steps(name):
    with pytest.raises(ValueError, match=r"screen_steps: got 3 with steps=1|early_drop: got True"):
        objective_of(class_of(name)(early_drop=True), PGD(**ATTACK))
    with pytest.raises(ValueError, match="step_sizes: got"):
        class_of(name)(step_sizes=(1.0,))


# ---------------------------------------------------------------- a method that nobody knows
@pytest.fixture
def dummy():
    """A method of this file, known to nothing else of the package's."""

    @dataclasses.dataclass(frozen=True)
    class Dummy(methods.Method):
        """Class weights from what it remembers, a hook around updates, a gate on the average."""

        name = "dummy"
        title = "Dummy"

        strength: float = 0.5
        """Of the class weights."""

        def remembers(self, classes):
            return {"seen": torch.zeros(classes), "epochs": torch.zeros((), dtype=torch.int64)}

        def attack_on(self, pgd, y, memory):
            return dataclasses.replace(pgd, eps=pgd.eps * (1 + 0.1 * (y % 2)))

        def loss_of(self, model, examples, memory):
            memory.seen += torch.bincount(examples.y, minlength=len(memory.seen))
            losses = torch.nn.functional.cross_entropy(model(examples.x_adv), examples.y, reduction="none")
            weights = 1 + self.strength * memory.seen[examples.y] / memory.seen.sum()
            return (losses * weights).mean()

        def end_epoch(self, end, memory):
            memory.epochs += 1

        def keeps_average(self, end, memory):
            return end.epoch != 2

    yield Dummy
    del settings_module._registry["dummy"]


@pytest.mark.slow
def test_a_method_in_one_file(dummy, tmp_path, capsys):
    """Trained by `ham train`, stopped, resumed, judged and reported with no other edit."""
    out = [str(tmp_path / name) for name in ("whole", "paused", "pgd_at")]
    flags = [*TINY, "--epochs", "4", "--device", "cpu", "--quiet"]
    assert main(["train", *flags, "--method", "dummy", "--strength", "0.7", "--out", out[0]]) == 0
    settings = RunFolder.open(out[0]).settings()
    assert settings.method == dummy(strength=0.7, start_epoch=3, screen_steps=1)
    RunFolder.create(out[1], settings)
    assert main(["train", "--resume", out[1], "--until-epoch", "2", "--quiet"]) == 0
    assert main(["train", "--resume", out[1], "--quiet"]) == 0
    whole, paused = (RunFolder.open(path).checkpoints.load_newest()[1]["trainer"] for path in out[:2])
    for part in ("model", "ema"):
        assert all(torch.equal(a, b) for a, b in zip(whole[part].values(), paused[part].values(), strict=True))
    assert int(whole["memory"]["method"]["epochs"]) == 2
    assert torch.equal(whole["memory"]["method"]["seen"], paused["memory"]["method"]["seen"])
    assert main(["train", *flags, "--method", "pgd_at", "--out", out[2]]) == 0
    for path in out[::2]:
        assert main(["evaluate", path, "--attacks", "clean", "pgd5", "--no-masking", "--no-analyses", "--quiet"]) == 0
    assert main(["report", out[0], out[2], "--out", str(tmp_path / "report")]) == 0
    data = json.loads((tmp_path / "report" / "data.json").read_text())
    assert [g["title"] for s in data["sections"] for g in s["groups"]] == ["PGD-AT", "Dummy"]
    with pytest.raises(SystemExit):
        main(["train", "--method", "dummy", "--help"])
    assert "--strength" in capsys.readouterr().out


def test_what_it_remembers_is_undone_with_an_update_that_fails(dummy, batches):
    trainer = trainer_of(dummy(), ema_decay=0.5)
    x, y = batches[0]
    trainer.train_step(x, y, epoch=1)
    memory = trainer.phases.method
    seen, weights = memory.seen.clone(), copy.deepcopy(trainer.model.state_dict())
    trainer.model.train()
    handle = trainer.model.register_forward_hook(lambda m, i, z: z * torch.nan if m.training else z)
    with pytest.raises(ham.NonFiniteError):
        trainer.train_step(x, y, epoch=1)
    handle.remove()
    assert torch.equal(memory.seen, seen)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), trainer.model.state_dict().values(), strict=True))


def test_graphs_count_what_it_remembers_once(dummy, batches):
    ours, theirs = trainer_of(dummy()), trainer_of(dummy())
    give_graphs(ours, Recorder())
    for _ in range(4):
        for x, y in batches[:2]:
            ours.train_step(x, y, epoch=1)
            theirs.train_step(x, y, epoch=1)
    assert torch.equal(ours.phases.method.seen, theirs.phases.method.seen)


def test_the_gate_closes_the_average(dummy, batches):
    """After epoch 2 the updates of epoch 3 do not enter; those of epoch 4 do."""
    trainer = trainer_of(dummy(), ema_decay=0.5)
    averages = []

    def note(_):
        averages.append([p.clone() for p in trainer.ema_model.parameters()])

    trainer.fit(batches, epochs=4, on_epoch_end=note)
    same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(averages)]
    assert same == [False, True, False]


def test_a_warm_up_of_the_same_name_has_a_memory_of_its_own(dummy, batches):
    """It survives a stop within the warm-up."""
    whole, first, second = (
        trainer_of(dummy(start_epoch=3, early_drop=True, screen_steps=2), warm_up="dummy") for _ in range(3)
    )
    whole.fit(batches, epochs=3)

    def stop(_):
        if first.steps_done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.fit(batches, epochs=3, on_batch_end=stop)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit(batches, epochs=3)
    assert_same_state(second.model, whole.model)
    assert torch.equal(second.phases._warm_up.seen, whole.phases._warm_up.seen)
    assert whole.phases._warm_up.seen.sum() == 2 * 81


def test_a_stop_while_the_watch_draws_ends_no_epoch_twice(dummy, batches):
    class Loader(list):
        draws = 0

        def __iter__(self):
            self.draws += 1
            if self.draws == 2:
                raise KeyboardInterrupt
            return super().__iter__()

    kind = type("Watched", (dummy,), {"one_step": True, "attack_on": methods.Method.attack_on})
    trainer = trainer_of(kind(start_epoch=1))
    loader = Loader(batches)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loader, epochs=1)
    trainer.fit(loader, epochs=1)
    assert int(trainer.phases.method.epochs) == 1


@pytest.mark.parametrize(
    ("idle", "same"),
    [
        (methods.PGDAT(class_from=5), methods.PGDAT()),
        (methods.PGDAT(class_from=5, trust=1.0), methods.PGDAT(trust=1.0)),
        (methods.PGDAT(early_drop=False, screen_steps=5, lam=2.0), methods.PGDAT()),
        (methods.FairARD(clean_share=0.5), methods.FairARD()),
        (methods.FairARD(base="rslad", temperature=3.0), methods.FairARD(base="rslad")),
        (methods.CFA(base="pgd_at", beta=2.0, lam_beta=0.1), methods.CFA(base="pgd_at")),
        (methods.MAIL(base="mart", loss="boosted_ce"), methods.MAIL(base="mart")),
    ],
)
def test_settings_without_an_effect_tell_no_methods_apart(idle, same):
    assert idle.in_effect() == same.in_effect()
    assert idle.describe() == same.describe()
    assert idle.begins() == same.begins()


def test_classes_are_treated_apart_from_an_epoch_on():
    for name in ("wat", "fsr", "frl", "cfol", "fair_tat", "dafa", "cfa", "absld", "fair_ard"):
        method = class_of(name)(class_from=9)
        assert method.in_effect()["class_from"] == 9
        assert ("class_from", 9, "classes") in method.begins()
    assert methods.PGDAT(class_from=9, class_weights="hedge").begins() == (("class_from", 9, "classes"),)


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"name: 'trades' of .*Other is that of TRADES already"):

        class Other(methods.Method):
            name = "trades"
