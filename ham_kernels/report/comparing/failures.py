"""How the models of a group fail: which class is taken for which, under which budgets, and on which images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reading.evaluations import Attack, Evaluation
from ..reading.runs import Run
from ..strength import CLEAN, strongest
from ..text_format import MANY_CLASSES
from .groups import Group
from .over_seeds import spread

MOST = 10  # of the confusions that are told


def attack_with_answers(groups: Sequence[Group]) -> str | None:
    """The strongest attack of which all runs, else most, keep the answers."""
    runs = [e for g in groups for e in g.evaluated(g.weights)]
    return strongest([[name for name, a in e.attacks.items() if a.answers is not None] for e in runs])


def attack_over_eps(groups: Sequence[Group]) -> str | None:
    """The strongest attack of all judgements under other budgets, else of most."""
    others = [e for g in groups for run in g.counted for e in run.other_eps if e.weights == g.weights]
    return strongest([e.attacks for e in others])


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
    """{"attack", "eps", "seeds", "average", "worst"}: spreads over seeds for each eps from 0, clean images, on.

    Of the runs that were judged under other budgets, the budgets that all share, on as many images as their own; None
    where there is none.
    """
    curves = [curve for run in group.counted if (curve := _curve(run, group.weights, attack))]
    eps = sorted(set.intersection(*map(set, curves))) if curves else []
    if len(eps) < 3:
        return None
    points = {e: [curve[e] for curve in curves] for e in eps}
    return {
        "attack": attack, "eps": eps, "seeds": len(curves),
        "average": [spread([a.accuracy for a in points[e]]) for e in eps],
        "worst": [spread([a.worst_class for a in points[e]]) for e in eps],
    }  # fmt: skip


def _curve(run: Run, weights: str | None, attack: str | None) -> dict[float, Attack] | None:
    """{eps: what the run is worth}; None where no other budget than its own was judged."""
    shown = run.evaluations.get(weights)
    if shown is None or attack not in shown.attacks or shown.eps is None:
        return None
    own = shown.attacks[attack]
    alike = [e for e in run.other_eps if e.weights == weights and _same_weights(e, shown) and attack in e.attacks]
    found = {e.eps: e.attacks[attack] for e in alike if e.eps is not None and e.attacks[attack].n == own.n}
    if not found:
        return None
    found[shown.eps] = own
    if CLEAN in shown.attacks and shown.attacks[CLEAN].n == own.n:
        found[0.0] = shown.attacks[CLEAN]
    return found


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
