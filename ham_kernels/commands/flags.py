"""Flags of the commands, made by tyro from the dataclasses that the Python functions take. Imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from annotated_types import Ge
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ..methods import names
from ..methods.registry import with_name
from ..runs.config_file import from_toml, read_toml
from ..runs.judge_settings import EvaluateSettings, JudgeSettings
from ..runs.presets import for_folder, preset, rescaled, with_fewer_epochs
from ..runs.settings import (
    AttackSettings,
    ImageSettings,
    ModelSettings,
    TrainSettings,
)
from .experiments import STRONG
from .fine_tuning import EPOCHS, FINE_TUNED, config_of, fine_tuning

T = TypeVar("T")
PRESETS = {"fair": ("fair", {}), "fast": ("fair", {"fast": True}), "paper": ("wat", {})}  # of --preset
ADAMW_LR = 1e-3  # presets have SGD's


def _default(words: str) -> Any:
    """What help says of a default that depends on the rest."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {words})")


_EMA_IF_KEPT = _default("ema where the run keeps a weight average, else last")
_METHOD = tyro.conf.arg(
    help=f"One of {', '.join(names())}; `--method NAME --help` shows its own settings.",
    help_behavior_hint=lambda default: f"(default: {default})",
)


@dataclass(frozen=True)
class Train:
    """Train a classifier into a run folder. Every default is the preset of the data set, then of --config."""

    out: Annotated[Path | None, _default("runs/DATASET-METHOD-seedN")] = None
    """Run folder."""
    config: Path | None = None
    """TOML file of settings, such as the config.toml of another run; flags override it."""
    resume: Path | None = None
    """Go on with this run, as its config.toml says; the other flags then are --until-epoch N, --path and --quiet."""
    dry_run: bool = False
    """Time a few steps of each kind of epoch, and say what the run would take; no run folder is made."""
    quiet: bool = False
    origin: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Fine-tune this RUN by its own settings, or a CHECKPOINT by the preset's: 2 epochs, by a tenth of the learning
    rate, of the method from the first one on."""
    preset: Annotated[Literal["fair", "fast", "paper"] | None, tyro.conf.arg(help_behavior_hint="")] = None
    """In place of --method, what the frontier chose (docs/methods.md). fair: the best worst class within a point of
    PGD-AT's average. fast: likewise in less than half of the time. paper: the best worst class as published."""
    method: Annotated[str, _METHOD] = "ham"
    settings: TrainSettings = field(default_factory=TrainSettings)


@dataclass(frozen=True)
class Evaluate:
    """Judge the weights of a run, by default on its test images.

    With --model, one that was trained elsewhere: `ham evaluate --model NAME --help`.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    quiet: bool = False
    settings: EvaluateSettings = field(default_factory=EvaluateSettings)


@dataclass(frozen=True)
class Adoption:
    """Judge a model that was trained elsewhere, in a folder of its own that `ham report` compares with runs.

    Without --model, `ham evaluate RUN` judges a run. More attacks: the same command with others, or of the folder.
    """

    model: ModelSettings
    out: Annotated[Path | None, _default("runs/DATASET-LABEL")] = None
    """Folder for its weights and what they are worth."""
    checkpoint: Path | None = None
    """Its weights: a state_dict of torch.save, or safetensors. Names of TRADES', pytorch-cifar's and RobustBench's
    PreActResNet-18 and wide ResNets, of DataParallel and of torch.compile are known."""
    checkpoint_key: str | None = None
    """The entry of that file, where it holds several state_dicts."""
    label: Annotated[str | None, _default("the name of the checkpoint, else of the model")] = None
    """What reports call it."""
    quiet: bool = False
    data: ImageSettings = field(default_factory=ImageSettings)
    attack: AttackSettings = field(default_factory=AttackSettings)
    judge: JudgeSettings = field(default_factory=lambda: JudgeSettings(analyses=False))


@dataclass(frozen=True)
class Report:
    """One HTML page, PNG figures, and tables in Markdown and LaTeX, from any number of runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(help_behavior_hint="(at least one)")]
    """Run folders, or folders of run folders such as a sweep's."""
    out: Path = Path("report")
    """Folder of the report."""
    title: str | None = None
    baseline: Annotated[str | None, _default("PGD-AT")] = None
    """Title of the method that the others are compared with."""
    attack: Annotated[str | None, _default("the strongest that all runs compared have")] = None
    """What robust accuracy is by, such as cw20."""
    audit: bool = False
    """What the models are worth alone: no claims of a paper, no frontier."""
    require: tuple[str, ...] = ()
    """What each model must meet: "worst_class>=20", "autoattack.accuracy>=45", "class cat>=30" in percent, "gini<=0.2";
    measures: accuracy, worst_class, worst3, range, std, nstd, gini. One that fails makes the exit status 1."""
    pdf: bool = True
    """Figures as PDF too."""
    columns: Annotated[tuple[str, ...], _default("what fits an article")] = ()
    """Of the paper's tables: avg, worst, worst3, range, std, nstd, gini, each alone or as in clean.avg; time, relative,
    forwards."""


