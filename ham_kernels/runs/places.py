"""Where the images and the teacher of a run lie. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def found_again(now: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """{setting: absolute place} of those that config.toml still tells as the run noted them, and that are still there.

    Args: now: settings by name.  places: of the run's data.json.
    """
    return {
        name: place["absolute"]
        for name, place in places.items()
        if name in now and now[name] == place["given"] and Path(place["absolute"]).exists()
    }
