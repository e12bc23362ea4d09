"""What a step and an epoch report, and how an epoch's report survives a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..engine import Stopwatch
from ..evaluation import ClassAccuracy


@dataclass
class StepReport:
    """One training step. Without a row to train on there is no update: n_kept and loss are 0."""

    loss: float  # weighted mean over the rows trained on
    n: int  # rows of the batch
    n_hard: int  # hard rows; n where nothing is screened
    stopwatch: Stopwatch = field(repr=False)
    n_kept: int | None = None  # rows trained on: n_hard, those that round_to adds, those that stop or jump
    batches: int = 1  # of the loader in this step; more where a group takes one update
    no_gradient: int = 0  # rows whose attack began without a gradient to follow; of a group in its first report

    def __post_init__(self):
        if self.n_kept is None:
            self.n_kept = self.n_hard

    @property
    def hard_fraction(self) -> float:
        return self.n_hard / self.n

    @property
    def seconds(self) -> float:
        """Seconds of the step on its device (on CUDA this waits for the step to end)."""
        return self.stopwatch.seconds


@dataclass
class EpochReport:
    """One epoch. Accuracies are of the validation set: `val` with raw weights, `val_ema` with averaged ones."""

    epoch: int  # 1-based
    phase: str  # the method that trained it, by name: the warm-up's before start_epoch
    loss: float  # mean over the rows trained on
    n: int
    n_hard: int
    skipped: int  # batches without a row to train on: no update
    seconds: float  # training only: no validation, no checkpoints
    val: dict[str, ClassAccuracy] | None = None
    val_ema: dict[str, ClassAccuracy] | None = None
    n_kept: int = 0  # rows trained on
    mined: bool = False  # rows were screened or weighed
    no_gradient: int = 0  # rows whose attack began without a gradient to follow
    cpu_seconds: float | None = 0.0  # of all threads of this process in the same time; None in reports of before
    waited: float | None = 0.0  # of `seconds`, for batches to be there; None in reports of before
    watch: dict[str, int] | None = None  # after a one-step epoch: of `rows` training images, how many resist what

    @property
    def hard_fraction(self) -> float:
        return self.n_hard / self.n

    def took(self, seconds: float, cpu_seconds: float) -> None:
        self.seconds += seconds
        if self.cpu_seconds is not None:
            self.cpu_seconds += cpu_seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EpochReport:
        report = cls(
            **{"mined": values["phase"] == "ham", "cpu_seconds": None, "waited": None, **values}
        )  # reports of before did not tell
        for name in ("val", "val_ema"):
            judged = getattr(report, name)
            if judged is not None:
                setattr(report, name, {attack: _accuracy(v) for attack, v in judged.items()})
        return report


def _accuracy(values: dict[str, Any]) -> ClassAccuracy:
    return ClassAccuracy(**{f.name: values[f.name] for f in fields(ClassAccuracy) if f.init and f.name in values})


@dataclass
class RunningEpoch:
    """An epoch under way: sums over the batches so far."""

    report: EpochReport  # its loss is a sum over rows until the epoch ends
    batches: int = 0

    def waited(self, seconds: float) -> None:
        """For a batch; it counts in the time of its step."""
        if self.report.waited is not None:
            self.report.waited += seconds

    def add(self, step: StepReport, seconds: float, cpu_seconds: float) -> None:
        report = self.report
        self.batches += step.batches
        report.loss += step.loss * step.n_kept
        report.n += step.n
        report.n_hard += step.n_hard
        report.n_kept += step.n_kept
        report.no_gradient += step.no_gradient
        report.skipped += step.batches * (step.n_kept == 0)
        report.took(seconds, cpu_seconds)

    def to_dict(self) -> dict[str, Any]:
        return {"report": self.report.to_dict(), "batches": self.batches}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunningEpoch:
        return cls(EpochReport.from_dict(values["report"]), values["batches"])
