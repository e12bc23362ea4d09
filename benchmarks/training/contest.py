"""Competitors that take steps in turn, in one process and on copies of one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ham_kernels.engine import EngineError
from training.floor import BarePass, clock, synchronise, times_for
from training.steps import FOREIGN, Arm, FreedMemory, build, labels_of, model_of, setting_of, title

WARM_UP = {"cpu": (16, 1), "cuda": (None, 3)}  # rows (None: all) and steps: compilation, graphs, libraries


def plan(cost: dict[str, float], needed: tuple[str, ...], budget: float) -> list[str]:
    """The arms of a round of so many seconds: those that are needed, and of the others the quickest that fit in."""
    chosen = {name for name in cost if name in needed}
    budget -= sum(cost[name] for name in chosen)
    for name in sorted(cost.keys() - chosen, key=cost.__getitem__):
        if cost[name] <= budget:
            chosen.add(name)
            budget -= cost[name]
    return [name for name in cost if name in chosen]


class Contest:
    """The arms of one model, and the steps that they take in turn."""

    clock = staticmethod(clock)

    def __init__(
        self, model: str, x: Tensor, sizes: list[int], hard: float, names: list[str], left_out: dict[str, str],
        needed: tuple[str, ...], make: Callable[[str, nn.Module, dict], Arm] = build,
    ):  # fmt: skip
        self.name, self.device = model, x.device
        self.model = model_of(model, x)
        self.batches = {n: (x[:n], labels_of(self.model, x[:n], hard)) for n in sizes}
        self.needed, self.make = needed, make  # arms in every round, whatever the budget; what builds an arm by name
        self.arms: dict[str, Arm] = {}
        self.names, self.left_out = names, dict(left_out)  # reasons, by name
        self.broken: dict[str, str] = {}  # by name, what no arm should raise
        self.warm_up_s: dict[str, float] = {}
        self._memory = FreedMemory()

    def warm_up(self, end: float) -> None:
        """Builds the arms, those with a goal first; they compile, capture and allocate."""
        names = [name for name in self.names if name not in self.left_out]
        rows, steps = WARM_UP[self.device.type]
        trainers: dict = {}
        for name in sorted(names, key=lambda n: n not in self.needed):
            start = time.perf_counter()
            if name not in self.needed and start > end:
                self.left_out[name] = "no time left to warm it up"
                continue
            try:
                arm = self.make(name, self.model, trainers)
                for x, y in self.batches.values():
                    for kind in arm.kinds * steps:
                        arm.step(kind, x[:rows], y[:rows])
                synchronise(self.device)
            except (EngineError, ImportError) as error:
                self.left_out[name] = str(error)
                continue
            except Exception as error:  # one arm's mistake must not cost the others their times
                self._break(name, error)
                continue
            self.arms[name], self.warm_up_s[name] = arm, time.perf_counter() - start
        self.arms = {name: self.arms[name] for name in names if name in self.arms}

    def case(self, n: int, rounds: int, end: float) -> dict:
        """All arms on one batch, `rounds` times in turn; fewer arms where the time would not do."""
        x, y = self.batches[n]
        kinds = [(name, kind) for name, arm in self.arms.items() for kind in arm.kinds]
        lanes = {key: {"arm": key[0], "kind": key[1], "seconds": [], "h": None, "unit_s": []} for key in kinds}
        bare = self.bare_passes(x)
        cost = {}
        for name, arm in list(self.arms.items()):
            with self._breaking(name):
                cost[name] = self._estimate(arm, x, y)
        for r in range(rounds):
            planned = plan(cost, self.needed, (end - time.perf_counter()) / (rounds - r))
            turn, units = r % max(len(planned), 1), {}
            for name in planned[turn:] + planned[:turn]:
                arm, setting = self.arms[name], setting_of(name)
                with self._breaking(name):
                    self._settle(arm, x, y)
                    start = time.perf_counter()
                    for kind in arm.kinds:
                        lane = lanes[name, kind]
                        seconds, lane["h"] = self._timed(arm, kind, x, y, lane["seconds"])
                        lane["seconds"].append(seconds)
                    cost[name] = time.perf_counter() - start
                    if setting in bare and setting not in units and arm.keeps_memory:
                        units[setting] = bare[setting].forward_seconds(n)
            cost = {name: seconds for name, seconds in cost.items() if name in self.arms}
            lanes = {key: lane for key, lane in lanes.items() if key[0] in self.arms}
            for (name, _), lane in lanes.items():
                lane["unit_s"].append(units.get(setting_of(name)))
                lane["seconds"] += [] if name in planned else [None]
            print(f"{self.name}, batch {n}: round {r + 1} of {rounds}, {len(planned)} arms", flush=True)
        if self.device.type == "cpu":
            self._memory.keep()
        late = {name: "no time left" for (name, _), lane in lanes.items() if lane["h"] is None}
        return {
            "model": self.name, "batch_size": n, "lanes": [v for v in lanes.values() if v["h"] is not None],
            "left_out": self.left_out | late, "warm_up_s": self.warm_up_s,
            "floor_rows": {setting: b.rows for setting, b in bare.items()},
        }  # fmt: skip

    def bare_passes(self, x: Tensor) -> dict[str, BarePass]:
        """What our arms are measured against, by setting."""
        bare: dict[str, BarePass] = {}
        for name, arm in self.arms.items():
            if name not in FOREIGN and arm.keeps_memory:
                bare.setdefault(setting_of(name), BarePass(arm, x))
        return bare

    @contextmanager
    def _breaking(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._break(name, error)

    def _break(self, name: str, error: Exception) -> None:
        self.left_out[name] = self.broken[name] = told(error)
        self.arms.pop(name, None)
        print(f"{title(name)}: {self.broken[name]}", flush=True)

    def _estimate(self, arm: Arm, x: Tensor, y: Tensor) -> float:
        """Seconds of all steps of an arm, on a CPU from a few rows."""
        rows = WARM_UP[self.device.type][0] or len(y)
        seconds = (clock(lambda k=kind: arm.step(k, x[:rows], y[:rows]), self.device) for kind in arm.kinds)
        return sum(seconds) * len(y) / rows

    def _settle(self, arm: Arm, x: Tensor, y: Tensor) -> None:
        """On a CPU, has freed memory kept or returned as this arm's users have it."""
        if self.device.type == "cpu" and self._memory.kept != arm.keeps_memory:
            self._memory.keep() if arm.keeps_memory else self._memory.give_back()
            arm.fill_memory(x, y)

    def _timed(self, arm: Arm, kind: str, x: Tensor, y: Tensor, before: list[float | None]) -> tuple[float, float]:
        """(seconds per batch, share of hard rows)."""
        done: list[tuple[int, int]] = []
        last = next((s for s in reversed(before) if s is not None), float("inf")) * arm.group
        seconds = self.clock(lambda: done.append(arm.step(kind, x, y)), self.device, times_for(last, self.device))
        return seconds / arm.group, sum(hard for hard, _ in done) / sum(n for _, n in done)


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
