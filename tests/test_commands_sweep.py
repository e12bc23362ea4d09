"""`ham sweep`: the paper's experiments, what goes on after a stop, and what is told before anything is trained."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import threading

import pytest
from runs_helper import TINY, assert_same_weights, finish, ham, wait_for

from ham_kernels.commands import cli, flags
from ham_kernels.commands import sweep as sweep_command
from ham_kernels.commands import train as train_command
from ham_kernels.commands.experiments import cells
from ham_kernels.runs.folder import JUDGING_LOCK, RunFolder
from ham_kernels.runs.presets import preset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("no_gpu")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp("commands") / "run"
    train_command.train(flags.parse_train(list(TINY)).settings, out, quiet=True)
    return out


def test_experiments_are_the_papers():
    base = preset("cifar10")
    paper = cells("paper", base, (0, 1))
    names = [c.name for c in paper]
    assert len(names) == len(set(names)) == 2 * 21
    assert names[:2] == ["pgd_at-seed0", "ham-M3-lam1-seed0"]
    assert {(c.settings.method.screen_steps, c.settings.method.lam) for c in paper[1:21]} == {
        (m, lam) for m in (1, 2, 3, 4, 5) for lam in (0.5, 1.0, 1.5, 2.0)
    }
    ablations = {c.name.removesuffix("-seed0"): c.settings for c in cells("ablations", base, (0,))}
    stem = "ham-M3-lam1"
    assert not ablations[f"{stem}-drop_only"].method.reweight
    assert not ablations[f"{stem}-reweight_only"].method.early_drop
    assert ablations[f"{stem}-random_rows"].method.rows == "random"
    assert ablations[f"{stem}-frozen_bn"].method.freeze_bn
    assert ablations[f"{stem}-bn_of_all_rows"].method.bn_rows == "all"
    assert ablations[stem] == cells("ham", base, (0,))[0].settings
    for cell in paper:
        cell.settings.check()
    with pytest.raises(ValueError, match=r"seeds: got \(1, 1\)"):
        cells("ham", base, (1, 1))


def test_sweep_goes_on_and_survives_a_failed_run(tmp_path, run):
    """Stopped after its first run, with another one broken by hand: the rest is done, the broken one is named."""
    command = ("sweep", "ham", *TINY, "--seeds", "0", "1", "--attacks", "clean", "pgd2", "--out", "sweep")
    first, broken = (tmp_path / f"sweep/ham-M1-lam1-seed{seed}" for seed in (0, 1))
    process = ham(*command, cwd=tmp_path, start_new_session=True)
    wait_for((first / "checkpoints").exists, process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C on a terminal
    code, out = finish(process)
    assert code == 130, out
    assert "the same command goes on" in out
    assert not RunFolder(first).busy()  # its process has ended before the sweep's
    assert not broken.exists()
    base = flags.parse_sweep(list(command[1:])).settings
    RunFolder.create(broken, cells("ham", base, (1,))[0].settings)
    (broken / "checkpoints").mkdir()
    (broken / "checkpoints/step_0000000001.pt").write_bytes(b"not a checkpoint")
    code, out = finish(ham(*command, cwd=tmp_path))
    assert code == 1, out
    assert "ham-M1-lam1-seed1: FAILED: `ham train` ended with 2" in out
    assert "step_0000000001.pt" in out
    outcome = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert outcome["runs"] == {first.name: "finished", broken.name: "failed"}
    assert (tmp_path / "sweep/report/index.html").exists()
    # Behind a shared warm-up a run ends as one trained by itself does, and its time holds the warm-up's.
    assert_same_weights(first, run)
    folders = tmp_path / "sweep/warm-ups/seed0", first
    warm, own = ((path / "metrics.jsonl").read_text().splitlines() for path in folders)
    assert len(warm) == 2
    assert own[:2] == warm


@pytest.fixture(scope="module")
def swept(tmp_path_factory, one_thread):
    """A finished sweep of one run, and what its first call said and noted, whose warm-up could not go on."""
    out = tmp_path_factory.mktemp("swept") / "sweep"
    command = flags.parse_sweep(["ham", *TINY, "--attacks", "clean", "--out", str(out)])
    warm_up = out / "warm-ups/seed0"
    RunFolder.create(warm_up, sweep_command._warm_up_settings(command.settings))
    (warm_up / "checkpoints").mkdir()
    (warm_up / "checkpoints/step_0000000001.pt").write_bytes(b"not a checkpoint")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = sweep_command.sweep(command)
    first = code, said.getvalue(), json.loads((out / "sweep.json").read_text())
    shutil.rmtree(warm_up)
    assert sweep_command.sweep(command) == 0
    return out, first


def test_a_run_whose_warm_up_failed_is_tried_again(swept):
    out, (code, said, outcome) = swept
    assert code == 1
    assert "none of step_0000000001.pt" in said
    assert outcome["runs"] == {"ham-M1-lam1-seed0": "failed"}  # the only trace of a run without a folder
    assert [f["run"] for f in outcome["failed"]] == ["ham-M1-lam1-seed0"]
    outcome = json.loads((out / "sweep.json").read_text())
    assert outcome == {"experiment": "ham", "runs": {"ham-M1-lam1-seed0": "finished"}, "failed": []}


def test_a_sweep_of_before_goes_on(tmp_path):
    """Its PGD-AT lists HAM's switches; the M among them has no effect, and may differ from what is asked now."""
    now = next(c.settings for c in cells("baseline", preset("svhn"), (0,)))
    run = RunFolder.create(tmp_path / "pgd_at-seed0", now)
    hams = "screen_steps = 3\nstart_epoch = 50\nlam = 1.0\nreweight = true\nearly_drop = true\nrows = 'hard'\n"
    text = (run.path / "config.toml").read_text()
    start, end = text.index("[method]"), text.index("[optim]")
    (run.path / "config.toml").write_text(f"{text[:start]}[method]\nname = 'pgd_at'\n{hams}\n{text[end:]}")
    assert now.method.screen_steps == 5
    sweep_command._check_unchanged(run.path, now)
    (run.path / "config.toml").write_text(text.replace("eps = 0.031", "eps = 0.1"))
    with pytest.raises(ValueError, match="was begun with other settings"):
        sweep_command._check_unchanged(run.path, now)


