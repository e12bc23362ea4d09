"""The tables of the frontier's page."""

from __future__ import annotations

from typing import Any

from ..comparing.frontier import COSTS
from ..comparing.over_seeds import half
from ..text_format import MANY_CLASSES, NONE, attack_title, duration, shortened, signed
from .columns import SHORT
from .table import Cell, Table

FEW = 2  # of the methods that dominate one


def frontier_table(section: dict[str, Any]) -> Table:
    """One row per method: accuracies, costs, what dominates it, and its checks for gradient masking."""
    found, groups = section["frontier"], {g["title"]: g for g in section["groups"]}
    methods, span = found["methods"], f"{attack_title(found['attack'])}, %"
    shares = ["average", "worst", "worst_three", "std"]
    shares = [name for name in shares if any(m.get(name, {}).get("mean") is not None for m in methods)]
    words = {"average": "avg", "worst": "worst", "worst_three": "worst 3", "std": "std"}
    base = section["baseline"] if any(m["baseline"] for m in methods) else None
    relative = [(f"relative_{cost}", f"/ {base}") for cost in COSTS] if base else []
    head = [("", "Method"), *((span, words[name]) for name in shares)]
    head += [("Training", "CPU time" if found["clock"] == "cpu_time" else "time")]
    tuned = any(m.get("own_time", m["time"]) != m["time"] for m in methods)
    head += [("Training", words) for _, words in relative[:1]] + [("Training", "fine-tuning alone")] * tuned
    head += [("Forwards", "a step")]
    head += [("Forwards", words) for _, words in relative[1:]]
    head += [("Dominated", "by time"), ("Dominated", "by forwards"), ("", "Masking checks")]
    table = Table(head, caption=_caption(section, methods))
    for number, m in enumerate(methods, 1):
        row = [Cell(f"{number} {m['title']}", words=True), *(_share(m[name]) for name in shares)]
        row += [Cell(duration(m["time"]["mean"]))] + [_ratio(m["relative_time"])] * bool(base)
        if tuned:
            row.append(Cell(duration(m["own_time"]["mean"]) if m["own_time"] != m["time"] else NONE))
        row += [_number(m["step_forwards"]["mean"], 1)] + [_ratio(m["relative_forwards"])] * bool(base)
        row += [_dominated(m, cost) for cost in COSTS]
        table.rows.append([*row, _masking(groups[m["title"]]["masking"])])
    return table


def frontier_article(section: dict[str, Any], number: int = 1) -> Table:
    """The columns of `frontier_table` that fit an article's page."""
    whole = frontier_table(section)
    kept = [
        i for i, (_, name) in enumerate(whole.head) if name in ("Method", "avg", "worst", "std") or name[:2] == "/ "
    ]
    head = [(span, shortened(name, SHORT + 2)) for span, name in whole.head]
    table = Table([head[i] for i in kept], [[row[i] for i in kept] for row in whole.rows], whole.caption)
    table.label = "tab:frontier" + (f"-{number}" if number > 1 else "")
    return table


def class_table(section: dict[str, Any]) -> Table:
    """What each class gains or loses against the baseline, in points; no rows where the classes are many."""
    table = Table([("", "Method"), *(("", name) for name in section["classes"])])
    if len(section["classes"]) <= MANY_CLASSES:
        for m in section["frontier"]["methods"]:
            if m["changes"]:
                table.rows.append([Cell(m["title"]), *(_change(change) for change in m["changes"])])
    table.caption = (
        f"Points that each class gains over {section['baseline']} under {attack_title(section['attack'])}, ± half the "
        "95 % interval: of the differences seed by seed, with one seed each over test images."
    )
    return table


def _caption(section: dict, methods: list[dict]) -> str:
    seeds = sorted({m["seeds"] for m in methods})
    told = "one seed" if seeds == [1] else f"{' to '.join(str(n) for n in sorted({seeds[0], seeds[-1]}))} seeds"
    over = "over test images" if seeds == [1] else "of the mean over seeds (of one seed over test images)"
    return f"{section['title']}; {told}; ± half the 95 % interval {over}; of an uneven one its longer side."


def _share(value: dict) -> Cell:
    return _with_half(value, f"{100 * value['mean']:.1f}" if value["mean"] is not None else NONE)


def _change(value: dict) -> Cell:
    if value["mean"] is None:
        return Cell(NONE)
    return _with_half(value, signed(100 * value["mean"], 1))


def _with_half(value: dict, text: str) -> Cell:
    if None in (value["mean"], value["low"], value["high"]):
        return Cell(text)
    return Cell(text, f" ± {100 * half(value):.1f}")


def _ratio(value: float | None) -> Cell:
    return _number(value, 2)


def _number(value: float | None, digits: int) -> Cell:
    return Cell(NONE if value is None else f"{value:.{digits}f}")


def _dominated(method: dict, cost: str) -> Cell:
    """The first few of those on the frontier that dominate it; data.json has all."""
    by = method["dominated_by"][cost]
    if method[cost]["mean"] is None:
        return Cell(NONE, words=True)
    if not by:
        return Cell("no", best=True, words=True)
    chance = {True: "", False: " (within chance)", None: " (chance unknown)"}
    told = [one["title"] + chance[one["clear"]] for one in by]
    more = [f"{len(told) - FEW} more"] if len(told) > FEW else []
    return Cell("; ".join([*told[:FEW], *more]), words=True)


def _masking(checks: list[dict]) -> Cell:
    """What was run, and found."""
    run = [check for check in checks if check["runs"]]
    bad = [f"{c['check']} ({len(c['suspicious'])} of {c['runs']} runs)" for c in run if c["suspicious"]]
    if not run:
        text = "not run"
    elif bad:
        text = f"{len(bad)} of {len(run)} suspicious: {'; '.join(bad)}"
    else:
        text = f"{len(run)} run, passed"
    return Cell(text, words=True)
