"""`--weights`: what a training begins with in place of random weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.named import is_architecture, of_timm
from ..models.weights import Brought, brought, head_of, lay, read_weights
from ..report.comparing.forwards import passes, total_forwards
from ..report.reading.runs import read_run
from ..runs.folder import RunFolder
from ..runs.settings import TrainSettings

IMAGENET = "imagenet"
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that GoogLeNet and Inception have for their own training


def with_their_normalisation(settings: TrainSettings) -> TrainSettings:
    """Settings whose model normalises as the weights that it begins with, unless they tell how.

    Raises: FileNotFoundError, ValueError, ImportError naming `weights`.
    """
    m = settings.model
    if settings.run.weights is None or m.mean is not None or not is_architecture(m.name):
        return settings
    found = _found(settings)
    if found.mean is None:
        return settings
    return replace(settings, model=replace(m, mean=found.mean, std=found.std))


def begin_with(settings: TrainSettings, model: nn.Module, classes: Sequence[str]) -> str:
    """Lays the weights that the settings name into a model; returns what there is to say of it.

    classes: names, as the model is to know them. Where a run knew others, also as many, the head stays as it is.
    Raises: FileNotFoundError, ValueError, ImportError naming `weights`.
    """
    name = settings.run.weights
    head = {k: v.clone() for k, v in model.state_dict().items() if k in head_of(model)}
    new = lay(model, _found(settings).state, source=f"weights: {name}", new_head=True)
    if not new and _others(name, classes):
        if not head:
            raise ValueError(f"weights: {name} knows other classes, and no linear layer ends the model, to be new")
        model.load_state_dict(head, strict=False)
        new = list(head)
    if new and settings.method.tunes_only:
        raise ValueError(
            f"weights: {name} knows other classes, so that {', '.join(new)} would be random, and "
            f"{settings.method.title} trains nothing else; train by another method first"
        )
    return f"begins with the weights of {name}" + (f"; new, for other classes: {', '.join(new)}" if new else "")


def _others(name: str, classes: Sequence[str]) -> bool:
    """Whether these are the weights of a run that knows other classes than these, or in another order."""
    return name != IMAGENET and Path(name).is_dir() and RunFolder.open(name).data_facts()["classes"] != list(classes)


def cost_of(name: str) -> dict[str, Any]:
    """What first weights are, and have cost: {"weights": absolute path}, and of a run "run": its method; "epochs" of
    the training that began with random weights, times its updates of each batch; "seconds", "cpu_seconds", "forwards"
    (full-batch ones) of all of them.
    """
    if name == IMAGENET:
        return {"weights": name}
    told: dict[str, Any] = {"weights": os.path.abspath(name)}
    if not Path(name).is_dir():
        return told
    run = read_run(name)
    method = run.label or (run.method.describe(run.warm_up) if run.method else run.name)
    return told | {
        "run": method, "epochs": passes(run), "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds, "forwards": total_forwards(run),
    }  # fmt: skip


def _found(settings: TrainSettings) -> Brought:
    name = settings.run.weights
    if name == IMAGENET:
        return _of_imagenet(settings.model.name)
    try:
        return _of_run(name) if Path(name).is_dir() else read_weights(name)
    except FileNotFoundError as error:
        what = f"{str(error).split(': ', 1)[-1]}; or a run's folder, or {IMAGENET}"
        raise FileNotFoundError(f"weights: {what}") from error
    except ValueError as error:
        raise type(error)(f"weights: {str(error).split(': ', 1)[-1]}") from error


def _of_run(path: str) -> Brought:
    """Its weight average, where it has one."""
    run = RunFolder.open(path)
    return brought(run.load_weights(run.usual_weights())["model"])


def _of_imagenet(model: str) -> Brought:
    source, colon, name = model.partition(":")
    if source == "timm" and colon:
        return _of_timm(name)
    try:
        from torchvision import models

        weights = models.get_model_weights(model).DEFAULT
    except (ImportError, ValueError) as error:
        raise ValueError(f"weights: {IMAGENET} has none for {model}; torchvision's and timm's models have") from error
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise FileNotFoundError(f"weights: {weights.url} cannot be reached ({error}); put it at {place}") from error
    found = brought({k: v for k, v in state.items() if not k.startswith(_AUXILIARY)})
    transform = weights.transforms()
    found.mean, found.std = tuple(transform.mean), tuple(transform.std)
    return found


def _of_timm(name: str) -> Brought:
    try:
        model = of_timm(name, pretrained=True)
    except (ValueError, ImportError) as error:
        raise type(error)(f"weights: {str(error).removeprefix('name: ')}") from error
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"weights: those of timm:{name} cannot be downloaded ({str(error).splitlines()[0]}); copy them to a file, "
            "and give that"
        ) from error
    found, told = brought(model.state_dict()), model.pretrained_cfg
    found.mean, found.std = tuple(told["mean"]), tuple(told["std"])
    return found
