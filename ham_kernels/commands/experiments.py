"""The experiments of `ham sweep`: which runs each is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..methods.settings import with_name
from ..runs.settings import TrainSettings

GRID_SCREEN_STEPS = (1, 2, 3, 4, 5)
GRID_LAM = (0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. The name is its folder, the same in every experiment that contains it."""

    name: str
    settings: TrainSettings


def cells(experiment: str, base: TrainSettings, seeds: tuple[int, ...]) -> list[Cell]:
    """The runs of an experiment, seed by seed, so that a sweep that is stopped has whole comparisons."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: got {seeds}; give at least one, and each once")
    found: dict[str, Cell] = {}
    for seed in seeds:
        seeded = replace(base, run=replace(base.run, seed=seed, label=None))
        for name, settings in _EXPERIMENTS[experiment](seeded):
            name = f"{name}-seed{seed}"
            found.setdefault(name, Cell(name, settings))
    return list(found.values())


def _method(base: TrainSettings, **changes) -> TrainSettings:
    return replace(base, method=replace(base.method, **changes))


def _named(base: TrainSettings, name: str) -> TrainSettings:
    return replace(base, method=with_name(base.method, name, base.optim.epochs))


def _ham(base: TrainSettings, **changes) -> tuple[str, TrainSettings]:
    settings = _method(_named(base, "ham"), **changes)
    m = settings.method
    return f"ham-M{m.screen_steps}-lam{m.lam:g}", settings


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


_EXPERIMENTS = {
    "baseline": _baseline,
    "ham": _paper_ham,
    "grid": _grid,
    "paper": _paper,
    "ablations": _ablations,
    "cheaper": _cheaper,
}
