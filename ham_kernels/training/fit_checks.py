"""What a training is told before its first batch, rather than after hours; and before it takes over a state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..common import troubles
from ..evaluation.named_attacks import plans
from ..methods.settings import strongest

if TYPE_CHECKING:
    from .trainer import Trainer


def check_fit(trainer: Trainer, train_loader, epochs: int, val_loader, scheduler, val_attacks: Sequence[str]) -> None:
    """Arguments of `Trainer.fit`. Raises: TypeError, ValueError naming the argument."""
    if epochs <= trainer.epoch:
        raise ValueError(f"epochs: got {epochs}, but {trainer.epoch} are done; it is the total to train up to")
    method = trainer.method
    one_by_one = epochs == trainer.epoch + 1  # perhaps of a loop of one `fit` per epoch, which tells not where it ends
    if trainer.phases.starts_late and method.start_epoch > epochs:
        if not one_by_one:
            raise ValueError(
                f"start_epoch: is {method.start_epoch}, beyond epochs={epochs}, so {method.name} would never "
                "start; lower it, or train by the method of the warm-up"
            )
        if trainer.position == (1, 0):
            troubles.warn("starts_later", first=method.start_epoch, method=method.title)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "scheduler: is a ReduceLROnPlateau, which wants a metric; step it in on_epoch_end, such as "
            "on_epoch_end=lambda report: scheduler.step(report.loss)"
        )
    left = range(trainer.epoch + 1, epochs + 1)
    if isinstance(train_loader, Iterator) and any(map(trainer.phases.watches, left)):
        raise ValueError(
            "train_loader: is an iterator, of which no batch can be drawn again; epochs of one-step attacks are "
            "watched on one: pass a list or a DataLoader"
        )
    if val_loader is not None:
        plans(val_attacks, **trainer.budget)
        passes = len(left) * (1 if trainer.average is None else 2)
        if isinstance(val_loader, Iterator) and passes > 1:
            raise ValueError(
                f"val_loader: is an iterator, which is spent after one of {passes} passes; give a list or a DataLoader"
            )
    for kind, last in ((trainer.phases.warm_up, min(method.start_epoch - 1, epochs)), (method, epochs)):
        for name, first, until in kind.begins() if not (one_by_one and trainer.epoch) else ():
            if 0 < last < first:
                troubles.warn("never_begins", field=name, first=first, method=kind.title, epochs=last, until=until)
    if method.gate and trainer.average is not None and val_loader is None:
        troubles.warn("gate_without_validation", gate=method.gate)
    if trainer.average is not None and not one_by_one:
        _check_average(trainer, train_loader, epochs)


def check_gate(trainer: Trainer) -> None:
    """Behind an epoch: warns where no update has entered the weight average, since the gate has never opened."""
    gate = trainer.method.gate
    judged = [report.val for report in trainer.history if report.val and report.epoch >= trainer.method.start_epoch]
    if gate and trainer.average is not None and trainer.average.updates == 0 and len(judged) > 1:
        best = max(strongest(val).worst_class for val in judged)
        troubles.warn("gate_never_opened", gate=gate, epochs=len(judged), best=best)


def _check_average(trainer: Trainer, train_loader, epochs: int) -> None:
    """Warns where the training ends before its weight average is as slow as it was asked to be."""
    try:
        batches = len(train_loader)
    except TypeError:  # none, or a DataLoader's over an IterableDataset
        return
    group = trainer.method.group if trainer.method.group_updates == "one" else 1
    decay = trainer.average.decay
    updates, span = epochs * batches * trainer.method.replays // group, 1 / (1 - decay)
    if updates < span:
        troubles.warn("short_for_its_average", decay=decay, span=round(span), updates=updates)


def check_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raises: ValueError where a state is of another optimiser: other groups, or other settings in them."""
    ours, theirs = optimizer.param_groups, state.get("param_groups", [])
    if [len(group["params"]) for group in ours] != [len(group["params"]) for group in theirs]:
        raise ValueError("state: its optimizer has other groups of parameters than this trainer's")
    newer = {"foreach", "fused", "differentiable", "maximize", "capturable", "decoupled_weight_decay"}
    missing = {name for group in theirs for name in optimizer.defaults.keys() - group.keys()} - newer
    if missing:
        raise ValueError(f"state: its optimizer knows no {', '.join(sorted(missing))}; it is of another kind")
