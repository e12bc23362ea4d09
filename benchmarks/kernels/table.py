"""From timed cases to goals held or missed, tables, and README's section."""

from __future__ import annotations

import math
from collections.abc import Callable

from readme.output import aligned, markdown

from kernels import cases as k

RATE_GOAL, RATE_FROM = 0.85, 64e6  # of the copy rate, from so many bytes on
LAUNCH_GOAL, NONZERO_GOAL = 1.5, 3.0
UNSTEADY = 0.2  # of the median, between the fastest and the slowest round


def us(row: dict, who: str, column: str) -> float:
    """Median; NaN where it was not measured."""
    return row["times"].get(who, {}).get(column, {}).get("median", math.nan)


def device_us(row: dict, who: str, *others: str) -> tuple[float, ...]:
    """Medians of several competitors in the first of graph and call that all of them have."""
    them = (who, *others)
    column = "graph" if all(us(row, w, "graph") > 0 for w in them) else "call"
    return tuple(us(row, w, column) for w in them)


def gb_per_s(row: dict, who: str) -> float:
    return row["traffic"] / device_us(row, who)[0] / 1e3


def copy_rate(result: dict) -> float:
    return gb_per_s(result["cases"][0], k.COPY)


def goals(result: dict) -> list[dict]:
    """[{"goal", "measured", "state": "held" | "missed" | "not measured"}]; the worst case of a goal decides.

    A judge gives (achieved over asked for, words): from 1 on a goal is held, and NaN is not measured.
    """

    def rate(row):
        share = gb_per_s(row, k.OURS) / copy_rate(result)
        ours, same = device_us(row, k.OURS, k.COPY)
        return share / RATE_GOAL, f"{share:.1%}, {same / ours:.1%} of the rate of a copy of its size"

    def launch(row):
        call, graph, host = (us(row, k.OURS, c) / us(row, k.EMPTY, c) for c in ("call", "graph", "host"))
        return LAUNCH_GOAL / call, f"{call:.2f} × by do_bench ({graph:.2f} × in a graph, {host:.2f} × for the host)"

    def cub(row):
        call, graph = (us(row, k.OURS, c) / us(row, k.CUB, c) for c in ("call", "graph"))
        both = max(call, graph) if call + graph > 0 else math.nan
        return 1 / both, f"{call:.2f} × CUB's time by do_bench, {graph:.2f} × in a graph"

    def nonzero(row):
        faster = us(row, k.NONZERO, "call") / us(row, k.OURS, "call")
        return faster / NONZERO_GOAL, f"{faster:.2f} × as fast"

    def linf(row):
        return row["op"] == "pgd_step" and row["name"].startswith("linf")

    judges = [
        (f"pgd_step (linf, >= {RATE_FROM / 1e6:.0f} MB) reaches {RATE_GOAL:.0%} of the copy rate", rate,
         lambda row: linf(row) and row["traffic"] >= RATE_FROM),
        (f"pgd_step (linf fp32 128x3x32x32) takes <= {LAUNCH_GOAL} × an empty launch", launch,
         lambda row: row["op"] == "pgd_step" and row["name"] == "linf fp32 128x3x32x32"),
        ("compact is no slower than CUB's DeviceSelect", cub, lambda row: row["op"] == "compact"),
        (f"compact is >= {NONZERO_GOAL:g} × as fast as torch.nonzero until the host knows the count", nonzero,
         lambda row: row["op"] == "compact_to_host"),
    ]  # fmt: skip
    return [{"goal": goal, **_verdict(result, judge, about)} for goal, judge, about in judges]


def _verdict(result: dict, judge: Callable, about: Callable[[dict], bool]) -> dict:
    if result["device"] != "cuda":
        return {"state": "not measured", "measured": "needs a GPU"}
    rows = [row for row in result["cases"] if about(row)]
    judged = [(*judge(row), row["name"]) for row in rows]
    known = [j for j in judged if not math.isnan(j[0])]
    if not known:
        reasons = [row["error"] or row["skipped"] or "; ".join(row["notes"].values()) for row in rows]
        return {"state": "not measured", "measured": next(filter(None, reasons), "no such case was run")}
    score, words, name = min(known)
    state = "missed" if score < 1 else "held" if len(known) == len(judged) else "not measured"
    missing = f"; {len(judged) - len(known)} of {len(judged)} sizes not measured" * (len(known) < len(judged))
    return {"state": state, "measured": f"{words} ({name}, the worst of {len(known)}){missing}"}


