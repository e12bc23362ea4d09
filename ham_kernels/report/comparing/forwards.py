"""What a run cost by the cost model, at the shares of hard rows that were measured."""

from __future__ import annotations

import math

from ...methods.registry import class_of, warm_up_of
from ...methods.settings import Method
from ..reading.metrics import Epoch
from ..reading.runs import Run


def forwards(run: Run) -> float | None:
    """Full-batch forwards of an update, mean over all epochs of a run, each by the method that trained it.

    Those that its first weights took are added: they are spread over the epochs of the training that it goes on from.
    None where an epoch, its share of hard rows or its method is not known.
    """
    total = total_forwards(run)
    return None if total is None else total / passes(run)


def passes(run: Run) -> float:
    """Updates of each batch in the whole training; of a fine-tuning, in the training that it goes on from."""
    return run.before("epochs") or len(run.epochs) * (run.method.replays if run.method else 1)


def total_forwards(run: Run) -> float | None:
    """The same in all, for each training image."""
    method, steps, before = run.method, run.attack_steps, run.before("forwards")
    if method is None or steps is None or run.seconds is None or before is None:
        return None
    try:
        costs = [_cost(_trained_by(method, run.warm_up, epoch), steps, epoch.hard_fraction) for epoch in run.epochs]
    except ValueError:  # a method that is not known here, or of settings that do not fit
        return None
    return None if None in costs else before + math.fsum(costs)


def _trained_by(method: Method, warm_up: str, epoch: Epoch) -> Method:
    late = epoch.epoch >= method.start_epoch
    if late and epoch.phase in (None, method.name):
        return method
    planned = warm_up_of(method, warm_up)
    return planned if not late and epoch.phase in (None, planned.name) else class_of(epoch.phase)()


def _cost(method: Method, steps: int, hard: float | None) -> float | None:
    if hard is None:
        return None if method.early_drop else method.cost(steps)
    return method.cost(steps, hard)
