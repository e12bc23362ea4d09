"""The run folders that a report is asked for, and the cells of a sweep that have none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import read_mapping
from .runs import MARKS, Run, read_run

SWEEP = "sweep.json"
# Of a sweep's names: pgd_at-seed0, ham-M3-lam0.5-frozen_bn-seed10.
_NUMBER = re.compile(r"(?:(?<=-M)|(?<=-lam)|(?<=-seed))\d+(?:\.\d+)?(?:e[-+]?\d+)?(?=-|$)")


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Each run once, in the order given; a folder of run folders, such as a sweep's, stands for all of them.

    Raises: TypeError, ValueError, FileNotFoundError naming `runs`.
    """
    if isinstance(folders, (str, Path)) or not isinstance(folders, Sequence):
        raise TypeError(f"runs: got {type(folders).__name__}; it must be a list of run folders")
    if not folders:
        raise ValueError("runs: got none; give at least one run folder")
    folders = [run for folder in folders for run in _runs_in(Path(folder))]
    unique = {f.resolve(): f for f in reversed(folders)}
    runs = [read_run(unique[path]) for path in dict.fromkeys(f.resolve() for f in folders)]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    return runs


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself, or the run folders directly in it where it is none but holds some."""
    if not folder.is_dir() or any((folder / mark).exists() for mark in MARKS):
        return [folder]
    inside = [p for p in folder.iterdir() if (p / "config.toml").is_file() and not p.name.startswith(".")]
    return sorted(inside, key=lambda p: _order(p.name)) or [folder]


def _order(name: str) -> tuple:
    """Plain methods before their variants, which are longer; each by M, then λ, then seed, as numbers."""
    words = _NUMBER.sub("", name)
    return len(words), words, [float(number) for number in _NUMBER.findall(name)], name


def lost_cells(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """[{"run", "folder", "problem"}] of the cells of sweeps that failed before they had a run folder."""
    return [cell for folder in dict.fromkeys(Path(folder).resolve() for folder in folders) for cell in _lost(folder)]


def _lost(folder: Path) -> list[dict[str, Any]]:
    if any((folder / mark).exists() for mark in MARKS):
        return []
    notes: list[str] = []
    outcome = read_mapping(folder / SWEEP, notes)
    states, failed = _of(dict, outcome.get("runs")), _of(list, outcome.get("failed"))
    problems = {name: "failed" for name, state in states.items() if state == "failed"}
    told = [entry for entry in failed if isinstance(entry, dict) and isinstance(entry.get("run"), str)]
    problems |= {entry["run"]: str(entry.get("problem") or "failed") for entry in told}
    if notes:
        problems[SWEEP] = notes[0].removeprefix(f"{SWEEP}: ")
    return [
        {"run": name, "folder": str(folder), "problem": problem}
        for name, problem in problems.items()
        if not (folder / name / "config.toml").is_file()
    ]


def _of(kind: type, value: Any) -> Any:
    return value if isinstance(value, kind) else kind()
