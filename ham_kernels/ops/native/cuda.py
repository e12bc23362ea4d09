"""Builds the CUDA extension with one direct nvcc call, and writes down what happened.

Standard library only, and nothing of this package, in environments that may lack torch: the build backend loads this
file by its path, and setup.py with `cpu` and `build`, which are above it.

``HAM_BUILD_CUDA``  unset: build where possible; 0: skip; 1: it is an error if nothing gets built.
``HAM_CUDA_ARCHS``  such as ``8.0;9.0+PTX``, ``80 90``, ``9.0a``, ``all-major``. If it is not set:
                    ``TORCH_CUDA_ARCH_LIST``, else the GPUs present, else ``all-major``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LIBRARY = "_C.so"
BUILD_INFO = "_build_info.json"
CUDA_SOURCES = "*.cu*"  # of csrc
DEFAULT_CUDA = "/usr/local/cuda"
MIN_TORCH = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000ULL"  # 2.10: one library for this and every later torch


class BuildError(RuntimeError):
    """A library was required (``HAM_BUILD_CUDA=1``, ``HAM_BUILD_CPU=1``) and could not be built."""


class Torch(NamedTuple):
    """A torch to build against: the package's folder and its version, ``2.15.0+cu132`` say."""

    path: Path
    version: str

    @property
    def usable(self) -> bool:
        """Whether the headers of the stable ABI that csrc uses are there."""
        numbers = tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])
        return numbers >= MIN_TORCH and (self.path / "include/torch/csrc/stable/library.h").is_file()


class Stop(Exception):
    """Ends a build: (status, reason[, output of the compiler])."""


def build_extension(
    root: Path, *, out_dir: Path | None = None, required: bool | None = None, log: Callable = print
) -> dict[str, Any]:
    """Compiles ``root/csrc`` into ``out_dir/_C.so`` and writes ``out_dir/_build_info.json``.

    After any status other than ``built`` there is no ``_C.so``: an older one would not be of this csrc.

    Args:
        root: the checkout, with ``csrc`` and ``pyproject.toml``.
        out_dir: where the files go; ``root/ham_kernels`` by default.
        required: True: raise where nothing was built; False: do not build; None: best effort.
            By default what ``HAM_BUILD_CUDA`` says.
        log: receives the lines to show.

    Returns:
        What was written: ``status`` (``built``, ``skipped``, ``failed``), ``reason``, ``versions``,
        ``archs``, ``command``, ``csrc_sha256``, ``library_bytes``, ``output`` (of a compiler that failed).

    Raises:
        ValueError: a ``HAM_*`` variable holds something else than what is allowed.
        BuildError: nothing was built, and ``required``.
    """
    root = Path(root).resolve()
    out_dir = root / "ham_kernels" if out_dir is None else Path(out_dir).resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    mode = build_mode() if required is None else required
    python = ".".join(map(str, sys.version_info[:3]))
    versions = {"package": _package_version(root), "python": python, "torch": None, "nvcc": None}
    info: dict[str, Any] = {"status": "", "reason": "", "versions": versions, "archs": [], "command": None}
    info |= {"csrc_sha256": csrc_hash(root), "library_bytes": None, "output": []}

    def work() -> str:
        _build(root, out_dir, mode, info, log)
        return f"compiled with nvcc {versions['nvcc']} for {', '.join(info['archs'])}"

    return written_down(work, info, out_dir / LIBRARY, out_dir / BUILD_INFO, mode, "HAM_BUILD_CUDA", log)


