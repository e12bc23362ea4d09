"""Runs sorted into sections (same data, budget, classes) and groups (same settings but for the seed)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .alike import limits
from .evaluations import WEIGHTS, Evaluation
from .runs import Run
from .titles import canonical, number_repeats, set_titles

# What changes neither the trained weights nor how long training takes, or is in the section's title.
NOT_SETTINGS = {
    "run.seed", "run.label", "run.checkpoint_minutes", "data.path", "data.dataset", "data.root", "data.download",
}  # fmt: skip
_MINING = (
    "screen_steps", "start_epoch", "lam", "reweight", "early_drop", "rows", "freeze_bn", "bn_rows", "screen", "group",
    "group_updates", "round_to",
)  # fmt: skip


@dataclass
class Group:
    """Runs with the same settings. `counted` are those that means are taken over: the finished ones, if any."""

    runs: list[Run]
    settings: dict[str, Any]
    title: str = ""
    weights: str | None = None  # the evaluation shown, see `choose_weights`

    @property
    def finished(self) -> bool:
        return any(run.finished for run in self.runs)

    @property
    def counted(self) -> list[Run]:
        return [run for run in self.runs if run.finished] or self.runs

    @property
    def method(self) -> str | None:
        return self.settings.get("method.name")

    def evaluated(self, weights: str | None) -> list[Evaluation]:
        return [run.evaluations[weights] for run in self.counted if weights in run.evaluations]


@dataclass
class Section:
    """What may stand in one figure: the same data set, budget and classes."""

    dataset: str | None
    norm: str | None
    eps: float | None
    classes: tuple[str, ...]  # () where no run is evaluated
    groups: list[Group] = field(default_factory=list)
    baseline: Group | None = None
    notes: list[str] = field(default_factory=list)
    title: str = ""

    def __post_init__(self):
        norms = {"linf": "L∞", "l2": "L2"}
        eps = "ε unknown" if self.eps is None else f"ε {self.eps:.4g}"
        norm = f" ({norms.get(self.norm, self.norm)})" if self.norm else ""
        self.title = f"{self.dataset or 'unknown data'}, {eps}{norm}"


def sections(runs: Sequence[Run], baseline: str | None = None) -> list[Section]:
    """All runs in sections and titled groups, the baseline first. Raises: ValueError naming `baseline`."""
    out = [_section(key, members) for key, members in _by_data(runs).items()]
    number_repeats(out)  # as with subsets of the same data set that differ in their classes
    titles = [group.title for section in out for group in section.groups]
    if baseline is not None and baseline not in titles:
        raise ValueError(f"baseline: got {baseline!r}; it must be the title of a group: {', '.join(titles)}")
    for section in out:
        _choose_baseline(section, baseline)
        section.notes += limits(section)
    return out


def choose_weights(runs: Sequence[Run]) -> str | None:
    """The weight average where it is evaluated, else the last weights, else the best."""
    return next((w for w in WEIGHTS if any(w in run.evaluations for run in runs)), None)


# ---------------------------------------------------------------- sections
def _by_data(runs: Sequence[Run]) -> dict[tuple, list[Run]]:
    keyed: dict[tuple, list[Run]] = {}
    waiting = []
    for run in runs:
        weights = choose_weights([run])
        if weights is None:
            waiting.append(run)
            continue
        shown = run.evaluations[weights]
        key = (run.dataset, shown.norm, shown.eps, shown.classes)
        for other in [w for w, e in run.evaluations.items() if (e.norm, e.eps, e.classes) != key[1:]]:
            run.notes.append(
                f"evaluation/{other}.json: left out, its budget or classes are not those of {weights}.json"
            )
            del run.evaluations[other]
        keyed.setdefault(key, []).append(run)
    for run in waiting:  # their classes are not known
        known = (run.dataset, run.norm, run.eps)
        key = next((k for k in keyed if k[:3] == known), (*known, ()))
        keyed.setdefault(key, []).append(run)
    order = {id(run): i for i, run in enumerate(runs)}
    return {key: sorted(members, key=lambda run: order[id(run)]) for key, members in keyed.items()}


def _section(key: tuple, runs: list[Run]) -> Section:
    groups: dict[tuple, Group] = {}
    for run in runs:
        settings = settings_of(run)
        signature = tuple(sorted((k, canonical(v)) for k, v in settings.items())) or (str(run.folder),)
        groups.setdefault(signature, Group([], settings)).runs.append(run)
    section = Section(*key, groups=list(groups.values()))
    for group in section.groups:
        group.runs.sort(key=lambda run: (run.seed is None, run.seed or 0))  # so that seeds pair up between groups
        group.weights = choose_weights(group.counted)
        unfinished = [run.name for run in group.runs if not run.finished]
        if group.finished and unfinished:
            section.notes.append(f"Not in the means, since not finished: {', '.join(unfinished)}.")
    set_titles(section.groups)
    return section


def settings_of(run: Run) -> dict[str, Any]:
    """{"section.key": value} of all that makes two runs different methods; what has no effect is left out."""
    flat = {
        f"{section}.{key}" if key else section: value
        for section, values in run.config.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
    flat = {key: value for key, value in flat.items() if key not in NOT_SETTINGS}
    if flat.get("method.group") == 1:
        flat.pop("method.group_updates", None)
    if run.method == "pgd_at":
        cheap = flat.get("warm_up.name", "pgd_at") != "pgd_at" or flat.get("warm_up.natural_epochs")
        flat = {
            key: value
            for key, value in flat.items()
            if key.removeprefix("method.") not in _MINING or (cheap and key == "method.start_epoch")
        }
    elif flat.get("method.reweight") is False:
        flat.pop("method.lam", None)
    return flat


# ---------------------------------------------------------------- the baseline
def _choose_baseline(section: Section, title: str | None) -> None:
    if title is not None:
        found = [g for g in section.groups if g.title == title]
        if not found:
            section.notes.append(f"No group here is called “{title}”: nothing is shown relative to a baseline.")
    else:
        found = [g for g in section.groups if g.method == "pgd_at"]
        if len(found) > 1:
            section.notes.append(f"Several groups are PGD-AT; the baseline is the first, “{found[0].title}”.")
        elif not found:
            section.notes.append("No PGD-AT run among these: nothing is shown relative to a baseline.")
    if found:
        section.baseline = found[0]
        section.groups = [found[0], *(g for g in section.groups if g is not found[0])]
