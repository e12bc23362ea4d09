"""A run's folder: what it was told, on what it ran, how it went, and the weights it left.

config.toml         resolved settings
data.json           classes, channels, images of each part and class, where they lay
environment.json    versions, machine, commit, and when it was worked on
status.json         running, interrupted, finished or failed; adopted: trained elsewhere, then origin.json says where
begun_with.json     what its first weights are and have cost, where they are not random
metrics.jsonl       one line per epoch
checkpoints/        step_*.pt (two newest), best.pt, best_ema.pt
evaluation/         one JSON per weights judged
tensorboard/, wandb/, mlflow/   what --log asks for; logs.json has how far each is
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..common import field_types, locks, troubles
from ..common.files import CheckpointError, load, read, save, write_atomically
from ..common.line_sums import with_sums
from .checkpoints import Checkpoints, within
from .config_file import from_toml, to_toml
from .settings import TrainSettings, lr_factor

WEIGHTS = ("last", "ema", "best", "best_ema")
ADOPTED = "adopted"
JUDGING_LOCK = "evaluation/.lock"


class RunFolder:
    """One run on disk. Every file is replaced as a whole, so a killed process leaves none torn.

    Nothing is written once its config.toml has gone (FileNotFoundError): a run that is moved away leaves no half of it.

    writes: False for a process that works on a run which another writes: it reads as the other, and changes nothing.
    """

    def __init__(self, path: str | Path, *, writes: bool = True):
        self.path, self.writes = field_types.convert("out", path, Path), writes
        self._begun = self.path if (self.path / "config.toml").exists() else None
        self.checkpoints = Checkpoints(self.path / "checkpoints", writes=writes, run=self._begun)

    # ------------------------------------------------------------ what it was told
    @classmethod
    def create(cls, path: str | Path, settings: TrainSettings, sections: Sequence[str] | None = None) -> RunFolder:
        """A new folder with config.toml, of all sections unless told otherwise.

        Raises: FileExistsError where there is a run already, or parts of one.
        """
        run = cls(path)
        run.check_free()
        aside = run.path / f".config.{os.getpid()}.partial"
        try:
            write_atomically(aside, to_toml(settings, sections).encode())
        except OSError as error:
            raise OSError(f"out: {run.path} cannot be written ({error}); give another folder") from error
        try:
            os.link(aside, run.path / "config.toml")  # unlike a rename it fails where another process was faster
        except FileExistsError:
            run.check_free()
            raise
        except OSError as error:  # cloud drives, exFAT
            run.check_free()
            troubles.warn("no_hard_links", folder=run.path, reason=error.strerror)
            os.replace(aside, run.path / "config.toml")
        finally:
            aside.unlink(missing_ok=True)
        return cls(path)

    def check_free(self) -> None:
        """Raises: FileExistsError, NotADirectoryError where a new run cannot begin here."""
        self.check_no_run()
        if (self.path / "sweep.json").exists() or any(self.path.glob("*/config.toml")):  # reports would miss them
            raise FileExistsError(f"out: {self.path} holds other runs; give {self.path / 'NAME'}")

    def check_no_run(self) -> None:
        """Raises: FileExistsError, NotADirectoryError where this is no folder, or holds a run or parts of one."""
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"out: {self.path} is a file; it must be a folder")
        if (self.path / "config.toml").exists():
            quoted = shlex.quote(str(self.path))
            raise FileExistsError(f"out: {self.path} holds a run already; go on with `ham train --resume {quoted}`")
        for name in ("checkpoints", "metrics.jsonl", "status.json", "data.json", "evaluation"):
            if (self.path / name).exists():
                raise FileExistsError(f"out: {self.path} holds {name} of something else; give another folder")

    def check_writable(self, name: str = "out") -> None:
        """Raises: PermissionError naming the folder, where nothing can be written into it. `name` is the argument."""
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            what = "give another folder" if name == "out" else "copy the run to where it can be written"
            raise PermissionError(f"{name}: {self.path} cannot be written, as {place} is read-only here; {what}")

    @classmethod
    def open(cls, path: str | Path, *, writes: bool = True) -> RunFolder:
        """An existing run. Raises: FileNotFoundError naming the folder."""
        run = cls(field_types.convert("run", path, Path), writes=writes)
        if not (run.path / "config.toml").is_file():
            raise FileNotFoundError(f"run: {path} is no run folder (it has no config.toml)")
        return run

    @contextlib.contextmanager
    def alone(self, lock: str = ".lock", patience: float = 10.0) -> Iterator[None]:
        """Inside, no other process holds this lock of the run.

        Raises: BlockingIOError where one still does after `patience` seconds.
        """
        if not self.writes:
            yield
            return
        path = self.path / lock
        if path.parent != self.path:
            path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            end = time.monotonic() + patience
            # The system lets go when the process ends, however; its data workers may outlive it by some seconds.
            while not locks.take(file):
                if time.monotonic() > end:
                    raise BlockingIOError(f"run: another process works on {self.path}")
                time.sleep(0.1)
            for torn in filter(Path.is_file, path.parent.glob(".*.partial")):  # of a killed process
                torn.unlink(missing_ok=True)
            yield

    def busy(self) -> bool:
        """Whether a process trains or judges the run at this moment."""
        return any(locks.held(self.path / lock) for lock in (".lock", JUDGING_LOCK))

    def settings(self) -> TrainSettings:
        return from_toml(self.path / "config.toml", TrainSettings())

    @property
    def adopted(self) -> bool:
        """Whether its weights were trained elsewhere."""
        return self.status()["state"] == ADOPTED

    def has_begun(self) -> bool:
        """Whether it knows its images."""
        return (self.path / "data.json").exists()

    def set_data_facts(self, facts: dict[str, Any], places: dict[str, Any]) -> None:
        """Notes what the images are and where they lie; a run that goes on must find them as they were.

        Raises: ValueError.
        """
        if self.has_begun():
            self.check_data_facts(facts)
        self.write_json("data.json", {**facts, "places": places})

    def places(self) -> dict[str, Any]:
        """{"path", "root"}, where given: as config.toml had it first ("named") and has it ("given"), and the absolute
        one. Empty for a run that has not begun, or of a time when none were kept."""
        return self.data_facts().get("places", {}) if self.has_begun() else {}

    def check_data_facts(self, facts: dict[str, Any], where: str | None = None) -> None:
        """Raises: ValueError where the images (of the path `where`) are not those that the run was trained on."""
        before = self.data_facts()
        wrong = [k for k in facts if k in before and facts[k] != before[k]]
        if wrong:
            argument = "data" if where is None else f"path: {where}"
            also = (
                " (so many as config.toml's train_images, test_images and val_images say)" if "counts" in wrong else ""
            )
            raise ValueError(
                f"{argument}: {self.path} was trained on other images: {wrong[0]} was {before.get(wrong[0])}, "
                f"now it is {facts[wrong[0]]}{also}"
            )

    def data_facts(self) -> dict[str, Any]:
        """{"classes": names, "channels", "counts": images of each part, "class_counts": of each class in them (not in
        runs of before), "sha256" of pixels (of file names) and labels, "places"}. Raises: FileNotFoundError."""
        path = self.path / "data.json"
        if not self.has_begun():
            raise FileNotFoundError(f"run: {self.path} has not begun to train (it has no data.json)")
        return read_json(path)

    def source(self) -> str:
        """The path or the name of its data set, as the run was told it first."""
        data = self.settings().data
        return self.places().get("path", {}).get("named") or data.path or data.dataset

    # ------------------------------------------------------------ how it goes
    def begin_session(self, from_epoch: int, from_batch: int = 0) -> None:
        """Notes versions, machine and commit, and that a process works on the run from here (batches done) on."""
        if not self.writes:
            return
        from ..common import provenance

        path = self.path / "environment.json"
        before = _told_of(path, {})
        sessions = [{"machine": before.get("machine"), **session} for session in before.get("sessions", [])]
        machine = provenance.machine()
        where = {"from_epoch": from_epoch, "from_batch": from_batch, "machine": machine}
        sessions.append({"started": _now(), "ended": None, **where})
        facts = {  # of the last session
            "versions": provenance.versions("torchvision", "triton", "numpy"),
            "machine": machine,
            "commit": provenance.commit(),
            "sessions": sessions,
        }
        self.write_json("environment.json", facts)

    def end_session(self) -> None:
        if not self.writes:
            return
        facts = read_json(self.path / "environment.json")
        facts["sessions"][-1]["ended"] = _now()
        self.write_json("environment.json", facts)

    def note_error(self, trace: str) -> None:
        self._write("error.txt", trace.encode())

    def set_status(self, state: str, epoch: int, epochs: int, message: str = "") -> None:
        self.write_json("status.json", {"state": state, "epoch": epoch, "epochs": epochs, "message": message})

    def mark_failed(self, message: str) -> None:
        status = self.status()
        self.set_status("failed", status["epoch"], status.get("epochs", 0), message)

    def status(self) -> dict[str, Any]:
        return _told_of(self.path / "status.json", {"state": "new", "epoch": 0})

    def write_metrics(self, history: list[Any], settings: TrainSettings) -> None:
        """The whole of metrics.jsonl anew: after a resume it holds no line of epochs that were thrown away."""
        if not self.writes:
            return
        lines = with_sums(dumps(metrics_of(report, settings)) for report in history)
        self._write("metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def write_json(self, name: str, value: Any) -> Path:
        return self._write(name, dumps(value, indent=1).encode() + b"\n")

    def _write(self, name: str, content: bytes) -> Path:
        path = self.path / name
        if self.writes:
            with within(self._begun, path):
                write_atomically(path, content)
        return path

    # ------------------------------------------------------------ the weights it left
    def save_best(self, weights: str, state: dict[str, Any]) -> None:
        if self.writes:
            path = self.path / "checkpoints" / f"{weights}.pt"
            with within(self._begun, path):
                save(path, state)

    def load_weights(self, weights: str) -> dict[str, Any]:
        """{"model": state_dict, "epoch", "sha256", "path" of the checkpoint} of one of WEIGHTS.

        Raises: ValueError for another name or weights that the run has not; FileNotFoundError; CheckpointError.
        """
        if weights not in WEIGHTS:
            raise ValueError(f"weights: got {weights!r}; allowed are {', '.join(WEIGHTS)}")
        if weights.startswith("best"):
            path = self.path / "checkpoints" / f"{weights}.pt"
            if not path.exists():
                raise FileNotFoundError(
                    f"weights: {path} is not there; the run has no validation images"
                    f"{', no weight average' if weights == 'best_ema' else ''}, or no epoch is done yet"
                )
            state, digest = read(path)
            return {"model": state["model"], "epoch": state["epoch"], "sha256": digest, "path": path}
        newest = self.checkpoints.load_newest()
        if newest is None:
            raise FileNotFoundError(f"weights: {self.path} has no checkpoint yet")
        path, state, digest = newest
        key = "model" if weights == "last" else "ema"
        if state["trainer"][key] is None:
            raise ValueError("weights: got 'ema', but the run keeps no weight average (ema_decay)")
        return {"model": state["trainer"][key], "epoch": state["trainer"]["epoch"], "sha256": digest, "path": path}

    def damaged_after(self, path: Path) -> list[str]:
        """Names of the checkpoints newer than this one, which is the newest intact one."""
        folder = self.checkpoints.folder
        return sorted(p.name for p in folder.glob("step_*") if p.suffix in (".pt", ".damaged") and p.stem > path.stem)

    def drop_best_after(self, epoch: int) -> None:
        """Removes best weights of epochs that a resume from an earlier checkpoint has thrown away."""
        for weights in ("best", "best_ema") if self.writes else ():
            path = self.path / "checkpoints" / f"{weights}.pt"
            try:
                if path.exists() and load(path)["epoch"] > epoch:
                    path.unlink()
            except CheckpointError as error:
                troubles.warn("damaged_best", error=error)
                path.unlink()

    def newest_digest(self) -> str | None:
        """SHA-256 of the newest checkpoint, as it is written in it."""
        newest = self.checkpoints.newest_first()
        return _digest(newest[0]) if newest else None

    def usual_weights(self) -> str:
        """ "ema" where the run keeps a weight average, else "last"."""
        return "last" if self.settings().run.ema_decay is None else "ema"

    def available_weights(self) -> list[str]:
        """Those of WEIGHTS that can be loaded, by name only."""
        found = []
        if self.checkpoints.newest_first():
            found += ["last"] if self.settings().run.ema_decay is None else ["last", "ema"]
        return found + [w for w in ("best", "best_ema") if (self.path / "checkpoints" / f"{w}.pt").exists()]


def metrics_of(report: Any, settings: TrainSettings) -> dict[str, Any]:
    """A line of metrics.jsonl, from an EpochReport of the trainer."""
    values = report.to_dict()
    val = {name: values.pop(name) for name in ("val", "val_ema")}
    return {
        **values,
        "hard_fraction": report.hard_fraction,
        "images_per_s": report.n / report.seconds if report.seconds else None,
        "lr": settings.optim.lr * lr_factor(settings.optim, report.epoch),
        **val,
    }


def read_json(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """An object with these keys. Raises: ValueError naming a file that is damaged."""
    try:
        told = json.loads(path.read_text())
        if not isinstance(told, dict):
            raise ValueError(f"it holds a {type(told).__name__}, not an object")
        if missing := [key for key in keys if key not in told]:
            raise ValueError(f"it has no {missing[0]!r}")
    except ValueError as error:
        raise ValueError(f"run: {path} is damaged ({error})") from error
    return told


def _told_of(path: Path, without: dict[str, Any]) -> dict[str, Any]:
    """What a file tells that a run can do without; `without` where there is none or, after a warning, a damaged one."""
    if not path.exists():
        return without
    try:
        return read_json(path, without)
    except ValueError as error:
        troubles.warn("damaged_note", error=error)
        return without


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON in which what is not finite is null, as JSON knows no NaN."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest(path: Path) -> str:
    """The checksum that a checkpoint, verified just now, ends with."""
    with path.open("rb") as file:
        file.seek(-64, 2)
        return file.read().decode()


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
