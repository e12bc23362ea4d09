"""Teachers of distilling methods: given, refused, left as they were, loaded by the command line, known again."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import sgd, small_cnn
from runs_helper import TINY

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD
from ham_kernels.commands import flags
from ham_kernels.commands import train as train_command
from ham_kernels.commands.cli import main
from ham_kernels.commands.experiments import planned, without_idle_teacher
from ham_kernels.runs.folder import RunFolder
from ham_kernels.runs.presets import preset

ATTACK = {"eps": 0.2, "step_size": 0.05, "steps": 3}
DISTIL = ("rslad", "fair_ard", "absld")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(12, 1, 8, 8, generator=g), torch.randint(0, 10, (12,), generator=g)


def test_a_teacher_is_asked_for_and_no_other_method_takes_one(batch):
    model, rslad = small_cnn(), ham.methods.RSLAD()
    with pytest.raises(ValueError, match="teacher: got None; RSLAD learns from one"):
        ham.Trainer(model, sgd(model), rslad, **ATTACK)
    with pytest.raises(ValueError, match="teacher: got None; RSLAD learns from one"):
        ham.loss(rslad, model, *batch, **ATTACK)
    with pytest.raises(ValueError, match="teacher: got one, and TRADES learns from none"):
        ham.Trainer(model, sgd(model), ham.methods.TRADES(), **ATTACK, teacher=small_cnn())
    with pytest.raises(TypeError, match="teacher: got str; it must be a torch"):
        ham.methods.Objective(rslad, PGD(**ATTACK), teacher="model.pt")
    for switch in ({"loss": "boosted_ce"}, {"label_smoothing": 0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(switch))}: got .*; ABSLD follows its teacher"):
            ham.methods.ABSLD(**switch)
    with pytest.raises(ValueError, match="warm_up: got 'rslad'; it learns from a teacher"):
        ham.Trainer(model, sgd(model), ham.methods.HAM(start_epoch=2, screen_steps=1), **ATTACK, warm_up="rslad")
    other = ham.Trainer(model, sgd(model), rslad, **ATTACK, teacher=small_cnn(classes=7))
    with pytest.raises(ValueError, match="teacher: it knows 7 classes, and the model 10"):
        other.train_step(*batch, epoch=1)


@pytest.mark.parametrize("name", DISTIL)
def test_the_teacher_stays_as_it_is_and_out_of_the_state(name, batch):
    teacher, model = small_cnn(seed=3), small_cnn()
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    method = {m.name: m for m in (ham.methods.RSLAD, ham.methods.FairARD, ham.methods.ABSLD)}[name]()
    trainer = ham.Trainer(model, sgd(model), method, **ATTACK, teacher=teacher)
    calls = []
    teacher.register_forward_hook(lambda module, args, z: calls.append((len(args[0]), module.training)))
    trainer.train_step(*batch, epoch=1)
    trainer.train_step(*batch, epoch=1)
    assert calls == [(1, False), (12, False), (12, False)]  # one row tells the classes
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.state_dict().values(), strict=True))
    assert not any("teacher" in key for key in trainer.phases.method.state_dict())


def test_kept_rows_have_their_own_teachers_word(batch):
    x, y = batch
    teacher, model = small_cnn(seed=3), small_cnn()
    method = ham.methods.RSLAD(early_drop=True, screen_steps=1)
    objective = ham.methods.Objective(method, PGD(**ATTACK), teacher=teacher)
    y = torch.where(torch.arange(12) % 2 == 0, model.eval()(x).argmax(1), y)
    both = torch.cat([x, x.flip(0)]), torch.cat([y, y.flip(0)])
    for part in objective.group_examples(model, *both, (12, 12), seed=1, step=0):
        torch.testing.assert_close(part.teacher, teacher.eval()(part.x), rtol=1e-4, atol=1e-5)


def test_a_sweep_gives_the_teacher_to_those_that_learn_from_one():
    base = preset("digits")
    _, left_out = planned("methods", base, (0,))
    assert {name: why for name, why in left_out.items() if name in DISTIL} == {
        name: f"teacher: got None; {title} learns from one: give a run's folder or a checkpoint"
        for name, title in zip(DISTIL, ("RSLAD", "Fair-ARD", "ABSLD"), strict=True)
    }
    taught = flags.parse_train(["--dataset", "digits", "--method", "absld", "--teacher", "RUN"]).settings
    taught.check()
    runs, left_out = planned("methods", taught, (0,))
    assert {"rslad-seed0", "fair_ard-seed0", "fair_ard-on-rslad-seed0", "absld-jump-seed0"} <= {
        run.name for run in runs
    }
    assert all((run.settings.run.teacher == "RUN") == run.settings.method.needs_teacher for run in runs)
    assert without_idle_teacher(base) == base


@pytest.mark.slow
def test_a_teacher_is_found_again_from_elsewhere(tmp_path, monkeypatch):
    """Told relative to a folder that a resume, or a fine-tuning, is not started in."""
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "--device", "cpu"]
    train_command.train(flags.parse_train([*tiny, "--method", "pgd_at"]).settings, "t", quiet=True)
    told = [*tiny, "--method", "rslad", "--start-epoch", "1", "--teacher", "t"]
    train_command.train(flags.parse_train(told).settings, "student", quiet=True)
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    run = RunFolder.open(tmp_path / "student")
    assert run.settings().run.teacher == "t"
    assert train_command.resume(run.path, quiet=True).epoch == 4  # its teacher is there before it finds all done
    tuned = flags.parse_train(["--from", str(run.path), "--epochs", "1"]).settings
    assert tuned.run.teacher == str(tmp_path / "t")
    assert flags.parse_train(["--from", str(run.path), "--method", "trades"]).settings.run.teacher is None


@pytest.mark.slow
def test_trained_and_resumed_with_the_same_teacher_alone(tmp_path, capsys):
    """Of a run, and of a checkpoint of the same model; moved, and of other weights."""
    tiny = [*TINY, "--device", "cpu"]
    first = tmp_path / "first"
    train_command.train(flags.parse_train([*tiny, "--method", "pgd_at"]).settings, first, quiet=True)
    told = [*tiny, "--quiet", "--method", "absld", "--start-epoch", "1"]
    assert main(["train", *told, "--teacher", str(first), "--out", str(tmp_path / "student")]) == 0
    run = RunFolder.open(tmp_path / "student")
    digest = run.settings().run.teacher_digest
    assert len(digest) == 16
    weights = RunFolder.open(first).load_weights("ema")["model"]
    torch.save(weights, tmp_path / "t.pt")
    out = str(tmp_path / "of_file")
    assert main(["train", *told, "--teacher", str(tmp_path / "t.pt"), "--out", out]) == 0
    other = RunFolder.open(out)
    assert other.settings().run.teacher_digest == digest
    ours, theirs = (r.load_weights("last")["model"] for r in (run, other))
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True))

    torch.save({name: value + 1 for name, value in weights.items()}, tmp_path / "t.pt")
    capsys.readouterr()
    assert main(["train", "--resume", out, "--quiet"]) != 0
    assert "another teacher needs a new run" in capsys.readouterr().err
    assert main(["train", *told, "--teacher", str(tmp_path / "no.pt"), "--out", str(tmp_path / "none")]) != 0
    assert "teacher: " in capsys.readouterr().err
