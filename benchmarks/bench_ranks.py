"""Several processes against one: images per second of a training step on this machine's cores.

    python benchmarks/bench_ranks.py            2 processes of a thread each, and one process of 2 threads
    python benchmarks/bench_ranks.py --device cuda --processes 8 --batch-size 1024 --model preact_resnet18
                                                8 GPUs, and one with its share of the rows: the ratio is the speed-up

The same step on the same images, both ways in turn: by all processes together, then by the first alone with as many
threads as there are processes, while the others wait. On a CPU this tells what meeting costs, and nothing of GPUs,
where the first alone takes its own rows.
Then what the code for several processes costs a step that has none: with it, and with the points where processes would
meet replaced by nothing, in turn, on small batches.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from readme import argument_types as kinds
from readme.machine import machine
from readme.output import aligned, markdown, write_json

import ham_kernels as ham
from ham_kernels.data.batches import slice_of
from ham_kernels.methods.mining import WHOLE
from ham_kernels.training import batches, trainer

SETTINGS = ("model", "batch_size", "processes", "rounds", "pairs", "device")
METHODS = {"PGD-AT": ham.methods.PGDAT(start_epoch=1), "HAM": ham.methods.HAM(start_epoch=1)}


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--model", default="small_cnn", help="by name (default small_cnn)")
    p.add_argument("--batch-size", type=int, default=256, help="of all processes together (default 256)")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default cpu)")
    p.add_argument("--pairs", type=int, default=600, help="of steps with and without the points to meet (default 600)")
    p.add_argument("--out", type=kinds.folder, default=Path("runs"), help="folder for the JSON (default runs)")
    args = p.parse_args()
    for name, low in (("processes", 2), ("batch_size", 2), ("rounds", 1), ("pairs", 10)):
        if getattr(args, name) < low:
            p.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}; it must be at least {low}")
    if args.device == "cuda" and args.processes > torch.cuda.device_count():
        p.error(f"--processes: got {args.processes}; torch finds {torch.cuda.device_count()} GPUs")
    return args


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        seconds = Path(folder) / "seconds.pt"
        mp.spawn(_worker, (args, f"file://{folder}/store", seconds), args.processes)
        found = torch.load(seconds)
    result = {
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "machine": machine(),
        "methods": {name: _rates(found[name], args) for name in METHODS},
        "alone": {name: _ratio_alone(method, args) for name, method in METHODS.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"bench_ranks_{args.device}.json", result)
    print(aligned(rows_of(result)))
    print(alone_line(result))


def readme_section(result: dict) -> str:
    s, m = result["settings"], result["machine"]
    return (
        f"`python benchmarks/bench_ranks.py`: images/s of a training step, {s['model']}, {s['batch_size']} rows, K 10, "
        f"by {s['processes']} processes of one thread each and by one process of {s['processes']} threads, in turn; "
        f"median, lowest and highest of {s['rounds']} rounds. {m['cpu']}, cores: {m['cores'].split(',')[0]}; torch "
        f"{m['torch']}, ham_kernels {m['ham_kernels']}; {m['date']}.\n\n"
        f"{markdown(rows_of(result))}\n\n{alone_line(result)}"
    )


def alone_line(result: dict) -> str:
    said = [
        f"{name} {r['ratio']:.4f} ({r['low']:.4f} to {r['high']:.4f}) of {1000 * r['seconds']:.1f} ms"
        for name, r in result["alone"].items()
    ]
    return (
        "A step of one process that joins no others, in times of one without the points where processes would meet "
        f"(16 images of 1×8×8; median of {result['settings']['pairs']} pairs in turn and its 95 % interval): "
        f"{'; '.join(said)}."
    )


def rows_of(result: dict) -> list[list[str]]:
    n = result["settings"]["processes"]
    ways = [f"{n} processes", f"1 process, {n} threads"]
    if result["settings"]["device"] == "cuda":
        ways = [f"{n} GPUs", f"1 GPU, 1/{n} of the rows"]
    rows = [["images/s", *ways, "ratio within a round"]]
    for name, r in result["methods"].items():
        cells = [f"{r[way]['median']:.0f} ({r[way]['low']:.0f} to {r[way]['high']:.0f})" for way in ("all", "alone")]
        rows.append([name, *cells, f"{r['ratio']['median']:.2f} ({r['ratio']['low']:.2f} to {r['ratio']['high']:.2f})"])
    return rows


def _rates(seconds: dict[str, list[float]], args: argparse.Namespace) -> dict:
    first, end = slice_of(args.batch_size, 0, args.processes)
    images = {"all": args.batch_size, "alone": end - first if args.device == "cuda" else args.batch_size}
    of = {way: [images[way] / s for s in times] for way, times in seconds.items()}
    of["ratio"] = [a / b for a, b in zip(of["all"], of["alone"], strict=True)]
    return {
        way: {"median": statistics.median(rates), "low": min(rates), "high": max(rates)} for way, rates in of.items()
    }


def _ratio_alone(method, args: argparse.Namespace) -> dict[str, float]:
    """Of a step's time as it is to that without the points where processes would meet; the pairs' median."""
    torch.set_num_threads(1)
    g, pairs = torch.Generator().manual_seed(0), args.pairs
    x, y = torch.rand(16, 1, 8, 8, generator=g), torch.randint(10, (16,), generator=g)
    x, y = x.to(args.device), y.to(args.device)
    own = _trainer("small_cnn", method, None, channels=1, device=args.device)
    with_them, ratios = [], []
    for pair in range(pairs + 10):  # the first warm up
        seconds = {}
        for bare in (False, True) if pair % 2 else (True, False):
            with _without_meetings() if bare else nullcontext():
                seconds[bare] = _seconds(own, x, y)
        if pair >= 10:
            with_them.append(seconds[False])
            ratios.append(seconds[False] / seconds[True])
    ratios.sort()
    half = 0.98 * math.sqrt(pairs)  # of the binomial around the median
    low, high = (ratios[min(max(round(pairs / 2 + side * half), 0), pairs - 1)] for side in (-1, 1))
    return {"ratio": statistics.median(ratios), "low": low, "high": high, "seconds": statistics.median(with_them)}


class _NoMeeting:
    def __init__(self, *args, **how):
        pass

    def table(self, mine):
        return [mine]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@contextmanager
def _without_meetings():
    with ExitStack() as patches:
        for module in (batches, trainer):
            patches.enter_context(mock.patch.object(module, "Meeting", _NoMeeting))
        patches.enter_context(mock.patch.object(trainer, "place_of", _whole))  # a Mock would take time
        yield


def _whole(*_):
    return nullcontext(WHOLE)


def _worker(rank: int, args: argparse.Namespace, store: str, out: Path) -> None:
    on_gpus = args.device == "cuda"
    if on_gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=store, rank=rank, world_size=args.processes)
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(args.batch_size, 3, 32, 32, generator=g), torch.randint(10, (args.batch_size,), generator=g)
    x, y = x.to(args.device), y.to(args.device)
    first, end = slice_of(len(y), rank, args.processes)
    own = x[first:end], y[first:end]
    found = {}
    for name, method in METHODS.items():
        together, alone = (_trainer(args.model, method, group, device=args.device) for group in ("auto", None))
        times = found[name] = {"all": [], "alone": []}
        for round_ in range(args.rounds + 1):  # the first warms up
            torch.set_num_threads(1)
            dist.barrier()
            all_seconds = _seconds(together, *own)
            torch.set_num_threads(args.processes)
            dist.barrier()
            alone_seconds = _seconds(alone, *(own if on_gpus else (x, y))) if rank == 0 else 0.0
            dist.barrier()
            if round_:
                times["all"].append(all_seconds)
                times["alone"].append(alone_seconds)
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's threads may abort a process that unloads them


def _trainer(model: str, method, group, channels: int = 3, device: str = "cpu") -> ham.Trainer:
    torch.manual_seed(0)
    net = ham.models.create(model, 10, channels=channels).to(device)
    # nothing is learned, so that as many rows are hard in every round
    return ham.Trainer(net, torch.optim.SGD(net.parameters(), 0.0), method, eps=8 / 255, step_size=2 / 255, group=group)


def _seconds(trainer: ham.Trainer, x: torch.Tensor, y: torch.Tensor) -> float:
    start = time.perf_counter()
    trainer.train_step(x, y, epoch=1)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
