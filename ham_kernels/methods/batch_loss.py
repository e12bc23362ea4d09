"""A method's loss of one batch, where trades_loss(...) stood in somebody's loop."""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..attack.pgd import PGD, draw_seed
from ..common import checks, troubles
from ..common.processes import refuse_several
from ..engine import look_once
from .ham import HAM
from .objective import Objective
from .pgd_at import PGDAT
from .settings import Method

_told: WeakSet[nn.Module] = WeakSet()  # that an attack on them had no gradient


def loss(
    method: Method | Objective, model: nn.Module, x: Tensor, y: Tensor, *, eps: float | Tensor = 8 / 255,
    step_size: float | Tensor = 2 / 255, steps: int = 10, norm: str = "linf",
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """A method's loss of one batch: call it, then backward() and optimizer.step().

    Args:
        method: such as ham.methods.TRADES(beta=6.0). One that remembers something over batches is given as an
            `Objective`, made once; its own attack then holds, and eps, step_size, steps and norm are not looked at.
        model: classifier in train mode, images (n, C, H, W) in [0, 1] -> logits (n, classes).
        x: images in [0, 1], fp32, fp16 or bf16.  y: (n,) int64 labels.
        eps, step_size: >= 0, in units of the images; floats, or tensors (n,) with one value per row.
        steps: K.  norm: "linf" or "l2".
        generator: draws the seed of the random start; None takes torch's default generator.
    Returns: 0-dim loss. The attack runs in eval mode, the loss in the mode that the model is in. Where no row is left
        to train on, the loss is 0 and so is every gradient. `start_epoch` has no effect.
    Raises: TypeError, ValueError naming the argument.
    """
    checks.batch(x, y)
    refuse_several(model)
    if torch.is_inference_mode_enabled():
        raise troubles.error("inference_mode")
    objective = method if isinstance(method, Objective) else Objective(method, PGD(eps, step_size, steps, norm))
    if objective.method.awp:
        raise ValueError(
            f"awp: got {objective.method.awp:g}; it acts around the optimiser's step, which a loss does not see: train "
            "by ham_kernels.Trainer, or leave it 0"
        )
    if objective.pgd.steps:
        look_once(model, x, y)
    examples = objective.examples(model, x, y, seed=draw_seed(generator), step=0)
    if examples.no_gradient and model not in _told:
        _told.add(model)
        troubles.warn("attack_without_gradient", attack=objective.method.title, rows=examples.no_gradient, n=len(y))
    if examples.n_kept == 0:  # a zero that depends on the parameters: GradScaler refuses a step without any gradient
        return sum(
            (p.sum() * 0.0 for p in model.parameters() if p.requires_grad),
            torch.zeros((), device=x.device, requires_grad=True),
        )
    return objective.loss(model, examples)


def ham_loss(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float | Tensor = 8 / 255, step_size: float | Tensor = 2 / 255,
    steps: int = 10, screen_steps: int = 3, lam: float = 1.0, reweight: bool = True, early_drop: bool = True,
    norm: str = "linf", generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """HAM's loss of one batch: `loss` with methods.HAM. With reweight and early_drop off it is the PGD-AT loss.

    Args: as of `loss`; screen_steps: M of the paper, 1 <= M < K; lam: >= 0, weights are sigmoid(lam * maximum step
        size), and a higher lam makes them more uniform.
    """
    checks.batch(x, y)
    method = ham_or_pgd_at(screen_steps=screen_steps, lam=lam, reweight=reweight, early_drop=early_drop)
    return loss(method, model, x, y, eps=eps, step_size=step_size, steps=steps, norm=norm, generator=generator)


def ham_or_pgd_at(*, early_drop: bool, reweight: bool, **switches) -> Method:
    """HAM; with both of its mechanisms off, what is left of it."""
    checks.flag("early_drop", early_drop)
    checks.flag("reweight", reweight)
    if early_drop or reweight:
        return HAM(early_drop=early_drop, reweight=reweight, **switches)
    HAM(**switches)  # what was told is checked all the same
    return PGDAT(**{name: value for name, value in switches.items() if name not in _OF_MINING})


_OF_MINING = {
    "easy",
    "screen_steps",
    "screen",
    "rows",
    "round_to",
    "bn_rows",
    "freeze_bn",
    "lam",
    "group",
    "group_updates",
}
