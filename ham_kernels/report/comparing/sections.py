"""Runs sorted into sections (same images, budget, classes) and groups (same settings but for the seed)."""

from __future__ import annotations

from collections.abc import Sequence

from ..reading.runs import Run
from ..strength import CLEAN
from ..text_format import attack_title
from .comparable import limits
from .groups import Group, Section, canonical, choose_weights, settings_of
from .headline import attacks_run
from .images import apart
from .titles import number_repeats, set_titles


def sections(runs: Sequence[Run], baseline: str | None = None, attack: str | None = None) -> list[Section]:
    """All runs in sections and titled groups, the baseline first.

    `attack`: what robust accuracy is by, in place of the strongest. Raises: ValueError naming `baseline`, `attack`.
    """
    out = [_section(key, members) for key, members in _by_data(runs)]
    number_repeats(out)  # as with folders of the same name that hold other images
    titles = [group.title for section in out for group in section.groups]
    if baseline is not None and baseline not in titles:
        raise ValueError(f"baseline: got {baseline!r}; it must be the title of a group: {', '.join(titles)}")
    judged = {name for section in out for run in attacks_run(section.groups) for name in run} - {CLEAN}
    if attack is not None and attack not in judged:
        raise ValueError(f"attack: got {attack!r}; these runs were judged by {', '.join(sorted(judged)) or 'none'}")
    for section in out:
        _choose_baseline(section, baseline)
        _choose_attack(section, attack)
        section.notes += [*limits(section), *apart(section, out)]
    return out


def _by_data(runs: Sequence[Run]) -> list[tuple[tuple, list[Run]]]:
    """Runs of the same images, budget and classes. One not evaluated, of unknown classes, joins the first that fits."""
    keys = [_data_of(run) for run in runs]
    found: list[tuple[tuple, list[int]]] = []
    for i in sorted(range(len(runs)), key=lambda i: keys[i][3] is None):
        fits = (members for key, members in found if _fits(keys[i], key, runs[i], [runs[j] for j in members]))
        members = next(fits, None)
        if members is None:
            found.append(((*keys[i][:3], keys[i][3] or ()), members := []))
        members.append(i)
    return [(key, [runs[i] for i in sorted(members)]) for key, members in found]


def _fits(key: tuple, of_section: tuple, run: Run, members: Sequence[Run]) -> bool:
    """By digests of the images, where both have one; else by the data set's name and the numbers of images."""
    counts = [r.data["counts"] for r in (run, *members) if "counts" in r.data]
    if key[1:3] != of_section[1:3] or key[3] not in (None, of_section[3]) or counts[1:] != counts[:-1]:
        return False
    shared = [(digest, m.images[what]) for what, digest in run.images.items() for m in members if what in m.images]
    return all(a == b for a, b in shared) if shared else key[0] == of_section[0]


def _data_of(run: Run) -> tuple:
    """(data set, norm, eps, classes) of the evaluation shown. Evaluations of other budgets or classes are left out."""
    weights = choose_weights([run])
    if weights is None:
        return run.dataset, run.norm, run.eps, None
    shown = run.evaluations[weights]
    judged = (run.dataset, shown.norm, shown.eps, shown.classes)
    for other in [w for w, e in run.evaluations.items() if (e.norm, e.eps, e.classes) != judged[1:]]:
        run.notes.append(f"evaluation/{other}.json: left out, its budget or classes are not those of {weights}.json")
        del run.evaluations[other]
    return judged


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
        counted = {run.name for run in group.counted}
        again = [run.name for run in group.runs if run.finished == group.finished and run.name not in counted]
        if again:
            section.notes.append(f"Not in the means, since another run of the same seed is: {', '.join(again)}.")
    set_titles(section.groups)
    return section


def _choose_baseline(section: Section, title: str | None) -> None:
    """The group of this title, or the first that is PGD-AT; it becomes the first of its section."""
    if title is not None:
        found, none = [g for g in section.groups if g.title == title], f"No group here is called “{title}”"
    else:
        found, none = [g for g in section.groups if g.is_pgd_at], "No PGD-AT run among these"
    if not found:
        section.notes.append(f"{none}: nothing is shown relative to a baseline.")
        return
    if len(found) > 1:
        section.notes.append(f"Several groups are PGD-AT; the baseline is the first, “{found[0].title}”.")
    section.baseline = found[0]
    section.groups = [found[0], *(g for g in section.groups if g is not found[0])]


def _choose_attack(section: Section, name: str | None) -> None:
    if name is None:
        return
    section.attack = name
    have = [name in run for run in attacks_run(section.groups)]
    if not any(have):
        section.notes.append(f"No run here was judged by {attack_title(name)}: shown is the strongest attack.")
    elif not all(have):
        section.notes.append(f"Not all runs here were judged by {attack_title(name)}, which was asked for.")
