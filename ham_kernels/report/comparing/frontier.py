"""The frontier of a section: average and worst class under its attack, against training time and against forwards.

By means over seeds, method A dominates B where A costs no more, is no worse in average and in worst class, and is
better in one of the three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..text_format import attack_title
from .accuracies import differences, judged
from .claims import same_seeds
from .comparable import PLACE, WORK, judged_unlike, unlike
from .over_seeds import interval_of_difference, mean_interval, own_interval, pairs

COSTS = ("time", "forwards")
GAINS = ("average", "worst")
SHARES = ("average", "worst", "worst_three", "std")
FEWEST_CLASSES = 4  # of which the worst three are told
ALIKE = tuple(what for what in WORK if what != "epochs")  # where costs are known, those of trainings however long


def frontier(
    groups: Sequence[dict[str, Any]], attack: str | None, why: str | None, by_image: Mapping[tuple, dict]
) -> dict[str, Any] | None:
    """{"attack", "attack_why", "methods", "left_out", "untimed", "clock"} of plain values; None of fewer than two
    methods.

    A method is {"title", "baseline", "seeds", "average", "worst", "worst_three", "std", "time", "own_time", "forwards",
    "step_forwards", "relative_time", "relative_forwards", "dominated_by", "changes"}; "own_time" is without that of its
    first weights, "forwards" are those of the whole training for each image, "step_forwards" of one update.
    Measures are {"mean", "low", "high"} with the ends of the 95 % interval: of the mean over seeds, of one seed over
    test images. "dominated_by" is {cost: [{"title", "clear"}]} of methods that nothing dominates; clear: the interval
    of a difference, seed by seed, leaves out 0, None where none is known. "changes" are those of each class against the
    baseline.
    """
    if attack is None:
        return None
    left_out = {g["title"]: reason for g in groups if (reason := _unranked(g, attack))}
    ranked = [g for g in groups if g["title"] not in left_out]
    if not ranked:
        return None
    first = ranked[0]  # the baseline where there is one
    for group in ranked[1:]:
        if how := judged_unlike([judged(group, attack), judged(first, attack)], first["title"]):
            left_out[group["title"]] = f"judged {how}"
        elif apart := unlike((first["training"], group["training"]), ALIKE if _costed(group) else WORK):
            left_out[group["title"]] = f"trained unlike {first['title']} in {_words(apart)}"
    ranked = [g for g in ranked if g["title"] not in left_out]
    if len(ranked) < 2:
        return None
    places = {g["title"]: unlike((first["training"], g["training"]), PLACE) for g in ranked}
    untimed = {title: f"trained unlike {first['title']} in {_words(apart)}" for title, apart in places.items() if apart}
    clock = _clock(ranked)
    spreads = {g["title"]: _spreads(g, attack, None if g["title"] in untimed else clock) for g in ranked}
    base = first if first["baseline"] else None
    methods = [_method(g, spreads, base) for g in ranked]
    for m, group in zip(methods, ranked, strict=True):
        m["changes"] = _changes(group, base, attack, by_image) if base and group is not base else None
    for cost in COSTS:
        _dominate(methods, ranked, spreads, cost)
    found = {"attack": attack, "attack_why": why, "methods": methods}
    return found | {"left_out": left_out, "untimed": untimed, "clock": clock}


def as_compared(section: dict[str, Any]) -> dict[str, Any] | None:
    """A section as its frontier has it: its attack, the groups compared, what their classes gain; None without one."""
    if (found := section["frontier"]) is None:
        return None
    groups = {g["title"]: g for g in section["groups"]}
    compared = [groups[m["title"]] | {"differences": m["changes"]} for m in found["methods"]]
    base = next((m["title"] for m in found["methods"] if m["baseline"]), None)
    return section | {
        "attack": found["attack"], "attack_why": found["attack_why"], "groups": compared, "baseline": base,
    }  # fmt: skip


def better(a: dict[str, Any], b: dict[str, Any], cost: str) -> bool:
    """Whether a dominates b, by means that are all known."""
    gains = [b[cost]["mean"] - a[cost]["mean"], *(a[name]["mean"] - b[name]["mean"] for name in GAINS)]
    return min(gains) >= 0 and max(gains) > 0


def undominated(methods: Sequence[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """Those of known cost that nothing dominates."""
    return [m for m in methods if m[cost]["mean"] is not None and not m["dominated_by"][cost]]


# ---------------------------------------------------------------- who is compared
def _unranked(group: dict, attack: str) -> str:
    if not group["finished"]:
        return "training is not finished"
    if group["adopted"]:
        return "trained elsewhere"
    if group["weights"] in group["one_class"]:
        return "answers one class for nearly all images"
    return "" if judged(group, attack) else f"not judged under {attack_title(attack)}"


def _costed(group: dict) -> bool:
    return None not in (group["time"]["mean"], group["all_forwards"]["mean"])


def _words(apart: dict[str, list[str]]) -> str:
    return ", ".join(f"{what} ({' and '.join(values)})" for what, values in apart.items())


# ---------------------------------------------------------------- measures
def _clock(groups: Sequence[dict]) -> str:
    """Which time is compared: on CPUs that of all threads, since it does not count the work of others beside it."""
    known = all(g["cpu_time"]["n"] == g["time"]["n"] and g["training"]["device"] == ["cpu"] for g in groups)
    return "cpu_time" if known else "time"


def _spreads(group: dict, attack: str, clock: str | None) -> dict[str, dict[str, Any]]:
    unknown = {"mean": None, "std": None, "low": None, "high": None, "n": 0, "values": []}
    accuracy = judged(group, attack)
    few = sum(spread["mean"] is not None for spread in accuracy["per_class"]) < FEWEST_CLASSES
    found = {name: unknown if few and name == "worst_three" else accuracy[name] for name in SHARES}
    time, own = (unknown, unknown) if clock is None else (group[clock], group[f"own_{clock}"])
    costs = {"time": time, "own_time": own, "forwards": group["all_forwards"], "step_forwards": group["forwards"]}
    return found | costs


def _method(group: dict, spreads: dict, base: dict | None) -> dict[str, Any]:
    mine = spreads[group["title"]]
    out = {"title": group["title"], "baseline": group["baseline"], "seeds": mine["average"]["n"]}
    out |= {name: _estimate(value, name in SHARES) for name, value in mine.items()}
    theirs = spreads[base["title"]] if base else None
    for cost in COSTS:
        known = theirs and mine[cost]["mean"] is not None and theirs[cost]["mean"]
        out[f"relative_{cost}"] = mine[cost]["mean"] / theirs[cost]["mean"] if known else None
    return out | {"dominated_by": {cost: [] for cost in COSTS}}


def _estimate(spread: dict, share: bool) -> dict[str, Any]:
    low, high = own_interval(spread, exact=not share)
    if share and None not in (low, high):
        low, high = max(0.0, low), min(1.0, high)
    return {"mean": spread["mean"], "low": low, "high": high}


def _changes(group: dict, base: dict, attack: str, by_image: Mapping[tuple, dict]) -> list[dict[str, Any]] | None:
    """Of each class, with its 95 % interval; None where the baseline was not judged with the weights shown."""
    found = differences(group, base, attack, by_image)
    if found is None:
        return None
    ours, theirs = (g["accuracy"][group["weights"]][attack]["per_class"] for g in (group, base))
    over_images = (group["title"], group["weights"], attack) in by_image
    out = []
    for gain, a, b in zip(found, ours, theirs, strict=True):
        ends = (gain["low"], gain["high"]) if over_images else interval_of_difference(a, b, same_seeds(group, base))
        low, high = ends or (None, None)
        out.append({"mean": gain["mean"], "low": low, "high": high})
    return out


# ---------------------------------------------------------------- dominance
def _dominate(methods: list[dict], groups: Sequence[dict], spreads: dict, cost: str) -> None:
    known = [i for i, m in enumerate(methods) if None not in (m[n]["mean"] for n in (cost, *GAINS))]
    over = {i: [j for j in known if better(methods[j], methods[i], cost)] for i in known}
    for i in known:
        methods[i]["dominated_by"][cost] = [
            {"title": methods[j]["title"], "clear": _clear(groups[j], groups[i], spreads, cost)}
            for j in over[i]
            if not over[j]
        ]


def _clear(a: dict, b: dict, spreads: dict, cost: str) -> bool | None:
    """Whether a is better than b in one of the three by more than chance."""
    if not same_seeds(a, b):
        return None
    found = []
    for name, sign in ((cost, -1), *((gain, 1) for gain in GAINS)):
        both = pairs(*(spreads[g["title"]][name] for g in (a, b)))
        if ends := mean_interval([sign * (ours - theirs) for ours, theirs in both], exact=name == cost):
            found.append(ends[0] > 0)
    return any(found) if found else None
