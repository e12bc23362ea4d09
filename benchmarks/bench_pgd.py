"""HAM against PGD adversarial training: time, robustness, fairness, side by side in one process.

    python benchmarks/bench_pgd.py                      scikit-learn's digits, about 3 minutes on 2 CPU cores
    python benchmarks/bench_pgd.py --dataset cifar10    torchvision's CIFAR-10
    python benchmarks/bench_pgd.py --data PATH          a folder or tar of class folders

All methods start from one warm-up (plain PGD-AT) per seed and then train epoch by epoch in turn, so that a change
in the machine's speed hits all alike. Prints one table and a verdict on each claim of the paper,
which the report makes of the run folders that the methods leave.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from pgd.competitors import BASE, TITLES, Competitor, settings_of, torchattacks_there
from pgd.overhead import overhead
from pgd.results import MINING, cells, claims_on_ham, table_of, verdict_lines
from readme import argument_types as kinds
from readme.machine import machine
from readme.output import aligned, write_json
from tqdm import tqdm

from ham_kernels import data, report
from ham_kernels.commands.from_settings import device_of, loaders_of
from ham_kernels.commands.run_images import images_of

# what differs between the bundled digits and natural images; every value is an option
DIGITS = {
    "model": "small", "eps": 0.2, "step_size": 0.05, "epochs": 24, "warmup": 8, "batch_size": 320, "lr": 0.1,
    "milestones": [18], "lr_decay": 0.2, "ema_decay": 0.97,
}  # fmt: skip
NATURAL = {
    "model": "preact", "eps": 0.031, "step_size": 0.007, "epochs": 30, "warmup": 12, "batch_size": 128, "lr": 0.1,
    "milestones": [18, 25], "lr_decay": 0.1, "ema_decay": 0.99,
}  # fmt: skip


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = p.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=("digits", "cifar10"), default="digits")
    source.add_argument("--data", type=kinds.there, metavar="PATH", help="folder or tar of class folders")
    p.add_argument("--methods", default="pgd_at,ham,torchattacks", help=f"of {', '.join(TITLES)}")
    p.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    p.add_argument("--epochs", type=int, help="in all, warm-up included (digits 24, else 30)")
    p.add_argument("--warmup", type=int, metavar="EPOCHS", help="plain PGD-AT before HAM starts (digits 8, else 12)")
    p.add_argument("--train-images", type=int, metavar="N", help="use only N training images")
    p.add_argument("--test-images", type=int, metavar="N", help="use only N test images")
    p.add_argument("--model", choices=("small", "preact"), help="SmallCNN (digits) or PreActResNet-18 (else)")
    p.add_argument("--eps", type=float, help="budget, in units of the images (digits 0.2, else 0.031)")
    p.add_argument("--step-size", type=float, help="of the attack (digits 0.05, else 0.007)")
    p.add_argument("--steps", type=int, default=10, metavar="K", help="attack steps (default 10)")
    p.add_argument("--screen-steps", type=int, default=3, metavar="M", help="steps before easy rows leave (default 3)")
    p.add_argument("--lam", type=float, default=1.0, help="lambda of the weights (default 1)")
    p.add_argument("--batch-size", type=int, help="(digits 320, else 128)")
    p.add_argument("--lr", type=float, help="of SGD, momentum 0.9 (default 0.1)")
    p.add_argument("--milestones", type=int, nargs="*", metavar="EPOCH", help="lr decays (digits 18, else 18 25)")
    p.add_argument("--lr-decay", type=float, help="factor at each milestone (digits 0.2, else 0.1)")
    p.add_argument("--ema-decay", type=float, help="of the weight average (digits 0.97, else 0.99)")
    p.add_argument("--device", type=kinds.device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--out", type=kinds.folder, default=Path("runs"), help="folder for JSON, figure and run folders (default runs)"
    )
    p.add_argument("--check", action="store_true", help="exit 1 when the time claim fails")
    args = p.parse_args()
    defaults = DIGITS if args.dataset == "digits" and args.data is None else NATURAL
    for key, value in defaults.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    args.methods = args.methods.split(",")
    unknown = [m for m in args.methods if m not in TITLES]
    if unknown or not {"pgd_at", "ham"} <= set(args.methods):
        p.error(f"--methods: got {','.join(args.methods)}; it needs pgd_at and ham, and allows {', '.join(TITLES)}")
    if not 1 <= args.warmup < args.epochs:
        p.error(f"--warmup: got {args.warmup} with --epochs {args.epochs}; it must be at least 1 and less than those")
    for name in ("seeds", "batch_size"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}; it must be at least 1")
    for name in ("eps", "step_size"):
        if not getattr(args, name) > 0:
            p.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}; it must be more than 0")
    return args


def run_seed(seed: int, images: data.ImageSet | data.FileSet, args: argparse.Namespace, folder: Path, progress: tqdm):
    """One warm-up, then all methods in turn. Each leaves folder/METHOD-seedN."""

    def competitor(name: str) -> Competitor:
        return Competitor(name, settings_of(args, name, seed), images, folder)

    def train(one: Competitor, what: str) -> None:
        progress.set_description(f"seed {seed}: {what}")
        one.train_epoch(train_loader)
        progress.update()

    base = competitor(BASE)
    train_loader, _, test_loader = loaders_of(base.settings, images, device_of(args.device))
    for _ in range(args.warmup):
        train(base, "warm-up")
    competitors = [base if name == BASE else competitor(name).go_on_from(base) for name in args.methods]
    for epoch in range(args.warmup + 1, args.epochs + 1):
        turn = epoch % len(competitors)  # who goes first changes from epoch to epoch
        for one in competitors[turn:] + competitors[:turn]:
            train(one, one.name)
    for one in competitors:
        progress.set_description(f"seed {seed}: judging {one.name}")
        one.finish(test_loader)
        progress.update()


def result_of(folder: Path, args: argparse.Namespace, title: str) -> dict:
    """The table, and what the report that is made beside the run folders says of them."""
    runs = {
        name: report.read_runs([folder / f"{name}-seed{seed}" for seed in range(args.seeds)]) for name in args.methods
    }
    folders = [run.folder for own in runs.values() for run in own]
    page = report.build(folders, folder / "report", title=title, baseline=TITLES[BASE])
    (section,) = json.loads(page.with_name("data.json").read_text())["sections"]
    table = table_of(runs, args.warmup, args.steps, args.screen_steps)
    return {"table": table, "claims": claims_on_ham(section, table), "report": section}


def main() -> int:
    args = parse()
    if "torchattacks" in args.methods and not torchattacks_there():
        print("torchattacks is not installed, so its column is left out: pip install -e '.[torchattacks]'\n")
        args.methods.remove("torchattacks")
    images = images_of(settings_of(args, BASE, 0))
    about = machine()
    print(f"{images.name}: {len(images.y_train)} training and {len(images.y_test)} test images, {args.model} model,")
    print(
        f"eps {args.eps:g}, step {args.step_size:g}, K {args.steps}, M {args.screen_steps}, lambda {args.lam:g}, "
        f"{args.warmup} warm-up epochs of {args.epochs}, {args.seeds} seeds, batch {args.batch_size}"
    )
    print("; ".join(f"{key} {value}" for key, value in about.items()), flush=True)

    stem = f"bench_pgd_{images.name.split('.')[0].lower().replace(' ', '_')}"
    folder, aside = args.out / stem, args.out / f".{stem}.partial"
    shutil.rmtree(aside, ignore_errors=True)  # of a call that was stopped
    units = args.seeds * (args.warmup + len(args.methods) * (args.epochs - args.warmup + 1))
    with tqdm(total=units, unit="epoch", dynamic_ncols=True, disable=not sys.stderr.isatty()) as progress:
        for seed in range(args.seeds):
            run_seed(seed, images, args, aside, progress)
            if progress.disable:
                print(f"seed {seed} done", flush=True)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call, whose results stay until these are there
    aside.replace(folder)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    found = result_of(folder, args, f"{images.name}, {args.seeds} seeds, eps {args.eps:g}")
    result = {"machine": about, "settings": settings, **found, "overhead": overhead(images, args)}

    over = "one seed" if args.seeds == 1 else f"mean ± standard deviation over {args.seeds} seeds"
    print(f"\n{over}; phase: the epochs after the warm-up; raw, ema: last weights and their average\n")
    print(aligned(cells(result["table"])))
    print()
    for line in verdict_lines(result):
        print(line.replace("**", ""))

    files = args.out / f"{stem}.json", args.out / f"{stem}.png"
    write_json(files[0], result)
    shutil.copy(folder / "report" / "figures" / "class_accuracy.png", files[1])
    print(f"\nwritten: {files[0]}, {files[1]} and {folder / 'report' / 'index.html'}")
    held = next(c["holds"] for c in result["claims"] if MINING in c["claim"])
    if args.check and held is not True:
        print("--check: the time claim does not hold, or is undecided", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
