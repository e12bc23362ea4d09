"""Methods by name: the one of a name, told as much as another was; and the method of a warm-up. Imports no torch."""

from __future__ import annotations

import dataclasses

from ..common import imports
from .settings import Method, _registry

FIRST = ("pgd_at", "ham", "fair", "trades")  # in help and tables; the others follow by name


def names() -> tuple[str, ...]:
    """The methods known, by name."""
    return (*(n for n in FIRST if n in _registry), *sorted(n for n in _registry if n not in FIRST))


def class_of(name: str) -> type[Method]:
    """The method of a name, or of one's own by MODULE:CLASS. Raises: ValueError where there is none."""
    if ":" in name:
        return _of_ones_own(name)
    if name not in _registry:
        raise ValueError(f"method: got {name!r}; allowed are {', '.join(map(repr, names()))}, and MODULE:CLASS")
    return _registry[name]


def _of_ones_own(address: str) -> type[Method]:
    try:
        kind = imports.named(address, "method", "MODULE:CLASS, such as my_method:Mine")
    except ImportError as error:
        raise ValueError(str(error)) from error
    if not (isinstance(kind, type) and issubclass(kind, Method) and _registry.get(getattr(kind, "name", None)) is kind):
        raise ValueError(f"method: {address} is no class below ham_kernels.methods.Method with a name of its own")
    return kind


def with_name(method: Method, name: str, epochs: int | None = None) -> Method:
    """The method of this name; M, and where it starts unless that is the first epoch, as they are told `method`.

    With `epochs`, the length of the training, other epochs that it names keep their share of the course; so does its
    start where `method` has none. Raises: ValueError for a name that no method has.
    """
    kind = class_of(name)
    if kind is type(method):
        return method
    usual = kind()
    if epochs is not None:
        usual = usual.in_course(epochs)
    told = {"screen_steps": method.screen_steps}
    if usual.start_epoch > 1 and method.start_epoch > 1:
        told["start_epoch"] = method.start_epoch
    elif usual.start_epoch > 1 and epochs is not None:
        told["start_epoch"] = min(epochs, 1 + round((usual.start_epoch - 1) * epochs / usual.course))
    return dataclasses.replace(usual, **told)


_MINING = ("early_drop", "reweight", "freeze_bn", "bn_rows", "group", "round_to")  # not before start_epoch


def warm_up_of(method: Method, name: str) -> Method:
    """The method of the epochs before start_epoch, by name; that of `method` is `method` without mining.

    Raises: ValueError naming warm_up.
    """
    if name == method.name and not type(method)().mines:
        plain = {f.name: f.default for f in dataclasses.fields(Method) if f.name in _MINING}
        return dataclasses.replace(method, **plain) if method.mines else method
    try:
        warm = class_of(name)()
    except ValueError as error:
        raise ValueError(str(error).replace("method: ", "warm_up: ", 1)) from error
    if warm.mines or warm.needs_teacher or name == "natural":
        why = "it would mine" if warm.mines else "it learns from a teacher"
        why = "for clean images give natural_epochs" if name == "natural" else why
        raise ValueError(f"warm_up: got {name!r}; {why}")
    return dataclasses.replace(warm, start_epoch=1)


def in_place_of(method: Method) -> Method:
    """PGD-AT with the switches of a method of one step, for where that has overfitted."""
    alike = {f.name: getattr(method, f.name) for f in dataclasses.fields(Method)}
    return dataclasses.replace(class_of("pgd_at")(), **(alike | {"start_epoch": 1}))
