"""Flags of the commands, read by tyro into their dataclasses. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from itertools import takewhile
from typing import TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ..common import field_types, troubles
from ..runs.judge_settings import EvaluateSettings, JudgeSettings
from ..runs.settings import ImageSettings, ModelSettings, TrainSettings
from .experiments import STRONG
from .flag_base import base_of, hyphened, number, seen, stretch_of, without
from .options import Adoption, Evaluate, Export, Predict, Report, Resume, Sweep, Train

T = TypeVar("T")


def parse_train(argv: list[str]) -> Train | Resume:
    argv = hyphened(_filled(Train, argv))
    if (run := seen(argv, "--resume")) is not None:
        if (epochs := seen(argv, "--epochs")) is not None:
            raise ValueError(f"epochs: a run keeps its own; `ham train --from {run} --epochs {epochs}` trains on")
        return _cli(Resume, argv, "ham train")
    if seen(argv, "--steps") is not None and seen(argv, "--step-sizes") is not None:  # step_size judges all the same
        raise ValueError("steps: has no effect with --step-sizes, which are as many as they are; give one of them")
    wanted = _train(argv)
    _tell_idle(argv, wanted.settings)
    stretch = stretch_of(argv, wanted.settings)
    return wanted if stretch is None else _train(argv, stretch)


def _tell_idle(argv: list[str], settings: TrainSettings) -> None:
    """Warns of flags that have no effect, such as --easy jump without --early-drop; methods may share a script's."""
    method, optim = settings.method, settings.optim
    needs = {name: of.needs for name, of in field_types.words(type(method)).items()}
    why = {n: f"without {_flag(needs[n])}" if needs.get(n) else f"in {method.describe()}" for n in method.idle()}
    if optim.schedule != "step":
        why |= dict.fromkeys(("milestones", "lr_decay"), f"with --schedule {optim.schedule}")
    told = {word.partition("=")[0].replace("--no-", "--") for word in argv}
    for name in sorted(why):
        if _flag(name) in told:
            troubles.warn("flag_without_effect", flag=_flag(name), why=why[name])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _train(argv: list[str], stretch: float | None = None) -> Train:
    """With --epochs taken out where they are stretched: they are in what the flags start from."""
    base = base_of(argv, stretch)
    rest = argv if stretch is None else without(argv, "--epochs")
    return _cli(Train, rest, "ham train", Train(method=base.method.name, settings=base))


def parse_evaluate(argv: list[str]) -> Evaluate | Adoption:
    """A run to judge, or with --model a model that was trained elsewhere, under its data set's budget unless told."""
    argv = hyphened(_filled(Evaluate, argv))
    if not any(word == "--model" or word.startswith("--model=") for word in argv):
        wanted = _cli(Evaluate, argv, "ham evaluate", Evaluate(tyro.MISSING, settings=EvaluateSettings(masking=True)))
        return replace(wanted, settings=replace(wanted.settings, masking=_switched(argv, "masking")))
    base = base_of(argv)
    default = Adoption(
        ModelSettings(tyro.MISSING), attack=base.attack,
        data=ImageSettings(**{f.name: getattr(base.data, f.name) for f in fields(ImageSettings)}),
        judge=JudgeSettings(masking=True, analyses=False),
    )  # fmt: skip
    wanted = _cli(Adoption, argv, "ham evaluate", default)
    return replace(wanted, judge=replace(wanted.judge, masking=_switched(argv, "masking")))


def _switched(argv: list[str], name: str) -> bool | None:
    """Which of --NAME and --no-NAME came last; None where neither did."""
    said = [word for word in argv if word in (f"--{name}", f"--no-{name}")]
    return said[-1] == f"--{name}" if said else None


def parse_report(argv: list[str]) -> Report:
    return _cli(Report, _filled(Report, argv), "ham report")


def parse_export(argv: list[str]) -> Export:
    return _cli(Export, _filled(Export, argv), "ham export")


def parse_predict(argv: list[str]) -> Predict:
    return _cli(Predict, _filled(Predict, argv), "ham predict")


def parse_sweep(argv: list[str]) -> Sweep:
    argv = hyphened(_filled(Sweep, argv))
    own = {"--seed": "give --seeds", "--method": "the experiment sets it", "--label": "the experiment sets it"}
    _refuse(argv, own, "a sweep")
    wanted = _cli(Sweep, argv, "ham sweep", Sweep(tyro.MISSING, settings=base_of(argv)))
    if not {"--masking", "--no-masking"} & set(argv):
        wanted = replace(wanted, masking=wanted.experiment in STRONG)
    if wanted.experiment in ("grid", "paper"):
        of_grid = {"--screen-steps": "the grid sets it", "--lam": "the grid sets it"}
        _refuse(argv, of_grid, f"a sweep of {wanted.experiment}")
    return wanted


def _filled(kind: type, argv: list[str]) -> list[str]:
    """The command line. Raises: ValueError naming the flag, or else the argument, that is an empty string."""
    switches = set(_switches(kind))
    positional = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    flag, bare = "", 0
    for word in argv:
        if word.startswith("--"):
            name, is_, value = word[2:].partition("=")
            if is_ and not value:
                raise ValueError(f"{name}: {field_types.EMPTY}")
            flag = "" if name.replace("-", "_").removeprefix("no_") in switches else name
        elif word:
            bare += not flag
        else:
            name = flag or (positional[min(bare, len(positional) - 1)] if positional else "argument")
            raise ValueError(f"{name}: {field_types.EMPTY}")
    return argv


def _switches(kind: type) -> Iterator[str]:
    """The fields that are flags without a value."""
    for name, hint in field_types.hints(kind).items():
        if is_dataclass(hint):
            yield from _switches(hint)
        elif hint in (bool, bool | None):
            yield name


def _refuse(argv: list[str], flags: dict[str, str], of: str) -> None:
    """Raises: ValueError naming the first of these flags that is given, with its reason."""
    for flag, why in flags.items():
        if seen(argv, flag) is not None:
            raise ValueError(f"{flag.lstrip('-')}: cannot be given to {of}; {why}")


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
