"""PGD as one object under way: `steps`, `look`, `keep`; step by step, or by replaying captured steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..common import checks, troubles
from ..distributed import Meeting
from ..engine import PLAIN, PRECISIONS, BatchGuard, Engine, plain
from .replay import bucket_for
from .step import LOSSES, PGD, ActiveSet, begin, clean_prediction, cw_gradient, set_step_size, take_look, take_step

__all__ = ["LOSSES", "PGD", "ActiveSet", "Attack", "cw_gradient", "draw_seed", "pgd_attack"]


class Attack:
    """A PGD attack under way on one batch, its model in attack mode (`engine.attacking(model)`).

    `rows` are the rows still attacked, x_adv among them; `guard` gathers what only the host can judge. With `track`
    each step also keeps the largest L1 change of the logits between consecutive points; with `count_right`, at how many
    points a row was right; with `keep_right`, the last point before a row was wrong for the first time.

    Args:
        model: classifier in attack mode.  x: images (n, ...) in [0, 1].  y: (n,) int64.
        seed, step: name the noise of the random start.
        only: restricts the attack to some rows (int64); they start where they would start among all.
        first_row: the place of the first row, where x is a part of a batch; rows start as they would in the whole.
        meeting: where the data are judged with those of other processes.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, pgd: PGD, *, seed: int, step: int, engine: Engine = PLAIN,
        track: bool = False, count_right: bool = False, only: Tensor | None = None, first_row: int = 0,
        meeting: Meeting | None = None, keep_right: bool = False,
    ):  # fmt: skip
        self._model, self._pgd, self._engine = model, pgd, engine
        self.guard = BatchGuard(x, y, meeting)
        self.rows = begin(x, y, pgd, seed, step, track, count_right, first_row, keep_right)
        if only is not None:
            self.rows = self.rows.named(only)
        self.done = 0
        if pgd.target is not None:
            self.rows.target = pgd.target if only is None else pgd.target[only]
        elif pgd.loss == "target":
            raise ValueError("target: got None; an attack towards a target needs one distribution per row")
        elif pgd.loss == "kl":
            self.rows.target, z = clean_prediction(model, self.rows.x, engine)
            self.guard.logits(z)

    def steps(self, n: int, on_logits: Callable[[int, Tensor], None] | None = None) -> None:
        """`n` steps: one forward and one backward to the input each.

        `on_logits(k, z)` sees the logits at the point before the step number k, which the attack computes anyway.
        """
        if self._pgd.step_sizes:
            for k in range(self.done, self.done + n):
                set_step_size(self.rows, self._pgd, self._pgd.share(k, k + 1))
                self._equal_steps(1, on_logits)
        elif n:
            self._equal_steps(n, on_logits)

    def stride(self, n: int) -> None:
        """One step as long as the next `n` together, in their place."""
        usual, right = (self.rows.step_size, self.rows.step_rows), self.rows.right
        before = None if right is None else right.clone()
        set_step_size(self.rows, self._pgd, self._pgd.share(self.done, self.done + n))
        self._equal_steps(1, None)
        self.rows.step_size, self.rows.step_rows = usual
        if right is not None:
            right.add_(right - before, alpha=n - 1)  # its point stands for those of n steps
        self.done += n - 1

    def look(self) -> tuple[Tensor, Tensor]:
        """One forward without a graph at the current points. Returns the hard flags, (n,) bool, and the logits."""
        bucket = self._bucket("look")
        if bucket is not None:
            return bucket.look(self.rows, self.guard)
        hard, z = take_look(self._model, self.rows, self._engine)
        self.guard.logits(z)
        return hard, z

    def keep(self, index: Tensor) -> None:
        """Only the named rows are attacked from here on."""
        self.rows = self.rows.named(index)

    def _equal_steps(self, n: int, on_logits: Callable[[int, Tensor], None] | None) -> None:
        bucket = self._bucket("step") if on_logits is None else None
        if bucket is not None:
            bucket.steps(self.rows, n, self.guard, first=self.done == 0)
        else:
            for k in range(n):
                first = self.done + k == 0
                z = take_step(self._model, self.rows, self._pgd, self._engine, measure=first)
                if k == 0:
                    self.guard.logits(z)
                if first:
                    self.guard.gradient(self.rows.largest)
                if on_logits is not None:
                    on_logits(self.done + k, z)
        self.done += n

    def _bucket(self, what: str):
        if self._engine.graphs is None or not len(self.rows.y):
            return None
        return bucket_for(self._model, self.rows, self._pgd, self._engine, what)


def pgd_attack(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float | Tensor = 8 / 255, step_size: float | Tensor = 2 / 255,
    steps: int = 10, random_start: bool = True, norm: str = "linf", generator: torch.Generator | None = None,
    precision: str = "fp32",
) -> Tensor:  # fmt: skip
    """Untargeted PGD on the cross entropy, model in eval mode.

    Args:
        model: classifier, images (n, C, H, W) in [0, 1] -> logits (n, classes); normalisation inside it.
        x: images in [0, 1], fp32, fp16 or bf16.  y: (n,) int64 labels.
        eps, step_size: >= 0, in units of the images; floats, or tensors (n,) with one value per row.
        steps: >= 0. 0 gives the starting point.
        random_start: start uniformly in the eps-ball instead of at x.
        norm: "linf" or "l2".
        generator: draws the seed of the start; None takes torch's default generator, so torch.manual_seed holds.
        precision: "fp32", or "bf16" or "fp16" (autocast).
    Returns: x_adv like x, in [0, 1] and in the eps-ball (up to one rounding of its dtype), detached.
    Raises: TypeError, ValueError naming the argument. The model's modes, requires_grad and .grad are the same
        afterwards, also then.
    """
    checks.module("model", model)
    checks.batch(x, y)
    pgd = PGD(eps, step_size, steps, norm, random_start)
    engine = plain(checks.choice("precision", precision, PRECISIONS))
    with engine.attacking(model):
        attack = Attack(model, x, y, pgd, seed=draw_seed(generator), step=0, engine=engine)
        attack.steps(steps)
    attack.guard.read()
    if attack.guard.no_gradient:
        troubles.warn("attack_without_gradient", attack="PGD", rows=attack.guard.no_gradient, n=len(y))
    return attack.rows.x_adv


def draw_seed(generator: torch.Generator | None) -> int:
    """A 62-bit seed from a generator (one on a GPU costs a sync; torch's default generator is on the CPU)."""
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator: got {type(generator).__name__}; it must be a torch.Generator")
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**62, (1,), generator=generator, device=device))
