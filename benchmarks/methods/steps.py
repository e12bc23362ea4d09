"""Arms of bench_methods.py: our methods by name, the loops that they are held against, and whether the two agree.

"trades" is our method, "trades+jump" the same with HAM's screening, "trades loop" a loop as the authors' code works.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from training.contest import Contest
from training.floor import Counting, counted
from training.steps import CHECK_EPS, CHECK_LR, CLASSES, TINY_EPS, Arm, K, full_fp32, model_of

import ham_kernels as ham
from ham_kernels import methods
from ham_kernels.data import Batches
from ham_kernels.data.batches import Shown
from ham_kernels.methods import EpochEnd, Method

from . import loops

PGD_AT, JUMP, LOOP = "pgd_at", "+jump", " loop"
TEACHER = 1  # forward of the teacher, here of the student's size
# class statistics of the first epoch take effect in the second, and no average waits for a validation
METHODS: dict[str, Callable[[], Method]] = {
    PGD_AT: lambda: methods.PGDAT(),
    "ham": lambda: methods.HAM(),
    "trades": lambda: methods.TRADES(),
    "mart": lambda: methods.MART(),
    "at_awp": lambda: methods.PGDAT(awp=loops.AWP.gamma),
    "gairat": lambda: methods.GAIRAT(),
    "cfa_at": lambda: methods.CFA(base="pgd_at", class_from=2, gate=0.0),
    "cfa_trades": lambda: methods.CFA(base="trades", class_from=2, gate=0.0),
    "dafa": lambda: methods.DAFA(class_from=2),
    "wat": lambda: methods.WAT(),
    "fsr": lambda: methods.FSR(),
    "faal": lambda: methods.FAAL(),
    "bat": lambda: methods.BAT(),
    "frl": lambda: methods.FRL(),
    "cfol": lambda: methods.CFOL(),
    "fair_tat": lambda: methods.FAIRTAT(),
    "mail": lambda: methods.MAIL(mail_from=1),
    "fat": lambda: methods.FAT(tau_from=(1,)),
    "rslad": lambda: methods.RSLAD(),
    "fair_ard": lambda: methods.FairARD(),
    "absld": lambda: methods.ABSLD(),
    "fgsm_rs": lambda: methods.FGSMRS(),
    "n_fgsm": lambda: methods.NFGSM(),
    "free_at": lambda: methods.FreeAT(),
    "atta": lambda: methods.ATTA(),
    "fair": lambda: methods.Fair(),
    "fair_fast": lambda: methods.Fair(fast=True),
    "offsets": lambda: methods.Offsets(),
}
TITLES = {
    PGD_AT: "PGD-AT", "ham": "HAM", "trades": "TRADES", "mart": "MART", "at_awp": "AT-AWP", "gairat": "GAIRAT",
    "cfa_at": "CFA on AT", "cfa_trades": "CFA on TRADES", "dafa": "DAFA", "wat": "WAT", "fsr": "FSR",
    "faal": "FAAL", "bat": "BAT", "frl": "FRL", "cfol": "CFOL", "fair_tat": "FAIR-TAT", "mail": "MAIL",
    "fat": "Friendly-AT", "rslad": "RSLAD", "fair_ard": "Fair-ARD", "absld": "ABSLD", "fgsm_rs": "FGSM-RS",
    "n_fgsm": "N-FGSM", "free_at": "Free-AT", "atta": "ATTA", "fair": "Fair", "fair_fast": "Fair, fast",
    "offsets": "Class offsets",
}  # fmt: skip
LOOPS: dict[str, type[loops.Loop]] = {
    PGD_AT: loops.Loop, "trades": loops.TRADES, "mart": loops.MART, "at_awp": loops.AWP, "gairat": loops.GAIRAT,
    "cfa_at": loops.CFA, "cfa_trades": loops.CFATRADES, "dafa": loops.DAFA, "wat": loops.WAT, "fsr": loops.FSR,
    "faal": loops.FAAL, "bat": loops.BAT,
}  # fmt: skip
OURS = ("fair", "fair_fast", "offsets")
SCREENED = (PGD_AT, "trades", "mart", "at_awp", "wat", "dafa", "fsr", "faal", "bat", "fair")


def arms_of(names: list[str]) -> list[str]:
    """Ours, ours with HAM's screening, and the loops, of methods by name."""
    return [
        *names,
        *(name + JUMP for name in names if name in SCREENED),
        *(name + LOOP for name in names if name in LOOPS),
    ]


