"""Questions that HAM's paper leaves open, answered by the kept report of `ham sweep methods` and `ablations`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ham_kernels.report.comparing.over_seeds import mean_interval
from ham_kernels.report.text_format import attack_title
from readme import measured
from readme.output import markdown

SWEEP, LATER = "sweep_methods_digits", "sweep_fair_digits"  # of the same images and baseline
PARTS = {
    "HAM, no early drop": "reweighting alone",
    "HAM, no reweighting": "early dropping alone",
    "HAM": "both: HAM",
    "HAM, random rows": "HAM, but as many rows at random",
}
COMPARED = ("HAM", "fair, fast, 58 epochs")


def questions(here: Path) -> str:
    data = measured.read(f"{SWEEP}/data.json")
    (section,) = data["sections"]
    later = measured.read(f"{LATER}/data.json")
    groups = {g["title"]: g for of in (later, data) for g in of["sections"][0]["groups"]}
    attack = section["frontier"]["attack"]
    shown = [title for title in PARTS if title in groups and attack in groups[title]["accuracy"]["ema"]]
    said = (
        f"{section['dataset']}, ε {section['eps']:.3g}, {attack_title(attack)}, {_seeds(groups, shown)} seeds, "
        f"± half the 95 % interval of a difference, seed by seed; {measured.machines_of(data, later)}."
    )
    return "\n\n".join([said, _of_parts(groups, attack, shown), _of_classes(section, groups, attack)])


def _seeds(groups: dict, shown: list[str]) -> str:
    counts = {len(groups[title]["seeds"]) for title in ("PGD-AT", *shown)}
    return " to ".join(str(n) for n in sorted({min(counts), max(counts)}))


def _values(group: dict, attack: str, measure: str) -> dict[int, float]:
    """{seed: value in %}."""
    return dict(
        zip(group["seeds"], (100 * v for v in group["accuracy"]["ema"][attack][measure]["values"]), strict=True)
    )


def difference(group: dict, base: dict, attack: str, measure: str) -> str:
    ours, theirs = _values(group, attack, measure), _values(base, attack, measure)
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    interval = mean_interval(differences)
    half = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.1f}"
    return measured.minus(f"{np.mean(differences):+.1f}{half}")


def _of_parts(groups: dict, attack: str, shown: list[str]) -> str:
    rows = [["against PGD-AT, points", "average", "worst class", "std over classes", "forwards / PGD-AT"]]
    base = groups["PGD-AT"]
    for title in shown:
        cost = groups[title]["forwards"]["mean"] / base["forwards"]["mean"]
        told = [difference(groups[title], base, attack, m) for m in ("average", "worst", "std")]
        rows.append([PARTS[title], *told, f"{cost:.2f}"])
    return markdown(rows)


def _of_classes(section: dict, groups: dict, attack: str) -> str:
    """Each class: how robust, how over-confident, and what methods change; then how these hang together."""
    robust = {t: _per_class(groups[t], attack) for t in ("PGD-AT", *COMPARED) if t in groups}
    sure = {t: _over_confident(groups[t]) for t in robust}
    told = [t for t in robust if sure[t] is not None]
    head = ["class", "PGD-AT, robust %"]
    head += [f"change by {t}" for t in COMPARED if t in robust] + [f"over-confident %, {t}" for t in told]
    rows = [head]
    for i, label in enumerate(section["classes"]):
        changes = [measured.minus(f"{robust[t][i] - robust['PGD-AT'][i]:+.1f}") for t in COMPARED if t in robust]
        rows.append([str(label), f"{robust['PGD-AT'][i]:.1f}", *changes, *(f"{sure[t][i]:.1f}" for t in told)])
    lines = [
        f"- {t}: rank correlation over classes of over-confidence and robustness {_correlation(sure[t], robust[t])}"
        for t in told
    ]
    if "PGD-AT" in told:
        lines += [
            f"- rank correlation over classes of PGD-AT's over-confidence and the change by {t} "
            f"{_correlation(sure['PGD-AT'], robust[t] - robust['PGD-AT'])}"
            for t in COMPARED
            if t in robust
        ]
    return "\n\n".join([markdown(rows), measured.minus("\n".join(lines))])


def _per_class(group: dict[str, Any], attack: str) -> np.ndarray:
    return np.array([100 * c["mean"] for c in group["accuracy"]["ema"][attack]["per_class"]])


def _over_confident(group: dict[str, Any]) -> np.ndarray | None:
    found = group["confidence"]
    return None if found is None else np.array([100 * c["mean"] for c in found["overconfident"]])


def _correlation(a: np.ndarray, b: np.ndarray) -> str:
    """Spearman's, of ranks."""
    alike = np.ptp(a) == 0 or np.ptp(b) == 0
    return "not defined, all are alike" if alike else f"{spearmanr(a, b).statistic:+.2f}"
