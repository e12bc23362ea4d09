"""The CIFAR-10 runs of gpu_suite.py: PGD-AT, HAM, and HAM with frozen BatchNorm, behind one warm-up per seed; others.

    python -m gpu.runs warm-up FOLDER SEED ARM,... FLAGS...    what these arms share; then one run folder for each

Until HAM starts these arms train alike, so the warm-up is trained once, as the beginning of PGD-AT, and copied. Its
time counts in each run. Every other step is a command of `ham`, so that a run goes on wherever a call ended. An arm is
judged as soon as it is trained: a machine that goes takes its weights along, and what was judged stays.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from functools import partial
from pathlib import Path

from gpu.process import Failed, Shell
from gpu.stages import Options, Stage

BASE = "pgd_at"
ARMS = {
    BASE: ("--method", "pgd_at"),
    "ham": ("--method", "ham"),
    "ham_frozen_bn": ("--method", "ham", "--freeze-bn"),
}
WHOLE = {  # trained from their first epoch on, behind no warm-up
    "fair": ("--method", "fair"),
    "fair_fast": ("--method", "fair", "--fast"),
    "fair_long": ("--method", "fair", "--fast", "--time", "0.95"),
    "trades": ("--method", "trades"),
}
ALL = ARMS | WHOLE
ENGINES = {
    "bf16": ("--precision", "bf16", "--channels-last", "on", "--compile", "on", "--cuda-graphs", "on"),
    "fp32": ("--channels-last", "on", "--compile", "on", "--cuda-graphs", "on"),
    "plain": (),
}
WEIGHTS = ("ema", "last")
# sizes of --smoke; eps so large that AutoAttack has nothing left to do after its first attack
TINY = (
    "--model", "small_cnn", "--batch-size", "16", "--val-images", "4", "--start-epoch", "2", "--eps", "0.5",
    "--step-size", "0.1", "--steps", "4", "--val-attack", "pgd2",
)  # fmt: skip


def name_of(arm: str, seed: int) -> str:
    return f"{arm}-seed{seed}"


def warm_up_name(seed: int) -> str:
    return f".warm-up-seed{seed}"


def data_name(o: Options) -> str:
    return "torchvision" if o.data is None else o.data.name


def flags(o: Options, seed: int) -> list[str]:
    """Of `ham train`, for all arms of a seed."""
    course = ["--epochs", o.epochs, "--schedule", "one_cycle", "--seed", seed, *ENGINES[o.engine]]
    where = ["--dataset", "cifar10", "--root", o.out / "data"]
    where += [] if o.data is None else ["--path", o.data, "--no-download"]
    return [str(flag) for flag in (*where, *course, *(TINY if o.smoke else ()))]


def chosen(o: Options) -> list[str]:
    return [arm for arm in ALL if o.arms is None or arm in o.arms]


# ---------------------------------------------------------------- stages
def warm_up(o: Options, seed: int, shell: Shell) -> dict:
    _check_options(o)
    folder, arms = o.out / "cifar", [arm for arm in chosen(o) if arm in ARMS]
    if all((folder / name_of(arm, seed)).exists() for arm in arms):
        return {"line": f"{len(arms)} arms are behind it"}
    told = ["warm-up", str(folder), str(seed), ",".join(arms), *flags(o, seed)]
    (status,) = shell.run([sys.executable, "-m", "gpu.runs", *told])
    if status:
        raise Failed(shell.last_line())
    return {"line": f"{len(_epochs(folder / warm_up_name(seed)))} epochs, shared by {len(arms)} arms"}


def train(o: Options, arm: str, seed: int, shell: Shell) -> dict:
    _check_options(o)
    folder = o.out / "cifar" / name_of(arm, seed)
    begun = (folder / "config.toml").exists()
    where = ["--resume", str(folder)] if begun else [*flags(o, seed), *ALL[arm], "--out", str(folder)]
    (status,) = shell.run([sys.executable, "-m", "ham_kernels", "train", *where])
    told = folder / "status.json"  # not there where the run could not begin
    state = json.loads(told.read_text()) if told.exists() else {"state": "not begun", "message": None}
    if status or state["state"] != "finished":
        raise Failed(f"ham train ended with {status}, {state['state']}: {state['message'] or shell.last_line()}")
    epochs = _epochs(folder)
    own = [e for e in epochs if e["mined"]]
    hard = f", h {own[0]['hard_fraction']:.2f} to {own[-1]['hard_fraction']:.2f}" if own else ""
    return {"line": f"{len(epochs)} epochs, {sum(e['seconds'] for e in epochs):.0f} s of training{hard}"}


def judge(o: Options, arm: str, seed: int, choice: list[str], shell: Shell) -> dict:
    if "autoattack" in choice and importlib.util.find_spec("pyautoattack") is None:
        raise Failed("pyautoattack is not installed")
    folder = o.out / "cifar" / name_of(arm, seed)
    if not (folder / "checkpoints").exists():
        raise Failed("its weights are on the machine that trained it")
    told = ["evaluate", str(folder), "--quiet", "--no-masking", *choice]
    (status,) = shell.run([sys.executable, "-m", "ham_kernels", *told])
    if status:
        raise Failed(f"ham evaluate ended with {status}: {shell.last_line()}")
    weights, attack = ("last" if "ema" not in choice else "ema"), "autoattack" if "autoattack" in choice else "cw20"
    found = json.loads((folder / "evaluation" / f"{weights}.json").read_text())["attacks"][attack]
    share = [100 * found[key]["value"] for key in ("accuracy", "worst_class")]
    return {"line": f"{attack}, {weights}: {share[0]:.1f} %, worst class {share[1]:.1f} %"}


def report(o: Options, shell: Shell) -> dict:
    runs = [str(path.parent) for path in sorted(o.out.glob("cifar/*/evaluation")) if any(path.glob("[!.]*.json"))]
    if not runs:
        raise Failed("no run has been judged")
    out = ["--out", str(o.out / "report"), "--title", f"CIFAR-10 ({data_name(o)}), PreActResNet-18"]
    (status,) = shell.run([sys.executable, "-m", "ham_kernels", "report", *runs, *out])
    if status:
        raise Failed(f"ham report ended with {status}: {shell.last_line()}")
    return {"line": f"{len(runs)} runs"}


def _judged(o: Options) -> list:
    """Changes with every judgement."""
    return [[str(p), p.stat().st_mtime_ns] for p in sorted(o.out.glob("cifar/*/evaluation/[!.]*.json"))]


def _epochs(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _check_options(o: Options) -> None:
    """All runs of a folder are of one kind."""
    path, now = o.out / "cifar" / "options.json", {"engine": o.engine, "epochs": o.epochs, "data": data_name(o)}
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(now))
    if (before := json.loads(path.read_text())) != now:
        raise Failed(f"the runs in {path.parent} were begun with {before}, not {now}; give another --out")


def stages(o: Options) -> list[Stage]:
    """Seed by seed and arm by arm, each judged before the next is trained; the last weights behind all others."""
    short = 0.0 if o.smoke else 1.0
    images = ["--images", str(o.autoattack_images)] if o.autoattack_images else []
    auto = ["--attacks", "autoattack", "--search", "fast", "--no-analyses", "--batch-size", "500", *images]
    usual = ["--attacks", "clean", "pgd20", "cw20", "--batch-size", "1000", "--weights", *WEIGHTS]
    usual += ["--analysis-images", "24"] if o.smoke else []
    found, late = [], []
    for seed in o.seeds:
        shared = [arm for arm in chosen(o) if arm in ARMS]
        first = (f"warm-up-seed{seed}",) if shared else ()
        found += [Stage(name, 60 * short, partial(warm_up, o, seed)) for name in first]
        for arm in chosen(o):
            name = name_of(arm, seed)
            trained = (f"train-{name}",)
            work = partial(train, o, arm, seed)
            found.append(Stage(*trained, 75 * short, work, after=first if arm in shared else ()))
            found.append(Stage(f"judge-{name}", 30 * short, partial(judge, o, arm, seed, usual), after=trained))
            for weights, where in [("ema", found), ("last", late)][: 1 if o.smoke else 2]:
                work = partial(judge, o, arm, seed, [*auto, "--weights", weights])
                stamp = partial(list, images)
                where.append(Stage(f"autoattack-{weights}-{name}", 60 * short, work, after=trained, stamp=stamp))
    judged = tuple(stage.name for stage in found if stage.name.startswith("judge-"))
    last = Stage("report", 5 * short, partial(report, o), behind=judged, stamp=partial(_judged, o), final=True)
    return [*found, *late, last]


# ---------------------------------------------------------------- the command
def share_warm_up(folder: Path, seed: int, arms: list[str], flags: list[str]) -> None:
    """Trains PGD-AT until HAM would start, and gives each arm a folder that goes on from there."""
    from ham_kernels.commands.cli import main
    from ham_kernels.commands.flags import parse_train
    from ham_kernels.runs.folder import RunFolder

    told = {arm: parse_train([*flags, *choice]).settings for arm, choice in ARMS.items()}
    for settings in told.values():
        settings.check()
    source = folder / warm_up_name(seed)
    if not (source / "config.toml").exists():
        RunFolder.create(source, told[BASE])
    epochs = told["ham"].method.start_epoch - 1
    if status := main(["train", "--resume", str(source), "--until-epoch", str(epochs)]):
        sys.exit(status)
    for arm in arms:
        path, settings = folder / name_of(arm, seed), told[arm]
        if path.exists():
            continue
        aside = folder / f".{path.name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        RunFolder.create(aside, settings)
        shutil.copytree(source / "checkpoints", aside / "checkpoints")
        shutil.copy(source / "environment.json", aside)
        aside.replace(path)


if __name__ == "__main__":
    _, where, number, names, *rest = sys.argv[1:]
    share_warm_up(Path(where), int(number), names.split(","), rest)
