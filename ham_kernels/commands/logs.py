"""`--log`: the numbers of each epoch in logs that other programs show, within the run's folder.

Each log is a package of its own, imported where it is asked for. logs.json keeps the last epoch that each has, so that
a run that goes on neither repeats nor leaves out one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..common import troubles
from ..runs.config_file import to_dict
from ..runs.folder import RunFolder, metrics_of
from ..runs.settings import TrainSettings
from ..training.reports import EpochReport

PROJECT = "ham_kernels"  # of Weights & Biases, and MLflow's experiment


def scalars_of(report: EpochReport, settings: TrainSettings, classes: Sequence[str]) -> dict[str, float]:
    """Numbers by name: loss, hard_fraction, images_per_s, lr, seconds; and for val and val_ema, by attack, accuracy,
    worst_class, std and class/NAME. What is not known, or of a class without images, is left out.
    """
    line = metrics_of(report, settings)
    found = {key: line[key] for key in ("loss", "hard_fraction", "images_per_s", "lr", "seconds")}
    for part in ("val", "val_ema"):
        for attack, judged in (line[part] or {}).items():
            found |= {f"{part}/{attack}/{key}": judged[key] for key in ("accuracy", "worst_class", "std")}
            named = zip(_tags(classes), judged["per_class"], strict=True)
            found |= {f"{part}/{attack}/class/{tag}": value for tag, value in named}
    return {name: float(value) for name, value in found.items() if value is not None and value == value}


def _tags(classes: Sequence[str]) -> list[str]:
    """Class names of the characters that all logs take, each there once."""
    tags = [re.sub(r"[^\w.-]", "_", name) for name in classes]
    while alike := {tag for tag in tags if tags.count(tag) > 1}:
        tags = [f"{tag}_{i}" if tag in alike else tag for i, tag in enumerate(tags)]
    return tags


class Log(Protocol):
    """kept: what it finds again when the run goes on: the "epoch" it has already, and what it puts there itself."""

    def __init__(self, folder: Path, settings: TrainSettings, kept: dict[str, Any]): ...
    def epoch(self, number: int, scalars: dict[str, float]) -> None: ...
    def close(self, finished: bool) -> None: ...


class TensorBoard:
    """Events in tensorboard/."""

    def __init__(self, folder: Path, settings: TrainSettings, kept: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        # hides what a killed process wrote without noting it
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=kept["epoch"] + 1)

    def epoch(self, number: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases in wandb/, offline unless WANDB_MODE says otherwise; `wandb sync` uploads it.

    Each process has a folder there, of one id, which is whole where it was closed. What a killed one left is replaced.
    """

    def __init__(self, folder: Path, settings: TrainSettings, kept: dict[str, Any]):
        import wandb

        if "unclosed" in kept:
            kept["epoch"] = kept.get("closed", 0)
            if kept["unclosed"].startswith("offline-"):
                shutil.rmtree(folder / "wandb" / kept["unclosed"], ignore_errors=True)
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.resolve().name, dir=str(folder), mode=mode,
            id=kept.setdefault("id", uuid.uuid4().hex[:12]), resume="allow", config=to_dict(settings),
            settings=wandb.Settings(console="off", silent=mode != "online"),
        )  # fmt: skip
        self._kept = kept
        kept["unclosed"] = Path(self._run.dir).parent.name

    def epoch(self, number: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=number, commit=True)  # else the step would wait for the next one

    def close(self, finished: bool) -> None:
        self._run.finish()
        self._kept["closed"] = self._kept["epoch"]
        del self._kept["unclosed"]


