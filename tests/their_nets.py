"""Networks with the field's names of layers: PreActResNet-18 as in pytorch-cifar, and TRADES' wide ResNet."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F


def conv(c_in: int, c_out: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, stride=stride, padding=size // 2, bias=False)


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: str, raw: bool = False):
        super().__init__()
        self.raw = raw
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv(c_in, c_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), conv(c_out, c_out)
        self.by = shortcut if c_in != c_out else None
        if self.by is not None:
            projection = conv(c_in, c_out, stride, size=1)
            setattr(self, shortcut, nn.Sequential(projection) if shortcut == "shortcut" else projection)

    def forward(self, x):
        activated = F.relu(self.bn1(x))
        aside = x if self.by is None else getattr(self, self.by)(x if self.raw else activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)))) + aside


def stage(c_in: int, c_out: int, stride: int, blocks: int, shortcut: str, raw: bool = False) -> nn.Sequential:
    first = Block(c_in, c_out, stride, shortcut, raw)
    return nn.Sequential(first, *(Block(c_out, c_out, 1, shortcut) for _ in range(blocks - 1)))


class TheirPreActResNet18(nn.Module):
    def __init__(self, last_norm: bool, classes: int = 10, raw: bool = False):
        super().__init__()
        self.conv1, c_in = conv(3, 64), 64
        for i, width in enumerate((64, 128, 256, 512), 1):
            setattr(self, f"layer{i}", stage(c_in, width, 1 if i == 1 else 2, 2, "shortcut", raw))
            c_in = width
        if last_norm:
            self.bn = nn.BatchNorm2d(c_in)
        self.linear = nn.Linear(c_in, classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        x = F.relu(self.bn(x)) if hasattr(self, "bn") else x
        return self.linear(x.mean((2, 3)))


class Stage(nn.Module):
    def __init__(self, *how):
        super().__init__()
        self.layer = stage(*how, "convShortcut")

    def forward(self, x):
        return self.layer(x)


class TheirWideResNet(nn.Module):
    def __init__(self, depth: int, widen: int, classes: int = 10):
        super().__init__()
        self.conv1, c_in, blocks = conv(3, 16), 16, (depth - 4) // 6
        self.sub_block1 = Stage(16, 16 * widen, 1, blocks)  # never used
        for i, width in enumerate((16 * widen, 32 * widen, 64 * widen), 1):
            setattr(self, f"block{i}", Stage(c_in, width, 1 if i == 1 else 2, blocks))
            c_in = width
        self.bn1, self.fc = nn.BatchNorm2d(c_in), nn.Linear(c_in, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def at_random(model: nn.Module) -> nn.Module:
    """With statistics of BatchNorms that are not the first ones either, in eval mode."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.2, 0.2)
    return model.eval()
