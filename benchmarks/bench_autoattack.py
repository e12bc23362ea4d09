"""AutoAttack of one trained model: pyautoattack alone against `ham evaluate`'s, searching plainly and fast.

    ham train --dataset cifar10 --model preact_resnet18 --method fair --fast --epochs 4 --out runs/small
    python benchmarks/bench_autoattack.py runs/small --images 64

The images are cut into parts, and each part goes to every competitor in turn, in one process. Told are the seconds of
each (of processor time where there is no GPU, since other work of the machine does not count in it), how many verdicts
differ from pyautoattack's, and the accuracies. ODI, our quick attack, stands beside them; so does torchattacks with
--torchattacks, its numbers of steps and targets put right.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyautoattack
import torch
from readme import argument_types as kinds
from readme.machine import machine
from readme.output import aligned, markdown, write_json
from torch import Tensor, nn

from ham_kernels import data, evaluation
from ham_kernels.commands import run_images
from ham_kernels.commands.from_settings import device_of, load_model
from ham_kernels.engine import Engine, attack_mode, fast
from ham_kernels.runs.folder import RunFolder

RESULTS = Path(__file__).resolve().parent / "results"
THEIRS, PLAIN, FAST, TORCHATTACKS = "pyautoattack alone", "ours, plain search", "ours, fast search", "torchattacks"
ODI = "ODI-10, fast search"
GOAL, ALIKE, POINTS = 2.0, 0.99, 0.5  # times as fast, share of equal verdicts, difference of the averages
Judge = Callable[[Tensor, Tensor], Tensor]  # images and labels -> which survive


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=kinds.there, help="folder of a trained run")
    p.add_argument("--images", type=int, default=64, help="test images, class shares kept (default 64)")
    p.add_argument("--parts", type=int, default=2, help="so many parts take turns (default 2)")
    p.add_argument("--device", type=kinds.device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--torchattacks", action="store_true", help="as a competitor too")
    p.add_argument("--out", type=kinds.json_file, help="the JSON file (default: results/bench_autoattack_DEVICE.json)")
    args = p.parse_args(arguments)
    if not 1 <= args.parts <= args.images:
        p.error(f"--parts: got {args.parts}; it must be from 1 to --images, {args.images}")
    return args


def competitors(model: nn.Module, eps: float, step_size: float, norm: str, classes: int, args) -> dict[str, Judge]:
    device = next(model.parameters()).device
    name = {"linf": "Linf", "l2": "L2"}[norm]

    def right(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x).argmax(1) == y

    def theirs(x: Tensor, y: Tensor) -> Tensor:
        with attack_mode(model, fast_batchnorm=False):
            attack = pyautoattack.AutoAttack(model, norm=name, eps=eps, seed=0, device=device)
            return right(attack.run_standard_evaluation(x, y, batch_size=len(x))[0], y)

    def ours(search: Engine | None, attack: str = "autoattack") -> Judge:
        def judge(x: Tensor, y: Tensor) -> Tensor:
            found = evaluation.judge(
                model, [(x, y)], [attack], classes=classes, eps=eps, step_size=step_size, norm=norm, search=search
            )
            return torch.tensor([flag == "1" for flag in found[attack]["correct"]], device=device)

        return judge

    def torchattacks(x: Tensor, y: Tensor) -> Tensor:
        import torchattacks

        with attack_mode(model, fast_batchnorm=False):
            attack = torchattacks.AutoAttack(model, norm=name, eps=eps, n_classes=classes, seed=0)
            for part in attack._autoattack.attacks:
                for setting, value in (("steps", 100), ("n_target_classes", min(9, classes - 1))):
                    if hasattr(part, setting):
                        setattr(part, setting, value)
            return right(attack(x, y), y)

    quick = fast(device)
    found = {THEIRS: theirs, PLAIN: ours(None), FAST: ours(quick), ODI: ours(quick, "odi10")}
    return found | ({TORCHATTACKS: torchattacks} if args.torchattacks else {})


def contest(judges: dict[str, Judge], parts: list[tuple[Tensor, Tensor]]) -> dict[str, dict]:
    """Seconds of each part and one flag per image. The first images compile the fast search, and are not timed."""
    x, y = parts[0]
    clock = time.perf_counter if x.is_cuda else time.process_time
    judges[FAST](x[:32], y[:32])
    found = {name: {"seconds": [], "correct": ""} for name in judges}
    for x, y in parts:
        for name, judge in judges.items():
            start = clock()
            correct = judge(x, y)
            found[name]["correct"] += "".join(map(str, correct.int().tolist()))  # waits for a GPU
            found[name]["seconds"].append(clock() - start)
            print(f"{name}: {len(y)} images, {found[name]['seconds'][-1]:.1f} s", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, dict]) -> list[list[str]]:
    base = found[THEIRS]
    rows = [["AutoAttack", "seconds", "times as fast", "lowest to highest", "accuracy %", "verdicts that differ"]]
    for name, lane in found.items():
        ratios = [b / s for b, s in zip(base["seconds"], lane["seconds"], strict=True)]
        differ = sum(a != b for a, b in zip(base["correct"], lane["correct"], strict=True))
        rows.append([
            name, f"{sum(lane['seconds']):.0f}", f"{sum(base['seconds']) / sum(lane['seconds']):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}", f"{accuracy(lane):.1f}", f"{differ} of {len(base['correct'])}",
        ])  # fmt: skip
    return rows


def accuracy(lane: dict) -> float:
    return 100 * statistics.mean(flag == "1" for flag in lane["correct"])


def verdict(found: dict[str, dict]) -> str:
    base, ours = found[THEIRS], found[FAST]
    times = sum(base["seconds"]) / sum(ours["seconds"])
    alike = statistics.mean(a == b for a, b in zip(base["correct"], ours["correct"], strict=True))
    apart = abs(accuracy(base) - accuracy(ours))
    holds = times >= GOAL and alike >= ALIKE and apart <= POINTS
    return (
        f"goal: fast search >= {GOAL:g} x faster, >= {100 * ALIKE:g} % of the verdicts equal, averages within "
        f"{POINTS:g} points: {times:.2f} x, {100 * alike:.1f} %, {apart:.1f} points: "
        f"{'holds' if holds else 'does not hold'}"
    )


def readme_section(result: dict) -> str:
    s, m = result["settings"], result["machine"]
    said = (
        f"{s['model']}, {s['images']} test images of {s['dataset']}, ε {s['eps']:.3g}, all of AutoAttack; {s['parts']} "
        f"parts of the images in turn: `bench_autoattack.py`. {m['cpu']}, cores: {m['cores']}, GPU: {m['gpu']}; torch "
        f"{m['torch']}, pyautoattack {result['pyautoattack']}, ham_kernels {m['ham_kernels']}; {m['date']}."
    )
    return f"{said}\n\n{markdown(table(result['lanes']))}\n\n{verdict(result['lanes'])}"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    run = RunFolder.open(args.run)
    told = run.settings()
    device = device_of(args.device)
    model = load_model(args.run, "last" if told.run.ema_decay is None else "ema", device).eval()
    images, *_ = run_images.find(told, run, generated=False)
    loader = data.part_loader(images.limit("test", args.images), "test", args.images, device=device, workers=0)
    ((x, y),) = [(x.to(device), y.to(device)) for x, y in loader]
    attack = told.attack
    judges = competitors(model, attack.eps, attack.step_size, attack.norm, len(images.classes), args)
    found = contest(judges, list(zip(x.tensor_split(args.parts), y.tensor_split(args.parts), strict=True)))
    settings = {"model": told.model.name, "dataset": images.name, "images": len(y), "eps": attack.eps,
                "norm": attack.norm, "parts": args.parts}  # fmt: skip
    result = {"settings": settings, "machine": machine(), "pyautoattack": pyautoattack.__version__, "lanes": found}
    write_json(args.out or RESULTS / f"bench_autoattack_{device.type}.json", result)
    print(aligned(table(found)))
    print(verdict(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
