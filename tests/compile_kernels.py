"""Compiles every Triton kernel of the ops to a cubin, on a machine with or without a GPU, and prints JSON.

Run by test_compile.py in a process of its own, since a process that interprets kernels cannot compile them.
The launchers are really called, on CPU tensors; only the launch itself is caught. A kernel is compiled with
the types, constants and divisibility that its launcher gives it, not with those that a test believes in.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ham_kernels.ops.compact import compact_launch
from ham_kernels.ops.jump import jump_launch
from ham_kernels.ops.margin import margin_stats_launch
from ham_kernels.ops.pgd import pgd_step_launch
from ham_kernels.ops.random_start import random_start_launch
from ham_kernels.ops.weights import step_size_weights_launch, weighted_cross_entropy_launch

ARCHS = (80, 90, 100)
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


# Each case is one call of a launcher; its name is what test_compile.py looks for.
def pgd(dtype=torch.float32, shape=(8, 3, 32, 32), *, active=False, rows=False, l2=False, device="cpu"):
    x = torch.empty(shape, dtype=dtype, device=device)
    index = torch.arange(shape[0], dtype=torch.int32) if active else None
    count = torch.tensor([4], dtype=torch.int32) if active else None
    per_row = torch.rand(shape[0]) if rows else None
    pgd_step_launch(x, x, x, index, count, 0.1, 0.02, per_row, per_row, 0.0, 1.0, l2)


def jump(dtype=torch.float32, shape=(8, 3, 32, 32), *, rows=False, l2=False):
    x = torch.empty(shape, dtype=dtype)
    per_row = torch.rand(shape[0]) if rows else None
    jump_launch(x, x, x, torch.zeros(shape[0], dtype=torch.bool), 7.0, 0.1, per_row, 0.0, 1.0, l2)


def start(
    dtype=torch.float32, shape=(8, 3, 32, 32), *, channels_last=False, rows=False, seed=1, l2=False, first_row=0
):  # fmt: skip
    x = torch.rand(shape).to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    random_start_launch(x, 0.1, torch.rand(shape[0]) if rows else None, seed, 3, 0.0, 1.0, l2, first_row)


def margin(dtype, classes, *, prev=False, max_step=False, probs=False, n=40):
    z = torch.rand(n, classes).to(dtype)
    margin_stats_launch(
        z, torch.zeros(n, dtype=torch.int64), z if prev else None, torch.rand(n) if max_step else None, probs
    )


def cross_entropy(dtype, classes, *, weights=False, n=40):
    z = torch.rand(n, classes).to(dtype)
    weighted_cross_entropy_launch(z, torch.zeros(n, dtype=torch.int64), torch.rand(n) if weights else None)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = {
    "linf flat fp32": lambda: pgd(F32),
    "linf flat fp16": lambda: pgd(F16),
    "linf flat bf16": lambda: pgd(BF16),
    "linf index count rows fp32": lambda: pgd(F32, active=True, rows=True),
    "linf index count rows fp16": lambda: pgd(F16, active=True, rows=True),
    "linf index count rows bf16": lambda: pgd(BF16, active=True, rows=True),
    "linf index count fp32": lambda: pgd(F32, active=True),
    "linf flat many": lambda: pgd(F16, (2**15, 1, 64, 64), device="meta"),  # 2**17 programs
    "linf beyond 32 bits": lambda: pgd(F16, (2**16 + 8, 2, 128, 128), device="meta"),
    "linf one pixel": lambda: pgd(F32, (1, 1, 1, 1)),  # sizes and strides of 1 become constants
    "linf one pixel rows": lambda: pgd(F32, (8, 1, 1, 1), active=True, rows=True),
    "l2 fp32": lambda: pgd(F32, l2=True),
    "l2 fp32 large": lambda: pgd(F32, (8, 3, 224, 224), l2=True),
    "l2 index count rows fp16 large": lambda: pgd(F16, (8, 3, 224, 224), active=True, rows=True, l2=True),
    "l2 index count rows fp16": lambda: pgd(F16, active=True, rows=True, l2=True),
    "l2 one pixel": lambda: pgd(BF16, (8, 1, 1, 1), l2=True),
    "jump linf fp32": lambda: jump(F32),
    "jump linf rows bf16": lambda: jump(BF16, rows=True),
    "jump l2 fp32": lambda: jump(F32, l2=True),
    "jump l2 rows fp16 large": lambda: jump(F16, (8, 3, 224, 224), rows=True, l2=True),
    "jump linf one pixel": lambda: jump(F32, (8, 1, 1, 1)),
    "start linf fp32": lambda: start(F32),
    "start linf channels_last rows fp16": lambda: start(F16, channels_last=True, rows=True),
    "start linf one pixel": lambda: start(F32, (8, 1, 1, 1)),
    "start linf long seed": lambda: start(F32, seed=2**60),
    "start linf negative seed": lambda: start(BF16, seed=-1),
    "start linf second row": lambda: start(F32, first_row=1),
    "start linf last row": lambda: start(F32, first_row=2**31 - 1),
    "start l2 fp32": lambda: start(F32, l2=True),
    "start l2 large": lambda: start(F32, (2, 3, 224, 224), l2=True),
    "start l2 large channels_last rows bf16": lambda: start(
        BF16, (2, 3, 224, 224), channels_last=True, rows=True, l2=True
    ),
    "start l2 channels_last rows bf16": lambda: start(BF16, channels_last=True, rows=True, seed=2**60, l2=True),
    "start l2 second row": lambda: start(F32, l2=True, first_row=1),
    "start l2 one pixel": lambda: start(F32, (8, 1, 1, 1), l2=True),
    "margin fp32 10": lambda: margin(F32, 10),
    "margin fp32 10 prev": lambda: margin(F32, 10, prev=True),
    "margin bf16 10 prev max": lambda: margin(BF16, 10, prev=True, max_step=True),
    "margin fp16 1000 prev max probs": lambda: margin(F16, 1000, prev=True, max_step=True, probs=True),
    "margin fp32 5000 one row": lambda: margin(F32, 5000, prev=True, max_step=True, n=1),
    "weights": lambda: step_size_weights_launch(torch.rand(40), 1.0),
    "weights one row": lambda: step_size_weights_launch(torch.rand(1), 1.0),
    "weights many rows": lambda: step_size_weights_launch(torch.rand(9000), 1.0),
    "cross entropy fp32 10": lambda: cross_entropy(F32, 10, weights=True),
    "cross entropy fp16 1000": lambda: cross_entropy(F16, 1000),
    "cross entropy bf16 2 one row": lambda: cross_entropy(BF16, 2, weights=True, n=1),
    "compact 128": lambda: compact_launch(torch.ones(128, dtype=torch.bool)),
    "compact 1": lambda: compact_launch(torch.ones(1, dtype=torch.bool)),
    "compact 65536": lambda: compact_launch(torch.ones(65536, dtype=torch.bool)),
}


def caught_launch(case: str) -> tuple[JITFunction, tuple[int, ...], tuple, dict]:
    """(kernel, grid, positional arguments, keyword arguments) of the one launch of a case."""
    launches, run = [], JITFunction.run
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: launches.append((kernel, grid, args, kwargs))
    try:
        torch.manual_seed(0)
        CASES[case]()
    finally:
        JITFunction.run = run
    (launch,) = launches
    return launch


def source_and_options(kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """What Triton's own launch would compile: types, constants, and which values divide by 16."""
    kwargs = dict(kwargs)
    values = [*args, *(kwargs.pop(name) for name in kernel.arg_names[len(args) :])]
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and free):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            free = free and value.data_ptr() % 16 == 0
        elif type(value) is int:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            free = free and value % 16 == 0
        else:
            assert type(value) is float, f"{parameter.name}: a launcher gives {value!r}"
            signature[parameter.name] = "fp32"
            free = False
        if free and signature[parameter.name] != "constexpr":
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), kwargs


def spilled_bytes(ptx: str, arch: int) -> int | None:
    """Bytes that ptxas spills from registers to memory; None if this Triton's ptxas cannot be asked."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        ptxas = get_ptxas(arch).path
    except (ImportError, AttributeError, TypeError):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = re.search(r"\.target (\w+)", ptx)[1]
        command = [ptxas, "-v", f"--gpu-name={name}", str(source), "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill", report))


def compiled(case: str) -> list[dict]:
    rows = []
    for arch in ARCHS:
        row = {"case": case, "arch": arch}
        try:
            kernel, grid, args, kwargs = caught_launch(case)
            row |= {"kernel": kernel.__name__, "grid": grid}
            source, options = source_and_options(kernel, args, kwargs)
            row["types"] = source.signature
            asm = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm
            accesses = re.findall(r"\b((?:ld|st)\.global\S*)\s", asm["ptx"])
            row |= {"cubin_bytes": len(asm["cubin"]), "accesses": Counter(accesses)}
            row["spilled_bytes"] = spilled_bytes(asm["ptx"], arch) if arch == 90 else None
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), help="default: all")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        print(json.dumps([row for rows in pool.map(compiled, options.cases) for row in rows], indent=1))
