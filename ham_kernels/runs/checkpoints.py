"""The resume points of a run, and the random generators' states that belong to them."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common import troubles
from ..common.files import CheckpointError, read, save

KEPT = 2  # resume points of a run: the newest, and one to fall back on


@contextlib.contextmanager
def within(run: Path | None, path: Path) -> Iterator[None]:
    """Around the write of a file of this run: it would make the folders anew that the run was moved away with.

    Raises: FileNotFoundError where the run is gone, before the write or behind it; then nothing stays of the write.
    """
    _check_there(run)
    yield
    try:
        _check_there(run)
    except FileNotFoundError:
        path.unlink(missing_ok=True)
        for folder in (run / part for part in path.relative_to(run).parents):
            with contextlib.suppress(OSError):  # it is gone, or holds what others wrote
                folder.rmdir()
        raise


def _check_there(run: Path | None) -> None:
    if run is not None and not (run / "config.toml").exists():
        raise FileNotFoundError(
            f"out: {run} has been moved or removed while it was trained or judged (its config.toml is gone); "
            "go on with it where it lies now"
        )


class Checkpoints:
    """The resume points of one run, `step_XXXXXXXXXX.pt`, of which the newest KEPT stay; `writes`: see RunFolder.

    run: its folder, without which nothing is written; None for resume points that lie alone.
    """

    def __init__(self, folder: str | Path, *, writes: bool = True, run: Path | None = None):
        self.folder, self.writes, self.run = Path(folder), writes, run

    def save(self, state: dict[str, Any], step: int) -> Path:
        path = self.folder / f"step_{step:010d}.pt"
        if not self.writes:
            return path
        with within(self.run, path):
            save(path, state)
        for old in self.newest_first()[KEPT:]:
            old.unlink(missing_ok=True)
        for torn in self.folder.glob(".*.partial"):  # of a killed process
            torn.unlink(missing_ok=True)
        return path

    def newest_first(self) -> list[Path]:
        named = [p for p in self.folder.glob("step_*.pt") if re.fullmatch(r"step_\d{10}\.pt", p.name)]
        return sorted(named, reverse=True)

    def load_newest(self, *, set_aside: bool = False) -> tuple[Path, dict[str, Any], str] | None:
        """(path, state, SHA-256) of the newest intact checkpoint; each damaged one is named in a warning.

        set_aside: rename the damaged ones to *.damaged, for the process that goes on with the run.
        None where there never was one. Raises: CheckpointError where there were some and none is intact.
        """
        damaged: list[Path] = []
        for path in self.newest_first():
            try:
                state, digest = read(path)
            except FileNotFoundError:  # a run that goes on has just replaced it by a newer one
                return self.load_newest(set_aside=set_aside)
            except CheckpointError as error:
                damaged.append(path)
                troubles.warn("damaged_checkpoint", error=error)
                continue
            for bad in damaged if set_aside and self.writes else ():
                os.replace(bad, bad.with_suffix(".damaged"))
            return path, state, digest
        names = [p.name for p in (*damaged, *sorted(self.folder.glob("step_*.damaged")))]
        if names:
            raise CheckpointError(f"checkpoint: none of {', '.join(names)} in {self.folder} is intact")
        return None


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, as `load` can read them back."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  (what a loader of the user may draw from)
    version, words, gauss_next = random.getstate()
    return {
        "python": (version, list(words), gauss_next),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def seed_python_and_numpy(seed: int) -> None:
    """Which a model of the user's own may draw from, as its seed says for torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def set_random_states(states: dict[str, Any]) -> None:
    version, words, gauss_next = states["python"]
    random.setstate((version, tuple(words), gauss_next))
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in states["cuda"]])
