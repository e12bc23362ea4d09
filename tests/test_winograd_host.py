"""The Winograd kernels on buffers of exactly their size: AddressSanitizer sees what lies outside them."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from ham_kernels.ops import winograd
from ham_kernels.ops.native import cpu

TESTS = Path(__file__).resolve().parent
LANES = [w for w in (8, 16) if winograd.status()[0] is not None and w <= winograd.lanes()]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != cpu.MACHINE, reason="no g++, or no x86-64"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    binary = tmp_path_factory.mktemp("host_cpu") / "run_winograd"
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = ["g++", "-std=c++17", "-O1", *checks, f"-I{TESTS.parent / 'csrc'}"]
    command += [str(TESTS / "host_cpu/run_winograd.cpp"), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("g++ has no sanitizers here")
    assert done.returncode == 0, done.stderr
    return binary


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("is_bf16", [0, 1], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("threads", "shape"),
    [
        (1, (1, 1, 1, 16, 16)),  # one pixel: three sides of its tile lie outside
        (2, (3, 5, 7, 16, 48)),  # edges; an odd number of panels
        (1, (2, 16, 16, 16, 16)),  # more tiles than a block
        (7, (1, 8, 4, 32, 80)),  # groups of panels, the last one shorter
        (3, (1, 9, 3, 80, 16)),  # two chunks of products
        (2, (1, 4, 4, 352, 352)),  # weights above a cache
    ],
    ids=str,
)
def test_nothing_outside_the_buffers_is_touched(program, threads, shape, is_bf16, lanes):
    done = subprocess.run(
        [program, *map(str, (lanes, threads, is_bf16, *shape))], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
