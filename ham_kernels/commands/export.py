"""`ham export`: a trained model for those who have torch alone, with what it is worth written beside it."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from ..common import provenance
from ..common.files import write_atomically
from ..distributed import inner_model
from ..models.keys import to_theirs
from ..models.weights import brought
from ..runs.folder import RunFolder, dumps, read_json
from ..runs.settings import TrainSettings
from . import run_images
from .from_settings import trained_model
from .model_card import model_card, robustbench_entry
from .noted_images import drop_altered
from .options import Export

ABOUT = "about.json"
PROGRAM = "model.pt2"
_NEEDS = {"safetensors": "safetensors", "onnx": "onnxscript"}  # packages that write a format
_BARE = {"state_dict": "model.pt", "safetensors": "model.safetensors"}  # the field's names are of no normalisation


def export(wanted: Export) -> Path:
    """Writes a run's weights and what they are worth into a new folder, in the formats asked for; returns it.

    Raises: FileNotFoundError, FileExistsError, ValueError, ImportError naming the argument; CheckpointError.
    """
    run = RunFolder.open(wanted.run)
    told, facts = run.settings(), run.data_facts()
    kind = wanted.weights or run.usual_weights()
    out = wanted.out or Path("exports") / run.path.resolve().name
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: {out} is there already; give another folder, or remove it")
    for name in wanted.formats:
        if name in _NEEDS and find_spec(_NEEDS[name]) is None:
            raise ImportError(f"formats: {name} needs {_NEEDS[name]}; `pip install {_NEEDS[name]}`")
    state = run.load_weights(kind)
    model = trained_model(told, facts, state["model"], torch.device("cpu"))
    judged = _judged(run, kind, state["sha256"])
    about = about_of(run, kind, state) | {"judged": sorted(judged.get("attacks", {}))}
    bare = [_BARE[name] for name in wanted.formats if name in _BARE] if wanted.names == "field" else []
    if bare and about["mean"] is not None:
        about["normalisation"] = f"left out of {' and '.join(bare)}: give images normalised by mean and std"
    files = {ABOUT: dumps(about, indent=1).encode() + b"\n"}
    files |= {name: text.encode() for name, text in _texts(wanted, about, judged, run).items()}
    weights = _apart({k: v.contiguous() for k, v in model.state_dict().items()})
    if wanted.names == "field":
        weights = to_theirs(model, weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:  # whole, or not there
        aside = Path(folder) / out.name
        aside.mkdir()
        _write(wanted.formats, model, weights, about, aside)
        for name, content in files.items():
            write_atomically(aside / name, content)
        aside.replace(out)
    return out


def _write(formats: Sequence[str], model: nn.Module, weights: dict[str, Tensor], about: dict, folder: Path) -> None:
    if "state_dict" in formats:
        held = io.BytesIO()  # torch's own writer ends the process where the disk is full
        torch.save(weights, held)
        write_atomically(folder / "model.pt", held.getbuffer())
    if "safetensors" in formats:
        from safetensors.torch import save

        write_atomically(folder / "model.safetensors", save(weights, {"about": json.dumps(about)}))
    if "pt2" in formats:
        _save_program(_unwrapped(model), about, folder / PROGRAM)
    if "onnx" in formats:
        _save_onnx(_unwrapped(model), about, folder / "model.onnx")


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without the wrappers of torch.compile and of several devices, also of modules inside: a program has none."""
    model = inner_model(model)
    if isinstance(model, (nn.DataParallel, OptimizedModule)):
        return _unwrapped(next(model.children()))
    for name, child in model.named_children():
        setattr(model, name, _unwrapped(child))
    return model


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights, under each of their names, as copies: safetensors takes none that share memory."""
    seen: set[int] = set()
    for name, value in weights.items():
        storage = value.untyped_storage().data_ptr()
        if storage in seen:
            weights[name] = value.clone()
        seen.add(storage)
    return weights


def _judged(run: RunFolder, kind: str, digest: str) -> dict[str, Any]:
    """What `ham evaluate` found of these weights; {} where it did not judge them."""
    path = run.path / "evaluation" / f"{kind}.json"
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise ValueError(f"run: {path} is damaged (it holds no object)")
    drop_altered(found.get("attacks", {}), path)
    return found if found.get("checkpoint_sha256") == digest else {}


def about_of(run: RunFolder, kind: str, state: dict[str, Any]) -> dict[str, Any]:
    """What whoever loads the weights must know, without a path of this machine."""
    told, facts = run.settings(), run.data_facts()
    channels, height, width = facts.get("shape") or list(_first_shape(told, run))
    m, held = told.model, brought(state["model"])
    origin, teacher = run.path / "origin.json", told.run.teacher
    if teacher is not None:
        teacher = Path(run.places().get("teacher", {}).get("absolute", teacher)).name
    return {
        "format": 1,
        "classes": facts["classes"],
        "input": {
            "channels": channels, "height": height, "width": width, "range": [0, 1],
            "resize": "centre crop" if facts.get("files_sha256") else "whole image",
        },
        "normalisation": "inside the model",
        "mean": m.mean or held.mean,
        "std": m.std or held.std,
        "model": m.name,
        "threat_model": {"norm": told.attack.norm, "eps": told.attack.eps},
        "dataset": told.data.source,
        "method": None if run.adopted else told.method.describe(told.warm_up.name),
        "label": told.run.label,
        "origin": _told(origin, "class")["class"] if origin.exists() else None,
        "begun_with": _begun_with(run),
        "teacher": teacher,
        "generated": facts.get("generated") is not None,
        "weights": {"kind": kind, "epoch": state["epoch"] or None, "checkpoint_sha256": state["sha256"]},
        "versions": provenance.versions(),
    }  # fmt: skip


def _begun_with(run: RunFolder) -> dict[str, Any] | None:
    """First weights that were not random: which file or folder, by name, and of a run its method and epochs."""
    path = run.path / "begun_with.json"
    if not path.exists():
        return None
    found = _told(path, "weights")
    return {"weights": Path(found["weights"]).name, "run": found.get("run"), "epochs": found.get("epochs")}


def _told(path: Path, key: str) -> dict[str, Any]:
    """What a note of the run holds. Raises: ValueError naming a file that does not tell `key` in words."""
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get(key), str):
        raise ValueError(f"run: {path} is damaged (it tells no {key!r})")
    return found


def _first_shape(told: TrainSettings, run: RunFolder) -> tuple[int, ...]:
    """Of runs that did not note it: from the images."""
    images, *_ = run_images.find(told, run, generated=False)
    return run_images.shape_of(images)


def _texts(wanted: Export, about: dict, judged: dict, run: RunFolder) -> dict[str, str]:
    found = {}
    if "card" in wanted.formats:
        found["MODEL_CARD.md"] = model_card(about, judged, run)
    if "robustbench" in wanted.formats:
        found["robustbench.json"] = json.dumps(robustbench_entry(about, judged), indent=1) + "\n"
    return found


# ---------------------------------------------------------------- programs
def _example(about: dict) -> Tensor:
    size = about["input"]
    return torch.rand(2, size["channels"], size["height"], size["width"], generator=torch.Generator().manual_seed(0))


def _save_program(model: nn.Module, about: dict, path: Path) -> None:
    """torch.export of images -> logits, any number of rows; about.json travels inside."""
    batch = torch.export.Dim("batch", min=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (_example(about),), dynamic_shapes=({0: batch},))
    except Exception as error:  # whatever a model of the user's meets in there
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"formats: torch.export cannot take {about['model']} ({why}); leave pt2 out") from error
    held = io.BytesIO()
    torch.export.save(program, held, extra_files={ABOUT: json.dumps(about)})
    write_atomically(path, held.getbuffer())


def _save_onnx(model: nn.Module, about: dict, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (_example(about),), path, dynamo=True, input_names=["images"],
            output_names=["logits"], dynamic_shapes=({0: batch},), verbose=False, external_data=False,
        )  # fmt: skip
