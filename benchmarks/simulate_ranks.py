"""Simulates one training step on 1 to 4,096 GPUs: its time, what imbalance and communication take, what limits first.

    python benchmarks/simulate_ranks.py
    python benchmarks/simulate_ranks.py --nets resnet50 --row-us 60 --steps 3 --screen-steps 1 --hard 0.6 --gpus 1 8 64

Nothing here is measured: times follow from the costs below, which are assumed, and from hard rows drawn at random. Rows
are moved by the plan that training uses. Weak scaling has the same rows on each GPU, strong scaling the same global
batch. Any number of rows costs the same for each, but a forward has a least time. Left out: reading data, what the host
does (but for SyncBN's waits), evaluation, checkpoints, and whatever slows GPUs that work side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from importlib import metadata

from readme import argument_types as kinds
from readme.output import aligned, write_json
from scaling import table
from scaling.inputs import NETS, Links, Net, Training
from scaling.step import simulate

ROWS, GPUS = (16, 128, 1024), (2, 8, 64, 512, 4096)  # of the table on rebalancing
FEW, MANY = 64, 1024  # GPUs of the table of other settings
DIGITS = 6  # kept in the file


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NAME", help=f"of {', '.join(NETS)}")
    p.add_argument("--row-us", type=float, help="µs of a forward for each row, for all those nets (default: assumed)")
    p.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 256, 1024, 4096])
    p.add_argument("--rows", type=int, default=128, help="on each GPU, weak scaling (default 128)")
    p.add_argument("--global-batch", type=int, default=2048, help="of all GPUs, strong scaling (default 2048)")
    for kind in (Training, Links):
        group = p.add_argument_group(kind.__name__.lower())
        for f in dataclasses.fields(kind):
            words = f"{f.metadata['help']} (default {f.default})"
            flag = f"--{f.name.replace('_', '-')}"
            if isinstance(f.default, bool):
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=words)
            else:
                choices = ("drop", "stop") if f.name == "easy" else None
                group.add_argument(flag, type=type(f.default), default=f.default, choices=choices, help=words)
    p.add_argument("--draws", type=int, default=1000, help="steps drawn for each cell (default 1000)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=kinds.json_file, help="a JSON file for all of it (default: none, tables alone)")
    args = p.parse_args(arguments)
    for name in ("rows", "global_batch", "draws", "node", "messages"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}; it must be >= 1")
    if args.seed < 0:
        p.error(f"--seed: got {args.seed}; it must be >= 0")
    if not args.node_gb_s > 0:
        p.error(f"--node-gb-s: got {args.node_gb_s}; it must be > 0")
    if min(args.gpus) < 1:
        p.error(f"--gpus: got {min(args.gpus)}; it must be >= 1")
    if not 1 <= args.screen_steps < args.steps:
        p.error(f"--screen-steps: got {args.screen_steps}; it must be >= 1 and < --steps, which is {args.steps}")
    if not 0 < args.hard <= 1:
        p.error(f"--hard: got {args.hard}; it must be > 0 and <= 1")
    args.gpus = sorted({1, *args.gpus})  # efficiency is relative to one
    return args


def run(args: argparse.Namespace) -> dict:
    how, links = (
        kind(**{f.name: getattr(args, f.name) for f in dataclasses.fields(kind)}) for kind in (Training, Links)
    )
    nets = {
        name: NETS[name] if args.row_us is None else dataclasses.replace(NETS[name], row_us=args.row_us)
        for name in args.nets
    }

    def cell(net: Net, gpus: int, batch: int, how: Training = how, links: Links = links) -> dict:
        return simulate(net, gpus, batch, how, links, args.draws, args.seed)

    apart = dataclasses.replace(how, messages=4 * how.messages)
    pairs = [(gpus, rows * gpus) for rows in ROWS for gpus in GPUS]
    changes = {
        "as above": (how, links),
        "easy rows stop": (dataclasses.replace(how, easy="stop"), links),
        "K 3, M 1, h 0.6": (dataclasses.replace(how, steps=3, screen_steps=1, hard=0.6), links),
        "x, x_adv, y and max_step moved apart": (apart, links),
        "all-gather without a ring's hops": (how, dataclasses.replace(links, hop_us=0.0)),
        "BatchNorm by each GPU, or frozen": (dataclasses.replace(how, sync_bn=False), links),
        "gradients behind the backward": (dataclasses.replace(how, overlap=True), links),
    }
    result = {
        "settings": {
            "nets": {k: dataclasses.asdict(net) for k, net in nets.items()}, "gpus": args.gpus, "rows": args.rows,
            "global_batch": args.global_batch, "draws": args.draws, "seed": args.seed,
            "training": dataclasses.asdict(how), "links": dataclasses.asdict(links),
        },
        "versions": {name: metadata.version(name) for name in ("ham_kernels", "numpy")},
        "weak": {k: [cell(net, g, args.rows * g) for g in args.gpus] for k, net in nets.items()},
        "strong": {
            k: [cell(net, g, args.global_batch) for g in args.gpus if g <= args.global_batch]
            for k, net in nets.items()
        },
        "rebalance": {
            k: [{"usual": cell(net, g, b), "apart": cell(net, g, b, apart)} for g, b in pairs]
            for k, net in nets.items()
        },
        "what_if": {
            words: {k: [cell(net, g, args.rows * g, *change) for g in (FEW, MANY)] for k, net in nets.items()}
            for words, change in changes.items()
        },
    }  # fmt: skip
    return _rounded(result)


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    result = run(args)
    for kind in ("weak", "strong"):
        for name, cells in result[kind].items():
            print(f"{NETS[name].title}, {kind} scaling\n{aligned(table.sizes(cells))}\n")
    print(f"{aligned(table.rebalanced(result))}\n\n{aligned(table.what_if(result))}")
    if args.out:
        write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
