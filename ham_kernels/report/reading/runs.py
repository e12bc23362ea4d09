"""Run folders read into dataclasses. What is missing or broken becomes a note; only a folder that is no run raises."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common.locks import held
from ...methods.settings import Method
from ...runs.config_file import method_of
from .evaluations import WEIGHTS, Evaluation, read_evaluation
from .files import read_mapping, shown
from .json_types import MALFORMED, read_as
from .metrics import Epoch, read_metrics, tell_log

EVALUATE = "ham evaluate {run}"
RESUME = "ham train --resume {run}"
OTHERS = "reports show no other evaluations, of which it has"
SHOWN = tuple(f"{weights}.json" for weights in WEIGHTS)
MARKS = ("config.toml", "status.json", "metrics.jsonl", "evaluation")


@dataclass
class Run:
    """A run folder. `notes` say what could not be read."""

    folder: Path  # as given
    name: str = ""  # the folder's name; with its path where two folders of a report share a name
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    begun: dict[str, Any] = field(default_factory=dict)  # of first weights: "run" that they are of, what they cost
    origin: dict[str, Any] = field(default_factory=dict)  # of a model trained elsewhere: its class, file
    epochs: list[Epoch] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    busy: bool = False  # a process works on it
    data: dict[str, Any] = field(default_factory=dict)  # of its images: classes, counts, digest
    other_eps: list[Evaluation] = field(default_factory=list)  # judged as those shown, but under another eps
    left_out: dict[str, str] = field(default_factory=dict)  # {evaluation: the part, budget, precision or seed it is of}

    def _scalar(self, section: str, key: str, kind: type | tuple[type, ...]) -> Any:
        """A setting, or None where it is not there or of another type."""
        values = self.config.get(section)
        value = values.get(key) if isinstance(values, dict) else None
        return value if isinstance(value, kind) and not isinstance(value, bool) else None

    @property
    def method(self) -> Method | None:
        """The method, where this version knows it and its settings."""
        try:
            return method_of(self.config["method"])
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def seed(self) -> int | None:
        return self._scalar("run", "seed", int)

    @property
    def draw(self) -> tuple:
        """Differs between runs with the same settings that drew other random numbers, or are of other first weights."""
        if self.adopted:
            return tuple(sorted({e.checkpoint_sha256 or "" for e in self.evaluations.values()})) or (str(self.folder),)
        return (str(self.folder),) if self.seed is None else (self.seed, self.first_weights)

    @property
    def verdicts(self) -> int:
        """By how many attacks its weights were judged."""
        return sum(len(e.attacks) for e in self.evaluations.values())

    @property
    def label(self) -> str | None:
        return (self._scalar("run", "label", str) or "").strip() or None

    @property
    def method_name(self) -> str | None:
        return self._scalar("method", "name", str)

    @property
    def eps(self) -> float | None:
        return read_as(float | None, self._scalar("attack", "eps", (int, float)))

    @property
    def norm(self) -> str | None:
        return self._scalar("attack", "norm", str)

    @property
    def attack_steps(self) -> int | None:
        return self._scalar("attack", "steps", int)

    @property
    def warm_up(self) -> str:
        """The method of the epochs before the run's own; PGD-AT where it does not tell."""
        return self._scalar("warm_up", "name", str) or "pgd_at"

    @property
    def dataset(self) -> str | None:
        """The named data set, or the name of the folder or tar given instead."""
        path = self._scalar("data", "path", str)
        if path:
            return Path(path).name
        named = self._scalar("data", "dataset", str)
        return named or next((e.dataset for e in self.evaluations.values() if e.dataset), None)

    @property
    def images(self) -> dict[str, str]:
        """Digests of images and labels: of all parts ("all"), and of those judged ("test 200")."""
        told = {f"{e.part} {a.n}": a.images_sha256 for e in self.evaluations.values() for a in e.attacks.values()}
        return {what: digest for what, digest in {"all": self.data.get("sha256"), **told}.items() if digest}

    @property
    def planned_epochs(self) -> int | None:
        planned = self.status.get("epochs")
        return planned if isinstance(planned, int) else self._scalar("optim", "epochs", int)

    @property
    def state(self) -> str:
        """Of status.json; without one it is told from the epochs logged. A killed process leaves "running" behind."""
        if self.status.get("state"):
            state = str(self.status["state"])
            return "stopped" if state == "running" and not self.busy else state
        done = bool(self.epochs) and self.epochs[-1].epoch == self.planned_epochs
        return "finished" if done else "unknown"

    @property
    def adopted(self) -> bool:
        """Trained elsewhere: weights and verdicts alone are known."""
        return self.status.get("state") == "adopted"

    @property
    def finished(self) -> bool:
        return self.state == "finished" or self.adopted

    @property
    def first_weights(self) -> str | None:
        """What a training began with that did not begin with random weights."""
        return self._scalar("run", "weights", str)

    def before(self, what: str) -> float | None:
        """What its first weights have cost, in "seconds" and such: 0 of random ones, None where it is not known."""
        value = 0.0 if self.first_weights is None else self.begun.get(what)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def seconds(self) -> float | None:
        """Training time of all epochs and of its first weights; None where an epoch is not in the log."""
        return _plus(self.own_seconds, self.before("seconds"))

    @property
    def cpu_seconds(self) -> float | None:
        """The same of all threads' CPU time."""
        return _plus(self.own_cpu_seconds, self.before("cpu_seconds"))

    @property
    def own_seconds(self) -> float | None:
        return self._sum([e.seconds for e in self.epochs])

    @property
    def own_cpu_seconds(self) -> float | None:
        return self._sum([e.cpu_seconds for e in self.epochs])

    def _sum(self, times: list[float | None]) -> float | None:
        whole = [e.epoch for e in self.epochs] == list(range(1, len(times) + 1)) and not self.cut
        return sum(times) if times and whole and None not in times else None

    @property
    def cut(self) -> bool:
        """Whether more epochs are done than the log holds."""
        told = self.status.get("epoch")
        return isinstance(told, int) and bool(self.epochs) and self.epochs[-1].epoch < told and not self.busy

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """Each time that a process trained it: {"started", "ended", "machine", ...} as far as known."""
        sessions = self.environment.get("sessions")
        return [s for s in sessions if isinstance(s, dict)] if isinstance(sessions, list) else []

    @property
    def machines(self) -> list[dict[str, Any]]:
        """Each that it was trained on, as far as known, in order."""
        told = [session.get("machine") for session in self.sessions]
        known = [machine for machine in told if isinstance(machine, dict)] or [self.environment.get("machine")]
        return [machine for machine in known if isinstance(machine, dict) and machine]

    @property
    def device(self) -> str | None:
        """cpu or cuda; "auto" is the GPU where there is one."""
        told = (self._scalar("run", "device", str) or "").split(":")[0] or None
        if told == "auto" and self.machines:
            return "cuda" if any(machine.get("gpu") not in (None, "none") for machine in self.machines) else "cpu"
        return told

    @property
    def named(self) -> bool:
        """Whether its label was given by a person; an adopted model without has one by its file or class."""
        return bool(self.label) and self.origin.get("named", True) is not False

    def _command(self, template: str) -> str:
        return template.format(run=shlex.quote(str(self.folder)))

    @property
    def missing(self) -> list[tuple[str, str | None]]:
        """(what is not there, the command that makes it)."""
        out: list[tuple[str, str | None]] = []
        if not self.config:
            out.append(("no settings (config.toml)", None))
        if not self.finished:
            at = f" at epoch {self.epochs[-1].epoch if self.epochs else 0} of {self.planned_epochs or '?'}"
            out.append((f"training is not finished ({self.state}{at})", self._command(RESUME)))
        if self.adopted:
            pass
        elif not self.epochs:
            out.append(("no training log (metrics.jsonl)", None))
        elif self.own_seconds is None:
            out.append(("no training time: epochs are missing in metrics.jsonl", None))
        if not self.evaluations:
            what = "not evaluated"
            if self.left_out:
                what += f" on test images at its own budget in fp32 with seed 0 ({OTHERS}: {', '.join(self.left_out)})"
            out.append((what, self._command(EVALUATE)))
        return out


