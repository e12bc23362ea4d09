"""What else is known of a group's runs: curves of the epochs, confidence, easy examples, gradient masking."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..reading.evaluations import Easy
from ..reading.metrics import Epoch
from ..reading.runs import Run
from .groups import Group
from .over_seeds import spread


def curves(runs: Sequence[Run]) -> dict[str, Any]:
    """{"epoch": [...], name: {"mean", "low", "high"}}; names: loss, hard_fraction, seconds, val.ATTACK.MEASURE..."""
    logs = [{e.epoch: e for e in run.epochs} for run in runs]
    epochs = sorted({number for log in logs for number in log})
    values = [{number: _logged(e) for number, e in log.items()} for log in logs]
    logged = [next(log[number] for log in logs if number in log) for number in epochs]
    out: dict[str, Any] = {"epoch": epochs, "phase": [e.phase for e in logged], "mines": [e.mines for e in logged]}
    for name in dict.fromkeys(name for log in values for logged in log.values() for name in logged):
        points = [spread([log.get(number, {}).get(name) for log in values]) for number in epochs]
        if any(point["mean"] is not None for point in points):
            out[name] = {key: [point[key] for point in points] for key in ("mean", "low", "high")}
    return out


def _logged(epoch: Epoch) -> dict[str, float | None]:
    """By the names of the curves."""
    out = {"loss": epoch.loss, "hard_fraction": epoch.hard_fraction, "seconds": epoch.seconds}
    for val in ("val", "val_ema"):
        for attack, found in (getattr(epoch, val) or {}).items():
            out |= {f"{val}.{attack}.{measure}": value for measure, value in asdict(found).items()}
    return out


def confidence(parts: Sequence) -> dict[str, Any] | None:
    parts = [part for part in parts if part.edges == parts[0].edges]
    if not parts:
        return None
    first = parts[0]
    return {
        "edges": list(first.edges),
        "shares": [statistics.fmean(column) for column in zip(*(part.shares for part in parts), strict=True)],
        "threshold": first.threshold,
        "steps": first.steps,
        "part": first.part,
        "images": min(part.images for part in parts),
        "overconfident": [spread(column) for column in zip(*(part.overconfident for part in parts), strict=True)],
        "overconfident_all": spread([part.overconfident_all for part in parts]),
    }


def easy(parts: Sequence[Easy]) -> dict[str, Any] | None:
    by_m: dict[int, list] = {}
    for entry in (entry for part in parts for entry in part.by_m):
        by_m.setdefault(entry.m, []).append(entry)
    if not by_m:
        return None
    return {
        "steps": parts[0].steps,
        "by_m": [
            {
                "m": m,
                "easy_fraction": spread([entry.easy_fraction for entry in entries]),
                "stay_share": spread([entry.stay_share for entry in entries]),
            }
            for m, entries in sorted(by_m.items())
        ],
    }


def masking(group: Group) -> list[dict[str, Any]]:
    """One entry per check: for how many runs it was run, in which it was suspicious, and why; or why it was not run."""
    found: dict[str, dict[str, Any]] = {}
    for run in group.counted:
        evaluation = run.evaluations.get(group.weights)
        for check in evaluation.masking.checks if evaluation and evaluation.masking else ():
            title = check.title or check.name
            entry = found.setdefault(title, {"check": title, "runs": 0, "suspicious": [], "why": [], "not_run": []})
            if not check.values:
                entry["not_run"].append(check.why or "")
                continue
            entry["runs"] += 1
            if check.suspicious:
                entry["suspicious"].append(run.name)
                entry["why"].append(check.why or "")
    return list(found.values())
