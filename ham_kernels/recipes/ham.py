"""Hard adversarial example mining (Lin et al., arXiv 2308.01823): easy rows leave, hard rows are weighed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _check
from ..active import PGD
from ..attack import draw_seed
from ..mining import SCREENS, Keep, StepSizeWeights
from .base import Recipe


def ham(
    pgd: PGD, screen_steps: int = 3, lam: float = 1.0, *, early_drop: bool = True, reweight: bool = True,
    rows: str = "hard", bn_rows: str = "hard", screen: str = "steps", round_to: int = 1,
) -> Recipe:  # fmt: skip
    """HAM; without early_drop and reweight it is PGD-AT.

    Ablations: rows="random" keeps as many random rows; bn_rows="all" passes the rows that left through the update's
    forward too, as they left, so that BatchNorm normalises by the whole batch (3h of the cost model becomes 3).
    Cheaper: screen="one_step" screens by one step of screen_steps * step_size (2M of the cost model becomes 2);
    round_to=R fills up to a multiple of R rows with the easy ones of the least margin.
    """
    _check.flag("early_drop", early_drop)
    _check.flag("reweight", reweight)
    _check.choice("rows", rows, ("hard", "random"))
    _check.choice("bn_rows", bn_rows, ("hard", "all"))
    _check.choice("screen", screen, SCREENS)
    _check.integer("round_to", round_to, 1)
    if not (early_drop or reweight):
        return Recipe(pgd)  # nothing is screened, so any number of steps will do
    _check.screening(pgd.steps, screen_steps)
    weigh = StepSizeWeights(lam)
    keep = Keep(rows, screen_steps, bn_rows == "all", screen, round_to) if early_drop else Keep("all")
    return Recipe(pgd, keep, weigh if reweight else None)


def ham_loss(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float | Tensor = 8 / 255, step_size: float | Tensor = 2 / 255,
    steps: int = 10, screen_steps: int = 3, lam: float = 1.0, reweight: bool = True, early_drop: bool = True,
    norm: str = "linf", generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """HAM's loss of one batch, where trades_loss(...) stood: call it, then backward() and optimizer.step().

    Args:
        model: classifier in train mode, images (n, C, H, W) in [0, 1] -> logits (n, classes).
        x: images in [0, 1], fp32, fp16 or bf16.  y: (n,) int64 labels.
        eps, step_size: >= 0, in units of the images; floats, or tensors (n,) with one value per row.
        steps, screen_steps: K and M of the paper, 1 <= M < K.
        lam: >= 0, weights are sigmoid(lam * maximum step size); a higher lam makes them more uniform.
        reweight, early_drop: the two mechanisms; with both off this is the PGD-AT loss.
        norm: "linf" or "l2".
        generator: draws the seed of the random start; None takes torch's default generator.
    Returns: 0-dim loss, the weighted mean over the hard rows. The attack runs in eval mode, the loss in the mode that
        the model is in. Without a hard row the loss is 0 and its backward() gives no parameter a gradient.
    Raises: TypeError, ValueError naming the argument.
    """
    _check.batch(x, y)
    recipe = ham(PGD(eps, step_size, steps, norm), screen_steps, lam, early_drop=early_drop, reweight=reweight)
    examples = recipe.examples(model, x, y, seed=draw_seed(generator), step=0)
    if examples.n_hard == 0:
        return torch.zeros((), device=x.device, requires_grad=True)
    return recipe.loss(model, examples)
