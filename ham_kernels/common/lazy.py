"""Public names that load on first use (PEP 562), so that help and light tables do not wait for torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def names_of(
    package: str, namespace: dict[str, Any], homes: Mapping[str, str], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a package's __init__: names live in submodules `homes`, `modules` are such."""

    def load(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f".{name}", package)
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{homes[name]}", package), name)
        namespace[name] = value
        return value

    return load, lambda: sorted({*namespace, *homes, *modules})
