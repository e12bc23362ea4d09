"""`--from`: a short training that begins with the weights of another. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ..runs.places import found_again
from ..runs.presets import rescaled
from ..runs.settings import TrainSettings, WarmUpSettings

EPOCHS = 2
FINE_TUNED = 10  # divides the learning rate where a training begins with weights


def config_of(origin: str) -> Path | None:
    """The settings of a run; None of a file of weights. Raises: FileNotFoundError naming `from`."""
    if Path(origin).is_dir():
        config = Path(origin) / "config.toml"
        if not config.is_file():
            raise FileNotFoundError(f"from: {origin} is no run folder (it has no config.toml)")
        return config
    if not Path(origin).is_file():
        raise FileNotFoundError(f"from: {origin} is neither a run folder nor a file of weights")
    return None


def fine_tuning(base: TrainSettings, origin: str, epochs: int) -> TrainSettings:
    """`base`, the settings of the run `origin` or of a file's owner, in so few epochs of its method alone.

    The learning rate stays as it is in all of them.
    """
    short = rescaled(base, epochs)
    optim = replace(short.optim, schedule="step", milestones=(), lr_decay=())
    places = _places_of(Path(origin))
    data = replace(short.data, **found_again(vars(short.data), places))
    run = replace(short.run, label=None, weights=origin, **found_again(vars(short.run), places))
    method = replace(short.method, start_epoch=1)
    return replace(short, data=data, method=method, optim=optim, warm_up=WarmUpSettings(), run=run)


def _places_of(run: Path) -> dict[str, dict[str, str]]:
    """Of its images and its teacher, wherever this process was started."""
    try:
        return json.loads((run / "data.json").read_text())["places"]
    except (OSError, KeyError, ValueError):  # a file of weights, or a run that has not begun
        return {}
