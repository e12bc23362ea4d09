"""evaluation/W.json read into dataclasses. A part that cannot be read is left out with a note; the rest stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WEIGHTS = {"ema": "weight average", "last": "last weights", "best_ema": "best weight average", "best": "best weights"}
MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Interval:
    """A number with its bootstrap interval; None where there is none (a class without images)."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Attack:
    """Accuracies under one attack, as fractions of 1; std is over the classes, nstd is std over their mean."""

    accuracy: Interval
    per_class: tuple[Interval, ...]
    worst_class: Interval
    std: Interval
    nstd: Interval
    n: int | None = None  # images


@dataclass(frozen=True)
class Confidence:
    """Probability of the true class at adversarial examples."""

    edges: tuple[float, ...]  # of the bins, in [0, 1]
    shares: tuple[float, ...]  # of all examples, one per bin
    threshold: float | None
    overconfident: tuple[float | None, ...]  # per class, share above the threshold
    overconfident_all: float | None
    steps: int | None
    part: str | None
    images: int


@dataclass(frozen=True)
class EasyAt:
    """Examples that resist m attack steps: their share of all, and the share of them that resists to the end."""

    m: int
    easy_fraction: float | None
    stay_share: float | None


@dataclass(frozen=True)
class Check:
    """One check for gradient masking."""

    title: str
    suspicious: bool
    why: str
    values: Mapping[str, Any]

    @property
    def ran(self) -> bool:
        """A check that lacks what it needs, such as another model, is written down without values."""
        return bool(self.values)


@dataclass(frozen=True)
class Evaluation:
    """What the weights W of a run are worth on the test images."""

    weights: str
    epoch: int | None
    dataset: str | None
    classes: tuple[str, ...]
    part: str | None
    images: int | None
    eps: float | None
    step_size: float | None
    norm: str | None
    precision: str | None
    checkpoint_sha256: str | None
    attacks: Mapping[str, Attack]
    masking: tuple[Check, ...] | None
    confidence: Confidence | None
    easy: tuple[EasyAt, ...] | None
    easy_steps: int | None


def read_evaluation(weights: str, raw: Mapping[str, Any], notes: list[str]) -> Evaluation:
    """Raises one of MALFORMED where it is no evaluation; what is wrong in an optional part goes to `notes`."""
    if raw.get("format") != 1:
        raise ValueError(f"format {raw.get('format')!r} is not known here; this version reads format 1")
    classes = tuple(str(c) for c in _items(raw["classes"]))

    def part(key: str, read: Callable[[Any], Any]):
        if raw.get(key) is None:
            return None
        try:
            return read(raw[key])
        except MALFORMED as error:
            notes.append(f"evaluation/{weights}.json: {key} cannot be read ({type(error).__name__}: {error})")
            return None

    return Evaluation(
        weights=weights, epoch=integer(raw.get("epoch")), dataset=text(raw.get("dataset")), classes=classes,
        part=text(raw.get("part")), images=integer(raw.get("images")), eps=number(raw.get("eps")),
        step_size=number(raw.get("step_size")), norm=text(raw.get("norm")), precision=text(raw.get("precision")),
        checkpoint_sha256=text(raw.get("checkpoint_sha256")),
        attacks={str(name): _attack(entry, len(classes)) for name, entry in raw["attacks"].items()},
        masking=part("masking", _masking),
        confidence=part("confidence", lambda value: _confidence(value, len(classes))),
        easy=part("easy", _easy),
        easy_steps=part("easy", lambda value: integer(value.get("steps"))),
    )  # fmt: skip


def number(value: Any) -> float | None:
    """A finite number, else None: null and NaN stand for what could not be measured. Raises: TypeError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"got {value!r} where a number or null belongs")
    return float(value) if math.isfinite(value) else None


def integer(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def text(value: Any) -> str | None:
    return None if value is None else str(value)


def _items(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"got {value!r:.40} where a list belongs")
    return value


def _attack(raw: Mapping[str, Any], classes: int) -> Attack:
    per_class = tuple(_interval(entry) for entry in _items(raw["per_class"]))
    if len(per_class) != classes:
        raise ValueError(f"per_class holds {len(per_class)} entries for {classes} classes")
    return Attack(
        _interval(raw["accuracy"]), per_class, _interval(raw.get("worst_class")), _interval(raw.get("std")),
        _interval(raw.get("nstd")), integer(raw.get("n")),
    )  # fmt: skip


def _interval(raw: Any) -> Interval:
    if isinstance(raw, Mapping):
        return Interval(number(raw.get("value")), number(raw.get("low")), number(raw.get("high")))
    return Interval(number(raw))


def _confidence(raw: Mapping[str, Any], classes: int) -> Confidence:
    edges = tuple(float(edge) for edge in _items(raw["edges"]))
    rows = [[float(count) for count in _items(row)] for row in _items(raw["histogram"])]
    if len(rows) != classes or {len(row) for row in rows} != {len(edges) - 1}:
        raise ValueError(f"histogram must hold {classes} classes of {len(edges) - 1} counts each")
    bins = [sum(column) for column in zip(*rows, strict=True)]
    if not sum(bins) > 0:
        raise ValueError("histogram counts no example")
    overconfident = tuple(number(share) for share in _items(raw["overconfident"]))
    if len(overconfident) != classes:
        raise ValueError(f"overconfident holds {len(overconfident)} entries for {classes} classes")
    return Confidence(
        edges, tuple(count / sum(bins) for count in bins), number(raw.get("threshold")), overconfident,
        number(raw.get("overconfident_all")), integer(raw.get("steps")), text(raw.get("part")),
        int(sum(bins)),
    )  # fmt: skip


def _easy(raw: Mapping[str, Any]) -> tuple[EasyAt, ...]:
    entries = [
        EasyAt(int(entry["m"]), number(entry.get("easy_fraction")), number(entry.get("stay_share")))
        for entry in _items(raw["by_m"])
    ]
    return tuple(sorted(entries, key=lambda entry: entry.m))


def _masking(raw: Mapping[str, Any]) -> tuple[Check, ...]:
    return tuple(
        Check(
            str(check.get("title") or check["name"]), bool(check["suspicious"]), str(check.get("why") or ""),
            dict(check.get("values") or {}),
        )
        for check in _items(raw["checks"])
    )  # fmt: skip
