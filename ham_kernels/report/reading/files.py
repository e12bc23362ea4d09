"""Files of a run folder, read as far as they can be; what keeps one from being read becomes a note."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def shown(path: Path) -> str:
    return f"evaluation/{path.name}" if path.parent.name == "evaluation" else path.name


def bytes_of(path: Path, notes: list[str]) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        notes.append(f"{shown(path)}: cannot be read ({error})")
        return None


def read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """A TOML or JSON file; {} where there is none. What keeps it from being read goes to `notes`."""
    content = bytes_of(path, notes)
    if content is None:
        return {}
    try:
        value = (tomllib if path.suffix == ".toml" else json).loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        notes.append(f"{shown(path)}: cannot be read ({error})")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{shown(path)}: holds a {type(value).__name__}, not an object")
        return {}
    return value
