"""What groups must share before they are compared: images judged, and what decides training time beside the method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from ...common.one_class import answers_one_class
from ..reading.evaluations import WEIGHTS, Evaluation
from ..reading.runs import Run
from ..strength import CLEAN
from ..text_format import attack_title
from .groups import Group, Section, passes_of
from .images import FEWEST, smallest_class

Training = dict[str, list[str]]  # see `training_of`

# Times of other work, or of another machine, are not ranked.
WORK = {
    "epochs": "optim.epochs", "model": "model.name", "training images": "data.train_images",
    "image size": "data.size", "batch size": "data.batch_size",
}  # fmt: skip
PLACE = ("device", "machine")
# The same work done faster is ranked, but what HAM gains is not told from what these gain.
MEANS = {
    "attack steps": "attack.steps", "precision": "run.precision",
    **{name: f"engine.{name}" for name in ("channels_last", "compile", "cuda_graphs", "winograd", "keep_memory")},
}  # fmt: skip
UNKNOWN = "unknown machine"
UNLIKE = 1.5  # times the forwards of another: a training of other steps or epochs, not of another seed
ALL = (*WORK, *PLACE, *MEANS)
_SWITCH = {None: "off", False: "off", True: "on"}


def training_of(settings: Mapping[str, Any], runs: Sequence[Run]) -> Training:
    """{what: its values, one for most} of a group's runs, in words: WORK, PLACE and MEANS."""
    out = {what: [_value(what, settings.get(key))] for what, key in (WORK | MEANS).items()}
    out["epochs"] = [_value("epochs", passes_of(settings))]
    out["device"] = [str(settings.get("run.device"))]
    out["machine"] = sorted({_as_fast(machine) for run in runs for machine in machines_of(run)})
    return out


def threads_of(training: Training) -> int | None:
    """Threads that torch used, where all was trained on the CPU of one machine that tells them."""
    found = [re.search(r"torch uses (\d+) threads", machine) for machine in training["machine"]]
    return int(found[0][1]) if training["device"] == ["cpu"] and len(found) == 1 and found[0] else None


def unlike(trainings: Iterable[Training], names: Iterable[str] = ALL) -> dict[str, list[str]]:
    """{what: its values} where they are more than one."""
    trainings = list(trainings)
    found = {name: sorted({value for t in trainings for value in t[name]}, key=_as_number) for name in names}
    return {name: values for name, values in found.items() if len(values) > 1}


def same_work(trainings: Iterable[Training]) -> bool:
    """Whether the fastest of these may be called so."""
    return not unlike(trainings, (*WORK, *PLACE))


def judged_unlike(accuracies: Iterable[Mapping[str, Any]], base: str = "the baseline") -> str:
    """What keeps accuracies under one attack from being compared with the last of them: other images, or judged
    otherwise; else empty. `base`: what the last is called."""
    accuracies = list(accuracies)
    if len({n for accuracy in accuracies for n in accuracy["images"]}) > 1:
        ours, theirs = (", ".join("unknown" if n is None else str(n) for n in accuracies[i]["images"]) for i in (0, -1))
        return f"on {ours} images against {theirs} of {base}"
    if len({digest for accuracy in accuracies for digest in accuracy["digests"]}) > 1:
        return f"on other images than {base}"
    for what in ("part", "step size", "precision"):
        values = sorted({value for accuracy in accuracies for value in accuracy["how"][what]})
        if len(values) > 1:
            return f"judged unlike in {what} ({' and '.join(values)})"
    return ""


def _value(what: str, value: Any) -> str:
    if MEANS.get(what, "").startswith("engine.") and isinstance(value, (bool, str, type(None))):
        return str(_SWITCH.get(value, value))
    if value is None:
        return {"training images": "all", "image size": "as it is"}.get(what, "unknown")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _as_number(text: str) -> tuple[float, str]:
    return (float(text) if text.replace(".", "", 1).isdecimal() else float("inf")), text


