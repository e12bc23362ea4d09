"""`--log`: every epoch once in each log, whatever fails, stops or is killed. The packages are stood in for."""

from __future__ import annotations

import json
import sys
import types
import warnings
from dataclasses import replace

import pytest
from runs_helper import TINY

from ham_kernels.commands import flags, logs
from ham_kernels.commands import train as train_command
from ham_kernels.common.troubles import HamWarning
from ham_kernels.evaluation import ClassAccuracy
from ham_kernels.runs.folder import RunFolder
from ham_kernels.training.reports import EpochReport

pytestmark = pytest.mark.usefixtures("no_gpu")
ALL = ("tensorboard", "wandb", "mlflow")
CLASSES = ("cat", "T-shirt/top", "a b", "a_b")


class Fakes:
    """What each log was given: {name: [(epoch, scalars), ...]}, and how it was opened and closed."""

    def __init__(self, monkeypatch):
        self.epochs: dict[str, list] = {name: [] for name in ALL}
        self.opened: dict[str, list] = {name: [] for name in ALL}
        self.closed: list[str] = []
        self.fails_at: dict[str, int] = {}
        outer = self

        class SummaryWriter:
            def __init__(self, folder, purge_step):
                outer.opened["tensorboard"].append((folder, purge_step))

            def add_scalar(self, name, value, step):
                outer.scalar("tensorboard", step, {name: value})

            def flush(self): ...

            def close(self):
                outer.closed.append("tensorboard")

        class Run:
            def __init__(self, dir, **told):
                outer.opened["wandb"].append(told)
                own = f"{dir}/wandb/offline-run-{len(outer.opened['wandb'])}"
                self.dir = f"{own}/files"
                RunFolder(own).write_json("files/x.json", {})

            def log(self, scalars, step, commit):
                assert commit
                outer.scalar("wandb", step, scalars)

            def finish(self):
                outer.closed.append("wandb")

        class MlflowClient:
            def __init__(self, tracking_uri):
                outer.opened["mlflow"].append(tracking_uri)

            def get_experiment_by_name(self, name): ...

            def create_experiment(self, name, artifact_location):
                return artifact_location

            def create_run(self, experiment, run_name):
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

            def update_run(self, run, status):
                assert (run, status) == ("r1", "RUNNING")

            def get_metric_history(self, run, name):
                return [types.SimpleNamespace(step=epoch) for epoch, _ in outer.epochs["mlflow"]]

            def log_batch(self, run, metrics=(), params=()):
                assert len(metrics) <= 1000
                assert len(params) <= 100
                if metrics:
                    outer.scalar("mlflow", metrics[0][3], {name: value for name, value, _, _ in metrics})

            def set_terminated(self, run, status):
                outer.closed.append(f"mlflow {status}")

        made = {
            "torch.utils.tensorboard": {"SummaryWriter": SummaryWriter},
            "wandb": {"init": Run, "Settings": dict},
            "mlflow": {},
            "mlflow.tracking": {"MlflowClient": MlflowClient},
            "mlflow.entities": {"Metric": lambda *told: told, "Param": lambda *told: told},
        }
        for name, contents in made.items():
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**contents))
        for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)

    def scalar(self, log: str, epoch: int, scalars: dict) -> None:
        if epoch >= self.fails_at.get(log, 99):
            raise OSError("the disk is full")
        if not self.epochs[log] or self.epochs[log][-1][0] != epoch or self.epochs[log][-1][1].keys() & scalars:
            self.epochs[log].append((epoch, {}))
        self.epochs[log][-1][1].update(scalars)

    def numbers(self, log: str) -> list[int]:
        return [epoch for epoch, _ in self.epochs[log]]


@pytest.fixture
def fakes(monkeypatch) -> Fakes:
    return Fakes(monkeypatch)


def report(epoch: int) -> EpochReport:
    judged = ClassAccuracy(0.5, (0.25, 0.75, float("nan"), 0.5), 0.25, 0.2, 12)
    val = {"clean": judged, "pgd2": judged}
    return EpochReport(epoch, "ham", 1.0 / epoch, 100, 50, 0, 2.0, val=val, val_ema=None)


def every_log(epochs: list[int]) -> dict[str, list[int]]:
    return dict.fromkeys(ALL, epochs)


