"""A weight average that follows a model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class WeightAverage:
    """avg += (1 - d) * (model - avg) after each update, of parameters and BatchNorm's statistics; other buffers are
    the model's.

    After update t (from 1) d is the smaller of `decay` and (1 + t) / (10 + t), so that the average forgets the weights
    that it started from, also in a short training. torch's AveragedModel keeps its counter on the device and reads it
    at every update; this does not.

    Raises: ValueError where the model cannot be copied or its average cannot be written, before anything is trained.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates: int | None = 0  # None: a state of before, whose average never had a lower decay
        half = {str(p.dtype).removeprefix("torch.") for p in model.parameters()} & {"bfloat16", "float16"}
        if half:
            raise ValueError(
                f"ema_decay: got {decay:g}, but weights are {', '.join(half)}, too coarse for the small steps of an "
                "average; keep them in float32 and train with precision='bf16', or give ema_decay=None"
            )
        try:
            self.model = _copy_of(model)
            self._follow(model, 0.0)  # what would fail after an update fails now
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"ema_decay: this model cannot be averaged ({type(error).__name__}: {reason}); train it without"
            ) from error

    def update(self, model: nn.Module, enters: bool = True) -> None:
        """After an update of the model. One that does not enter moves the average only where none has entered yet: it
        then is the model, and no average of the weights that it started from.
        """
        if not enters:
            if self.updates == 0:
                self._follow(model, 1.0)
            return
        decay = self.decay
        if self.updates is not None:
            self.updates += 1
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        self._follow(model, 1 - decay)

    @torch.no_grad()
    def _follow(self, model: nn.Module, share: float) -> None:
        averaged = list(zip(self.model.parameters(), model.parameters(), strict=True))
        for ours, theirs in zip(self.model.modules(), model.modules(), strict=True):
            for name, b in theirs._buffers.items():
                a = ours._buffers.get(name)
                if b is None or a is None or a.shape != b.shape:  # forwards may make buffers, or make them anew
                    ours._buffers[name] = None if b is None else b.clone()
                elif isinstance(theirs, _NormBase) and b.is_floating_point():
                    averaged.append((a, b))
                else:
                    a.copy_(b)
        torch._foreach_lerp_([a for a, _ in averaged], [b for _, b in averaged], share)


def _copy_of(model: nn.Module) -> nn.Module:
    """In eval mode, frozen, each buffer with memory of its own."""
    # what a layer computes from its parameters (weight_norm of old keeps `weight` so) is no leaf, and not copied
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    copied = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed}).eval()
    for p in copied.parameters():
        p.requires_grad_(False)
    for m in copied.modules():
        for name, b in list(m._buffers.items()):
            if b is not None and any(k == 0 for k in b.stride()):
                m._buffers[name] = b.clone(memory_format=torch.contiguous_format)
    return copied
