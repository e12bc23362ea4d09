"""AutoAttack, standard version (Croce and Hein, arXiv 2003.01690), by the torchattacks package.

What has to be put right around torchattacks 3.5: its "standard" runs APGD and FAB for 10 steps where the paper and
the published tables have 100, and attacks all other classes where they have 9; it seeds torch's global generator; it
prints where a model has no parameters; it switches a model that says it is training back to train mode; and its
targeted loss needs four classes.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from .. import engine
from ..attack.pgd import PGD
from ..common import checks
from ..ops import l2
from .class_accuracy import correct_rows

STEPS = 100
TARGETS = 9
QUERIES = 5000
TOLERANCE = 1e-5  # rounding of x + (x_adv - x) in fp32, in units of the images (relative to eps for L2)


def library() -> ModuleType:
    """torchattacks, or an ImportError that says how to get it."""
    try:
        return importlib.import_module("torchattacks")
    except ImportError as error:
        raise ImportError(
            f'attacks: "autoattack" needs torchattacks ({error}); pip install "ham_kernels[bench]"'
        ) from error


def settings() -> dict:
    """What decides its flags besides the budget; JSON-ready."""
    return {
        "version": "standard", "steps": STEPS, "targets": TARGETS, "queries": QUERIES,
        "torchattacks": getattr(library(), "__version__", "unknown"),
    }  # fmt: skip


class _Fp32Logits(nn.Module):
    """The model as torchattacks must see it: fp32 logits, in eval mode, with a parameter that says where it is."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str):
        super().__init__()
        self.place = nn.Parameter(torch.zeros((), device=device), requires_grad=False)
        self.model, self.precision = model, precision
        self.training = False  # the model inside is in eval mode already

    def forward(self, x: Tensor) -> Tensor:
        with engine.autocast(self.precision, x.device):
            return self.model(x).float()


def survivors(model: nn.Module, x: Tensor, y: Tensor, pgd: PGD, *, seed: int, precision: str) -> tuple[Tensor, int]:
    """(n,) bool, rows that survive AutoAttack, and the number of classes; model in attack_mode.

    Rows that the model gets wrong without an attack are not attacked: they are lost already.
    """
    guard = engine.BatchGuard(x, y)
    wrapped = _Fp32Logits(model, x.device, precision)
    correct, classes = _correct(wrapped, x, y, guard)
    guard.read()
    _check_problem(x, classes)
    rows = correct.nonzero()[:, 0]
    if len(rows) and pgd.eps > 0:
        clean, labels = x[rows].float().contiguous(), y[rows]
        x_adv = projected(examples(wrapped, clean, labels, classes, pgd, seed), clean, pgd)
        still, _ = _correct(wrapped, x_adv, labels, guard)
        guard.read()
        correct[rows] = still
    return correct, classes


def examples(wrapped: nn.Module, x: Tensor, y: Tensor, classes: int, pgd: PGD, seed: int) -> Tensor:
    """The adversarial examples; a row that no attack could turn comes back as it was."""
    norm = "L2" if pgd.norm == "l2" else "Linf"
    attack = library().AutoAttack(wrapped, norm=norm, eps=pgd.eps, version="standard", n_classes=classes, seed=seed)
    for part in attack._autoattack.attacks:
        if hasattr(part, "n_queries"):
            part.n_queries = QUERIES
        else:
            part.steps = STEPS
        if hasattr(part, "n_target_classes"):
            part.n_target_classes = min(TARGETS, classes - 1)
    with _own_generators(x.device):
        return attack(x, y).detach()


def projected(x_adv: Tensor, x: Tensor, pgd: PGD) -> Tensor:
    """Into the ball and [0, 1], if only for the last rounding: what lies outside is no adversarial example."""
    delta = (x_adv - x).nan_to_num(0.0)
    delta = l2.shorten(delta, pgd.eps) if pgd.norm == "l2" else delta.clamp(-pgd.eps, pgd.eps)
    return (x + delta).clamp(0.0, 1.0)


@torch.no_grad()
def _correct(wrapped: nn.Module, x: Tensor, y: Tensor, guard: engine.BatchGuard) -> tuple[Tensor, int]:
    z = wrapped(x)
    checks.model_output(z, x.shape[0])
    guard.logits(z)
    return correct_rows(z, y), z.shape[1]


def _check_problem(x: Tensor, classes: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}; AutoAttack needs images (n, channels, height, width)")
    if classes < 4:
        raise ValueError(f"model: knows {classes} classes; AutoAttack's targeted loss needs at least 4")


@contextmanager
def _own_generators(device: torch.device):
    """torch's global generators inside are a copy."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
