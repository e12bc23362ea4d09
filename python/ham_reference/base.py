"""What the methods share: an update from one batch, and class weights. As it stands it is PGD-AT."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attack import attack
from .awp import perturbed
from .class_weights import ClassStatistics, weights
from .losses import CLASSIFICATION
from .method import step_size_weights


@dataclass
class Update:
    """What became of one batch."""

    loss: float
    x_adv: Tensor  # (n, C, H, W), all rows
    rows: Tensor  # those in the loss
    weights: Tensor  # (rows,)
    least_margin: float  # the nearest that a row was to a tie of its label at a look: how little decides what is hard


@dataclass
class PGDAT:
    """PGD-AT with every switch that methods have in common.

    `step` makes one update, `end_epoch` closes an epoch; what is remembered between is in attributes.
    """

    classes: int
    eps: float
    step_size: float
    steps: int
    norm: str = "linf"
    step_sizes: tuple[float, ...] = ()
    eps_factor: float = 1.0
    early_drop: bool = False
    easy: str = "drop"
    screen_steps: int = 3
    reweight: bool = False
    lam: float = 1.0
    trust: float = 0.0
    loss: str = "ce"
    label_smoothing: float = 0.0
    class_weights: str = "none"
    class_strength: float | None = None
    class_memory: float = 0.9
    class_from: int = 1
    awp: float = 0.0

    raises = "ce"  # what the attack raises
    as_is = False  # weights are not scaled to mean 1

    def __post_init__(self):
        self.eps, self.step_size = self.eps_factor * self.eps, self.eps_factor * self.step_size
        self.statistics = ClassStatistics(self.classes, self.class_memory)

    def step(self, model, optimizer, x, y, seed, step, epoch):
        """One update from images x (n, C, H, W) and labels y; seed and step name the noise. Returns an Update."""
        eps, step_size = self.budget(y, epoch)
        attacked = attack(
            model, x, y, eps=eps, step_size=step_size, steps=self.steps, norm=self.norm, seed=seed, step=step,
            step_sizes=self.step_sizes, raises=self.raises, early_drop=self.early_drop, easy=self.easy,
            screen_steps=self.screen_steps, target=self.target(x, y, seed, step), patience=self.patience(epoch),
        )  # fmt: skip
        self.observe(attacked, y, epoch)
        rows = torch.arange(len(y), device=y.device)
        if self.early_drop and self.easy == "drop":
            rows = rows[attacked.hard]
        w = self.row_weights(attacked, y, epoch)[rows]
        if not self.as_is:
            w = w / w.mean()
        if len(rows) == 0:
            return Update(0.0, attacked.x_adv, rows, w, attacked.least_margin)

        def loss_of(network):
            each = self.each(network, x[rows], attacked.x_adv[rows], y[rows], w, epoch)
            return each.sum() / len(rows)

        with training(model, frozen_bn=len(rows) == 1), perturbed(model, loss_of, self.awp):
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return Update(loss.item(), attacked.x_adv, rows, w, attacked.least_margin)

    # ------------------------------------------------------------ what a method may change
    def budget(self, y, epoch):
        """(eps, step size): numbers, or one per row."""
        return self.eps, self.step_size

    def patience(self, epoch):
        """At how many looks a row may be wrong and still move; None: at any number."""
        return None

    def target(self, x, y, seed, step):
        """(n, classes) what the attack goes towards, or away from; None where that is nothing, or found by itself."""
        return None

    def observe(self, attacked, y, epoch):
        """Takes what a batch tells of the classes."""
        self.statistics.add(attacked.seen, y)

    def row_weights(self, attacked, y, epoch):
        """(n,) of all rows, before they are scaled."""
        w = torch.ones(len(y), device=y.device)
        if self.reweight:
            w = step_size_weights(attacked.max_step, self.lam)
        if self.trust:
            kept = attacked.hard if self.early_drop and self.easy == "drop" else torch.ones_like(attacked.hard)
            trust = label_probability(attacked.seen, y) ** self.trust
            of_class = torch.stack([trust[kept & (y == c)].mean() for c in range(self.classes)])
            w = w * trust / of_class[y]
        if self.class_weights != "none" and epoch >= self.class_from:
            v = weights(self.statistics, self.class_weights, self.class_strength)
            w = w * v.float().to(y.device)[y]
        return w

    def each(self, model, x, x_adv, y, w, epoch):
        """The weighted loss of each row."""
        return w * self.classification(model(x_adv), y)

    def classification(self, logits, y):
        return CLASSIFICATION[self.loss](logits.float(), y, self.label_smoothing)

    def end_epoch(self):
        """After the last batch of an epoch."""
        self.statistics.end_epoch()


def label_probability(logits, y):
    """(n,)."""
    return F.softmax(logits.float(), 1).gather(1, y[:, None]).squeeze(1)


@contextmanager
def training(model, frozen_bn=False):
    """Train mode inside a with block, BatchNorm's statistics as they are where told; own modes afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module in model.modules():
        if frozen_bn and isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
