"""The CUDA extension as users get it: compiled by the real nvcc, inside a wheel, and seen by the doctor."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ham_kernels.commands import doctor
from ham_kernels.ops.native import cpu, cuda

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

needs_nvcc = pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc to build the extension with")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A real build for three architectures: the folder with _C.so and _build_info.json."""
    out = tmp_path_factory.mktemp("extension")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAM_CUDA_ARCHS", "8.0;9.0;10.0+PTX")
        info = cuda.build_extension(ROOT, out_dir=out, required=True)
    assert info["status"] == "built"
    assert info["archs"] == ["8.0", "9.0", "10.0+PTX"]
    assert info["csrc_sha256"] == cuda.csrc_hash(ROOT)
    assert cuda.library_problem(out) is None
    return out


def python(code, *arguments, **environment):
    """Runs code in a fresh interpreter: this one has loaded its own extension."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@needs_nvcc
def test_the_library_contains_code_for_the_architectures_asked_for(built):
    cuobjdump = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if cuobjdump is None and spec is not None:  # Triton brings one
        cuobjdump = shutil.which(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))
    if cuobjdump is None:
        pytest.skip("no cuobjdump, neither on PATH nor in Triton")
    command = [cuobjdump, "--list-elf", "--list-ptx", str(built / "_C.so")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for arch in ("80", "90", "100"):
        assert f"sm_{arch}.cubin" in listing
    assert "sm_100.ptx" in listing
    assert "sm_75" not in listing


LOAD = """
import sys, torch
library = torch.library.Library("ham_kernels", "DEF")
library.define("compact(Tensor flags) -> (Tensor index, Tensor count)")
torch.ops.load_library(sys.argv[1])
assert torch._C._dispatch_has_kernel_for_dispatch_key("ham_kernels::compact", "CUDA")

def error(call, *arguments):
    try:
        call(*arguments)
    except (RuntimeError, NotImplementedError) as error:
        print(str(error).splitlines()[0])

op = torch.ops.ham_kernels.compact.default
error(op, torch.zeros(4, dtype=torch.bool))
# Past the dispatcher the CUDA implementation sees a CPU tensor: enough to reach its checks without a GPU.
for flags in (torch.zeros(4), torch.zeros(2, 2, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)[::2]):
    error(op._op_dk, torch._C.DispatchKey.CUDA, flags)
