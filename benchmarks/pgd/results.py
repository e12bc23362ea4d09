"""From the runs of several seeds to one table, one verdict per claim, a JSON file and a figure."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np

from ham_kernels.report.comparing.claims import STD, TIME, WORST, verdict
from pgd.arms import TITLES

WEIGHTS = {"ema": "weight average", "raw": "raw weights"}
# The paper's attack, and one that does not depend on the scale of the logits, which reweighting changes.
ATTACKS = {"pgd20": "PGD-20", "cw20": "CW-20"}


def predicted_ratio(h: float, steps: int, screen_steps: int) -> float:
    """Cost model, in forwards of a full batch: HAM 2M + 1 + 2h(K-M) + 3h against PGD-AT 2K + 3."""
    return (2 * screen_steps + 1 + h * (2 * (steps - screen_steps) + 3)) / (2 * steps + 3)


def summarise(seeds: list[dict], steps: int, screen_steps: int) -> dict:
    """{method: {quantity: [value per seed]}}; a seed is {"warm_up_s", "arms": {name: {"epochs", "raw", "ema"}}}."""
    table: dict[str, dict] = {}
    for seed in seeds:
        base_s = sum(e["seconds"] for e in seed["arms"]["pgd_at"]["epochs"])
        for name, arm in seed["arms"].items():
            phase_s = sum(e["seconds"] for e in arm["epochs"])
            h = sum(e["n_hard"] for e in arm["epochs"]) / sum(e["n"] for e in arm["epochs"])
            predicted = predicted_ratio(h, steps, screen_steps) if name in ("ham", "ham_frozen_bn", "random") else 1.0
            row = {
                "phase_s": phase_s,
                "whole_s": phase_s + seed["warm_up_s"],
                "phase_ratio": phase_s / base_s,
                "whole_ratio": (phase_s + seed["warm_up_s"]) / (base_s + seed["warm_up_s"]),
                "h": h,
                "predicted_ratio": predicted,
                "measured_over_predicted": phase_s / base_s / predicted,
            }
            for weights in WEIGHTS:
                row[f"{weights}_clean"] = arm[weights]["clean"]["accuracy"]
                for attack in ATTACKS:
                    judged = arm[weights][attack]
                    row |= {
                        f"{weights}_{attack}_robust": judged["accuracy"],
                        f"{weights}_{attack}_worst": judged["worst_class"],
                        f"{weights}_{attack}_std": judged["std"],
                    }
            for key, value in row.items():
                table.setdefault(name, {}).setdefault(key, []).append(value)
    return table


def spread(values: list[float]) -> float:
    """Sample standard deviation over seeds; 0 for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


ROWS = [
    ("phase_s", "phase time, s", "{:.1f} ± {:.1f}", 1),
    ("phase_ratio", "phase time / PGD-AT", "{:.2f} ± {:.2f}", 1),
    ("h", "hard fraction h", "{:.2f} ± {:.2f}", 1),
    ("predicted_ratio", "predicted from h", "{:.2f} ± {:.2f}", 1),
    ("measured_over_predicted", "measured / predicted", "{:.2f} ± {:.2f}", 1),
    ("whole_s", "whole run, s", "{:.1f} ± {:.1f}", 1),
    ("whole_ratio", "whole run / PGD-AT", "{:.2f} ± {:.2f}", 1),
]
for _weights in WEIGHTS:
    ROWS.append((f"{_weights}_clean", f"clean %, {_weights}", "{:.1f} ± {:.1f}", 100))
    ROWS += [
        (f"{_weights}_{_attack}_{key}", f"{_title} {label}, {_weights}", "{:.1f} ± {:.1f}", 100)
        for _attack, _title in ATTACKS.items()
        for key, label in (("robust", "%"), ("worst", "worst class %"), ("std", "class std, points"))
    ]


def cells(table: dict) -> list[list[str]]:
    """Header and rows of the table as text."""
    out = [["", *(TITLES[name] for name in table)]]
    for key, label, form, scale in ROWS:
        row = [label]
        for columns in table.values():
            values = [v * scale for v in columns[key]]
            row.append(form.format(statistics.mean(values), spread(values)))
        out.append(row)
    return out


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in body])