@dataclass(frozen=True)
class Export:
    """Write a run's model for those who have torch alone, with a card of what it is worth."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    out: Annotated[Path | None, _default("exports/RUN")] = None
    """New folder."""
    weights: Annotated[Literal["last", "ema", "best", "best_ema"] | None, _EMA_IF_KEPT] = None
    formats: tuple[Literal["state_dict", "pt2", "safetensors", "onnx", "robustbench", "card"], ...] = (
        "state_dict", "pt2", "robustbench", "card",
    )  # fmt: skip
    """state_dict: model.pt. pt2: model.pt2 of torch.export, images in [0, 1] to logits, about.json inside.
    safetensors, onnx: where their packages are installed. robustbench: an entry of its model_info. card:
    MODEL_CARD.md."""
    names: Literal["ours", "field"] = "ours"
    """Of the weights in model.pt and safetensors: field gives those of pytorch-cifar and TRADES, without
    normalisation."""


@dataclass(frozen=True)
class Predict:
    """Classes of image files, by a run or by an export that has a model.pt2."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run folder, or the folder of an export."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(help_behavior_hint="(at least one)")]
    """Images, resized as the test images of the training were."""
    weights: Annotated[Literal["last", "ema", "best", "best_ema"] | None, _EMA_IF_KEPT] = None
    """Of a run."""
    top: Annotated[int, Ge(1)] = 3
    """So many classes of each image are told."""
    batch_size: Annotated[int, Ge(1)] = 64
    device: str = "auto"
    json: bool = False
    """One JSON list in place of lines."""


@dataclass(frozen=True)
class Sweep:
    """An experiment of many runs; what is finished is kept, so the same command goes on after a stop.

    baseline: PGD-AT. ham: HAM with M and lambda of the preset. grid: M from 1 to 5 x lambda from 0.5 to 2.0.
    ablations: early dropping alone, reweighting alone, random rows, and three kinds of BatchNorm while mining.
    cheaper: cheaper warm-ups, screening by one step, and batches screened together. paper: the first three.
    methods: every method as published, then each with HAM's screening, easy rows jumping. frontier: PGD-AT and fair
    with attacks of 3, 2 and 1 large steps, and screened with easy rows that drop, stop or jump.
    --seed, --method and --label are the experiment's own.
    """

    experiment: Annotated[
        Literal["baseline", "ham", "grid", "ablations", "cheaper", "paper", "methods", "frontier"], tyro.conf.Positional
    ]
    out: Annotated[Path | None, _default("runs/sweep-DATASET, the same for all experiments")] = None
    """Sweep folder."""
    config: Path | None = None
    """TOML file of settings for every run."""
    only: tuple[str, ...] = ()
    """Of the experiment's runs only these, by name without the seed, or by pattern: pgd_at "fair*"."""
    seeds: tuple[int, ...] = (0,)
    attacks: Annotated[
        tuple[str, ...],
        _default("clean pgd20 cw20; of methods and frontier autoattack too, where pyautoattack is installed"),
    ] = ()
    """How each run is judged on the test set in the end. HAM gains more under PGD than under CW: look at both.
    AutoAttack takes the equivalent of up to 10000 forwards of each image that resists it, CW-20 of 40."""
    search: Literal["plain", "fast"] = "plain"
    """fast: attacks look for examples on a rounded, compiled form of each model; the plain one judges them."""
    masking: Annotated[bool, _default("--no-masking; of methods and frontier --masking")] = False
    """Check each run for gradient masking: about 350 forwards and backwards of each image."""
    masking_images: int = 128
    """So many test images are checked; `ham evaluate` takes 512."""
    share_warmup: bool = True
    """Train the epochs before start_epoch once per seed and kind, for all runs that begin with the same."""
    settings: TrainSettings = field(default_factory=TrainSettings)
    """Of every run; the experiment's own come on top."""


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its newest intact checkpoint, with the settings of its config.toml."""

    resume: Path
    """Run folder."""
    path: str | None = None
    """Where its images lie now, if they have moved; they must be the same."""
    until_epoch: int | None = None
    """Pause after this epoch."""
    quiet: bool = False


def parse_train(argv: list[str]) -> Train | Resume:
    if _seen(argv, "--resume") is not None:
        return _cli(Resume, argv, "ham train")
    base = _base(argv)
    return _cli(Train, argv, "ham train", Train(method=base.method.name, settings=base))


def parse_evaluate(argv: list[str]) -> Evaluate | Adoption:
    """A run to judge, or with --model a model that was trained elsewhere, under its data set's budget unless told."""
    if not any(word == "--model" or word.startswith("--model=") for word in argv):
        wanted = _cli(Evaluate, argv, "ham evaluate", Evaluate(tyro.MISSING, settings=EvaluateSettings(masking=True)))
        return replace(wanted, settings=replace(wanted.settings, masking=_switched(argv, "masking")))
    base = _base(argv)
    default = Adoption(
        ModelSettings(tyro.MISSING), attack=base.attack,
        data=ImageSettings(**{f.name: getattr(base.data, f.name) for f in fields(ImageSettings)}),
        judge=JudgeSettings(masking=True, analyses=False),
    )  # fmt: skip
    wanted = _cli(Adoption, argv, "ham evaluate", default)
    return replace(wanted, judge=replace(wanted.judge, masking=_switched(argv, "masking")))


