"""What a run costs beside its training: a checkpoint, and the wait for the command line.

    python benchmarks/bench_run.py            PreActResNet-18 on CIFAR-shaped data, PGD-AT with a weight average
    python benchmarks/bench_run.py --check    exit 1 when a goal is missed

Goals: a checkpoint (there is one per epoch) takes at most 2 % of an epoch's training; `ham --help` takes at most 1.5 s.
The epoch is the median training step times the batches of 50 000 images. An epoch that improves on the best writes its
weights as well, once raw and once averaged: that is measured along.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from readme import argument_types as kinds
from readme.machine import machine
from readme.output import write_json

import ham_kernels as ham
from ham_kernels import models
from ham_kernels.common import files
from ham_kernels.runs import checkpoints

GOAL_SHARE, GOAL_HELP = 0.02, 1.5
IMAGES = 50_000


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="preact_resnet18", help="by name (default preact_resnet18)")
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--steps", type=int, default=1, help="training steps measured, after one that is not (default 1)")
    p.add_argument("--repetitions", type=int, default=7, help="of checkpoint and help (default 7)")
    p.add_argument("--device", type=kinds.device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=("fp32", "bf16"), help="(default bf16 on a GPU, fp32 on a CPU)")
    p.add_argument("--out", type=kinds.folder, default=Path("runs"), help="folder for the JSON (default runs)")
    p.add_argument("--check", action="store_true", help="exit 1 when a goal is missed")
    args = p.parse_args()
    args.precision = args.precision or ("fp32" if torch.device(args.device).type == "cpu" else "bf16")
    for name in ("batch_size", "steps", "repetitions"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}; it must be at least 1")
    return args


def trainer_of(args: argparse.Namespace) -> ham.HAMTrainer:
    torch.manual_seed(0)
    model = models.create(args.model, 10).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    return ham.HAMTrainer(
        model, optimizer, eps=0.031, step_size=0.007, early_drop=False, reweight=False, ema_decay=0.99,
        precision=args.precision,
    )  # fmt: skip


def step_seconds(trainer: ham.HAMTrainer, args: argparse.Namespace) -> list[float]:
    """Training steps of PGD-AT, K = 10; one on two images before them fills the optimiser's state."""
    x = torch.rand(args.batch_size, 3, 32, 32, device=args.device)
    y = torch.randint(0, 10, (args.batch_size,), device=args.device)
    trainer.train_step(x[:2], y[:2], epoch=1)
    if trainer.device.type == "cuda":
        trainer.train_step(x, y, epoch=1)
    return [trainer.train_step(x, y, epoch=1).seconds for _ in range(args.steps)]


def checkpoint_seconds(trainer: ham.HAMTrainer, args: argparse.Namespace) -> tuple[list[float], int]:
    """Of a whole save to this folder's disk, as `ham train` makes it; and the size in bytes."""
    seconds = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        folder = checkpoints.Checkpoints(folder)
        for i in range(args.repetitions):
            start = time.perf_counter()
            state = {"trainer": trainer.state_dict(), "random": checkpoints.random_states()}
            path = folder.save(state, i)
            for name, model in (("best", trainer.model), ("best_ema", trainer.ema_model)):
                files.save(folder.folder / f"{name}.pt", {"model": model.state_dict()})
            seconds.append(time.perf_counter() - start)
        return seconds, path.stat().st_size


def help_seconds(args: argparse.Namespace, *command: str) -> list[float]:
    """Of `ham ...` in a process of its own."""
    seconds = []
    for _ in range(args.repetitions):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ham_kernels", *command], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return seconds


def summary(values: list[float]) -> dict:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def main() -> int:
    args = parse()
    about = machine()
    print("; ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    helps = {name: summary(help_seconds(args, *name.split()[1:])) for name in ("ham --help", "ham train --help")}
    trainer = trainer_of(args)
    step = summary(step_seconds(trainer, args))
    seconds, size = checkpoint_seconds(trainer, args)
    saved = summary(seconds)
    epoch = step["median"] * -(-IMAGES // args.batch_size)
    share = saved["median"] / epoch
    for name, s in helps.items():
        print(f"{name:<18} {s['median']:.2f} s ({s['lowest']:.2f} to {s['highest']:.2f})")
    print(f"step of PGD-AT     {step['median']:.3f} s at batch {args.batch_size}, {args.precision}, {args.model}")
    spread = f"({saved['lowest']:.2f} to {saved['highest']:.2f})"
    print(f"checkpoint         {saved['median']:.2f} s {spread}, {size / 1e6:.0f} MB")
    verdicts = [
        {
            "goal": f"checkpoint <= {GOAL_SHARE:.0%} of an epoch",
            "measured": f"{share:.3%}",
            "held": share <= GOAL_SHARE,
        },
        {
            "goal": f"ham --help <= {GOAL_HELP} s",
            "measured": f"{helps['ham --help']['median']:.2f} s",
            "held": helps["ham --help"]["median"] <= GOAL_HELP,
        },
    ]
    for v in verdicts:
        print(f"goal: {v['goal']}; measured {v['measured']}: {'held' if v['held'] else 'not held'}")
    path = args.out / f"bench_run_{trainer.device.type}.json"
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_json(
        path,
        {
            "machine": about, "settings": settings, "verdicts": verdicts, "help": helps, "step": step,
            "checkpoint": {**saved, "bytes": size},
        },
    )  # fmt: skip
    print(f"written: {path}")
    if args.check and not all(v["held"] for v in verdicts):
        print("--check: a goal is missed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
