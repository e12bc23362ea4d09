"""Accuracies of a group under each attack, and what it gains and loses against the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..reading.evaluations import Attack
from ..reading.flags import class_images
from .claims import same_seeds
from .comparable import PLACE, unlike
from .groups import Group
from .images import smallest_class
from .over_seeds import Spread, difference, spread


def accuracies(group: Group, weights: str) -> dict[str, Any]:
    """{attack: spreads, and on which images and how they were found}."""
    found = [run.evaluations.get(weights) for run in group.counted]
    names = dict.fromkeys(name for e in found if e for name in e.attacks)
    out = {name: _accuracy([e and e.attacks.get(name) for e in found]) for name in names}
    for name, accuracy in out.items():
        by_run = [
            (run, e, e.attacks[name]) for run, e in zip(group.counted, found, strict=True) if e and name in e.attacks
        ]
        told = {"part": lambda e: e.part, "step size": lambda e: e.step_size, "precision": lambda e: e.precision}
        accuracy["how"] = {what: _known(map(of, (e for _, e, _ in by_run))) for what, of in told.items()}
        smallest = [smallest_class(*one) for one in by_run]
        accuracy["smallest_class"] = None if None in smallest else min(smallest)
        accuracy["no_gradient"] = {run.name: a.no_gradient for run, _, a in by_run if a.no_gradient}
    return out


def judged(group: Mapping[str, Any], attack: str | None) -> dict[str, Any]:
    """A group's accuracies under an attack, for the weights shown; empty where it was not judged by it."""
    return group["accuracy"].get(group["weights"], {}).get(attack, {})


def relate(group: dict, base: dict, attack: str | None, by_image: Mapping[tuple, dict]) -> None:
    """What a group costs, gains and loses against the baseline; times only where they are of the same machine."""
    apart = unlike((group["training"], base["training"]), PLACE)
    known = group["time"]["mean"] is not None and base["time"]["mean"] and group["finished"] and base["finished"]
    if known and not apart:
        group["relative_time"] = group["time"]["mean"] / base["time"]["mean"]
    group["differences"] = differences(group, base, attack, by_image)


def differences(group: dict, base: dict, attack: str | None, by_image: Mapping[tuple, dict]) -> list[Spread] | None:
    """Of each class, for the same weights; None where one of the two was not judged so."""
    ours, theirs = judged(group, attack), base["accuracy"].get(group["weights"], {}).get(attack)
    if not ours or not theirs:
        return None
    by_seed = same_seeds(group, base)
    found = [difference(a, b, by_seed) for a, b in zip(ours["per_class"], theirs["per_class"], strict=True)]
    if paired := by_image.get((group["title"], group["weights"], attack)):
        for gain, ends in zip(found, paired["per_class"], strict=True):
            gain |= dict(zip(("low", "high"), ends or (None, None), strict=True))
    return found


def _known(values: Iterable[Any]) -> list[str]:
    return sorted({str(value) for value in values if value is not None})


def _accuracy(judged: Sequence[Attack | None]) -> dict[str, Any]:
    """Spreads under one attack. A seed without it counts as None, so that values stay in the order of seeds."""
    known = [a for a in judged if a]
    classes = zip(*(a.per_class if a else [None] * len(known[0].per_class) for a in judged), strict=True)
    return {
        "average": spread([a and a.accuracy for a in judged]),
        "worst": spread([a and a.worst_class for a in judged]),
        "worst_three": spread([a and a.worst3 for a in judged]),
        "range": spread([a and a.range for a in judged]),
        "gini": spread([a and a.gini for a in judged]),
        "std": spread([a and a.std for a in judged]),
        "nstd": spread([a and a.nstd for a in judged]),
        "per_class": [spread(values) for values in classes],
        "class_images": class_images(known[0]),
        "images": sorted({a.n for a in known}, key=str),
        "digests": sorted({a.images_sha256 for a in known} - {None}),
    }
