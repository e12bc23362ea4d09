"""All that a training run is told: the flags of `ham train`, the keys of its TOML file, the argument of `ham.train`.

Imports no torch, so that the command line can print its help at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Gt, Lt

from ..common import field_types
from ..common.field_types import Words
from ..data.table import GENERATED_SHARE, IN_MEMORY, SETS, generated_rows
from ..methods.ham import HAM
from ..methods.registry import warm_up_of
from ..methods.settings import Method


@dataclass(frozen=True)
class ImageSettings:
    """Images."""

    dataset: str = "digits"
    """digits, cifar10, cifar100, svhn, fashion_mnist, imagenette, imagenette32, imagenet; with --path, whose preset
    is used as it is (without it, settings that fit the folder)."""
    path: str | None = None
    """A folder or tar of images to use instead: train/CLASS/NAME and test/CLASS/NAME, or CLASS/NAME (a fifth tests);
    or a folder of IDX files."""
    root: str = "data"
    """Where named data sets lie, or are downloaded to."""
    download: bool = True
    """Download a named data set that is missing."""
    size: Annotated[int | None, Ge(1)] = None
    """Resize to size x size pixels (None: as they are; files of many sizes: 224)."""
    test_images: Annotated[int | None, Ge(1)] = None
    """Use only so many test images, class shares kept."""
    workers: Annotated[int, Ge(0)] = 2
    """Processes that decode images which do not fit the device as one tensor."""

    @property
    def source(self) -> str:
        """A short name, for folders."""
        return Path(self.path).resolve().name.split(".")[0] if self.path else self.dataset

    @property
    def in_files(self) -> bool:
        """Whether they are read file by file in each epoch, as far as the settings tell; those of `path` may be too."""
        large = self.size is None or self.size > IN_MEMORY
        return self.path is None and large and self.dataset in SETS and not SETS[self.dataset].in_memory


@dataclass(frozen=True)
class DataSettings(ImageSettings):
    """Images."""

    train_images: Annotated[int | None, Ge(1), Words("{} training images")] = None
    """Use only so many training images, class shares kept."""
    val_images: Annotated[int, Ge(0)] = 160
    """Training images set aside to choose the best checkpoint; 0 for none. The test set never chooses. A val/ part of
    the folder's own takes their place, whole."""
    batch_size: Annotated[int, Ge(1), Words("batch={}")] = 128
    augment: Annotated[Literal["none", "crop", "crop+flip"], Words("augment={}")] = "none"
    balance: Annotated[
        Literal["none", "weights", "sampler"],
        Words(by_value=(("weights", "classes weighed by count"), ("sampler", "balanced sampler"))),
    ] = "none"
    """For classes with unlike many images. weights: rows weigh by how few their class has, 1 on average, on top of the
    method's weights. sampler: rows are drawn with replacement, all classes equally often."""
    generated: Annotated[str | None, Words("with {}")] = None
    """An .npz of generated images to train on too: arrays image, uint8 (n, height, width, channels), and label (n,)."""
    generated_share: Annotated[float, Gt(0), Lt(1), Words("{} generated")] = GENERATED_SHARE
    """Of the rows of each training batch; an epoch has as many batches as without."""

    def check(self) -> None:
        """Raises: ValueError naming the field."""
        if self.generated is None:
            if self.generated_share != GENERATED_SHARE:
                raise ValueError(
                    f"generated_share: got {self.generated_share:g}, which has no effect without generated"
                )
            return
        generated_rows(self.batch_size, self.generated_share)
        if self.balance != "none":
            raise ValueError(
                f"balance: got {self.balance!r} with generated images, which a batch has a fixed share of; it must be "
                "'none'"
            )


@dataclass(frozen=True)
class ModelSettings:
    """Classifier."""

    name: Annotated[str, tyro.conf.arg(name="model"), Words("{}")] = "small_cnn"
    """small_cnn, preact_resnet18 (for weights of others also preact_resnet18_kuangliu, preact_resnet18_wong),
    wrn_34_10, wrn_28_10; a torchvision classifier by its name there; timm:NAME; MODULE:FUNCTION, which makes one;
    robustbench:NAME, with its weights."""
    normalize: bool = False
    """The data set's mean and std as the model's first layer (where its table has them). On the command line,
    --normalize MEAN STD is --mean MEAN --std STD."""
    mean: tuple[float, ...] | None = None
    """Of a normalisation as the model's first layer, one value per channel, in place of the data set's."""
    std: tuple[float, ...] | None = None

    def check(self) -> None:
        """Raises: ValueError naming the field."""
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"{'mean' if self.mean is None else 'std'}: got None; give both mean and std, or neither")


