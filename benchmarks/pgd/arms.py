"""The competitors: each trains one epoch at a time from a common warm-up, on its own copy of the model."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

import ham_kernels as ham
from ham_kernels.training.ema import WeightAverage

TITLES = {
    "pgd_at": "PGD-AT",
    "ham": "HAM",
    "ham_frozen_bn": "HAM, frozen BN",
    "random": "random rows",
    "torchattacks": "PGD-AT (torchattacks)",
}


@dataclass
class Setting:
    """One training set-up, the same for all competitors."""

    eps: float
    step_size: float
    steps: int
    screen_steps: int
    lam: float
    start_epoch: int
    lr: float
    milestones: list[int]
    lr_decay: float
    ema_decay: float
    seed: int = 0

    def trainer(self, model: nn.Module, **choices) -> ham.HAMTrainer:
        return ham.HAMTrainer(
            model, self.optimizer(model), eps=self.eps, step_size=self.step_size, steps=self.steps,
            screen_steps=self.screen_steps, lam=self.lam, start_epoch=self.start_epoch,
            ema_decay=self.ema_decay, seed=self.seed, **choices,
        )  # fmt: skip

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), self.lr, momentum=0.9, weight_decay=2e-4)

    def set_lr(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        """Multiplied by lr_decay at each milestone."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr * self.lr_decay ** sum(epoch >= m for m in self.milestones)


@dataclass
class Epoch:
    seconds: float
    n: int
    n_hard: int


@dataclass
class Arm:
    """A method with its model, and the epochs it has trained."""

    name: str
    setting: Setting
    trainer: ham.HAMTrainer
    epochs: list[Epoch] = field(default_factory=list)

    def run_epoch(self, loader: Iterable, epoch: int) -> None:
        self.setting.set_lr(self.optimizer, epoch)
        loader.set_epoch(epoch)
        n = n_hard = 0
        self._synchronize()
        start = time.perf_counter()
        for x, y in loader:
            n += len(y)
            n_hard += self.step(x.to(self.trainer.device), y.to(self.trainer.device), epoch)
        self._synchronize()
        self.epochs.append(Epoch(time.perf_counter() - start, n, n_hard))

    def step(self, x, y, epoch: int) -> int:
        return self.trainer.train_step(x, y, epoch).n_hard

    @property
    def model(self) -> nn.Module:
        return self.trainer.model

    @property
    def ema_model(self) -> nn.Module:
        return self.trainer.ema_model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.trainer.optimizer

    def _synchronize(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()


class TorchattacksArm(Arm):
    """PGD-AT as its users write it: torchattacks.PGD in an ordinary loop (the weight average is ours)."""

    def step(self, x, y, epoch: int) -> int:
        if not hasattr(self, "attack"):
            import torchattacks

            s = self.setting
            self.attack = torchattacks.PGD(self.model, eps=s.eps, alpha=s.step_size, steps=s.steps, random_start=True)
            self.average = WeightAverage(self.model, s.ema_decay)
            self.average.model.load_state_dict(self.trainer.ema_model.state_dict())
        self.model.train()
        x_adv = self.attack(x, y)
        loss = F.cross_entropy(self.model(x_adv), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update(self.model)
        return len(y)

    @property
    def ema_model(self) -> nn.Module:
        return self.average.model


CHOICES = {
    "pgd_at": {"early_drop": False, "reweight": False},
    "ham": {},
    "ham_frozen_bn": {"freeze_bn": True},
    "random": {"rows": "random"},
    "torchattacks": {"early_drop": False, "reweight": False},
}


def fork(name: str, warm_up: Arm) -> Arm:
    """A competitor that starts where the warm-up ended: weights, averages, optimiser state, noise."""
    setting, source = warm_up.setting, warm_up.trainer
    trainer = setting.trainer(copy.deepcopy(source.model), **CHOICES[name])
    trainer.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
    trainer.ema_model.load_state_dict(source.ema_model.state_dict())
    trainer.steps_done = source.steps_done
    return (TorchattacksArm if name == "torchattacks" else Arm)(name, setting, trainer)


def torchattacks_there() -> bool:
    try:
        import torchattacks  # noqa: F401
    except ImportError:
        return False
    return True