def test_a_sweep_does_not_mix_settings(tmp_path, swept):
    """Neither in its runs nor in the warm-up that they share, also when the run itself is gone."""
    shutil.copytree(swept[0], tmp_path / "sweep")
    other = flags.parse_sweep(["ham", *TINY, "--lr", "0.01", "--attacks", "clean", "--out", str(tmp_path / "sweep")])
    with pytest.raises(ValueError, match=r"out: .*ham-M1-lam1-seed0 was begun with other settings"):
        sweep_command.sweep(other)
    shutil.rmtree(tmp_path / "sweep/ham-M1-lam1-seed0")
    with pytest.raises(ValueError, match=r"out: .*warm-ups/seed0 was begun with other settings"):
        sweep_command.sweep(other)
    further = flags.parse_sweep(
        ["ham", *TINY, "--lam", "2", "--attacks", "clean", "--out", str(tmp_path / "sweep")]
    )  # another method shares the warm-up
    assert sweep_command.sweep(further) == 0
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir()) == [
        "ham-M1-lam2-seed0", "report", "warm-ups",
    ]  # fmt: skip


# ---------------------------------------------------------------- before anything is trained
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--only", "ham-M9*"), "only: 'ham-M9*' is no run of ablations, which has pgd_at, "),
        (("--attacks", "clean", "bogus"), "attacks: got 'bogus'"),
        (("--model", "resnet_18"), "model: got 'resnet_18'"),
        (("--device", "cuda:99"), "device: got 'cuda:99'"),
        (("--path", "nowhere"), "path: nowhere does not exist"),
        (("--dataset", "cifar10", "--root", "nowhere", "--no-download"), "root: "),
        (("--val-images", "5000"), "val_images: got 5000"),
    ],
)
def test_what_would_fail_in_every_run_is_told_once(more, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", "ablations", *TINY, *more, "--out", "sweep"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"ham sweep: {message}")
    assert (out, len(err.splitlines())) == ("", 1)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("name", ["config.toml", "status.json", "evaluation/last.json"])
def test_a_sweep_does_not_begin_in_a_run(name, tmp_path, capsys):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.touch()
    assert cli.main(["sweep", "ham", *TINY, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(f"ham sweep: out: {tmp_path}/run holds ")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [name.split("/")[0]]


def test_autoattack_needs_its_library_before_the_training(tmp_path, capsys, monkeypatch):
    from ham_kernels.evaluation import autoattack

    def missing():
        raise ImportError('attacks: "autoattack" needs torchattacks')

    monkeypatch.setattr(autoattack, "library", missing)
    assert cli.main(["sweep", "ham", *TINY, "--attacks", "autoattack", "--out", str(tmp_path / "sweep")]) == 2
    assert "needs torchattacks" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


# ---------------------------------------------------------------- what a failure leaves
def test_a_failed_judgement_leaves_the_training_finished(run, tmp_path, capsys):
    command = flags.parse_sweep(["ham", *TINY, "--attacks", "clean", "--out", str(tmp_path / "sweep")])
    (cell,) = cells("ham", command.settings, (0,))
    shutil.copytree(run, tmp_path / "sweep" / cell.name)
    for path in (tmp_path / "sweep" / cell.name / "checkpoints").glob("step_*"):
        path.write_bytes(b"not a checkpoint")
    assert sweep_command.sweep(command) == 1
    assert "`ham evaluate` ended with 2" in capsys.readouterr().out
    assert RunFolder(tmp_path / "sweep" / cell.name).status()["state"] == "finished"


def test_a_run_that_another_process_judges_is_waited_for(run, tmp_path, capsys, monkeypatch):
    """Of two sweeps in one folder the slower one finds the run taken, and then all done."""
    command = flags.parse_sweep(["ham", *TINY, "--attacks", "clean", "--out", str(tmp_path / "sweep")])
    (cell,) = cells("ham", command.settings, (0,))
    path, usual, calls = tmp_path / "sweep" / cell.name, sweep_command._Worker._process, []
    shutil.copytree(run, path)

    def raced(worker, path, *arguments):
        calls.append(arguments[0])
        if len(calls) > 1:
            return usual(worker, path, *arguments)
        taken = contextlib.ExitStack()
        taken.enter_context(RunFolder(path).alone(JUDGING_LOCK))
        threading.Timer(1.5, taken.close).start()
        raise RuntimeError("`ham evaluate` ended with 2: run: another process works on it")

    monkeypatch.setattr(sweep_command._Worker, "_process", raced)
    assert sweep_command.sweep(command) == 0
    assert calls == ["evaluate", "evaluate"]
    assert "another process works on it; waiting" in capsys.readouterr().out
    assert (path / "evaluation/ema.json").exists()


def test_a_run_that_another_sweep_has_begun_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    """Two sweeps wait for one warm-up, and then both would begin the run behind it."""
    command = flags.parse_sweep(["ham", *TINY, "--out", str(tmp_path)])
    (cell,) = cells("ham", command.settings, (0,))
    path, begun = tmp_path / cell.name, []

    def warm_up(worker, settings, epochs):
        begun.append(RunFolder.create(path, cell.settings))
        return tmp_path / "warm-up"  # of which nothing is copied

    monkeypatch.setattr(sweep_command._Worker, "_warm_up", warm_up)
    sweep_command._Worker(tmp_path, command, None)._begin(path, cell.settings)
    assert len(begun) == 1
    assert os.listdir(path) == ["config.toml"]
    assert not list(tmp_path.glob(".*.begun"))


def test_a_run_that_another_process_trains_is_not_called_failed(run, tmp_path, monkeypatch):
    command = flags.parse_sweep(["ham", *TINY, "--out", str(tmp_path)])
    (cell,) = cells("ham", command.settings, (0,))
    path = tmp_path / cell.name
    shutil.copytree(run, path)
    RunFolder(path).set_status("running", 1, 3)
    taken = contextlib.ExitStack()

    def fails(worker, path, *arguments):
        taken.enter_context(RunFolder(path).alone())
        raise ValueError("this one cannot")

    monkeypatch.setattr(sweep_command._Worker, "_run", fails)
    with taken:
        assert "this one cannot" in sweep_command._Worker(tmp_path, command, None).bring_to_end(cell)
        assert RunFolder(path).status()["state"] == "running"


@pytest.mark.parametrize(("launched", "expected"), [(1, ["--device", "cpu"]), (2, [])])
def test_a_judgement_runs_where_the_training_did(run, tmp_path, monkeypatch, launched, expected):
    command = flags.parse_sweep(["ham", *TINY, "--device", "cpu", "--attacks", "clean", "--out", str(tmp_path)])
    (cell,) = cells("ham", command.settings, (0,))
    shutil.copytree(run, tmp_path / cell.name)
    calls = []
    monkeypatch.setattr(sweep_command._Worker, "_run", lambda worker, path, *arguments: calls.append(arguments))
    monkeypatch.setattr(sweep_command, "launched", lambda: launched)
    assert sweep_command._Worker(tmp_path, command, None).bring_to_end(cell) == ""
    (told,) = calls
    assert [word for word in told if word in ("--device", "cpu")] == expected


def test_the_runs_of_earlier_experiments_stay_on_record(tmp_path):
    sweep_command._note(tmp_path, "baseline", "a", "")
    sweep_command._note(tmp_path, "baseline", "b", "FAILED: no memory")
    sweep_command._note(tmp_path, "baseline", "c", "FAILED: no memory")
    sweep_command._note(tmp_path, "ham", "d", "")
    sweep_command._note(tmp_path, "ham", "b", "")
    assert json.loads((tmp_path / "sweep.json").read_text()) == {
        "experiment": "ham", "runs": {"a": "finished", "b": "finished", "c": "failed", "d": "finished"},
        "failed": [{"run": "c", "problem": "FAILED: no memory"}],
    }  # fmt: skip
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match=r"out: .*sweep.json cannot be read"):
        sweep_command.sweep(flags.parse_sweep(["ham", *TINY, "--out", str(tmp_path)]))
    assert {p.name for p in tmp_path.iterdir()} == {"sweep.json", ".sweep.lock"}
