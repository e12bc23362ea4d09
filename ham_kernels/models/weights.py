"""Weights that were trained elsewhere: read from a file, told by which names, laid into a model of ours."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common import troubles
from .keys import State, to_ours
from .nets import Normalize, PreActResNet18

_WRAPPERS = ("module", "_orig_mod")  # of DataParallel and torch.compile
_INSIDE = ("state_dict", "model_state_dict", "model", "net", "weights")  # where files keep the weights, in this order
_EXTRA = "_extra_state"  # whatever a module's get_extra_state gives
_OPTIONAL = ("num_batches_tracked", _EXTRA)
_NORMALISATIONS = (("mean", "std"), ("mu", "sigma"))


@dataclass
class Brought:
    """Weights of a file. mean, std: of a normalisation among them, one value per channel."""

    state: State
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def read_weights(path: str | Path, key: str | None = None) -> Brought:
    """Weights of a file of torch.save or safetensors, which runs no code of the file.

    Args: key: the entry that holds them, where the file is a dict of several things (None: the usual names).
    Raises: FileNotFoundError, ValueError naming the file; ImportError where safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} is not a file; give a state_dict as torch.save writes it")
    return brought(_entry(_content(path), key, path))


def brought(state: Mapping[str, Tensor]) -> Brought:
    """A state_dict, and what it normalises by."""
    found = Brought(dict(state))
    if names := _normalisation(found.state):
        found.mean, found.std = (tuple(found.state[name].flatten().tolist()) for name in names)
    return found


def lay(model: nn.Module, state: State, *, source: str, new_head: bool = False) -> list[str]:
    """Loads a state_dict into a model whose names it has, or the field's for it, or these behind prefixes.

    Prefixes are one that all names share, and those of DataParallel, AveragedModel and torch.compile. A normalisation
    is left out, with a warning, where the model has no such names: give `create` its mean and std.

    Args:
        source: what errors call it.
        new_head: where only the last linear layer has other shapes, as for other classes, it stays as it is.
    Returns: names of the head that stayed. Raises: ValueError naming `source` and the first keys that do not fit.
    """
    fixed = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, Normalize))
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(fixed or "\0")}
    if (had := brought(state)).mean is not None and brought(model.state_dict()).mean is None:
        troubles.warn("normalisation_left_out", source=source, mean=had.mean, std=had.std)
    state = max(_readings(model, state), key=lambda reading: 2 * len(reading.keys() & wanted.keys()) - len(reading))
    held = {_place(wanted[k]) for k in state.keys() & wanted.keys()} - {None}  # tied weights: safetensors has one name
    missing = [k for k, v in wanted.items() if not (k in state or k.endswith(_OPTIONAL) or _place(v) in held)]
    unexpected = [k for k in state if k not in wanted]
    if missing or unexpected:
        differences = _differences(model, missing, unexpected)
        inner = model[1] if type(model) is nn.Sequential and isinstance(model[0], Normalize) else model
        called = type(inner).__name__
        raise ValueError(
            f"{source}: its weights are not those of this model: {differences}; it is a {called}, --model names another"
        )
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    other = [k for k, v in tensors.items() if v.shape != wanted[k].shape]
    if new_head and other and set(other) <= set(head_of(model)):
        state = {k: v for k, v in state.items() if k not in other}
    elif other:
        k = other[0]
        raise ValueError(
            f"{source}: {k} has shape {tuple(state[k].shape)}, the model {tuple(wanted[k].shape)}: another width, or "
            "another number of classes"
        )
    whole = [k for k, v in tensors.items() if wanted[k].is_floating_point() and not v.is_floating_point()]
    if whole:
        k = whole[0]
        raise ValueError(
            f"{source}: {k} holds {state[k].dtype}, the model {wanted[k].dtype}; quantised weights must be made "
            "floating by their scales first"
        )
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise ValueError(f"{source}: {bad[0]} holds NaN or infinite values")
    model.load_state_dict(state, strict=False)
    return other


