"""Training steps side by side: ours with each engine option, ham_reference, torchattacks in an ordinary loop.

    python benchmarks/bench_training.py            small CNN and PreActResNet-18 on 3x32x32 images, batch 128 (GPU: 512)
    python benchmarks/bench_training.py --check    exit 1 when a goal that applies to this device is missed
    python benchmarks/bench_training.py --quick    small CNN, batch 32, no compilation: does it all work?

All arms take steps in turn, in one process and on copies of one model. A chosen share h of the rows is hard: the rows
that an untrained model is least sure of get another class as their label, the others the one that it sees, and a tiny
eps changes nothing about that. Learning is frozen (learning rate 0, BatchNorm momentum 0), so that h stays the same for
every arm; a step does the same work as in training, where h differs from batch to batch.

On a CPU glibc returns freed memory to the system. Our engine changes that for the process (keep_memory), so it is
undone for every arm whose users do not have it (see FreedMemory), and an untimed pass follows each such change.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from readme import argument_types as kinds
from readme.machine import machine
from readme.output import aligned, write_json
from torch import Tensor
from training.contest import Contest, told
from training.floor import (
    LARGE,
    SMALL,
    attack_rate,
    count,
    derive,
    fastest,
    judge,
)
from training.steps import (
    ARMS,
    BEST,
    BEST_CPU,
    CHECK_ROWS,
    FOREIGN,
    FP32_CPU,
    KINDS,
    PGD_AT,
    REFERENCE,
    TORCHATTACKS,
    TORCHATTACKS_BF16,
    Check,
    is_arm,
    labels_of,
    model_of,
    title,
)
from training.table import cells, notes, setup, verdict

from ham_kernels import data
from ham_kernels.engine import EngineError

RESULTS = Path(__file__).resolve().parent / "results"
# arms that a goal is about: measured in every round, whatever the budget
NEEDED = {
    "cpu": (TORCHATTACKS, FP32_CPU, BEST_CPU),
    "cuda": (TORCHATTACKS, TORCHATTACKS_BF16, "bf16+channels_last+cuda_graphs", f"{BEST}+cuda_graphs"),
}
TOO_SLOW = {("cpu", LARGE): {REFERENCE: "too slow for this model on a CPU, unless --arms names it"}}
SIZES = {("cuda", LARGE): [128, 512]}
ROUNDS = {("cpu", SMALL): 15, ("cpu", LARGE): 3, ("cuda", SMALL): 7, ("cuda", LARGE): 9}
MINUTES = {"cpu": 18.0, "cuda": 4.0}
COUNTED_ROWS = 16  # passes are counted on so few: how many there are depends on h only
TO_CHECK = 0.3  # of the minutes, and
TO_WARM_UP = {"cpu": 0.35, "cuda": 0.75}  # of a model's minutes, for arms without a goal


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ours = "our options joined by +, such as plain, channels_last+compile, bf16+cuda_graphs+group2"
    left_out = "arms without a goal are left out, the slowest first, where these would be exceeded"
    p.add_argument("--models", nargs="+", choices=(SMALL, LARGE), default=[SMALL, LARGE])
    p.add_argument("--batch-sizes", nargs="+", type=int, metavar="N", help=f"(default 128; {LARGE} on a GPU 128 512)")
    p.add_argument("--arms", nargs="+", metavar="ARM", help=f"of {', '.join(FOREIGN)}; or {ours}")
    p.add_argument("--rounds", type=int, help="(default: CPU 15 and 3 for the two models, GPU 7 and 9)")
    p.add_argument("--minutes", type=float, metavar="BUDGET", help=f"{left_out} (default: CPU 18, GPU 4)")
    p.add_argument("--hard", type=float, default=0.3, metavar="H", help="share of hard rows (default 0.3)")
    p.add_argument("--data", type=kinds.there, metavar="PATH", help="folder or tar of class folders (default: noise)")
    p.add_argument("--device", type=kinds.device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--quick", action="store_true", help="small CNN, batch 32, 2 rounds, nothing compiled")
    p.add_argument("--out", type=kinds.folder, help="folder of the JSON (default: results beside this; --quick: runs)")
    p.add_argument("--check", action="store_true", help="exit 1 when a goal is missed that applies to this device")
    args = p.parse_args(arguments)
    kind = torch.device(args.device).type
    if kind not in ARMS:
        p.error(f"--device: got {args.device}; it must be a CPU or a CUDA device")
    for name in args.arms or ():
        if not is_arm(name):
            p.error(f"--arms: got {name}; allowed are {', '.join(FOREIGN)}, and {ours}")
    if not 0 < args.hard < 1:
        p.error(f"--hard: got {args.hard}; it must be between 0 and 1")
    for name, values, low in (("rounds", [args.rounds], 1), ("batch-sizes", args.batch_sizes or [], 4)):
        for value in values:
            if value is not None and value < low:
                p.error(f"--{name}: got {value}; it must be at least {low}")
    if args.quick:
        args.models, args.batch_sizes, args.rounds = [SMALL], args.batch_sizes or [32], args.rounds or 2
        args.arms = args.arms or [name for name in ARMS[kind] if "compile" not in name]
    if args.minutes is None:
        args.minutes = MINUTES[kind]
    args.out = args.out or (Path("runs") if args.quick else RESULTS)
    return args


def images_of(args: argparse.Namespace, count: int) -> tuple[Tensor, str]:
    """So many images (n, 3, 32, 32) in [0, 1] on the device, and what they are."""
    generator = torch.Generator().manual_seed(0)
    if args.data is None:
        x = torch.rand(count, 3, 32, 32, generator=generator)
        return x.to(args.device), "random images (time depends on shapes only)"
    found = data.load("cifar10", args.data, size=32)
    x = found.x_train[torch.randperm(len(found.x_train), generator=generator)[:count]]
    if x.shape != (count, 3, 32, 32):
        raise ValueError(f"--data: got images {tuple(found.x_train.shape)}; it must have {count} of (3, 32, 32)")
    return (x.float() / 255).to(args.device), f"images of {found.name}"


def check(names: list[str], x: Tensor, end: float) -> tuple[dict[str, str], dict[str, str]]:
    """By arm of ours what is wrong with its results, and why it was not looked at."""
    needed = NEEDED[x.device.type]
    wrong, unchecked, problem_of = {}, {}, Check(x)
    for name in sorted(names, key=lambda n: n not in needed):
        if name not in needed and time.perf_counter() > end:
            unchecked[name] = "no time left to check its results"
            continue
        try:
            problem = problem_of(name)
        except EngineError as error:
            unchecked[name] = str(error)
            continue
        except Exception as error:
            problem = told(error)
        if problem:
            wrong[name] = problem
            print(f"{title(name)}: wrong results: {problem}", flush=True)
    return wrong, unchecked


def run(args: argparse.Namespace) -> dict:
    """All that is measured, as it is written to the JSON."""
    device = torch.device(args.device)
    start, about = time.perf_counter(), machine()
    end = start + 60 * args.minutes
    sizes = {m: args.batch_sizes or SIZES.get((device.type, m), [128]) for m in args.models}
    names = args.arms or list(ARMS[device.type])
    x, images = images_of(args, max(CHECK_ROWS, *(n for of_model in sizes.values() for n in of_model)))
    result = {
        "machine": about,
        "settings": {"images": images, "hard": args.hard, "minutes": args.minutes, "quick": args.quick},
        "device": {
            "type": device.type, "name": about["gpu" if device.type == "cuda" else "cpu"],
            "threads": torch.get_num_threads(),
            "capability": torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0,
        },
        "cases": [], "broken": {},
    }  # fmt: skip
    print("; ".join(f"{key} {value}" for key, value in about.items()))
    print(setup(result), flush=True)
    ours, checks_end = [name for name in names if name not in FOREIGN], start + (end - start) * TO_CHECK
    result["wrong"], unchecked = check(ours, x[: CHECK_ROWS // 2 if args.quick else CHECK_ROWS], checks_end)
    small, few = model_of(SMALL, x), x[:COUNTED_ROWS]
    result["counts"] = count(names, small, few, labels_of(small, few, args.hard))
    print(f"results compared with ham_reference's, forwards counted: {time.perf_counter() - start:.0f} s", flush=True)
    for i, model in enumerate(args.models):
        left = sum(len(sizes[m]) for m in args.models[i:])
        model_end = time.perf_counter() + (end - time.perf_counter()) * len(sizes[model]) / left
        slow = {} if args.arms else TOO_SLOW.get((device.type, model), {})
        contest = Contest(
            model, x, sizes[model], args.hard, names, unchecked | slow, NEEDED[device.type]
        )  # fmt: skip
        contest.warm_up(time.perf_counter() + (model_end - time.perf_counter()) * TO_WARM_UP[device.type])
        for j, n in enumerate(sizes[model]):
            case_end = time.perf_counter() + (model_end - time.perf_counter()) / (len(sizes[model]) - j)
            case = contest.case(n, args.rounds or ROUNDS[device.type, model], case_end)
            derive(case, result["wrong"])
            result["cases"].append(case)
            result["broken"] |= contest.broken
            lane = fastest(case, PGD_AT)
            if device.type == "cuda" and lane and "bf16" in lane["arm"]:
                try:
                    case["attack"] = attack_rate(contest.arms[lane["arm"]], *contest.batches[n])
                except Exception as error:  # the steps are measured, and count
                    result["broken"].setdefault(lane["arm"], f"its attack alone: {told(error)}")
            result["goals"], result["seconds"] = judge(result), time.perf_counter() - start
            write_json(path_of(args), result)  # who ends this now keeps what is measured
    return result


def path_of(args: argparse.Namespace) -> Path:
    return args.out / f"bench_training_{torch.device(args.device).type}.json"


def main() -> int:
    args = parse()
    result = run(args)
    for case in result["cases"]:
        print(f"\n{aligned(cells(case))}", *notes(case), sep="\n")
        seconds = [f"{title(name)} {s:.0f} s" for name, s in case["warm_up_s"].items() if s >= 1]
        print(f"warm-up, compilation included: {', '.join(seconds) or 'less than a second each'}")
    counted = [f"{title(c['arm'])}{KINDS[c['kind']]} {c['counted']:g} ({c['model']:g})" for c in result["counts"]]
    print(f"\nforwards of a full batch, counted (cost model): {'; '.join(counted)}")
    for goal in result["goals"]:
        print("goal: " + verdict(goal).replace("**", ""))
    path = path_of(args)
    write_json(path, result)
    print(f"written: {path}; {result['seconds']:.0f} s in all")
    failed = [f"{title(name)}: wrong results: {problem}" for name, problem in result["wrong"].items()]
    failed += [f"{title(name)}: {problem}" for name, problem in result["broken"].items()]
    failed += [f"{title(c['arm'])}: {c['counted']} forwards counted" for c in result["counts"] if not c["right"]]
    if args.check:
        failed += [f"--check: {goal['goal']}: missed" for goal in result["goals"] if goal["state"] == "missed"]
    print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
