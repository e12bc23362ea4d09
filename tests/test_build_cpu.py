"""How the CPU library is built: the compilers, the choices, and what happens when it cannot be."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ham_kernels.ops.native import build as native
from ham_kernels.ops.native import cpu, cuda

ROOT = Path(__file__).resolve().parents[1]
WORKS = '#!/bin/sh\n[ "$1" = --version ] && { echo "some compiler 1.0"; exit 0; }\n'
FAILS = WORKS + 'echo "csrc/winograd.cpp(7): error: no such thing"; exit 2\n'
WORKS += 'while [ "$1" != -o ]; do shift; done; echo library > "$2"\n'

needs_compiler = pytest.mark.skipif(
    cpu.find_compiler() is None or platform.machine() != cpu.MACHINE,
    reason="no C++ compiler, or no x86-64",
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An x86-64 without any compiler."""
    for variable in ("HAM_BUILD_CPU", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def build(machine) -> dict:
    """Builds where an older library lies; returns what was written, after checking that it was."""
    out = machine / "out"
    out.mkdir(exist_ok=True)
    (out / "_cpu.so").write_text("stale")
    try:
        info = cpu.build_library(ROOT, out_dir=out, log=lambda line: None)
    finally:
        written = json.loads((out / "_build_cpu_info.json").read_text())
        assert (out / "_cpu.so").exists() == (written["status"] == "built")
        assert {path.name for path in out.iterdir()} <= {"_cpu.so", "_build_cpu_info.json"}
    assert info == written
    assert info["csrc_sha256"] == cuda.csrc_hash(ROOT, cpu.SOURCES)
    return written


def test_compilers_are_looked_for_in_this_order(machine, monkeypatch):
    assert cpu.find_compiler() is None
    for name in ("c++", "clang++", "g++"):
        script(machine / "bin" / name, WORKS)
        assert cpu.find_compiler() == [name]
    own = script(machine / "mine", WORKS)
    monkeypatch.setenv("CXX", f"{own} -m64")
    assert cpu.find_compiler() == [str(own), "-m64"]
    monkeypatch.setenv("CXX", "gone")
    assert cpu.find_compiler() == ["g++"]
    monkeypatch.setenv("CXX", 'g++ "')
    info = build(machine)
    assert info["status"] == "failed"
    assert info["reason"] == "CXX='g++ \"' cannot be read: No closing quotation"


def test_what_cannot_be_built_is_skipped_with_the_reason(machine, monkeypatch):
    info = build(machine)
    assert (info["status"], info["command"]) == ("skipped", None)
    assert "no C++ compiler ($CXX, g++ or clang++); install one, then run" in info["reason"]
    script(machine / "bin/g++", WORKS)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    info = build(machine)
    assert info["status"] == "skipped"
    assert info["reason"].endswith("this is linux, aarch64")


def test_it_is_for_linux(machine, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    info = build(machine)
    assert info["status"] == "skipped"
    assert info["reason"].endswith("this is darwin, x86_64")


def test_the_command_serves_every_processor_and_keeps_nan():
    command = cpu.compile_command(["g++", "-m64"], Path("x.so"))
    assert command[:2] == ["g++", "-m64"]
    assert "-O3" in command
    assert not [f for f in command[2:] if f.startswith(("-march", "-mtune", "-ffast", "-Ofast", "-mavx"))]


def test_a_build_is_recorded_and_only_what_was_built_may_be_loaded(machine):
    script(machine / "bin/g++", WORKS)
    info = build(machine)
    assert (info["status"], info["compiler"]) == ("built", "some compiler 1.0")
    names = ("_cpu.so", "_build_cpu_info.json")
    assert cuda.library_problem(machine / "out", *names) is None
    (machine / "out/_cpu.so").write_text("lib")
    assert cuda.library_problem(machine / "out", *names) == "_cpu.so has 3 bytes, but 8 were built"


def test_ham_build_cpu(machine, monkeypatch):
    script(machine / "bin/g++", FAILS)
    info = build(machine)
    assert info["status"] == "failed"
    assert info["reason"] == "g++ ended with code 2: csrc/winograd.cpp(7): error: no such thing"
    monkeypatch.setenv("HAM_BUILD_CPU", "1")
    with pytest.raises(cuda.BuildError, match=r"(?s)HAM_BUILD_CPU=1, but: g\+\+ ended with code 2.*no such thing"):
        build(machine)
    monkeypatch.setenv("HAM_BUILD_CPU", "0")
    assert build(machine)["reason"] == "HAM_BUILD_CPU=0 asks for no CPU library"
    monkeypatch.setenv("HAM_BUILD_CPU", "yes")
    with pytest.raises(ValueError, match=r"HAM_BUILD_CPU='yes': allowed are 0 \(skip\), 1"):
        cpu.build_library(ROOT, out_dir=machine / "out", log=lambda line: None)


def test_what_counts_as_built(machine, monkeypatch):
    """The CUDA extension; and the CPU library, unless it is not for this machine or was not asked for."""
    made = {"cuda": "built", "cpu": "built"}
    monkeypatch.setattr(native.cuda, "build_extension", lambda *_, **__: {"status": made["cuda"]})
    monkeypatch.setattr(native.cpu, "build_library", lambda *_, **__: {"status": made["cpu"]})
    for made["cuda"], made["cpu"], code in (
        ("built", "built", 0), ("built", "skipped", 0), ("built", "failed", 1), ("skipped", "built", 1),
    ):  # fmt: skip
        assert native.main([]) == code
    assert set(native.FILES) == {"_C.so", "_build_info.json", "_cpu.so", "_build_cpu_info.json"}


def test_its_hash_follows_its_own_sources_only(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    of = lambda: [cuda.csrc_hash(tmp_path, files) for files in (cuda.CUDA_SOURCES, cpu.SOURCES)]  # noqa: E731
    before = of()
    with open(tmp_path / "csrc/winograd.inl", "a") as file:
        file.write("\n")
    after = of()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_setup_loads_it_without_the_package_or_torch():
    code = f"""
import sys, types, importlib
package = sys.modules["_ham_build"] = types.ModuleType("_ham_build")
package.__path__ = [{str(ROOT / "ham_kernels" / "ops" / "native")!r}]
module = importlib.import_module("_ham_build.build")
module.cpu.find_compiler()
assert not {{"torch", "ham_kernels"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["g++", "clang++"])
def test_real_compilers_have_nothing_to_warn_of(name, tmp_path):
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    library = tmp_path / "_cpu.so"
    command = [*cpu.compile_command([name], library), "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True).stdout
    names = {line.split()[-1] for line in exported.splitlines() if " T " in line}
    assert names == {"ham_winograd_lanes", "ham_winograd_weights", "ham_winograd_convolve"}
