"""What bench_training.py prints of its result, and README's part of it."""

from __future__ import annotations

from readme.output import markdown

from training.steps import FOREIGN, HAM, KINDS, PGD_AT, TORCHATTACKS, TORCHATTACKS_BF16, K, M, title


def digits(value: float) -> str:
    """Three digits or more, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(case: dict) -> list[list[str]]:
    """Header and rows of a case's table as text."""

    def figure(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    where = f"{case['model']}, batch {case['batch_size']}"
    head = [
        where, "ms per step", "lowest to highest", "images/s", "h", "predicted",
        "measured", "measured / predicted", "× torchattacks", "× its bf16 form", "to the floor",
    ]  # fmt: skip
    rows = []
    for lane in case["lanes"]:
        ham = lane if lane["kind"] == HAM else {}
        rows.append([
            title(lane["arm"]) + KINDS[lane["kind"]] + (" (WRONG RESULTS)" if lane["wrong"] else ""),
            digits(1e3 * lane["median_s"]),
            f"{digits(1e3 * lane['lowest_s'])} to {digits(1e3 * lane['highest_s'])}",
            digits(lane["images_per_s"]),
            *(figure(ham.get(key)) for key in ("h", "predicted_ratio", "measured_ratio", "over_prediction")),
            *(figure(lane[f"over_{name}"]) for name in (TORCHATTACKS, TORCHATTACKS_BF16)),
            figure(lane["over_floor"]),
        ])  # fmt: skip
    return [head, *rows]


def notes(case: dict) -> list[str]:
    """What a table does not say: arms left out, and the matrix rate that the attack reaches."""
    where, attack = f"{case['model']}, batch {case['batch_size']}", case.get("attack")
    out = [f"{where}: {rounds(case)}"]
    out += [f"{where}, left out: {title(name)}: {why}" for name, why in case["left_out"].items()]
    if attack:
        out.append(
            f"{where}: the attack of PGD-AT runs at {attack['flops_per_s'] / 1e12:.0f} TFLOP/s with "
            f"{title(attack['arm'])}, {attack['share']:.0%} of a large bf16 matrix product's "
            f"{attack['matrix_flops_per_s'] / 1e12:.0f} in the same run"
        )
    return out


def rounds(case: dict) -> str:
    """How many times each lane was timed."""
    counts = sorted({sum(s is not None for s in lane["seconds"]) for lane in case["lanes"]})
    return f"{' to '.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))} rounds"


def verdict(goal: dict) -> str:
    measured = f": {goal['measured']}" if goal["measured"] else ""
    return f"{goal['goal']}{measured}: **{goal['state']}**" + (f" ({goal['why']})" if goal["why"] else "")


def setup(result: dict) -> str:
    """How it was measured, and what the columns mean."""
    s = result["settings"]
    text = (
        f"K {K}, M {M}, {s['images']}. All arms in turn in one process; medians, lowest and highest over the rounds. "
        f"Labels are chosen so that {s['hard']:.0%} of the rows are hard for every arm; learning is frozen (learning "
        "rate 0, BatchNorm momentum 0), so that this share stays. Predicted and measured: HAM / PGD-AT with the same "
        "options, predicted by the cost model from h; × torchattacks: how many times faster than an ordinary PGD-AT "
        "loop with torchattacks.PGD, in fp32 and under bf16 autocast with channels_last; to the floor: seconds / "
        "(forwards of the step × seconds of one in the bare model at its best batch size). Ratios are medians of the "
        "ratios within a round, so that they need not be the quotients of the medians beside them."
    )
    if result["device"]["type"] == "cpu":
        text += " The process keeps freed memory for our arms and returns it to the system for the others."
    return text


def machine(result: dict) -> str:
    m = result["machine"]
    return (
        f"Machine: {m['cpu']}, cores: {m['cores']}, GPU: {m['gpu']}; Python {m['python']}, torch {m['torch']}, "
        f"torchattacks {m['torchattacks']}, ham_kernels {m['ham_kernels']}; {m['date']}."
    )


def goals(result: dict) -> list[str]:
    return [verdict(goal) for goal in result["goals"] if goal["device"] == result["device"]["type"]]


def readme_section(result: dict) -> str:
    """Markdown, from the JSON."""
    lines = [*goals(result), *(line for case in result["cases"] for line in notes(case))]
    tables = [markdown(cells(case)) for case in result["cases"]]
    return "\n\n".join([f"{setup(result)} {machine(result)}", *tables, "\n".join(f"- {line}" for line in lines)])


def readme_short(result: dict) -> str:
    """Of the largest model: torchattacks' loops, ours without options, and our fastest in fp32 and in bf16."""
    model = result["cases"][-1]["model"]
    cases = [case for case in result["cases"] if case["model"] == model]
    tables = [markdown(short_cells(case)) for case in cases]
    timed = " and ".join(dict.fromkeys(rounds(case) for case in cases))
    said = (
        f"Seconds per step, K {K}, M {M}, {result['settings']['hard']:.0%} of the rows hard; in brackets, how many "
        f"times faster than the loop with torchattacks.PGD in fp32. Medians of {timed}, ratios within a round. "
        f"{machine(result)}"
    )
    return "\n\n".join([said, *tables])


def short_cells(case: dict) -> list[list[str]]:
    lanes = {(lane["arm"], lane["kind"]): lane for lane in case["lanes"]}

    def fastest(half: bool) -> str | None:
        arms = {arm: lane["median_s"] for (arm, kind), lane in lanes.items() if kind == HAM and arm not in FOREIGN}
        return min((arm for arm in arms if arm.startswith("bf16") == half), key=arms.get, default=None)

    def figure(arm: str, kind: str) -> str:
        lane = lanes.get((arm, kind))
        if lane is None:
            return "–"
        over = lane[f"over_{TORCHATTACKS}"]
        return f"{lane['median_s']:.3g}" + ("" if over is None else f" ({over:.2f} ×)")

    shown = [TORCHATTACKS, TORCHATTACKS_BF16, "plain", fastest(False), fastest(True)]
    arms = [arm for arm in dict.fromkeys(shown) if arm is not None and (arm, PGD_AT) in lanes]
    head = [f"{case['model']}, batch {case['batch_size']}", "PGD-AT", "HAM"]
    return [head, *([title(arm), *(figure(arm, kind) for kind in (PGD_AT, HAM))] for arm in arms)]