def _build(root: Path, out_dir: Path, mode: bool | None, info: dict[str, Any], log: Callable) -> None:
    """Finds the tools and compiles; fills ``info`` as it learns. Raises Stop."""
    again = "run `python -m ham_kernels build` in the checkout"
    if mode is False:
        raise Stop("skipped", "HAM_BUILD_CUDA=0 asks for no CUDA extension")
    nvcc = find_nvcc()
    if nvcc is None:
        places = "$CUDA_HOME/bin, $CUDA_PATH/bin, PATH or /usr/local/cuda/bin (Linux only)"
        raise Stop("skipped", f"no nvcc in {places}; install the CUDA toolkit, then {again}")
    info["versions"]["nvcc"] = nvcc_version(nvcc)
    torch = find_torch()
    if torch is None:
        raise Stop("skipped", f"no torch to build against; install torch 2.10 or later, then {again}")
    info["versions"]["torch"] = torch.version
    if not torch.usable:
        have = f"torch {torch.version} in {torch.path} lacks the headers of torch 2.10 or later"
        raise Stop("skipped", f"{have}; upgrade torch, then {again}")
    try:
        info["archs"] = cuda_archs(nvcc)
    except ValueError as error:
        if os.environ.get("HAM_CUDA_ARCHS", "").strip():
            raise
        # TORCH_CUDA_ARCH_LIST may be meant for other packages: no reason to fail an installation.
        raise Stop("failed", f"{error}; HAM_CUDA_ARCHS overrules it") from None

    log(f"ham_kernels: compiling for {', '.join(info['archs'])} against torch {torch.version}")
    compile_in_place(lambda library: nvcc_command(nvcc, torch, info["archs"], library), out_dir / LIBRARY, root, info)


def written_down(
    work: Callable[[], str], info: dict[str, Any], library: Path, record: Path, mode: bool | None, variable: str,
    log: Callable,
) -> dict[str, Any]:  # fmt: skip
    """Runs `work`, which builds `library` and returns how; writes `info` with what became of it to `record`.

    Returns info. Raises: BuildError where nothing was built and mode is True.
    """
    try:
        info["reason"] = work()
        info["status"] = "built"
        info["library_bytes"] = library.stat().st_size
    except Stop as stop:
        library.unlink(missing_ok=True)
        info["status"], info["reason"], *output = stop.args
        info["output"] = "".join(output).splitlines()[-30:]
    record.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    log(f"ham_kernels: {library.name} {info['status']}: {info['reason']}")
    for line in info["output"]:
        log(f"    {line}")
    if mode is True and info["status"] != "built":
        raise BuildError("\n".join([f"{variable}=1, but: {info['reason']}", *info["output"]]))
    return info


def compile_in_place(command_for: Callable[[Path], list[str]], target: Path, root: Path, info: dict[str, Any]) -> None:
    """Runs a compiler in `root`; only a whole library gets to `target`. Raises Stop.

    Compiled in a folder beside the target: os.replace is atomic within a file system, and a process that has the old
    library loaded keeps it.
    """
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as scratch:
        library = Path(scratch) / target.name
        command = command_for(library)
        info["command"] = shlex.join(command)
        done = run(command, cwd=root)
        if done.returncode != 0 or not library.is_file():
            error = re.search(".*(error|fatal).*|$", done.stdout)[0] or "it names no error"
            name = Path(command[0]).name
            raise Stop("failed", f"{name} ended with code {done.returncode}: {error}", done.stdout)
        os.replace(library, target)


def nvcc_command(nvcc: Path, torch: Torch, archs: list[str], library: Path) -> list[str]:
    """The one call that compiles and links; with a relative source, since error messages quote its path."""
    return [
        str(nvcc),
        *["-O3", "-std=c++17", "-shared", "--threads=0"],
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f"-isystem={torch.path / 'include'}",
        *arch_flags(archs),
        *["csrc/bindings.cu", "-o", str(library)],
        # Static and hidden: it works beside whatever libcudart torch has brought into the process.
        *["-cudart=static", "-Xlinker=--exclude-libs,ALL"],
        # Nothing of libtorch.so is used by name (it stands for libtorch_cpu and, if there, libtorch_cuda).
        *[f"-L{torch.path / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch"],
    ]


def build_mode(variable: str = "HAM_BUILD_CUDA") -> bool | None:
    """``HAM_BUILD_CUDA`` (or another) as True (required), False (skip) or None (best effort)."""
    value = os.environ.get(variable, "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable}={value!r}: allowed are 0 (skip), 1 (must be built), or unset")
    return {"": None, "0": False, "1": True}[value]


def find_nvcc() -> Path | None:
    """The first nvcc of $CUDA_HOME, $CUDA_PATH, PATH, /usr/local/cuda; None on anything but Linux."""
    if not sys.platform.startswith("linux"):
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*[f"{home}/bin/nvcc" for home in homes], "nvcc", f"{DEFAULT_CUDA}/bin/nvcc"]
    # Not resolved: a symlink or a wrapper script is called under the name that its owner gave it.
    return next((Path(path) for path in map(shutil.which, candidates) if path), None)


