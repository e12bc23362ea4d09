"""Chooses the defaults of `fair`: candidates trained on folds of the training images, judged on the fold left out.

    python benchmarks/bench_fair.py
    python benchmarks/bench_fair.py --dataset cifar10 --path cifar10.tar --train-images 4000 --epochs 20 --folds 2

No test image is read. Every candidate of a fold has the same images, first weights and noise. An image counts as robust
if it resists PGD towards each of the other classes. Results are kept in a JSON file as they come; a second call trains
what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from fair.candidates import ALL, LONGER
from fair.folds import folds_of, train_and_judge
from readme import argument_types as kinds
from readme.machine import machine
from readme.output import aligned, markdown, write_json

from ham_kernels import preset
from ham_kernels.commands.run_images import facts_of, images_of
from ham_kernels.methods import PGDAT
from ham_kernels.runs.presets import PRESETS, in_time
from ham_kernels.runs.settings import TrainSettings

RESULTS = Path(__file__).resolve().parent / "results"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", choices=tuple(PRESETS), metavar="NAME", default="digits", help="(default digits)")
    p.add_argument("--path", type=kinds.there, help="a folder or tar of its images")
    p.add_argument("--model", default="small_cnn")
    p.add_argument("--train-images", type=int)
    p.add_argument("--epochs", type=int)
    p.add_argument("--folds", type=int, default=4)
    p.add_argument("--fast", action="store_true", help="train in bf16, compiled, with Winograd's convolutions")
    p.add_argument("--only", nargs="+", metavar="NAME", help=f"of: {'; '.join(ALL)}")
    p.add_argument("--out", type=kinds.json_file, help="the JSON file (default: results/bench_fair_DATASET.json)")
    args = p.parse_args(arguments)
    unknown = set(args.only or ()) - set(ALL)
    if unknown:
        p.error(f"--only: got {', '.join(sorted(unknown))}; allowed are {'; '.join(ALL)}")
    if args.folds < 2:
        p.error(f"--folds: got {args.folds}; it must be >= 2")
    args.out = args.out or RESULTS / f"bench_fair_{args.dataset}.json"
    return args


def settings_of(args: argparse.Namespace) -> TrainSettings:
    s = preset(args.dataset, args.epochs)
    d = replace(s.data, path=args.path, train_images=args.train_images, val_images=0)
    if args.fast:
        quick = replace(s.engine, channels_last="on", compile="on", winograd="on")
        s = replace(s, engine=quick, run=replace(s.run, precision="bf16"))
    return replace(s, data=d, model=replace(s.model, name=args.model))


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    settings = settings_of(args)
    images = images_of(settings)
    told = {"dataset": args.dataset, "model": args.model, "train_images": args.train_images, "folds": args.folds,
            "epochs": settings.optim.epochs, "eps": settings.attack.eps, "steps": settings.attack.steps,
            "fast": args.fast, "images_sha256": facts_of(images)["sha256"]}  # fmt: skip
    result = {"settings": told, "machine": machine(), "candidates": {}}
    if args.out.exists():
        result = json.loads(args.out.read_text())
        if result["settings"] != told:
            print(f"--out: {args.out} was begun with {result['settings']}; give another one", file=sys.stderr)
            return 2
    fold = folds_of(images, args.folds)
    for name in args.only or ALL:
        done = result["candidates"].setdefault(name, [])
        for f in range(len(done), args.folds):
            one = candidate(replace(settings, run=replace(settings.run, seed=f)), name)
            done.append(train_and_judge(one, images, fold == f))
            result.setdefault("versions", {})[name] = machine()["ham_kernels"]
            write_json(args.out, result)
        print(f"{name}: {summary(result, name)}", flush=True)
    print(aligned(table(result)))
    return 0


def candidate(settings: TrainSettings, name: str) -> TrainSettings:
    one = replace(settings, method=ALL[name])
    return in_time(one, LONGER[name][1]) if name in LONGER else one


def forwards(told: dict, name: str, hard: float) -> float:
    """Of a whole training over those of PGD-AT, by the cost model: calls and machines need not be the same."""
    one = candidate(preset(told["dataset"], told["epochs"]), name)
    return one.method.cost(told["steps"], hard) * one.optim.epochs / (PGDAT().cost(told["steps"]) * told["epochs"])


def accuracies(runs: list[dict]) -> list[float]:
    """Of each class in percent, over the images of all folds."""
    pooled = zip(*(run["by_class"] for run in runs), strict=True)
    return [100 * sum(right for _, right in of) / sum(n for n, _ in of) for of in pooled]


def summary(result: dict, name: str) -> dict[str, float]:
    runs = result["candidates"][name]
    by_class = accuracies(runs)
    n, right = (sum(pair[k] for run in runs for pair in run["by_class"]) for k in (0, 1))
    return {
        "average": 100 * right / n,
        "worst": min(by_class),
        "worst_3": statistics.mean(sorted(by_class)[:3]),
        "std": statistics.pstdev(by_class),
        "forwards": forwards(result["settings"], name, statistics.mean(run["hard"] for run in runs)),
    }


def table(result: dict) -> list[list[str]]:
    head = ["validation images, strong attack", "average %", "worst class %", "worst 3 %", "std", "forwards / PGD-AT"]
    rows = []
    for name, runs in result["candidates"].items():
        if runs:
            *found, cost = summary(result, name).values()
            rows.append([name, *(f"{value:.1f}" for value in found), f"{cost:.2f}"])
    return [head, *rows]


def readme_section(result: dict) -> str:
    """What was chosen among, and on what."""
    s, m = result["settings"], result["machine"]
    versions = dict.fromkeys([m["ham_kernels"], *result.get("versions", {}).values()])
    images = "all" if s["train_images"] is None else f"{s['train_images']:,}"
    said = (
        f"{s['dataset']}, {s['model']}, {images} training images in {s['folds']} folds, {s['epochs']} epochs, "
        f"ε {s['eps']:.3g}, K {s['steps']}: each candidate is trained {s['folds']} times, and judged on those that "
        f"it has not seen, no test image among them{'; trained in bf16' * s['fast']}. "
        f"{m['cpu']}, cores: {m['cores']}; torch {m['torch']}, "
        f"ham_kernels {' and '.join(versions)}; {m['date']}."
    )
    return f"{said}\n\n{markdown(table(result))}"


if __name__ == "__main__":
    sys.exit(main())
