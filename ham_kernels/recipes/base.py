"""A recipe: how examples are made, which rows are kept, what each weighs, and which loss. Methods combine these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _check
from ..active import PGD
from ..engine import PLAIN, Engine
from ..mining import Examples, Keep, StepSizeWeights, mine_group
from ..ops import weighted_cross_entropy


def weighted_ce(model: nn.Module, examples: Examples) -> Tensor:
    """sum_i w_i * CE(f(x_adv_i), y_i) / n_kept. Rows in `rest` pass through the model, and have no loss."""
    x = examples.x_adv if examples.rest is None else torch.cat([examples.x_adv, examples.rest])
    logits = model(x)
    _check.model_output(logits, len(x))
    return weighted_cross_entropy(logits[: examples.n_kept], examples.y, examples.weights)


ALL_ROWS = Keep("all")


@dataclass(frozen=True)
class Recipe:
    """One training method as four choices."""

    pgd: PGD
    keep: Keep = ALL_ROWS
    weigh: StepSizeWeights | None = None
    loss: Callable[[nn.Module, Examples], Tensor] = weighted_ce

    def examples(
        self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int, step: int, engine: Engine = PLAIN
    ) -> Examples:
        """Of one batch."""
        return self.group_examples(model, x, y, (len(y),), seed=seed, step=step, engine=engine)[0]

    def group_examples(
        self, model: nn.Module, x: Tensor, y: Tensor, sizes: Sequence[int], *, seed: int, step: int,
        engine: Engine = PLAIN,
    ) -> list[Examples]:  # fmt: skip
        """Of several batches, one after the other in x and y."""
        return mine_group(
            model, x, y, self.pgd, self.keep, self.weigh, sizes=sizes, seed=seed, step=step, engine=engine
        )
