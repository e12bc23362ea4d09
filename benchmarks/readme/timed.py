"""Sections of README.md and docs/ from benchmarks of single steps, ops and settings. `here` is the page's folder."""

from __future__ import annotations

import json
from pathlib import Path

import bench_autoattack
import bench_fair
import bench_ranks
import bench_winograd
import methods.table as methods_table
from kernels import table as kernel_table
from training import table as training_table

from readme import measured


def devices(pattern: str) -> list[dict]:
    """One result per device, those of a GPU first."""
    found = sorted(measured.RESULTS.glob(pattern), key=lambda p: (p.stem.endswith("_cpu"), p.name))
    return [json.loads(path.read_text()) for path in found]


def training(here: Path) -> str:
    return "\n\n".join(training_table.readme_section(result) for result in devices("bench_training_*.json"))


def training_short(here: Path) -> str:
    return "\n\n".join(training_table.readme_short(result) for result in devices("bench_training_*.json"))


def method_steps(here: Path) -> str:
    return "\n\n".join(methods_table.readme_section(result) for result in devices("bench_methods_*.json"))


def autoattack(here: Path) -> str:
    return "\n\n".join(bench_autoattack.readme_section(result) for result in devices("bench_autoattack_*.json"))


def fair(here: Path) -> str:
    return "\n\n".join(bench_fair.readme_section(result) for result in devices("bench_fair_*.json"))


def kernels(here: Path) -> str:
    found = [kernel_table.readme_section(result) for result in devices("kernels_*.json")]
    return "\n\n".join(found) or "The kernels have not been timed on a GPU yet (`python benchmarks/bench_kernels.py`)."


def ranks(here: Path) -> str:
    return bench_ranks.readme_section(measured.read("bench_ranks_cpu.json"))


def winograd(here: Path) -> str:
    return bench_winograd.readme_section(measured.read("bench_winograd_cpu.json"))


def costs(here: Path) -> str:
    """What a run costs beside its training."""
    loading, run = measured.read("bench_input_cpu.json"), measured.read("bench_run_cpu.json")
    m, saved, memory = run["machine"], run["checkpoint"], loading["memory"]
    share = next(v for v in run["verdicts"] if v["goal"].startswith("checkpoint"))
    return (
        f"On {m['cpu']}, cores: {m['cores']}, torch {m['torch']}, {m['date']}: "
        f"{memory['median']:,.0f} CIFAR-sized images/s cropped and flipped from memory (`bench_input.py`); a "
        f"checkpoint of PreActResNet-18 with its weight average ({saved['bytes'] / 1e6:.0f} MB), and both "
        f"kinds of best weights, take {saved['median']:.1f} s, {share['measured']} of an epoch of PGD-AT here; "
        f"`ham --help` {run['help']['ham --help']['median']:.2f} s (`bench_run.py`)."
    )