def _switched(argv: list[str], name: str) -> bool | None:
    """Which of --NAME and --no-NAME came last; None where neither did."""
    said = [word for word in (w.replace("_", "-") for w in argv) if word in (f"--{name}", f"--no-{name}")]
    return said[-1] == f"--{name}" if said else None


def parse_report(argv: list[str]) -> Report:
    return _cli(Report, argv, "ham report")


def parse_export(argv: list[str]) -> Export:
    return _cli(Export, argv, "ham export")


def parse_predict(argv: list[str]) -> Predict:
    return _cli(Predict, argv, "ham predict")


def parse_sweep(argv: list[str]) -> Sweep:
    wanted = _cli(Sweep, argv, "ham sweep", Sweep(tyro.MISSING, settings=_base(argv)))
    if not {"--masking", "--no-masking"} & set(argv):
        wanted = replace(wanted, masking=wanted.experiment in STRONG)
    own = {"--seed": "give --seeds", "--method": "the experiment sets it", "--label": "the experiment sets it"}
    if wanted.experiment in ("grid", "paper"):
        own |= {"--screen-steps": "the grid sets it", "--lam": "the grid sets it"}
    for flag, why in own.items():
        if _seen(argv, flag) is not None:
            raise ValueError(f"{flag.lstrip('-')}: cannot be given to a sweep of {wanted.experiment}; {why}")
    return wanted


def _base(argv: list[str]) -> TrainSettings:
    """What the flags start from: the preset of the data set, then the TOML file, in as many epochs as asked for.

    --epochs stretches the course of both, so that it keeps its shape; epochs in the file stretch the preset's. --from
    takes the settings of a run for the file.
    """
    config, epochs, origin = _seen(argv, "--config"), _seen(argv, "--epochs"), _seen(argv, "--from")
    of_run = None if origin is None else config_of(origin)
    if origin is not None and _seen(argv, "--weights") is not None:
        raise ValueError(f"weights: cannot be given with --from {origin}, which has its own")
    if of_run is not None and config is not None:
        raise ValueError(f"config: cannot be given with --from {origin}, whose settings it would be")
    config = config if of_run is None else of_run
    told = {} if config is None else read_toml(config)
    named, switches = _method_named(argv)
    of_flag = None if get(told, "method", "name") else named  # whose settings the file's are, where it does not say
    if config is not None:
        from_toml(config, TrainSettings(), of_flag)  # judges keys and types before anything is made of them
    path = _seen(argv, "--path") or get(told, "data", "path")
    dataset = _seen(argv, "--dataset") or get(told, "data", "dataset")
    if path and not dataset:
        numbers = {key: _number(argv, told, key) for key in ("size", "train_images", "batch_size")}
        base = for_folder(str(path), **numbers)
    else:
        base = preset(dataset or "digits")
    if config is not None:
        own_epochs = get(told, "optim", "epochs")
        base = from_toml(config, rescaled(base, own_epochs) if own_epochs else base, of_flag)
    count = int(epochs) if epochs is not None and epochs.isdecimal() and int(epochs) > 0 else None
    if origin is not None:
        tuned_before = base.run.weights is not None
        base = fine_tuning(base, origin, EPOCHS if count is None else count)
        switches = {**switches, "start_epoch": 1}
    if named is not None:
        method = with_name(base.method, named, base.optim.epochs)
        base = replace(base, method=replace(method, **switches))
    optimizer, was = _seen(argv, "--optimizer"), base.optim
    others_lr = get(told, "optim", "lr") is not None and optimizer not in (None, was.optimizer)
    if others_lr and _seen(argv, "--lr") is None:
        raise ValueError(f"lr: {config} has {was.lr:g}, for {was.optimizer}; give --lr for {optimizer}")
    if get(told, "optim", "lr") is None:
        adamw = (optimizer or base.optim.optimizer) == "adamw"
        lr = ADAMW_LR if adamw else base.optim.lr
        tuned = _seen(argv, "--weights") or base.run.weights
        base = replace(base, optim=replace(base.optim, lr=lr / FINE_TUNED if tuned else lr))
    elif of_run is not None and not tuned_before:
        base = replace(base, optim=replace(base.optim, lr=base.optim.lr / FINE_TUNED))
    if origin is not None:
        return base
    if epochs is None and get(told, "optim", "epochs") is None:
        replays = _seen(argv, "--replays")
        return with_fewer_epochs(base, int(replays) if replays and replays.isdecimal() and int(replays) else None)
    return base if count is None else rescaled(base, count)  # tyro and check() say what is wrong with another


