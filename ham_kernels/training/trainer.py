"""Trainer: a warm-up until the method's start_epoch, the method from then on, and all that a training goes on from."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..attack.pgd import PGD
from ..common import checks, troubles
from ..distributed import Meeting, inner_model, ranks_of, wrapped
from ..engine import Buffers, Engine, EngineOptions, Stopwatch, look_once, model_device, note_resting
from ..evaluation import ClassAccuracy
from ..evaluation.evaluate import accuracies
from ..evaluation.named_attacks import plans
from ..methods.mining import place_of
from ..methods.objective import EpochEnd
from ..methods.settings import Method
from .batches import Feed, errors_say_where
from .ema import WeightAverage
from .fit_checks import check_fit, check_gate, check_optimizer
from .phases import Phases
from .reports import EpochReport, RunningEpoch, StepReport
from .update import Updater

VAL_ATTACKS = ("clean", "pgd20")


class Trainer:
    """Adversarial training of a classifier by any method.

    Args:
        model: classifier, images (n, C, H, W) in [0, 1] -> logits (n, classes), with normalisation inside it.
        optimizer: over the model's parameters.
        method: such as ham.methods.TRADES(beta=6.0, early_drop=True, easy="stop"); see ham.methods.names().
        eps, step_size: >= 0, in units of the images.
        steps: K >= 1, of the attack.
        norm: "linf" or "l2".
        ema_decay: in [0, 1), e.g. 0.99: `ema_model` follows the weights, averaged after every update; after update t
            by the smaller of it and (1 + t) / (10 + t), so that the start is forgotten. None: off.
        device: moves the model there; None leaves it where it is.
        precision: "fp32", or "bf16" or "fp16" (autocast; fp16 scales the loss and waits once more per step).
        seed: of the random starts. Step s of a run draws the same noise whatever the device.
        warm_up: before the method's start_epoch: "pgd_at" (HAM's paper), or another method by name. "n_fgsm" and
            "fgsm_rs" take one step, and are watched for catastrophic overfitting: where it is found, PGD-AT takes over
            after a warning.
        natural_epochs: so many epochs of the warm-up, the first, train on clean images.
        grad_clip: >= 0. Gradients of an update whose norm over all of the optimiser's weights is larger are scaled down
            to it, as torch.nn.utils.clip_grad_norm_ does; 0: off.
        teacher: a classifier of as many classes, for methods that learn from one; moved to `device`, never trained, no
            part of the state.
        loss_weights: >= 0, one per class: the weight of its rows in the loss, multiplied with the method's own; such as
            methods.count_weights(images of each class). None: ones.
        channels_last: weights and images in NHWC order.
        compile: torch.compile of the model as the attack sees it (eval mode, no weight gradients).
        cuda_graphs: attack steps replayed per number of rows, updates where their number of rows repeats.
        winograd: on the CPU, 3x3 convolutions of stride 1 with a quarter of the multiplications, in attack and update.
            These four are False ("off"), True ("on") or "require", precision also "require-bf16": where model or device
            cannot serve one that is on, the work goes on without it after a warning; a required one raises EngineError.
        keep_memory: on the CPU, the process keeps the memory that torch frees (see engine/memory.py).
        group: the processes that train one model: "auto", those that ham_kernels.distributed.start() has joined, where
            there are some; a torch.distributed process group; None: this process by itself. Each gives its rows of
            every batch, one behind the other in the order of the processes, and none where there are too few; the
            training is then that of one process on whole batches. A model given in DistributedDataParallel trains
            through that wrapper; another one is wrapped.
        rebalance: hard rows move to processes that have fewer of them, where that is worth it, for the rest of the
            attack and the update; the training is the same.

    A batch that leaves one row to train on uses BatchNorm's running statistics, since one row has none of its own.
    A batch without a row to train on makes no update; it is counted in the reports.
    Of several processes, what is wrong on one raises on all: RankError (a ValueError) on the others.
    Layers that are in eval mode while the model trains are never trained. Warns: HamWarning (docs/troubleshooting.md).
    Raises: TypeError, ValueError naming the argument; NonFiniteError (a ValueError) when logits, loss or gradients
        become NaN or infinite. Parameters, buffers and optimizer are then as after the last good step.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, method: Method, *, eps: float = 8 / 255,
        step_size: float = 2 / 255, steps: int = 10, norm: str = "linf", ema_decay: float | None = None,
        device: torch.device | str | None = None, precision: str = "fp32", seed: int = 0, warm_up: str = "pgd_at",
        natural_epochs: int = 0, grad_clip: float = 0.0, loss_weights: Sequence[float] | Tensor | None = None,
        teacher: nn.Module | None = None,
        channels_last: bool | str = False, compile: bool | str = False,
        cuda_graphs: bool | str = False, winograd: bool | str = False, keep_memory: bool = True,
        group: Any = "auto", rebalance: bool = True,
    ):  # fmt: skip
        checks.module("model", model)
        self.ranks, self._rebalances = ranks_of(group), checks.flag("rebalance", rebalance)
        given, model = model, inner_model(model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: got {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
        own = {id(p) for p in model.parameters()}
        if own.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer: holds none of the model's parameters; make it from model.parameters()")
        checks.integer("steps", steps, 1)
        self._pgd = PGD(checks.real("eps", eps), checks.real("step_size", step_size), steps, norm)
        self.seed = checks.integer("seed", seed, 0, 2**63 - 1)
        loss_weights = None if loss_weights is None else checks.class_values("loss_weights", loss_weights)
        self.phases = Phases(method, self._pgd, warm_up, natural_epochs, self.seed, loss_weights, teacher, self.ranks)
        options = EngineOptions(precision, channels_last, compile, cuda_graphs, winograd, keep_memory)
        if ema_decay is not None and checks.real("ema_decay", ema_decay, 0.0, 1.0) == 1.0:
            raise ValueError("ema_decay: got 1.0; it must be below 1, or the average would never move")
        self.model = model if device is None else model.to(device)
        if teacher is not None and device is not None:
            teacher.to(device)
        note_resting(model)  # before a first evaluation of the user's puts all of it into eval mode
        self.device = torch.device(device) if device is not None else model_device(model) or torch.device("cpu")
        self.engine = Engine(options, self.device)
        through = given if given is not model else wrapped(self.model, self.ranks)
        self._feed = Feed(self.ranks, self.model, self.device)
        self._update = Updater(optimizer, self.engine, self.device, checks.real("grad_clip", grad_clip), through)
        self.average = None if ema_decay is None else WeightAverage(model, ema_decay)
        self._averages = True  # whether updates enter the weight average; the method's gate may close it
        self.epoch = 0  # epochs completed by fit
        self.steps_done = 0  # names the noise of the next step
        self.history: list[EpochReport] = []
        self._running: RunningEpoch | None = None  # the epoch under way
        self._own_epoch: int | None = None  # under way outside fit
        self._told = False  # of an attack without a gradient

    @property
    def method(self) -> Method:
        return self.phases.method.method

    @property
    def ema_model(self) -> nn.Module | None:
        """The weight average as a model in eval mode; None without ema_decay."""
        return None if self.average is None else self.average.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._update.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._update.optimizer = optimizer

    @property
    def precision(self) -> str:
        """The precision that is served: the one asked for, or "fp32" where the device has no other."""
        return self.engine.precision

    # ------------------------------------------------------------ steps
    def train_step(self, x: Tensor, y: Tensor, epoch: int) -> StepReport:
        """One update from a batch on the model's device: x (n, C, H, W) in [0, 1], y (n,) int64; epoch is 1-based.

        With the first batch of a later epoch the one before has ended, as the method is then told. Only `fit` watches
        one-step methods for overfitting. Of several processes each gives its own rows, and all call this together.
        """
        return self.train_group([(x, y)], epoch)[0]

    def train_group(self, batches: Sequence[tuple[Tensor, Tensor]], epoch: int) -> list[StepReport]:
        """Updates from several batches whose examples are made together, all by the weights before the first update.

        Returns one report per update: one for each batch, or one in all where the method's group_updates is "one".
        Where a later update of a group raises, the earlier ones have been made.
        """
        checks.integer("epoch", epoch, 1)
        rows = self._feed.rows_of(batches)
        self._end_own_epoch(before=epoch)
        self._own_epoch = epoch
        return self._train(batches, epoch, rows)

    def _end_own_epoch(self, before: int) -> None:
        """Tells the method that the caller's own epoch has ended, where one earlier than `before` is under way."""
        if (epoch := self._under_way()) is not None and epoch < before:
            self.phases.objective(epoch).end_epoch(EpochEnd(epoch, self.model))

    def _under_way(self) -> int | None:
        """The caller's own epoch, unless the caller has told the method of its end."""
        told = self._own_epoch is None or self.phases.objective(self._own_epoch).epoch != self._own_epoch
        return None if told else self._own_epoch

    def _train(self, batches: Sequence[tuple[Tensor, Tensor]], epoch: int, rows: Sequence[float]) -> list[StepReport]:
        objective = self.phases.begin(epoch)
        method, objective.epoch = objective.method, epoch
        stopwatch = Stopwatch(batches[0][0].device)
        x, y = batches[0] if len(batches) == 1 else (torch.cat(parts) for parts in zip(*batches, strict=True))
        if torch.is_inference_mode_enabled():
            raise troubles.error("inference_mode")
        sizes = [len(y)] if method.group_updates == "one" else [len(labels) for _, labels in batches]
        reports, before = [], Buffers(self.model, objective)
        try:
            with place_of(self.ranks, rows, self.device, self._rebalances) as place:
                shown = getattr(x, "shown", None)
                x = self.engine.place(self.model, x, self.ema_model)
                if shown is not None:
                    x.shown = shown
                if objective.pgd.steps and len(y):
                    look_once(self.model, x, y)
                examples = objective.group_examples(
                    self.model, x, y, sizes, seed=self.seed, step=self.steps_done, engine=self.engine, place=place
                )
            together = len(batches) // len(examples)
            for part in examples:
                loss, (n, n_hard, n_kept) = 0.0, part.everywhere
                for replay in range(method.replays if n_kept else 0):
                    if replay or reports:
                        before = Buffers(self.model, objective)
                    loss += self._update(self.model, objective, part, method.freeze_bn) / method.replays
                    if self.average is not None:
                        self.average.update(self.model, self._averages)
                reports.append(StepReport(loss, n, n_hard, stopwatch.stop(), n_kept, together, part.no_gradient))
                stopwatch = Stopwatch(x.device)
        except BaseException:
            before.undo()
            raise
        self.steps_done += len(batches)
        if examples[0].no_gradient and not self._told:
            self._told = True  # epochs count the further ones
            troubles.warn(
                "attack_without_gradient", attack="the attack of the training", rows=examples[0].no_gradient, n=len(y)
            )
        return reports

    # ------------------------------------------------------------ epochs
    def fit(
        self, train_loader: Iterable, epochs: int, val_loader: Iterable | None = None, *,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        on_epoch_end: Callable[[EpochReport], None] | None = None,
        on_batch_end: Callable[[StepReport], None] | None = None,
        val_attacks: Sequence[str] = VAL_ATTACKS,
    ) -> list[EpochReport]:  # fmt: skip
        """Trains up to epoch `epochs` (a total: a second call goes on where the first one ended).

        Args:
            train_loader: any iterable of (x in [0, 1], y) that can be walked once per epoch; an epoch number is given
                to `set_epoch` of the loader where it has one. After a stop within an epoch the batches done are
                passed over: by `set_position(batches)` where the loader has it, else by drawing and dropping them.
                The first batch of an epoch that takes one-step attacks is drawn once more at its end.
            val_loader: evaluated after each epoch under `val_attacks`, raw weights and weight average.
            scheduler: stepped once after each epoch. One of a metric (ReduceLROnPlateau) is stepped in on_epoch_end.
            on_epoch_end: called with each EpochReport.
            on_batch_end: called with each StepReport. What it raises ends fit; a later fit, or one after
                load_state_dict, goes on with the next batch.
        Returns: `history`, one EpochReport per epoch so far.
        """
        checks.integer("epochs", epochs, 1)
        check_fit(self, train_loader, epochs, val_loader, scheduler, val_attacks)
        if self.position == (1, 0) and val_loader is not None and self.phases.objective(1).method.gate:
            self._averages = False  # until an epoch has opened it
        self._end_own_epoch(before=self.epoch + 1)
        while self.epoch < epochs:
            report = self._train_epoch(train_loader, self.epoch + 1, on_batch_end)
            if val_loader is not None:
                report.val = self.judged(self.model, val_loader, val_attacks)
                if self.average is not None:
                    report.val_ema = self.judged(self.ema_model, val_loader, val_attacks)
            self._end_epoch(report, train_loader)
            if scheduler is not None:
                _step(scheduler)
            if on_epoch_end is not None:
                with self._told_that_it_leaves() if self.epoch < epochs else nullcontext():
                    on_epoch_end(report)
        check_gate(self)
        return self.history

    @property
    def position(self) -> tuple[int, int]:
        """(epoch under way, 1-based; its batches done)."""
        return self.epoch + 1, 0 if self._running is None else self._running.batches

    def _train_epoch(self, loader: Iterable, epoch: int, on_batch_end) -> EpochReport:
        """Trains the rest of the epoch. The loss in the report is still a sum."""
        method = self.phases.objective(epoch).method
        if self._running is None:
            self._running = RunningEpoch(EpochReport(epoch, method.name, 0.0, 0, 0, 0, 0.0, mined=method.mines))
        running = self._running
        since = _clocks()
        for batches, rows in self._feed.groups(loader, epoch, running.batches, method.group):
            running.waited(time.perf_counter() - since[0])
            with errors_say_where(epoch, running.batches, len(batches)):
                steps = self._train(batches, epoch, rows)
            took = [(now - then) / len(steps) for now, then in zip(_clocks(), since, strict=True)]
            for step in steps:  # all of a group before anybody hears of it: a stop falls between groups
                running.add(step, *took)
            if on_batch_end is not None:
                with self._told_that_it_leaves():
                    for step in steps:
                        on_batch_end(step)
            since = _clocks()
        if running.batches == 0:
            self._running = None
            raise ValueError(
                f"train_loader: gave no batch in epoch {epoch}; it must give some in every epoch "
                "(a generator is spent after one: pass a list or a DataLoader)"
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            running.report.took(*(now - then for now, then in zip(_clocks(), since, strict=True)))
        return running.report

    @contextmanager
    def _told_that_it_leaves(self) -> Iterator[None]:
        """What a callback raises ends the training on all processes, before the next batch."""
        with Meeting(self.ranks, self.device, what="the next batch") as meeting:
            try:
                yield
            except BaseException:
                meeting.leave()
                raise

    def _end_epoch(self, report: EpochReport, loader: Iterable) -> None:
        """The watch and the method look at the epoch; then it is done."""
        since = _clocks()
        self.ranks.check_alike(self.model)
        objective = self.phases.objective(report.epoch)
        if self.phases.watches(report.epoch):  # first: a stop while it draws must not end the epoch twice
            batch, rows = self._feed.first(loader, report.epoch)
            with place_of(self.ranks, rows, self.device) as place:
                reading = self.phases.watch(self.model, batch, report.epoch, self.precision, place)
            report.watch = asdict(reading)
        end = EpochEnd(report.epoch, self.model, report.val, report.val_ema)
        objective.end_epoch(end)
        self._averages = self.phases.objective(report.epoch + 1).keeps_average(end)
        report.took(*(now - then for now, then in zip(_clocks(), since, strict=True)))
        self._running = None
        self.epoch += 1
        report.loss = report.loss / max(report.n_kept, 1)
        self.history.append(report)

    # ------------------------------------------------------------ validation
    def judged(self, model: nn.Module, loader: Iterable, attacks: Sequence[str]) -> dict[str, ClassAccuracy]:
        """Accuracies of a model by attack, as `fit` takes them after an epoch."""
        wanted = plans(attacks, **self.budget)
        how = {"device": self.device, "precision": self.precision, "seed": self.seed}
        return accuracies(model, loader, wanted, **how, ranks=self.ranks)

    @property
    def budget(self) -> dict[str, Any]:
        """eps, step_size and norm."""
        return {"eps": self._pgd.eps, "step_size": self._pgd.step_size, "norm": self._pgd.norm}

    # ------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from, also between two batches of an epoch: tensors and plain values.

        The loader and a scheduler have states of their own; random generators are the caller's as well (the
        trainer draws its noise from `seed` and the number of steps done).
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.average is None else self.ema_model.state_dict(),
            "averages": self._averages,
            "ema_updates": None if self.average is None else self.average.updates,
            "loss_scale": self._update.state_dict(),
            **self.phases.state_dict(),
            "epoch": self.epoch,
            "own_epoch": self._under_way(),
            "steps_done": self.steps_done,
            "running": None if self._running is None else self._running.to_dict(),
            "history": [report.to_dict() for report in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state over. Raises: ValueError naming what does not fit; then nothing has changed."""
        missing = {"model", "optimizer", "ema", "epoch", "steps_done", "running", "history"} - set(state)
        if missing:
            raise ValueError(f"state: lacks {', '.join(sorted(missing))}; it must come from Trainer.state_dict()")
        if (state["ema"] is None) != (self.average is None):
            ours, theirs = ("without", "with") if self.average is None else ("with", "without")
            raise ValueError(f"ema_decay: this trainer is {ours} a weight average, the state {theirs} one")
        checks.state_fits("model", self.model, state["model"])
        if self.average is not None:
            checks.state_fits("ema", self.ema_model, state["ema"])
        running = None if state["running"] is None else RunningEpoch.from_dict(state["running"])
        history = [EpochReport.from_dict(report) for report in state["history"]]
        course = self.phases.state_of(state)
        check_optimizer(self.optimizer, state["optimizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.phases.load_state_dict(course, self.device)
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.ema_model.load_state_dict(state["ema"])
            self.average.updates = state.get("ema_updates")
        self._averages = state.get("averages", True)
        self._update.load_state_dict(state.get("loss_scale"))
        self.epoch, self.steps_done, self._own_epoch = state["epoch"], state["steps_done"], state.get("own_epoch")
        if self._own_epoch is not None:
            self.phases.objective(self._own_epoch).epoch = self._own_epoch
        self._running, self.history = running, history


def _clocks() -> tuple[float, float]:
    """Seconds by the clock, seconds of CPU of all threads."""
    return time.perf_counter(), time.process_time()


def _step(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    with warnings.catch_warnings():
        # An epoch resumed behind its last batch, or of batches without a hard row, has no optimizer.step before this.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before")
        scheduler.step()
