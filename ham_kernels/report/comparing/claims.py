"""The paper's claims (arXiv 2308.01823) held against the groups of a section."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..reading.evaluations import WEIGHTS
from ..text_format import attack_title
from .comparable import same_images, unlike
from .over_seeds import difference, mean_interval

TIME, WORST, STD = -0.45, 0.032, -0.22  # share of the time, accuracy, share of the std over classes
ROUNDING = 1e-9  # a gain of exactly 3.2 points holds
FEWEST = 32  # images of a class: of fewer, one weighs more than the claim on the worst class
EASY_M, EASY_STAY = 3, 0.75  # of the examples that resist M = 3 steps, the share that resists to the end


EpochSeconds = Mapping[str, Sequence[Sequence[tuple[int, float | None]]]]  # {title: (epoch, seconds) of each run}


def claims(groups: Sequence[dict[str, Any]], attacks: Sequence[str], seconds: EpochSeconds) -> list[dict[str, Any]]:
    """For each group that mines hard rows: {"group", "claim", "measured", "value", "seeds", "holds"}.

    holds is None where it was not judged, or where the seeds leave open on which side of the claim the mean lies.
    """
    base = next((g for g in groups if g["baseline"]), None)
    if base is None or not base["is_pgd_at"]:
        return []
    out = []
    for group in (g for g in groups if g["mines_hard_rows"]):
        if group["finished"] and base["finished"]:
            found = [*_times(group, base, seconds), *_fairness(group, base, attacks)]
        else:
            found = [_entry("all", "not judged: training is not finished", None, None, 0)]
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
        claim = f"training time {100 * TIME:+.0f} %, {where}".replace("-", "−")
        ours, theirs = ([_total(run, epochs) for run in seconds[g["title"]]] for g in (group, base))
        if apart:
            why = ", ".join(f"{what} ({' and '.join(values)})" for what, values in apart.items())
            out.append(_entry(claim, f"not judged: trained unlike in {why}", None, None, seeds))
        elif None in ours or None in theirs or not sum(theirs):
            out.append(_entry(claim, "not judged: no training times of both", None, None, seeds))
        else:
            change = statistics.fmean(ours) / statistics.fmean(theirs) - 1
            each = [a / b - 1 for a, b in zip(ours, theirs, strict=True)] if same_seeds(group, base) else []
            holds, words = verdict(change, each, TIME, below=True)
            out.append(_entry(claim, _signed(100 * change, " %", 0) + words, change, holds, seeds))
    return out


def _total(run: Sequence, epochs: set[int] | None) -> float | None:
    """Seconds of these epochs (None: all); None where one of them is unknown, or there are none."""
    seconds = {epoch: s for epoch, s in run if epochs is None or epoch in epochs}
    known = bool(seconds) and None not in seconds.values() and (epochs is None or len(seconds) == len(epochs))
    return sum(seconds.values()) if known else None


def verdict(mean: float, each: Sequence[float], limit: float, below: bool) -> tuple[bool | None, str]:
    """(whether the claim holds, what to say of it): undecided where the 95 % interval over seeds contains the limit."""
    interval = mean_interval(each)
    if interval is not None and interval[0] < limit < interval[1]:
        low, high = (_signed(100 * end, "", 1) for end in interval)
        return None, f"; undecided: 95 % interval {low} to {high}"
    return (mean <= limit + ROUNDING if below else mean >= limit - ROUNDING), ""


def _fairness(group: dict, base: dict, attacks: Sequence[str]) -> list[dict]:
    """Worst class and std over classes, for each kind of weights and each attack that both were judged with.

    A method that changes the scale of the logits can gain under one attack and lose under another.
    """
    both = [(w, a) for a in attacks for w in WEIGHTS if all(a in g["accuracy"].get(w, {}) for g in (group, base))]
    if not both:
        return [_entry("worst class and std over classes", "not judged: not evaluated alike", None, None, 0)]
    out = []
    for weights, attack in both:
        ours, theirs = (g["accuracy"][weights][attack] for g in (group, base))
        seeds = min(ours["worst"]["n"], theirs["worst"]["n"])
        paired = same_seeds(group, base)
        gain = difference(ours["worst"], theirs["worst"], paired)
        where = f"{WEIGHTS[weights]}, {attack_title(attack)}"
        if not same_images((ours, theirs)):
            why = f"not judged: on {_counts(ours)} images against {_counts(theirs)} of the baseline"
            out += [_entry(claim, why, None, None, seeds) for claim in (_worst_claim(where), _std_claim(where))]
            continue
        found = [_worst(gain, ours, theirs, where, seeds, paired), _std(ours, theirs, where, seeds, paired)]
        out += [_with_enough_images(entry, ours) for entry in found]
    return out


def _with_enough_images(entry: dict, accuracy: dict) -> dict:
    counts = [n for n in accuracy["images"] if n is not None]
    each = min(counts, default=0) // max(len(accuracy["per_class"]), 1)
    if each >= FEWEST or not counts or entry["holds"] is None:
        return entry
    return entry | {"measured": f"{entry['measured']}; not judged: {each} images a class", "holds": None}


def _worst(gain: dict, ours: dict, theirs: dict, where: str, seeds: int, paired: bool) -> dict:
    claim = _worst_claim(where)
    if gain["mean"] is None:
        return _entry(claim, "not judged: no value", None, None, seeds)
    error = "" if gain["std"] is None else f" ± {100 * gain['std']:.1f}"
    measured = _signed(100 * gain["mean"], f"{error} points", 1)
    if ours["average"]["mean"] is not None and theirs["average"]["mean"] is not None:
        cost = ours["average"]["mean"] - theirs["average"]["mean"]
        measured += f" (average over all images {_signed(100 * cost, '', 1)})"
    each = [a - b for a, b in _pairs(ours["worst"], theirs["worst"], paired)]
    holds, words = verdict(gain["mean"], each, WORST, below=False)
    return _entry(claim, measured + words, gain["mean"], holds, seeds)


def _std(ours: dict, theirs: dict, where: str, seeds: int, paired: bool) -> dict:
    """The std falls where accuracy does, so that its change over the average is told as well."""
    claim = _std_claim(where)
    if ours["std"]["mean"] is None or theirs["std"]["mean"] is None:
        return _entry(claim, "not judged: no value", None, None, seeds)
    if theirs["std"]["mean"] == 0:
        return _entry(claim, "not judged: the baseline's std is 0", None, None, seeds)
    change = ours["std"]["mean"] / theirs["std"]["mean"] - 1
    measured = _signed(100 * change, " %", 0)
    if ours["nstd"]["mean"] is not None and theirs["nstd"]["mean"]:
        relative = ours["nstd"]["mean"] / theirs["nstd"]["mean"] - 1
        measured += f" (relative to the average {_signed(100 * relative, ' %', 0)})"
    each = [a / b - 1 for a, b in _pairs(ours["std"], theirs["std"], paired) if b]
    holds, words = verdict(change, each, STD, below=True)
    return _entry(claim, measured + words, change, holds, seeds)


def _pairs(ours: dict, theirs: dict, paired: bool) -> list[tuple[float, float]]:
    pairs = zip(ours["values"], theirs["values"], strict=True) if paired else ()
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _worst_claim(where: str) -> str:
    return f"worst class +{100 * WORST:.1f} points ({where})"


def _std_claim(where: str) -> str:
    return f"std over classes −{-100 * STD:.0f} % ({where})"


def _counts(accuracy: dict) -> str:
    return ", ".join("unknown" if n is None else str(n) for n in accuracy["images"])


def _entry(claim: str, measured: str, value: float | None, holds: bool | None, seeds: int) -> dict:
    return {"claim": claim, "measured": measured, "value": value, "holds": holds, "seeds": seeds}


def _signed(value: float, unit: str, digits: int) -> str:
    return f"{value:+.{digits}f}{unit}".replace("-", "−")
