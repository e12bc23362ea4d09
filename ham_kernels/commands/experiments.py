"""The experiments of `ham sweep`: which runs each is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import get_args

from ..common import field_types
from ..methods.registry import class_of, names, warm_up_of, with_name
from ..methods.settings import Method
from ..runs.presets import LONG, in_time, with_fewer_epochs
from ..runs.settings import TrainSettings

GRID_SCREEN_STEPS = (1, 2, 3, 4, 5)
GRID_LAM = (0.5, 1.0, 1.5, 2.0)
SCHEDULES = ((1.0, 0.5, 0.25), (2.0, 1.0, 0.5), (1.0, 0.5), (1.25,))  # steps in units of eps, of the frontier
EASY = ("drop", "stop", "jump")
FRONTIER = ("pgd_at", "fair")  # the methods whose schedules and screenings it tries, as far as they are known
STRONG = ("methods", "frontier")  # by default judged by AutoAttack too, and checked for gradient masking


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. The name is its folder, the same in every experiment that contains it."""

    name: str
    settings: TrainSettings


def cells(experiment: str, base: TrainSettings, seeds: tuple[int, ...]) -> list[Cell]:
    """The runs of an experiment, seed by seed, so that a sweep that is stopped has whole comparisons."""
    return planned(experiment, base, seeds)[0]


def planned(
    experiment: str, base: TrainSettings, seeds: tuple[int, ...], only: Sequence[str] = ()
) -> tuple[list[Cell], dict[str, str]]:
    """Its runs as in `cells`, and {name: why} of the combinations that a method refuses.

    Of `only` what one of these names or shell patterns fits, which tell of no seed.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: got {seeds}; give at least one, and each once")
    own = {pattern: class_of(pattern).name for pattern in only if ":" in pattern}  # which are known from now on
    only = [own.get(pattern, pattern) for pattern in only]
    made = {seed: dict(_EXPERIMENTS[experiment](_of_seed(base, seed))) for seed in seeds}
    runs_of = made[seeds[0]]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in runs_of):
            can_be = [name for name, settings in runs_of.items() if not isinstance(settings, str)]
            raise ValueError(f"only: {pattern!r} is no run of {experiment}, which has {', '.join(can_be)}")
    found: dict[str, Cell] = {}
    left_out: dict[str, str] = {}
    for seed, runs in made.items():
        for name, settings in runs.items():
            if only and not any(fnmatchcase(name, pattern) for pattern in only):
                continue
            if isinstance(settings, str):
                left_out[name] = settings
                continue
            name = f"{name}-seed{seed}"
            found.setdefault(name, Cell(name, settings))
    return list(found.values()), left_out


def _of_seed(base: TrainSettings, seed: int) -> TrainSettings:
    return replace(base, run=replace(base.run, seed=seed, label=None))


def _method(base: TrainSettings, /, **changes) -> TrainSettings:
    return replace(base, method=replace(base.method, **changes))


def _named(base: TrainSettings, name: str) -> TrainSettings:
    named = replace(base, method=with_name(base.method, name, base.optim.epochs))
    return with_fewer_epochs(without_idle_teacher(named))


def without_idle_teacher(settings: TrainSettings) -> TrainSettings:
    """A sweep's teacher is for the methods that learn from one."""
    if settings.method.needs_teacher:
        return settings
    return replace(settings, run=replace(settings.run, teacher=None, teacher_digest=None))


def _ham(base: TrainSettings, **changes) -> tuple[str, TrainSettings]:
    settings = _method(_named(base, "ham"), **changes)
    return _name_of(settings), settings


def _name_of(settings: TrainSettings) -> str:
    """The method's name; of one that mines by default with M and lambda, as far as they have an effect."""
    m, words = settings.method, [settings.method.name]
    if type(m)().mines:
        told = m.in_effect()
        words += [f"M{m.screen_steps}"] * ("screen_steps" in told) + [f"lam{m.lam:g}"] * ("lam" in told)
    return "-".join(words)


def _baseline(base: TrainSettings) -> Iterator[tuple[str, TrainSettings]]:
    yield "pgd_at", _named(base, "pgd_at")


def _paper_ham(base: TrainSettings) -> Iterator[tuple[str, TrainSettings]]:
    yield _ham(base)


def _grid(base: TrainSettings) -> Iterator[tuple[str, TrainSettings]]:
    for screen_steps in GRID_SCREEN_STEPS:
        for lam in GRID_LAM:
            yield _ham(base, screen_steps=screen_steps, lam=lam)


def _paper(base: TrainSettings) -> Iterator[tuple[str, TrainSettings]]:
    yield from _baseline(base)
    yield from _paper_ham(base)
    yield from _grid(base)


