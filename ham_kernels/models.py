"""Classifiers with their normalisation inside, so that attacks work on images in [0, 1]."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import checks
from .data.table import SETS

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


class _PreActNet(nn.Sequential):
    """Normalisation, a 3x3 convolution, stages of PreActBlocks (all but the first halve the image), a linear head."""

    def __init__(
        self, classes: int, stem: int, widths: Sequence[int], blocks: int, channels: int,
        mean: Sequence[float] | None, std: Sequence[float] | None,
    ):  # fmt: skip
        layers, c_in = [], stem
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(PreActBlock(c_in, width, 2 if stage and not block else 1))
                c_in = width
        super().__init__(
            normalisation(channels, mean, std),
            nn.Conv2d(channels, stem, 3, padding=1, bias=False),
            *layers,
            nn.BatchNorm2d(c_in),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(c_in, classes),
        )


class PreActResNet18(_PreActNet):
    """Pre-activation ResNet-18 for 32x32 images (He et al., ECCV 2016), by default with CIFAR-10's mean and std inside.

    Args: classes; channels of the images; mean, std: one value per channel, or None for no normalisation.
    """

    def __init__(
        self, classes: int = 10, *, channels: int = 3, mean: Sequence[float] | None = CIFAR10_MEAN,
        std: Sequence[float] | None = CIFAR10_STD,
    ):  # fmt: skip
        super().__init__(classes, 64, (64, 128, 256, 512), 2, channels, mean, std)


class WideResNet(_PreActNet):
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


_OWN: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": lambda classes, channels, mean, std: SmallCNN(channels, classes, mean=mean, std=std),
    "preact_resnet18": lambda classes, **how: PreActResNet18(classes, **how),
    "wrn_34_10": lambda classes, **how: WideResNet(34, 10, classes, **how),
    "wrn_28_10": lambda classes, **how: WideResNet(28, 10, classes, **how),
}
# with their auxiliary classifiers they would return three tensors; a given init_weights silences a warning
_WITHOUT_AUXILIARIES = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def names() -> list[str]:
    """What `create` knows: the models of this file, then torchvision's classifiers where torchvision is installed."""
    return [*_OWN, *_torchvision_names()]


def create(
    name: str, classes: int, *, channels: int = 3, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:  # fmt: skip
    """A classifier with random weights: images (n, channels, H, W) in [0, 1] -> logits (n, classes).

    Args:
        name: one of `names()`: "small_cnn", "preact_resnet18", "wrn_34_10", "wrn_28_10", or a classifier of
            torchvision.models.
        classes: >= 2.
        channels: of the images; torchvision's classifiers take 3 only.
        mean, std: normalisation inside the model, one value per channel; None for no normalisation.
    Raises: TypeError, ValueError naming the argument, with close matches for an unknown name.
    """
    checks.integer("classes", classes, 2)
    checks.integer("channels", channels, 1)
    if name in _OWN:
        return _OWN[name](classes, channels=channels, mean=mean, std=std)
    theirs = _torchvision_names()
    if name not in theirs:
        raise ValueError(_unknown(name, theirs))
    if channels != 3:
        raise ValueError(f"channels: got {channels}; torchvision's {name} takes 3 (of {', '.join(_OWN)} any number)")
    from torchvision import models

    before = normalisation(channels, mean, std)
    model = models.get_model(name, weights=None, num_classes=classes, **_WITHOUT_AUXILIARIES.get(name, {}))
    return model if mean is None else nn.Sequential(before, model)


def _torchvision_names() -> list[str]:
    try:
        from torchvision import models
    except ImportError:
        return []
    return models.list_models(module=models)


def _unknown(name: str, theirs: list[str]) -> str:
    close = difflib.get_close_matches(str(name).lower().replace("-", "_"), [*_OWN, *theirs])
    hint = f"close are {', '.join(close)}" if close else f"allowed are {', '.join(_OWN)}"
    more = "models.names() lists all" if theirs else "torchvision, which has many more, is not installed"
    return f"name: got {name!r}; {hint}; {more}"
