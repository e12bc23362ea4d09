"""Single training steps of each competitor, on one batch of which a chosen share is hard; and whether ours are right.

An arm of ours is named by its engine options, joined by "+": "plain", "bf16+channels_last+compile", "bf16+group2".
The options are required, so that an arm never runs without what its name says.
"""

from __future__ import annotations

import copy
import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ham_kernels as ham
import ham_reference
from ham_kernels import models
from ham_kernels.data.table import SETS
from ham_kernels.engine import EngineError, keep_freed_memory, return_freed_memory
from ham_kernels.engine.options import half_problem

K, M = 10, 3
CLASSES = 10
PGD_AT, HAM, NATURAL = "pgd_at", "ham", "natural"
KINDS = {NATURAL: "", PGD_AT: ": PGD-AT", HAM: ": HAM"}
EPOCH = {PGD_AT: 1, HAM: 2}  # of a trainer whose start_epoch is 2
TINY_EPS = 1e-5  # timing: labels decide what is hard, and no attack changes it

NATURAL_FP32, NATURAL_BF16, TORCHATTACKS, TORCHATTACKS_BF16, REFERENCE = (
    "natural", "natural_bf16", "torchattacks", "torchattacks_bf16", "reference",
)  # fmt: skip
FOREIGN = {
    NATURAL_FP32: "natural step, fp32",
    NATURAL_BF16: "natural step, bf16, channels_last",
    TORCHATTACKS: "torchattacks loop, fp32",
    TORCHATTACKS_BF16: "torchattacks loop, bf16, channels_last",
    REFERENCE: "ham_reference",
}
OPTIONS = {
    "plain": {},
    "no_keep_memory": {"keep_memory": False},
    "bf16": {"precision": "require-bf16"},
    "channels_last": {"channels_last": "require"},
    "compile": {"compile": "require"},
    "cuda_graphs": {"cuda_graphs": "require"},
    "winograd": {"winograd": "require"},
}
BEST = "bf16+channels_last+compile"
FP32_CPU, BEST_CPU = "channels_last+compile+winograd", f"{BEST}+winograd"
ARMS = {
    "cpu": (*FOREIGN, "no_keep_memory", "plain", "channels_last", "compile", "winograd", "channels_last+compile",
            FP32_CPU, "bf16", "bf16+channels_last", BEST, BEST_CPU),
    "cuda": (*FOREIGN, "plain", "channels_last", "compile", "cuda_graphs", "bf16", "bf16+channels_last",
             "bf16+channels_last+cuda_graphs", BEST, f"{BEST}+cuda_graphs", f"{BEST}+cuda_graphs+group2",
             f"{BEST}+cuda_graphs+group4"),
}  # fmt: skip

# The comparison with ham_reference: this budget puts many rows near the boundary, so that the attack decides which are
# hard, and what an update changed shows in the losses after it.
CHECK_ROWS, CHECK_EPS, CHECK_LR, CHECK_KINDS = 64, 0.016, 0.05, (HAM, PGD_AT, HAM)
TOLERANCE = {"fp32": (0, 1e-4), "bf16": (3, 0.03)}  # hard rows; the loss, relative


# ------------------------------------------------------------ names
def is_arm(name: str) -> bool:
    return name in FOREIGN or all(part in OPTIONS or re.fullmatch(r"group[2-9]", part) for part in name.split("+"))


def title(name: str) -> str:
    return FOREIGN.get(name) or "ours, " + name.replace("no_keep_memory", "keep_memory off").replace("+", ", ")


def group_of(name: str) -> int:
    """Batches that are attacked together."""
    return next((int(part[5:]) for part in name.split("+") if part.startswith("group")), 1)


def setting_of(name: str) -> str:
    """Precision, layout, compile and convolutions of an arm: the name of the bare model's pass it is compared with."""
    foreign = "bf16+channels_last" if name.endswith("_bf16") else "plain"
    parts = (foreign if name in FOREIGN else name).split("+")
    return "+".join(p for p in ("bf16", "channels_last", "compile", "winograd") if p in parts) or "plain"


# ------------------------------------------------------------ what they train on
def model_of(name: str, x: Tensor) -> nn.Module:
    """A model with random weights and BatchNorm statistics of these images, which stay: so does what is hard."""
    torch.manual_seed(0)
    facts = SETS["cifar10"]
    model = models.create(name, CLASSES, mean=facts.mean, std=facts.std).to(x.device)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for m in norms:
        m.momentum = 0.0
    return model