# ---------------------------------------------------------------- files
def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"checkpoint: {path} needs safetensors; `pip install safetensors`") from error
        try:
            return load_file(path)
        except Exception as error:  # SafetensorError, which is no ValueError
            raise ValueError(f"checkpoint: {path} is no file of safetensors ({_first_line(error)})") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint: {path} was not written by torch.save, or holds other objects than tensors, which could run "
            "code of its maker; save the weights alone: torch.save(model.state_dict(), ...)"
        ) from error
    except (EOFError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"checkpoint: {path} is no file of torch.save ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _entry(content: Any, key: str | None, path: Path) -> State:
    """The state_dict in what a file holds."""
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            held = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(f"checkpoint_key: {path} has no entry {key!r}; it holds {held}")
        if not _is_state(content[key]):
            raise ValueError(f"checkpoint_key: {key!r} of {path} is no state_dict")
        return dict(content[key])
    if _is_state(content):
        return dict(content)
    inside = [k for k, v in content.items() if _is_state(v)] if isinstance(content, Mapping) else []
    usual = [k for k in _INSIDE if k in inside]
    if not inside:
        raise ValueError(f"checkpoint: {path} holds no state_dict")
    held = ", ".join(map(str, inside))
    if len(inside) > 1 and not usual:
        raise ValueError(f"checkpoint: {path} holds several state_dicts, {held}; name one by --checkpoint-key")
    taken = (usual or inside)[0]
    if len(inside) > 1:
        troubles.warn("one_of_several_weights", file=path, held=held, taken=taken)
    return dict(content[taken])


def _is_state(value: Any) -> bool:
    named = isinstance(value, Mapping) and bool(value)
    named = named and all(isinstance(k, str) for k in value)
    return named and all(isinstance(v, Tensor) or k.endswith(_EXTRA) for k, v in value.items())


def _place(t: Any) -> Any:
    """What tensors have in common that are one; None of nothing."""
    return (t.data_ptr(), t.shape, t.stride()) if isinstance(t, Tensor) and t.numel() else None


# ---------------------------------------------------------------- names
def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _normalisation(state: State) -> tuple[str, str] | None:
    """Names of the mean and the std that a model divides images by, where it keeps both."""

    def only(word: str) -> str | None:
        found = [
            k for k, v in state.items() if k.split(".")[-1] == word and v.numel() in (1, 3) and v.is_floating_point()
        ]
        return found[0] if len(found) == 1 else None

    pairs = [(only(mean), only(std)) for mean, std in _NORMALISATIONS]
    return next((pair for pair in pairs if None not in pair), None)


def _readings(model: nn.Module, state: State) -> list[State]:
    """What the names may mean: as they are, without prefixes, the field's for ours, of the model behind ours."""
    left_out = _normalisation(state) or ()
    bare = {k: v for k, v in state.items() if k not in left_out}
    found = []
    for names in (state, bare):
        unwrapped = {_unwrapped(k): v for k, v in names.items() if k != "n_averaged"}
        found += [*_without_prefix(names), *_without_prefix(unwrapped)]
    found += [to_ours(model, reading) for reading in found]
    if type(model) is nn.Sequential and len(model) == 2 and isinstance(model[0], Normalize):  # as `create` makes it
        found += [{f"1.{k}": v for k, v in reading.items()} for reading in found]
    return found


def _without_prefix(state: State) -> list[State]:
    """The state as it is, and behind each of its first parts that all names share."""
    out = [state]
    while len(firsts := {name.partition(".")[0] for name in out[-1]}) == 1 and all("." in name for name in out[-1]):
        cut = len(next(iter(firsts))) + 1
        out.append({name[cut:]: value for name, value in out[-1].items()})
    return out


def head_of(model: nn.Module) -> list[str]:
    """Names of the weights of the last linear layer, where there is one."""
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [f"{linear[-1]}.weight", f"{linear[-1]}.bias"] if linear else []


def _differences(model: nn.Module, missing: list[str], unexpected: list[str]) -> str:
    def told(words: str, keys: list[str]) -> list[str]:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        return [f"{words} {', '.join(keys[:3])}{more}"] if keys else []

    text = "; ".join([*told("missing", missing), *told("not known", unexpected)])
    is_preact = isinstance(model, PreActResNet18)
    norms = [i for i, layer in enumerate(model) if isinstance(layer, nn.BatchNorm2d)] if is_preact else []
    if norms and missing and not unexpected and all(k.startswith(f"{norms[-1]}.") for k in missing):
        text += " (it has no BatchNorm before its head: give --model preact_resnet18_kuangliu, or _wong)"
    return text
