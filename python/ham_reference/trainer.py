"""PGD-AT until start_epoch, then hard adversarial example mining: the training loop in plain PyTorch."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import nn

from .method import hard_examples, weighted_loss


@dataclass
class Report:
    """One step, or one epoch (then loss is the mean over the rows trained on)."""

    loss: float
    n: int
    n_hard: int
    seconds: float

    @property
    def hard_fraction(self):
        return self.n_hard / self.n


class HAMTrainer:
    """Signature and meaning of ham_kernels.HAMTrainer."""

    def __init__(
        self, model, optimizer, *, eps=8 / 255, step_size=2 / 255, steps=10, screen_steps=3, start_epoch=50, lam=1.0,
        reweight=True, early_drop=True, norm="linf", freeze_bn=False, ema_decay=None, device=None, precision="fp32",
        seed=0, rows="hard",
    ):  # fmt: skip
        if precision != "fp32":
            raise ValueError(f"precision: got {precision!r}; the reference knows fp32 only")
        self.model = model if device is None else model.to(device)
        self.device = next(model.parameters()).device
        self.optimizer = optimizer
        self.attack = {"eps": eps, "step_size": step_size, "steps": steps, "screen_steps": screen_steps, "norm": norm}
        self.lam, self.reweight, self.early_drop, self.rows = lam, reweight, early_drop, rows
        self.start_epoch, self.freeze_bn, self.seed = start_epoch, freeze_bn, seed
        self.ema_decay = ema_decay
        self.ema_model = None if ema_decay is None else copy.deepcopy(model).eval()
        self.epoch, self.steps_done, self.updates, self.history = 0, 0, 0, []

    def train_step(self, x, y, epoch):
        start = time.perf_counter()
        mining = epoch >= self.start_epoch
        x_adv, y_kept, weights, _ = hard_examples(
            self.model, x, y, **self.attack, lam=self.lam, reweight=self.reweight and mining,
            early_drop=self.early_drop and mining, rows=self.rows, seed=self.seed, step=self.steps_done,
        )  # fmt: skip
        self.steps_done += 1
        loss = 0.0
        if len(y_kept) > 0:
            mined = mining and (self.early_drop or self.reweight)
            loss = self.update(x_adv, y_kept, weights, freeze_bn=(self.freeze_bn and mined) or len(y_kept) == 1)
        return Report(loss, len(x), len(y_kept), time.perf_counter() - start)

    def update(self, x_adv, y, weights, freeze_bn):
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.train()
        for module in self.model.modules():
            if freeze_bn and isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
        loss = weighted_loss(self.model, x_adv, y, weights)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for module, training in modes:
            module.training = training
        if self.ema_model is not None:
            self.average()
        return loss.item()

    @torch.no_grad()
    def average(self):
        theirs = self.model.state_dict()
        self.updates += 1
        decay = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))  # forgets the start
        for name, average in self.ema_model.state_dict().items():
            if average.is_floating_point():
                average.copy_(decay * average + (1 - decay) * theirs[name])
            else:
                average.copy_(theirs[name])

    def fit(self, train_loader, epochs, val_loader=None):
        """Trains up to epoch `epochs`; val_loader is accepted and not used, since evaluating is not the method."""
        for epoch in range(self.epoch + 1, epochs + 1):
            if hasattr(train_loader, "set_epoch"):
                train_loader.set_epoch(epoch)
            steps = [self.train_step(x.to(self.device), y.to(self.device), epoch) for x, y in train_loader]
            n_hard = sum(s.n_hard for s in steps)
            loss = sum(s.loss * s.n_hard for s in steps) / max(n_hard, 1)
            report = Report(loss, sum(s.n for s in steps), n_hard, sum(s.seconds for s in steps))
            self.history.append(report)
            self.epoch = epoch
        return self.history
