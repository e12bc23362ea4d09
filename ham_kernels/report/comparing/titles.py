"""What a group is called: its method, and the settings in which it differs from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .groups import Group, Section

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
# A preset's and a --config's scale with the epochs: not worth words beside another number of epochs.
_SCALED = ("method.start_epoch", "optim.milestones", "optim.lr_decay", "warm_up.natural_epochs")


def set_titles(groups: list[Group]) -> None:
    """The label that all runs of a group share, else words for what sets it apart."""
    for group in groups:
        labels = {run.label for run in group.runs}
        group.title = labels.pop() if len(labels) == 1 and None not in labels else _title(group, groups)
    number_repeats(groups)  # labels may repeat


def number_repeats(titled: Sequence[Group | Section]) -> None:
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
        word = _switch(group, key, names)
        told = not key.startswith("engine.") or len({_switch(g, key, names) for g in groups}) > 1
        if word is not None and told:  # what an option does to all alike sets nobody apart
            words.append(word)
    family = [g for g in groups if g.method == group.method]
    for key in sorted({k for g in groups for k in g.settings} - {"method.name", *_SWITCHES}, key=_rank):
        peers = [g for g in (family if key.startswith("method.") else groups) if g.settings]
        if key == "method.lam":  # without reweighting there is no λ to differ in
            peers = [g for g in peers if g.settings.get("method.reweight") is not False]
        if key in _SCALED:
            epochs = canonical(group.settings.get("optim.epochs"))
            peers = [g for g in peers if canonical(g.settings.get("optim.epochs")) == epochs]
        if group not in peers or len({canonical(g.settings.get(key)) for g in peers}) < 2:
            continue
        if key in _OFF and group.settings.get(key, _OFF[key]) == _OFF[key]:
            continue
        words.append(_setting_text(key, group.settings.get(key)))
    return ", ".join(words)


def _switch(group: Group, key: str, names: dict) -> str | None:
    value = group.settings.get(key)
    return names.get(value) if isinstance(value, (bool, str)) else None


def canonical(value: Any) -> str:
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
