"""Classifiers with their normalisation inside, so that attacks work on images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common import checks
from ..data.table import SETS

CIFAR10_MEAN, CIFAR10_STD = SETS["cifar10"].mean, SETS["cifar10"].std


class Normalize(nn.Module):
    """(x - mean) / std per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def normalisation(channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """Normalize, or the identity where mean and std are None. ValueError unless there is one of each per channel."""
    if (mean is None) != (std is None):
        raise ValueError(f"{'mean' if mean is None else 'std'}: got None; give both mean and std, or neither")
    if mean is None:
        return nn.Identity()
    for name, values, low in (("mean", mean, float("-inf")), ("std", std, 1e-6)):
        if len(values) != channels:
            raise ValueError(f"{name}: got {len(values)} values; it must have one per channel, {channels}")
        for value in values:
            checks.real(name, value, low)
    return Normalize(mean, std)


class SmallCNN(nn.Sequential):
    """Three convolutions with BatchNorm and a linear head, for small images and quick runs.

    Args: in_channels; classes; width of the first two layers (the third has twice as many channels); mean, std: one
    value per channel, or one for all, or None for no normalisation.
    """

    def __init__(
        self, in_channels: int = 1, classes: int = 10, width: int = 32, *,
        mean: float | Sequence[float] | None = 0.5, std: float | Sequence[float] | None = 0.5,
    ):  # fmt: skip
        def block(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]

        mean, std = ([v] * in_channels if isinstance(v, (int, float)) else v for v in (mean, std))
        super().__init__(
            normalisation(in_channels, mean, std),
            *block(in_channels, width, 1),
            *block(width, width, 1),
            *block(width, 2 * width, 2),
            nn.AdaptiveAvgPool2d(2),  # 2x2 parts rather than one: where a stroke lies tells digits apart
            nn.Flatten(),
            nn.Linear(8 * width, classes),
        )


class PreActBlock(nn.Module):
    """BatchNorm - ReLU - conv, twice, around a shortcut (He et al., ECCV 2016).

    A shortcut that projects begins behind the first ReLU; with raw_shortcut before the first BatchNorm.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, raw_shortcut: bool = False):
        super().__init__()
        self.raw_shortcut = raw_shortcut
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        project = stride != 1 or c_in != c_out
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x if self.raw_shortcut else out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class PreActNet(nn.Sequential):
    """Normalisation, a 3x3 convolution, stages of PreActBlocks (all but the first halve the image), a linear head."""

    def __init__(
        self, classes: int, stem: int, widths: Sequence[int], blocks: int, channels: int,
        mean: Sequence[float] | None, std: Sequence[float] | None, last_norm: bool = True, raw_shortcut: bool = False,
    ):  # fmt: skip
        layers, c_in = [], stem
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(PreActBlock(c_in, width, 2 if stage and not block else 1, raw_shortcut))
                c_in = width
        super().__init__(
            normalisation(channels, mean, std),
            nn.Conv2d(channels, stem, 3, padding=1, bias=False),
            *layers,
            *([nn.BatchNorm2d(c_in), nn.ReLU()] if last_norm else []),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(c_in, classes),
        )
        self.blocks = blocks  # of a stage


class PreActResNet18(PreActNet):
    """Pre-activation ResNet-18 for 32x32 images (He et al., ECCV 2016), by default with CIFAR-10's mean and std inside.

    Args: classes; channels of the images; mean, std: one value per channel, or None for no normalisation; last_norm:
    BatchNorm and ReLU before the head, as published (kuangliu's pytorch-cifar, from which many checkpoints come, has
    neither); raw_shortcut: as in "Fast is better than free" (Wong et al., ICLR 2020), see PreActBlock.
    """

    def __init__(
        self, classes: int = 10, *, channels: int = 3, mean: Sequence[float] | None = CIFAR10_MEAN,
        std: Sequence[float] | None = CIFAR10_STD, last_norm: bool = True, raw_shortcut: bool = False,
    ):  # fmt: skip
        super().__init__(classes, 64, (64, 128, 256, 512), 2, channels, mean, std, last_norm, raw_shortcut)


class WideResNet(PreActNet):
    """Wide ResNet for 32x32 images, without dropout (Zagoruyko & Komodakis, BMVC 2016), as in TRADES' code.

    Args: depth = 6n + 4; widen: factor of the widths 16, 32, 64; classes; channels of the images; mean, std: one value
    per channel, or None for no normalisation.
    """

    def __init__(
        self, depth: int = 34, widen: int = 10, classes: int = 10, *, channels: int = 3,
        mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
    ):  # fmt: skip
        if checks.integer("depth", depth, 10) % 6 != 4:
            raise ValueError(f"depth: got {depth}; it must be 6n + 4, such as 28 or 34")
        checks.integer("widen", widen, 1)
        super().__init__(classes, 16, [c * widen for c in (16, 32, 64)], (depth - 4) // 6, channels, mean, std)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self[-1].bias)
