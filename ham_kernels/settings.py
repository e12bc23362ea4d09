"""All that a training run is told: the flags of `ham train`, the keys of its TOML file, the argument of `ham.train`.

Imports no torch, so that the command line can print its help at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import _fields

_RUNS = tyro.conf.arg(help_behavior_hint="(default: the run's)")


@dataclass(frozen=True)
class DataSettings:
    """Images."""

    dataset: str = "digits"
    """digits, cifar10, cifar100, svhn, fashion_mnist, imagenette, imagenette32; for --path whose preset (cifar10's)."""
    path: str | None = None
    """A folder or tar of images to use instead: train/CLASS/NAME and test/CLASS/NAME, or CLASS/NAME (a fifth tests)."""
    root: str = "data"
    """Where named data sets lie, or are downloaded to."""
    download: bool = True
    """Download a named data set that is missing."""
    size: int | None = None
    """Resize to size x size pixels (None: as they are; files of many sizes: 224)."""
    train_images: int | None = None
    """Use only so many training images, class shares kept."""
    test_images: int | None = None
    """Use only so many test images, class shares kept."""
    val_images: int = 160
    """Training images set aside to choose the best checkpoint; 0 for none. The test set never chooses."""
    batch_size: int = 128
    workers: int = 2
    """Processes that decode images which do not fit the device as one tensor."""
    augment: Literal["none", "crop", "crop+flip"] = "none"

    @property
    def source(self) -> str:
        """A short name, for folders."""
        return Path(self.path).resolve().name.split(".")[0] if self.path else self.dataset


@dataclass(frozen=True)
class ModelSettings:
    """Classifier."""

    name: Annotated[str, tyro.conf.arg(name="model")] = "small_cnn"
    """small_cnn, preact_resnet18, wrn_34_10, wrn_28_10, or any torchvision classifier by its name there."""
    normalize: bool = False
    """The data set's mean and std as the model's first layer (where its table has them)."""


@dataclass(frozen=True)
class AttackSettings:
    """Attack in training."""

    eps: float = 8 / 255
    """Budget, in units of images in [0, 1]."""
    step_size: float = 2 / 255
    """Of one attack step."""
    steps: int = 10
    """K, attack steps."""
    norm: Literal["linf", "l2"] = "linf"


@dataclass(frozen=True)
class MethodSettings:
    """Method."""

    name: Annotated[Literal["ham", "pgd_at"], tyro.conf.arg(name="method")] = "ham"
    """Hard adversarial example mining, or plain PGD adversarial training."""
    screen_steps: int = 3
    """M, attack steps before easy examples leave."""
    start_epoch: int = 50
    """First epoch (1-based) with mining; plain PGD-AT before."""
    lam: float = 1.0
    """Lambda of the weights sigmoid(lambda * s), s the largest change of logits in a step; higher is more uniform."""
    reweight: bool = True
    """Weigh hard examples."""
    early_drop: bool = True
    """Let easy examples leave."""
    rows: Literal["hard", "random"] = "hard"
    """Keep the hard rows, or as many random ones (the control experiment)."""
    freeze_bn: bool = False
    """BatchNorm keeps its warm-up statistics while mining."""
    bn_rows: Literal["hard", "all"] = "hard"
    """While mining, BatchNorm's statistics are of the hard rows, or of the whole batch."""
    screen: Literal["steps", "one_step"] = "steps"
    """Screen by M steps, or by one of M times the size."""
    group: int = 1
    """Screen so many batches together, and attack their hard rows together."""
    group_updates: Literal["each", "one"] = "each"
    """A group then makes one update for each of its batches, or one in all."""
    round_to: int = 1
    """Keep a multiple of so many rows; the easy ones of the least margin fill up."""


@dataclass(frozen=True)
class WarmUpSettings:
    """Epochs before start_epoch."""

    name: Annotated[Literal["pgd_at", "n_fgsm", "fgsm_rs"], tyro.conf.arg(name="warm-up")] = "pgd_at"
    """PGD-AT as in the paper; or a one-step attack, watched for catastrophic overfitting."""
    natural_epochs: int = 0
    """So many of them, the first, train on clean images."""


@dataclass(frozen=True)
class OptimSettings:
    """Optimiser: SGD."""

    epochs: int = 120
    """In all, warm-up included. Milestones and start_epoch of presets and --config scale with this flag."""
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 2e-4
    schedule: Literal["step", "cosine", "one_cycle"] = "step"
    """Of the learning rate, epoch by epoch."""
    milestones: tuple[int, ...] = (60, 90, 110)
    """First epochs (1-based) with a lower rate (schedule step)."""
    lr_decay: tuple[float, ...] = (0.1, 0.1, 0.5)
    """Factor at each milestone."""


@dataclass(frozen=True)
class EngineSettings:
    """How steps run on the hardware. "on" goes on without what cannot be served, with a warning; "require" does not."""

    channels_last: Literal["off", "on", "require"] = "off"
    """Weights and images in NHWC order."""
    compile: Literal["off", "on", "require"] = "off"
    """torch.compile of the model as the attack sees it."""
    cuda_graphs: Literal["off", "on", "require"] = "off"
    """Replay attack steps and updates as CUDA graphs."""
    winograd: Literal["off", "on", "require"] = "off"
    """On the CPU, 3x3 convolutions with a quarter of the multiplications."""
    keep_memory: bool = True
    """On the CPU, keep the memory that torch frees in the process."""


@dataclass(frozen=True)
class RunSettings:
    """Run."""

    seed: int = 0
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU."""
    precision: Literal["fp32", "bf16", "fp16", "require-bf16", "require-fp16"] = "fp32"
    """Of forward and backward (autocast)."""
    ema_decay: float | None = 0.99
    """Of the weight average, which is judged beside the last weights; None (TOML: false) for none."""
    val_attack: str = "pgd10"
    """Judges the validation images after each epoch, beside clean accuracy."""
    best_by: Literal["robust", "worst_class"] = "robust"
    """Which validation accuracy under val_attack chooses best.pt."""
    checkpoint_minutes: float = 10.0
    """Within an epoch, a checkpoint at least so often; there is one after each epoch too."""
    label: str | None = None
    """What reports call this run; else what distinguishes its settings."""


@dataclass(frozen=True)
class TrainSettings:
    """One training run. Sections are those of config.toml; a field's name is also its flag."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    attack: AttackSettings = field(default_factory=AttackSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    warm_up: WarmUpSettings = field(default_factory=WarmUpSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def check(self) -> None:
        """What can be told wrong without data or model. Raises: TypeError, ValueError naming field and value."""
        _fields.check(self)
        for section in dataclasses.fields(self):
            _fields.check(getattr(self, section.name), f"{section.name}.")
        optim, method = self.optim, self.method
        for section, names in _AT_LEAST.items():
            for name, low in names.items():
                _at_least(name, getattr(getattr(self, section), name), low)
        for name, value, below in (("momentum", optim.momentum, 1), ("ema_decay", self.run.ema_decay, 1)):
            if value is not None and not 0 <= value < below:
                raise ValueError(f"{name}: got {value}; it must be >= 0 and below {below}")
        if not math.isfinite(optim.lr):
            raise ValueError(f"lr: got {optim.lr}; it must be finite")
        if method.name == "ham" and method.screen_steps >= self.attack.steps:
            raise ValueError(f"screen_steps: got {method.screen_steps} with steps={self.attack.steps}; it must be less")
        if len(optim.milestones) != len(optim.lr_decay):
            raise ValueError(
                f"lr_decay: got {len(optim.lr_decay)} factors for {len(optim.milestones)} milestones; give one each"
            )
        if method.name == "ham" and not (method.early_drop or method.reweight):
            raise ValueError("method: ham without early_drop and reweight is PGD-AT; say method pgd_at")
        if method.name == "ham" and method.start_epoch > optim.epochs:
            raise ValueError(
                f"start_epoch: got {method.start_epoch} with epochs={optim.epochs}, so mining would never start"
            )
        if re.fullmatch(r"fgsm|(pgd|cw)[1-9]\d*", self.run.val_attack) is None:
            raise ValueError(f"val_attack: got {self.run.val_attack!r}; allowed are fgsm, pgdK, cwK such as pgd10")
        if method.freeze_bn and method.bn_rows == "all":
            raise ValueError("bn_rows: got 'all' with freeze_bn; frozen statistics come from no rows of the batch")
        if method.round_to > 1 and method.group > 1 and method.group_updates == "each":
            raise ValueError(
                f"round_to: got {method.round_to} with group={method.group}; rows are rounded for one update of a group"
            )
        last = min(method.start_epoch - 1, optim.epochs)
        if self.warm_up.natural_epochs > last:
            raise ValueError(
                f"natural_epochs: got {self.warm_up.natural_epochs}, but there are {last} epochs before start_epoch"
            )

    def trainer_options(self) -> dict[str, Any]:
        """The keyword arguments of HAMTrainer, device aside."""
        m, choice = self.method, {"off": False, "on": True, "require": "require"}
        plain = m.name == "pgd_at"
        return {
            "eps": self.attack.eps, "step_size": self.attack.step_size, "steps": self.attack.steps,
            "norm": self.attack.norm, "screen_steps": m.screen_steps, "start_epoch": m.start_epoch, "lam": m.lam,
            "reweight": m.reweight and not plain, "early_drop": m.early_drop and not plain, "rows": m.rows,
            "freeze_bn": m.freeze_bn, "bn_rows": m.bn_rows, "ema_decay": self.run.ema_decay,
            "precision": self.run.precision, "seed": self.run.seed, "screen": m.screen, "group": m.group,
            "group_updates": m.group_updates, "round_to": m.round_to, "warm_up": self.warm_up.name,
            "natural_epochs": self.warm_up.natural_epochs, "channels_last": choice[self.engine.channels_last],
            "compile": choice[self.engine.compile], "cuda_graphs": choice[self.engine.cuda_graphs],
            "winograd": choice[self.engine.winograd], "keep_memory": self.engine.keep_memory,
        }  # fmt: skip


@dataclass(frozen=True)
class EvaluateSettings:
    """How a run is judged."""

    weights: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help_behavior_hint="(default: ema where the run keeps a weight average, else last)"),
    ] = ()
    """Of last, ema (both of the last epoch), best, best_ema (of the epoch that the validation images chose); or all."""
    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd20", "cw20")
    """clean, fgsm, pgdK, cwK (PGD on the CW loss), autoattack."""
    restarts: int = 1
    """Random starts of pgdK and cwK; an image counts as robust if it resists all."""
    eps: Annotated[float | None, _RUNS] = None
    """Budget, in units of images in [0, 1]."""
    step_size: Annotated[float | None, _RUNS] = None
    """Of one attack step."""
    part: Literal["test", "val", "train"] = "test"
    images: int | None = None
    """Judge only so many images of the part, class shares kept."""
    batch_size: int = 256
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    masking: bool = True
    """Check for gradient masking."""
    masking_images: int = 512
    transfer_from: Path | None = None
    """Another run, whose adversarial examples should not be stronger than this run's own."""
    analyses: bool = True
    """Over-confident adversarial examples, and which easy ones stay easy (on training images)."""
    analysis_images: int = 2048
    threshold: float = 0.9
    """Confidence from which an adversarial example counts as over-confident."""

    def check(self) -> None:
        """What can be told wrong without a run. Raises: TypeError, ValueError naming the field and its value."""
        _fields.check(self)
        low = {"images": 1, "restarts": 1, "batch_size": 1, "seed": 0, "masking_images": 2, "analysis_images": 1}
        for name, least in low.items():
            _at_least(name, getattr(self, name), least)
        _at_least("eps", self.eps, 0)
        _at_least("step_size", self.step_size, 0)
        if not 0.5 < self.threshold <= 1:
            raise ValueError(f"threshold: got {self.threshold}; it must be in (0.5, 1]")
        if not self.attacks:
            raise ValueError("attacks: got none; give at least one, such as clean pgd20")


def _at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and not value >= low:
        raise ValueError(f"{name}: got {value}; it must be >= {low}")


_AT_LEAST = {
    "data": {"train_images": 1, "test_images": 1, "val_images": 0, "batch_size": 1, "workers": 0, "size": 1},
    "attack": {"eps": 0.0, "step_size": 0.0, "steps": 1},
    "method": {"start_epoch": 1, "screen_steps": 1, "lam": 0.0, "group": 1, "round_to": 1},
    "warm_up": {"natural_epochs": 0},
    "optim": {"epochs": 1, "lr": 0.0, "momentum": 0.0, "weight_decay": 0.0},
    "run": {"seed": 0, "checkpoint_minutes": 0.0},
}


def lr_factor(optim: OptimSettings, epoch: int) -> float:
    """Learning rate of an epoch (1-based) over the one set.

    step: the decays reached so far. cosine: to 0 after the last epoch. one_cycle: up for 2/5 of them, down to 0.
    """
    if optim.schedule == "step":
        return math.prod(d for m, d in zip(optim.milestones, optim.lr_decay, strict=True) if epoch >= m)
    done = (epoch - 0.5) / optim.epochs
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return min(done / 0.4, (1 - done) / 0.6)