def labels_of(model: nn.Module, x: Tensor, hard: float) -> Tensor:
    """Labels that make this share of the rows hard: another class for the rows that the model is least sure of.

    The others are labelled as the model sees them, and no attack of TINY_EPS changes that.
    """
    with torch.no_grad():
        z = model.eval()(x)
    best, second = z.topk(2, dim=1).values.unbind(1)
    unsure = (best - second).argsort()[: round(hard * len(x))]
    y = z.argmax(1)
    y[unsure] = z[unsure].argmin(1)
    return y


# ------------------------------------------------------------ competitors
class Arm:
    """A competitor with a copy of the model. `kinds` are the steps that it has."""

    kinds: tuple[str, ...] = (PGD_AT,)
    keeps_memory = False  # whether its users have freed memory kept by the process, on a CPU
    group = 1

    def __init__(self, name: str, model: nn.Module, lr: float = 0.0):
        self.name = name
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum=0.9, weight_decay=2e-4)

    def step(self, kind: str, x: Tensor, y: Tensor) -> tuple[int, int]:
        """Returns (hard rows, rows)."""
        raise NotImplementedError

    def fill_memory(self, x: Tensor, y: Tensor) -> None:
        """A forward and a backward in train mode, where a step needs most memory."""
        F.cross_entropy(self.model.train()(x), y).backward()
        self.optimizer.zero_grad()


