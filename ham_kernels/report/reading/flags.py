"""What the flags of an attack tell, one per image: whether its accuracies follow, and each class's images."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...common.class_measures import gini, value_range, worst_mean

if TYPE_CHECKING:
    from .evaluations import Attack

ROUNDING = 1e-6  # of numbers written as text
MEASURES = ("worst_class", "std", "nstd", "worst3", "range", "gini")


def class_images(attack: Attack) -> list[int] | None:
    """How many images of each class an attack was made on; None where it keeps no labels."""
    if attack.labels is None:
        return None
    counts = Counter(attack.labels.split())
    return [counts[str(c)] for c in range(len(attack.per_class))]


def by_class(attack: Attack) -> list[str]:
    """The flags of each class's images, in their order; of an attack that keeps labels."""
    out = [""] * len(attack.per_class)
    for flag, label in zip(attack.correct, map(int, attack.labels.split()), strict=True):
        out[label] += flag
    return out


def contradiction(attack: Attack) -> str | None:
    """What does not follow from an attack's flags, or can be no accuracy; None where all does."""
    shares = {"accuracy": attack.accuracy, **{f"class {c}": share for c, share in enumerate(attack.per_class)}}
    for name, share in shares.items():
        if share.value is not None and not 0 <= share.value <= 1:
            return f"{name} is {_words(share.value)}"
    flags, labels = attack.correct, attack.labels
    if flags is None:
        return None
    if not flags or set(flags) - {"0", "1"}:
        return "its flags are not 0 and 1"
    if attack.n not in (None, len(flags)):
        return f"{len(flags)} flags for {attack.n} images"
    allowed = {str(c) for c in range(len(attack.per_class))}
    for name, numbers in (("labels", labels), ("answers", attack.answers)):
        if numbers is not None and (len(numbers.split()) != len(flags) or set(numbers.split()) - allowed):
            return f"its {name} are not one of {len(allowed)} classes for each of {len(flags)} flags"
    if None not in (labels, attack.answers):
        pairs = zip(labels.split(), attack.answers.split(), flags, strict=True)
        if any((label == answer) != (flag == "1") for label, answer, flag in pairs):
            return "its answers are not the labels where its flags are 1, and others where they are 0"
    stated = {"accuracy": attack.accuracy.value}
    found: dict[str, float | None] = {"accuracy": _share(flags)}
    if labels is not None:
        per_class = [_share(of_class) for of_class in by_class(attack)]
        known = [share for share in per_class if share is not None]
        found |= {"worst_class": min(known), "std": statistics.pstdev(known)}
        if attack.nstd.value is not None and any(known):
            found["nstd"] = statistics.pstdev(known) / statistics.fmean(known)
        found |= {"worst3": worst_mean(known), "range": value_range(known), "gini": gini(known) if any(known) else None}
        stated |= {name: getattr(attack, name).value for name in MEASURES}
        found |= {f"class {c}": share for c, share in enumerate(per_class)}
        stated |= {f"class {c}": interval.value for c, interval in enumerate(attack.per_class)}
    wrong = [name for name in found if not _equal(found[name], stated[name])]
    return f"{wrong[0]} is {_words(found[wrong[0]])}, not {_words(stated[wrong[0]])}" if wrong else None


def _share(flags: Sequence[str]) -> float | None:
    return flags.count("1") / len(flags) if flags else None


def _equal(a: float | None, b: float | None) -> bool:
    return a is b if None in (a, b) else abs(a - b) <= ROUNDING


def _words(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.2f} %"