def settings(*names: str):
    told = flags.parse_train([*TINY, "--train-images", "96", "--val-images", "20", "--test-images", "20"]).settings
    return replace(told, run=replace(told.run, log=names))


def opened(folder, *names: str) -> logs.Logs:
    return logs.Logs(RunFolder(folder), settings(*names), CLASSES)


def test_scalars_of_an_epoch():
    found = logs.scalars_of(report(2), settings(), CLASSES)
    assert found["loss"] == 0.5
    assert (found["hard_fraction"], found["seconds"], found["images_per_s"], found["lr"]) == (0.5, 2.0, 50.0, 0.05)
    assert (found["val/pgd2/worst_class"], found["val/pgd2/std"], found["val/clean/accuracy"]) == (0.25, 0.2, 0.5)
    classes = {name: value for name, value in found.items() if name.startswith("val/pgd2/class/")}
    told = {"cat": 0.25, "T-shirt_top": 0.75, "a_b_3": 0.5}  # of "a b", which is a_b_2, there are no images
    assert classes == {f"val/pgd2/class/{tag}": value for tag, value in told.items()}
    assert not any(name.startswith("val_ema") for name in found)


def test_a_run_that_goes_on_goes_on_in_its_logs(fakes, tmp_path):
    first = opened(tmp_path, *ALL)
    first.write([report(1)])
    first.write([report(1), report(2)])
    first.close(finished=False)
    second = opened(tmp_path, *ALL)
    second.write([report(1), report(2)])
    second.write([report(1), report(2), report(3)])
    second.close(finished=True)
    assert {name: fakes.numbers(name) for name in ALL} == every_log([1, 2, 3])
    assert fakes.closed == ["tensorboard", "wandb", "mlflow KILLED", "tensorboard", "wandb", "mlflow FINISHED"]
    for name in ALL:
        assert fakes.epochs[name][0][1] == logs.scalars_of(report(1), settings(), CLASSES)
    assert [purge for _, purge in fakes.opened["tensorboard"]] == [1, 3]
    one, two = fakes.opened["wandb"]
    assert one["id"] == two["id"]
    named = {"mode": "offline", "resume": "allow", "project": "ham_kernels", "name": tmp_path.name}
    assert {key: one[key] for key in named} == named
    assert fakes.opened["mlflow"] == [f"sqlite:///{tmp_path}/mlflow/mlflow.db"] * 2


def test_what_a_killed_process_left_is_not_repeated(fakes, tmp_path):
    """Nothing is closed. MLflow knows an epoch that logs.json does not; what wandb's folder holds nobody knows."""
    opened(tmp_path, *ALL).write([report(1), report(2)])
    fakes.epochs["mlflow"].append((3, {}))
    fakes.epochs["wandb"].clear()
    assert (tmp_path / "wandb/offline-run-1").exists()
    second = opened(tmp_path, *ALL)
    assert not (tmp_path / "wandb/offline-run-1").exists()
    second.write([report(n) for n in (1, 2, 3, 4)])
    assert {name: fakes.numbers(name) for name in ALL} == every_log([1, 2, 3, 4])
    second.close(True)
    opened(tmp_path, *ALL)
    assert (tmp_path / "wandb/offline-run-2").exists()


