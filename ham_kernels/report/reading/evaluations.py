"""evaluation/W.json read into dataclasses. A part that cannot be read is left out with a note; the rest stays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...common import troubles
from ...common.class_measures import gini, value_range, worst_mean
from .flags import contradiction
from .json_types import MALFORMED, read_as

WEIGHTS = {"ema": "weight average", "last": "last weights", "best_ema": "best weight average", "best": "best weights"}


@dataclass(frozen=True)
class Interval:
    """A number with its interval; None where there is none (a class without images)."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @staticmethod
    def unpacked(value: Any) -> Any:
        """A number alone has no interval."""
        return value if isinstance(value, Mapping) else {"value": value}


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Accuracies under one attack, as fractions of 1; std is over the classes, nstd is std over their mean.

    worst3, range and gini are those of `common.class_measures`; where a file of before lacks them, without interval.
    """

    accuracy: Interval
    per_class: tuple[Interval, ...]
    worst_class: Interval = Interval()
    std: Interval = Interval()
    nstd: Interval = Interval()
    worst3: Interval = Interval()  # mean of the three worst classes
    range: Interval = Interval()  # best minus worst class
    gini: Interval = Interval()
    n: int | None = None  # images
    correct: str | None = None  # one flag per image, 0 or 1
    labels: str | None = None  # class numbers of the images, a space between them
    answers: str | None = None  # class numbers that the model gives at the judged examples, in the same form
    images_sha256: str | None = None  # of these images and labels
    no_gradient: int | None = None  # images whose attack had no gradient to follow
    settings: Any = None  # of the attack

    @property
    def searched_fast(self) -> bool:
        """Whether it looked for examples on another form of the model; none other than the model itself judges."""
        return isinstance(self.settings, Mapping) and "search" in self.settings

    def __post_init__(self):
        per_class = [interval.value for interval in self.per_class]
        for name, measure in (("worst3", worst_mean), ("range", value_range), ("gini", gini)):
            if getattr(self, name).value is None and not math.isnan(value := measure(per_class)):
                object.__setattr__(self, name, Interval(value))


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """Probability of the true class at adversarial examples."""

    edges: tuple[float, ...]  # of the bins, in [0, 1]
    histogram: tuple[tuple[float, ...], ...]  # counts, classes by bins
    threshold: float | None = None
    overconfident: tuple[float | None, ...]  # per class, share above the threshold
    overconfident_all: float | None = None
    steps: int | None = None
    part: str | None = None

    def __post_init__(self):
        if {len(row) for row in self.histogram} != {len(self.edges) - 1}:
            raise ValueError(f"histogram must hold {len(self.edges) - 1} counts for each class")
        if not self.images > 0:
            raise ValueError("histogram counts no example")

    @property
    def images(self) -> int:
        return int(sum(map(sum, self.histogram)))

    @property
    def shares(self) -> list[float]:
        """Of all examples, one per bin."""
        bins = [sum(column) for column in zip(*self.histogram, strict=True)]
        return [count / sum(bins) for count in bins]


@dataclass(frozen=True, kw_only=True)
class EasyAt:
    """Examples that resist m attack steps: their share of all, and the share of them that resists to the end."""

    m: int
    easy_fraction: float | None = None
    stay_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Easy:
    by_m: tuple[EasyAt, ...]
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check for gradient masking. One that lacks what it needs, such as another model, has no values."""

    name: str
    title: str | None = None
    suspicious: bool
    why: str | None = None
    values: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Masking:
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image before and after an attack: class numbers, and how sure the model is of each answer."""

    label: int
    answer: int
    probability: float
    answer_adv: int
    probability_adv: float


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Images that `file`, beside the evaluation, holds as x and x_adv, (n, C, H, W) in [0, 1]."""

    attack: str
    file: str
    sha256: str | None = None
    rows: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the weights W of a run are worth on the test images."""

    weights: str
    epoch: int | None = None
    dataset: str | None = None
    classes: tuple[str, ...]
    part: str | None = None
    images: int | None = None
    eps: float | None = None
    step_size: float | None = None
    norm: str | None = None
    precision: str | None = None
    checkpoint_sha256: str | None = None
    attacks: Mapping[str, Attack]
    masking: Masking | None = None
    confidence: Confidence | None = None
    easy: Easy | None = None
    examples: Examples | None = None


def read_evaluation(weights: str, raw: Mapping[str, Any], notes: list[str], file: Path) -> Evaluation:
    """Raises one of MALFORMED where it is no evaluation; what is wrong in an optional part goes to `notes`."""
    if raw.get("format") != 1:
        raise ValueError(f"format {raw.get('format')!r} is not known here; this version reads format 1")
    optional = {"masking": Masking, "confidence": Confidence, "easy": Easy, "examples": Examples}
    found = read_as(Evaluation, {**raw, "weights": weights, **dict.fromkeys(optional)})
    for name, attack in found.attacks.items():
        _of_each_class(found, f"{name}: per_class", attack.per_class)
    wrong = {name: why for name, attack in found.attacks.items() if (why := contradiction(attack))}
    for name, why in wrong.items():
        facts = {"file": file, "attack": name, "why": why}
        notes.append(troubles.text("flags_contradict", **facts))
        troubles.warn("flags_contradict", **facts)
    parts = {"attacks": {name: attack for name, attack in found.attacks.items() if name not in wrong}}
    for key, kind in optional.items():
        try:
            parts[key] = read_as(kind | None, raw.get(key))
            if key == "confidence" and parts[key]:
                _of_each_class(found, "histogram", parts[key].histogram)
                _of_each_class(found, "overconfident", parts[key].overconfident)
            if key == "examples" and parts[key]:
                numbers = {n for row in parts[key].rows for n in (row.label, row.answer, row.answer_adv)}
                if not numbers <= set(range(len(found.classes))):
                    raise ValueError(f"rows name classes beyond the {len(found.classes)} that there are")
        except MALFORMED as error:
            parts[key] = None
            notes.append(f"evaluation/{weights}.json: {key} cannot be read ({type(error).__name__}: {error})")
    return replace(found, **parts)


def _of_each_class(evaluation: Evaluation, name: str, values: tuple) -> None:
    if len(values) != len(evaluation.classes):
        raise ValueError(f"{name} holds {len(values)} entries for {len(evaluation.classes)} classes")