@dataclass(frozen=True)
class AttackSettings:
    """Attack in training."""

    eps: Annotated[float, Ge(0), Words("ε={}")] = 8 / 255
    """Budget, in units of images in [0, 1]."""
    step_size: Annotated[float, Ge(0), Words("step={}")] = 2 / 255
    """Of one attack step."""
    steps: Annotated[int, Ge(1), Words("K={}")] = 10
    """K, attack steps."""
    norm: Annotated[Literal["linf", "l2"], Words("{}")] = "linf"


@dataclass(frozen=True)
class WarmUpSettings:
    """Epochs before start_epoch."""

    name: Annotated[
        str,
        tyro.conf.arg(name="warm-up"),
        Words("after {}", by_value=(("n_fgsm", "after N-FGSM"), ("fgsm_rs", "after FGSM-RS")), off="pgd_at"),
    ] = "pgd_at"
    """PGD-AT as in HAM's paper, or another method; one-step attacks are watched for catastrophic overfitting."""
    natural_epochs: Annotated[int, Ge(0), Words("{} natural epochs", off=0, scales=True)] = 0
    """So many of them, the first, train on clean images."""


@dataclass(frozen=True)
class OptimSettings:
    """Optimiser."""

    epochs: Annotated[int, Ge(1), Words("{} epochs")] = 120
    """In all, warm-up included. Milestones and start_epoch of presets and --config scale with this flag."""
    optimizer: Annotated[Literal["sgd", "adamw"], Words(by_value=(("adamw", "AdamW"),))] = "sgd"
    """AdamW takes a smaller lr: on the command line 0.001, where neither --lr nor --config says one."""
    lr: Annotated[float, Ge(0), Words("lr={}")] = 0.1
    momentum: Annotated[float, Ge(0), Lt(1), Words("momentum {}")] = 0.9
    """Of SGD."""
    adam_betas: Annotated[tuple[float, ...], Ge(0), Lt(1), Words("betas {}")] = (0.9, 0.999)
    """Of AdamW: shares of the two averages that stay from update to update."""
    adam_eps: Annotated[float, Gt(0), Words("AdamW's eps {}")] = 1e-8
    """Of AdamW, in the denominator."""
    weight_decay: Annotated[float, Ge(0)] = 2e-4
    """As torch has it: SGD adds it to the gradient, AdamW takes lr * weight_decay of each weight."""
    grad_clip: Annotated[float, Ge(0), Words("gradients clipped at {}", off=0.0)] = 0.0
    """Largest norm of the gradients of all weights together; larger ones are scaled down to it. 0: off."""
    schedule: Annotated[Literal["step", "cosine", "one_cycle"], Words("{} schedule")] = "step"
    """Of the learning rate, epoch by epoch."""
    milestones: Annotated[tuple[int, ...], Ge(1), Words(scales=True)] = (60, 90, 110)
    """First epochs (1-based) with a lower rate (schedule step)."""
    lr_decay: Annotated[tuple[float, ...], Ge(0), Words(scales=True)] = (0.1, 0.1, 0.5)
    """Factor at each milestone."""

    def check(self) -> None:
        """Raises: ValueError naming a field of the other optimiser that is told, and has no effect."""
        for name in ("momentum",) if self.optimizer == "adamw" else ("adam_betas", "adam_eps"):
            if getattr(self, name) != getattr(OptimSettings, name):
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, which has no effect with optimizer={self.optimizer}"
                )


def _told(word: str) -> Words:
    return Words(by_value=(("on", word), ("require", word)), apart=True)


@dataclass(frozen=True)
class EngineSettings:
    """How steps run on the hardware. "on" goes on without what cannot be served, with a warning; "require" does not."""

    channels_last: Annotated[Literal["off", "on", "require"], _told("channels_last")] = "off"
    """Weights and images in NHWC order."""
    compile: Annotated[Literal["off", "on", "require"], _told("compiled")] = "off"
    """torch.compile of the model as the attack sees it."""
    cuda_graphs: Annotated[Literal["off", "on", "require"], _told("CUDA graphs")] = "off"
    """Replay attack steps and updates as CUDA graphs."""
    winograd: Annotated[Literal["off", "on", "require"], _told("Winograd")] = "off"
    """On the CPU, 3x3 convolutions with a quarter of the multiplications."""
    keep_memory: bool = True
    """On the CPU, keep the memory that torch frees in the process."""


