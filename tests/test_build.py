"""How the CUDA extension is built: the choices, and what happens when it cannot be."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ham_kernels.ops.native import cuda

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("HAM_BUILD_CUDA", "HAM_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")

# Fake compilers, in shell built-ins only: they know sm_75, sm_80 and sm_90.
ANSWERS = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 12.8, V12.8.93"; exit 0;;
  --list-gpu-code) echo "sm_75"; echo "sm_80"; echo "sm_90"; exit 0;;
esac
"""
FAILS = ANSWERS + 'echo "csrc/bindings.cu(7): error: no such thing" >&2; echo "1 error detected"; exit 2\n'
WORKS = ANSWERS + 'while [ "$1" != -o ]; do shift; done; echo library > "$2"\n'


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with neither a toolkit nor a GPU nor build variables."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(cuda, "DEFAULT_CUDA", str(tmp_path / "no-cuda"))
    return tmp_path


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_torch(monkeypatch, folder: Path, version: str | None) -> None:
    """Makes `version` the only torch to be found; None: there is none."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if version is not None:
        header = folder / "torch/include/torch/csrc/stable/library.h"
        header.parent.mkdir(parents=True)
        header.touch()
        (folder / "torch/version.py").write_text(f"__version__ = '{version}'\n")


# Choices


@pytest.mark.parametrize(
    ("text", "archs", "flags"),
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"], ["compute_80,code=sm_80", "compute_90,code=[sm_90,compute_90]"]),
        ("80 90", ["8.0", "9.0"], ["compute_80,code=sm_80", "compute_90,code=sm_90"]),
        ("9.0a, 100f", ["9.0a", "10.0f"], ["compute_90a,code=sm_90a", "compute_100f,code=sm_100f"]),
        ("12.0;120;", ["12.0"], ["compute_120,code=sm_120"]),
    ],
)
def test_archs(text, archs, flags):
    assert cuda.parse_archs(text, "X") == archs
    assert cuda.arch_flags(archs) == [f"-gencode=arch={flag}" for flag in flags]


def test_archs_by_name():
    assert cuda.arch_flags(cuda.parse_archs("all-major", "X")) == ["-arch=all-major"]


@pytest.mark.parametrize("text", ["8", "Ampere", "sm_80", "8.0;;PTX", "8.0-PTX", ";", "9.0 all-major"])
def test_archs_that_cannot_be_read_name_the_variable(text):
    with pytest.raises(ValueError, match=r"^HAM_CUDA_ARCHS='.*allowed: 8\.0;9\.0\+PTX"):
        cuda.parse_archs(text, "HAM_CUDA_ARCHS")


def test_archs_come_from_the_first_source_that_says_something(machine, monkeypatch):
    nvcc = script(machine / "bin/nvcc", WORKS)
    assert cuda.cuda_archs(nvcc) == ["all-major"]  # no GPU
    smi = machine / "bin/nvidia-smi"
    script(smi, "#!/bin/sh\necho 9.0; echo 8.0; echo 9.0\n")
    assert cuda.cuda_archs(nvcc) == ["8.0", "9.0"]
    script(smi, "#!/bin/sh\necho 9.0; echo 13.0\n")
    assert cuda.cuda_archs(nvcc) == ["all-major"]  # 13.0 is newer than this nvcc
    script(smi, "#!/bin/sh\necho 'NVIDIA-SMI has failed: 9.0'; exit 9\n")
    assert cuda.cuda_archs(nvcc) == ["all-major"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert cuda.cuda_archs(nvcc) == ["8.6"]
    monkeypatch.setenv("HAM_CUDA_ARCHS", "7.5")
    assert cuda.cuda_archs(nvcc) == ["7.5"]


def test_nvcc_is_looked_for_in_this_order(machine, monkeypatch):
    assert cuda.find_nvcc() is None
    default = script(machine / "no-cuda/bin/nvcc", WORKS)
    assert cuda.find_nvcc() == default
    target = script(machine / "elsewhere/nvcc", WORKS)
    on_path = machine / "bin/nvcc"
    on_path.symlink_to(target)
    assert cuda.find_nvcc() == on_path
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        nvcc = script(machine / variable / "bin/nvcc", WORKS)
        monkeypatch.setenv(variable, str(machine / variable))
        assert cuda.find_nvcc() == nvcc
    monkeypatch.setenv("CUDA_HOME", str(machine / "gone"))
    assert cuda.find_nvcc() == machine / "CUDA_PATH/bin/nvcc"


def test_the_torch_of_the_target_environment_wins_unless_it_is_too_old(tmp_path, monkeypatch):
    real = cuda.find_torch()
    assert real.usable, "these tests run with torch >= 2.10"
    spec = importlib.util.find_spec("torch")
    fake_torch(monkeypatch, tmp_path / "new", "3.0.1")
    assert cuda.find_torch() == (tmp_path / "new/torch", "3.0.1")
    fake_torch(monkeypatch, tmp_path / "old", "2.9.1+cpu")
    assert cuda.find_torch() == (tmp_path / "old/torch", "2.9.1+cpu")
    assert not cuda.find_torch().usable
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert cuda.find_torch() == real


def test_the_build_asks_for_torch_only_with_nvcc_and_without_torch(machine, monkeypatch):
    spec = importlib.util.spec_from_file_location("backend", ROOT / "build_tools/backend.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    build = backend.load_build_module()
    monkeypatch.setattr(build, "DEFAULT_CUDA", str(machine / "no-cuda"))
    fake_torch(monkeypatch, machine / "site", None)
    assert backend.torch_if_missing(build) == []
    script(machine / "bin/nvcc", WORKS)
    assert backend.torch_if_missing(build) == ["torch>=2.10"]
    monkeypatch.setenv("HAM_BUILD_CUDA", "0")
    assert backend.torch_if_missing(build) == []
    monkeypatch.delenv("HAM_BUILD_CUDA")
    fake_torch(monkeypatch, machine / "old", "2.5.0")
    assert backend.torch_if_missing(build) == ["torch>=2.10"]
    fake_torch(monkeypatch, machine / "new", "2.10.0")
    assert backend.torch_if_missing(build) == []


def test_build_module_needs_neither_the_package_nor_torch():
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.find_torch()
assert not {"torch", "ham_kernels"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, cuda.__file__], check=True, cwd="/")


# Failures


def build(machine, monkeypatch, torch="2.15.0"):
    """Builds where an older library lies; returns what was written, after checking that it was."""
    out = machine / "out"
    out.mkdir(exist_ok=True)
    (out / "_C.so").write_text("stale")
    fake_torch(monkeypatch, machine / f"site-{torch}", torch)
    try:
        info = cuda.build_extension(ROOT, out_dir=out, log=lambda line: None)
    finally:
        written = json.loads((out / "_build_info.json").read_text())
        assert (out / "_C.so").exists() == (written["status"] == "built")
        assert {path.name for path in out.iterdir()} <= {"_C.so", "_build_info.json"}
    assert info == written
    return written


def test_a_build_without_tools_is_skipped_with_what_to_do(machine, monkeypatch):
    info = build(machine, monkeypatch)
    assert (info["status"], info["command"]) == ("skipped", None)
    assert re.search("no nvcc in .*install the CUDA toolkit", info["reason"])
    script(machine / "bin/nvcc", WORKS)
    info = build(machine, monkeypatch, torch=None)
    assert (info["status"], info["versions"]["nvcc"]) == ("skipped", "12.8")
    assert "no torch to build against" in info["reason"]
    info = build(machine, monkeypatch, torch="2.9.1")
    assert (info["status"], info["versions"]["torch"]) == ("skipped", "2.9.1")
    assert re.search(r"torch 2\.9\.1 in .* upgrade torch", info["reason"])


def test_a_failed_build_says_why_and_leaves_no_library(machine, monkeypatch):
    script(machine / "bin/nvcc", FAILS)
    info = build(machine, monkeypatch)
    assert info["status"] == "failed"
    assert info["reason"] == "nvcc ended with code 2: csrc/bindings.cu(7): error: no such thing"
    assert info["output"] == ["csrc/bindings.cu(7): error: no such thing", "1 error detected"]
    assert info["csrc_sha256"] == cuda.csrc_hash(ROOT)
    script(machine / "bin/nvcc", "#!/nowhere/sh\n")
    info = build(machine, monkeypatch, torch="2.15.1")
    assert (info["status"], info["versions"]["nvcc"]) == ("failed", None)
    assert "nvcc --version` ended with code" in info["reason"]


def test_ham_build_cuda(machine, monkeypatch):
    script(machine / "bin/nvcc", FAILS)
    monkeypatch.setenv("HAM_BUILD_CUDA", "1")
    message = r"(?s)HAM_BUILD_CUDA=1, but: nvcc ended with code 2.*1 error detected"
    with pytest.raises(cuda.BuildError, match=message):
        build(machine, monkeypatch)
    monkeypatch.setenv("HAM_BUILD_CUDA", "0")
    assert build(machine, monkeypatch, torch="2.15.1")["status"] == "skipped"
    monkeypatch.setenv("HAM_BUILD_CUDA", "yes")
    with pytest.raises(ValueError, match=r"HAM_BUILD_CUDA='yes': allowed are 0 \(skip\), 1"):
        cuda.build_extension(ROOT, out_dir=machine / "out2", log=lambda line: None)


def test_arch_lists_that_cannot_be_read(machine, monkeypatch):
    script(machine / "bin/nvcc", WORKS)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    info = build(machine, monkeypatch)
    assert info["status"] == "failed"
    assert "TORCH_CUDA_ARCH_LIST='Ampere'" in info["reason"]
    monkeypatch.setenv("HAM_CUDA_ARCHS", "8.0+PTX")
    info = build(machine, monkeypatch, torch="2.15.1")
    assert (info["status"], info["archs"]) == ("built", ["8.0+PTX"])
    monkeypatch.setenv("HAM_CUDA_ARCHS", "fast")
    with pytest.raises(ValueError, match="HAM_CUDA_ARCHS='fast'"):
        cuda.build_extension(ROOT, out_dir=machine / "out2", log=lambda line: None)


def test_only_the_library_that_was_built_may_be_loaded(machine, monkeypatch):
    assert "no library with a record" in cuda.library_problem(machine / "out")
    script(machine / "bin/nvcc", WORKS)
    build(machine, monkeypatch)
    assert cuda.library_problem(machine / "out") is None
    (machine / "out/_C.so").write_text("lib")
    assert cuda.library_problem(machine / "out") == "_C.so has 3 bytes, but 8 were built"


def test_every_change_in_csrc_changes_the_hash(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    hashes = {cuda.csrc_hash(ROOT), cuda.csrc_hash(tmp_path)}
    assert len(hashes) == 1
    with open(tmp_path / "csrc/compact.cuh", "a") as file:
        file.write("\n")
    hashes.add(cuda.csrc_hash(tmp_path))
    (tmp_path / "csrc/compact.cuh").rename(tmp_path / "csrc/compact2.cuh")
    hashes.add(cuda.csrc_hash(tmp_path))
    assert len(hashes) == 3


# What an installation brings
def extras() -> dict[str, list[str]]:
    """{extra: the names of what it asks for, extras within it resolved}."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def names(extra: str) -> list[str]:
        found = []
        for requirement in told[extra]:
            name, inner = re.match(r"([\w.-]+)(?:\[(.*)\])?", requirement).groups()
            found += [n for i in inner.split(",") for n in names(i)] if name == "ham_kernels" else [name]
        return found

    return {extra: names(extra) for extra in told}


def test_only_its_own_extra_asks_for_torchattacks():
    """It pins a requests of 2020, which drags old packages into every environment that has it."""
    assert [extra for extra, asked in extras().items() if "torchattacks" in asked] == ["torchattacks"]
    assert {"pyautoattack", "timm", "torchvision"} <= set(extras()["test"])
    installs = re.findall(r"pip install .*", "\n".join((ROOT / f).read_text() for f in ("README.md", ".ci/run")))
    asked = [line for line in installs if "torchattacks" in line]
    assert len(asked) == 1
    assert "column for a torchattacks loop" in asked[0]  # of the benchmark that is told where it is
