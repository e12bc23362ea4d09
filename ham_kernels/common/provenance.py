"""The machine, the versions and the commit that a figure was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from .processes import launched

PACKAGE = Path(__file__).resolve().parents[1]


def machine() -> dict[str, str]:
    """Processor, cores that this process may use, GPU, operating system."""
    import torch

    processes = f" in each of {n} processes" if (n := launched()) > 1 else ""
    return {
        "cpu": _cpu(),
        "cores": f"{len(os.sched_getaffinity(0))}, torch uses {torch.get_num_threads()} threads{processes}",
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.release()}",
    }


def versions(*packages: str) -> dict[str, str]:
    """Of Python, torch and ham_kernels, and of further packages where they are installed."""
    found = {"python": platform.python_version(), "ham_kernels": package_version()}
    for name in ("torch", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def package_version() -> str:
    """Of the installed package; "unknown" where it is used without an installation."""
    try:
        return metadata.version("ham_kernels")
    except metadata.PackageNotFoundError:
        return "unknown"


def commit() -> str:
    """The commit of the checkout that the package runs from, "-dirty" if changed; "unknown" without one."""
    if not (PACKAGE.parent / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    try:
        env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        out = subprocess.run(command, cwd=PACKAGE, env=env, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
