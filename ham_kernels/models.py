"""Classifiers with their normalisation inside, so that attacks work on images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Normalize(nn.Module):
    """(x - mean) / std per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class SmallCNN(nn.Sequential):
    """Three convolutions with BatchNorm and a linear head, for small images and quick runs.

    Args: in_channels; classes; width of the first two layers (the third has twice as many channels).
    """

    def __init__(self, in_channels: int = 1, classes: int = 10, width: int = 32):
        def block(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]

        super().__init__(
            Normalize([0.5] * in_channels, [0.5] * in_channels),
            *block(in_channels, width, 1),
            *block(width, width, 1),
            *block(width, 2 * width, 2),
            nn.AdaptiveAvgPool2d(2),  # 2x2 parts rather than one: where a stroke lies tells digits apart
            nn.Flatten(),
            nn.Linear(8 * width, classes),
        )


class PreActBlock(nn.Module):
    """BatchNorm - ReLU - conv, twice, around a shortcut (He et al., ECCV 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        project = stride != 1 or c_in != c_out
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class PreActResNet18(nn.Sequential):
    """Pre-activation ResNet-18 for 32x32 images, with the CIFAR-10 mean and std inside (He et al., ECCV 2016)."""

    def __init__(self, classes: int = 10):
        widths, blocks, c_in = (64, 128, 256, 512), [], 64
        for stage, width in enumerate(widths):
            blocks += [PreActBlock(c_in, width, 1 if stage == 0 else 2), PreActBlock(width, width, 1)]
            c_in = width
        super().__init__(
            Normalize((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
            nn.Conv2d(3, 64, 3, padding=1, bias=False),
            *blocks,
            nn.BatchNorm2d(512),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, classes),
        )
