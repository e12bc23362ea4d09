"""HAMTrainer: HAM from flat arguments, where a reference implementation stood."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..methods.batch_loss import ham_or_pgd_at
from ..methods.ham import HAM
from .trainer import Trainer

_SWITCHES = {f.name for f in dataclasses.fields(HAM)}


class HAMTrainer(Trainer):
    """`Trainer` with methods.HAM(...) from flat arguments (arXiv 2308.01823).

    Args: as of `Trainer`; and
        screen_steps: M of the paper, 1 <= M < K.
        start_epoch: first epoch (1-based) with mining; the epochs before are the warm-up.
        lam: >= 0, weights are sigmoid(lam * maximum step size), mean 1; a higher lam makes them more uniform.
        reweight, early_drop: the two mechanisms. Both off is PGD-AT throughout.
        freeze_bn: from start_epoch on, BatchNorm uses (and keeps) its running statistics, so that it does not shift
            to those of hard examples.
        further: other fields of methods.HAM, the switches that every method has (easy, step_sizes, class_weights, awp,
            ...), and arguments of `Trainer` (warm_up, natural_epochs, channels_last, compile, cuda_graphs, winograd,
            keep_memory, group). `group` names two things: a number, that of the batches that are attacked together;
            else the processes that train one model.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, eps: float = 8 / 255, step_size: float = 2 / 255,
        steps: int = 10, screen_steps: int = 3, start_epoch: int = 50, lam: float = 1.0, reweight: bool = True,
        early_drop: bool = True, norm: str = "linf", freeze_bn: bool = False, ema_decay: float | None = None,
        device: torch.device | str | None = None, precision: str = "fp32", seed: int = 0, **further: Any,
    ):  # fmt: skip
        switches = {name: further.pop(name) for name in list(further) if name in _SWITCHES}
        if not isinstance(switches.get("group", 1), int):
            further["group"] = switches.pop("group")
        method = ham_or_pgd_at(
            early_drop=early_drop, reweight=reweight, start_epoch=start_epoch, screen_steps=screen_steps, lam=lam,
            freeze_bn=freeze_bn, **switches,
        )  # fmt: skip
        super().__init__(
            model, optimizer, method, eps=eps, step_size=step_size, steps=steps, norm=norm, ema_decay=ema_decay,
            device=device, precision=precision, seed=seed, **further,
        )  # fmt: skip
