"""`ham evaluate --model` and `ham.adopt`: models that were trained elsewhere, judged as runs are, kept beside them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import engine
from ..common.files import write_atomically
from ..models.named import OBJECT, is_architecture
from ..models.weights import lay, read_weights
from ..runs.config_file import to_toml
from ..runs.folder import ADOPTED, RunFolder, read_json
from ..runs.judge_settings import EvaluateSettings, JudgeSettings
from ..runs.presets import preset
from ..runs.settings import (
    AttackSettings,
    DataSettings,
    ImageSettings,
    ModelSettings,
    RunSettings,
    TrainSettings,
)
from . import run_images
from .evaluate import check_how, evaluate_run
from .from_settings import check_takes, device_of, loaders_of, model_of
from .options import Adoption

ALIKE = 0.01  # of the largest logit: what devices and precisions may differ by
SECTIONS = ("data", "model", "attack", "run")  # of config.toml; how it was trained nobody here knows


def adopt(
    model: nn.Module, out: str | Path, *, dataset: str = "digits", path: str | None = None, label: str | None = None,
    **settings: Any,
) -> Path:  # fmt: skip
    """Judges a model as it is and keeps its weights and verdicts in a folder, which `ham report` compares with runs.

    Args:
        model: any classifier, images (n, C, H, W) in [0, 1] -> logits (n, classes), normalisation inside.
        out: the folder. Where it holds the same model, what it was not judged by yet is added.
        dataset, path: whose test images judge, as in `ham train`; the budget is that of the data set's preset.
        label: what reports call it; None: the name of its class.
        settings: of `ham evaluate` and of the images, such as attacks, images, search, eps, step_size, norm, size,
            test_images, batch_size, masking. It runs where the model is.
    Returns: the folder. Raises: TypeError, ValueError, FileNotFoundError, FileExistsError naming the argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; it must be a torch.nn.Module")
    base = preset(dataset)
    told = {"data": {"dataset": dataset, "path": path}, "attack": {}, "judge": {}}
    kinds = {"attack": AttackSettings, "judge": JudgeSettings, "data": ImageSettings}
    known = {f.name: section for section, kind in reversed(kinds.items()) for f in fields(kind)}
    for name, value in settings.items():
        if name not in known:
            raise TypeError(f"{name}: is no setting of an adopted model; allowed are {', '.join(sorted(known))}")
        told[known[name]][name] = tuple(value) if isinstance(value, list) else value
    told["judge"].setdefault("device", str(engine.model_device(model) or "cpu"))
    data = ImageSettings(**told["data"])
    called = f"{OBJECT}:{type(model).__name__}"
    wanted = Adoption(
        ModelSettings(called), out=Path(out), label=label, data=data,
        attack=replace(base.attack, **told["attack"]), judge=replace(JudgeSettings(analyses=False), **told["judge"]),
    )  # fmt: skip
    with engine.modes_kept(model):
        return adopt_as(wanted, model, quiet=True)


def adopt_as(wanted: Adoption, model: nn.Module | None = None, *, quiet: bool = False) -> Path:
    """As `adopt`; without `model`, one is made by its name, with the weights of the checkpoint."""
    label = wanted.label or (wanted.checkpoint.stem if wanted.checkpoint else wanted.model.name.split(":")[-1])
    settings = TrainSettings(
        data=DataSettings(**asdict(wanted.data), val_images=0), model=wanted.model, attack=wanted.attack,
        run=RunSettings(label=label, ema_decay=None),
    )  # fmt: skip
    settings.check()
    judged = EvaluateSettings(**{f.name: getattr(wanted.judge, f.name) for f in fields(JudgeSettings)})
    judged.check()
    check_how(judged, settings)
    out = wanted.out or Path("runs") / f"{settings.data.source}-{_file_name(label)}"
    RunFolder(out).check_writable()
    device = device_of(wanted.judge.device)
    images, facts, places = run_images.find(settings)
    if judged.part not in facts["counts"]:
        raise ValueError(f"part: got {judged.part!r}; these images have {', '.join(facts['counts'])}")
    if model is None:
        settings, model = _made(wanted, settings, facts)
    model = model.to(device).eval()
    logits = check_takes(model, settings.model.name, loaders_of(settings, images, device).test, len(images.classes))
    origin = {
        "named": bool(wanted.label), "model": settings.model.name, "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()), **_file_facts(wanted.checkpoint),
        "logits": logits.float().tolist(),
    }  # fmt: skip
    run = _folder(out, settings, model, named=bool(wanted.label))
    _check_same(out, origin["logits"])
    run.set_data_facts(facts, places)
    run.write_json("origin.json", origin)
    run.set_status(ADOPTED, 0, 0)
    evaluate_run(out, judged, quiet=quiet, model=model)
    return run.path