"""


@needs_nvcc
def test_the_library_loads_and_names_what_is_wrong_with_flags(built):
    done = python(LOAD, built / "_C.so")
    assert done.returncode == 0, done.stderr
    wrong_device, wrong_dtype, wrong_shape, wrong_stride = done.stdout.splitlines()
    assert "Could not run 'ham_kernels::compact' with arguments from the 'CPU' backend" in wrong_device
    assert "flags: dtype is Float, allowed is Bool" in wrong_dtype
    assert "flags: has 2 dimensions, allowed is 1" in wrong_shape
    assert "flags: stride is 2, allowed is 1" in wrong_stride
    assert str(ROOT) not in done.stdout, "paths of the build machine do not belong in messages"


# A checkout with the leftovers of an older build


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "_*.so", "_build*_info.json")
    for name in ("ham_kernels", "python", "csrc", "build_tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for stale in (
        "ham_kernels/_C.so",
        "ham_kernels/_cpu.so",
        "build/lib/ham_kernels/_C.so",
        "build/lib/ham_kernels/gone.py",
    ):
        (folder / stale).parent.mkdir(parents=True, exist_ok=True)
        (folder / stale).write_text("stale")
    return folder


HOOK = """
import os, sys
sys.path.insert(0, "build_tools")
import backend
getattr(backend, sys.argv[1])(sys.argv[2])
"""


def run_hook(checkout, hook, **environment):
    pytest.importorskip("setuptools", minversion="77", reason="builds of the package need setuptools >= 77")
    wheels = checkout / "wheels"
    wheels.mkdir()
    code = f"import os; os.chdir({str(checkout)!r})\n{HOOK}"
    return python(code, hook, wheels, **environment), wheels


def test_a_wheel_holds_both_packages_and_nothing_stale(checkout):
    done, wheels = run_hook(checkout, "build_wheel", HAM_BUILD_CUDA="0", HAM_BUILD_CPU="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    assert wheel.name.startswith("ham_kernels-0.1.0-py3-none-linux")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        infos = [json.loads(archive.read(f"ham_kernels/_build{part}_info.json")) for part in ("", "_cpu")]
    assert [info["status"] for info in infos] == ["skipped", "skipped"]
    assert {"ham_kernels/commands/doctor.py", "ham_kernels/ops/compact.py", "ham_reference/__init__.py"} <= names
    templates = {path.name for path in (ROOT / "ham_kernels/report/writing/templates").iterdir()}
    assert {f"ham_kernels/report/writing/templates/{name}" for name in templates} <= names
    assert {name.split("/")[0] for name in names} == {
        "ham_kernels",
        "ham_reference",
        "ham_kernels-0.1.0.dist-info",
    }
    assert not {"ham_kernels/_C.so", "ham_kernels/_cpu.so", "ham_kernels/gone.py"} & names


def test_an_editable_build_works_in_place_and_fails_only_if_the_extension_is_required(checkout):
    nvcc = checkout / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'release 12.8'; [ $1 = --version ] || exit 3\n")
    nvcc.chmod(0o755)
    machine = {"CUDA_HOME": str(checkout / "cuda"), "HAM_CUDA_ARCHS": "9.0"}

    done, wheels = run_hook(checkout, "build_editable", HAM_BUILD_CUDA="", **machine)
    assert done.returncode == 0, done.stderr
    assert len(list(wheels.iterdir())) == 1
    info = json.loads((checkout / "ham_kernels/_build_info.json").read_text())
    assert (info["status"], info["reason"]) == ("failed", "nvcc ended with code 3: it names no error")
    assert not (checkout / "ham_kernels/_C.so").exists()

    shutil.rmtree(wheels)
    done, _ = run_hook(checkout, "build_editable", HAM_BUILD_CUDA="1", **machine)
    assert done.returncode != 0
    assert "HAM_BUILD_CUDA=1, but: nvcc ended with code 3" in done.stderr


def test_a_wrong_value_ends_a_build_in_one_line(checkout):
    done, _ = run_hook(checkout, "build_wheel", HAM_BUILD_CUDA="0", HAM_BUILD_CPU="yes")
    assert done.returncode != 0
    assert "error: HAM_BUILD_CPU='yes'" in done.stderr


# The doctor


def test_the_doctor_reports_every_op_as_text_and_as_json(capsys):
    code = doctor.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["ok", "versions", "gpus", "extension", "build", "cpu_library", "backends"]
    assert code == (0 if report["ok"] else 1)
    assert {"margin_stats", "compact"} <= set(report["backends"])
    for row in report["backends"].values():
        assert row["cpu"]["backend"] == "torch"
        assert row["cuda"]["backend"] in ("cuda-ext", "triton", "torch")
        assert row["cuda"]["reason"]
    assert doctor.main([]) == code
    text = capsys.readouterr().out
    library = report["cpu_library"]
    told = (report["build"]["reason"], library["reason"], library["build"]["reason"], report["versions"]["torch"])
    for expected in (*report["backends"], *told):
        assert expected in text


@pytest.mark.parametrize(("gpu", "loaded", "code"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_the_doctor_fails_where_a_gpu_is_without_extension(monkeypatch, capsys, gpu, loaded, code):
    gpus = [{"name": "Some GPU", "capability": "9.0"}] if gpu else []
    monkeypatch.setattr(doctor, "gpus_present", lambda: ("580.0", gpus))
    monkeypatch.setattr(doctor._library, "extension_status", lambda: (loaded, "because"))
    assert doctor.main([]) == code
    assert ("PROBLEM" in capsys.readouterr().out) == (code == 1)


def test_the_doctor_sees_when_csrc_has_changed(checkout):
    package = checkout / "ham_kernels"
    assert doctor.compare_sources(package) == "unknown"
    info = cuda.build_extension(checkout, required=False, log=lambda line: None)
    assert doctor.compare_sources(package) == "unknown"  # skipped: nothing was built
    (package / "_build_info.json").write_text(json.dumps({**info, "status": "built"}))
    assert doctor.compare_sources(package) == "current"
    with open(checkout / "csrc/compact.cuh", "a") as file:
        file.write("// changed\n")
    assert doctor.compare_sources(package) == "stale"
    for broken in ("{", "[1]"):
        (package / "_build_info.json").write_text(broken)
        assert "cannot be read" in doctor.read_build_info(package)["reason"]
        assert "no library with a record of its build" in cuda.library_problem(package)


@needs_nvcc
def test_the_doctor_survives_a_truncated_library(built, checkout):
    package = checkout / "ham_kernels"
    shutil.copy(built / "_build_info.json", package)
    (package / "_C.so").write_bytes((built / "_C.so").read_bytes()[:50_000])
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from ham_kernels.commands import doctor; doctor.main(['--json'])"
    )
    done = python(code, checkout)
    assert done.stdout, f"ended with code {done.returncode}: {done.stderr}"
    extension = json.loads(done.stdout)["extension"]
    assert not extension["loaded"]
    assert "_C.so has 50000 bytes" in extension["reason"]


def test_the_doctor_tells_of_the_cpu_library(tmp_path, monkeypatch):
    package = tmp_path / "ham_kernels"
    package.mkdir()
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(doctor, "PACKAGE", package)
    monkeypatch.setattr(doctor.winograd, "status", lambda: (None, "why not"))
    info = {"status": "built", "reason": "how", "output": ["a compiler's line"]}
    info["csrc_sha256"] = cuda.csrc_hash(tmp_path, cpu.SOURCES)
    (package / cpu.BUILD_INFO).write_text(json.dumps(info))
    (package / cuda.BUILD_INFO).write_text(json.dumps({"status": "failed", "reason": "of CUDA"}))
    report = doctor.collect()
    library = report["cpu_library"]
    assert (library["loaded"], library["reason"], library["sources"]) == (False, "why not", "current")
    assert library["build"]["reason"] == "how"
    section = doctor.as_text(report).split("CPU library")[1].split("\n\n")[0]
    for told in ("no: why not", "built: how", "unchanged since the build", "a compiler's line"):
        assert told in section
    with open(tmp_path / "csrc/winograd.inl", "a") as file:
        file.write("\n")
    assert doctor.collect()["cpu_library"]["sources"] == "stale"
    monkeypatch.setattr(doctor.winograd, "status", lambda: ("a library", "why"))
    assert doctor.collect()["cpu_library"]["loaded"] is True
