"""From settings to model, optimiser and trainer: the one place where names become objects."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from .. import data, models
from ..common import checks
from ..distributed import ALONE, TIMEOUT, Ranks, ranks_of, start
from ..engine import modes_kept
from ..methods.class_weights import count_weights
from ..runs.folder import RunFolder
from ..runs.settings import TrainSettings, lr_factor
from ..training.trainer import Trainer
from .logs import check_installed


def device_of(name: str) -> torch.device:
    """ "auto": the GPU if there is one. Raises: ValueError for a device that torch does not have here."""
    if name in ("auto", "cuda") and torch.cuda.is_available() and ranks_of().several:
        return torch.device("cuda", torch.cuda.current_device())  # each process has its own
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}; allowed are auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}; allowed are auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ValueError(f"device: got {name!r}; torch finds {torch.cuda.device_count()} CUDA devices here")
    return device


def join(device: str, timeout: timedelta = TIMEOUT) -> Ranks:
    """The processes of torchrun, as `distributed.start` joins them; on the CPU by gloo, whatever GPUs there are."""
    return start("gloo" if device == "cpu" else None, timeout)


def check_before_data(settings: TrainSettings, device: torch.device) -> None:
    """What can be refused before a data set is read or fetched: the model's name, and settings that exclude each other.

    Raises: TypeError, ValueError naming the setting; EngineError; ImportError for a log whose package is missing.
    """
    check_installed(settings.run.log)
    if not models.is_known(settings.model.name):
        bare = replace(settings.model, normalize=False, mean=None, std=None)
        model_of(replace(settings, model=bare), 2, 3)  # tells which names are close
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # given when the trainer is made
        trainer_of(settings, nn.Linear(1, 1), device, teacher=nn.Identity() if settings.run.teacher else None)


def check_takes(model: nn.Module, name: str, loader, classes: int, argument: str = "model") -> torch.Tensor:
    """The logits of a loader's first two images. Raises: TypeError, ValueError where a model cannot take such images,
    returns no logits, or knows other classes."""
    x, _ = next(iter(loader))
    x = x[:2].clone()
    before = x._version
    try:
        with modes_kept(model), torch.no_grad():
            logits = model.eval()(x)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{argument}: {name} cannot take images of shape {tuple(x.shape[1:])}: {error}") from error
    if x._version != before:
        raise ValueError(f"{argument}: {name} writes into its images; it must leave them (clone them first)")
    if not isinstance(logits, torch.Tensor):
        checks.model_output(logits, len(x))
    if tuple(logits.shape) != (len(x), classes):
        shape = tuple(logits.shape)
        raise ValueError(
            f"{argument}: {name} gives {shape} for 2 images of {classes} classes; it must be (2, {classes})"
        )
    return logits


def model_of(settings: TrainSettings, classes: int, channels: int) -> nn.Module:
    """The classifier with its first weights, which depend on the seed.

    Raises: ValueError, TypeError, ImportError, FileNotFoundError naming the setting.
    """
    m = settings.model
    facts = data.SETS.get(settings.data.dataset) if m.normalize and m.mean is None else None
    mean, std = (facts.mean, facts.std) if facts else (m.mean, m.std)
    torch.manual_seed(settings.run.seed)
    try:
        return models.create(m.name, classes, channels=channels, mean=mean, std=std)
    except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
        if str(error).startswith(("mean: ", "std: ")):
            if facts is None:
                where = settings.data.path or settings.data.dataset
                raise ValueError(
                    f"{error}; the images are those of {where}: give others by --path or --dataset"
                ) from error
            raise ValueError(
                f"normalize: {settings.data.dataset}'s mean and std are of {len(mean)} channels, and the images have "
                f"{channels}; give --no-normalize, or --mean and --std"
            ) from error
        raise type(error)(f"model: {str(error).removeprefix('name: ')}") from error  # the flag is --model


def load_model(run: str | Path, weights: str = "ema", device: torch.device | str = "auto") -> nn.Module:
    """A trained classifier in eval mode: images (n, C, H, W) in [0, 1] -> logits (n, classes).

    Args:
        run: a run folder of `ham train`.
        weights: "last", "ema" (their average), "best" or "best_ema" (of the best epoch on validation images).
        device: "auto" takes the GPU if there is one.
    Raises: FileNotFoundError, ValueError naming the argument; CheckpointError for a damaged file.
    """
    folder = RunFolder.open(run)
    settings, state = folder.settings(), folder.load_weights(weights)
    facts = folder.data_facts()
    return trained_model(settings, facts, state["model"], device_of(str(device)))


def trained_model(settings: TrainSettings, facts: dict, state: dict, device: torch.device) -> nn.Module:
    """The classifier with these weights, in eval mode; torch's random generators stay where they are."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        model = model_of(settings, len(facts["classes"]), facts["channels"])
    try:
        checks.state_fits(settings.model.name, model, state)
    except ValueError as error:
        raise ValueError(
            f"model: {settings.model.name} makes another model than it did for this run: {error}"
        ) from error
    model.load_state_dict(state)
    return model.to(device).eval()


def loaders_of(
    settings: TrainSettings, images: data.ImageSet | data.FileSet, device: torch.device, ranks: Ranks = ALONE
) -> data.Loaders:
    d = settings.data
    settings.check_numbered(in_files=isinstance(images, data.FileSet))
    return data.loaders(
        images, d.batch_size, seed=settings.run.seed, augment=d.augment, balanced=d.balance == "sampler", device=device,
        workers=d.workers, generated_share=d.generated_share, rank=ranks.rank, world=ranks.world,
    )  # fmt: skip


def optimizer_of(settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    o = settings.optim
    if o.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    return torch.optim.AdamW(model.parameters(), o.lr, betas=o.adam_betas, eps=o.adam_eps, weight_decay=o.weight_decay)


def trainer_of(
    settings: TrainSettings, model: nn.Module, device: torch.device, counts: Sequence[int] | None = None,
    teacher: nn.Module | None = None,
) -> Trainer:  # fmt: skip
    """counts: training images of each class, for balance="weights"."""
    model, run = model.to(device), settings.run
    weights = count_weights(counts) if counts is not None and settings.data.balance == "weights" else None
    return Trainer(
        model, optimizer_of(settings, model), settings.method, **asdict(settings.attack), **asdict(settings.engine),
        device=device, ema_decay=run.ema_decay, precision=run.precision, seed=run.seed, warm_up=settings.warm_up.name,
        natural_epochs=settings.warm_up.natural_epochs, grad_clip=settings.optim.grad_clip, loss_weights=weights,
        teacher=teacher,
    )  # fmt: skip


def scheduler_of(settings: TrainSettings, trainer: Trainer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda done: lr_factor(settings.optim, done + 1))