# ---------------------------------------------------------------- in words
def limits(section: Section) -> list[str]:
    """What a reader must know before comparing the groups of a section."""
    counted = [run for g in section.groups for run in g.counted]
    shown = [(g, evaluation) for g in section.groups for evaluation in g.evaluated(g.weights)]
    trainings = [training_of(g.settings, g.counted) for g in section.groups if g.settings and not g.adopted]
    return [
        *_limits_of_models(section), *_limits_of_evaluations(shown), *_few_images(section), *_searches(shown),
        *_limits_of_trainings(trainings), *_limits_of_runs(counted), *_limits_of_times(section),
    ]  # fmt: skip


def one_class(evaluation: Evaluation) -> str | None:
    """The class that a model answers for nearly all images, by name."""
    clean = evaluation.attacks.get("clean")
    if clean is None:
        return None
    answer = answers_one_class(
        [share.value for share in clean.per_class], list(map(int, (clean.answers or "").split()))
    )
    return None if answer is None else evaluation.classes[answer]


def _limits_of_models(section: Section) -> list[str]:
    """Models that answer one class, and attacks that had no gradient."""
    judged = [(run, e) for g in section.groups for run in g.counted for e in run.evaluations.values()]
    notes = [
        f"{run.name}, {WEIGHTS[e.weights]}: answers “{answer}” for nearly all images; neither ranked nor judged."
        for run, e in judged
        if (answer := one_class(e)) is not None
    ]
    return notes + [
        f"{run.name}, {WEIGHTS[e.weights]}, {attack_title(name)}: gradient missing for {attack.no_gradient} of "
        f"{'an unknown number of' if attack.n is None else attack.n} images, which were not attacked."
        for run, e in judged
        for name, attack in e.attacks.items()
        if attack.no_gradient
    ]


def _limits_of_evaluations(judged: Sequence[tuple[Group, Evaluation]]) -> list[str]:
    shown, of_runs = [e for _, e in judged], [e for g, e in judged if not g.adopted]
    told = {
        "test images": {" ".join(str(v) for v in (e.part, e.images) if v is not None) for e in of_runs},
        "the attack's step size": {str(e.step_size) for e in shown},
        "the precision of the evaluation": {str(e.precision) for e in shown},
        "weights": {WEIGHTS[e.weights] for e in of_runs},
    }
    apart = {what: "; ".join(sorted(values)) for what, values in told.items() if len(values) > 1}
    for attack in sorted({name for e in shown for name in e.attacks}):
        images = {str(e.attacks[attack].n) for e in shown if attack in e.attacks}
        if len(images) > 1:
            apart[f"images under {attack_title(attack)}"] = ", ".join(sorted(images))
    return [f"Not alike in {what}: {values}. Compare with care." for what, values in apart.items()]


def _few_images(section: Section) -> list[str]:
    """Where a class is of so few images that its accuracy says little, and the worst class least."""
    counts = [
        smallest_class(run, e, attack)
        for group in section.groups
        for run in group.counted
        if (e := run.evaluations.get(group.weights))
        for attack in e.attacks.values()
    ]
    fewest = min((count for count in counts if count is not None), default=FEWEST)
    if fewest >= FEWEST:
        return []
    return [
        f"The smallest class judged has {fewest} image{'s' * (fewest > 1)}, of which one is {100 / fewest:.1f} points: "
        "worst classes are low by chance."
    ]


def _searches(judged: Sequence[tuple[Group, Evaluation]]) -> list[str]:
    """Attacks that looked for examples on another form of the model, and of which groups where not of all."""
    notes = []
    for name in sorted({name for _, e in judged for name in e.attacks} - {CLEAN}):
        how = [(group.title, e.attacks[name].searched_fast) for group, e in judged if name in e.attacks]
        fast = list(dict.fromkeys(title for title, searched in how if searched))
        if fast:
            of = "" if all(searched for _, searched in how) else f" of {'; '.join(fast)}"
            notes.append(
                f"{attack_title(name)}{of} looked for examples on a rounded, compiled form of the model; the model "
                "itself judged each."
            )
    return notes


