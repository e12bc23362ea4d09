"""The data pipeline alone: images per second from memory (the goal) and from files (for information).

    python benchmarks/bench_input.py            50 000 random CIFAR-shaped images, 400 generated JPEGs
    python benchmarks/bench_input.py --check    exit 1 when the goal is missed

The goal is 10 000 images per second from memory on 2 CPU cores and 200 000 on a GPU: random crop and flip, batches of
128, ready for the model as float32 in [0, 1] on its device. A PreActResNet-18 in PGD training takes a fraction of that.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from readme import argument_types as kinds
from readme.machine import machine
from readme.output import write_json

from ham_kernels import data

GOAL = {"cpu": 10_000, "cuda": 200_000}  # images per second
PHOTO = (500, 375)  # ImageNet's usual width and height
BATCH = 128


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=50_000, metavar="N", help="in memory (default 50 000)")
    p.add_argument("--files", type=int, default=400, metavar="N", help="JPEGs to generate; 0 for none (default 400)")
    p.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="that decode the files (default 0 2)")
    p.add_argument("--repetitions", type=int, default=7, help="epochs measured, after one that is not (default 7)")
    p.add_argument("--device", type=kinds.device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=kinds.folder, default=Path("runs"), help="folder for the JSON (default runs)")
    p.add_argument("--check", action="store_true", help="exit 1 when the goal is missed")
    args = p.parse_args()
    for name, low in (("images", 1), ("files", 0), ("repetitions", 2)):
        if getattr(args, name) < low:
            p.error(f"--{name}: got {getattr(args, name)}; it must be at least {low}")
    if min(args.workers, default=0) < 0:
        p.error(f"--workers: got {min(args.workers)}; none may be negative")
    return args


def rates(loader, images: int, repetitions: int) -> list[float]:
    """Images per second of each epoch; the first epoch, which warms up, is not counted."""
    out = []
    for epoch in range(repetitions + 1):
        loader.set_epoch(epoch)
        _wait(loader)
        start = time.perf_counter()
        _consume(loader)
        _wait(loader)
        out.append(images / (time.perf_counter() - start))
    return out[1:]


def _consume(loader: Iterable) -> None:
    for _ in loader:
        pass


def _wait(loader) -> None:
    if loader.device.type == "cuda":
        torch.cuda.synchronize(loader.device)


def from_memory(args: argparse.Namespace) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    y = torch.randint(0, 10, (args.images,), generator=generator)
    loader = data.Batches(x, y, BATCH, shuffle=True, augment="crop+flip", device=args.device)
    return rates(loader, args.images, args.repetitions)


def from_files(args: argparse.Namespace) -> dict[str, list[float]]:
    """{workers: rates}, of generated photographs cropped to 224."""
    with tempfile.TemporaryDirectory() as folder:
        files = [_photo(Path(folder), i) for i in range(args.files)]
        y = torch.zeros(len(files), dtype=torch.int64)
        return {
            f"{workers} workers": rates(
                data.FileBatches(
                    files, y, BATCH, shuffle=True, augment="crop+flip", workers=workers, device=args.device
                ),
                args.files, max(2, args.repetitions // 2),
            )
            for workers in args.workers
        }  # fmt: skip


def _photo(folder: Path, i: int) -> str:
    """A smooth picture with some grain, since noise alone would make an unusually large JPEG."""
    rng = np.random.default_rng(i)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(PHOTO, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (PHOTO[1], PHOTO[0], 1))
    file = folder / f"{i}.jpg"
    Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return str(file)


def summary(values: list[float]) -> dict:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values), "all": values}


def line(name: str, s: dict) -> str:
    return f"{name:<24} {s['median']:>12,.0f} images/s   ({s['lowest']:,.0f} to {s['highest']:,.0f})"


def main() -> int:
    args = parse()
    kind = torch.device(args.device).type
    about = machine()
    print("; ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    memory = summary(from_memory(args))
    print(line("memory, 3x32x32", memory), flush=True)
    files = {name: summary(v) for name, v in (from_files(args) if args.files else {}).items()}
    for name, s in files.items():
        print(line(f"files to 224, {name}", s))
    goal, held = GOAL[kind], memory["median"] >= GOAL[kind]
    print(
        f"goal {goal:,} images/s from memory on {'a GPU' if kind == 'cuda' else '2 CPU cores'}, "
        f"measured {memory['median']:,.0f}: {'held' if held else 'not held'}"
    )
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()} | {"batch_size": BATCH}
    path = args.out / f"bench_input_{kind}.json"
    verdict = {"goal": goal, "measured": memory["median"], "held": held}
    result = {"machine": about, "settings": settings, "verdict": verdict, "memory": memory, "files": files}
    write_json(path, result)
    print(f"written: {path}")
    if args.check and not held:
        print("--check: the goal is missed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
