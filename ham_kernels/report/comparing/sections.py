"""Runs sorted into sections (same data, budget, classes) and groups (same settings but for the seed)."""

from __future__ import annotations

from collections.abc import Sequence

from ..reading.runs import Run
from .comparable import limits
from .groups import Group, Section, choose_baseline, choose_weights, settings_of
from .titles import canonical, number_repeats, set_titles


def sections(runs: Sequence[Run], baseline: str | None = None) -> list[Section]:
    """All runs in sections and titled groups, the baseline first. Raises: ValueError naming `baseline`."""
    out = [_section(key, members) for key, members in _by_data(runs).items()]
    number_repeats(out)  # as with subsets of the same data set that differ in their classes
    titles = [group.title for section in out for group in section.groups]
    if baseline is not None and baseline not in titles:
        raise ValueError(f"baseline: got {baseline!r}; it must be the title of a group: {', '.join(titles)}")
    for section in out:
        choose_baseline(section, baseline)
        section.notes += limits(section)
    return out


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
