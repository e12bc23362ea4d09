"""A method's loss of one batch, where trades_loss(...) stood in somebody's loop."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..attack.pgd import PGD, draw_seed
from ..common import checks, troubles
from ..distributed import Meeting, inner_model, ranks_of
from ..engine import look_once, update_mode
from .ham import HAM
from .mining import place_of
from .objective import Objective
from .pgd_at import PGDAT
from .settings import Method

_told: WeakSet[nn.Module] = WeakSet()  # that an attack on them had no gradient


def loss(
    method: Method | Objective, model: nn.Module, x: Tensor, y: Tensor, *, eps: float | Tensor = 8 / 255,
    step_size: float | Tensor = 2 / 255, steps: int = 10, norm: str = "linf",
    generator: torch.Generator | None = None, group: Any = "auto",
) -> Tensor:  # fmt: skip
    """A method's loss of one batch: call it, then backward() and optimizer.step().

    Args:
        method: such as ham.methods.TRADES(beta=6.0). One that remembers something over batches, or goes by epochs, is
            given as an `Objective`, made once; its own attack then holds, and eps, step_size, steps and norm are not
            looked at.
        model: classifier in train mode, images (n, C, H, W) in [0, 1] -> logits (n, classes).
        x: images in [0, 1], fp32, fp16 or bf16.  y: (n,) int64 labels.
        eps, step_size: >= 0, in units of the images; floats, or tensors (n,) with one value per row.
        steps: K.  norm: "linf" or "l2".
        generator: draws the seed of the random start; None takes torch's default generator.
        group: the processes whose batches are one, as in `Trainer`; their wrapper (DistributedDataParallel, FSDP2,
            Accelerate's, Fabric's) then takes the mean of their gradients, which is that of the whole batch. The seed
            is that of process 0. An `Objective` has its own.
    Returns: 0-dim loss. The attack runs in eval mode and on the model inside a wrapper, the loss in the mode that the
        model is in; of one row that is left BatchNorm takes no statistics, but uses its running ones. Where no row is
        left to train on, the loss is 0 and so is every gradient. `start_epoch` has no effect.
    Raises: TypeError, ValueError naming the argument.
    """
    inner = inner_model(model)
    if torch.is_inference_mode_enabled():
        raise troubles.error("inference_mode")
    if isinstance(method, Objective):
        objective = method
    else:
        objective = Objective(method, PGD(eps, step_size, steps, norm), ranks=ranks_of(group))
    ranks = objective.ranks
    with Meeting(ranks, getattr(x, "device", torch.device("cpu")), what="this batch") as meeting:
        checks.batch(x, y, empty=ranks.several)
        seed = draw_seed(generator)
        heard = meeting.table([len(y), seed >> 31, seed & (2**31 - 1)])  # each exact in fp64
    rows, (high, low) = [n for n, *_ in heard], (int(part) for part in heard[0][1:])
    if objective is not method and (method.keeps_over_batches or any(first > 1 for _, first, _ in method.begins())):
        troubles.warn("memory_lost", method=method.title, kind=type(method).__name__)
    if objective.method.awp:
        raise ValueError(
            f"awp: got {objective.method.awp:g}; it acts around the optimiser's step, which a loss does not see: train "
            "by ham_kernels.Trainer, or leave it 0"
        )
    if objective.method.tunes_only:
        raise ValueError(
            f"method: got {objective.method.name!r}; it replaces the optimiser's step, which a loss does not see: use "
            "ham_kernels.Trainer"
        )
    with place_of(ranks, rows, x.device) as place:
        if objective.pgd.steps and all(rows):  # on all processes or none: a sharded model's forward waits for all
            look_once(inner, x, y)
        examples = objective.group_examples(inner, x, y, (len(y),), seed=high << 31 | low, step=0, place=place)[0]
    if examples.no_gradient and inner not in _told:
        _told.add(inner)
        troubles.warn("attack_without_gradient", attack=objective.method.title, rows=examples.no_gradient, n=len(y))
    if (
        examples.everywhere.n_kept == 0 and not ranks.several
    ):  # a zero that depends on the parameters: GradScaler refuses a step without any gradient
        return sum(
            (p.sum() * 0.0 for p in model.parameters() if p.requires_grad),
            torch.zeros((), device=x.device, requires_grad=True),
        )
    with update_mode(inner, freeze_bn=True) if examples.without_statistics and inner.training else nullcontext():
        return objective.loss(model, examples)


def ham_loss(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float | Tensor = 8 / 255, step_size: float | Tensor = 2 / 255,
    steps: int = 10, screen_steps: int = 3, lam: float = 1.0, reweight: bool = True, early_drop: bool = True,
    norm: str = "linf", generator: torch.Generator | None = None, group: Any = "auto",
) -> Tensor:  # fmt: skip
    """HAM's loss of one batch: `loss` with methods.HAM. With reweight and early_drop off it is the PGD-AT loss.

    Args: as of `loss`; screen_steps: M of the paper, 1 <= M < K; lam: >= 0, weights are sigmoid(lam * maximum step
        size), and a higher lam makes them more uniform.
    """
    method = ham_or_pgd_at(screen_steps=screen_steps, lam=lam, reweight=reweight, early_drop=early_drop)
    attack = {"eps": eps, "step_size": step_size, "steps": steps, "norm": norm}
    return loss(method, model, x, y, **attack, generator=generator, group=group)


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
