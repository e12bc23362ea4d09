"""All numbers of a report as plain data: what tables, figures and page show, and what data.json holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..reading.evaluations import WEIGHTS, Attack
from ..reading.runs import Run
from ..strength import of_each_family
from .accuracies import accuracies, relate
from .analyses import confidence, curves, easy, masking
from .audit import audit, check_classes
from .claims import claims
from .comparable import machines_of, one_class, training_of
from .failures import attack_over_eps, attack_with_answers, confusion, examples, over_eps
from .forwards import forwards, total_forwards
from .frontier import frontier
from .groups import Group, Section
from .headline import attacks_run, headline_attack
from .over_seeds import spread
from .paired import paired
from .reproduce import commands
from .requirements import Requirement


def summarise(sections: Sequence[Section], required: Sequence[Requirement] = ()) -> dict[str, Any]:
    """{"sections": [...], "runs": [...], "styles": {title: index}} of plain values, NaN as None.

    Raises: ValueError naming `require`, for a class that no section has.
    """
    check_classes(required, [section.classes for section in sections])
    titles = [g.title for s in sections for g in s.groups if g is not s.baseline]
    styles = {title: i for i, title in enumerate(dict.fromkeys(titles))}
    return {
        "styles": styles,
        "sections": [_section(section, required) for section in sections],
        "runs": [_run(run, section, group) for section in sections for group in section.groups for run in group.runs],
    }


# ---------------------------------------------------------------- sections
def _section(section: Section, required: Sequence[Requirement]) -> dict[str, Any]:
    attack = headline_attack(section.groups, section.attack)
    groups = _groups(section)
    base = groups[0] if section.baseline else None
    ranked = [g for g in section.groups if not g.adopted]
    of_frontier = headline_attack(ranked, section.attack)
    judging = of_each_family(attacks_run(section.groups), attack)
    by_image = _by_image(section, {*judging, of_frontier}) if base else {}
    for group in groups[1:] if base else []:
        relate(group, base, attack, by_image)
    seconds = {g.title: [_seconds(run) for run in g.counted] for g in section.groups}
    return {
        "title": section.title,
        "dataset": section.dataset,
        "eps": section.eps,
        "norm": section.norm,
        "classes": list(section.classes),
        "attack": attack,
        "attack_why": _why(section.groups, attack, section.attack),
        "baseline": section.baseline.title if section.baseline else None,
        "notes": section.notes,
        "val_attack": _val_attack(section.groups),
        "groups": groups,
        "frontier": frontier(groups, of_frontier, _why(ranked, of_frontier, section.attack), by_image),
        "claims": claims(groups, judging, seconds, by_image),
        "audit": audit(groups, section.classes, attack, required),
    }


def _why(groups: Sequence[Group], attack: str | None, asked: str | None) -> str | None:
    """What makes this attack the one that robust accuracy is by."""
    if attack is None:
        return None
    if attack == asked:
        return "as asked for"
    of_all = all(attack in run for run in attacks_run(groups))
    return "the strongest attack that all these runs share" if of_all else "which most of these runs have"


def _seconds(run: Run) -> list[tuple[int, float | None, float | None]]:
    """(epoch, seconds by the clock, seconds of CPU of all threads) of each epoch; epoch 0 made its first weights."""
    before = [] if run.first_weights is None else [(0, run.before("seconds"), run.before("cpu_seconds"))]
    return [*before, *((e.epoch, e.seconds, e.cpu_seconds) for e in run.epochs)]


def _by_image(section: Section, attacks: set[str]) -> dict[tuple[str, str, str], dict]:
    """{(title, weights, attack): `paired` with the baseline}, where one run of each, or of one seed, has both."""
    base, out = section.baseline.counted, {}
    for group in section.groups[1:]:
        seeds = [[run.seed for run in runs] for runs in (group.counted, base)]
        if not (len(group.counted) == len(base) == 1 or (seeds[0] == seeds[1] and None not in seeds[0])):
            continue
        for weights, attack in ((w, a) for w in WEIGHTS for a in attacks):
            judged = ([_judged(run, weights, attack) for run in runs] for runs in (group.counted, base))
            both = [pair for pair in zip(*judged, strict=True) if None not in pair]
            if len(both) == 1 and (found := paired(*both[0])):
                out[group.title, weights, attack] = found
    return out


def _judged(run: Run, weights: str, attack: str) -> Attack | None:
    return run.evaluations[weights].attacks.get(attack) if weights in run.evaluations else None


def _val_attack(groups: Sequence[Group]) -> str | None:
    """The attack of most validation logs."""
    epochs = [e for g in groups for run in g.counted for e in run.epochs]
    logged = Counter(name for e in epochs for name in e.val or e.val_ema or () if name != "clean")
    return max(sorted(logged), key=logged.__getitem__, default=None)


# ---------------------------------------------------------------- groups
def _groups(section: Section) -> list[dict[str, Any]]:
    answers, curve = attack_with_answers(section.groups), attack_over_eps(section.groups)
    return [
        _group(group, group is section.baseline)
        | {"confusion": confusion(group, answers), "over_eps": over_eps(group, curve), "examples": examples(group)}
        for group in section.groups
    ]


def _group(group: Group, is_baseline: bool) -> dict[str, Any]:
    shown = group.evaluated(group.weights)
    return {
        "title": group.title,
        "method": group.settings.get("method.name"),
        "is_pgd_at": group.is_pgd_at,
        "mines_hard_rows": group.method is not None and group.method.mines and group.method.rows == "hard",
        "baseline": is_baseline,
        "finished": group.finished,
        "adopted": group.adopted,
        "one_class": {w: found for w in WEIGHTS if (found := _one_class(group, w))},
        "runs": [run.name for run in group.counted],
        "seeds": [run.seed for run in group.counted],
        "settings": group.settings,
        "weights": group.weights,
        "time": spread([run.seconds for run in group.counted]),
        "cpu_time": spread([run.cpu_seconds for run in group.counted]),
        "own_time": spread([run.own_seconds for run in group.counted]),  # without that of its first weights
        "own_cpu_time": spread([run.own_cpu_seconds for run in group.counted]),
        "training": training_of(group.settings, group.counted),
        "relative_time": 1.0 if is_baseline else None,
        "forwards": spread([forwards(run) for run in group.counted]),  # of an update
        "all_forwards": spread([total_forwards(run) for run in group.counted]),
        "accuracy": {w: accuracies(group, w) for w in WEIGHTS if group.evaluated(w)},
        "differences": None,
        "curves": curves(group.counted),
        "confidence": confidence([e.confidence for e in shown if e.confidence]),
        "easy": easy([e.easy for e in shown if e.easy]),
        "masking": masking(group),
    }


def _one_class(group: Group, weights: str) -> dict[str, str]:
    """{run: the class that it answers for nearly all images}."""
    found = {run.name: one_class(run.evaluations[weights]) for run in group.counted if weights in run.evaluations}
    return {run: answer for run, answer in found.items() if answer is not None}


# ---------------------------------------------------------------- runs
def _run(run: Run, section: Section, group: Group) -> dict[str, Any]:
    versions, shown = run.environment.get("versions"), run.evaluations.get(group.weights)
    return {
        "name": run.name,
        "folder": str(run.folder),
        "section": section.title,
        "group": group.title,
        "seed": run.seed,
        "state": run.state,
        "message": run.status.get("message"),
        "epoch": run.epochs[-1].epoch if run.epochs else None,
        "epochs": run.planned_epochs,
        "seconds": run.seconds,
        "weights": list(run.evaluations),
        "shown": None if shown is None else {
            "weights": shown.weights, "epoch": shown.epoch, "checkpoint_sha256": shown.checkpoint_sha256,
            "dataset": run.dataset, "part": shown.part, "images": shown.images, "precision": shown.precision,
            "attacks": {name: attack.n for name, attack in shown.attacks.items()},
            "images_sha256": sorted({a.images_sha256 for a in shown.attacks.values()} - {None}),
        },
        "machine": "; then ".join(machines_of(run)),
        "versions": {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
        "commit": run.environment.get("commit"),
        "started": run.sessions[0].get("started") if run.sessions else None,
        "ended": run.sessions[-1].get("ended") if run.sessions else None,
        "sessions": len(run.sessions),
        "commands": commands(run, shown),
        "missing": [{"what": what, "command": command} for what, command in run.missing],
        "notes": run.notes,
        "left_out": run.left_out,
    }  # fmt: skip
