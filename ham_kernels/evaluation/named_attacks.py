"""The attacks by name, and which images of a batch survive one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from .. import engine
from ..attack.pgd import PGD, Attack
from ..common import checks
from ..distributed import ALONE, Ranks
from . import autoattack, odi
from .class_accuracy import answers, correct_rows, logits_at

NAMES = "'clean' and 'pgdK' such as 'pgd20', also 'fgsm', 'cwK', 'odiR', 'apgd' and 'autoattack'"
SEARCHES = ("plain", "fast")
_PASSES = {"apgd": 1_000, "autoattack": 10_000}
RESTART_STRIDE = 1 << 20  # noise is keyed on (seed, step): step = batch + restart * stride


@dataclass(frozen=True)
class Plan:
    """What a name stands for. AutoAttack and its parts use eps and norm of `pgd` only."""

    name: str
    pgd: PGD
    restarts: int = 1

    @property
    def of_autoattack(self) -> bool:
        return self.name in autoattack.NAMES

    @property
    def of_odi(self) -> bool:
        return self.name.startswith("odi")

    @property
    def passes(self) -> int:
        """Forwards of each image, about; of AutoAttack's parts and of ODI for one that resists."""
        return _PASSES.get(self.name, 1 + self.pgd.steps * self.restarts)

    def settings(self, classes: int) -> dict:
        """All that decides this attack's flags, besides model, data, precision, search and seed; JSON-ready."""
        if self.name == "clean":
            return {"attack": self.name}
        ball = {"attack": self.name, "norm": self.pgd.norm, "eps": self.pgd.eps}
        if self.of_autoattack:
            return {**ball, **autoattack.settings(), "parts": list(autoattack.parts(self.name, classes))}
        if self.of_odi:
            return {**ball, **odi.settings(), "restarts": self.restarts}
        pgd = self.pgd
        return {
            **ball, "step_size": pgd.step_size, "steps": pgd.steps, "loss": pgd.loss,
            "random_start": pgd.random_start, "restarts": self.restarts,
        }  # fmt: skip


def plans(names: Sequence[str], *, eps: float, step_size: float, norm: str, restarts: int = 1) -> dict[str, Plan]:
    """The attacks of these names, checked before anything runs."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        such = names if isinstance(names, str) else "clean"
        raise TypeError(f"attacks: got {names!r}; it must be a list of names, such as ({such!r},)")
    checks.integer("restarts", restarts, 1, (1 << 31) // RESTART_STRIDE - 1)
    found = {name: _plan(name, eps, step_size, norm, restarts) for name in names}
    if not found:
        raise ValueError('attacks: got none; give at least one, such as ("clean", "pgd20")')
    if any(plan.of_autoattack for plan in found.values()):
        autoattack.library()
    return found


def _plan(name: str, eps: float, step_size: float, norm: str, restarts: int) -> Plan:
    checks.norm(norm)
    if name == "clean":
        return Plan(name, PGD(0.0, 0.0, 0, norm, random_start=False))
    checks.real("eps", eps)
    if name == "fgsm":
        return Plan(name, PGD(eps, eps, 1, norm, random_start=False))
    if name in autoattack.NAMES:
        return Plan(name, PGD(eps, 0.0, 0, norm))
    if isinstance(name, str) and (match := re.fullmatch(r"odi([1-9]\d{0,2})", name)):
        return Plan(name, PGD(eps, eps, odi.DIRECTED + odi.STEPS, norm), int(match[1]))
    match = re.fullmatch(r"(pgd|cw)([1-9]\d*)", name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f"attacks: got {name!r}; allowed are {NAMES}")
    loss = {"pgd": "ce", "cw": "cw"}[match[1]]
    return Plan(name, PGD(eps, checks.real("step_size", step_size), int(match[2]), norm, loss=loss), restarts)


# ---------------------------------------------------------------- images
def resolve_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """The model's device, else the one asked for, else the CPU. ValueError where the model is on another one."""
    home = engine.model_device(model)
    try:
        wanted = home or torch.device("cpu") if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: got {device!r}; it must be like 'cpu' or 'cuda:0'") from error
    if home is not None and (wanted.type != home.type or wanted.index not in (None, home.index)):
        raise ValueError(f"device: got {device}, but the model is on {home}; move it there first")
    return home or wanted


def searcher(search: str | engine.Engine | None, device: torch.device) -> engine.Engine | None:
    """The engine that looks for examples; None where it is the plain model's."""
    if search is None or isinstance(search, engine.Engine):
        return search
    return engine.fast(device) if checks.choice("search", search, SEARCHES) == "fast" else None


@contextmanager
def judged(model: nn.Module, search: engine.Engine | None) -> Iterator[None]:
    """A model in attack_mode, its layers as a compiler takes them where a search may compile."""
    with engine.attack_mode(model, fast_batchnorm=search is None):
        try:
            yield
        finally:
            if search is not None:
                search.put_back()