def _ablations(base: TrainSettings) -> Iterator[tuple[str, TrainSettings]]:
    yield from _baseline(base)
    name, ham = _ham(base)
    yield name, ham
    yield f"{name}-drop_only", _method(ham, reweight=False)
    yield f"{name}-reweight_only", _method(ham, early_drop=False)
    yield f"{name}-random_rows", _method(ham, rows="random")
    yield f"{name}-frozen_bn", _method(ham, freeze_bn=True)
    yield f"{name}-bn_of_all_rows", _method(ham, bn_rows="all")


def _cheaper(base: TrainSettings) -> Iterator[tuple[str, TrainSettings]]:
    """What can bring the time of a whole run down: cheaper warm-ups, cheaper screening, fuller launches."""
    yield from _baseline(base)
    name, ham = _ham(base)
    yield name, ham
    half = (ham.method.start_epoch - 1) // 2
    for warm_up in ("n_fgsm", "fgsm_rs"):
        yield f"{name}-{warm_up}", _warm_up(ham, name=warm_up)
    yield f"{name}-natural{half}", _warm_up(ham, natural_epochs=half)
    yield f"{name}-one_step", _method(ham, screen="one_step")
    yield f"{name}-n_fgsm-one_step", _method(_warm_up(ham, name="n_fgsm"), screen="one_step")
    for group in (2, 4):
        yield f"{name}-group{group}", _method(ham, group=group)
    yield f"{name}-group2-one", _method(ham, group=2, group_updates="one")
    yield f"{name}-round32", _method(ham, round_to=32)


def _warm_up(base: TrainSettings, **changes) -> TrainSettings:
    return replace(base, warm_up=replace(base.warm_up, **changes))


# ---------------------------------------------------------------- the field's methods
def _methods(base: TrainSettings) -> Iterator[tuple[str, TrainSettings | str]]:
    """Every method as it is published, with all its defaults; then those that do not screen, screened."""
    yield from _baseline(base)
    for name in names():
        yield _allowed(base, name)
        if hasattr(_named(base, name).method, "fast"):
            yield _allowed(base, name, "fast", fast=True)
            yield _long(_allowed(base, name, "fast", fast=True))
        for other in _other_bases(_named(base, name).method):
            yield _allowed(base, name, f"on-{other}", base=other)
    for name in names():
        if not _named(base, name).method.early_drop:
            yield _screened(base, name, "jump")


def _other_bases(method: Method) -> list[str]:
    """What else a method can be built on."""
    hint = field_types.hints(type(method)).get("base")
    return [] if hint is None else [of for of in get_args(hint) if of != method.base]


def _frontier(base: TrainSettings) -> Iterator[tuple[str, TrainSettings | str]]:
    """What the time of a whole run buys: schedules of few large steps, one in more epochs; each kind of screening."""
    yield from _baseline(base)
    for name in (name for name in FRONTIER if name in names()):
        yield _allowed(base, name)
        for sizes in SCHEDULES:
            yield _scheduled(base, name, sizes)
        yield _long(_scheduled(base, name, SCHEDULES[1]))
        for easy in EASY:
            yield _screened(base, name, easy)


def _scheduled(base: TrainSettings, name: str, sizes: tuple[float, ...]) -> tuple[str, TrainSettings | str]:
    """An attack of these steps; where they are those of the method's own `fast`, that."""
    method = _named(base, name).method
    if hasattr(method, "fast") and replace(method, fast=True).schedule == sizes:
        return _allowed(base, name, "fast", fast=True)
    return _allowed(base, name, "steps" + "-".join(f"{size:g}" for size in sizes), step_sizes=sizes, early_drop=False)


def _long(run: tuple[str, TrainSettings | str]) -> tuple[str, TrainSettings | str]:
    """A cheap attack, in as many epochs as the time of PGD-AT allows."""
    name, settings = run
    return f"{name}-long", settings if isinstance(settings, str) else in_time(settings, LONG)


def _screened(base: TrainSettings, name: str, easy: str) -> tuple[str, TrainSettings | str]:
    """HAM's screening, from the first epoch on where the method is its own warm-up."""
    method = _named(base, name).method
    try:
        whole = warm_up_of(method, base.warm_up.name) == method and not base.warm_up.natural_epochs
    except ValueError:  # of the warm-up's name, which is not about this method
        whole = False
    start = {"start_epoch": 1} if whole else {}
    return _allowed(base, name, easy, early_drop=True, easy=easy, **start)


def _allowed(base: TrainSettings, name: str, word: str = "", /, **changes) -> tuple[str, TrainSettings | str]:
    """(name of the run, its settings), or in their place why the method refuses them."""
    from ..attack.pgd import PGD

    named = _named(base, name)
    called = "-".join(filter(None, (_name_of(named), word)))
    try:
        settings = _method(named, **changes)
        settings.check()
        settings.method.attack(PGD(**asdict(settings.attack)))
    except ValueError as error:
        return called, str(error)
    return called, settings


_EXPERIMENTS = {
    "baseline": _baseline,
    "ham": _paper_ham,
    "grid": _grid,
    "paper": _paper,
    "ablations": _ablations,
    "cheaper": _cheaper,
    "methods": _methods,
    "frontier": _frontier,
}
