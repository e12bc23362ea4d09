"""`ham train --dry-run`: what a run would take, from a few steps of each kind of its epochs. No run folder is made."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, groupby, islice
from pathlib import Path

import torch
from torch import Tensor

from ..data import Loaders
from ..methods.settings import Method
from ..runs.settings import TrainSettings
from ..training.batches import in_groups
from ..training.fit_checks import check_fit
from ..training.trainer import Trainer
from .progress import duration, say
from .train import prepared

UNTIMED = 3  # steps before the clock: memory is taken, kernels compile, graphs are captured
TIMED = 10  # steps of a kind of epoch
ENOUGH = 30.0  # seconds, after which LEAST timed steps are enough
LEAST = 3


@dataclass(frozen=True)
class Kind:
    """Epochs that train by one method, and what its steps took."""

    method: Method
    first: int  # epochs, 1-based
    last: int
    row_seconds: tuple[float, ...]  # of each step timed, over its rows
    hard: float  # share of hard rows in them
    steps: int  # K, as the training was told

    @property
    def epochs(self) -> int:
        return self.last - self.first + 1

    @property
    def forwards(self) -> float:
        """Of the full batch, in a step, by the cost model."""
        return self.method.cost(self.steps, self.hard)

    def longer(self, hard: float | None) -> float:
        """By what factor a step takes longer at another share of hard rows, by the cost model; None: as timed."""
        return 1.0 if hard is None else self.method.cost(self.steps, hard) / self.forwards


@dataclass(frozen=True)
class Estimate:
    """Seconds of a whole run, checkpoints and the start apart."""

    kinds: tuple[Kind, ...]
    rows: int  # training images of an epoch
    batch_size: int
    validation: float  # seconds after each epoch
    peak: str  # memory

    def seconds(self, of=statistics.fmean, hard: float | None = None) -> float:
        """By `of` the timed steps of each kind: their mean, `min` or `max`; at a share of hard rows, None: as timed."""
        trained = sum(k.epochs * self.rows * of(k.row_seconds) * k.longer(hard) for k in self.kinds)
        return trained + self.validation * sum(k.epochs for k in self.kinds)

    @property
    def timed(self) -> int:
        return sum(len(k.row_seconds) for k in self.kinds)

    def lines(self) -> list[str]:
        """In words."""
        said = [self._of_kind(kind) for kind in self.kinds]
        if self.validation:
            said.append(f"validation: {_short(self.validation)} after each epoch")
        low, high = (_short(self.seconds(of)) for of in (min, max))
        said.append(
            f"the whole run: {_short(self.seconds())}, from {low} to {high} by the fastest and the slowest of "
            f"{self.timed} steps timed; checkpoints are not counted"
        )
        if any(k.method.early_drop for k in self.kinds):
            none, every = (_short(self.seconds(hard=share)) for share in (0.0, 1.0))
            said.append(
                f"the share of hard rows changes in training: {none} with none, {every} with all, by the cost model"
            )
        return [*said, f"peak memory: {self.peak}"]

    def _of_kind(self, kind: Kind) -> str:
        steps = [s * min(self.batch_size, self.rows) for s in kind.row_seconds]
        epochs = f"epoch {kind.first}" if kind.epochs == 1 else f"epochs {kind.first} to {kind.last}"
        hard = f" at {kind.hard:.0%} hard rows" if kind.method.early_drop else ""
        return (
            f"{epochs}, {kind.method.title}: {kind.forwards:.1f} forwards a step{hard}; "
            f"{_short(statistics.fmean(steps))} ({_short(min(steps))} to {_short(max(steps))}, {len(steps)} steps), "
            f"{_short(statistics.fmean(kind.row_seconds) * self.rows)} an epoch"
        )


def dry_run(settings: TrainSettings, out: str | Path | None = None) -> Estimate:
    """Builds all of a run, times steps of each kind of its epochs on its images, and says what the run would take.

    Raises: as `train` does, a run in `out` included.
    """
    job = prepared(settings, out)
    job.say_what("dry run")
    val_attacks = ("clean", job.settings.run.val_attack)
    check_fit(
        job.trainer, job.loaders.train, job.settings.optim.epochs, job.loaders.val, job.scheduler, val_attacks
    )  # fmt: skip
    estimate = measured(job.settings, job.trainer, job.loaders)
    for line in estimate.lines():
        say(line)
    return estimate


def measured(settings: TrainSettings, trainer: Trainer, loaders: Loaders) -> Estimate:
    """Trains by some steps."""
    loader, on_gpu = loaders.train, trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    epochs = range(1, settings.optim.epochs + 1)
    kinds = []
    for _, group in groupby(epochs, lambda epoch: id(trainer.phases.objective(epoch))):
        of_kind = list(group)
        method = trainer.phases.objective(of_kind[-1]).method
        say(f"timing steps of {method.title} ...", sys.stderr)  # a large model on a CPU takes minutes for them
        seconds, hard = _timed(trainer, loader, of_kind[-1], method.group)
        kinds.append(Kind(method, of_kind[0], of_kind[-1], seconds, hard, settings.attack.steps))
    validation = 0.0 if loaders.val is None else _validation(trainer, loaders.val, settings.run.val_attack)
    if on_gpu:
        peak = f"{torch.cuda.max_memory_allocated(trainer.device) / 2**30:.2f} GiB in torch's tensors on the GPU"
    else:
        peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of this process"
    return Estimate(tuple(kinds), loader.rows, loader.batch_size, validation, peak)


def _timed(trainer: Trainer, loader, epoch: int, group: int) -> tuple[tuple[float, ...], float]:
    """Seconds of each step over its rows, images and all, and the share of hard rows."""
    groups = in_groups(_full_batches(loader), group)
    for batches in islice(groups, UNTIMED):
        trainer.train_group(batches, epoch)
    seconds, hard, began = [], [], time.perf_counter()
    since = began
    for batches in groups:
        reports = trainer.train_group(batches, epoch)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        now = time.perf_counter()
        seconds.append((now - since) / sum(r.n for r in reports))
        hard.append(sum(r.n_hard for r in reports) / sum(r.n for r in reports))
        since = now
        if len(seconds) >= TIMED or (len(seconds) >= LEAST and now - began > ENOUGH):
            break
    return tuple(seconds), statistics.fmean(hard)


def _full_batches(loader) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end. The last of an epoch may be short, and says less of the others."""
    size = min(loader.batch_size, loader.rows)
    for epoch in count(1):
        loader.set_epoch(epoch)
        yield from (batch for batch in loader if len(batch[1]) == size)


def _validation(trainer: Trainer, loader, attack: str) -> float:
    """Seconds after each epoch, from one batch of the images."""
    batch = next(iter(loader))
    models = [m for m in (trainer.model, trainer.ema_model) if m is not None]
    for _ in range(2):  # the second time counts
        since = time.perf_counter()
        for model in models:
            trainer.judged(model, [batch], ("clean", attack))
        took = time.perf_counter() - since
    return took * loader.rows / len(batch[1])


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 100 else duration(seconds)
