"""Attack steps as CUDA graphs: one captured step per number of rows, replayed for the active rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .active import PGD, ActiveSet, take_look, take_step
from .engine import BatchGuard, Engine
from .engine.graphs import CaptureError, ambient, no_autocast_cache, place


def bucket_for(model: nn.Module, active: ActiveSet, pgd: PGD, track: bool, engine: Engine, what: str) -> Bucket | None:
    """The bucket that holds these rows, with `what` ("step" or "look") captured.

    None where the capture fails: the engine has then given up CUDA graphs.
    """
    n = len(active.y)
    full = max(active.batch, n)
    x = active.x_adv
    rows = engine.graphs.rows_for(n, full)
    key = (
        "attack", rows, x.shape[1:], x.stride()[1:], x.dtype, active.eps, active.step_size, active.eps_rows is None,
        active.step_rows is None, pgd.norm, pgd.loss, track, ambient(x.device),
    )  # fmt: skip
    graphs = engine.graphs
    try:
        bucket = graphs.kept(key, lambda: Bucket(model, active, rows, pgd, track, engine))
        bucket.capture(what, graphs.capture)
    except CaptureError as error:
        engine.give_up("cuda_graphs", str(error))
        return None
    return bucket


class Bucket:
    """An active set that stays in place. Rows past those loaded hold what was there before: an attack treats each row
    by itself, so that they cost time and nothing else.
    """

    def __init__(self, model: nn.Module, like: ActiveSet, rows: int, pgd: PGD, track: bool, engine: Engine):
        self._model, self._pgd, self._track, self._engine = model, pgd, track, engine

        def stays(name: str) -> Tensor | None:  # shared by all buckets: what one holds is loaded anew for each use
            return place(engine.graphs.shared, name, getattr(like, name), rows, max(rows, like.batch))

        self.rows = ActiveSet(
            stays("x_adv"), stays("x"), stays("y"), like.eps, stays("eps_rows"), like.step_size, stays("step_rows"),
            batch=rows,
        )  # fmt: skip
        with torch.no_grad(), no_autocast_cache():  # as in the capture: a compiled model has a form for each
            _, z = take_look(model, self.rows, False, engine)
        self.logits = torch.zeros_like(z)
        self.hard = torch.zeros(rows, dtype=torch.bool, device=z.device)
        self.max_step = torch.zeros(rows, dtype=torch.float32, device=z.device)
        if track:
            self.rows.prev, self.rows.max_step = self.logits, self.max_step
        self._replay: dict[str, Callable[[], None]] = {}

    def capture(self, what: str, capture: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        if what not in self._replay:
            self._replay[what] = capture({"step": self._step, "look": self._look}[what])

    def _step(self) -> None:
        z = take_step(self._model, self.rows, self._pgd, self._track, self._engine)
        self._keep(z)

    def _look(self) -> None:
        hard, z = take_look(self._model, self.rows, self._track, self._engine)
        self.hard.copy_(hard)
        self._keep(z)

    def _keep(self, z: Tensor) -> None:
        self.logits.copy_(z)
        if self._track:  # the step has bound new tensors, which the next replay would not read
            self.max_step.copy_(self.rows.max_step)
            self.rows.prev, self.rows.max_step = self.logits, self.max_step

    # ------------------------------------------------------------ replay
    def advance(self, active: ActiveSet, steps: int, guard: BatchGuard) -> None:
        """As attack.advance."""
        n = self._load(active)
        for k in range(steps):
            self._replay["step"]()
            if k:
                continue
            guard.logits(self.logits[:n])
            if self._track and active.prev is None:  # what was measured is no step of these rows
                self._load_max_step(active, n)
        active.x_adv.copy_(self.rows.x_adv[:n])
        self._hand_over(active, n)

    def look(self, active: ActiveSet, guard: BatchGuard) -> tuple[Tensor, Tensor]:
        """As attack.look."""
        n = self._load(active)
        self._replay["look"]()
        guard.logits(self.logits[:n])
        self._hand_over(active, n)
        return self.hard[:n].clone(), self.logits[:n].clone()

    def _load(self, active: ActiveSet) -> int:
        n = len(active.y)
        for name in ("x_adv", "x", "y", "eps_rows", "step_rows"):
            own = getattr(self.rows, name)
            if own is not None:
                own[:n].copy_(getattr(active, name))
        if self._track:
            self._load_max_step(active, n)
            if active.prev is not None:
                self.logits[:n].copy_(active.prev)
        return n

    def _load_max_step(self, active: ActiveSet, n: int) -> None:
        if active.max_step is None:
            self.max_step[:n].zero_()
        else:
            self.max_step[:n].copy_(active.max_step)

    def _hand_over(self, active: ActiveSet, n: int) -> None:
        if self._track:
            active.prev, active.max_step = self.logits[:n].clone(), self.max_step[:n].clone()
