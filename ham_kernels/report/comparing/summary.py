"""All numbers of a report as plain data: what tables, figures and page show, and what data.json holds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from ..reading.evaluations import WEIGHTS, Attack, Easy
from ..reading.runs import Epoch, Run
from ..strength import of_each_family
from .claims import claims, same_seeds
from .comparable import machines_of, one_class, training_of
from .forwards import forwards
from .frontier import FEWEST_CLASSES, frontier
from .groups import Group, Section
from .headline import attacks_run, headline_attack
from .images import smallest_class
from .over_seeds import difference, spread
from .paired import paired


def summarise(sections: Sequence[Section]) -> dict[str, Any]:
    """{"sections": [...], "runs": [...], "styles": {title: index}} of plain values, NaN as None."""
    titles = [g.title for s in sections for g in s.groups if g is not s.baseline]
    styles = {title: i for i, title in enumerate(dict.fromkeys(titles))}
    return {
        "styles": styles,
        "sections": [_section(section) for section in sections],
        "runs": [_run(run, section, group) for section in sections for group in section.groups for run in group.runs],
    }


# ---------------------------------------------------------------- sections
def _section(section: Section) -> dict[str, Any]:
    attack = headline_attack(section.groups)
    groups = [_group(group, group is section.baseline) for group in section.groups]
    base = groups[0] if section.baseline else None
    judging = of_each_family(attacks_run(section.groups), attack)
    pairs = _pairs(section, set(judging)) if base else {}
    for group in groups[1:] if base else []:
        _relate(group, base, attack, pairs)
    seconds = {g.title: [_seconds(run) for run in g.counted] for g in section.groups}
    return {
        "title": section.title,
        "dataset": section.dataset,
        "eps": section.eps,
        "norm": section.norm,
        "classes": list(section.classes),
        "attack": attack,
        "attack_of_all": attack is not None and all(attack in run for run in attacks_run(section.groups)),
        "baseline": section.baseline.title if section.baseline else None,
        "notes": section.notes,
        "val_attack": _val_attack(section.groups),
        "groups": groups,
        "frontier": frontier(groups, headline_attack([g for g in section.groups if not g.adopted])),
        "claims": claims(groups, judging, seconds, pairs),
    }


def _seconds(run: Run) -> list[tuple[int, float | None, float | None]]:
    """(epoch, seconds by the clock, seconds of CPU of all threads) of each epoch."""
    return [(e.epoch, e.seconds, e.cpu_seconds) for e in run.epochs]


def _pairs(section: Section, attacks: set[str]) -> dict[tuple[str, str, str], dict]:
    """{(title, weights, attack): `paired` with the baseline}, where both are one run."""
    base, out = section.baseline.counted, {}
    for group in section.groups[1:]:
        if len(group.counted) != 1 or len(base) != 1:
            continue
        both = group.counted[0].evaluations.keys() & base[0].evaluations.keys()
        for weights, attack in ((w, a) for w in both for a in attacks):
            judged = [run.evaluations[weights].attacks.get(attack) for run in (group.counted[0], base[0])]
            if None not in judged and (found := paired(*judged)):
                out[group.title, weights, attack] = found
    return out


def _val_attack(groups: Sequence[Group]) -> str | None:
    """The attack of most validation logs."""
    epochs = [e for g in groups for run in g.counted for e in run.epochs]
    logged = Counter(name for e in epochs for name in e.val or e.val_ema or () if name != "clean")
    return max(sorted(logged), key=logged.__getitem__, default=None)


# ---------------------------------------------------------------- groups
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
        "training": training_of(group.settings, group.counted),
        "relative_time": 1.0 if is_baseline else None,
        "forwards": spread([forwards(run) for run in group.counted]),
        "accuracy": {w: _accuracies(group, w) for w in WEIGHTS if group.evaluated(w)},
        "differences": None,
        "curves": _curves(group.counted),
        "confidence": _confidence([e.confidence for e in shown if e.confidence]),
        "easy": _easy([e.easy for e in shown if e.easy]),
        "masking": _masking(group),
    }


def _one_class(group: Group, weights: str) -> dict[str, str]:
    """{run: the class that it answers for nearly all images}."""
    found = {run.name: one_class(run.evaluations[weights]) for run in group.counted if weights in run.evaluations}
    return {run: answer for run, answer in found.items() if answer is not None}


def _accuracies(group: Group, weights: str) -> dict[str, Any]:
    """{attack: spreads, and on which images and how they were found}."""
    found = [run.evaluations.get(weights) for run in group.counted]
    names = dict.fromkeys(name for e in found if e for name in e.attacks)
    out = {name: _accuracy([e and e.attacks.get(name) for e in found]) for name in names}
    for name, accuracy in out.items():
        judged = [
            (run, e, e.attacks[name]) for run, e in zip(group.counted, found, strict=True) if e and name in e.attacks
        ]
        told = {"part": lambda e: e.part, "step size": lambda e: e.step_size, "precision": lambda e: e.precision}
        accuracy["how"] = {what: _known(map(of, (e for _, e, _ in judged))) for what, of in told.items()}
        smallest = [smallest_class(*one) for one in judged]
        accuracy["smallest_class"] = None if None in smallest else min(smallest)
        accuracy["no_gradient"] = {run.name: a.no_gradient for run, _, a in judged if a.no_gradient}
    return out


def _known(values: Iterable[Any]) -> list[str]:
    return sorted({str(value) for value in values if value is not None})


def _accuracy(judged: Sequence[Attack | None]) -> dict[str, Any]:
    """Spreads under one attack. A seed without it counts as None, so that values stay in the order of seeds."""
    known = [a for a in judged if a]
    classes = zip(*(a.per_class if a else [None] * len(known[0].per_class) for a in judged), strict=True)
    return {
        "average": spread([a and a.accuracy for a in judged]),
        "worst": spread([a and a.worst_class for a in judged]),
        "worst_three": spread([a and _worst_three(a) for a in judged]),
        "std": spread([a and a.std for a in judged]),
        "nstd": spread([a and a.nstd for a in judged]),
        "per_class": [spread(values) for values in classes],
        "images": sorted({a.n for a in known}, key=str),
        "digests": sorted({a.images_sha256 for a in known} - {None}),
    }


def _worst_three(attack: Attack) -> float | None:
    """Mean of the three lowest classes; None of few."""
    known = sorted(c.value for c in attack.per_class if c.value is not None)
    return statistics.fmean(known[:3]) if len(known) >= FEWEST_CLASSES else None


def _relate(group: dict, base: dict, attack: str | None, pairs: dict[tuple, dict]) -> None:
    """What a group gains and loses against the baseline, for the same weights."""
    if group["time"]["mean"] is not None and base["time"]["mean"] and group["finished"] and base["finished"]:
        group["relative_time"] = group["time"]["mean"] / base["time"]["mean"]
    ours = group["accuracy"].get(group["weights"], {}).get(attack)
    theirs = base["accuracy"].get(group["weights"], {}).get(attack)
    if ours and theirs:
        by_seed = same_seeds(group, base)
        group["differences"] = [
            difference(a, b, by_seed) for a, b in zip(ours["per_class"], theirs["per_class"], strict=True)
        ]
        if found := pairs.get((group["title"], group["weights"], attack)):
            for gain, ends in zip(group["differences"], found["per_class"], strict=True):
                gain |= dict(zip(("low", "high"), ends or (None, None), strict=True))


def _curves(runs: Sequence[Run]) -> dict[str, Any]:
    """{"epoch": [...], name: {"mean", "low", "high"}}; names: loss, hard_fraction, seconds, val.ATTACK.MEASURE..."""
    logs = [{e.epoch: e for e in run.epochs} for run in runs]
    epochs = sorted({number for log in logs for number in log})
    values = [{number: _logged(e) for number, e in log.items()} for log in logs]
    logged = [next(log[number] for log in logs if number in log) for number in epochs]
    out: dict[str, Any] = {"epoch": epochs, "phase": [e.phase for e in logged], "mines": [e.mines for e in logged]}
    for name in dict.fromkeys(name for log in values for logged in log.values() for name in logged):
        points = [spread([log.get(number, {}).get(name) for log in values]) for number in epochs]
        if any(point["mean"] is not None for point in points):
            out[name] = {key: [point[key] for point in points] for key in ("mean", "low", "high")}
    return out


def _logged(epoch: Epoch) -> dict[str, float | None]:
    """By the names of the curves."""
    out = {"loss": epoch.loss, "hard_fraction": epoch.hard_fraction, "seconds": epoch.seconds}
    for val in ("val", "val_ema"):
        for attack, found in (getattr(epoch, val) or {}).items():
            out |= {f"{val}.{attack}.{measure}": value for measure, value in asdict(found).items()}
    return out


def _confidence(parts: Sequence) -> dict[str, Any] | None:
    parts = [part for part in parts if part.edges == parts[0].edges]
    if not parts:
        return None
    first = parts[0]
    return {
        "edges": list(first.edges),
        "shares": [statistics.fmean(column) for column in zip(*(part.shares for part in parts), strict=True)],
        "threshold": first.threshold,
        "steps": first.steps,
        "part": first.part,
        "images": min(part.images for part in parts),
        "overconfident": [spread(column) for column in zip(*(part.overconfident for part in parts), strict=True)],
        "overconfident_all": spread([part.overconfident_all for part in parts]),
    }


def _easy(parts: Sequence[Easy]) -> dict[str, Any] | None:
    by_m: dict[int, list] = {}
    for entry in (entry for part in parts for entry in part.by_m):
        by_m.setdefault(entry.m, []).append(entry)
    if not by_m:
        return None
    return {
        "steps": parts[0].steps,
        "by_m": [
            {
                "m": m,
                "easy_fraction": spread([entry.easy_fraction for entry in entries]),
                "stay_share": spread([entry.stay_share for entry in entries]),
            }
            for m, entries in sorted(by_m.items())
        ],
    }


def _masking(group: Group) -> list[dict[str, Any]]:
    """One entry per check: for how many runs it was run, in which it was suspicious, and why; or why it was not run."""
    found: dict[str, dict[str, Any]] = {}
    for run in group.counted:
        evaluation = run.evaluations.get(group.weights)
        for check in evaluation.masking.checks if evaluation and evaluation.masking else ():
            title = check.title or check.name
            entry = found.setdefault(title, {"check": title, "runs": 0, "suspicious": [], "why": [], "not_run": []})
            if not check.values:
                entry["not_run"].append(check.why or "")
                continue
            entry["runs"] += 1
            if check.suspicious:
                entry["suspicious"].append(run.name)
                entry["why"].append(check.why or "")
    return list(found.values())


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
        },
        "machine": "; then ".join(machines_of(run)),
        "versions": {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
        "commit": run.environment.get("commit"),
        "started": run.sessions[0].get("started") if run.sessions else None,
        "ended": run.sessions[-1].get("ended") if run.sessions else None,
        "sessions": len(run.sessions),
        "missing": [{"what": what, "command": command} for what, command in run.missing],
        "notes": run.notes,
        "left_out": run.left_out,
    }  # fmt: skip
