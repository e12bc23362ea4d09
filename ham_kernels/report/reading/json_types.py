"""JSON as the types that dataclasses say they hold."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def read_as(kind: Any, value: Any) -> Any:
    """`value` as `kind`: a dataclass, tuple[X, ...], Mapping[str, X], X | None, bool, int, float, str or Any.

    Null and NaN stand for what could not be measured: None where `kind` allows it. A dataclass passes over keys that it
    does not have; with `unpacked`, a static method, it takes other values than objects.
    Raises: one of MALFORMED.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # X | None
        unknown = value is None or (isinstance(value, float) and not math.isfinite(value))
        return None if unknown else read_as(args[0], value)
    if kind is Any or (dataclasses.is_dataclass(kind) and isinstance(value, kind)):
        return value
    if dataclasses.is_dataclass(kind):
        raw = _expect(Mapping, kind.unpacked(value) if hasattr(kind, "unpacked") else value, "an object")
        for field in dataclasses.fields(kind):
            if field.default is dataclasses.MISSING and field.name not in raw:
                raise KeyError(field.name)
        return kind(**{name: _named(name, hint, raw[name]) for name, hint in _hints(kind).items() if name in raw})
    if origin is tuple:
        return tuple(read_as(args[0], entry) for entry in _expect(list, value, "a list"))
    if origin is not None:
        return {key: _named(key, args[1], entry) for key, entry in _expect(Mapping, value, "an object").items()}
    if kind in (int, float):
        return kind(_expect((int, float), value, "a number"))
    return str(value) if kind is str and value is not None else _expect(kind, value, kind.__name__)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _named(name: str, kind: Any, value: Any) -> Any:
    try:
        return read_as(kind, value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def _expect(kind: Any, value: Any, words: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"got {value!r:.40} where {words} belongs")
    return value