def claims(table: dict) -> list[dict]:
    """One line per claim: what the paper says, what was measured, whether it holds; the first is of time.

    holds is None where the claimed number lies in the 95 % interval of the mean over seeds.
    """
    ham, base = table["ham"], table["pgd_at"]
    mean = statistics.mean
    phase, whole = mean(ham["phase_ratio"]) - 1, mean(ham["whole_ratio"]) - 1
    model = f" (cost model from h: {100 * (mean(ham['predicted_ratio']) - 1):+.0f} %)"
    out = [
        _claim(f"training time -45 %, {where}", f"{100 * change:+.0f} %{more}",
               verdict(change, [ratio - 1 for ratio in ham[key]], TIME, below=True))
        for where, key, change, more in (
            ("mining epochs alone", "phase_ratio", phase, model), ("whole run", "whole_ratio", whole, ""),
        )
    ]  # fmt: skip
    for weights, label in WEIGHTS.items():
        for attack, title in ATTACKS.items():
            stem, where = f"{weights}_{attack}", f"({label}, {title})"
            gain = [a - b for a, b in zip(ham[f"{stem}_worst"], base[f"{stem}_worst"], strict=True)]
            cost = mean(ham[f"{stem}_robust"]) - mean(base[f"{stem}_robust"])
            words = f"{100 * mean(gain):+.1f} ± {100 * spread(gain):.1f} points "
            words += f"(average over all images {100 * cost:+.1f})"
            out.append(_claim(f"worst class +3.2 points {where}", words, verdict(mean(gain), gain, WORST, below=False)))
            out.append(_claim(f"std over classes -22 % {where}", *_std(ham[f"{stem}_std"], base[f"{stem}_std"])))
    return out


def _std(ours: list[float], theirs: list[float]) -> tuple[str, tuple[bool | None, str]]:
    if not any(theirs):  # PGD-AT fails all classes alike
        return "no ratio, PGD-AT's is 0", (False, "")
    change = statistics.mean(ours) / statistics.mean(theirs) - 1
    each = [a / b - 1 for a, b in zip(ours, theirs, strict=True) if b]
    return f"{100 * change:+.0f} %", verdict(change, each, STD, below=True)


def _claim(claim: str, measured: str, judged: tuple[bool | None, str]) -> dict:
    holds, words = judged
    return {"claim": claim, "measured": measured + words, "holds": holds}


VERDICTS = {True: ": **holds here**", False: ": **does not hold here**", None: ""}


def verdict_lines(result: dict) -> list[str]:
    """The lines under the table: a verdict on each claim, our loop against torchattacks', and the overhead."""
    lines = [f"{c['claim']}: {c['measured']}{VERDICTS[c['holds']]}" for c in result["claims"]]
    table, extra = result["table"], result["overhead"]
    if "torchattacks" in table:
        ratios = [1 / r for r in table["torchattacks"]["phase_ratio"]]
        lines.append(
            f"our PGD-AT takes {statistics.mean(ratios):.2f} ± {spread(ratios):.2f} of the torchattacks loop's time "
            "(both in this process, where our engine keeps freed memory for everybody)"
        )
    lines.append(f"outside the model's forward and backward: {extra['share']:.1%} of a PGD-AT step ({extra['how']})")
    return lines


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def figure(path: Path, seeds: list[dict], classes: list[str], title: str) -> None:
    """Robust accuracy of each class, PGD-AT against HAM, weight average, mean and spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axis = plt.subplots(figsize=(max(6.0, 0.75 * len(classes) + 2), 4), layout="constrained")
    for offset, name, colour in ((-0.2, "pgd_at", "#8d99a6"), (0.2, "ham", "#d1495b")):
        runs = np.array([seed["arms"][name]["ema"]["pgd20"]["per_class"] for seed in seeds]) * 100
        mean = runs.mean(axis=0)
        error = runs.std(axis=0, ddof=1) if len(seeds) > 1 else None
        position = np.arange(len(classes)) + offset
        axis.bar(
            position, mean, 0.38, yerr=error, color=colour, error_kw={"lw": 0.8, "ecolor": "#333"}, label=TITLES[name]
        )
        axis.axhline(mean.min(), color=colour, lw=1, ls="--")
    axis.set_xticks(range(len(classes)), classes)
    axis.set(xlabel="class", ylabel="accuracy under PGD-20, %", ylim=(0, 100), title=title)
    axis.title.set_size(10)
    axis.legend(title="dashed: worst class", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)
