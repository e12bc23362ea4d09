"""Attack steps as CUDA graphs: one captured step per number of rows, replayed for the active rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..engine import BatchGuard, Engine
from ..engine.graphs import Captured, CaptureError, ambient, no_autocast_cache
from .step import PGD, ActiveSet, take_look, take_step

_LOADED = ("x_adv", "x", "y", "eps_rows", "step_rows", "target", "right", "wrong", "last_right")
_MOVED = ("x_adv", "right", "wrong", "last_right")  # by a step, in place


def bucket_for(model: nn.Module, like: ActiveSet, pgd: PGD, engine: Engine, what: str) -> Bucket | None:
    """The bucket that holds these rows, with `what` ("step" or "look") captured.

    None where the capture fails: the engine has then given up CUDA graphs.
    """
    n, x, graphs = len(like.y), like.x_adv, engine.graphs
    rows = graphs.rows_for(n, max(like.batch, n))
    key = (
        "attack", rows, x.shape[1:], x.stride()[1:], x.dtype, like.eps, like.step_size, like.eps_rows is None,
        like.step_rows is None, like.right is None, like.wrong is None, like.last_right is None, pgd.patience, pgd.norm,
        pgd.loss, like.track, ambient(x.device),
    )  # fmt: skip
    try:
        bucket = graphs.kept(key, lambda: Bucket(model, like, rows, engine))
        bucket.capture_one(what, model, pgd, engine)
    except CaptureError as error:
        engine.give_up("cuda_graphs", str(error))
        return None
    return bucket


class Bucket(Captured):
    """An active set that stays in place. Rows past those loaded hold what was there before: an attack treats each row
    by itself, so that they cost time and nothing else.
    """

    def __init__(self, model: nn.Module, like: ActiveSet, rows: int, engine: Engine):
        super().__init__(engine.graphs, {name: getattr(like, name) for name in _LOADED}, rows, max(rows, like.batch))
        self.rows = ActiveSet(**self.places, eps=like.eps, step_size=like.step_size, batch=rows)
        with torch.no_grad(), no_autocast_cache():  # as in the capture: a compiled model has a form for each
            _, z = take_look(model, self.rows, engine)
        self.logits = torch.zeros_like(z)
        self.hard = torch.zeros(rows, dtype=torch.bool, device=z.device)
        self.max_step = torch.zeros(rows, dtype=torch.float32, device=z.device)
        self.largest = torch.zeros(rows, dtype=like.x.dtype, device=z.device)
        if like.track:
            self.rows.track, self.rows.prev, self.rows.max_step = True, self.logits, self.max_step

    def capture_one(self, what: str, model: nn.Module, pgd: PGD, engine: Engine) -> None:
        def step() -> None:
            self._keep(take_step(model, self.rows, pgd, engine, measure=True))
            self.largest.copy_(self.rows.largest)

        def look() -> None:
            hard, z = take_look(model, self.rows, engine)
            self.hard.copy_(hard)
            self._keep(z)

        super().capture({what: {"step": step, "look": look}[what]})

    def _keep(self, z: Tensor) -> None:
        self.logits.copy_(z)
        if self.rows.track:  # the step has bound new tensors, which the next replay would not read
            self.max_step.copy_(self.rows.max_step)
            self.rows.prev, self.rows.max_step = self.logits, self.max_step

    # ------------------------------------------------------------ replay
    def steps(self, rows: ActiveSet, n: int, guard: BatchGuard, first: bool) -> None:
        """`n` steps of these rows; `first`: from the start of the attack on."""
        count = self._load(rows)
        for k in range(n):
            self.replay("step")
            if k:
                continue
            guard.logits(self.logits[:count])
            if first:
                guard.gradient(self.largest[:count])
            if rows.track and rows.prev is None:  # what was measured is no step of these rows
                self._load_max_step(rows, count)
        for name in _MOVED:
            if (t := getattr(rows, name)) is not None:
                t.copy_(getattr(self.rows, name)[:count])
        self._hand_over(rows, count)

    def look(self, rows: ActiveSet, guard: BatchGuard) -> tuple[Tensor, Tensor]:
        """(hard flags, logits) of these rows."""
        count = self._load(rows)
        self.replay("look")
        guard.logits(self.logits[:count])
        self._hand_over(rows, count)
        return self.hard[:count].clone(), rows.z

    def _load(self, rows: ActiveSet) -> int:
        count = len(rows.y)
        self.load({name: getattr(rows, name) for name in _LOADED})
        if rows.track:
            self._load_max_step(rows, count)
            if rows.prev is not None:
                self.logits[:count].copy_(rows.prev)
        return count

    def _load_max_step(self, rows: ActiveSet, count: int) -> None:
        if rows.max_step is None:
            self.max_step[:count].zero_()
        else:
            self.max_step[:count].copy_(rows.max_step)

    def _hand_over(self, rows: ActiveSet, count: int) -> None:
        rows.z = self.logits[:count].clone()
        if rows.track:
            rows.prev, rows.max_step = rows.z, self.max_step[:count].clone()
