"""The paper's claims (arXiv 2308.01823) held against the groups of a section."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..reading.evaluations import WEIGHTS
from ..text_format import attack_title, signed
from .comparable import judged_unlike, threads_of, unlike
from .images import FEWEST
from .over_seeds import difference, interval_of_difference, interval_of_ratio, mean_interval, pairs, spread

TIME, WORST, STD = -0.45, 0.032, -0.22  # share of the time, accuracy, share of the std over classes
ROUNDING = 1e-9  # a gain of exactly 3.2 points holds
BUSY = 1.25  # the clock over CPU time: above, a training on a CPU had less than 0.8 of one core, whatever its threads
EASY_M, EASY_STAY = 3, 0.75  # of the examples that resist M = 3 steps, the share that resists to the end

EpochSeconds = Mapping[str, Sequence[Sequence[tuple[int, float | None, float | None]]]]  # {title: of each run: (epoch,
# seconds by the clock, seconds of CPU)}
ByImage = Mapping[tuple[str, str, str], Mapping[str, Any]]  # {(title, weights, attack): see `paired`}


def claims(
    groups: Sequence[dict[str, Any]], attacks: Sequence[str], seconds: EpochSeconds, by_image: ByImage
) -> list[dict[str, Any]]:
    """For each group that mines hard rows: {"group", "claim", "measured", "value", "seeds", "holds"}.

    holds is None where it was not judged, or where the seeds, or the images of one seed, leave open on which side of
    the claim the mean lies.
    """
    base = next((g for g in groups if g["baseline"]), None)
    if base is None or not base["is_pgd_at"]:
        return []
    out = []
    for group in (g for g in groups if g["mines_hard_rows"]):
        if not (group["finished"] and base["finished"]):
            found = [_entry("all", "not judged: training is not finished", None, None, 0)]
        elif any(g["weights"] in g["one_class"] for g in (group, base)):
            found = [_entry("all", "not judged: a model answers one class for nearly all images", None, None, 0)]
        else:
            found = [*_times(group, base, seconds), *_fairness(group, base, attacks, by_image)]
        out += [{"group": group["title"], **entry} for entry in found]
    return out


def same_seeds(group: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether differences may be taken seed by seed."""
    return group["seeds"] == base["seeds"] and None not in base["seeds"]


def _times(group: dict, base: dict, seconds: EpochSeconds) -> list[dict]:
    seeds = min(group["time"]["n"], base["time"]["n"])
    apart = unlike((group["training"], base["training"]))
    out = []
    curves = group["curves"]
    mining = {e for e, mines in zip(curves["epoch"], curves["mines"], strict=True) if mines}
    for where, epochs in (("whole run", None), ("mining epochs alone", mining)):
        claim = f"training time {signed(100 * TIME, 0)} %, {where}"
        runs = [seconds[g["title"]] for g in (group, base)]
        ours, theirs = ([_total(run, epochs) for run in of_group] for of_group in runs)
        cpu = [[_total(run, epochs, cpu=True) for run in of_group] for of_group in runs]
        if apart:
            why = ", ".join(f"{what} ({' and '.join(values)})" for what, values in apart.items())
            out.append(_entry(claim, f"not judged: trained unlike in {why}", None, None, seeds))
        elif None in ours or None in theirs or not sum(theirs):
            out.append(_entry(claim, "not judged: no training times of both", None, None, seeds))
        else:
            change = statistics.fmean(ours) / statistics.fmean(theirs) - 1
            each = [a / b - 1 for a, b in zip(ours, theirs, strict=True)] if same_seeds(group, base) else []
            ratio = interval_of_ratio(spread(ours), spread(theirs), exact=True)
            interval, over = _interval(each, None, ratio and (ratio[0] - 1, ratio[1] - 1), exact=True)
            holds, words = verdict(change, interval, TIME, below=True, over=over)
            measured = f"{signed(100 * change, 0)} %"
            if all(cpu) and None not in cpu[0] + cpu[1] and sum(cpu[1]):
                by_cpu = statistics.fmean(cpu[0]) / statistics.fmean(cpu[1]) - 1
                measured += f" (CPU time {signed(100 * by_cpu, 0)} %)"
                if busy := _busy(sum(ours) + sum(theirs), sum(map(sum, cpu)), threads_of(group["training"])):
                    holds, words = None, busy
            if seeds == 1:
                alone = [g["title"] for g in (group, base) if g["time"]["n"] == 1]
                whose = "each" if len(alone) == 2 else f"of {alone[0]}"
                words += f"; one run {whose}: other work on the machine would change it"
            out.append(_entry(claim, measured + words, change, holds, seeds))
    return out