class MLflow:
    """A database in mlflow/, unless MLFLOW_TRACKING_URI names another place."""

    def __init__(self, folder: Path, settings: TrainSettings, kept: dict[str, Any]):
        from mlflow.tracking import MlflowClient

        own = folder.resolve() / "mlflow"
        where, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if where is None:
            own.mkdir(exist_ok=True)
            where, artifacts = f"sqlite:///{own / 'mlflow.db'}", (own / "artifacts").as_uri()
        self._client = MlflowClient(tracking_uri=where)
        if "id" in kept:
            self._client.update_run(kept["id"], status="RUNNING")
            kept["epoch"] = max((m.step for m in self._client.get_metric_history(kept["id"], "loss")), default=0)
        else:
            experiment = self._client.get_experiment_by_name(PROJECT)
            made = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT, artifacts)
            kept["id"] = self._client.create_run(made, run_name=folder.resolve().name).info.run_id
            self._tell(kept["id"], settings)
        self._id = kept["id"]

    def _tell(self, run: str, settings: TrainSettings) -> None:
        from mlflow.entities import Param

        flat = [Param(f"{s}.{k}", str(v)) for s, values in to_dict(settings).items() for k, v in values.items()]
        for some in _parts(flat, 100):  # as many as a call may have
            self._client.log_batch(run, params=some)

    def epoch(self, number: int, scalars: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        for some in _parts([Metric(name, value, now, number) for name, value in scalars.items()], 1000):
            self._client.log_batch(self._id, metrics=some)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


LOGS: dict[str, tuple[type[Log], str]] = {  # and the module that it cannot do without
    "tensorboard": (TensorBoard, "torch.utils.tensorboard"),
    "wandb": (WandB, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}


def check_installed(names: Sequence[str]) -> None:
    """Raises: ImportError naming the flag and the package to install."""
    for name in names:
        try:
            importlib.import_module(LOGS[name][1])
        except ImportError as error:
            raise ImportError(
                f"log: got {name}, whose package cannot be imported ({error}); pip install 'ham_kernels[{name}]'"
            ) from error


def behind(run: RunFolder, settings: TrainSettings, epoch: int) -> bool:
    """Whether a log that is asked for lacks an epoch up to this one, or was not closed."""
    kept = _kept(run)
    told = [kept.get(name, {}) for name in settings.run.log]
    return any(log.get("epoch", 0) < epoch or "unclosed" in log for log in told)


def _kept(run: RunFolder) -> dict[str, dict[str, Any]]:
    """logs.json; where it cannot be read the logs begin anew."""
    try:
        return {name: dict(kept) for name, kept in json.loads((run.path / "logs.json").read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        troubles.warn("log_failed", log="logs.json", error=f"{type(error).__name__}: {error}")
        return {}


class Logs:
    """The logs of a run that its settings ask for. One that fails is told of in a warning, and the training goes on."""

    def __init__(self, run: RunFolder, settings: TrainSettings, classes: Sequence[str]):
        self._run, self._settings, self._classes = run, settings, classes
        self._kept = _kept(run)
        self._open: dict[str, Log] = {}
        for name in dict.fromkeys(settings.run.log):
            kept = self._kept.setdefault(name, {"epoch": 0})
            log = self._tried(name, lambda name=name, kept=kept: LOGS[name][0](run.path, settings, kept))
            if log is not None:
                self._open[name] = log

    def write(self, history: Sequence[EpochReport]) -> None:
        """Each log's epochs that it has not yet."""
        for name in list(self._open):
            self._tried(name, lambda name=name: self._bring_to_date(name, history))
        self._note()

    def _note(self) -> None:
        if self._kept:
            self._run.write_json("logs.json", self._kept)

    def _bring_to_date(self, name: str, history: Sequence[EpochReport]) -> None:
        kept = self._kept[name]
        for report in history:
            if report.epoch > kept["epoch"]:
                self._open[name].epoch(report.epoch, scalars_of(report, self._settings, self._classes))
                kept["epoch"] = report.epoch

    def close(self, finished: bool) -> None:
        for name, log in list(self._open.items()):
            self._tried(name, lambda log=log: log.close(finished))
        self._note()

    def _tried(self, name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            self._open.pop(name, None)
            troubles.warn("log_failed", log=name, error=f"{type(error).__name__}: {error}")
            return None


def _parts(values: Sequence[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(values)
    while some := list(islice(rest, size)):
        yield some
