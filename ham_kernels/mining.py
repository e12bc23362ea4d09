"""Hard adversarial example mining: screen, compact, finish, weigh (arXiv 2308.01823; README has the open choices)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import _check
from .active import PGD, ActiveSet, begin
from .attack import advance, look
from .engine import PLAIN, BatchGuard, Engine
from .ops._philox import ROWS, philox_uniform

_ops = torch.ops.ham_kernels

SCREENS = ("steps", "one_step")


@dataclass(frozen=True)
class Keep:
    """Which rows stay: all of them; those still `hard` after the screening; or as many `random` ones (ablation)."""

    rows: str = "all"
    screen_steps: int = 0
    rest: bool = False  # also hand over the images of the rows that leave, for BatchNorm's statistics
    screen: str = "steps"  # "one_step": one step of screen_steps * step_size instead of screen_steps small ones
    round_to: int = 1  # keep a multiple of so many rows, the hardest of the easy ones too

    def __post_init__(self):
        _check.choice("rows", self.rows, ("all", "hard", "random"))
        _check.choice("screen", self.screen, SCREENS)
        _check.integer("round_to", self.round_to, 1)


@dataclass(frozen=True)
class StepSizeWeights:
    """w_i = sigmoid(lam * s_i), mean 1, s_i the maximum adversarial step size of row i."""

    lam: float = 1.0

    def __post_init__(self):
        _check.real("lam", self.lam)


@dataclass
class Examples:
    """What a batch became: the kept rows with their adversarial examples and weights."""

    x_adv: Tensor  # (n_kept, C, H, W)
    x: Tensor  # (n_kept, C, H, W), clean
    y: Tensor  # (n_kept,)
    weights: Tensor | None  # (n_kept,), mean 1; None for ones
    n: int  # rows of the whole batch
    n_hard: int  # of which hard; all where nothing was screened
    index: Tensor | None  # int32 (n_kept,), which rows of what was mined were kept; None for all
    rest: Tensor | None = None  # (n - n_kept, C, H, W), the other rows as they left; only where Keep asks for them

    @property
    def n_kept(self) -> int:
        """Rows attacked to the end and trained on; more than n_hard only where Keep rounds."""
        return self.y.shape[0]

    @property
    def n_forward(self) -> int:
        """Rows that pass through the model in the update."""
        return self.n_kept if self.rest is None else self.n


def mine(
    model: nn.Module, x: Tensor, y: Tensor, pgd: PGD, keep: Keep, weigh: StepSizeWeights | None,
    *, seed: int, step: int, engine: Engine = PLAIN,
) -> Examples:  # fmt: skip
    """Makes the adversarial examples of one batch, spending attack steps only on the rows that are kept.

    Cost in full-batch forwards, h the kept fraction and M = screen_steps: 2K for all rows, else
    2M + 1 + 2h(K - M). The step size of row i is the largest |f(x^k) - f(x^(k-1))|_1 over k = 1..K-1: the points
    that the attack looks at anyway. f(x^K) is only ever computed in train mode, where it is no step of the attack.
    """
    return mine_group(model, x, y, pgd, keep, weigh, sizes=(len(y),), seed=seed, step=step, engine=engine)[0]


def mine_group(
    model: nn.Module, x: Tensor, y: Tensor, pgd: PGD, keep: Keep, weigh: StepSizeWeights | None,
    *, sizes: Sequence[int], seed: int, step: int, engine: Engine = PLAIN,
) -> list[Examples]:  # fmt: skip
    """`mine` for several batches at once: x and y hold them one after the other, `sizes` the rows of each.

    They are screened together, and their hard rows attacked together. Returns the examples of each batch, weights of
    mean 1 in each. Raises: ValueError where Keep rounds and there are several batches.
    """
    if keep.round_to > 1 and len(sizes) > 1:
        raise ValueError(f"round_to: got {keep.round_to} for {len(sizes)} updates; rows are rounded for one")
    guard = BatchGuard(x, y)
    how = {"track": weigh is not None, "engine": engine}
    with engine.attacking(model):
        active = begin(x, y, pgd, seed, step)
        if keep.rows == "all":
            advance(model, active, pgd.steps, pgd, guard, **how)
            guard.read()
            index = rests = None
            hard = kept = list(sizes)
        else:
            _screen(model, active, pgd, keep, guard, how)
            flags, z = look(model, active, guard, pgd=pgd, **how)
            order, count = _ops.compact(flags)
            if len(sizes) > 1:
                count = torch.stack([f.sum() for f in flags.split(list(sizes))])
            hard = kept = guard.read(count)  # the one read of the step
            if keep.round_to > 1:
                kept = [min(-(-hard[0] // keep.round_to) * keep.round_to, len(y))]
                order = _hardest_first(z, y, flags)
            if keep.rows == "random":
                order = _random_order(sizes, kept, seed, step, y.device)
            index, left = order[: sum(kept)], order[sum(kept) :]
            rests = _rests(active.x_adv, left, sizes, kept) if keep.rest else None
            active = active.rows(index)
            if len(index):
                advance(model, active, pgd.steps - keep.screen_steps, pgd, guard, **how)
    return _parts(active, index, rests, sizes, hard, kept, weigh)


def _screen(model: nn.Module, active: ActiveSet, pgd: PGD, keep: Keep, guard: BatchGuard, how: dict) -> None:
    if keep.screen == "steps":
        advance(model, active, keep.screen_steps, pgd, guard, **how)
        return
    rows, m = active.step_rows, keep.screen_steps
    far = replace(active, step_size=m * active.step_size, step_rows=None if rows is None else m * rows)
    advance(model, far, 1, pgd, guard, **how)  # moves x_adv, which both share
    active.prev, active.max_step = far.prev, far.max_step


def _hardest_first(z: Tensor, y: Tensor, hard: Tensor) -> Tensor:
    """All rows, int32: the hard ones in order, then the easy ones by their margin z_y - max_{j != y} z_j."""
    is_label = y[:, None] == torch.arange(z.shape[1], device=z.device)
    margin = z.masked_fill(~is_label, -torch.inf).amax(1) - z.masked_fill(is_label, -torch.inf).amax(1)
    return torch.argsort(margin.float().masked_fill(hard, -torch.inf), stable=True).int()


def _random_order(sizes: Sequence[int], kept: Sequence[int], seed: int, step: int, device: torch.device) -> Tensor:
    """All rows, int32: first as many random ones of each batch as are kept, in increasing order, then the others."""
    n = sum(sizes)
    keys = philox_uniform(n, 1, seed, step, ROWS, device)[0][:, 0]
    first, others, start = [], [], 0
    for size, k in zip(sizes, kept, strict=True):
        order = start + torch.argsort(keys[start : start + size], stable=True)
        first.append(order[:k].sort().values)
        others.append(order[k:].sort(descending=True).values)
        start += size
    return torch.cat(first + others[::-1]).int()


def _rests(x_adv: Tensor, left: Tensor, sizes: Sequence[int], kept: Sequence[int]) -> list[Tensor]:
    """The rows of each batch that leave. `left` names those of the last batch first."""
    gone = [size - k for size, k in zip(sizes, kept, strict=True)]
    return [x_adv[part.long()] for part in left.split(gone[::-1])][::-1]


def _parts(
    active: ActiveSet, index: Tensor | None, rests: list[Tensor] | None, sizes: Sequence[int], hard: Sequence[int],
    kept: Sequence[int], weigh: StepSizeWeights | None,
) -> list[Examples]:  # fmt: skip
    parts, start = [], 0
    for b, (n, n_hard, n_kept) in enumerate(zip(sizes, hard, kept, strict=True)):
        rows = slice(start, start + n_kept)
        weights = None if weigh is None else _ops.step_size_weights(active.max_step[rows].contiguous(), weigh.lam)
        parts.append(
            Examples(
                active.x_adv[rows],
                active.x[rows],
                active.y[rows],
                weights,
                n,
                n_hard,
                index=None if index is None else index[rows],
                rest=None if rests is None else rests[b],
            )
        )
        start += n_kept
    return parts
