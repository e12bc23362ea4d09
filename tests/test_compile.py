"""Every kernel becomes machine code for each supported GPU generation, on a machine without one as well."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ham_kernels.ops

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ARCHS = (80, 90, 100)
WIDE = re.compile(r"\.(v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32|v4\.[bfu]64)$")  # 16 bytes or more


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> list[dict]:
    """One row for each case of compile_kernels.py and architecture, compiled anew."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def rows_of(report, prefix):
    rows = [row for row in report if row["case"].startswith(prefix)]
    assert rows, f"no case {prefix!r} in compile_kernels.py"
    return rows


def test_all_cases_compile(report):
    errors = [f"{row['case']}, sm_{row['arch']}: {row['error']}" for row in report if "error" in row]
    assert not errors, "\n".join(errors)
    assert all(row["cubin_bytes"] > 1000 for row in report)


def test_no_kernel_is_forgotten(report):
    kernels = set()
    for module in pkgutil.iter_modules(ham_kernels.ops.__path__):
        names = vars(importlib.import_module(f"ham_kernels.ops.{module.name}"))
        kernels |= {name for name, value in names.items() if name.endswith("_kernel") and hasattr(value, "fn")}
    assert len(kernels) >= 7
    for arch in ARCHS:
        assert {row["kernel"] for row in report if row["arch"] == arch} == kernels


@pytest.mark.parametrize(
    "case",
    [
        "linf flat",
        "linf index count",
        "l2 fp32",
        "l2 index count",
        "start linf fp32",
        "jump linf fp32",
        "jump linf rows",
        "jump l2",
    ],
)
def test_images_move_in_16_byte_pieces(report, case):
    """All image traffic is wide; what is narrow is index, count, eps and step_size: one number each."""
    for row in rows_of(report, case):
        narrow = {access: n for access, n in row["accesses"].items() if not WIDE.search(access)}
        wide = {access: n for access, n in row["accesses"].items() if WIDE.search(access)}
        assert sum(n for access, n in wide.items() if access.startswith("ld")) >= 3, row
        assert sum(n for access, n in wide.items() if access.startswith("st")) >= 1, row
        assert all(access.startswith("ld") for access in narrow), row
        assert sum(narrow.values()) <= 4, row


def test_offsets_inside_a_row_fit_32_bits(report):
    """The kernels count elements of a row in int32; only the start of a row is computed in int64."""
    for row in report:
        if any(part in row["kernel"] for part in ("_pgd_", "_start_", "_jump_")):
            assert row["types"]["numel"] in ("i32", "constexpr"), row


def test_one_kernel_starts_every_slice(report):
    """Else each place of a slice in the global batch might be compiled anew."""
    assert {row["types"]["first_row"] for row in rows_of(report, "start ")} == {"i32"}


def test_nothing_spills(report):
    known = [row for row in report if row.get("spilled_bytes") is not None]
    if not known:
        pytest.skip("this Triton does not say where its ptxas is")
    assert not [(row["case"], row["spilled_bytes"]) for row in known if row["spilled_bytes"]]


def test_grids_are_launchable(report):
    """CUDA takes 2**31 - 1 programs along the first axis of a grid and 65535 along the others."""
    for row in report:
        first, *others = row["grid"]
        assert 1 <= first < 2**31, row
        assert all(1 <= n <= 65535 for n in others), row
