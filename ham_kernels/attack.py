"""PGD over an active set of rows: step by step, or by replaying captured steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import _check
from .active import LOSSES, PGD, ActiveSet, begin, cw_gradient, take_look, take_step
from .buckets import bucket_for
from .engine import PLAIN, PRECISIONS, BatchGuard, Engine, plain

__all__ = ["LOSSES", "PGD", "ActiveSet", "advance", "begin", "cw_gradient", "draw_seed", "look", "pgd_attack"]


def advance(
    model: nn.Module, active: ActiveSet, steps: int, pgd: PGD, guard: BatchGuard, *, engine: Engine = PLAIN,
    track: bool = False, on_logits: Callable[[int, Tensor], None] | None = None,
) -> None:  # fmt: skip
    """`steps` PGD steps on the active rows: one forward and one backward to the input each.

    With `track` each step also keeps the largest L1 change of the logits between consecutive points.
    `on_logits(k, z)` sees the logits at the point before step k = 0, 1, ..., which the attack computes anyway.
    """
    if steps and engine.graphs is not None and on_logits is None:
        bucket = bucket_for(model, active, pgd, track, engine, "step")
        if bucket is not None:
            bucket.advance(active, steps, guard)
            return
    for k in range(steps):
        z = take_step(model, active, pgd, track, engine)
        if k == 0:
            guard.logits(z)
        if on_logits is not None:
            on_logits(k, z)


def look(
    model: nn.Module, active: ActiveSet, guard: BatchGuard, *, pgd: PGD, engine: Engine = PLAIN, track: bool = False
) -> tuple[Tensor, Tensor]:
    """One forward without a graph at the current points. Returns the hard flags, (n,) bool, and the logits."""
    bucket = None if engine.graphs is None else bucket_for(model, active, pgd, track, engine, "look")
    if bucket is not None:
        return bucket.look(active, guard)
    hard, z = take_look(model, active, track, engine)
    guard.logits(z)
    return hard, z


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
    _check.batch(x, y)
    pgd = PGD(eps, step_size, steps, norm, random_start)
    engine = plain(_check.choice("precision", precision, PRECISIONS))
    guard = BatchGuard(x, y)
    with engine.attacking(model):
        active = begin(x, y, pgd, draw_seed(generator), 0)
        advance(model, active, steps, pgd, guard, engine=engine)
    guard.read()
    return active.x_adv


def draw_seed(generator: torch.Generator | None) -> int:
    """A 62-bit seed from a generator (one on a GPU costs a sync; torch's default generator is on the CPU)."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**62, (1,), generator=generator, device=device))
