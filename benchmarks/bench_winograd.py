"""3x3 convolutions on the CPU: Winograd's algorithm against torch's, in time and in rounding.

    python benchmarks/bench_winograd.py

The layers are those of PreActResNet-18 on 32x32 images, for a whole batch and for the hard rows of one. All competitors
take turns in one process; times are medians. Errors are root mean squares against fp64, relative to how much the output
varies. Transforming the weights has a column of its own: a step does it four times, twice (forward and back) before the
attack and twice before the update, and not for each convolution.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from readme import argument_types as kinds
from readme.machine import machine
from readme.output import aligned, markdown, write_json
from torch import Tensor
from torch.nn import functional as F

from ham_kernels.engine import keep_freed_memory
from ham_kernels.ops.winograd import status, winograd_launch, winograd_weights

RESULTS = Path(__file__).resolve().parent / "results"
LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels in and out, side of the images
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS, TORCH, LAST = "winograd", "torch", "torch, channels_last"
JUDGED = 8  # images whose error is measured


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", type=int, default=[128, 38], help="images of a batch (default 128 38)")
    p.add_argument("--rounds", type=int, default=25)
    p.add_argument(
        "--out", type=kinds.folder, default=RESULTS, help="folder of the JSON (default: results beside this)"
    )
    args = p.parse_args(arguments)
    if min(args.rows) < JUDGED or args.rounds < 1:
        p.error(f"--rows: must be at least {JUDGED}, and --rounds at least 1")
    return args


def seconds(work: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def error(y: Tensor, right: Tensor) -> float:
    """Of the first images, relative to the standard deviation of the right answer."""
    return ((y[:JUDGED].double() - right).pow(2).mean().sqrt() / right.std()).item()


def layer(dtype: str, n: int, channels: int, side: int, rounds: int) -> dict:
    """One layer: by competitor the seconds of each round and the error."""
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    x = torch.randn(n, channels, side, side).relu().to(kind)
    weight = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
    right = F.conv2d(x[:JUDGED].double(), weight.double(), padding=1)
    last = {"memory_format": torch.channels_last}
    x_last, u = x.to(**last), winograd_weights(weight)
    weight_own, weight_last = weight.to(kind), weight.to(kind, **last)
    competitors = {
        OURS: lambda: winograd_launch(x_last, u),
        TORCH: lambda: F.conv2d(x, weight_own, padding=1),
        LAST: lambda: F.conv2d(x_last, weight_last, padding=1),
    }
    errors = {name: error(work(), right) for name, work in competitors.items()}
    taken: dict[str, list[float]] = {name: [] for name in competitors}
    transforms = []
    for _ in range(rounds):
        for name, work in competitors.items():
            taken[name].append(seconds(work))
        transforms.append(seconds(lambda: winograd_weights(weight, out=u)))
    found = {name: {"seconds": taken[name], "error": errors[name]} for name in competitors}
    about = {"dtype": dtype, "rows": n, "channels": channels, "side": side}
    return about | {"competitors": found, "transform": transforms}


def cells(layers: list[dict]) -> list[list[str]]:
    """Header and rows as text."""
    out = [["layer", "rows", *(f"{name}, ms" for name in (OURS, TORCH, LAST)), "× torch", "× channels_last",
            *(f"error, {name}" for name in (OURS, TORCH, LAST)), "weights, ms"]]  # fmt: skip
    for row in layers:
        c = row["competitors"]
        times = {name: statistics.median(v["seconds"]) for name, v in c.items()}
        ratios = [statistics.median(t / o for t, o in zip(c[who]["seconds"], c[OURS]["seconds"], strict=True))
                  for who in (TORCH, LAST)]  # fmt: skip
        out.append([
            f"{row['channels']} channels, {row['side']}×{row['side']}, {row['dtype']}", str(row["rows"]),
            *(f"{1e3 * times[name]:.1f}" for name in (OURS, TORCH, LAST)), *(f"{r:.2f}" for r in ratios),
            *(f"{c[name]['error']:.1e}" for name in (OURS, TORCH, LAST)),
            f"{1e3 * statistics.median(row['transform']):.1f}",
        ])  # fmt: skip
    return out


def readme_section(result: dict) -> str:
    m, rounds = result["machine"], result["rounds"]
    setup = (
        f"3×3 convolutions of PreActResNet-18, medians of {rounds} rounds in turn; error against fp64, relative "
        f"to the output's standard deviation (`python benchmarks/bench_winograd.py`). {m['cpu']}, cores: {m['cores']}, "
        f"torch {m['torch']}, ham_kernels {m['ham_kernels']}; {m['date']}."
    )
    return f"{setup}\n\n{markdown(cells(result['layers']))}"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    library, why = status()
    if library is None:
        print(f"no Winograd convolutions here: {why}", file=sys.stderr)
        return 1
    keep_freed_memory()
    about = machine()
    print("; ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    layers = [layer(dtype, n, *shape, args.rounds) for dtype in DTYPES for n in args.rows for shape in LAYERS]
    print(aligned(cells(layers)))
    path = args.out / "bench_winograd_cpu.json"
    write_json(path, {"machine": about, "library": why, "rounds": args.rounds, "layers": layers})
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
