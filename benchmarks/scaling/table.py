"""What simulate_ranks.py found, as tables, and as sections of docs/scaling.md."""

from __future__ import annotations

import dataclasses

from readme.output import markdown

from .inputs import NETS, Links, Net
from .step import PARTS

COMMAND = "`python benchmarks/simulate_ranks.py --out benchmarks/results/simulate_ranks.json`"
WORTH_NAMING = 0.05  # of a step


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def limit(cell: dict) -> str:
    if cell["limit_share"] < WORTH_NAMING:
        return "computation"
    return f"{PARTS[cell['limit']]}, {100 * cell['limit_share']:.0f} %"


def efficiency(cell: dict, one: dict) -> float:
    """Rows a second and GPU, relative to one GPU."""
    return one["step"] / cell["step"] * cell["rows"] / one["rows"]


def sizes(cells: list[dict]) -> list[list[str]]:
    """A line for each number of GPUs."""
    head = [
        "GPUs", "rows on each", "step, ms", "efficiency %", "lost to imbalance %: as it is → rebalanced",
        "communication %", "what limits first",
    ]  # fmt: skip
    return [head] + [
        [
            f"{c['gpus']:,}", f"{c['rows']:,}", f"{1e3 * c['step']:.1f}", f"{100 * efficiency(c, cells[0]):.0f}",
            f"{percent(c['lost'])} → {percent(c['lost_balanced'])}", percent(c["communication"]), limit(c),
        ]
        for c in cells
    ]  # fmt: skip


def rebalanced(result: dict) -> list[list[str]]:
    """A line for each number of rows and GPUs: what moving is worth, rows as a whole and tensor by tensor."""
    nets = result["rebalance"]
    head = ["rows on each", "GPUs", "fullest / mean", "steps that move %", *(NETS[name].title for name in nets)]
    rows = [head]
    for cells in zip(*nets.values(), strict=True):
        c = cells[0]["usual"]
        values = [
            f"{percent(cell['usual']['lost'])} → {percent(cell['usual']['lost_balanced'])} / "
            f"{percent(cell['apart']['lost_balanced'])}"
            for cell in cells
        ]
        rows.append(
            [f"{c['rows']:,}", f"{c['gpus']:,}", f"{c['most_over_mean']:.2f}", f"{100 * c['moves']:.0f}", *values]
        )
    return rows


def what_if(result: dict) -> list[list[str]]:
    """A line for each change of the settings: step and what limits it."""
    head, rows = [""], []
    for words, nets in result["what_if"].items():
        if not rows:
            head += [f"{NETS[name].title}, {c['gpus']:,} GPUs" for name, cells in nets.items() for c in cells]
        cells = [cell for cells in nets.values() for cell in cells]
        rows.append([words, *(f"{1e3 * c['step']:.0f} ms; {limit(c)}" for c in cells)])
    return [head, *rows]


# ---------------------------------------------------------------- docs/scaling.md
def assumptions(result: dict) -> str:
    s = result["settings"]
    nets = [["", "µs a row and forward", "gradients, MB", "BatchNorm layers", "image, kB"]]
    nets += [
        [n.title, f"{n.row_us:g}", f"{n.gradient_bytes / 1e6:.0f}", str(n.bn_layers), f"{n.image_bytes / 1e3:.1f}"]
        for n in (Net(**told) for told in s["nets"].values())
    ]
    links = [["GPUs and what connects them", "assumed"]]
    links += [[f.metadata["help"], f"{s['links'][f.name]:g}"] for f in dataclasses.fields(Links)]
    said = (
        f"All of it is written by {COMMAND}: {s['draws']:,} steps drawn for each cell, seed {s['seed']}, "
        f"{_training(s['training'])}; ham_kernels {result['versions']['ham_kernels']}, numpy "
        f"{result['versions']['numpy']}."
    )
    return f"{said}\n\n{markdown(nets)}\n\n{markdown(links)}"


def _training(t: dict) -> str:
    return f"K {t['steps']}, M {t['screen_steps']}, h {t['hard']:g}, easy rows {t['easy']}"


def weak(result: dict) -> str:
    rows = result["settings"]["rows"]
    return _of_nets(result["weak"], f"{rows} rows on each GPU, so that the batch grows with the GPUs.")


def strong(result: dict) -> str:
    batch = result["settings"]["global_batch"]
    return _of_nets(result["strong"], f"A batch of {batch:,} rows over all GPUs together.")


def _of_nets(nets: dict[str, list[dict]], said: str) -> str:
    parts = [f"{said} {_from_where(nets)}"]
    parts += [f"{NETS[name].title}:\n\n{markdown(sizes(cells))}" for name, cells in nets.items()]
    return "\n\n".join(parts)


def _from_where(nets: dict[str, list[dict]]) -> str:
    """The first number of GPUs that is no longer 90 % efficient, for each model."""
    found = []
    for name, cells in nets.items():
        first = next((c for c in cells if efficiency(c, cells[0]) < 0.9), None)
        found.append(f"{NETS[name].title}: " + ("none" if first is None else f"{first['gpus']:,} ({limit(first)})"))
    return f"The first of these numbers of GPUs at less than 90 % of one GPU's pace: {'; '.join(found)}."


def rebalance(result: dict) -> str:
    worse = []
    for name, cells in result["rebalance"].items():
        found = [f"{c['gpus']:,} × {c['rows']}" for c in (x["usual"] for x in cells) if c["lost_balanced"] > c["lost"]]
        worse += [f"{NETS[name].title} on {', '.join(found)}"] if found else []
    said = (
        "Time lost to imbalance, in % of a step whose GPUs all have the same: as it is → rebalanced, rows travelling "
        "whole in one all-to-all / were each of four tensors to travel by itself. The time of moving is in it. It "
        f"costs more than it saves here (GPUs × rows): {'; '.join(worse) or 'nowhere'}."
    )
    return f"{said}\n\n{markdown(rebalanced(result))}"


def sync_bn(result: dict) -> str:
    nets = result["rebalance"]
    head = ["rows on each", "GPUs", "fewest hard rows on one", "steps in which one has none %"]
    rows = [head + [f"SyncBN, % of a step: {NETS[name].title}" for name in nets]]
    for cells in zip(*([cell["usual"] for cell in cells] for cells in nets.values()), strict=True):
        c = cells[0]
        share = [percent(cell["parts"]["sync_bn"] / cell["step"]) for cell in cells]
        rows.append([f"{c['rows']:,}", f"{c['gpus']:,}", f"{c['fewest']:.1f}", f"{100 * c['some_empty']:.0f}", *share])
    h = result["settings"]["training"]["hard"]
    return f"Before rows are moved, h {h:g}, means over steps.\n\n{markdown(rows)}"


def variants(result: dict) -> str:
    rows = result["settings"]["rows"]
    return f"Steps of {rows} rows on each GPU, and what limits them first.\n\n{markdown(what_if(result))}"