def batches(loader: Iterable, device: torch.device, ranks: Ranks = ALONE) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number, x, y) of each batch, checked and on the device; of several processes each has the batches b with
    b % world = rank. Loaders of ours do not make the others.

    Raises: TypeError of what is no loader; ValueError of one without a batch, or, of several processes, with a part of
        the images for each, or an order of its own.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader: got {type(loader).__name__}; it must be an iterable of (x, y)")
    sampler = getattr(loader, "sampler", None)
    if ranks.several and (getattr(loader, "world", 1) > 1 or _shared_out(sampler)):
        raise ValueError("loader: gives each process a part of the images; each must be able to get all of them")
    if ranks.several and isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
        raise ValueError("loader: shuffles on each process; all must get the same batches (shuffle=False)")
    if hasattr(loader, "turns"):
        mine = loader.turns(ranks.rank, ranks.world)
    else:
        mine = islice(loader, ranks.rank, None, ranks.world)
    b = ranks.rank - ranks.world
    for b, batch in zip(count(ranks.rank, ranks.world), mine, strict=False):
        x, y = checks.pair("loader", batch)
        yield b, x.to(device), y.to(device)
    if b < 0 and not ranks.rank:
        raise ValueError("loader: gave no batch")


def _shared_out(sampler) -> bool:
    return isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1


# ---------------------------------------------------------------- running
class Survivors(NamedTuple):
    correct: Tensor  # (n,) bool, the rows that the model in eval mode still classifies correctly
    answers: Tensor  # (n,) int64, the class at the judged example: y where correct, else another
    classes: int  # that the model knows
    no_gradient: int = 0  # rows whose attack began without a gradient to follow
    lost: dict[str, int] = {}  # rows that each part of AutoAttack took


def survivors(
    model: nn.Module, x: Tensor, y: Tensor, plan: Plan, *, seed: int, batch: int, precision: str,
    search: engine.Engine | None = None,
) -> Survivors:  # fmt: skip
    """What one batch is worth under an attack; model in attack_mode.

    A row counts as lost when any restart ends on a wrong class. Later restarts attack the rows left over; the noise
    of a row depends on its place in the batch, not on which others are left.
    """
    how = {"precision": precision, "search": search}
    if plan.of_autoattack:
        found = autoattack.survivors(model, x, y, plan.pgd, name=plan.name, seed=seed + batch, **how)
        return Survivors(found.correct, found.answers, found.classes, lost=found.lost)
    if plan.of_odi:
        found = odi.survivors(
            model, x, y, plan.pgd, plan.restarts, seed=seed, batch=batch, stride=RESTART_STRIDE, **how
        )
        return Survivors(found.correct, found.answers, found.classes, found.no_gradient)
    attack, at = walk(model, x, y, plan.pgd, seed=seed, batch=batch, **how)
    z = at[plan.pgd.steps]
    correct = correct_rows(z, y)
    answer = answers(z, y, correct)
    for restart in range(1, plan.restarts):
        rows = correct.nonzero()[:, 0]
        if not len(rows):
            break
        step = batch + restart * RESTART_STRIDE
        _, at = walk(model, x, y, plan.pgd, seed=seed, batch=step, rows=rows, **how)
        correct[rows] = still = correct_rows(at[plan.pgd.steps], y[rows])
        answer[rows] = answers(at[plan.pgd.steps], y[rows], still)
    return Survivors(correct, answer, z.shape[1], attack.guard.no_gradient)


def walk(
    model: nn.Module, x: Tensor, y: Tensor, pgd: PGD, *, seed: int, batch: int, precision: str,
    look_at: Collection[int] = (), rows: Tensor | None = None, search: engine.Engine | None = None, first_row: int = 0,
) -> tuple[Attack, dict[int, Tensor]]:  # fmt: skip
    """One attack on a model in attack_mode, at its end, and the logits at x^k for each k of `look_at` and k = K.

    A look at x^k for k < K costs nothing: the attack computes those logits itself. The data are judged (one read)
    before this returns. `rows` restricts the attack to some rows; they start where they would start among all, as do
    all of them where x are the rows from `first_row` on of a larger batch. With `search` another engine takes the
    steps; the logits at x^K are the plain model's always.
    """
    seen: dict[int, Tensor] = {}

    def observe(k: int, z: Tensor) -> None:
        if k in look_at:
            seen[k] = z

    steps_by = engine.plain(precision) if search is None else search
    placed = x if search is None else search.place(model, x)
    with nullcontext() if search is None else search.attacking(model):
        attack = Attack(model, placed, y, pgd, seed=seed, step=batch, engine=steps_by, only=rows, first_row=first_row)
        attack.steps(pgd.steps, observe if look_at else None)
    seen[pgd.steps] = final = logits_at(model, attack.rows.x_adv, precision)
    attack.guard.logits(final)
    attack.guard.read()
    return attack, seen
