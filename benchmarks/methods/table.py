"""What follows from the times of bench_methods.py, its goals, and its section of docs/results.md."""

from __future__ import annotations

import statistics

from readme.output import markdown
from training.floor import paired
from training.steps import K, M
from training.table import digits, verdict

from .steps import LOOP, LOOPS, PGD_AT, TITLES, base_of, cost_of, title

OVER_LEAN = 1.10  # at most, every method
FASTER = {"trades": 1.3, "wat": 1.8, "fsr": 1.8, "bat": 1.8, "faal": 1.3}  # than the loop, at least
WHERE = "small_cnn, batch 128, on a CPU"


def derive(case: dict, wrong: dict[str, str]) -> None:
    """Adds to each lane of a case what follows from its seconds; ratios are medians of those within a round.

    A method whose results differ from the loop's is not said to be faster.
    """
    lanes = {lane["arm"]: lane for lane in case["lanes"]}
    base = lanes.get(PGD_AT)
    for name, lane in lanes.items():
        seconds = [s for s in lane["seconds"] if s is not None]
        lane |= {"median_s": statistics.median(seconds), "lowest_s": min(seconds), "highest_s": max(seconds)}
        lane["forwards"], lane["wrong"] = cost_of(name, lane["h"]), wrong.get(base_of(name))
        theirs = lanes.get(base_of(name) + LOOP)
        lane["speed_up"] = lane["over_lean"] = None
        if not name.endswith(LOOP):
            if theirs and not lane["wrong"]:
                lane["speed_up"] = paired(theirs["seconds"], lane["seconds"])
            ratio = paired(lane["seconds"], base["seconds"]) if base else None
            lane["over_lean"] = ratio and ratio / (lane["forwards"] / cost_of(PGD_AT))


def judge(result: dict) -> list[dict]:
    """Each goal with what was measured, and its state: "held", "missed" or "not measured here", and then why."""
    case, device = result["case"], result["device"]
    lanes = {lane["arm"]: lane for lane in case["lanes"]}
    wanted = [(arm, "over_lean", OVER_LEAN) for arm in TITLES if arm != PGD_AT]
    wanted += [(arm, "speed_up", limit) for arm, limit in FASTER.items()]
    out = []
    for arm, figure, limit in wanted:
        goal = (
            f"{title(arm)} within {limit:.2f} × its lean cost" if figure == "over_lean"
            else f"{title(arm)} ≥ {limit:g} × faster than the authors' way"
        )  # fmt: skip
        value, why = lanes.get(arm, {}).get(figure), ""
        if (device["type"], case["model"], case["batch_size"]) != ("cpu", "small_cnn", 128):
            why = f"goals are for {WHERE}"
        elif value is None:
            parties = (arm, arm + LOOP if figure == "speed_up" else PGD_AT)
            said = case["left_out"] | {name: f"wrong results: {text}" for name, text in result["wrong"].items()}
            why = next((said[p] for p in parties if p in said), "not all its arms ran")
        held = not why and (value <= limit if figure == "over_lean" else value >= limit)
        state = "not measured here" if why else "held" if held else "missed"
        measured = "" if why else f"{value:.2f} ×"
        out.append({"goal": goal, "measured": measured, "state": state, "why": why})
    return out


# ------------------------------------------------------------ tables
def cells(case: dict) -> list[list[str]]:
    """Header, and one row per method of ours, plain or screened."""

    def figure(value: float | None, form: str = "{:.2f}") -> str:
        return "–" if value is None else form.format(value)

    def time_of(lane: dict | None) -> list[str]:
        if lane is None:
            return ["–", "–"]
        low, high = (digits(1e3 * lane[key]) for key in ("lowest_s", "highest_s"))
        return [digits(1e3 * lane["median_s"]), f"{low} to {high}"]

    lanes = {lane["arm"]: lane for lane in case["lanes"]}
    head = [
        f"{case['model']}, batch {case['batch_size']}", "ms, ours", "lowest to highest", "ms, authors' way",
        "lowest to highest", "× faster", "forwards, lean", "authors' way", "measured / lean",
    ]  # fmt: skip
    rows = []
    for name, lane in lanes.items():
        if name.endswith(LOOP):
            continue
        base = base_of(name)
        theirs = lanes.get(base + LOOP)
        rows.append([
            title(name) + (" (WRONG RESULTS)" if lane["wrong"] else ""), *time_of(lane), *time_of(theirs),
            figure(lane["speed_up"]), figure(lane["forwards"], "{:.4g}"),
            figure(theirs and theirs["forwards"], "{:.4g}"), figure(lane["over_lean"]),
        ])  # fmt: skip
    return [head, *rows]


def notes(result: dict) -> list[str]:
    """What the table does not say: arms left out, and where the authors' code and our methods differ."""
    out = [f"left out: {title(name)}: {why}" for name, why in result["case"]["left_out"].items()]
    for name, why in result["unchecked"].items():
        out.append(f"results not compared: {title(name)}: {why}")
    there = {lane["arm"] for lane in result["case"]["lanes"]}
    for name, loop in LOOPS.items():
        if loop.differs and name + LOOP in there:
            out.append(f"{title(name)}, the authors' code: {'; '.join(loop.differs)}")
    return out


def setup(result: dict) -> str:
    """How it was measured, and what the columns mean."""
    s = result["settings"]
    return (
        f"One training step, K {K}, fp32, {s['images']}. All arms in turn in one process, {s['rounds']} rounds: "
        f"medians, lowest and highest of {'CPU time' if s['cpu_time'] else 'time'} (load average before: "
        f"{s['load']:.1f}). Ratios are medians of the ratios within a round. Ours is `Trainer` without engine options; "
        "the authors' way is an ordinary loop of ours that makes the passes which the authors' published code makes. "
        "Learning is frozen (learning rate 0, BatchNorm momentum 0); class statistics act. Lean: forwards of a full "
        "batch where nothing is computed twice (a backward to the input counts 1, one of an update 2). Measured / "
        "lean: (time / time of our PGD-AT) / (forwards / forwards of PGD-AT). HAM's screening: `early_drop=True, "
        f'easy="jump"`, M {M}, {s["hard"]:.0%} of the rows hard, against the same loop. WAT\'s pass over held-out '
        "images after each epoch is no part of a step. Before, both ways make three updates with the same starts, "
        "the loops with our definitions of what differs (list below); a method whose losses are others is marked. The "
        "process keeps freed memory "
        f"for our arms and returns it to the system for the others. Goals are for {WHERE}."
    )


def readme_section(result: dict) -> str:
    """Markdown, from the JSON."""
    m = result["machine"]
    machine = (
        f"Machine: {m['cpu']}, cores: {m['cores']}, GPU: {m['gpu']}; Python {m['python']}, torch {m['torch']}, "
        f"cvxpy {m['cvxpy']}, ham_kernels {m['ham_kernels']}; {m['date']}."
    )
    lines = [*map(verdict, result["goals"]), *notes(result)]
    return "\n\n".join([
        f"{setup(result)} {machine}", markdown(cells(result["case"])), "\n".join(f"- {line}" for line in lines)
    ])  # fmt: skip
