"""One training step on several GPUs, in parts that add up to its time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ham_kernels.distributed.balance import pays, plan

from .inputs import Links, Net, Training

PARTS = {  # of a step in seconds, as tables call them
    "computation": "computation",
    "launches": "kernel launches",
    "imbalance": "the fullest GPU",
    "moving": "moving rows",
    "sync_bn": "SyncBN",
    "gradients": "gradients",
    "counts": "counts",
}
COMMUNICATION = ("moving", "sync_bn", "gradients", "counts")


@dataclass(frozen=True)
class Draws:
    """Hard rows of many steps, one entry a step."""

    rows: int  # of the fullest rank before screening
    total: np.ndarray
    most: np.ndarray  # on one rank
    fewest: np.ndarray
    moves: np.ndarray  # whether rebalancing moves rows in that step: what follows is 0 or `most` where not
    most_after: np.ndarray
    busiest: np.ndarray  # rows that one rank sends or gets, at most
    moved: np.ndarray


@cache
def draw(ranks: int, batch: int, hard: float, draws: int, seed: int) -> Draws:
    """Every row is hard with the same probability, so those of a rank are binomial: shuffled shards."""
    rng = np.random.default_rng([seed, ranks, batch])
    rows = [batch // ranks + (rank < batch % ranks) for rank in range(ranks)]
    found = []
    for counts in rng.binomial(rows, hard, size=(draws, ranks)).tolist():
        moves, most = pays(counts, rows[0]), max(counts)
        after, busiest, moved = most, 0, 0
        if moves:
            even = plan(counts)
            after, moved = max(even.targets), even.moved
            busiest = max(abs(n - t) for n, t in zip(counts, even.targets, strict=True))
        found.append((sum(counts), most, min(counts), moves, after, busiest, moved))
    return Draws(rows[0], *map(np.array, zip(*found, strict=True)))


def parts(net: Net, ranks: int, found: Draws, how: Training, links: Links, rebalance: bool) -> dict[str, float]:
    """Mean seconds of each part. A step waits for its fullest rank; nothing overlaps unless `how` says so."""
    attack = 2 * (how.steps - how.screen_steps)  # forwards, on hard rows
    update, screen = 3, 2 * how.screen_steps + 1
    on_hard, on_all = (attack + update, screen) if how.easy == "drop" else (attack, screen + update)
    share = found.total / ranks

    def forward(rows):  # seconds; a backward to the input, or to the weights, counts as one more
        least = 1e-6 * links.launch_us * 3 * net.convolutions
        return np.where(np.asarray(rows) > 0, np.maximum(1e-6 * net.row_us * rows, least), 0.0)

    even = on_all * forward(found.rows) + on_hard * forward(share)
    linear = 1e-6 * net.row_us * (on_all * found.rows + on_hard * share)
    most = found.most_after if rebalance else found.most
    out = {
        "computation": linear,
        "launches": np.maximum(even - linear, 0.0),
        "imbalance": on_hard * (forward(most) - forward(share)),
        "moving": _moving(net, ranks, found, how, links) if rebalance else 0.0,
    }
    out |= dict.fromkeys(("sync_bn", "gradients", "counts"), 0.0)
    if ranks > 1:
        out["counts"] = links.all_reduce(8 * (ranks + 3), ranks)
        out["gradients"] = links.all_reduce(net.gradient_bytes, ranks)
        if how.overlap:
            backward = 2 * forward(most if how.easy == "drop" else found.rows)
            out["gradients"] = np.maximum(out["gradients"] - backward, 0.0)
        if how.sync_bn:
            channels = net.bn_channels / net.bn_layers  # mean and deviation of each, and a count
            once = links.all_gather(4 * (2 * channels + 1), ranks) + links.all_reduce(8 * channels, ranks)
            out["sync_bn"] = net.bn_layers * (once + 1e-6 * links.wait_us)
    return {name: float(np.mean(value)) for name, value in out.items()}


def _moving(net: Net, ranks: int, found: Draws, how: Training, links: Links) -> np.ndarray:
    """There x, x_adv, label and largest step of each row, and where easy rows stop x_adv comes home."""
    latency, there = links.all_to_all(0, ranks), found.busiest * (2 * net.image_bytes + 12)
    seconds = how.messages * latency + links.seconds(1, ranks) * there
    if how.easy == "stop":
        seconds = seconds + latency + links.seconds(1, ranks) * found.busiest * net.image_bytes
    return np.where(found.moves, seconds, 0.0)


def simulate(net: Net, ranks: int, batch: int, how: Training, links: Links, draws: int, seed: int) -> dict:
    """One number of GPUs, with rebalancing where it pays. `batch` is of all GPUs together.

    `lost` and `lost_balanced` are relative to computing alone, with every GPU at its even share; the second has the
    moving of rows in it. `limit` is the largest part beside the computation.
    """
    found = draw(ranks, batch, how.hard, draws, seed)
    before, after = (parts(net, ranks, found, how, links, rebalance) for rebalance in (False, True))
    even, step = after["computation"] + after["launches"], sum(after.values())
    worst = max((name for name in PARTS if name != "computation"), key=after.__getitem__)
    return {
        "gpus": ranks,
        "rows": found.rows,
        "step": step,
        "step_unbalanced": sum(before.values()),
        "parts": after,
        "most_over_mean": float(found.most.sum() * ranks / max(1, found.total.sum())),
        "fewest": float(np.mean(found.fewest)),
        "some_empty": float(np.mean(found.fewest == 0)),
        "lost": before["imbalance"] / even,
        "lost_balanced": (after["imbalance"] + after["moving"]) / even,
        "moves": float(np.mean(found.moves)),
        "moved": float(found.moved.sum() / max(1, found.total.sum())),
        "communication": sum(after[name] for name in COMMUNICATION) / step,
        "limit": worst,
        "limit_share": after[worst] / step,
    }
