"""Values as the types of the settings' fields."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal


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
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}); it must be {hint.__name__}")
    return value


def check(settings: Any, prefix: str = "") -> None:
    """All fields of a dataclass. Raises: TypeError, ValueError naming the field."""
    for name, hint in typing.get_type_hints(type(settings)).items():
        convert(prefix + name, getattr(settings, name), hint)
