"""Weights in half precision for an attack: cast once per batch, not once per forward as autocast would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Made = TypeVar("Made")
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class HalfWeights:
    """The weights that autocast would cast, rounded to `dtype`, at addresses that stay the same."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self._slots: list[tuple[nn.Module, str]] = []
        self._halves: list[nn.Parameter] = []
        shared: dict[nn.Parameter, nn.Parameter] = {}
        for m in model.modules():
            for name in ("weight", "bias") if type(m) in _LAYERS else ():
                p = m._parameters.get(name)
                if p is None or p.dtype != torch.float32:
                    continue
                if p not in shared:
                    shared[p] = nn.Parameter(torch.empty_like(p, dtype=dtype), requires_grad=False)
                self._slots.append((m, name))
                self._halves.append(shared[p])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the layers compute with the rounded weights; afterwards with their own again."""
        own = [m._parameters[name] for m, name in self._slots]
        if own:
            with torch.no_grad():
                torch._foreach_copy_(list(self._halves), own)
        try:
            for (m, name), half in zip(self._slots, self._halves, strict=True):
                m._parameters[name] = half
            yield
        finally:
            for (m, name), p in zip(self._slots, own, strict=True):
                m._parameters[name] = p


def addresses(model: nn.Module) -> tuple[int, ...]:
    """Where parameters and buffers lie: what a captured graph depends on."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return tuple(t.data_ptr() for t in tensors)


class MadeFor(Generic[Made]):
    """What `make` makes for a model: kept until it is asked for another model, or the model's tensors have moved."""

    def __init__(self, make: Callable[[nn.Module], Made]):
        self._make = make
        self._model: nn.Module | None = None
        self._addresses: tuple[int, ...] = ()

    def __call__(self, model: nn.Module) -> Made:
        where = addresses(model)
        if model is not self._model or where != self._addresses:
            self._made, self._model, self._addresses = self._make(model), model, where
        return self._made
