"""What a step is measured against: counted forwards, the bare model's passes, the matrix rate; and the goals."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ham_kernels.attack.step import PGD
from ham_kernels.engine import look_once
from ham_kernels.methods import PGDAT, Objective
from training.steps import (
    BEST_CPU,
    FOREIGN,
    FP32_CPU,
    HAM,
    KINDS,
    NATURAL,
    PGD_AT,
    TINY_EPS,
    TORCHATTACKS,
    TORCHATTACKS_BF16,
    Arm,
    K,
    M,
    Ours,
    build,
    group_of,
    title,
)  # fmt: skip

FLOOR_ROWS = {"cpu": (16, 32, 64, 128), "cuda": (128, 512, 1024, 2048)}  # where the bare model's best batch is sought
LEAST_S = {"cpu": 0.4, "cuda": 0.1}  # what is clocked at once
MATRIX = 8192  # rows and columns


# ------------------------------------------------------------ counted forwards
def forwards(kind: str, h: float = 1.0) -> float:
    """Cost model, in forwards of a full batch: a backward to the input counts 1, one of a training step 2."""
    return {NATURAL: 3.0, PGD_AT: 2.0 * K + 3, HAM: 2 * M + 1 + h * (2 * (K - M) + 3)}[kind]


class Counting(nn.Module):
    """Adds up the rows that pass through a model, in the unit of the cost model, with each pass that autograd runs.

    A backward counts 1 for the gradients of what lies between the layers, and 1 more where parameters get theirs.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.seen = inner, Rows()

    def forward(self, x: Tensor) -> Tensor:
        name, first = next(iter(self.inner.named_parameters()))
        alias = first.view_as(first)  # its gradient comes once per forward, not once per backward of several
        z = functional_call(self.inner, {name: alias}, (x,))
        self.seen.count += len(x)
        for t in (z, alias):
            if t.requires_grad:
                t.register_hook(lambda _: self.seen.add(len(x)))
        return z


class Rows:
    """A count that copies of a model share."""

    def __init__(self):
        self.count = 0

    def add(self, rows: int) -> None:
        self.count += rows

    def __deepcopy__(self, memo: dict) -> Rows:
        return self


