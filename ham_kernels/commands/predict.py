"""`ham predict`: classes of image files, by a run or by an export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..data.files import RESIZE, decode, open_image
from ..runs.folder import RunFolder
from .export import ABOUT, PROGRAM, about_of
from .from_settings import device_of, trained_model
from .options import Predict
from .progress import say


def predict(wanted: Predict) -> list[dict]:
    """[{"file", "class", "probability", "top": [[class, probability], ...]}] of the files, which it also says.

    Raises: FileNotFoundError, ValueError naming the argument or the file.
    """
    if not wanted.files:
        raise ValueError("files: got none; give at least one image")
    device = device_of(wanted.device)
    model, about = _model(wanted, device)
    found = []
    for names, x in _batches(wanted, about):
        with torch.no_grad():
            probabilities = model(x.to(device)).float().softmax(1).cpu()
        values, classes = probabilities.topk(min(wanted.top, probabilities.shape[1]), dim=1)
        for name, v, c in zip(names, values.tolist(), classes.tolist(), strict=True):
            top = [[about["classes"][i], p] for i, p in zip(c, v, strict=True)]
            found.append({"file": name, "class": top[0][0], "probability": top[0][1], "top": top})
            if not wanted.json:
                say(f"{name}: " + ", ".join(f"{label} {100 * p:.1f} %" for label, p in top))
    if wanted.json:
        say(json.dumps(found, indent=1))
    return found


def _model(wanted: Predict, device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict]:
    if (wanted.source / ABOUT).is_file():
        if wanted.weights is not None:
            raise ValueError(f"weights: got {wanted.weights!r}, but {wanted.source} is an export, which holds one kind")
        if not (wanted.source / PROGRAM).is_file():
            raise FileNotFoundError(f"source: {wanted.source} holds no {PROGRAM}; export it with --formats pt2")
        held = {ABOUT: ""}
        program = torch.export.load(wanted.source / PROGRAM, extra_files=held)
        return program.module().to(device), json.loads(held[ABOUT])
    try:
        run = RunFolder.open(wanted.source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"source: {wanted.source} is neither a run nor an export") from error
    kind = wanted.weights or run.usual_weights()
    state = run.load_weights(kind)
    return trained_model(run.settings(), run.data_facts(), state["model"], device), about_of(run, kind, state)


def _batches(wanted: Predict, about: dict) -> Iterator[tuple[list[str], Tensor]]:
    files = [str(file) for file in wanted.files]
    for first in range(0, len(files), wanted.batch_size):
        names = files[first : first + wanted.batch_size]
        yield names, torch.stack([_image(name, about["input"]) for name in names])


def _image(name: str, size: dict) -> Tensor:
    """float32 (C, H, W) in [0, 1], resized as the test images of the training were."""
    if not Path(name).is_file():
        raise FileNotFoundError(f"files: {name} is not a file")
    try:
        whole = size["resize"] != "centre crop"
        x = decode(name, size=(size["height"], size["width"])) if whole else _cropped(name, size["height"])
    except ValueError as error:
        raise ValueError(f"files: {str(error).removeprefix('path: ')}") from error
    if size["channels"] == 1:
        x = (x.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    return x.float() / 255


def _cropped(name: str, size: int) -> Tensor:
    from torchvision.transforms import v2

    steps = v2.Compose([v2.Resize(round(size * RESIZE)), v2.CenterCrop(size), v2.PILToTensor()])
    return steps(open_image(name))
