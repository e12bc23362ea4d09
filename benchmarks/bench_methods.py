"""One training step of each method: ours, ours with HAM's screening, and a loop that works as the authors' code does.

    python benchmarks/bench_methods.py                          all methods, small CNN, 3x32x32 images, batch 128
    python benchmarks/bench_methods.py --methods trades faal    these and PGD-AT, which the others are compared with
    python benchmarks/bench_methods.py --check                  exit 1 when a goal that applies here is missed
    python benchmarks/bench_methods.py --quick                  batch 16, 2 rounds: does it all work?

All arms take steps in turn, in one process and on copies of one model; learning is frozen (see bench_training.py). The
loops are written anew and make the passes that the published code makes, the needless ones included: forwards are
counted. FAAL's loop needs cvxpy (pip install -e ".[bench]"). Before any time is taken, each method and its loop make
three updates with the same starts, and their losses are compared.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from bench_training import images_of
from methods.steps import LOOPS, METHODS, OURS, PGD_AT, MethodContest, arms_of, build, check, count, cpu_clock, title
from methods.table import cells, derive, judge, notes, setup
from readme import argument_types as kinds
from readme.machine import machine
from readme.output import aligned, write_json
from training.contest import told
from training.floor import SMALL
from training.steps import labels_of, model_of
from training.table import verdict

from ham_kernels.common import provenance

RESULTS = Path(__file__).resolve().parent / "results"
COMPARED_ROWS, COUNTED_ROWS = 20, 8  # of the images; passes are counted on few: they depend on h only


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="METHOD",
                   help=f"of {', '.join(METHODS)} (default all)")  # fmt: skip
    p.add_argument("--batch-size", type=int, metavar="N", help="(default 128)")
    p.add_argument("--rounds", type=int, help="(default 7)")
    p.add_argument("--hard", type=float, default=0.3, metavar="H", help="share of hard rows (default 0.3)")
    p.add_argument("--data", type=kinds.there, metavar="PATH", help="folder or tar of class folders (default: noise)")
    p.add_argument("--device", type=kinds.device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--cpu-time",
        action="store_true",
        help="time by CPU seconds of one thread, for a machine that does other work (OMP_NUM_THREADS=1)",
    )
    p.add_argument("--quick", action="store_true", help="batch 16, 2 rounds")
    p.add_argument("--out", type=kinds.folder, help="folder of the JSON (default: results beside this; --quick: runs)")
    p.add_argument("--check", action="store_true", help="exit 1 when a goal is missed that applies to this device")
    args = p.parse_args(arguments)
    args.batch_size = args.batch_size or (16 if args.quick else 128)
    args.rounds = (2 if args.quick else 7) if args.rounds is None else args.rounds
    if torch.device(args.device).type not in ("cpu", "cuda"):
        p.error(f"--device: got {args.device}; it must be a CPU or a CUDA device")
    if not 0 < args.hard < 1:
        p.error(f"--hard: got {args.hard}; it must be between 0 and 1")
    for name, value, low in (("rounds", args.rounds, 1), ("batch-size", args.batch_size, 4)):
        if value < low:
            p.error(f"--{name}: got {value}; it must be at least {low}")
    threads = torch.get_num_threads()
    if args.cpu_time and (torch.device(args.device).type != "cpu" or threads != 1):
        p.error(f"--cpu-time: got {args.device} with {threads} threads; give --device cpu and set OMP_NUM_THREADS=1")
    args.methods = list(dict.fromkeys([PGD_AT, *args.methods]))
    args.out = args.out or (Path("runs") if args.quick else RESULTS)
    return args


def compared(names: list[str], x: torch.Tensor) -> tuple[dict[str, str], dict[str, str]]:
    """By method in what its losses differ from those of its loop, and why they were not compared."""
    wrong, unchecked = {}, {}
    for name in names:
        if name not in LOOPS:
            unchecked[name] = (
                "there is no authors' code" if name in OURS else "no loop here works as the authors' code does"
            )
            continue
        try:
            problem = check(name, x)
        except ImportError as error:
            unchecked[name] = told(error)
            continue
        except Exception as error:  # one method's mistake must not cost the others their times
            problem = told(error)
        if problem:
            wrong[name] = problem
            print(f"{title(name)}: wrong results: {problem}", flush=True)
    return wrong, unchecked


def counts_of(arms: list[str], x: torch.Tensor, hard: float) -> tuple[list[dict], dict[str, str]]:
    """Forwards of each arm, counted and stated, and what no arm should raise; an arm that lacks a package has none."""
    model, out, broken = model_of(SMALL, x), [], {}
    y = labels_of(model, x, hard)
    for name in arms:
        try:
            out.append(count(name, model, x, y))
        except ImportError:
            continue
        except Exception as error:
            broken[name] = told(error)
    return out, broken


def run(args: argparse.Namespace) -> dict:
    """All that is measured, as it is written to the JSON."""
    start, device, load = time.perf_counter(), torch.device(args.device), os.getloadavg()[0]
    x, images = images_of(args, max(COMPARED_ROWS, args.batch_size))
    arms, about = arms_of(args.methods), machine() | {"cvxpy": provenance.versions("cvxpy")["cvxpy"]}
    result = {
        "machine": about,
        "settings": {
            "images": images, "hard": args.hard, "rounds": args.rounds, "quick": args.quick, "load": load,
            "cpu_time": args.cpu_time,
        },
        "device": {
            "type": device.type, "name": about["gpu" if device.type == "cuda" else "cpu"],
            "threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    print("; ".join(f"{key} {value}" for key, value in about.items()))
    print(setup(result), flush=True)
    result["wrong"], result["unchecked"] = compared(args.methods, x[:COMPARED_ROWS])
    result["counts"], broken = counts_of(arms, x[:COUNTED_ROWS], args.hard)
    print(f"results compared, forwards counted: {time.perf_counter() - start:.0f} s", flush=True)
    contest = MethodContest(SMALL, x, [args.batch_size], args.hard, arms, {}, tuple(arms), build)
    if args.cpu_time:
        contest.clock = cpu_clock
    contest.warm_up(float("inf"))
    result["case"] = contest.case(args.batch_size, args.rounds, float("inf"))
    derive(result["case"], result["wrong"])
    result["broken"], result["goals"] = broken | contest.broken, judge(result)
    result["seconds"] = time.perf_counter() - start
    return result


def main() -> int:
    args = parse()
    result = run(args)
    print(f"\n{aligned(cells(result['case']))}", *notes(result), sep="\n")
    for goal in result["goals"]:
        print("goal: " + verdict(goal).replace("**", ""))
    path = args.out / f"bench_methods_{result['device']['type']}.json"
    write_json(path, result)
    print(f"written: {path}; {result['seconds']:.0f} s in all")
    failed = [f"{title(name)}: wrong results: {problem}" for name, problem in result["wrong"].items()]
    failed += [f"{title(name)}: {problem}" for name, problem in result["broken"].items()]
    failed += [
        f"{title(c['arm'])}: {c['counted']:g} forwards counted, {c['stated']:g} stated"
        for c in result["counts"] if not c["right"]
    ]  # fmt: skip
    if args.check:
        failed += [f"--check: {goal['goal']}: missed" for goal in result["goals"] if goal["state"] == "missed"]
    print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
