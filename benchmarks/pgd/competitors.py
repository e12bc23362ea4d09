"""The competitors: runs of `ham` that train one epoch at a time, so that its report reads and judges them."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import tomli_w
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ham_kernels as ham
from ham_kernels import data
from ham_kernels.commands.from_settings import device_of, scheduler_of
from ham_kernels.commands.run_images import facts_of
from ham_kernels.common.files import write_atomically
from ham_kernels.engine import Stopwatch
from ham_kernels.methods import HAM, PGDAT
from ham_kernels.models import PreActResNet18, SmallCNN
from ham_kernels.runs.config_file import to_dict
from ham_kernels.runs.folder import RunFolder
from ham_kernels.runs.settings import (
    AttackSettings,
    DataSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    TrainSettings,
)

BASE, FOREIGN = "pgd_at", "torchattacks"
TITLES = {
    BASE: "PGD-AT",
    "ham": "HAM",
    "ham_frozen_bn": "HAM, frozen BN",
    "random": "random rows",
    FOREIGN: "PGD-AT (torchattacks)",
}
MODELS = {"small": "small_cnn", "preact": "preact_resnet18"}
# One that does not depend on the scale of the logits, which reweighting changes; and the paper's, which is weaker.
ATTACKS = {"cw20": "CW-20", "pgd20": "PGD-20"}


def settings_of(args: argparse.Namespace, name: str, seed: int) -> TrainSettings:
    """The same training set-up for all competitors; no image is set aside, as nothing is chosen."""
    ours = HAM(start_epoch=args.warmup + 1, screen_steps=args.screen_steps, lam=args.lam)
    mining = {"ham": ours, "ham_frozen_bn": replace(ours, freeze_bn=True), "random": replace(ours, rows="random")}
    settings = TrainSettings(
        data=DataSettings(
            args.dataset, None if args.data is None else str(args.data), train_images=args.train_images,
            test_images=args.test_images, val_images=0, batch_size=args.batch_size, workers=0,
            augment="crop+flip" if args.model == "preact" else "none",
        ),
        model=ModelSettings(MODELS[args.model], normalize=True),
        attack=AttackSettings(args.eps, args.step_size, args.steps),
        method=mining.get(name, PGDAT()),
        optim=OptimSettings(
            epochs=args.epochs, lr=args.lr, milestones=tuple(args.milestones),
            lr_decay=(args.lr_decay,) * len(args.milestones),
        ),
        run=RunSettings(seed, args.device, ema_decay=args.ema_decay, label=TITLES[name]),
    )  # fmt: skip
    settings.check()
    return settings


def _model(settings: TrainSettings, classes: int, channels: int) -> nn.Module:
    """By default these normalise, whatever the data set; those of `ham train` do where its table has mean and std."""
    torch.manual_seed(settings.run.seed)
    return PreActResNet18(classes) if settings.model.name == MODELS["preact"] else SmallCNN(channels, classes)


class Competitor:
    """A method under way, with its run folder."""

    def __init__(self, name: str, settings: TrainSettings, images: data.ImageSet | data.FileSet, folder: Path):
        self.name, self.settings, self.classes = name, settings, images.classes
        optim, run, device = settings.optim, settings.run, device_of(settings.run.device)
        model = _model(settings, len(images.classes), images.channels).to(device)
        optimizer = torch.optim.SGD(
            model.parameters(), optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )
        kind = TorchattacksTrainer if name == FOREIGN else ham.Trainer
        self.trainer = kind(
            model, optimizer, settings.method, **asdict(settings.attack), ema_decay=run.ema_decay, seed=run.seed
        )
        self.scheduler = scheduler_of(settings, self.trainer)
        self.run = RunFolder.create(folder / f"{name}-seed{run.seed}", settings)
        if name == FOREIGN:  # no method of ham's: reports take it as they find it
            told = to_dict(settings) | {"method": {"name": name}}
            write_atomically(self.run.path / "config.toml", tomli_w.dumps(told).encode())
        self.run.set_data_facts(facts_of(images), {})
        self.run.begin_session(*self.trainer.position)

    def go_on_from(self, other: Competitor) -> Competitor:
        """Takes over weights, averages, optimiser, noise and the epochs so far."""
        # a copy, since optimisers share the tensors of a state that they load
        self.trainer.load_state_dict(copy.deepcopy(other.trainer.state_dict()))
        self.scheduler.load_state_dict(other.scheduler.state_dict())
        return self

    def train_epoch(self, loader: Iterable) -> None:
        self.trainer.fit(loader, self.trainer.epoch + 1, scheduler=self.scheduler)

    def finish(self, test: Iterable) -> None:
        """Judges both kinds of weights, and writes what a report reads."""
        epochs, attack = self.trainer.epoch, self.settings.attack
        how = {"eps": attack.eps, "step_size": attack.step_size, "norm": attack.norm, "precision": "fp32", "seed": 0}
        for weights, model in (("ema", self.trainer.ema_model), ("last", self.trainer.model)):
            found = ham.evaluate(model, test, ("clean", *ATTACKS), device=self.trainer.device, **how)
            about = {"format": 1, "weights": weights, "epoch": epochs, "classes": self.classes, "part": "test", **how}
            judged = {"images": found["clean"].n, "attacks": {name: asdict(value) for name, value in found.items()}}
            self.run.write_json(f"evaluation/{weights}.json", about | judged)
        self.run.write_metrics(self.trainer.history, self.settings)
        self.run.set_status("finished", epochs, epochs)
        self.run.end_session()


class TorchattacksTrainer(ham.Trainer):
    """PGD-AT as its users write it: torchattacks.PGD in an ordinary loop. Epochs and weight average are ours."""

    @functools.cached_property
    def attack(self):
        import torchattacks

        pgd = self._pgd
        return torchattacks.PGD(self.model, eps=pgd.eps, alpha=pgd.step_size, steps=pgd.steps, random_start=True)

    def train_group(self, batches: Sequence[tuple[Tensor, Tensor]], epoch: int) -> list[ham.StepReport]:
        ((x, y),) = batches
        stopwatch = Stopwatch(x.device)
        self.model.train()
        x_adv = self.attack(x, y)
        loss = F.cross_entropy(self.model(x_adv), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update(self.model)
        self.steps_done += 1
        return [ham.StepReport(loss.item(), len(y), len(y), stopwatch.stop())]


def torchattacks_there() -> bool:
    return importlib.util.find_spec("torchattacks") is not None