def _busy(wall: float, cpu: float, threads: int | None) -> str:
    """What to say where a CPU did other work as well. Threads are never all at work, so that one core is asked for."""
    if threads is None or wall <= BUSY * cpu:
        return ""
    return f"; undecided: the machine was busy, {wall:.1f} s by the clock for {cpu:.1f} s of CPU on {threads} threads"


def _total(run: Sequence, epochs: set[int] | None, cpu: bool = False) -> float | None:
    """Seconds of these epochs (None: all); None where one of them is unknown, or there are none."""
    seconds = {epoch: times[cpu] for epoch, *times in run if epochs is None or epoch in epochs}
    known = bool(seconds) and None not in seconds.values() and (epochs is None or len(seconds) == len(epochs))
    return sum(seconds.values()) if known else None


def verdict(
    mean: float, interval: Sequence[float] | None, limit: float, below: bool, over: str = "", alike: bool = False
) -> tuple[bool | None, str]:
    """(whether the claim holds, what to say of it): undecided where the 95 % interval contains the limit, and where
    several seeds, all `alike`, have none."""
    if interval is None and alike:
        return None, "; undecided: all seeds alike, which says nothing of others"
    if interval is not None and interval[0] < limit < interval[1]:
        low, high = (signed(100 * end, 1) for end in interval)
        return None, f"; undecided: 95 % interval{over} {low} to {high}"
    return (mean <= limit + ROUNDING if below else mean >= limit - ROUNDING), ""


def _fairness(group: dict, base: dict, attacks: Sequence[str], by_image: ByImage) -> list[dict]:
    """Worst class and std over classes, for each kind of weights and each attack that both were judged with.

    A method that changes the scale of the logits can gain under one attack and lose under another.
    """
    both = [
        (w, a)
        for a in attacks
        for w in WEIGHTS
        if all(a in g["accuracy"].get(w, {}) and w not in g["one_class"] for g in (group, base))
    ]
    if not both:
        return [_entry("worst class and std over classes", "not judged: not evaluated alike", None, None, 0)]
    out = []
    for weights, attack in both:
        ours, theirs = (g["accuracy"][weights][attack] for g in (group, base))
        by_seed = same_seeds(group, base)
        seeds = difference(ours["worst"], theirs["worst"], by_seed)["n"]
        where = f"{WEIGHTS[weights]}, {attack_title(attack)}"
        if why := judged_unlike((ours, theirs)):
            names = (_worst_claim(where), _std_claim(where))
            out += [_entry(claim, f"not judged: {why}", None, None, seeds) for claim in names]
            continue
        told = where, seeds, by_seed, by_image.get((group["title"], weights, attack), {})
        found = [_worst(ours, theirs, *told), _std(ours, theirs, *told)]
        out += [_with_enough_images(entry, ours) for entry in found]
    return out


def _with_enough_images(entry: dict, accuracy: dict) -> dict:
    """By the smallest class; where its size is not kept, by what it is at most."""
    counts, smallest = [n for n in accuracy["images"] if n is not None], accuracy["smallest_class"]
    classes = sum(s["n"] > 0 for s in accuracy["per_class"])
    most = min(counts) // max(classes, 1) if counts else FEWEST
    if (most if smallest is None else smallest) >= FEWEST or entry["value"] is None:
        return entry
    words = f"{smallest} images in the smallest class" if smallest is not None else f"{most} images a class"
    return entry | {"measured": f"{entry['measured']}; not judged: {words}", "holds": None}