def counted(arm: Arm, kind: str, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(forwards of a full batch in a step of an arm whose model is `Counting`, share of hard rows)."""
    look_once(arm.model, x, y)  # which a first step does, and no other
    arm.model.seen.count = 0
    hard, n = arm.step(kind, x, y)
    return arm.model.seen.count / n, hard / n


def count(names: list[str], model: nn.Module, x: Tensor, y: Tensor) -> list[dict]:
    """Counted and predicted forwards of each kind of arm. Options change how a pass runs and not how many there are.

    Arms that cannot be built here are passed over.
    """
    types = {}
    for name in names:
        plain = "plain" if group_of(name) == 1 else f"plain+group{group_of(name)}"
        types[name.removesuffix("_bf16") if name in FOREIGN else plain] = True
    out = []
    for name in types:
        try:
            kinds = build(name, model, {}).kinds
        except ImportError:
            continue
        for kind in kinds:
            found, h = counted(build(name, Counting(model), {}), kind, x, y)
            right = abs(found - forwards(kind, h)) < 1e-9
            out.append(
                {"arm": name, "kind": kind, "h": h, "counted": found, "model": forwards(kind, h), "right": right}
            )
    return out


# ------------------------------------------------------------ clocks
def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(work: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds of one call, of so many in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / times


def times_for(seconds: float, device: torch.device) -> int:
    """How many calls of so many seconds are clocked at once."""
    return max(1, min(50, round(LEAST_S[device.type] / max(seconds, 1e-6))))


class BarePass:
    """A model's forward and backward to the input as an arm of ours runs them, and nothing else."""

    def __init__(self, arm: Ours, x: Tensor):
        self._model, self._engine, self._x = arm.model, arm.trainer.engine, x
        self.rows: int | None = None  # the best batch

    def forward_seconds(self, n: int) -> float:
        """Of one forward of n rows, in the cost model's unit: half a forward and backward, at the best batch."""
        if self.rows is None:
            self.rows = min(FLOOR_ROWS[self._x.device.type], key=self._row_seconds)
        return self._row_seconds(self.rows) * n / 2

    def _row_seconds(self, rows: int) -> float:
        x = self._engine.place(self._model, self._x.repeat(-(-rows // len(self._x)), 1, 1, 1)[:rows])

        def passes() -> None:
            point = x.detach().requires_grad_()
            z = self._engine.forward(self._model, point)
            torch.autograd.grad(z, point, torch.ones_like(z))

        try:
            with self._engine.attacking(self._model):
                first = clock(passes, x.device)
                return clock(passes, x.device, times_for(first, x.device)) / rows
        except torch.OutOfMemoryError:
            return float("inf")


# ------------------------------------------------------------ the matrix rate
def flops_per_row(model: nn.Module, x: Tensor) -> int:
    """Of a forward and a backward to the input."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    point = x[:2].detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(point).sum().backward()
    return counter.get_total_flops() // 2


def attack_rate(arm: Ours, x: Tensor, y: Tensor, repeats: int = 7) -> dict:
    """FLOP/s of the attack of PGD-AT, and of a bf16 matrix product of random numbers, in turn."""
    trainer, objective = arm.trainer, Objective(PGDAT(), PGD(TINY_EPS, TINY_EPS / K, K))
    a, b = torch.randn(2, MATRIX, MATRIX, device=x.device, dtype=torch.bfloat16)

    def attack() -> None:
        placed = trainer.engine.place(trainer.model, x)
        objective.examples(trainer.model, placed, y, seed=0, step=0, engine=trainer.engine)

    attacks, products = [], []
    for _ in range(repeats + 1):
        attacks.append(clock(attack, x.device, 3))
        products.append(clock(lambda: a @ b, x.device, 30))
    seconds = statistics.median(attacks[1:])
    rate = flops_per_row(arm.model, x) * len(x) * K / seconds
    peak = 2 * MATRIX**3 / statistics.median(products[1:])
    return {"arm": arm.name, "seconds": seconds, "flops_per_s": rate, "matrix_flops_per_s": peak, "share": rate / peak}


# ------------------------------------------------------------ from seconds to figures
def paired(over: list[float | None], under: list[float | None]) -> float | None:
    """Median ratio of the rounds that both have; None where there is none."""
    ratios = [a / b for a, b in zip(over, under, strict=True) if a is not None and b is not None]
    return statistics.median(ratios) if ratios else None


def derive(case: dict, wrong: dict[str, str]) -> None:
    """Adds to each lane of a case what follows from its seconds; a lane is one kind of step of one arm.

    An arm with wrong results is not said to be faster than any.
    """
    lanes = {(lane["arm"], lane["kind"]): lane for lane in case["lanes"]}
    for (name, kind), lane in lanes.items():
        seconds = [s for s in lane["seconds"] if s is not None]
        median = statistics.median(seconds)
        lane |= {"median_s": median, "lowest_s": min(seconds), "highest_s": max(seconds)}
        lane |= {"images_per_s": case["batch_size"] / median, "forwards": forwards(kind, lane["h"])}
        floor = [None if u is None else u * lane["forwards"] for u in lane["unit_s"]]
        lane["wrong"] = wrong.get(name)
        lane["over_floor"] = paired(lane["seconds"], floor)
        base = lanes.get((name.split("+group")[0], PGD_AT))
        if kind == HAM:
            lane["predicted_ratio"] = lane["forwards"] / forwards(PGD_AT)
            lane["measured_ratio"] = base and paired(lane["seconds"], base["seconds"])
            lane["over_prediction"] = lane["measured_ratio"] and lane["measured_ratio"] / lane["predicted_ratio"]
        for competitor in (TORCHATTACKS, TORCHATTACKS_BF16):
            theirs = lanes.get((competitor, PGD_AT))
            lane[f"over_{competitor}"] = None
            if theirs and kind != NATURAL and not lane["wrong"]:
                lane[f"over_{competitor}"] = paired(theirs["seconds"], lane["seconds"])


# ------------------------------------------------------------ goals
@dataclass(frozen=True)
class Goal:
    """A limit to a figure of one lane, ours of an arm or our fastest; or of a case, for its attack."""

    device: str
    model: str
    batch_size: int
    figure: str  # "over_prediction", at most; "over_<competitor>", at least; "attack", at least
    limit: float
    kind: str = HAM
    arm: str | None = None

    def __str__(self) -> str:
        where = f"{self.model}, batch {self.batch_size}, {DEVICES[self.device]}"
        if self.figure == "attack":
            return f"attack of PGD-AT at {self.limit:.0%} of the bf16 matrix rate or more, {where}"
        if self.figure == "over_prediction":
            return f"HAM within {self.limit:.2f} × its prediction, {where}"
        faster, arm = title(self.figure.removeprefix("over_")), f" ({title(self.arm)})" if self.arm else ""
        return f"{KINDS[self.kind].strip(': ')}{arm} ≥ {self.limit:g} × faster than the {faster}, {where}"


DEVICES = {"cpu": "CPU with 2 cores", "cuda": "GPU of the H200's class"}
SMALL, LARGE = "small_cnn", "preact_resnet18"
GOALS = [
    Goal("cpu", SMALL, 128, "over_prediction", 1.05),
    Goal("cpu", LARGE, 128, "over_prediction", 1.05),
    Goal("cpu", LARGE, 128, f"over_{TORCHATTACKS}", 1.9, PGD_AT, FP32_CPU),
    Goal("cpu", LARGE, 128, f"over_{TORCHATTACKS}", 3.0, PGD_AT, BEST_CPU),
    *(
        goal
        for n in (128, 512)
        for goal in (
            Goal("cuda", LARGE, n, "over_prediction", 1.10),
            Goal("cuda", LARGE, n, f"over_{TORCHATTACKS}", 3.0, PGD_AT),
            Goal("cuda", LARGE, n, f"over_{TORCHATTACKS}", 5.0, HAM),
            Goal("cuda", LARGE, n, f"over_{TORCHATTACKS_BF16}", 1.5, PGD_AT),
            Goal("cuda", LARGE, n, f"over_{TORCHATTACKS_BF16}", 2.5, HAM),
        )
    ),
    Goal("cuda", LARGE, 512, "attack", 0.3),
]


def judge(result: dict) -> list[dict]:
    """Each goal with what was measured, and its state: "held", "missed" or "not measured here", and then why."""
    out = []
    for goal in GOALS:
        value, measured, why = _measured(goal, result["cases"])
        why = _elsewhere(goal, result["device"]) or why
        if why:
            state = "not measured here"
        else:
            held = value <= goal.limit if goal.figure == "over_prediction" else value >= goal.limit
            state = "held" if held else "missed"
        out.append({"goal": str(goal), "device": goal.device, "measured": measured, "state": state, "why": why})
    return out


def fastest(case: dict, kind: str) -> dict | None:
    """Our lane of least median, groups left aside."""
    lanes = [lane for lane in _ours(case, kind) if group_of(lane["arm"]) == 1]
    return min(lanes, key=lambda lane: lane["median_s"], default=None)


def _ours(case: dict, kind: str) -> list[dict]:
    return [lane for lane in case["lanes"] if lane["arm"] not in FOREIGN and lane["kind"] == kind and not lane["wrong"]]


def _measured(goal: Goal, cases: list[dict]) -> tuple[float, str, str]:
    """(value, in words, why there is none)."""
    case = next((c for c in cases if (c["model"], c["batch_size"]) == (goal.model, goal.batch_size)), None)
    if case is None:
        return 0.0, "", "this model and batch size did not run"
    if goal.figure == "attack":
        attack = case.get("attack")
        if not attack:
            return 0.0, "", "no bf16 arm ran"
        return attack["share"], f"{attack['share']:.0%} of {attack['matrix_flops_per_s'] / 1e12:.0f} TFLOP/s", ""
    lanes = {lane["arm"]: lane for lane in _ours(case, goal.kind)}
    lane = lanes.get(goal.arm) if goal.arm else fastest(case, goal.kind)
    if not lane or lane[goal.figure] is None:
        parties = (goal.arm, goal.figure.removeprefix("over_"))
        return 0.0, "", next((case["left_out"][p] for p in parties if p in case["left_out"]), "not all its arms ran")
    words = f"{lane[goal.figure]:.2f} × with {title(lane['arm'])}"
    if goal.figure == "over_prediction":
        values = [other[goal.figure] for other in lanes.values() if other[goal.figure] is not None]
        words += f", {min(values):.2f} to {max(values):.2f} over our arms"
    return lane[goal.figure], words, ""


def _elsewhere(goal: Goal, device: dict) -> str:
    """Why a goal is not one of this device, "" where it is."""
    if goal.device != device["type"]:
        return f"this run is on {device['name']}"
    if goal.device == "cpu" and device["threads"] != 2:
        return f"torch uses {device['threads']} threads here"
    if goal.device == "cuda" and device["capability"] < 9:
        return f"{device['name']} is of another class"
    return ""
