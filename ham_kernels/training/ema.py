"""A weight average that follows a model."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """avg = decay * avg + (1 - decay) * model after each update, BatchNorm statistics included.

    torch's AveragedModel keeps its counter on the device and reads it at every update; this does not.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        ours, theirs = _tensors(self.model), _tensors(model)
        floats = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
        self._average([a for a, _ in floats], [b for _, b in floats], None)
        for a, b in zip(ours, theirs, strict=True):
            if not a.is_floating_point():  # counters
                a.copy_(b)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
