"""Model modes of an attack and of an update, and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .eval_batchnorm import fast_eval_batchnorm

PRECISIONS = ("fp32", "bf16", "fp16")
JUDGING_PRECISIONS = PRECISIONS[:2]  # fp16 would hide what attacks on other losses than the cross entropy need
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def attack_mode(model: nn.Module, *, fast_batchnorm: bool = True) -> Iterator[None]:
    """Eval mode and no weight gradients inside; afterwards every flag is as it was, also after an error."""
    modes = [(m, m.training) for m in model.modules()]
    learned = [p for p in model.parameters() if p.requires_grad]
    try:
        for m, _ in modes:
            m.training = False
        for p in learned:
            p.requires_grad_(False)
        with torch.enable_grad(), fast_eval_batchnorm(model) if fast_batchnorm else nullcontext():
            yield
    finally:
        for m, training in modes:
            m.training = training
        for p in learned:
            p.requires_grad_(True)


@contextmanager
def update_mode(model: nn.Module, freeze_bn: bool) -> Iterator[None]:
    """Train mode inside, BatchNorm on its running statistics if frozen; afterwards every flag is as it was."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in modes:
            m.training = not (freeze_bn and isinstance(m, _NormBase))
        yield
    finally:
        for m, training in modes:
            m.training = training


def autocast(precision: str, device: torch.device):
    """fp32: as it is. bf16, fp16: autocast; weights, images and losses stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def model_device(model: nn.Module) -> torch.device | None:
    """Where the model's parameters live; None for a model without any."""
    return next((p.device for p in model.parameters()), None)
