"""How the models of a group fail: which class is taken for which, under which budgets, and on which images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reading.evaluations import Attack, Evaluation
from ..strength import CLEAN, strongest
from .groups import Group
from .over_seeds import spread

MOST = 10  # of the confusions that are told
MANY_CLASSES = 20  # above: the most frequent confusions alone


def attack_with_answers(groups: Sequence[Group]) -> str | None:
    """The strongest attack of which all runs, else most, keep the answers."""
    runs = [e for g in groups for e in g.evaluated(g.weights)]
    return strongest([[name for name, a in e.attacks.items() if a.answers is not None] for e in runs])


def attack_over_eps(groups: Sequence[Group]) -> str | None:
    """The strongest attack that runs judged under several budgets share."""
    runs = [run for g in groups for run in g.counted if run.other_eps]
    return strongest([set.intersection(*(set(e.attacks) for e in run.other_eps)) for run in runs])


def confusion(group: Group, attack: str | None) -> dict[str, Any] | None:
    """{"attack", "shares", "pairs"} over all runs that keep their answers; None of none.

    "shares" are (classes, classes): of the images of a class (row) those that are taken for another (column) or, on the
    diagonal, for what they are; None for a class without images, and as a whole where the classes are many. "pairs" are
    the most frequent, [{"label", "answer", "share", "images"}], by their share of the class's images.
    """
    judged = [e.attacks[attack] for e in group.evaluated(group.weights) if attack in e.attacks]
    judged = [a for a in judged if a.answers is not None and a.labels is not None]
    if not judged:
        return None
    count = len(judged[0].per_class)
    found = sum((_answered(a) for a in judged), Counter())
    totals = Counter()
    for (label, _), images in found.items():
        totals[label] += images
    pairs = [
        {"label": label, "answer": answer, "share": images / totals[label], "images": images}
        for (label, answer), images in found.items()
        if label != answer
    ]
    pairs.sort(key=lambda pair: (-pair["share"], -pair["images"], pair["label"], pair["answer"]))
    shares = [
        [found[label, answer] / totals[label] for answer in range(count)] if totals[label] else None
        for label in range(count)
    ]
    return {"attack": attack, "shares": shares if count <= MANY_CLASSES else None, "pairs": pairs[:MOST]}


def _answered(attack: Attack) -> Counter:
    return Counter(zip(map(int, attack.labels.split()), map(int, attack.answers.split()), strict=True))


def over_eps(group: Group, attack: str | None) -> dict[str, Any] | None:
    """{"attack", "eps", "average", "worst"}: spreads over seeds for each eps from 0, clean images, on.

    None where no run of the group was judged under another eps.
    """
    found: dict[float, dict[int, Attack]] = {}
    for i, run in enumerate(group.counted):
        shown = run.evaluations.get(group.weights)
        others = [e for e in run.other_eps if e.weights == group.weights and shown and _same_weights(e, shown)]
        for judged in (shown, *others) if shown else ():
            if attack in judged.attacks and judged.eps is not None:
                found.setdefault(judged.eps, {})[i] = judged.attacks[attack]
        if shown and CLEAN in shown.attacks:
            found.setdefault(0.0, {})[i] = shown.attacks[CLEAN]
    if len(found) < 3:
        return None
    eps = sorted(found)
    rows: dict[str, Sequence] = {
        "average": [spread([a.accuracy for a in found[e].values()]) for e in eps],
        "worst": [spread([a.worst_class for a in found[e].values()]) for e in eps],
    }
    return {"attack": attack, "eps": eps, **rows}


def _same_weights(a: Evaluation, b: Evaluation) -> bool:
    return a.checkpoint_sha256 == b.checkpoint_sha256


def examples(group: Group) -> dict[str, Any] | None:
    """{"run", "file", "sha256", "attack", "rows"} of the first run that keeps example images."""
    for run in group.counted:
        judged = run.evaluations.get(group.weights)
        if judged and judged.examples:
            told = judged.examples
            path = run.folder / "evaluation" / Path(told.file).name
            rows = [dict(vars(row)) for row in told.rows]
            return {"run": run.name, "file": str(path), "sha256": told.sha256, "attack": told.attack, "rows": rows}
    return None
