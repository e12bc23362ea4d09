"""`ham train`: one run in its folder, which can be killed at any moment and goes on where it was."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import signal
import time
import traceback
from pathlib import Path

import torch

from ..common import checks, field_types, troubles
from ..data.batches import mixed_seed
from ..data.table import generated_rows
from ..distributed import RankError, Ranks
from ..runs.checkpoints import random_states, seed_python_and_numpy, set_random_states
from ..runs.folder import RunFolder
from ..runs.resume_rules import check_unchanged, noted
from ..runs.settings import RunSettings, TrainSettings
from ..training.reports import EpochReport, StepReport
from ..training.trainer import Trainer
from . import run_images
from .first_weights import begin_with, cost_of, with_their_normalisation
from .from_settings import (
    check_before_data,
    check_takes,
    device_of,
    join,
    loaders_of,
    model_of,
    scheduler_of,
    trainer_of,
)
from .logs import Logs, behind
from .progress import TrainProgress, duration, say
from .signals import Stopped, StopRequest
from .teacher import place_of, teacher_of, with_its_digest


def train(settings: TrainSettings, out: str | Path | None = None, *, quiet: bool = False) -> Trainer:
    """Trains a new run in the folder `out` (None: runs/DATASET-METHOD-seedN) and returns the trainer.

    SIGINT, SIGTERM or SIGHUP end it after the batch at hand, with a checkpoint; `resume(out)` goes on, also after a
    kill. Under torchrun all processes call this, and train one run, which process 0 writes.
    Raises: FileExistsError if there is a run in `out`; ValueError, TypeError, FileNotFoundError naming the setting,
        before anything is written; Stopped after a signal.
    """
    job = prepared(settings, out)
    return job.work_in(job.ranks.first_makes(lambda: _new_folder(job.settings, out)), quiet)


def prepared(settings: TrainSettings, out: str | Path | None = None) -> _Job:
    """All of a new run but its folder. Raises: as `train` does."""
    if not isinstance(settings, TrainSettings):
        raise TypeError(f"settings: got {settings!r}; it must be TrainSettings, such as ham_kernels.preset('digits')")
    settings.check()
    settings = with_its_digest(with_their_normalisation(settings))
    ranks = join(settings.run.device)
    with ranks.first_alone("the look at the run's folder"):
        if ranks.rank == 0:
            RunFolder("runs" if out is None else out).check_writable()
            if out is not None:
                RunFolder(out).check_free()
    return _Job(settings, ranks)


def resume(
    out: str | Path, *, path: str | Path | None = None, until_epoch: int | None = None, quiet: bool = False
) -> Trainer:
    """Goes on with the run in `out` from its newest intact checkpoint, on a CPU to the same final weights, bit by bit,
    with as many threads.

    A run that is finished, or done up to `until_epoch`, is returned as it is.
    path: where its images lie now, if they have moved; they must be the same.
    Raises: as `train` does; CheckpointError if no checkpoint is intact.
    """
    if until_epoch is not None:
        checks.integer("until_epoch", until_epoch, 1)
    ranks = join(RunFolder.open(out, writes=False).settings().run.device)
    run = RunFolder.open(out, writes=ranks.rank == 0)
    if run.writes:
        run.check_writable("run")
    if run.adopted:
        raise ValueError(f"resume: {run.path} holds a model that was trained elsewhere, of which there is no course")
    settings = run.settings()
    settings.check()
    return _Job(settings, ranks, run, None if path is None else str(path)).work_in(run.path, quiet, until_epoch)


def _new_folder(settings: TrainSettings, out: str | Path | None) -> Path:
    """Of a new run: `out`, else runs/DATASET-METHOD-seedN, or the first of -2, -3, ... that is free."""
    if out is not None:
        return RunFolder.create(out, settings).path
    stem = f"{settings.data.source}-{settings.method.name}-seed{settings.run.seed}"
    for name in itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            return RunFolder.create(Path("runs") / name, settings).path
    raise AssertionError("unreachable")


class _Paused(Exception):
    """The epoch to pause after is done."""


class _Job:
    """Everything a run is made of."""

    def __init__(self, settings: TrainSettings, ranks: Ranks, run: RunFolder | None = None, path: str | None = None):
        self.settings, self.ranks = settings, ranks
        device = device_of(settings.run.device)
        check_before_data(settings, device)
        with ranks.first_alone("the search for the images"):  # a download, the cache
            images, self.facts, self.places = run_images.find(settings, run, path)
        seed_python_and_numpy(settings.run.seed)
        model = model_of(settings, len(images.classes), images.channels)
        fresh = run is None or not run.checkpoints.newest_first()
        self.begun = begin_with(settings, model, images.classes) if settings.run.weights and fresh else None
        counts = list(images.class_counts["train"].values())
        self.places |= place_of(settings, run)
        teacher = teacher_of(settings, self.places, images.classes, images.channels, device)
        self.trainer = trainer_of(settings, model, device, counts, teacher)
        self.scheduler = scheduler_of(settings, self.trainer)
        self.loaders = loaders_of(settings, images, device, ranks)
        if fresh and self.loaders.val is None and settings.run.best_by != RunSettings.best_by:
            raise ValueError(f"best_by: got {settings.run.best_by!r} without validation images (val_images)")
        batches, size = len(self.loaders.train), settings.data.batch_size
        if settings.data.path is not None and batches < 10:
            troubles.warn("few_batches", batches=batches, size=size, images=images.counts["train"])
        takes = {"model": (self.trainer.model, settings.model.name), "teacher": (teacher, settings.run.teacher)}
        for argument, (net, called) in takes.items():
            if net is not None:
                check_takes(net, called, self.loaders.test, len(images.classes), argument)
        self.stop = StopRequest()
        self.best: dict[str, float] = {}

    def work_in(self, path: Path, quiet: bool, until_epoch: int | None = None) -> Trainer:
        run = RunFolder(path, writes=self.ranks.rank == 0)
        with run.alone(), self.stop:
            try:
                return self._work_in(run, quiet or not run.writes, until_epoch)
            except Stopped as stopped:
                stopped.run = run.path
                raise

    def _work_in(self, run: RunFolder, quiet: bool, until_epoch: int | None) -> Trainer:
        self.run = run
        if self.begun is not None and run.writes:
            run.write_json("begun_with.json", cost_of(self.settings.run.weights))
        with self.ranks.first_alone("the search for a checkpoint"):  # which sets damaged ones aside
            run.set_data_facts(self.facts, self.places)
            found = run.checkpoints.load_newest(set_aside=True)
            if found is not None:
                self._take_over(found[1])
        self.ranks.check_alike(self.trainer.model)
        self._reseed()
        trainer, epochs = self.trainer, self.settings.optim.epochs
        run.write_metrics(trainer.history, self.settings)
        self.until = min(epochs, until_epoch or epochs)
        if trainer.epoch >= self.until:
            run.set_status("finished" if trainer.epoch >= epochs else "interrupted", trainer.epoch, epochs)
            if not quiet:
                more = f"; `ham train --from {shlex.quote(str(run.path))}` trains on" if trainer.epoch >= epochs else ""
                say(f"{run.path}: {trainer.epoch} of {epochs} epochs are done already{more}")
            if run.writes and behind(run, self.settings, trainer.epoch):
                logs = Logs(run, self.settings, self.facts["classes"])
                logs.write(trainer.history)
                logs.close(trainer.epoch >= epochs)
            return trainer
        if not quiet:
            self.say_what(str(run.path))
            if found is not None:
                epoch, done = trainer.position
                say(f"goes on in epoch {epoch} after {done} batches")
        run.begin_session(*trainer.position)
        run.set_status("running", trainer.epoch, epochs)
        batches = len(self.loaders.train)
        self.progress = TrainProgress(epochs, batches, trainer.epoch * batches + trainer.position[1], quiet=quiet)
        self.logs: Logs | None = None
        self._saved_at = time.monotonic()
        try:
            if run.writes:
                self.logs = Logs(run, self.settings, self.facts["classes"])
                self.logs.write(trainer.history)  # what a killed process did not come to
            self._fit(epochs)
        except _Paused:
            run.set_status("interrupted", trainer.epoch, epochs, "paused as asked")
            return trainer
        except BaseException as error:
            with contextlib.suppress(OSError):  # such as the full disk that is the error
                self._note_failure(error)
            raise
        finally:
            self.progress.close()
            with contextlib.suppress(OSError):
                if self.logs is not None:
                    self.logs.close(trainer.epoch >= epochs)
            with contextlib.suppress(OSError):
                run.end_session()
        run.set_status("finished", epochs, epochs)
        if not quiet:
            seconds = sum(report.seconds for report in trainer.history)
            path = shlex.quote(str(run.path))
            say(f"finished in {duration(seconds)} of training; judge it with `ham evaluate {path}`")
        return trainer

    def _note_failure(self, error: BaseException) -> None:
        stopped = isinstance(error, (Stopped, KeyboardInterrupt))
        message = f"{type(error).__name__}: {error}"
        if not stopped:
            self.run.note_error(traceback.format_exc())
            message += " (error.txt has the whole way to it)"
        epochs = self.settings.optim.epochs
        self.run.set_status("interrupted" if stopped else "failed", self.trainer.epoch, epochs, message)

    def _fit(self, epochs: int) -> None:
        val = self.loaders.val
        try:
            self.stop.check()
            self.trainer.fit(
                self.loaders.train, epochs, None if val is None else self.stop.watch(val),
                scheduler=self.scheduler, on_epoch_end=self._epoch_end, on_batch_end=self._batch_end,
                val_attacks=("clean", self.settings.run.val_attack),
            )  # fmt: skip
        except Stopped:
            self._save()
            raise
        except RankError as error:
            if not error.left:
                raise
            self._save()  # another process was told to stop, and all are behind the same batch
            raise Stopped(self.stop.number or signal.SIGTERM) from error
        except RuntimeError as error:
            if self.stop.number is not None:  # a signal to all processes killed a data worker, perhaps mid-update
                raise Stopped(self.stop.number) from error
            raise

    # ------------------------------------------------------------ callbacks
    def _batch_end(self, step: StepReport) -> None:
        self._reseed()
        self.progress.batch(step, self.trainer.position[0])
        self.stop.check()
        if time.monotonic() - self._saved_at >= 60 * self.settings.run.checkpoint_minutes:
            self._save()

    def _epoch_end(self, report: EpochReport) -> None:
        best = self._keep_best(report)
        self.run.write_metrics(self.trainer.history, self.settings)
        self._save()
        if self.logs is not None:
            self.logs.write(self.trainer.history)  # behind the checkpoint, so that no epoch in it is trained again
        self.run.set_status("running", self.trainer.epoch, self.settings.optim.epochs)
        self.progress.epoch(report, best)
        if self.trainer.epoch < self.settings.optim.epochs:
            self.stop.check()
            if self.trainer.epoch >= self.until:
                raise _Paused

    def _keep_best(self, report: EpochReport) -> bool:
        """Writes best.pt and best_ema.pt where validation says so; the earlier of two equal epochs stays.

        A model that answers one class for all images is none of the best, whatever its accuracy.
        """
        improved = False
        models = {"best": (self.trainer.model, report.val), "best_ema": (self.trainer.ema_model, report.val_ema)}
        for weights, (model, judged) in models.items():
            if judged is None or judged["clean"].one_class is not None:
                continue
            if self._score(judged) > self.best.get(weights, -1.0):
                self.best[weights] = self._score(judged)
                state = {"model": model.state_dict(), "epoch": report.epoch, "score": self.best[weights]}
                self.run.save_best(weights, state)
                improved = True
        return improved

    def _score(self, judged: dict) -> float:
        result = judged[self.settings.run.val_attack]
        return result.accuracy if self.settings.run.best_by == "robust" else result.worst_class

    # ------------------------------------------------------------ state
    def _reseed(self) -> None:
        """Of several processes each draws for its own rows what a model draws in its forward, dropout or drop-path, by
        the number of the step: also after a resume, on however many.
        """
        if self.ranks.several:
            torch.manual_seed(mixed_seed(self.settings.run.seed, self.trainer.steps_done, self.ranks.rank))

    def _save(self) -> None:
        state = {
            "trainer": self.trainer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": random_states(),
            "best": dict(self.best),
            **noted(self.settings),
            "threads": torch.get_num_threads(),
        }
        self.run.checkpoints.save(state, self.trainer.steps_done)
        self._saved_at = time.monotonic()

    def _take_over(self, state: dict) -> None:
        check_unchanged(state, self.settings)
        self.trainer.load_state_dict(state["trainer"])
        self.scheduler.load_state_dict(state["scheduler"])
        set_random_states(state["random"])
        if self.trainer.device.type == "cpu" and state["threads"] != torch.get_num_threads():
            troubles.warn("other_threads", before=state["threads"], now=torch.get_num_threads())
        self.best = dict(state["best"])
        self.run.drop_best_after(self.trainer.epoch)

    def say_what(self, name: str) -> None:
        """The run in some lines."""
        s, trainer, world = self.settings, self.trainer, self.ranks.world
        images = f"{s.data.path} (preset: {s.data.dataset})" if s.data.path else s.data.dataset
        millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
        say(f"{name}: {images}, {s.model.name} ({millions:.2f} M parameters), {s.method.describe(s.warm_up.name)}")
        say(run_images.task_in_words(self.facts))
        if (made := self.facts.get("generated")) is not None:
            rows = generated_rows(s.data.batch_size, s.data.generated_share)
            say(f"{rows} of {s.data.batch_size} rows of a batch are of {made['images']} images of {s.data.generated}")
        say(
            f"{attack_in_words(s)}; images of {'x'.join(map(str, self.facts['shape']))}; {s.optim.epochs} epochs of "
            f"{len(self.loaders.train)} batches of {s.data.batch_size}, {s.optim.optimizer} with lr {s.optim.lr:g} "
            f"({s.optim.schedule}), on {trainer.device}, {s.run.precision}, seed {s.run.seed}"
        )
        if world > 1:
            say(f"{world} processes, each {-(-s.data.batch_size // world)} rows of a batch of {s.data.batch_size}")
        if self.begun is not None:
            say(self.begun)


def attack_in_words(settings: TrainSettings) -> str:
    """The attack that the method trains with: "eps 0.2, step 0.05, K 10, linf"."""
    attack, method = settings.attack, settings.method
    wider = f" ({method.eps_factor:g} of {attack.eps:g})" if method.eps_factor != 1 else ""
    step, k = f"step {method.eps_factor * attack.step_size:g}", method.attack_steps(attack.steps)
    if method.schedule:
        step = f"steps of {field_types.shown(method.schedule)} eps"
    steps = "one step" if method.one_step else f"{step}, K {k}"
    return f"eps {method.eps_factor * attack.eps:g}{wider}, {steps}, {attack.norm}"
