"""Hard adversarial example mining: screen, compact, finish, weigh (arXiv 2308.01823; README has the open choices)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import _check, engine
from .attack import PGD, advance, begin, look
from .ops._philox import ROWS, philox_uniform

_ops = torch.ops.ham_kernels


@dataclass(frozen=True)
class Keep:
    """Which rows stay: all of them; those still `hard` after screen_steps; or as many `random` ones (ablation)."""

    rows: str = "all"
    screen_steps: int = 0
    rest: bool = False  # also hand over the images of the rows that leave, for BatchNorm's statistics

    def __post_init__(self):
        _check.choice("rows", self.rows, ("all", "hard", "random"))


@dataclass(frozen=True)
class StepSizeWeights:
    """w_i = sigmoid(lam * s_i), mean 1, s_i the maximum adversarial step size of row i."""

    lam: float = 1.0

    def __post_init__(self):
        _check.real("lam", self.lam)


@dataclass
class Examples:
    """What a batch became: the kept rows with their adversarial examples and weights."""

    x_adv: Tensor  # (n_hard, C, H, W)
    x: Tensor  # (n_hard, C, H, W), clean
    y: Tensor  # (n_hard,)
    weights: Tensor | None  # (n_hard,), mean 1; None for ones
    n: int  # rows of the whole batch
    index: Tensor | None  # int32 (n_hard,), which rows were kept; None for all
    rest: Tensor | None = None  # (n - n_hard, C, H, W), the other rows as they left; only where Keep asks for them

    @property
    def n_hard(self) -> int:
        return self.y.shape[0]

    @property
    def n_forward(self) -> int:
        """Rows that pass through the model in the update."""
        return self.n_hard if self.rest is None else self.n


def mine(
    model: nn.Module, x: Tensor, y: Tensor, pgd: PGD, keep: Keep, weigh: StepSizeWeights | None,
    *, seed: int, step: int, precision: str = "fp32",
) -> Examples:  # fmt: skip
    """Makes the adversarial examples of one batch, spending attack steps only on the rows that are kept.

    Cost in full-batch forwards, h the kept fraction and M = screen_steps: 2K for all rows, else
    2M + 1 + 2h(K - M). The step size of row i is the largest |f(x^k) - f(x^(k-1))|_1 over k = 1..K-1: the points
    that the attack looks at anyway. f(x^K) is only ever computed in train mode, where it is no step of the attack.
    """
    guard = engine.BatchGuard(x, y)
    how = {"track": weigh is not None, "precision": precision}
    index = rest = None
    with engine.attack_mode(model):
        active = begin(x, y, pgd, seed, step)
        if keep.rows == "all":
            advance(model, active, pgd.steps, pgd, guard, **how)
            guard.read()
        else:
            advance(model, active, keep.screen_steps, pgd, guard, **how)
            order, count = _ops.compact(look(model, active, guard, **how))
            n_hard = guard.read(count)  # the one read of the step
            if keep.rows == "random":
                order = _random_order(len(y), n_hard, seed, step, y.device)
            index, left = order[:n_hard], order[n_hard:]
            rest = active.x_adv.index_select(0, left) if keep.rest else None
            active = active.rows(index)
            if n_hard:
                advance(model, active, pgd.steps - keep.screen_steps, pgd, guard, **how)
        weights = None if weigh is None else _ops.step_size_weights(active.max_step, weigh.lam)
    return Examples(active.x_adv, active.x, active.y, weights, n=len(y), index=index, rest=rest)


def _random_order(n: int, kept: int, seed: int, step: int, device: torch.device) -> Tensor:
    """All rows, int32: first `kept` random ones in increasing order, then the others."""
    keys = philox_uniform(n, 1, seed, step, ROWS, device)[0][:, 0]
    order = torch.argsort(keys, stable=True)
    return torch.cat([order[:kept].sort().values, order[kept:]]).int()
