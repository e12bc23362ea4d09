"""Settings as TOML: the file of `--config`, and the config.toml of a run. Imports no torch."""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

from ._fields import convert
from .settings import TrainSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def to_dict(settings: TrainSettings) -> dict[str, dict[str, Any]]:
    """Sections of plain values. TOML has no None: it is false where the default is another value, else left out."""
    default = dataclasses.asdict(TrainSettings())
    return {
        section: {
            k: list(v) if isinstance(v, tuple) else False if v is None else v
            for k, v in values.items()
            if v is not None or default[section][k] is not None
        }
        for section, values in dataclasses.asdict(settings).items()
    }


def to_toml(settings: TrainSettings) -> str:
    import tomli_w

    return tomli_w.dumps(to_dict(settings))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The sections of a TOML file. Raises: FileNotFoundError, ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: {path} is not a file; give a TOML file of settings")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path}: {error}") from error


def from_toml(path: str | Path, base: TrainSettings) -> TrainSettings:
    """`base` with what the file says instead. Raises: FileNotFoundError, ValueError naming the file and the key."""
    sections = read_toml(path)
    try:
        return merge(base, sections)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: {path}: {error}") from error


def merge(base: TrainSettings, sections: dict[str, Any]) -> TrainSettings:
    """`base` with other values, given as {section: {field: value}}; false stands for None where None is allowed."""
    known = {f.name: f for f in dataclasses.fields(base)}
    changed = {}
    for section, values in sections.items():
        if section not in known:
            raise ValueError(f"{section}: is no section; allowed are {', '.join(known)}")
        if not isinstance(values, dict):
            raise ValueError(f"{section}: got {values!r}; it is a section, with keys of its own")
        old = getattr(base, section)
        hints = typing.get_type_hints(type(old))
        unknown = sorted(set(values) - set(hints))
        if unknown:
            raise ValueError(f"{section}.{unknown[0]}: is no setting; allowed are {', '.join(hints)}")
        new = {k: convert(f"{section}.{k}", v, hints[k]) for k, v in values.items()}
        changed[section] = dataclasses.replace(old, **new)
    return dataclasses.replace(base, **changed)