# ---------------------------------------------------------------- tables
def table(result: dict, op: str) -> str:
    """One line for each competitor of each case of an op, and what was left out and why."""
    rows = [row for row in result["cases"] if row["op"] == op]
    columns = [c for c in ("call", "graph", "host") if any(us(r, w, c) > 0 for r in rows for w in r["times"])]
    head = [op, *(text for c in columns for text in (f"{c} µs", "±")), "GB/s", "of copy rate", "time / ours"]
    lines, below = [head], []
    for row in rows:
        lines.append([row["name"], *[""] * (len(head) - 1)])
        for who, times in row["times"].items():
            ours, theirs = device_us(row, k.OURS, who)
            cells = [text for c in columns for text in _cells(times.get(c))]
            lines.append(
                [f"    {who}", *cells, *_rates(result, row, who), "" if math.isnan(ours) else f"{theirs / ours:.2f}"]
            )
        below += [f"{row['name']}: {who}: {note}" for who, note in row["notes"].items()]
        below += [f"{row['name']}: {row['skipped']}"] * bool(row["skipped"])
    return "\n".join([aligned(lines), *below])


def _cells(s: dict | None) -> list[str]:
    if s is None:
        return ["-", ""]
    return [f"{s['median']:,.2f}", f"{spread(s):.0%}"]


def _rates(result: dict, row: dict, who: str) -> list[str]:
    if row["to_host"] or who == k.EMPTY:
        return ["", ""]
    rate = gb_per_s(row, who)
    return [f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}", f"{rate / copy_rate(result):.1%}"]


def setup_line(result: dict) -> str:
    m = result["machine"]
    return (
        f"{m['gpu'] if result['device'] == 'cuda' else m['cpu'] + ' (no GPU: plain torch runs the ops)'}, "
        f"cores: {m['cores']}; Python {m['python']}, torch {m['torch']}, Triton {m['triton']}, CUDA {m['cuda']}; "
        f"commit {m['commit']}; {m['date']}. Copy rate {copy_rate(result):,.0f} GB/s, bytes read and written; "
        f"{unsteady(result)}."
    )


def spread(s: dict) -> float:
    return (s["highest"] - s["lowest"]) / s["median"]


def unsteady(result: dict) -> str:
    """How many of all times are worth little, since their rounds disagree."""
    times = [s for row in result["cases"] for columns in row["times"].values() for s in columns.values()]
    apart = sum(spread(s) > UNSTEADY for s in times)
    return f"{apart} of {len(times)} times differ by more than {UNSTEADY:.0%} between rounds"


def goal_lines(result: dict) -> list[str]:
    return [f"{g['goal']}: {g['state']}: {g['measured']}" for g in result["goals"]]


def readme_section(result: dict) -> str:
    """The headline cases as one Markdown table, with the machine above and the goals below."""
    head = ["op", "call, µs", "graph, µs", "GB/s", "of the copy rate", "eager torch", "torch.compile", "others"]
    lines = [head]
    for row in result["cases"]:
        if not (row["headline"] and k.OURS in row["times"]):
            continue
        cells = [_cells(row["times"][k.OURS].get(column))[0] for column in ("call", "graph")]
        versus = {}
        for who in row["times"]:
            ours, theirs = device_us(row, k.OURS, who)
            versus[who] = f"{theirs / ours:.1f}×"
        others = [f"{who} {versus[who]}" for who in (k.CUB, k.NONZERO, k.STATIC, k.UNIFORM) if who in versus]
        lines.append(
            [f"`{row['op']}` {row['name']}", *cells, *_rates(result, row, k.OURS),
             versus.get(k.EAGER, "-"), versus.get(k.COMPILED, "-"), ", ".join(others) or "-"]
        )  # fmt: skip
    what = (
        "*call* is Triton's do_bench, *graph* the time per call in a CUDA graph; compact_to_host is timed by the "
        "host's clock until it knows the count. The columns on the right are the competitor's time over ours."
    )
    return "\n\n".join([setup_line(result), markdown(lines), what, "\n".join(f"- {g}" for g in goal_lines(result))])