def base_of(arm: str) -> str:
    """The method's name in the arm's."""
    return arm.removesuffix(JUMP).removesuffix(LOOP)


def title(arm: str) -> str:
    name = TITLES[base_of(arm)]
    return name + (", HAM's screening" if arm.endswith(JUMP) else ", the authors' way" if arm.endswith(LOOP) else "")


def method_of(arm: str) -> Method:
    """From the first epoch on, screened where the arm's name says so."""
    screening = {"early_drop": True, "easy": "jump"} if arm.endswith(JUMP) else {}
    return replace(METHODS[base_of(arm)](), start_epoch=1, **screening)


class Ours(Arm):
    """`Trainer` with a method and no option of the engine's."""

    kinds = ("step",)
    keeps_memory = True

    def __init__(self, name: str, model: nn.Module, lr: float = 0.0, eps: float = TINY_EPS):
        super().__init__(name, model, lr)
        self.method = method_of(name)
        teacher = copy.deepcopy(model) if self.method.needs_teacher else None
        self.trainer = ham.Trainer(
            self.model, self.optimizer, self.method, eps=eps, step_size=eps / K, steps=K, seed=0, teacher=teacher
        )
        self.epoch, self.loss = 1, 0.0
        self._shown: dict[int, Shown] = {}  # which images a batch of so many rows is of, for ATTA

    def step(self, kind: str, x: Tensor, y: Tensor) -> tuple[int, int]:
        if self.method.remembers_rows:
            if len(x) not in self._shown:
                loader = Batches((255 * x).byte(), y, len(x), shuffle=False, augment="crop+flip", seed=0)
                self._shown[len(x)] = next(iter(loader))[0].shown
            x.shown = self._shown[len(x)]
        report = self.trainer.train_step(x, y, self.epoch)
        self.loss = report.loss
        return report.n_hard, report.n

    def end_epoch(self) -> None:
        self.trainer.phases.objective(self.epoch).end_epoch(EpochEnd(self.epoch, self.model, None, None))
        self.epoch += 1


def build(name: str, model: nn.Module, trainers: dict | None = None) -> Ours | loops.Loop:
    """Raises: ImportError where it cannot run here."""
    return LOOPS[base_of(name)](name, model) if name.endswith(LOOP) else Ours(name, model)


def cpu_clock(work: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """CPU seconds of one call, of so many in a row: other work on the machine hardly changes them."""
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


class MethodContest(Contest):
    """Steps of the second epoch: class statistics act."""

    def warm_up(self, end: float) -> None:
        super().warm_up(end)
        for arm in self.arms.values():
            arm.end_epoch()

    def bare_passes(self, x: Tensor) -> dict:
        return {}


# ------------------------------------------------------------ are they what they are said to be?
def check(name: str, x: Tensor) -> str | None:
    """Three epochs of one update each on x, by our method and by the loop with our definitions.

    Returns: what differs in the losses, None for nothing. Raises: ImportError where the loop cannot run here.
    """
    y = torch.arange(len(x), device=x.device) % CLASSES
    model = model_of("small_cnn", x)
    ours = Ours(name, model, CHECK_LR, CHECK_EPS)
    loop = LOOPS[name](name, model, CHECK_LR, CHECK_EPS, like_ours=True)
    with full_fp32():
        for epoch in (1, 2, 3):
            for arm in (ours, loop):
                arm.step("step", x, y)
            a, b = ours.loss, float(loop.loss)
            if not abs(a - b) <= loop.tolerance * abs(b):
                return f"update {epoch}: loss {a:.6f}; the authors' way: {b:.6f}"
            for arm in (ours, loop):
                arm.end_epoch()
    return None


def cost_of(name: str, h: float = 1.0) -> float:
    """Forwards of a full batch in a step, as the method or the loop states them."""
    if not name.endswith(LOOP):
        method = method_of(name)
        return method.cost(K, h) + (TEACHER if method.needs_teacher else 0)
    stated = LOOPS[base_of(name)].forwards
    return stated(h) if callable(stated) else stated


def count(name: str, model: nn.Module, x: Tensor, y: Tensor) -> dict:
    """Counted and stated forwards of an arm's step. Raises: ImportError where it cannot run here."""
    arm = build(name, Counting(model))
    arm.step("step", x, y)
    found, h = counted(arm, "step", x, y)
    stated = cost_of(name, h)
    return {"arm": name, "h": h, "counted": found, "stated": stated, "right": abs(found - stated) < 1e-6}
