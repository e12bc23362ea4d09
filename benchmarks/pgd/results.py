"""From the run folders of several seeds to one table, and to the verdicts that the report has on them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ham_kernels.report import Run
from ham_kernels.report.comparing.over_seeds import spread
from ham_kernels.report.text_format import mean_std
from pgd.competitors import ATTACKS, BASE, FOREIGN, TITLES

WEIGHTS = {"ema": "ema", "raw": "last"}  # in the table: in a run folder
MEASURES = {"robust": "accuracy", "worst": "worst_class", "std": "std"}


def predicted_ratio(h: float, steps: int, screen_steps: int) -> float:
    """Cost model, in forwards of a full batch: HAM 2M + 1 + 2h(K-M) + 3h against PGD-AT 2K + 3."""
    return (2 * screen_steps + 1 + h * (2 * (steps - screen_steps) + 3)) / (2 * steps + 3)


def table_of(runs: Mapping[str, Sequence[Run]], warmup: int, steps: int, screen_steps: int) -> dict[str, dict]:
    """{method: {quantity: [value per seed]}}. The phase is the epochs after the warm-up, whose time counts in each."""
    table: dict[str, dict] = {}
    for name, own in runs.items():
        columns = table[name] = {}
        for run, base in zip(own, runs[BASE], strict=True):
            phase_s, base_s = (sum(e.seconds for e in r.epochs[warmup:]) for r in (run, base))
            h = statistics.fmean(e.hard_fraction for e in run.epochs[warmup:])
            predicted = 1.0 if name in (BASE, FOREIGN) else predicted_ratio(h, steps, screen_steps)
            row = {
                "phase_s": phase_s,
                "whole_s": run.seconds,
                "phase_ratio": phase_s / base_s,
                "whole_ratio": run.seconds / base.seconds,
                "h": h,
                "predicted_ratio": predicted,
                "measured_over_predicted": phase_s / base_s / predicted,
            }
            for weights, file in WEIGHTS.items():
                judged = run.evaluations[file].attacks
                row[f"{weights}_clean"] = judged["clean"].accuracy.value
                for attack in ATTACKS:
                    for key, measure in MEASURES.items():
                        row[f"{weights}_{attack}_{key}"] = getattr(judged[attack], measure).value
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
    return table


ROWS = [  # key, title, scale, digits
    ("phase_s", "phase time, s", 1, 1),
    ("phase_ratio", "phase time / PGD-AT", 1, 2),
    ("h", "hard fraction h", 1, 2),
    ("predicted_ratio", "predicted from h", 1, 2),
    ("measured_over_predicted", "measured / predicted", 1, 2),
    ("whole_s", "whole run, s", 1, 1),
    ("whole_ratio", "whole run / PGD-AT", 1, 2),
]
for _weights in WEIGHTS:
    ROWS.append((f"{_weights}_clean", f"clean %, {_weights}", 100, 1))
    ROWS += [
        (f"{_weights}_{_attack}_{key}", f"{_title} {label}, {_weights}", 100, 1)
        for _attack, _title in ATTACKS.items()
        for key, label in (("robust", "%"), ("worst", "worst class %"), ("std", "class std, points"))
    ]


def cells(table: Mapping[str, dict]) -> list[list[str]]:
    """Header and rows of the table as text."""
    head = ["", *(TITLES[name] for name in table)]
    rows = [[label, *(_told(columns[key], *how) for columns in table.values())] for key, label, *how in ROWS]
    return [head, *rows]


def _told(values: Sequence[float], scale: float = 1, digits: int = 2) -> str:
    """Mean and standard deviation over seeds; of one seed its value."""
    return "".join(mean_std(spread(values), scale, digits))


MINING = "mining epochs alone"


def claims_on_ham(section: Mapping[str, Any], table: Mapping[str, dict]) -> list[dict[str, Any]]:
    """The report's, with the cost model's word beside the time of the mining epochs."""
    predicted = statistics.fmean(table["ham"]["predicted_ratio"]) - 1
    found = [claim for claim in section["claims"] if claim["group"] == TITLES["ham"]]
    for claim in found:
        if MINING in claim["claim"]:
            claim["measured"] += f" (cost model from h: {100 * predicted:+.0f} %)".replace("-", "−")
    return found


VERDICTS = {True: ": **holds here**", False: ": **does not hold here**", None: ""}


def verdict_lines(result: Mapping[str, Any]) -> list[str]:
    """The lines under the table: a verdict on each claim, our loop against torchattacks', and the overhead."""
    lines = [f"{c['claim']}: {c['measured']}{VERDICTS[c['holds']]}" for c in result["claims"]]
    table, extra = result["table"], result["overhead"]
    if FOREIGN in table:
        ours = _told([1 / ratio for ratio in table[FOREIGN]["phase_ratio"]])
        lines.append(
            f"our PGD-AT takes {ours} of the torchattacks loop's time (both in this process, where our engine keeps "
            "freed memory for everybody)"
        )
    lines.append(f"outside the model's forward and backward: {extra['share']:.1%} of a PGD-AT step ({extra['how']})")
    return lines
