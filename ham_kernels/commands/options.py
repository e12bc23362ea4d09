"""What each command is told, as dataclasses: tyro makes the flags and their help of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge

from ..methods import names
from ..runs.judge_settings import EvaluateSettings, JudgeSettings
from ..runs.settings import AttackSettings, ImageSettings, ModelSettings, TrainSettings


def _default(words: str) -> Any:
    """What help says of a default that depends on the rest."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {words})")


_EMA_IF_KEPT = _default("ema where the run keeps a weight average, else last")
_METHOD = tyro.conf.arg(
    help=f"One of {', '.join(names())}, or MODULE:CLASS of one's own; `--method NAME --help` shows its own settings.",
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
    """In place of --method, what the frontier chose (docs/methods.md). fair: within two points of the best worst class
    that keeps PGD-AT's average within one, in its time. fast: that keeps it within two, in less than half of its time,
    where K is 10. paper: the best worst class of the methods as published."""
    time: Annotated[float | None, tyro.conf.arg(help_behavior_hint="")] = None
    """As many epochs, in place of PGD-AT's, as cost this share of what they do by the cost model. Of a method that
    screens, all rows are taken as hard; a teacher is taken as large as the model."""
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
