"""`--teacher`: the classifier that a distilling method learns from, and a digest by which it is known again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.named import is_architecture
from ..models.weights import Brought, brought, lay, read_weights
from ..runs.folder import RunFolder
from ..runs.places import found_again
from ..runs.settings import TrainSettings
from .from_settings import model_of, trained_model


def with_its_digest(settings: TrainSettings) -> TrainSettings:
    """Settings that tell the weights of their teacher, so that no other takes its place.

    Raises: FileNotFoundError, ValueError, ImportError naming `teacher`.
    """
    if settings.run.teacher is None:
        return settings
    found = digest(_found(settings.run.teacher).state)
    _check_digest(settings, found)
    return replace(settings, run=replace(settings.run, teacher_digest=found))


def place_of(settings: TrainSettings, run: RunFolder | None = None) -> dict[str, dict[str, str]]:
    """What a run notes of where its teacher lies; of one that goes on (`run`) it is looked for there first."""
    given = settings.run.teacher
    if given is None:
        return {}
    again = {} if run is None else found_again({"teacher": given}, run.places())
    return {"teacher": {"given": given, "absolute": os.path.abspath(again.get("teacher", given))}}


def teacher_of(
    settings: TrainSettings, places: dict[str, dict[str, str]], classes: Sequence[str], channels: int,
    device: torch.device,
) -> nn.Module | None:  # fmt: skip
    """The teacher in eval mode. Of a run it is that run's model; a checkpoint's weights are of the student's model.

    places: of `place_of`. classes: names, which a run must know alike. torch's random generators stay where they are.
    Raises: as `with_its_digest`, and where its weights are others than the settings tell.
    """
    if settings.run.teacher is None:
        return None
    name = places["teacher"]["absolute"]
    found = _found(name)
    _check_digest(settings, digest(found.state))
    if Path(name).is_dir():
        run = RunFolder.open(name)
        facts = run.data_facts()
        if (len(facts["classes"]), facts["channels"]) != (len(classes), channels):
            raise ValueError(
                f"teacher: {name} knows {len(facts['classes'])} classes of images with {facts['channels']} channels; "
                f"the training has {len(classes)} and {channels}"
            )
        for theirs, ours in zip(facts["classes"], classes, strict=True):
            if theirs != ours:
                raise ValueError(
                    f"teacher: {name} knows class {theirs!r} where these images have {ours!r}; its classes must be "
                    "theirs, by the same names"
                )
        return trained_model(run.settings(), facts, found.state, device)
    if found.mean is not None and is_architecture(settings.model.name):
        settings = replace(settings, model=replace(settings.model, mean=found.mean, std=found.std))
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        model = model_of(settings, len(classes), channels)
    lay(model, found.state, source=f"teacher: {name}")
    return model.to(device).eval()


def digest(state: dict[str, Tensor]) -> str:
    """Of names and values, whatever file they lie in."""
    found = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _check_digest(settings: TrainSettings, found: str) -> None:
    told = settings.run.teacher_digest
    if told is not None and told != found:
        raise ValueError(
            f"teacher: the weights of {settings.run.teacher} have the digest {found}, the run's teacher has {told}; "
            "another teacher needs a new run"
        )


def _found(name: str) -> Brought:
    try:
        if not Path(name).is_dir():
            return read_weights(name)
        run = RunFolder.open(name)
        return brought(run.load_weights(run.usual_weights())["model"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"teacher: {str(error).split(': ', 1)[-1]}; or a run's folder") from error
    except ValueError as error:
        raise type(error)(f"teacher: {str(error).split(': ', 1)[-1]}") from error
