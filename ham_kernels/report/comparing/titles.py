"""What a group is called: its method, and the settings in which it differs from the others."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...common import field_types
from ...common.field_types import Words, shown
from ...methods.settings import Method
from ...runs.settings import TrainSettings
from .groups import CONDITIONAL, Group, Section, canonical, passes_of

_ORDER = ("method", "warm_up", "attack", "model", "optim", "data", "run", "engine")


def set_titles(groups: list[Group]) -> None:
    """The label that all runs of a group share, else words for what sets it apart."""
    for group in groups:
        labels = {run.label for run in group.runs}
        group.title = labels.pop() if len(labels) == 1 and None not in labels else _title(group, groups)
    counts = Counter(group.title for group in groups)
    for group in groups:
        if counts[group.title] > 1 and not group.runs[0].named:
            group.title += f" ({group.runs[0].name})"
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
    method = group.method
    title = [method.title if method else str(group.method_name or "unknown method")]
    groups = [g for g in groups if g.settings and not g.adopted]
    family = [g for g in groups if g.method_name == group.method_name]
    known = _known(method)
    unknown = sorted({key for g in groups for key in g.settings} - {"method.name", *known})
    for key in (*known, *unknown):
        default, words = known.get(key, (None, Words()))
        peers = family if key.startswith("method.") else groups
        if key in CONDITIONAL or (key.startswith("method.") and method is not None):
            peers = [g for g in peers if key in g.settings]  # in others it has no effect
        if key.startswith("optim.") or key in ("model.mean", "model.std"):  # a fine-tuning has its own, told or not
            peers = [g for g in peers if ("run.weights" in g.settings) == ("run.weights" in group.settings)]
        if key == "optim.epochs" and canonical(passes_of(group.settings)) == _usual_passes(peers):
            continue  # only those of another length tell it
        if key == "run.teacher":
            peers = [g for g in peers if g.settings.get(key)]  # not all methods learn from one
        if key == "run.teacher_digest":
            peers = [g for g in peers if g.settings.get("run.teacher") == group.settings.get("run.teacher")]
        if group in peers:
            title.append(_word(group, peers, key, default, words))
    return ", ".join(word for word in title if word)


def _usual_passes(groups: list[Group]) -> str | None:
    """Those of PGD-AT, else of most; None where they do not tell. 3 epochs of 8 updates a batch are 24."""
    for asked in ([g for g in groups if g.is_pgd_at], groups):
        counts = Counter(canonical(passes_of(g.settings)) for g in asked).most_common(2)
        if len(counts) == 1 or (len(counts) == 2 and counts[0][1] > counts[1][1]):
            return counts[0][0]
    return None


def _known(method: Method | None) -> dict[str, tuple[Any, Words]]:
    """{"section.key": (default, words)}, in the order in which titles tell them."""
    sections = {f.name: getattr(TrainSettings(), f.name) for f in dataclasses.fields(TrainSettings)}
    sections["method"] = Method() if method is None else type(method)()
    return {
        f"{name}.{key}": (getattr(sections[name], key), words)
        for name in _ORDER
        for key, words in field_types.words(type(sections[name])).items()
    }


def _word(group: Group, peers: Sequence[Group], key: str, default: Any, words: Words) -> str | None:
    """By value: where it is not the default. Others: where peers differ in it."""
    value = group.settings.get(key)
    if words.scales:
        epochs = canonical(group.settings.get("optim.epochs"))
        peers = [g for g in peers if canonical(g.settings.get("optim.epochs")) == epochs]
    by_value = {canonical(of): text for of, text in words.by_value}
    texts = {by_value.get(canonical(g.settings.get(key))) for g in peers}
    if canonical(value) in by_value:
        told = len(texts) > 1 if words.apart else canonical(value) != canonical(default)
        return by_value[canonical(value)] if told else None
    differ = len({canonical(g.settings.get(key)) for g in peers}) > 1
    if not differ or canonical(value) == canonical(words.off) or (words.by_value and words.text is None):
        return None
    return _setting_text(key, value, words)


def _setting_text(key: str, value: Any, words: Words) -> str:
    if key == "run.ema_decay" and not value:
        return "no EMA"
    if words.text is not None and value is not None:
        return words.text.format(shown(value))
    plain = "unset" if value is None else str(value) if isinstance(value, list) else shown(value)
    return f"{key.split('.', 1)[-1] or key}={plain}"