def _limits_of_trainings(trainings: Sequence[Training]) -> list[str]:
    return [
        f"Trained unlike in {what}: {'; '.join(values)}. Claims on time are judged between equals only."
        for what, values in unlike(trainings, [name for name in ALL if name != "machine"]).items()
    ]


def _limits_of_runs(runs: Sequence[Run]) -> list[str]:
    notes = []
    commits = sorted({str(run.environment["commit"]) for run in runs if run.environment.get("commit")})
    if len(commits) > 1:
        notes.append(f"Not of one commit: {', '.join(commits)} (-dirty: with changes that no commit holds).")
    machines = {_as_fast(machine) for run in runs if not run.adopted for machine in machines_of(run)}
    if len(machines) > 1:
        notes.append(f"Trained on different machines, so times do not compare: {'; '.join(sorted(machines))}.")
    return notes


def _limits_of_times(section: Section) -> list[str]:
    """Which runs share the time of a warm-up. Others are timed whole, so that both are times of all epochs."""
    notes, everyone = [], {g.title for g in section.groups if any(run.epochs for run in g.counted)}
    taught = [g.title for g in section.groups if g.method is not None and g.method.needs_teacher]
    if taught:
        notes.append(f"Forwards do not count those of a teacher, one in each step of {'; '.join(taught)}.")
    for group in section.groups:
        if any(run.first_weights is not None for run in group.counted):
            forwards = [run.before("forwards") for run in group.counted if run.before("forwards")]
            if forwards and max(forwards) > UNLIKE * min(forwards):
                notes.append(f"{group.title}: its runs began with trainings of unlike cost, and are taken for alike.")
            known = all(run.before("seconds") is not None for run in group.counted)
            told = "is in the times shown" if known else "is not known, so that it has no time to compare"
            notes.append(f"{group.title} began with weights of another training; what those cost {told}.")
    for titles, shared in shared_epochs(section).items():
        once = f"Epochs 1 to {shared} were trained once per seed, for"
        if titles == everyone:
            notes.append(f"{once} all methods; their time counts in each. So times differ by the later epochs alone.")
        else:
            notes.append(
                f"{once} {'; '.join(sorted(titles))}; their time counts in each. The times of other methods are of "
                "epochs that they trained themselves, at another time."
            )
    return notes


def shared_epochs(section: Section) -> dict[frozenset[str], int]:
    """{titles: how many first epochs, but not all, runs of each seed have in common, to the digit of their times}."""
    found: dict[frozenset[str], list[int]] = {}
    seeds: dict[int | None, dict[tuple, list[tuple[str, list[tuple]]]]] = {}
    for group in section.groups:
        for run in group.counted:
            log = [(e.epoch, e.loss, e.seconds) for e in run.epochs]
            if log:
                seeds.setdefault(run.seed, {}).setdefault(log[0], []).append((group.title, log))
    for members in (members for of_seed in seeds.values() for members in of_seed.values()):
        logs = [log for _, log in members]
        count = len(list(takewhile(lambda epoch: len(set(epoch)) == 1, zip(*logs, strict=False))))
        if len(members) > 1 and count < max(map(len, logs)):
            found.setdefault(frozenset(title for title, _ in members), []).append(count)
    return {titles: min(counts) for titles, counts in found.items()}


def machines_of(run: Run) -> list[str]:
    """CPU, cores, GPU of each machine that a run was trained on, in order."""
    return list(dict.fromkeys(map(_machine, run.machines))) or [UNKNOWN]


def _as_fast(machine: str) -> str:
    """The same text for machines that are as fast: one thread has no use for other cores that a process may take."""
    return re.sub(r"cores: \d+, (?=torch uses 1 threads)", "", machine)


def _machine(machine: Mapping[str, Any]) -> str:
    cores = f", cores: {machine['cores']}" if machine.get("cores") else ""
    gpu = machine.get("gpu")
    return f"{machine.get('cpu') or 'unknown CPU'}{cores}, GPU: {gpu or 'none'}"