@dataclass(frozen=True)
class RunSettings:
    """Run."""

    seed: Annotated[int, Ge(0)] = 0
    device: Annotated[str, Words("{}")] = "auto"
    """auto: the GPU if there is one, else the CPU."""
    precision: Annotated[Literal["fp32", "bf16", "fp16", "require-bf16", "require-fp16"], Words("{}")] = "fp32"
    """Of forward and backward (autocast)."""
    ema_decay: Annotated[float | None, Ge(0), Lt(1), Words("EMA={}")] = 0.99
    """Of the weight average, which is judged beside the last weights; None (TOML: false) for none."""
    weights: Annotated[str | None, Words("{}")] = None
    """Begin with the weights of a FILE, of a RUN's folder, or of imagenet (torchvision's and timm's models): by a
    tenth of the learning rate, with a new head for other classes."""
    teacher: str | None = None
    """The classifier that a distilling method learns from: a RUN's folder, or a CHECKPOINT of the same model."""
    teacher_digest: str | None = None
    """Of the teacher's weights; written by ham train, so that the run does not go on with another."""
    val_attack: str = "pgd10"
    """Judges the validation images after each epoch, beside clean accuracy."""
    best_by: Literal["robust", "worst_class"] = "robust"
    """Which validation accuracy under val_attack chooses best.pt."""
    checkpoint_minutes: Annotated[float, Ge(0)] = 10.0
    """Within an epoch, a checkpoint at least so often; there is one after each epoch too."""
    log: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Numbers of each epoch, those of each class included, go to one or several of these too, in the run's folder."""
    label: str | None = None
    """What reports call this run; else what distinguishes its settings."""


@dataclass(frozen=True)
class TrainSettings:
    """One training run. Sections are those of config.toml; a field's name is also its flag."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    attack: AttackSettings = field(default_factory=AttackSettings)
    method: Method = field(default_factory=HAM)
    optim: OptimSettings = field(default_factory=OptimSettings)
    warm_up: WarmUpSettings = field(default_factory=WarmUpSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def check(self) -> None:
        """What can be told wrong without data or model. Raises: TypeError, ValueError naming field and value."""
        field_types.check(self)
        for section in dataclasses.fields(self):
            field_types.check(getattr(self, section.name), f"{section.name}.")
        check_step(self.attack.step_size, self.attack.norm)
        optim, method = self.optim, self.method
        method.attack_steps(self.attack.steps)
        self.data.check()
        self.model.check()
        self.optim.check()
        if optim.schedule == "step" and len(optim.milestones) != len(optim.lr_decay):
            raise ValueError(
                f"lr_decay: got {len(optim.lr_decay)} factors for {len(optim.milestones)} milestones; give one each"
            )
        if len(optim.adam_betas) != 2:
            raise ValueError(f"adam_betas: got {optim.adam_betas}; it must be two numbers, such as 0.9 0.999")
        warm_up = self.warm_up
        before = warm_up_of(method, warm_up.name)
        if method.start_epoch > optim.epochs and (before != method or warm_up.natural_epochs):
            raise ValueError(
                f"start_epoch: got {method.start_epoch} with epochs={optim.epochs}, so {method.name} would never start"
            )
        self.check_numbered(self.data.in_files)
        for name, first, until in method.begins():
            if first > optim.epochs:
                raise ValueError(
                    f"{name}: got {first} with epochs={optim.epochs}, so {method.name} would never tell {until} apart"
                )
        if method.needs_teacher != (self.run.teacher is not None):
            raise ValueError(
                f"teacher: got None; {method.title} learns from one: give a run's folder or a checkpoint"
                if method.needs_teacher
                else f"teacher: got {self.run.teacher!r}, and {method.title} learns from none"
            )
        if method.tunes_only and self.run.weights is None:
            raise ValueError(
                f"method: got {method.name!r}, which trains no model from the start; give --from RUN or a checkpoint"
            )
        if method.gate and self.run.ema_decay is not None and not self.data.val_images:
            raise ValueError(f"gate: got {method.gate:g} with val_images=0; it is judged by validation images")
        if re.fullmatch(r"fgsm|(pgd|cw)[1-9]\d*", self.run.val_attack) is None:
            raise ValueError(f"val_attack: got {self.run.val_attack!r}; allowed are fgsm, pgdK, cwK such as pgd10")
        last = min(method.start_epoch - 1, optim.epochs)
        if warm_up.natural_epochs > last:
            raise ValueError(
                f"natural_epochs: got {warm_up.natural_epochs}, but there are {last} epochs before start_epoch"
            )

    def check_numbered(self, in_files: bool) -> None:
        """Raises: ValueError where a method remembers each image by its number, and their loader tells none."""
        numberless = "images of files" if in_files else "generated images" if self.data.generated is not None else None
        methods = {"warm_up": warm_up_of(self.method, self.warm_up.name), "method": self.method}
        for setting, method in methods.items():
            if numberless and method.knows_images:
                raise ValueError(
                    f"{setting}: got {method.name!r}, which goes on from what it remembers of each image; {numberless} "
                    "come without a number to know them by"
                )


def check_step(size: float, norm: str, name: str = "step_size") -> None:
    """A step or a budget of more than white from black is a mistake in the unit. Raises: ValueError."""
    if norm == "linf" and size > 1:
        raise ValueError(
            f"{name}: got {size:g}, but images are in [0, 1]; it must be at most 1 under linf (did you mean "
            f"{size:g}/255?)"
        )


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