def read_run(folder: str | Path) -> Run:
    """A run folder, as much of it as is there. Raises: FileNotFoundError where it is no run folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"runs: {folder} is not a folder; give run folders, as `ham train` makes them")
    if not any((folder / mark).exists() for mark in MARKS):
        raise FileNotFoundError(
            f"runs: {folder} is no run folder, nor a folder of them: it holds none of {', '.join(MARKS)}"
        )
    run = Run(folder, folder.resolve().name)
    run.config = read_mapping(folder / "config.toml", run.notes)
    run.environment = read_mapping(folder / "environment.json", run.notes)
    run.status = read_mapping(folder / "status.json", run.notes)
    run.begun = read_mapping(folder / "begun_with.json", run.notes)
    run.origin = read_mapping(folder / "origin.json", run.notes)
    run.data = read_mapping(folder / "data.json", run.notes)
    if run.adopted:  # its images are those that judge it, whatever else lay beside them
        run.data = {key: value for key, value in run.data.items() if key not in ("counts", "sha256")}
    run.epochs = read_metrics(folder / "metrics.jsonl", run.notes)
    run.busy = held(folder / ".lock")
    if run.cut and not any("metrics.jsonl line" in note for note in run.notes):
        told = f"while status.json says that {run.status['epoch']} are done"
        tell_log(folder / "metrics.jsonl", run.notes, f"ends at epoch {run.epochs[-1].epoch}, {told}")
    others = sorted(path for path in (folder / "evaluation").glob("[!.]*.json*") if path.name not in SHOWN)
    for path in others:
        _read_other(run, path)
    for weights in WEIGHTS:
        _read_evaluation(run, weights)
    return run


def _plus(own: float | None, before: float | None) -> float | None:
    return None if None in (own, before) else own + before


def _read_evaluation(run: Run, weights: str) -> None:
    path = run.folder / "evaluation" / f"{weights}.json"
    raw = read_mapping(path, run.notes)
    if not raw:
        return
    try:
        judged = run.evaluations[weights] = read_evaluation(weights, raw, run.notes, path)
    except MALFORMED as error:
        run.notes.append(f"{shown(path)}: not an evaluation ({type(error).__name__}: {error})")
        return
    if weights in ("last", "ema") and run.epochs and judged.epoch not in (None, run.epochs[-1].epoch):
        run.notes.append(
            f"{shown(path)} is of epoch {judged.epoch}, the run is at epoch {run.epochs[-1].epoch}: "
            f"`{run._command(EVALUATE)}`"
        )


def _in_proportion(run: Run, raw: dict[str, Any]) -> bool:
    """Whether the step is of eps what the run's own is of its own."""
    step, told = run._scalar("attack", "step_size", (int, float)), (raw.get("eps"), raw.get("step_size"))
    if not all(isinstance(v, (int, float)) for v in (step, run.eps, *told)) or not run.eps or not told[0]:
        return False
    return math.isclose(told[1] / told[0], step / run.eps, rel_tol=1e-6, abs_tol=1e-12)


def _read_other(run: Run, path: Path) -> None:
    """An evaluation that differs from those shown: kept where it does in eps alone, else why it is left out."""
    raw = read_mapping(path, run.notes)
    if ".json.epoch" in path.name:
        run.left_out[path.name] = f"earlier weights, of epoch {raw.get('epoch')}"
        return
    step = run._scalar("attack", "step_size", (int, float))
    usual = {"part": "test", "eps": run.eps, "step_size": step, "precision": "fp32", "seed": 0}
    apart = [key for key, value in usual.items() if key in raw and raw[key] != value]
    weights = path.name.split(".")[0]
    if "eps" in apart and weights in WEIGHTS and set(apart) <= {"eps", "step_size"} and _in_proportion(run, raw):
        try:
            run.other_eps.append(read_evaluation(weights, raw, run.notes, path))
            return
        except MALFORMED as error:
            run.notes.append(f"{shown(path)}: not an evaluation ({type(error).__name__}: {error})")
    told = ", ".join(f"{key.replace('_', ' ')} {raw[key]}" for key in apart)
    run.left_out[path.name] = told or "another choice"