def _worst(ours: dict, theirs: dict, where: str, seeds: int, by_seed: bool, images: Mapping[str, Any]) -> dict:
    claim, gain = _worst_claim(where), difference(ours["worst"], theirs["worst"], by_seed)
    if gain["mean"] is None:
        return _entry(claim, "not judged: no value", None, None, seeds)
    error = "" if gain["std"] is None else f" ± {100 * gain['std']:.1f}"
    measured = f"{signed(100 * gain['mean'], 1)}{error} points"
    cost = difference(ours["average"], theirs["average"], by_seed)["mean"]
    if cost is not None:
        measured += f" (average over all images {signed(100 * cost, 1)})"
    each = [a - b for a, b in pairs(ours["worst"], theirs["worst"])] if by_seed else []
    apart = interval_of_difference(ours["worst"], theirs["worst"], paired=False)
    interval, over = _interval(each, images.get("worst"), apart)
    holds, words = verdict(gain["mean"], interval, WORST, below=False, over=over, alike=seeds > 1)
    return _entry(claim, measured + words, gain["mean"], holds, seeds)


def _std(ours: dict, theirs: dict, where: str, seeds: int, by_seed: bool, images: Mapping[str, Any]) -> dict:
    """The std falls where accuracy does, so that its change over the average is told as well."""
    claim, change = _std_claim(where), _change(ours["std"], theirs["std"], by_seed)
    if ours["std"]["mean"] is None or theirs["std"]["mean"] is None:
        return _entry(claim, "not judged: no value", None, None, seeds)
    if change is None:
        return _entry(claim, "not judged: the baseline's std is 0", None, None, seeds)
    measured = f"{signed(100 * change, 0)} %"
    relative = _change(ours["nstd"], theirs["nstd"], by_seed)
    if relative is not None:
        measured += f" (relative to the average {signed(100 * relative, 0)} %)"
    each = [a / b - 1 for a, b in pairs(ours["std"], theirs["std"]) if b] if by_seed else []
    ratio = interval_of_ratio(ours["std"], theirs["std"])
    interval, over = _interval(each, images.get("std"), ratio and (ratio[0] - 1, ratio[1] - 1))
    holds, words = verdict(change, interval, STD, below=True, over=over, alike=seeds > 1)
    return _entry(claim, measured + words, change, holds, seeds)


def _change(ours: dict, theirs: dict, by_seed: bool) -> float | None:
    """ours / theirs - 1 of means: over the seeds that both have, where they pair; None where there is nothing to
    divide by."""
    both = pairs(ours, theirs) if by_seed else []
    means = [statistics.fmean(values) for values in zip(*both, strict=True)] or [ours["mean"], theirs["mean"]]
    return means[0] / means[1] - 1 if means[0] is not None and means[1] else None


def _interval(
    each: Sequence[float], images: Sequence[float] | None, apart: Sequence[float] | None, exact: bool = False
) -> tuple[Sequence[float] | None, str]:
    """The 95 % interval that judges a claim, and what it is over: seeds; where those are fewer than two, the images
    that both were judged on; where seeds do not pair, or are all alike, that of the two sides."""
    if (over_seeds := mean_interval(each, exact)) is not None:
        return over_seeds, ""
    if images is not None:
        return images, " over images, in pairs,"
    return apart, " of both sides," if len(each) > 1 else " of runs that do not pair,"


def _worst_claim(where: str) -> str:
    return f"worst class +{100 * WORST:.1f} points ({where})"


def _std_claim(where: str) -> str:
    return f"std over classes −{-100 * STD:.0f} % ({where})"


def _entry(claim: str, measured: str, value: float | None, holds: bool | None, seeds: int) -> dict:
    return {"claim": claim, "measured": measured, "value": value, "holds": holds, "seeds": seeds}
