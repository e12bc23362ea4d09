"""``python -m ham_kernels doctor [--json]``: what runs where on this machine, and why.

pip hides what a build prints; this shows it, together with the backend of every op.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..common.provenance import package_version
from ..ops import _library, winograd
from ..ops.native import cpu, cuda

PACKAGE = Path(__file__).resolve().parents[1]


def main(argv: list[str]) -> int:
    """Prints the report. Returns 1 where there is a GPU and the CUDA extension is not loaded, or for a faulty model."""
    parser = argparse.ArgumentParser(prog="ham doctor", description="Shows which backend each op uses, and why.")
    parser.add_argument("--json", action="store_true", help="the same report as JSON")
    parser.add_argument(
        "--model", metavar="MODULE:FUNCTION",
        help="looks at a model instead: what would make attacks on it blind, or its accuracies worthless. FUNCTION "
        "takes nothing and returns the model (a class will do); MODULE is found from this folder",
    )  # fmt: skip
    parser.add_argument("--input", default="3x32x32", metavar="CxHxW", help="the size of its images (default: 3x32x32)")
    arguments = parser.parse_args(argv)
    if arguments.model is not None:
        from .model_doctor import look_at

        found = look_at(arguments.model, arguments.input)
        print(json.dumps(found, indent=2) if arguments.json else "\n".join(found["lines"]))
        return 0 if found["ok"] else 1

    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else as_text(report))
    return 0 if report["ok"] else 1


def collect() -> dict[str, Any]:
    """The report as a dict; its keys are the keys of ``--json``."""
    driver, gpus = gpus_present()
    loaded, reason = _library.extension_status()
    backends = {
        op: {device: dict(zip(("backend", "reason"), choice, strict=True)) for device, choice in row.items()}
        for op, row in _library.backends().items()
    }
    return {
        "ok": loaded or not gpus,
        "versions": {
            "ham_kernels": package_version(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torch_cuda": torch.version.cuda,
            "triton": _library.triton.__version__ if _library.triton else None,
            "driver": driver,
        },
        "gpus": gpus,
        "extension": {"loaded": loaded, "reason": reason, "sources": compare_sources(PACKAGE)},
        "build": read_build_info(PACKAGE),
        "cpu_library": _cpu_library(),
        "backends": backends,
    }


def gpus_present() -> tuple[str | None, list[dict[str, str]]]:
    """The driver's version and each GPU; by nvidia-smi too, since a CPU build of torch sees none."""
    query = ["--query-gpu=driver_version,compute_cap,name", "--format=csv,noheader"]
    smi = shutil.which("nvidia-smi")
    listing = "" if smi is None else subprocess.run([smi, *query], capture_output=True, text=True).stdout
    rows = re.findall(r"^([\d.]+), (\d+\.\d), (.+)$", listing, re.MULTILINE)
    driver = rows[0][0] if rows else None
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return driver, [{"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in found]
    return driver, [{"name": name, "capability": capability} for _, capability, name in rows]


def _cpu_library() -> dict[str, Any]:
    """Of Winograd convolutions: what runs now, and what the build said."""
    library, reason = winograd.status()
    info = read_build_info(PACKAGE, cpu.BUILD_INFO)
    sources = compare_sources(PACKAGE, cpu.BUILD_INFO, cpu.SOURCES)
    return {"loaded": library is not None, "reason": reason, "sources": sources, "build": info}


def read_build_info(package: Path, record: str = cuda.BUILD_INFO) -> dict[str, Any]:
    """What the last build wrote down; says so where there is nothing to read."""
    path = package / record
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        return {"status": "unknown", "reason": f"{path.name} gives none", **info}
    except FileNotFoundError:
        reason = f"{path.name} is not there: run `pip install -e .` or `python -m ham_kernels build`"
    except (OSError, TypeError, ValueError) as error:
        reason = f"{path.name} cannot be read: {error}"
    return {"status": "unknown", "reason": reason}


def compare_sources(package: Path, record: str = cuda.BUILD_INFO, files: str = cuda.CUDA_SOURCES) -> str:
    """Whether csrc is still what was built: ``current``, ``stale``, or ``unknown`` (no build, or no csrc)."""
    root = package.parent
    build = read_build_info(package, record)
    if build["status"] != "built" or not (root / "csrc" / "bindings.cu").is_file():
        return "unknown"
    return "current" if build.get("csrc_sha256") == cuda.csrc_hash(root, files) else "stale"


def as_text(report: dict[str, Any]) -> str:
    """The report in aligned lines."""
    versions, build, extension = report["versions"], report["build"], report["extension"]
    cpu = report["cpu_library"]
    sources = {
        "current": "unchanged since the build",
        "stale": "CHANGED since the build: run `python -m ham_kernels build`",
        "unknown": "nothing to compare (no build, or not a checkout)",
    }
    cuda = versions["torch_cuda"]
    used = {name: value for name, value in build.get("versions", {}).items() if value}
    gpus = [f"{gpu['name']} (compute capability {gpu['capability']})" for gpu in report["gpus"]]
    sections = {
        "Versions": [
            ("ham_kernels", versions["ham_kernels"]),
            ("python", versions["python"]),
            ("torch", versions["torch"] + (f" (CUDA {cuda})" if cuda else " (a build without CUDA)")),
            ("triton", versions["triton"] or "none"),
            ("driver", versions["driver"] or "none found"),
            *([(f"GPU {i}", gpu) for i, gpu in enumerate(gpus)] or [("GPU", "none")]),
        ],
        "CUDA extension": [
            ("loaded", f"{'yes' if extension['loaded'] else 'no'}: {extension['reason']}"),
            ("build", f"{build['status']}: {build['reason']}"),
            ("built with", ", ".join(f"{name} {value}" for name, value in used.items()) or "unknown"),
            ("archs", ", ".join(build.get("archs", [])) or "none"),
            ("csrc", sources[extension["sources"]]),
            *[("", line) for line in build.get("output", [])],
        ],
        "CPU library (Winograd convolutions)": [
            ("loaded", f"{'yes' if cpu['loaded'] else 'no'}: {cpu['reason']}"),
            ("build", f"{cpu['build']['status']}: {cpu['build']['reason']}"),
            ("csrc", sources[cpu["sources"]]),
            *[("", line) for line in cpu["build"].get("output", [])],
        ],
        **{
            f"Backends on {device.upper()}": [
                (op, f"{row[device]['backend']:<10}{row[device]['reason']}") for op, row in report["backends"].items()
            ]
            for device in ("cpu", "cuda")
        },
    }
    width = max(len(label) for rows in sections.values() for label, _ in rows)
    blocks = [
        "\n".join([title, *[f"  {label:<{width}}  {text}".rstrip() for label, text in rows]])
        for title, rows in sections.items()
    ]
    if not report["ok"]:
        verdict = "PROBLEM: there is a GPU, and the CUDA extension is not loaded (see above)."
    elif report["gpus"]:
        verdict = "All well."
    else:
        verdict = "All well for a machine without a GPU; `Backends on CUDA` is what a GPU here would get."
    return "\n\n".join([*blocks, verdict])
