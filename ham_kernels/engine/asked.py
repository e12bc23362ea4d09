"""Logits, and their gradient by the images, each when an attack asks: for attacks whose steps are not ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..common import troubles
from .engine import Engine
from .graphs import Captured, CaptureError, ambient, no_autocast_cache


def logits_of(model: nn.Module, engine: Engine, batch: int) -> Callable[[Tensor], Tensor]:
    """fp32 logits as a function of (n, ...) images, differentiable by them once; inside `engine.attacking(model)`.

    With CUDA graphs forward and gradient are replayed, for numbers of rows that are shares of `batch`.
    Raises: ValueError where a gradient is wanted and none can reach the images.
    """

    def logits(x: Tensor) -> Tensor:
        x = engine.place(model, x)
        pair = None if engine.graphs is None or not len(x) else _pair_for(model, engine, x, batch)
        if pair is not None:
            return _Replayed.apply(x, pair)
        z = engine.forward(model, x).float()
        if _wants_gradient(x) and not z.requires_grad:
            raise troubles.error("no_way_to_the_images")
        return z

    return logits


def _pair_for(model: nn.Module, engine: Engine, x: Tensor, batch: int) -> _Pair | None:
    """None where the capture fails: the engine has then given up CUDA graphs."""
    graphs = engine.graphs
    rows = graphs.rows_for(len(x), max(batch, len(x)))
    step = _wants_gradient(x)
    key = "logits", step, rows, x.shape[1:], x.stride()[1:], x.dtype, ambient(x.device)
    try:
        return graphs.kept(key, lambda: _Pair(model, engine, x.detach(), rows, max(batch, rows), step))
    except CaptureError as error:
        engine.give_up("cuda_graphs", str(error))
        return None


def _wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


class _Pair(Captured):
    """A forward and, of a `step`, its backward, as two graphs over images and logits that stay in place."""

    def __init__(self, model: nn.Module, engine: Engine, x: Tensor, rows: int, capacity: int, step: bool):
        super().__init__(engine.graphs, {"x_adv": x}, rows, capacity)
        self.load({"x_adv": x})
        place = self.places["x_adv"]
        with torch.no_grad(), no_autocast_cache():  # as in the capture: a compiled model has a form for each
            z = engine.forward(model, place)
        self._logits = torch.zeros_like(z, dtype=torch.float32)
        self._upstream, self._gradient = torch.zeros_like(self._logits), torch.zeros_like(place)
        passed = {}  # from forward to backward, and no longer: their memory is then free for other graphs

        def look() -> None:
            with torch.no_grad():
                self._logits.copy_(engine.forward(model, place))

        def forward() -> None:
            with torch.enable_grad():
                point = place.detach().requires_grad_()
                z = engine.forward(model, point)
            if not z.requires_grad:
                raise troubles.error("no_way_to_the_images")
            self._logits.copy_(z.detach())
            passed.update(point=point, z=z)

        def backward() -> None:
            z = passed.pop("z")
            (gradient,) = torch.autograd.grad(z, passed.pop("point"), self._upstream.to(z.dtype))
            self._gradient.copy_(gradient)

        self.capture({"forward": forward, "backward": backward} if step else {"forward": look})

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        """(logits, the replay that they are of)."""
        self.load({"x_adv": x})
        self.replay("forward")
        return self._logits[: len(x)].clone(), self._graphs.replays

    def backward(self, x: Tensor, upstream: Tensor, of: int) -> Tensor:
        """The gradient by the images. Any later replay writes where the forward left what this needs."""
        if self._graphs.replays != of:
            self.forward(x)
        self._upstream.zero_()  # rows past these
        self._upstream[: len(x)].copy_(upstream)
        self.replay("backward")
        return self._gradient[: len(x)].clone()


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, pair: _Pair) -> Tensor:
        z, ctx.replay = pair.forward(x)
        ctx.pair = pair
        ctx.save_for_backward(x)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.pair.backward(x, upstream, ctx.replay), None