def nvcc_version(nvcc: Path) -> str:
    """The toolkit's version, ``13.0`` say. Raises Stop for an nvcc that does not run."""
    done = run([str(nvcc), "--version"])
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    if done.returncode != 0 or match is None:
        raise Stop("failed", f"`{nvcc} --version` ended with code {done.returncode}", done.stdout)
    return match.group(1)


def find_torch() -> Torch | None:
    """The first usable torch, else the first: of the target environment (under pip's build isolation only
    sysconfig still knows it), then on the import path. Torch is not imported.
    """
    folders = [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent)
    found = []
    for folder in folders:
        version_file = folder / "version.py"
        if version_file.is_file():
            match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", version_file.read_text(encoding="utf-8"))
            found.append(Torch(folder, match.group(1) if match else "unknown"))
    return next((torch for torch in found if torch.usable), found[0] if found else None)


def cuda_archs(nvcc: Path) -> list[str]:
    """The architectures to build for, ``["8.0", "9.0+PTX"]`` say."""
    for variable in ("HAM_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        if text := os.environ.get(variable, "").strip():
            return parse_archs(text, variable)
    present = gpu_archs()
    known = run([str(nvcc), "--list-gpu-code"]).stdout.split()
    # A GPU newer than nvcc runs the PTX that all-major contains.
    if present and all(f"sm_{arch.replace('.', '')}" in known for arch in present):
        return present
    return ["all-major"]


def parse_archs(text: str, variable: str) -> list[str]:
    """Reads ``8.0;9.0+PTX``, ``80 90``, ``9.0a`` or ``all-major``; names ``variable`` when it cannot."""
    if text in ("all", "all-major", "native"):
        return [text]
    archs = []
    for item in re.split(r"[;,\s]+", text.strip(";, \t")):
        match = re.fullmatch(r"(\d{1,2})\.?(\d)([af]?)(\+PTX)?", item, re.IGNORECASE)
        if match is None:
            allowed = "8.0;9.0+PTX, 80 90, 9.0a and the like, or one of all, all-major, native"
            raise ValueError(f"{variable}={text!r}: cannot read {item!r}; allowed: {allowed}")
        major, minor, suffix, ptx = match.groups()
        archs.append(f"{major}.{minor}{suffix.lower()}{'+PTX' if ptx else ''}")
    return list(dict.fromkeys(archs))


def arch_flags(archs: list[str]) -> list[str]:
    """nvcc's flags for what parse_archs returns."""
    if archs[0].startswith(("all", "native")):
        return [f"-arch={archs[0]}"]
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def gpu_archs() -> list[str]:
    """Compute capabilities of the GPUs present, without a CUDA context; [] where there is none."""
    done = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return sorted(set(re.findall(r"^\d+\.\d$", done.stdout, re.MULTILINE))) if done.returncode == 0 else []


def library_problem(package: Path, library: str = LIBRARY, record: str = BUILD_INFO) -> str | None:
    """Why ``package/_C.so`` must not be loaded, or None. (Loading a truncated one can kill the process.)"""
    try:
        size = (package / library).stat().st_size
        built = dict(json.loads((package / record).read_text(encoding="utf-8"))).get("library_bytes")
    except (OSError, TypeError, ValueError) as error:
        return f"no library with a record of its build: {error}"
    return None if built == size else f"{library} has {size} bytes, but {built} were built"


def csrc_hash(root: Path, files: str = CUDA_SOURCES) -> str:
    """sha256 over the names and contents of these files in ``root/csrc``; of the CUDA extension's by default."""
    digest = hashlib.sha256()
    for path in sorted((Path(root) / "csrc").glob(files)):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _package_version(root: Path) -> str:
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "([^"]+)"', text, re.MULTILINE).group(1)


def run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs a command; its output and errors come back together, and so does a command that cannot start."""
    together = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        return subprocess.run(command, cwd=cwd, text=True, errors="replace", **together)
    except OSError as error:
        return subprocess.CompletedProcess(command, error.errno or 1, stdout=str(error))
