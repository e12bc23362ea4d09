"""Which method each epoch trains by: natural, then the warm-up, then the method itself; and where one step overfits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..attack.pgd import PGD
from ..common import checks, troubles
from ..distributed import ALONE, Ranks
from ..methods.mining import WHOLE, Place
from ..methods.objective import Objective
from ..methods.registry import class_of, in_place_of, warm_up_of
from ..methods.settings import Method
from .overfitting import OverfittingCheck, OverfittingWarning, Reading


class Phases:
    """The course of a training.

    Args:
        method: from its start_epoch on.
        pgd: the attack that the training was told.
        warm_up: the method before start_epoch, by name; the name of `method` is that without mining. One-step methods
            are watched for catastrophic overfitting. Where it is found, PGD-AT takes over from them, with the switches
            that they have.
        natural_epochs: so many epochs of the warm-up, the first, train on clean images.
        seed: of the training.
        loss_weights, ranks: of all of them; see Objective.
        teacher: of those that learn from one.
    Raises: TypeError, ValueError naming the argument.
    """

    def __init__(
        self, method: Method, pgd: PGD, warm_up: str, natural_epochs: int, seed: int,
        loss_weights: Tensor | None = None, teacher: nn.Module | None = None, ranks: Ranks = ALONE,
    ):  # fmt: skip
        def objective(of: Method) -> Objective:
            return Objective(of, pgd, loss_weights, teacher if of is method or of.needs_teacher else None, ranks)

        self.method = objective(method)
        self.natural_epochs = checks.integer("natural_epochs", natural_epochs, 0, method.start_epoch - 1)
        warm = warm_up_of(method, warm_up)
        self._warm_up = self.method if warm == method else objective(warm)
        self._natural = objective(class_of("natural")())
        watched = {o.method.name: o for o in (self._warm_up, self.method) if o.method.one_step}
        self._checks = {name: OverfittingCheck(o.pgd, pgd, seed, ranks) for name, o in watched.items()}
        self._instead = {name: objective(in_place_of(o.method)) for name, o in watched.items()}
        # whose memory an objective goes on from: it is of the same classes
        self._before = {o: watched[name] for name, o in self._instead.items()}
        if self._warm_up is not self.method and type(warm) is type(method):
            self._before[self.method] = self._warm_up

    @property
    def starts_late(self) -> bool:
        """Whether epochs before start_epoch train by another method."""
        return self.method.method.start_epoch > 1 and (self._warm_up is not self.method or self.natural_epochs > 0)

    def objective(self, epoch: int) -> Objective:
        """What an epoch (1-based) trains by."""
        if epoch >= self.method.method.start_epoch:
            planned = self.method
        else:
            planned = self._natural if epoch <= self.natural_epochs else self._warm_up
        check = self._checks.get(planned.method.name)
        return planned if check is None or check.overfitted_at is None else self._instead[planned.method.name]

    def begin(self, epoch: int) -> Objective:
        """`objective`, which goes on from what the one in its place before remembers, where it remembers the same."""
        now = self.objective(epoch)
        before = self._before.get(now)
        if before is not None and before.has_memory and not now.has_memory:
            now.load_memory(before.memory(), next(before.buffers()).device)
        return now

    @property
    def warm_up(self) -> Method:
        """The method before start_epoch."""
        return self._warm_up.method

    # ------------------------------------------------------------ the watch over one-step methods
    def watches(self, epoch: int) -> bool:
        return self.objective(epoch).method.one_step

    def watch(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], epoch: int, precision: str, place: Place = WHOLE
    ) -> Reading:
        """Looks at the model after a watched epoch. Warns, and goes over to PGD-AT, where it has overfitted."""
        method = self.objective(epoch).method
        check = self._checks[method.name]
        reading = check(model, *batch, epoch=epoch, precision=precision, place=place)
        if check.overfitted_at == epoch:
            troubles.warn("overfitted", category=OverfittingWarning, method=method.name, epoch=epoch, reading=reading)
        return reading

    # ------------------------------------------------------------ state
    @property
    def _parts(self) -> dict[str, Objective]:
        """Those with a memory of their own: the warm-up may be of the method's name, and is still another part."""
        warm_up = {} if self._warm_up is self.method else {"warm_up": self._warm_up}
        return {**warm_up, "method": self.method, **{f"after {name}": o for name, o in self._instead.items()}}

    def state_dict(self) -> dict[str, Any]:
        """What the methods remember, and the watch."""
        return {
            "memory": {part: o.memory() for part, o in self._parts.items()},
            "class_weights": {part: o.method.class_weights for part, o in self._parts.items()},
            "overfitting": {name: check.state_dict() for name, check in self._checks.items()},
        }

    def state_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """What of a trainer's state `load_state_dict` takes. Raises: ValueError where that does not fit."""
        memory, watched = state.get("memory", {}), state.get("overfitting") or {}
        if "best" in watched:  # of the time when one method alone could be watched
            watched = dict.fromkeys(self._checks, watched)
        rules = state.get("class_weights", {})  # which of them, the names in a memory do not tell
        for part, o in self._parts.items():
            o.check_state(memory.get(part, {}))
            if memory.get(part) and rules.get(part, o.method.class_weights) != o.method.class_weights:
                raise ValueError(
                    f"state: its class_weights are {rules[part]!r}, {o.method.name} has {o.method.class_weights!r}"
                )
        for name in self._checks.keys() & watched.keys():
            self._checks[name].check_state(watched[name])
        return {"memory": memory, "overfitting": watched}

    def load_state_dict(self, state: dict[str, Any], device) -> None:
        for part, o in self._parts.items():
            o.load_memory(state["memory"].get(part, {}), device)
        for name in self._checks.keys() & state["overfitting"].keys():
            self._checks[name].load_state_dict(state["overfitting"][name])