class OrdinaryLoop(Arm):
    """A natural step as everybody writes it; "_bf16": autocast and channels_last. Raises: EngineError without bf16."""

    kinds = (NATURAL,)

    def __init__(self, name: str, model: nn.Module, lr: float = 0.0):
        super().__init__(name, model, lr)
        self.half = name.endswith("_bf16")
        if self.half:
            problem = half_problem("bf16", next(model.parameters()).device)
            if problem:
                raise EngineError(problem)
            self.model.to(memory_format=torch.channels_last)

    def inputs(self, x: Tensor, y: Tensor) -> Tensor:
        return x

    def step(self, kind: str, x: Tensor, y: Tensor) -> tuple[int, int]:
        self.model.train()
        if self.half:
            x = x.to(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16) if self.half else nullcontext():
            loss = F.cross_entropy(self.model(self.inputs(x, y)), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return len(y), len(y)


class Torchattacks(OrdinaryLoop):
    """PGD-AT as users of torchattacks write it."""

    kinds = (PGD_AT,)

    def __init__(self, name: str, model: nn.Module, lr: float = 0.0):
        import torchattacks

        super().__init__(name, model, lr)
        self.attack = torchattacks.PGD(self.model, eps=TINY_EPS, alpha=TINY_EPS / 4, steps=K, random_start=True)

    def inputs(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attack(x, y)


class Reference(Arm):
    kinds = (PGD_AT, HAM)

    def __init__(self, name: str, model: nn.Module, lr: float = 0.0, eps: float = TINY_EPS):
        super().__init__(name, model, lr)
        self.trainer = ham_reference.HAMTrainer(self.model, self.optimizer, **_settings(eps))

    def step(self, kind: str, x: Tensor, y: Tensor) -> tuple[int, int]:
        report = self.trainer.train_step(x, y, EPOCH[kind])
        return report.n_hard, report.n

    def group_step(self, kind: str, x: Tensor, y: Tensor, group: int) -> list[tuple[int, float]]:
        """As `group` batches, all of them x and y, attacked before the first update: (hard rows, loss) of each."""
        t, mining = self.trainer, kind == HAM
        x_adv, labels, weights, rows = ham_reference.hard_examples(
            self.model, x.repeat(group, 1, 1, 1), y.repeat(group), **t.attack, lam=t.lam, reweight=mining,
            early_drop=mining, seed=t.seed, step=t.steps_done,
        )  # fmt: skip
        t.steps_done += group
        out = []
        for b in range(group):
            part = rows // len(y) == b
            own = weights[part] / weights[part].mean()
            out.append((len(own), t.update(x_adv[part], labels[part], own, freeze_bn=len(own) == 1)))
        return out


class Ours(Arm):
    """HAMTrainer with the options of its name. Arms that differ in the group only share one: it compiles once."""

    def __init__(
        self, name: str, model: nn.Module, lr: float = 0.0, eps: float = TINY_EPS, trainers: dict | None = None
    ):
        self.name, self.group = name, group_of(name)
        parts = tuple(p for p in name.split("+") if p in OPTIONS)
        options = {k: v for p in parts for k, v in OPTIONS[p].items()}
        trainers = {} if trainers is None else trainers
        if parts not in trainers:
            super().__init__(name, model, lr)
            trainers[parts] = ham.HAMTrainer(self.model, self.optimizer, **_settings(eps), **options)
        self.trainer = trainers[parts]
        self.model, self.optimizer = self.trainer.model, self.trainer.optimizer
        self.kinds = (HAM,) if self.group > 1 else (PGD_AT, HAM)
        self.keeps_memory = options.get("keep_memory", True)

    def step(self, kind: str, x: Tensor, y: Tensor) -> tuple[int, int]:
        reports = self.trainer.train_group([(x, y)] * self.group, EPOCH[kind])
        return sum(r.n_hard for r in reports), sum(r.n for r in reports)


def build(name: str, model: nn.Module, trainers: dict) -> Arm:
    """Raises: EngineError, ImportError where it cannot run here."""
    if name.startswith(NATURAL):
        return OrdinaryLoop(name, model)
    if name.startswith(TORCHATTACKS):
        return Torchattacks(name, model)
    return Reference(name, model) if name == REFERENCE else Ours(name, model, trainers=trainers)


def _settings(eps: float) -> dict:
    return {"eps": eps, "step_size": eps / K, "steps": K, "screen_steps": M, "start_epoch": EPOCH[HAM], "seed": 0}


# ------------------------------------------------------------ memory
class FreedMemory:
    """Whether this process keeps the memory that it frees, or is as if it never had.

    Where large blocks were kept and freed, holes stay behind, between blocks that are still in use. malloc would serve
    from them, without new pages, what it takes from the system in a process that never kept memory: a step would be
    up to 1.6 times as fast as its users have it. So blocks that nobody touches fill the holes.
    """

    def __init__(self):
        self.kept: bool | None = None  # None: as whoever came last has left it
        self._blocks: list[int] = []
        self._libc = libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
        libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]

    def keep(self) -> None:
        while self._blocks:
            self._libc.free(self._blocks.pop())
        keep_freed_memory()
        self.kept = True

    def give_back(self) -> None:
        if return_freed_memory():  # else there is no glibc, and nothing was kept
            self._fill_holes()
        self.kept = False

    def _fill_holes(self, largest: int = 1 << 30, least: int = 1 << 20) -> None:
        end, size = self._libc.sbrk(0), largest
        while size >= least:
            block = self._libc.malloc(size)
            if block and block < end:
                self._blocks.append(block)
            else:  # new memory, behind the heap: no hole is as large
                self._libc.free(block)
                size //= 2


# ------------------------------------------------------------ are the results right?
@contextmanager
def full_fp32() -> Iterator[None]:
    """Convolutions without TF32, and by one algorithm: others differ by more than the tolerance."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic = before


class Check:
    """Compares an arm of ours with ham_reference in three updates of the small CNN. x: about CHECK_ROWS images."""

    def __init__(self, x: Tensor):
        self.x, self.model = x, model_of("small_cnn", x)
        self.y = labels_of(self.model, x, 0.3)
        self._expected: dict[int, list] = {}

    def __call__(self, name: str) -> str | None:
        """What is wrong with its results, None for nothing. Raises: EngineError where it cannot run here."""
        group, x, y = group_of(name), self.x, self.y
        with full_fp32():
            if group not in self._expected:
                reference = Reference(REFERENCE, self.model, CHECK_LR, CHECK_EPS)
                self._expected[group] = [r for kind in CHECK_KINDS for r in reference.group_step(kind, x, y, group)]
            trainer = Ours(name, self.model, CHECK_LR, CHECK_EPS).trainer
            reports = [r for kind in CHECK_KINDS for r in trainer.train_group([(x, y)] * group, EPOCH[kind])]
        tolerance = TOLERANCE["bf16" if "bf16" in name.split("+") else "fp32"]
        return difference([(r.n_hard, r.loss) for r in reports], self._expected[group], *tolerance)


def difference(ours: list[tuple[int, float]], right: list[tuple[int, float]], rows: int, share: float) -> str | None:
    """The first update whose hard rows or loss are further off than that."""
    for i, ((n_hard, loss), (right_hard, right_loss)) in enumerate(zip(ours, right, strict=True), 1):
        if abs(n_hard - right_hard) > rows or not abs(loss - right_loss) <= share * abs(right_loss):
            return f"update {i}: {n_hard} hard rows, loss {loss:.6f}; ham_reference: {right_hard}, {right_loss:.6f}"
    return None
