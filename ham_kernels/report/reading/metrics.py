"""metrics.jsonl: the log of a run's epochs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...common import line_sums, troubles
from .files import bytes_of
from .json_types import MALFORMED, read_as


@dataclass(frozen=True)
class Validation:
    accuracy: float | None = None
    worst_class: float | None = None


@dataclass(frozen=True)
class Epoch:
    """A line of metrics.jsonl. `val` and `val_ema` are by attack."""

    epoch: int
    phase: str | None = None
    loss: float | None = None
    hard_fraction: float | None = None
    skipped: int | None = None
    seconds: float | None = None  # training only
    val: Mapping[str, Validation] | None = None
    val_ema: Mapping[str, Validation] | None = None
    cpu_seconds: float | None = None  # of all threads, in the same time
    mined: bool | None = None  # rows were screened or weighed

    @property
    def mines(self) -> bool:
        """Logs of before do not tell; only HAM did."""
        return self.phase == "ham" if self.mined is None else self.mined


def tell_log(path: Path, notes: list[str], why: str) -> None:
    notes.append(troubles.text("log_altered", file=path, why=why))
    troubles.warn("log_altered", file=path, why=why)


def read_metrics(path: Path, notes: list[str]) -> list[Epoch]:
    """Its epochs, up to the first line whose checksum is not that of what precedes it."""
    lines = (bytes_of(path, notes) or b"").rstrip().split(b"\n")
    epochs: list[Epoch] = []
    altered = line_sums.first_altered(lines)
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if i == altered and line.endswith(b"}"):  # else torn
            tell_log(path, notes, f"line {i} is not as written, or lines before it are gone; left out from there")
            break
        try:
            epoch = read_as(Epoch, json.loads(line.decode("utf-8")))
        except MALFORMED as error:
            torn = "torn last line skipped (the run was killed while writing it)"
            notes.append(f"{path.name}, line {i}: {torn if i == len(lines) else f'skipped ({error})'}")
            continue
        # A run resumed from an earlier checkpoint logs epochs again: the later line is of the weights that remain.
        epochs = [*(e for e in epochs if e.epoch < epoch.epoch), epoch]
    return epochs