@pytest.mark.parametrize("name", ALL)
def test_a_log_that_fails_is_told_of_once_and_gets_the_rest_later(name, fakes, tmp_path):
    fakes.fails_at[name] = 2
    first = opened(tmp_path, *ALL)
    history = [report(n) for n in (1, 2, 3, 4)]
    first.write(history[:1])
    with pytest.warns(HamWarning, match=rf"log: {name} has failed \(OSError: the disk is full\)"):
        first.write(history[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.write(history[:3])
        first.write(history)
    first.close(False)
    others = [n for n in ALL if n != name]
    assert all(fakes.numbers(n) == [1, 2, 3, 4] for n in others)
    assert fakes.numbers(name)[:1] == [1]
    fakes.fails_at.clear()
    if name == "wandb":
        fakes.epochs["wandb"].clear()  # its folder was never closed
    opened(tmp_path, *ALL).write([report(n) for n in range(1, 6)])
    assert {n: fakes.numbers(n) for n in ALL} == every_log([1, 2, 3, 4, 5])


def test_a_log_that_cannot_be_opened_is_told_of(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: 1 / 0)
    with pytest.warns(HamWarning, match="log: wandb has failed .ZeroDivisionError"):
        log = opened(tmp_path, "wandb", "mlflow")
    log.write([report(1)])
    log.close(True)
    assert fakes.numbers("mlflow") == [1]


def test_where_the_users_environment_sends_them(fakes, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    opened(tmp_path, "wandb", "mlflow")
    assert fakes.opened["wandb"][0]["mode"] == "online"
    assert fakes.opened["mlflow"] == ["http://localhost:5000"]
    assert not (tmp_path / "mlflow").exists()


@pytest.mark.parametrize("name", ALL)
def test_a_missing_package_is_named_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, logs.LOGS[name][1], None)
    with pytest.raises(ImportError, match=rf"log: got {name}, .*; pip install 'ham_kernels\[{name}\]'"):
        train_command.train(settings(name), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_flags_and_settings():
    assert flags.parse_train([*TINY, "--log", "tensorboard", "mlflow"]).settings.run.log == ("tensorboard", "mlflow")
    with pytest.raises(ValueError, match=r"run.log: got 'comet'; allowed are 'tensorboard', 'wandb', 'mlflow'"):
        settings("comet").check()
    assert all(name not in sys.modules for name in ("wandb", "mlflow"))  # imported where asked for


def test_tags_of_classes_are_distinct():
    for names in (["a b", "a_b", "a_b_0"], ["x", "x", "x_1", "x_0"], ["cat", "dog"]):
        assert len(set(logs._tags(names))) == len(names)


def test_a_damaged_note_begins_the_logs_anew(fakes, tmp_path):
    opened(tmp_path, "tensorboard").write([report(1)])
    (tmp_path / "logs.json").write_text("")
    with pytest.warns(HamWarning, match="log: logs.json has failed"):
        log = opened(tmp_path, "tensorboard")
    log.write([report(1), report(2)])
    assert fakes.numbers("tensorboard") == [1, 1, 2]  # purged from step 1 on


@pytest.mark.slow
def test_a_finished_run_gives_a_log_that_failed_the_rest(fakes, tmp_path, one_thread):
    run = RunFolder.create(tmp_path / "run", settings("tensorboard"))
    fakes.fails_at["tensorboard"] = 2
    with pytest.warns(HamWarning, match="log: tensorboard has failed"):
        train_command.resume(run.path, quiet=True)
    fakes.fails_at.clear()
    train_command.resume(run.path, quiet=True)
    assert fakes.numbers("tensorboard")[-3:] == [2, 3, 4]
    opened_so_far = len(fakes.opened["tensorboard"])
    train_command.resume(run.path, quiet=True)  # nothing is behind
    assert len(fakes.opened["tensorboard"]) == opened_so_far


@pytest.mark.slow
def test_a_run_writes_its_logs(fakes, tmp_path, one_thread):
    """In two sessions, the first of which is lost behind its checkpoint; another log may be asked for on the way."""
    run = RunFolder.create(tmp_path / "run", settings("tensorboard"))
    original = logs.Logs.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs.Logs, "write", lambda log, history: original(log, history[:0]))
        train_command.resume(run.path, until_epoch=1, quiet=True)
    assert fakes.numbers("tensorboard") == []
    text = (run.path / "config.toml").read_text()
    assert text.count('"tensorboard",') == 1
    (run.path / "config.toml").write_text(text.replace('"tensorboard",', '"tensorboard", "mlflow",'))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "log: ", HamWarning)
        trainer = train_command.resume(run.path, quiet=True)
    for name in ("tensorboard", "mlflow"):
        assert [(e, s["loss"]) for e, s in fakes.epochs[name]] == [(r.epoch, r.loss) for r in trainer.history]
        assert {"lr", "val/clean/class/7", "val_ema/pgd2/worst_class"} <= fakes.epochs[name][0][1].keys()
    assert json.loads((run.path / "logs.json").read_text())["tensorboard"] == {"epoch": 4}


def test_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = opened(tmp_path, "tensorboard")
    first.write([report(1), report(2)])
    second = opened(tmp_path, "tensorboard")  # the first is not closed
    second.write([report(1), report(2), report(3)])
    second.close(True)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [e.step for e in read.Scalars("loss")] == [1, 2, 3]
    assert [e.value for e in read.Scalars("loss")] == pytest.approx([1.0, 0.5, 1 / 3])
