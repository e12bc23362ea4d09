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
NO_IMAGES = "the images at the model's 3x3 convolutions are too small, or not fp32 or bf16 (n, c, h, w)"


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

    @property
    def problem(self) -> str | None:
        """Why it serves nothing of this model, as far as is known yet; None where it does."""
        if not self.layers:
            return NO_LAYER
        return NO_IMAGES if all(layer.suits is False for layer in self.layers) else None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, these layers run by Winograd's algorithm, with the weights that they have on entry."""
        layers = [layer for layer in self.layers if "forward" not in vars(layer.conv)]  # else it is in place already
        for layer in layers:
            layer.transform()
        try:
            for layer in layers:
                layer.conv.forward = layer.forward
            yield
        finally:
            for layer in layers:
                layer.conv.__dict__.pop("forward", None)


class _Layer:
    def __init__(self, conv: nn.Conv2d):
        self.conv = conv
        self.suits: bool | None = None  # whether its images do, once they have been seen
        self.u, self.u_back = (winograd_weights(conv.weight, back=back) for back in (False, True))

    def transform(self) -> None:
        winograd_weights(self.conv.weight, out=self.u)
        winograd_weights(self.conv.weight, back=True, out=self.u_back)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        self.suits = x.dim() == 4 and x.dtype in DTYPES and _saves_half(*x.shape[2:])
        if not self.suits or _tiles(*x.shape[2:]) * len(x) < LEAST_TILES:
            return nn.Conv2d.forward(conv, x)
        y = torch.ops.ham_kernels.winograd(x, conv.weight, self.u, self.u_back)
        return y if conv.bias is None else y + conv.bias.to(y.dtype)[:, None, None]


def _tiles(h: int, w: int) -> int:
    return -(-h // 4) * -(-w // 4)


def _saves_half(h: int, w: int) -> bool:
    """Whether at least half of the multiplications are saved, edges included: 36 per tile instead of 9 per pixel."""
    return h * w >= 8 * _tiles(h, w)


def _can_serve(m: nn.Module) -> bool:
    return (
        type(m) is nn.Conv2d
        and "forward" not in m.__dict__
        and (m.kernel_size, m.stride, m.dilation, m.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and m.padding in ((1, 1), "same")
        and m.padding_mode == "zeros"
        and all(c % PANEL == 0 and c for c in (m.in_channels, m.out_channels))
        and m._parameters.get("weight") is not None  # else hooks make it anew in every forward
        and m.weight.dtype == torch.float32
        and m.weight.device.type == "cpu"
    )
