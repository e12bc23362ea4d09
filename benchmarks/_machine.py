"""The machine and the versions that a figure was measured with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import ham_kernels

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, str]:
    """What has to stand beside a number for it to mean anything."""
    facts = {
        "cpu": _cpu(),
        "cores": f"{len(os.sched_getaffinity(0))}, torch uses {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ham_kernels": f"{ham_kernels.__version__}, commit {_commit()}",
        "date": datetime.date.today().isoformat(),
    }
    try:
        import torchattacks

        facts["torchattacks"] = torchattacks.__version__
    except ImportError:
        facts["torchattacks"] = "not installed"
    return facts


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()
