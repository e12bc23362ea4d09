"""Settings as dataclasses: values as the types of their fields, bounds, and the words that reports have for them.

A field says all of it where it is defined: `lam: Annotated[float, Ge(0), Words("λ={}", needs="reweight")] = 1.0`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt

EMPTY = "got an empty string, as of a shell variable that is not set; give a value"
_BOUNDS = {Ge: (">=", "ge"), Gt: ("above", "gt"), Le: ("<=", "le"), Lt: ("below", "lt")}


@dataclass(frozen=True)
class Words:
    """How the title of a run names a setting in which it differs from others.

    text: such as "λ={}", told where runs differ in the setting. by_value: words of single values instead, told wherever
    a run has one that is not the default; with `apart`, where runs differ in it.
    off: a value that is not worth words. needs: a field of the same class without which (False, or its `off`) this one
    has no effect. scales: the value follows the number of epochs.
    """

    text: str | None = None
    by_value: tuple[tuple[Any, str], ...] = ()
    off: Any = None
    needs: str | None = None
    scales: bool = False
    apart: bool = False


def of_each(function: Callable[[Any], Any], value: Any) -> Any:
    """The function of a value, or of each one of a tuple."""
    return tuple(map(function, value)) if isinstance(value, tuple) else function(value)


def shown(value: Any) -> str:
    """A value within a title."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache
def hints(kind: type) -> dict[str, Any]:
    """{field: its type}, without annotations."""
    found = typing.get_type_hints(kind)
    return {f.name: found[f.name] for f in dataclasses.fields(kind)}


@cache
def words(kind: type) -> dict[str, Words]:
    """{field: its Words}, of the fields that have some."""
    found = {f.name: _metadata(kind, f.name) for f in dataclasses.fields(kind)}
    return {name: w for name, extra in found.items() for w in extra if isinstance(w, Words)}


@cache
def _metadata(kind: type, name: str) -> tuple[Any, ...]:
    hint = typing.get_type_hints(kind, include_extras=True)[name]
    return hint.__metadata__ if typing.get_origin(hint) is typing.Annotated else ()


def convert(name: str, value: Any, hint: Any) -> Any:
    """A value as a field of this type takes it: 1 for 1.0, a list for a tuple, false for None.

    Raises: TypeError, ValueError naming the field.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None
        if value is None or value is False:
            return None
        return convert(name, value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name}: got {value!r}; it must be a list")
        return tuple(convert(name, v, args[0]) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (str, Path) and isinstance(value, str) and not value:  # as a path it would be the folder at hand
        raise ValueError(f"{name}: {EMPTY}")
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}); it must be {hint.__name__}")
    return value


def check(settings: Any, prefix: str = "") -> None:
    """Types and bounds of all fields of a dataclass. Raises: TypeError, ValueError naming the field."""
    kind = type(settings)
    for name, hint in hints(kind).items():
        value = convert(prefix + name, getattr(settings, name), hint)
        for one in value if isinstance(value, tuple) else (value,):
            _check_bounds(name, one, _metadata(kind, name))


def _check_bounds(name: str, value: Any, metadata: tuple[Any, ...]) -> None:
    bounds = [(*_BOUNDS[type(m)], m) for m in metadata if type(m) in _BOUNDS]
    if value is None or not bounds:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: got {value}; it must be finite")
    holds = {"ge": lambda a, b: a >= b, "gt": lambda a, b: a > b, "le": lambda a, b: a <= b, "lt": lambda a, b: a < b}
    limits = [(word, getattr(m, kind)) for word, kind, m in bounds]
    if not all(holds[kind](value, getattr(m, kind)) for _, kind, m in bounds):
        raise ValueError(f"{name}: got {value}; it must be {' and '.join(f'{word} {low}' for word, low in limits)}")