def _check_same(out: Path, logits: list[list[float]]) -> None:
    """Weights alone do not tell a model: its code, or what it normalises by, may have changed.

    Raises: ValueError where the folder is of one that answers the first images otherwise.
    """
    path = out / "origin.json"
    before = read_json(path).get("logits") if path.exists() else None
    if before is None:
        return
    before, now = torch.tensor(before), torch.tensor(logits)
    if before.shape != now.shape or (before - now).abs().max() > ALIKE * before.abs().max():
        raise ValueError(f"out: {out} holds the verdict on another model, with other logits; give another folder")


def _made(wanted: Adoption, settings: TrainSettings, facts: dict) -> tuple[TrainSettings, nn.Module]:
    """The model of a name, with its weights. An architecture normalises as the checkpoint does, unless told how."""
    m, architecture = settings.model, is_architecture(settings.model.name)
    if wanted.checkpoint is None and architecture:
        raise ValueError(f"checkpoint: got None, but {m.name} alone has random weights; give the file that holds them")
    found = None if wanted.checkpoint is None else read_weights(wanted.checkpoint, wanted.checkpoint_key)
    if found is not None and found.mean is not None and architecture and m.mean is None and not m.normalize:
        channels = facts["channels"]
        mean, std = (values * (channels // len(values)) for values in (found.mean, found.std))
        settings = replace(settings, model=replace(m, mean=mean, std=std))
    model = model_of(settings, len(facts["classes"]), facts["channels"])
    if found is not None:
        lay(model, found.state, source=f"checkpoint: {wanted.checkpoint}")
    return settings, model


def _folder(out: Path, settings: TrainSettings, model: nn.Module, named: bool) -> RunFolder:
    """A new folder with the model's weights, or the one that holds the same, wherever its images lie by now."""
    state = {
        name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
        for name, value in model.state_dict().items()
    }  # get_extra_state may give anything
    run = RunFolder(out)
    if (out / "config.toml").exists():
        if run.status()["state"] not in (ADOPTED, "new"):
            raise FileExistsError(f"out: {out} holds a training; give another folder")
        before = run.settings()
        where = {name: getattr(settings.data, name) for name in ("path", "root", "download", "workers")}
        begun = replace(before, data=replace(before.data, **where))
        if not named:
            settings = replace(settings, run=replace(settings.run, label=before.run.label))
        if any(getattr(begun, section) != getattr(settings, section) for section in SECTIONS):
            raise ValueError(f"out: {out} was begun with other settings; give another folder, or remove it")
        if begun != before:
            write_atomically(out / "config.toml", to_toml(settings, SECTIONS).encode())
    else:
        run = RunFolder.create(out, settings, SECTIONS)
    if not run.checkpoints.newest_first():
        run.checkpoints.save({"trainer": {"model": state, "ema": None, "epoch": 0}}, 0)
    held = run.load_weights("last")["model"]
    if held.keys() != state.keys() or any(not _equal(held[k], v) for k, v in state.items()):
        raise ValueError(f"out: {out} holds other weights; give another folder")
    return run


def _equal(a: Any, b: Any) -> bool:
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return torch.equal(a, b) if both else bool(a == b)


def _file_facts(checkpoint: Path | None) -> dict[str, Any]:
    if checkpoint is None:
        return {}
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    return {"checkpoint": str(checkpoint), "sha256": digest.hexdigest()}


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label)
