"""Small models for tests."""

from __future__ import annotations

import torch
from torch import nn

from ham_kernels.engine.first_look import believed
from ham_kernels.models import SmallCNN


def small_cnn(seed: int = 0, width: int = 8, channels: int = 1, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return SmallCNN(channels, classes, width)


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=2e-4)


class Counting(nn.Module):
    """Counts the rows that go forward, and those that come back to the input without weight gradients."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        believed.add(self)  # what a training looks at once is not counted
        self.inner = inner
        self.forward_rows = self.input_backward_rows = self.training_rows = 0
        self.batches: list[tuple[int, bool]] = []  # (rows, train mode) of each forward

    def forward(self, x):
        self.forward_rows += len(x)
        self.batches.append((len(x), self.training))
        if self.training:
            self.training_rows += len(x)
        if x.requires_grad:
            x.register_hook(self._count_backward)
        return self.inner(x)

    def _count_backward(self, grad):
        self.input_backward_rows += len(grad)

    def full_batch_forwards(self, n: int) -> float:
        """In the unit of the cost model: a forward is 1, a backward to the input 1, a training backward 2."""
        return (self.forward_rows + self.input_backward_rows + 2 * self.training_rows) / n


class Constant(nn.Module):
    """The same logits for every image, with one parameter so that there is something to train."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float32))

    def forward(self, x):
        return self.logits + 0.0 * x.flatten(1).sum(1, keepdim=True)


class Broken(nn.Module):
    """A model whose output is passed through `how` from forward number `after` on."""

    def __init__(self, inner: nn.Module, how, after: int = 0, only_train: bool = False):
        super().__init__()
        self.inner, self.how, self.after, self.only_train = inner, how, after, only_train
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        z = self.inner(x)
        broken = self.calls > self.after and (self.training or not self.only_train)
        return self.how(z) if broken else z


def resting_norms() -> nn.Module:
    """A classifier as its author gives it: in train mode, but for BatchNorms, which keep their statistics."""
    model = small_cnn().train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    return model
