"""3x3 convolutions by Winograd's algorithm on the CPU, in attack and update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops.winograd import DTYPES, PANEL, status, winograd_weights

LEAST_TILES = 8  # fewer do not pay for reading weights that are four times as large
NO_LAYER = (
    f"the model has no 3x3 convolution (torch.nn.Conv2d, fp32) of stride 1, padding 1 and multiples of {PANEL} channels"
)


def winograd_problem(device: torch.device, precision: str) -> str | None:
    """Why it cannot be served there, or None."""
    if device.type != "cpu":
        return f"the model is on {device.type}, whose own library chooses its algorithms; this one is for the CPU"
    if precision == "fp16":
        return "it takes images in fp32 or bf16, and the precision is fp16"
    library, why = status()
    return why if library is None else None


class WinogradLayers:
    """The layers of a model that it serves, their transformed weights at addresses that stay the same.

    These take eight times the memory of the layers' weights.
    """

    def __init__(self, model: nn.Module):
        self.layers = [_Layer(m) for m in model.modules() if _can_serve(m)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, these layers run by Winograd's algorithm, with the weights that they have on entry."""
        for layer in self.layers:
            layer.transform()
        try:
            for layer in self.layers:
                layer.conv.forward = layer.forward
            yield
        finally:
            for layer in self.layers:
                layer.conv.__dict__.pop("forward", None)


class _Layer:
    def __init__(self, conv: nn.Conv2d):
        self.conv = conv
        self.u, self.u_back = (winograd_weights(conv.weight, back=back) for back in (False, True))
        self.forward = self._forward  # one object for good: compiled code is guarded by it

    def transform(self) -> None:
        winograd_weights(self.conv.weight, out=self.u)
        winograd_weights(self.conv.weight, back=True, out=self.u_back)

    def _forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        if x.dim() != 4 or x.dtype not in DTYPES or not _pays(*x.shape):
            return nn.Conv2d.forward(conv, x)
        y = torch.ops.ham_kernels.winograd(x, conv.weight, self.u, self.u_back)
        return y if conv.bias is None else y + conv.bias.to(y.dtype)[:, None, None]


def _pays(n: int, _: int, h: int, w: int) -> bool:
    """Whether at least half of the multiplications are saved, edges included."""
    tiles = -(-h // 4) * -(-w // 4)
    return h * w >= 8 * tiles and n * tiles >= LEAST_TILES


def _can_serve(m: nn.Module) -> bool:
    return (
        type(m) is nn.Conv2d
        and "forward" not in m.__dict__
        and (m.kernel_size, m.stride, m.dilation, m.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and m.padding in ((1, 1), "same")
        and m.padding_mode == "zeros"
        and m.in_channels % PANEL == 0
        and m.out_channels % PANEL == 0
        and m.weight.dtype == torch.float32
        and m.weight.device.type == "cpu"
    )
