"""Runs sorted into sections (same data, budget, classes) and groups (same settings but for the seed), with titles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .evaluations import WEIGHTS, Evaluation
from .runs import Run
from .wording import attack_title

# What changes neither the trained weights nor how long training takes, or is in the section's title.
NOT_SETTINGS = {
    "run.seed", "run.label", "run.checkpoint_minutes", "data.path", "data.dataset", "data.root", "data.download",
}  # fmt: skip
_MINING = (
    "screen_steps", "start_epoch", "lam", "reweight", "early_drop", "rows", "freeze_bn", "bn_rows", "screen", "group",
    "group_updates", "round_to",
)  # fmt: skip
_SWITCHES = {
    "method.reweight": {False: "no reweighting"},
    "method.early_drop": {False: "no early drop"},
    "method.freeze_bn": {True: "frozen BN"},
    "method.bn_rows": {"all": "BN of all rows"},
    "method.rows": {},  # random rows are the group's first word
    "method.screen": {"one_step": "screened by one step"},
    "method.group_updates": {"one": "one update a group"},
    "warm_up.name": {"n_fgsm": "after N-FGSM", "fgsm_rs": "after FGSM-RS"},
    "engine.channels_last": {"on": "channels_last", "require": "channels_last"},
    "engine.compile": {"on": "compiled", "require": "compiled"},
    "engine.cuda_graphs": {"on": "CUDA graphs", "require": "CUDA graphs"},
    "engine.winograd": {"on": "Winograd", "require": "Winograd"},
}
_NUMBERS = {
    "warm_up.natural_epochs": "{} natural epochs", "method.group": "groups of {}", "method.round_to": "rounded to {}",
    "method.screen_steps": "M={}", "method.lam": "λ={}", "method.start_epoch": "from epoch {}", "attack.eps": "ε={}",
    "attack.step_size": "step={}", "attack.steps": "K={}", "attack.norm": "{}", "model.name": "{}",
    "optim.epochs": "{} epochs", "optim.lr": "lr={}", "optim.schedule": "{} schedule", "data.batch_size": "batch={}",
    "data.train_images": "{} training images", "data.augment": "augment={}", "run.precision": "{}",
    "run.ema_decay": "EMA={}", "run.device": "{}",
}  # fmt: skip


_OFF = {"warm_up.natural_epochs": 0, "method.group": 1, "method.round_to": 1}  # no words for what is not used


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
    _number_repeats(out)  # as with subsets of the same data set that differ in their classes
    titles = [group.title for section in out for group in section.groups]
    if baseline is not None and baseline not in titles:
        raise ValueError(f"baseline: got {baseline!r}; it must be the title of a group: {', '.join(titles)}")
    for section in out:
        _choose_baseline(section, baseline)
        section.notes += _comparability(section)
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
        signature = tuple(sorted((k, _canonical(v)) for k, v in settings.items())) or (str(run.folder),)
        groups.setdefault(signature, Group([], settings)).runs.append(run)
    section = Section(*key, groups=list(groups.values()))
    for group in section.groups:
        group.runs.sort(key=lambda run: (run.seed is None, run.seed or 0))  # so that seeds pair up between groups
        group.weights = choose_weights(group.counted)
        unfinished = [run.name for run in group.runs if not run.finished]
        if group.finished and unfinished:
            section.notes.append(f"Not in the means, since not finished: {', '.join(unfinished)}.")
    _set_titles(section.groups)
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


# ---------------------------------------------------------------- titles
def _set_titles(groups: list[Group]) -> None:
    for group in groups:
        labels = {run.label for run in group.runs}
        group.title = labels.pop() if len(labels) == 1 and None not in labels else _title(group, groups)
    _number_repeats(groups)  # labels may repeat


def _number_repeats(titled: Sequence[Group | Section]) -> None:
    """ "HAM", "HAM (2)", ...: titles name groups and sections, so each is there once."""
    taken: set[str] = set()
    for one in titled:
        title, number = one.title, 2
        while one.title in taken:
            one.title, number = f"{title} ({number})", number + 1
        taken.add(one.title)


def _title(group: Group, groups: list[Group]) -> str:
    if not group.settings:
        return group.runs[0].name
    words = [_first_word(group)]
    for key, names in _SWITCHES.items():
        value = group.settings.get(key)
        if isinstance(value, (bool, str)) and value in names:
            words.append(names[value])
    family = [g for g in groups if g.method == group.method]
    for key in sorted({k for g in groups for k in g.settings} - {"method.name", *_SWITCHES}, key=_rank):
        peers = [g for g in (family if key.startswith("method.") else groups) if g.settings]
        if key == "method.lam":  # without reweighting there is no λ to differ in
            peers = [g for g in peers if g.settings.get("method.reweight") is not False]
        if group not in peers or len({_canonical(g.settings.get(key)) for g in peers}) < 2:
            continue
        if key in _OFF and group.settings.get(key, _OFF[key]) == _OFF[key]:
            continue
        words.append(_setting_text(key, group.settings.get(key)))
    return ", ".join(words)


def _canonical(value: Any) -> str:
    """The same text for 1 and 1.0, as TOML written by hand has either."""
    return repr(float(value)) if isinstance(value, int) and not isinstance(value, bool) else repr(value)


def _first_word(group: Group) -> str:
    if group.method == "pgd_at":
        return "PGD-AT"
    if group.method == "ham":
        return "random rows" if group.settings.get("method.rows") == "random" else "HAM"
    return str(group.method or "unknown method")


def _rank(key: str) -> tuple[int, str]:
    order = list(_NUMBERS)
    return (order.index(key) if key in order else len(order), key)


def _setting_text(key: str, value: Any) -> str:
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    if key == "run.ema_decay" and not value:
        return "no EMA"
    if value is None or key not in _NUMBERS:
        return f"{key.split('.', 1)[-1] or key}={'unset' if value is None else shown}"
    return _NUMBERS[key].format(shown)


# ---------------------------------------------------------------- what is compared with what
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


def _comparability(section: Section) -> list[str]:
    """What a reader must know before comparing the groups of a section."""
    notes = []
    shown = [run.evaluations[g.weights] for g in section.groups for run in g.counted if g.weights in run.evaluations]
    for what, values in (
        ("test images", {(e.part, e.images) for e in shown}),
        ("the attack's step size", {e.step_size for e in shown}),
        ("the precision of the evaluation", {e.precision for e in shown}),
        ("weights", {e.weights for e in shown}),
    ):
        if len(values) > 1:
            notes.append(f"Not alike in {what}: {'; '.join(sorted(_plain(v) for v in values))}. Compare with care.")
    for attack in sorted({name for e in shown for name in e.attacks}):
        images = {e.attacks[attack].n for e in shown if attack in e.attacks}
        if len(images) > 1:
            counts = ", ".join(str(n) for n in sorted(images, key=str))
            notes.append(f"Not alike in images under {attack_title(attack)}: {counts}. Compare with care.")
    machines = {machine_of(run) for g in section.groups for run in g.counted}
    if len(machines) > 1:
        notes.append(f"Trained on different machines, so times do not compare: {'; '.join(sorted(machines))}.")
    return notes


def machine_of(run: Run) -> str:
    """CPU, cores, GPU in one line."""
    machine = run.environment.get("machine")
    if not isinstance(machine, dict) or not machine:
        return "unknown machine"
    cores = f", cores: {machine['cores']}" if machine.get("cores") else ""
    gpu = machine.get("gpu")
    return f"{machine.get('cpu') or 'unknown CPU'}{cores}, GPU: {gpu or 'none'}"


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(str(v) for v in value if v is not None)
    return WEIGHTS.get(value, str(value))
