"""What a figure shows, in a sentence for those who do not see it: (section of data.json) -> text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..comparing.claims import EASY_M
from ..comparing.frontier import GAINS, undominated
from ..text_format import duration, signed
from .figures import Section, shown

MANY = 6  # methods: above, the first and the last of an order are told


def ordered(section: Section, value: Callable[[dict], float | None], words: Callable[[float], str]) -> str:
    """ "fair 28.0 %, PGD-AT 18.0 %": all methods from the highest value on, or the ends of many."""
    known = [(found, g["title"]) for g in section["groups"] if (found := value(g)) is not None]
    known.sort(key=lambda pair: (-pair[0], pair[1]))
    told = [f"{title} {words(found)}" for found, title in known]
    return (
        ", ".join(told)
        if len(told) <= MANY
        else f"from {', '.join(told[:2])} down to {told[-1]} of {len(told)} methods"
    )


def lowest_class(section: Section) -> str:
    """The worst class of each method."""

    def worst(group: dict) -> float | None:
        accuracy = shown(group, section)
        return accuracy["worst"]["mean"] if accuracy else None

    return f"Worst class: {ordered(section, worst, _percent)}."


def worst_and_time(section: Section) -> str:
    times = ordered(section, lambda g: g["time"]["mean"], duration)
    return f"{lowest_class(section)} Training time: {times}."


def frontier(cost: str) -> Callable[[Section], str]:
    def find(section: Section) -> str:
        methods = [m for m in section["frontier"]["methods"] if m[cost]["mean"] is not None]
        best = sorted(undominated(methods, cost), key=lambda m: m[cost]["mean"])
        shares = [[_percent(m[gain]["mean"]) for gain in GAINS] for m in best]
        told = [
            f"{m['title']} ({mean} on average, worst class {worst})"
            for m, (mean, worst) in zip(best, shares, strict=True)
        ]
        more = len(methods) - len(best)
        dominated = f"; {more} other{'s are' if more > 1 else ' is'}" if more else ""
        return f"Not dominated, cheapest first: {', '.join(told)}{dominated}."

    return find


def changes(section: Section) -> str:
    """Of each method the class that gains most and the one that loses most."""
    told = [
        f"{group['title']}: {_extremes(section, [d['mean'] for d in group['differences']])}"
        for group in section["groups"]
        if group["differences"]
    ]
    return "; ".join(_few(told)) + "."


def _extremes(section: Section, values: list[float | None]) -> str:
    known = [(value, name) for value, name in zip(values, section["classes"], strict=True) if value is not None]
    if not known:
        return "no value"
    (low, loser), (high, winner) = min(known), max(known)
    return f"most {winner} {_points(high)}, least {loser} {_points(low)}"


def overconfidence(section: Section) -> str:
    def share(group: dict) -> float | None:
        return group["confidence"] and group["confidence"]["overconfident_all"]["mean"]

    return f"Over-confident adversarial examples: {ordered(section, share, _percent)}."


def last_of(name: str, words: str) -> Callable[[Section], str]:
    """The value of a curve after the last epoch."""

    def find(section: Section) -> str:
        return f"{words} after the last epoch: {ordered(section, lambda g: _last(g, name), _percent)}."

    return find


def training(section: Section) -> str:
    attack = section["val_attack"] or "clean"
    name = f"val_ema.{attack}.accuracy"
    if not any(name in g["curves"] for g in section["groups"]):
        name = f"val.{attack}.accuracy"
    return last_of(name, "Validation accuracy under attack" if attack != "clean" else "Validation accuracy")(section)


def easy(section: Section) -> str:
    """Of the examples that resist a few steps, the share that resists to the end."""

    def stay(group: dict) -> float | None:
        by_m = {entry["m"]: entry["stay_share"]["mean"] for entry in (group["easy"] or {}).get("by_m", ())}
        return by_m.get(EASY_M)

    return f"Of the examples that resist {EASY_M} steps, these resist to the end: {ordered(section, stay, _percent)}."


def confusion(section: Section) -> str:
    def most(title: str, found: dict) -> str | None:
        pair = next(iter(found["pairs"]), None)
        names = section["classes"]
        return pair and f"{title} takes {names[pair['label']]} for {names[pair['answer']]} in {_percent(pair['share'])}"

    return f"Most often: {_of_each(section, 'confusion', most)}."


def over_eps(section: Section) -> str:
    def ends(title: str, found: dict) -> str:
        told = (f"{_percent(found['average'][i]['mean'])} at ε {found['eps'][i]:g}" for i in (0, -1))
        return f"{title} from {' to '.join(told)}"

    return f"Average accuracy: {_of_each(section, 'over_eps', ends)}."


def examples(section: Section) -> str:
    def turned(title: str, found: dict) -> str:
        count = sum(row["answer_adv"] != row["label"] for row in found["rows"])
        return f"{title}: {count} of {len(found['rows'])} images are turned"

    return f"{_of_each(section, 'examples', turned)}."


def _of_each(section: Section, key: str, words: Callable[[str, dict], str | None]) -> str:
    """What is said of each method that has this part."""
    return "; ".join(_few(filter(None, (words(g["title"], g[key]) for g in section["groups"] if g[key]))))


def _few(told: Iterable[str]) -> list[str]:
    told = list(told)
    return told if len(told) <= MANY else [*told[: MANY - 1], f"and {len(told) - MANY + 1} more"]


def _last(group: dict[str, Any], name: str) -> float | None:
    curve = group["curves"].get(name)
    return next((value for value in reversed(curve["mean"]) if value is not None), None) if curve else None


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return signed(100 * value, 1)
