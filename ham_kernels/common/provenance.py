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


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, with family and model on x86: virtual machines name processors alike that are not as fast."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    name = told.get("model name") or platform.machine()
    which = ", ".join(f"{key.split()[-1]} {told[key]}" for key in ("cpu family", "model") if key in told)
    return f"{name} ({which})" if which else name
