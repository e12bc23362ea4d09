"""Settings as TOML: the file of `--config`, and the config.toml of a run. Imports no torch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common import field_types
from ..methods.registry import class_of, with_name
from ..methods.settings import Method
from .settings import TrainSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def to_dict(settings: TrainSettings) -> dict[str, dict[str, Any]]:
    """Sections of plain values. TOML has no None: it is false where the default is another value, else left out."""
    default = TrainSettings()
    out = {}
    for section in dataclasses.fields(settings):
        values = getattr(settings, section.name)
        usual = type(values)() if section.name == "method" else getattr(default, section.name)
        out[section.name] = {"name": values.address} if section.name == "method" else {}
        for k, v in dataclasses.asdict(values).items():
            if v is not None or getattr(usual, k) is not None:
                out[section.name][k] = list(v) if isinstance(v, tuple) else False if v is None else v
    return out


def to_toml(settings: TrainSettings, sections: Sequence[str] | None = None) -> str:
    """As the text of a TOML file, of these sections alone where they are given."""
    import tomli_w

    told = to_dict(settings)
    return tomli_w.dumps(told if sections is None else {name: told[name] for name in sections})


def read_toml(path: str | Path) -> dict[str, Any]:
    """The sections of a TOML file. Raises: FileNotFoundError, ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: {path} is not a file; give a TOML file of settings")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # an editor may begin it with a byte order mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path}: {error}") from error


def from_toml(path: str | Path, base: TrainSettings, method: str | None = None) -> TrainSettings:
    """`base`, of the method named, with what the file says instead.

    Raises: FileNotFoundError, ValueError naming the file and the key.
    """
    sections = read_toml(path)
    if method is not None:
        base = dataclasses.replace(base, method=with_name(base.method, method, base.optim.epochs))
    try:
        return merge(base, sections)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: {path}: {error}") from error


def merge(base: TrainSettings, sections: dict[str, Any]) -> TrainSettings:
    """`base` with other values, given as {section: {field: value}}; false stands for None where None is allowed.

    Another `name` of the method makes it that method, with what `base` tells all of them.
    """
    known = {f.name: f for f in dataclasses.fields(base)}
    changed = {}
    for section, values in sections.items():
        if section not in known:
            raise ValueError(f"{section}: is no section; allowed are {', '.join(known)}")
        if not isinstance(values, dict):
            raise ValueError(f"{section}: got {values!r}; it is a section, with keys of its own")
        old = getattr(base, section)
        if section == "method":
            old, values = _method(old, values, base.optim.epochs)
        hints = field_types.hints(type(old))
        unknown = sorted(set(values) - set(hints))
        if unknown:
            of = f" of {old.name}" if section == "method" else ""
            raise ValueError(f"{section}.{unknown[0]}: is no setting{of}; allowed are {', '.join(hints)}")
        new = {k: field_types.convert(f"{section}.{k}", v, hints[k]) for k, v in values.items()}
        changed[section] = dataclasses.replace(old, **new)
    return dataclasses.replace(base, **changed)


def _method(old: Method, values: dict[str, Any], epochs: int) -> tuple[Method, dict[str, Any]]:
    """The method that a section names, and the other values of the section."""
    values = dict(values)
    name = values.pop("name", old.name)
    if not isinstance(name, str):
        raise TypeError(f"method.name: got {name!r} ({type(name).__name__}); it must be str")
    if name == "pgd_at" and values.keys() >= _HAMS and "easy" not in values:
        # config.toml of a time when HAM's switches were written for PGD-AT too, which did not use them
        values = {k: v for k, v in values.items() if k == "start_epoch"}
    if values.keys() >= _OF_ALL:  # config.toml has every switch; those it lacks are younger, and were not there
        values = {younger: getattr(Method, younger) for younger in _YOUNGER} | values
    return with_name(old, name, epochs), values


_OF_ALL, _YOUNGER = {"start_epoch", "easy", "bn_rows", "step_sizes", "group"}, ("trust", "eps_factor")
_HAMS = {"screen_steps", "lam", "reweight", "early_drop", "rows"}


def method_of(section: dict[str, Any]) -> Method:
    """The method that a section of config.toml tells. Raises: TypeError, ValueError."""
    return merge(TrainSettings(method=class_of("pgd_at")()), {"method": section}).method
