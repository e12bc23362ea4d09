"""A recipe: how examples are made, which rows are kept, what each weighs, and which loss. Methods combine these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _check
from ..attack import PGD
from ..mining import Examples, Keep, StepSizeWeights, mine
from ..ops import weighted_cross_entropy


def weighted_ce(model: nn.Module, examples: Examples) -> Tensor:
    """sum_i w_i * CE(f(x_adv_i), y_i) / n_hard. Rows in `rest` pass through the model, and have no loss."""
    x = examples.x_adv if examples.rest is None else torch.cat([examples.x_adv, examples.rest])
    logits = model(x)
    _check.model_output(logits, len(x))
    return weighted_cross_entropy(logits[: examples.n_hard], examples.y, examples.weights)


ALL_ROWS = Keep("all")


@dataclass(frozen=True)
class Recipe:
    """One training method as four choices."""

    pgd: PGD
    keep: Keep = ALL_ROWS
    weigh: StepSizeWeights | None = None
    loss: Callable[[nn.Module, Examples], Tensor] = weighted_ce

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int, step: int, precision: str) -> Examples:
        return mine(model, x, y, self.pgd, self.keep, self.weigh, seed=seed, step=step, precision=precision)
