"""HAMTrainer: a warm-up (PGD-AT, or cheaper) until start_epoch, hard adversarial example mining from then on."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from . import _check
from .active import PGD
from .ema import WeightAverage
from .engine import Engine, EngineOptions, NonFiniteError, Stopwatch, model_device
from .feeding import check_group, in_groups, rest_of_epoch, unpack
from .history import EpochReport, RunningEpoch, StepReport
from .phases import Phases
from .recipes import Recipe, ham
from .update import Updater
from .validation import VAL_ATTACKS, Validation

GROUP_UPDATES = ("each", "one")


class HAMTrainer:
    """Adversarial training with hard adversarial example mining (arXiv 2308.01823).

    Args:
        model: classifier, images (n, C, H, W) in [0, 1] -> logits (n, classes), with normalisation inside it.
        optimizer: over the model's parameters.
        eps, step_size: >= 0, in units of the images.
        steps, screen_steps: K and M of the paper, 1 <= M < K.
        start_epoch: first epoch (1-based) with mining; the epochs before are the warm-up.
        lam: >= 0, weights are sigmoid(lam * maximum step size), mean 1; a higher lam makes them more uniform.
        reweight, early_drop: the two mechanisms. Both off is PGD-AT throughout.
        norm: "linf" or "l2".
        freeze_bn: from start_epoch on, BatchNorm uses (and keeps) its running statistics, so that it does not shift
            to those of hard examples.
        ema_decay: in [0, 1), e.g. 0.99: `ema_model` follows the weights, averaged after every update. None: off.
        device: moves the model there; None leaves it where it is.
        precision: "fp32", or "bf16" or "fp16" (autocast; fp16 scales the loss and waits once more per step).
        channels_last: weights and images in NHWC order.
        compile: torch.compile of the model as the attack sees it (eval mode, no weight gradients).
        cuda_graphs: attack steps replayed per number of rows, updates where their number of rows repeats.
        winograd: on the CPU, 3x3 convolutions of stride 1 with a quarter of the multiplications, in attack and update.
            These four and a half precision may be True (or named), which warns and goes on without where model or
            device cannot serve them; or "require" ("require-bf16"), which raises EngineError then.
        keep_memory: on the CPU, the process keeps the memory that torch frees (see engine/memory.py).
        group: while mining, so many batches are screened together and their hard rows attacked together.
        group_updates: then as many updates, "each" from the hard rows of a batch; or "one" from all of them.
        round_to: keep a multiple of so many rows: the easy ones of the least margin fill up.
        screen: "steps", or "one_step" of screen_steps * step_size in their place.
        warm_up: before start_epoch: "pgd_at" (the paper); or "n_fgsm" or "fgsm_rs", one-step attacks that are watched
            for catastrophic overfitting (where it is found, the rest of the warm-up is PGD-AT, after a warning).
        natural_epochs: so many epochs of the warm-up, the first, train on clean images.
        seed: of the random starts. Step s of a run draws the same noise whatever the device.
        rows: "hard", or "random" to keep as many random rows instead (the paper's control).
        bn_rows: while mining, BatchNorm normalises the update by the "hard" rows or by "all" rows of the batch.

    A batch that leaves one row to train on uses BatchNorm's running statistics, since one row has none of its own.
    A batch without a hard row makes no update; it is counted in the reports.
    Raises: TypeError, ValueError naming the argument; NonFiniteError (a ValueError) when the model or its loss
        becomes NaN or infinite. Parameters, buffers and optimizer are then as after the last good step.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, eps: float = 8 / 255, step_size: float = 2 / 255,
        steps: int = 10, screen_steps: int = 3, start_epoch: int = 50, lam: float = 1.0, reweight: bool = True,
        early_drop: bool = True, norm: str = "linf", freeze_bn: bool = False, ema_decay: float | None = None,
        device: torch.device | str | None = None, precision: str = "fp32", seed: int = 0, rows: str = "hard",
        bn_rows: str = "hard", channels_last: bool | str = False, compile: bool | str = False,
        cuda_graphs: bool | str = False, winograd: bool | str = False, keep_memory: bool = True, group: int = 1,
        group_updates: str = "each", round_to: int = 1, screen: str = "steps", warm_up: str = "pgd_at",
        natural_epochs: int = 0,
    ):  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}; it must be a torch.nn.Module")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: got {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
        own = {id(p) for p in model.parameters()}
        if own.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer: holds none of the model's parameters; make it from model.parameters()")
        pgd = PGD(_check.real("eps", eps), _check.real("step_size", step_size), steps, norm)
        mining: Recipe = ham(
            pgd, screen_steps, lam, early_drop=early_drop, reweight=reweight, rows=rows, bn_rows=bn_rows,
            screen=screen, round_to=round_to,
        )  # fmt: skip
        self._mines = early_drop or reweight
        self.start_epoch = _check.integer("start_epoch", start_epoch, 1)
        self._pgd = pgd
        self._phases = Phases(pgd, mining if self._mines else None, start_epoch, warm_up, natural_epochs, seed)
        self.freeze_bn = _check.flag("freeze_bn", freeze_bn)
        if freeze_bn and bn_rows == "all":
            raise ValueError("bn_rows: got 'all' with freeze_bn; frozen statistics come from no rows of the batch")
        options = EngineOptions(precision, channels_last, compile, cuda_graphs, winograd, keep_memory)
        self.group = _check.integer("group", group, 1)
        self.group_updates = _check.choice("group_updates", group_updates, GROUP_UPDATES)
        if round_to > 1 and group > 1 and group_updates == "each":
            raise ValueError(f"round_to: got {round_to} with group={group}; rows are rounded for one update of a group")
        self.seed = _check.integer("seed", seed, 0, 2**63 - 1)
        if ema_decay is not None and _check.real("ema_decay", ema_decay, 0.0, 1.0) == 1.0:
            raise ValueError("ema_decay: got 1.0; it must be below 1, or the average would never move")
        self.model = model if device is None else model.to(device)
        self.device = torch.device(device) if device is not None else model_device(model) or torch.device("cpu")
        self.engine = Engine(options, self.device)
        self._update = Updater(optimizer, self.engine, self.device)
        self._ema = None if ema_decay is None else WeightAverage(model, ema_decay)
        self.epoch = 0  # epochs completed by fit
        self.steps_done = 0  # names the noise of the next step
        self.history: list[EpochReport] = []
        self._running: RunningEpoch | None = None  # the epoch under way

    @property
    def ema_model(self) -> nn.Module | None:
        """The weight average as a model in eval mode; None without ema_decay."""
        return None if self._ema is None else self._ema.model

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

        Only `fit` watches one-step warm-ups for overfitting.
        """
        return self.train_group([(x, y)], epoch)[0]

    def train_group(self, batches: Sequence[tuple[Tensor, Tensor]], epoch: int) -> list[StepReport]:
        """Updates from several batches whose examples are made together, all by the weights before the first update.

        Returns one report per update: one for each batch, or one in all with group_updates="one". Where a later update
        of a group raises, the earlier ones have been made.
        """
        _check.integer("epoch", epoch, 1)
        check_group(batches, model_device(self.model))
        recipe = self._phases.recipe(epoch)
        frozen = self.freeze_bn and self._phases.name(epoch) == "ham"
        stopwatch = Stopwatch(batches[0][0].device)
        x, y = batches[0] if len(batches) == 1 else (torch.cat(parts) for parts in zip(*batches, strict=True))
        x = self.engine.place(self.model, x, self.ema_model)
        sizes = [len(y)] if self.group_updates == "one" else [len(labels) for _, labels in batches]
        examples = recipe.group_examples(
            self.model, x, y, sizes, seed=self.seed, step=self.steps_done, engine=self.engine
        )
        reports = []
        for part in examples:
            loss = 0.0
            if part.n_kept:
                loss = self._update(self.model, recipe.loss, part, frozen)
                if self._ema is not None:
                    self._ema.update(self.model)
            reports.append(
                StepReport(loss, part.n, part.n_hard, stopwatch.stop(), part.n_kept, len(batches) // len(examples))
            )
            stopwatch = Stopwatch(x.device)
        self.steps_done += len(batches)
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
            val_loader: evaluated after each epoch under `val_attacks`, raw weights and weight average.
            scheduler: stepped once after each epoch.
            on_epoch_end: called with each EpochReport.
            on_batch_end: called with each StepReport. What it raises ends fit; a later fit, or one after
                load_state_dict, goes on with the next batch.
        Returns: `history`, one EpochReport per epoch so far.
        """
        _check.integer("epochs", epochs, 1)
        if epochs <= self.epoch:
            raise ValueError(f"epochs: got {epochs}, but {self.epoch} are done; it is the total to train up to")
        if self._mines and self.start_epoch > epochs:
            raise ValueError(
                f"start_epoch: is {self.start_epoch}, beyond epochs={epochs}, so mining would never start; lower it, "
                "or ask for plain PGD-AT with early_drop=False, reweight=False"
            )
        judge = None
        if val_loader is not None:
            judge = Validation(
                val_loader, val_attacks, self._pgd, passes=(epochs - self.epoch) * (1 if self._ema is None else 2),
                device=self.device, precision=self.precision, seed=self.seed,
            )  # fmt: skip
        while self.epoch < epochs:
            report = self._train_epoch(train_loader, self.epoch + 1, on_batch_end)
            if judge is not None:
                report.val = judge(self.model)
                report.val_ema = None if self._ema is None else judge(self.ema_model)
            if self._phases.watched(report.epoch):
                start = time.perf_counter()
                report.watch = asdict(self._phases.end_epoch(self.model, report.epoch, self.precision))
                report.seconds += time.perf_counter() - start
            self._running = None
            self.epoch += 1
            if scheduler is not None:
                _step(scheduler)
            report.loss /= max(report.n_kept, 1)
            self.history.append(report)
            if on_epoch_end is not None:
                on_epoch_end(report)
        return self.history

    @property
    def position(self) -> tuple[int, int]:
        """(epoch under way, 1-based; its batches done)."""
        return self.epoch + 1, 0 if self._running is None else self._running.batches

    def _train_epoch(self, loader: Iterable, epoch: int, on_batch_end) -> EpochReport:
        """Trains the rest of the epoch. The loss in the report is still a sum."""
        if self._running is None:
            self._running = RunningEpoch(EpochReport(epoch, self._phases.name(epoch), 0.0, 0, 0, 0, 0.0))
        running = self._running
        group = self.group if running.report.phase == "ham" else 1
        watched = self._phases.watched(epoch)
        known = min(running.batches, 2) if watched else 0  # after a stop, the watch still judges by the same batch
        drawn = rest_of_epoch(loader, epoch, running.batches - known)
        for batch in itertools.islice(drawn, known):
            self._phases.remember(*self._unpacked(batch))
        start = time.perf_counter()
        for batches in in_groups(drawn, group):
            try:
                here = [self._unpacked(batch) for batch in batches]
                steps = self.train_group(here, epoch)
            except (TypeError, ValueError) as error:
                kind = type(error) if type(error) in (TypeError, NonFiniteError) else ValueError
                first, last = running.batches + 1, running.batches + len(batches)
                where = f"batch {first}" if first == last else f"batches {first} to {last}"
                raise kind(f"epoch {epoch}, {where}: {error}") from error
            if watched:
                self._phases.remember(*here[-1])
            seconds = time.perf_counter() - start
            for step in steps:  # all of a group before anybody hears of it: a stop falls between groups
                running.add(step, seconds / len(steps))
            if on_batch_end is not None:
                for step in steps:
                    on_batch_end(step)
            start = time.perf_counter()
        if running.batches == 0:
            self._running = None
            raise ValueError(
                f"train_loader: gave no batch in epoch {epoch}; it must give some in every epoch "
                "(a generator is spent after one: pass a list or a DataLoader)"
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            running.report.seconds += time.perf_counter() - start
        return running.report

    def _unpacked(self, batch) -> tuple[Tensor, Tensor]:
        x, y = unpack(batch)
        return x.to(self.device), y.to(self.device)

    # ------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from, also between two batches of an epoch: tensors and plain values.

        The loader and a scheduler have states of their own; random generators are the caller's as well (the
        trainer draws its noise from `seed` and the number of steps done).
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self._ema is None else self.ema_model.state_dict(),
            "loss_scale": self._update.state_dict(),
            "overfitting": self._phases.state_dict(),
            "epoch": self.epoch,
            "steps_done": self.steps_done,
            "running": None if self._running is None else self._running.to_dict(),
            "history": [report.to_dict() for report in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state over. Raises: ValueError naming what does not fit; then nothing has changed."""
        missing = {"model", "optimizer", "ema", "epoch", "steps_done", "running", "history"} - set(state)
        if missing:
            raise ValueError(f"state: lacks {', '.join(sorted(missing))}; it must come from HAMTrainer.state_dict()")
        if (state["ema"] is None) != (self._ema is None):
            ours, theirs = ("without", "with") if self._ema is None else ("with", "without")
            raise ValueError(f"ema_decay: this trainer is {ours} a weight average, the state {theirs} one")
        _check.state_fits("model", self.model, state["model"])
        if self._ema is not None:
            _check.state_fits("ema", self.ema_model, state["ema"])
        running = None if state["running"] is None else RunningEpoch.from_dict(state["running"])
        history = [EpochReport.from_dict(report) for report in state["history"]]
        self._phases.load_state_dict(state.get("overfitting"))  # this and the next check before they change anything
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(state["model"])
        if self._ema is not None:
            self.ema_model.load_state_dict(state["ema"])
        self._update.load_state_dict(state.get("loss_scale"))
        self.epoch, self.steps_done = state["epoch"], state["steps_done"]
        self._running, self.history = running, history


def _step(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    with warnings.catch_warnings():
        # An epoch resumed behind its last batch, or of batches without a hard row, has no optimizer.step before this.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before")
        scheduler.step()