def _method_named(argv: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The method of --method, or of --preset with its switches. Raises: ValueError where both are given."""
    named, chosen = _seen(argv, "--method"), _seen(argv, "--preset")
    if chosen not in PRESETS:  # tyro says what is wrong with another
        return named, {}
    if named is not None:
        raise ValueError(f"preset: got {chosen!r} with --method {named}; give one of them")
    return PRESETS[chosen]


def _number(argv: list[str], told: dict[str, Any], key: str) -> int | None:
    """A setting of images as it is given; None where it is not, or is no count (tyro and check() say what is wrong)."""
    given = _seen(argv, f"--{key.replace('_', '-')}")
    given = get(told, "data", key) if given is None else given
    try:
        return max(int(given), 0) or None
    except (TypeError, ValueError):
        return None


def get(sections: dict[str, Any], section: str, key: str) -> Any:
    """A value of a TOML file that is not checked yet; None where it is missing."""
    values = sections.get(section)
    return values.get(key) if isinstance(values, dict) else None


def _seen(argv: list[str], flag: str) -> str | None:
    """The value that a flag has on the command line, before the flags as a whole are read."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument(flag, dest="value", nargs="?", const=None)
    return early.parse_known_args(argv)[0].value


def _cli(kind: type[T], argv: list[str], prog: str, default: T | None = None) -> T:
    given = {} if default is None else {"default": default}
    args, config = _normalized_by(argv), (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(kind, args=args, prog=prog, config=config, registry=_REGISTRY, **given)


def _normalized_by(argv: list[str]) -> list[str]:
    """--normalize MEAN STD as --mean MEAN --std STD; without numbers behind it, it stays the switch that it is."""
    if "--normalize" not in argv:
        return argv
    at = argv.index("--normalize")
    numbers = list(takewhile(_is_number, argv[at + 1 :]))
    if not numbers:
        return argv
    half = len(numbers) // 2
    if len(numbers) % 2:
        raise ValueError(f"normalize: got {' '.join(numbers)}; give a mean, then a std, one value per channel each")
    return [*argv[:at], "--mean", *numbers[:half], "--std", *numbers[half:], *argv[at + 1 + len(numbers) :]]


def _is_number(word: str) -> bool:
    try:
        number(word)
    except ValueError:
        return False
    return True


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _floats(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
    """Numbers may be fractions, as papers write budgets: --eps 8/255."""
    if info.type is not float:
        return None
    return PrimitiveConstructorSpec(
        nargs=1, metavar="FLOAT", instance_from_str=lambda words: number(words[0]),
        is_instance=lambda value: isinstance(value, int | float), str_from_instance=lambda value: [str(value)],
    )  # fmt: skip


def number(word: str) -> float:
    """0.1, 1e-3 or 8/255. Raises: ValueError."""
    above, slash, below = word.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"got {word!r}; it must be a number, or a fraction such as 8/255") from error
