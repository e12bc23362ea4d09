"""Does a model only look robust because its gradients lead attacks astray? (Athalye et al., arXiv 1802.00420.)"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import engine
from ..attack.pgd import PGD
from ..common import checks
from ..ops import random_start
from .class_accuracy import correct_rows, logits_at
from .named_attacks import batches, resolve_device, walk
from .resumable import Progress

IMAGES = 512  # that are checked, unless told otherwise
COST = 350  # forwards and backwards of each, about
STEPS = 20  # of the attack that everything else is held against
STEP_COUNTS = (1, 2, 5, 10, 20, 50)
SCALES = (0.01, 0.1, 10.0, 100.0)
NOISE_DRAWS = 20
NOISE_STEP = 1 << 30  # noise of its own, apart from that of the random starts
ERRORS = 2.0  # standard errors that count as noise
CLASS_POINTS = 0.15  # and in one class, of fewer images
POINTS = 0.02  # accuracy that an honest model may lose to a better-tuned attack
LATE_POINTS = 0.05  # and to 30 more steps: L2 attacks of 20 are still under way on honest models
RISE = 0.01  # share of the loss that may be lost between two step counts: PGD hovers around its maximum


def masking(
    model: nn.Module, loader: Iterable, *, eps: float, step_size: float, norm: str = "linf",
    device: torch.device | str | None = None, precision: str = "fp32", seed: int = 0, other: nn.Module | None = None,
    images: int = IMAGES, progress: Progress | None = None, known: Sequence[dict] = (),
    note: Callable[[list[dict]], None] | None = None,
) -> dict:  # fmt: skip
    """Five checks that a model with honest gradients passes, each on the same images and with paired errors.

    "steps": more PGD steps do not help the defender, the loss levels off, and FGSM does not beat PGD-20. "budget":
    with a budget as large as the range of pixels PGD wins. "scale": PGD on scaled logits, or on the margin instead of
    the cross entropy, is no stronger than PGD. "transfer": neither are examples made on another model. "noise": nor
    is random noise. Passing them proves nothing; failing one means that PGD's accuracy is not the model's robustness.

    Args:
        model, eps, step_size, norm, device, precision, seed: as in `evaluate`; eps and step_size above 0.
        loader: any iterable of (x in [0, 1], y); its first images are used, so they should hold all classes.
        other: a model trained apart from this one, for the transfer check, which is not run without it.
        images: how many images to use at most. Costs about 350 forwards and backwards of each.
        progress: called as progress("masking", checks done, checks in all), first with 0.
        known: the first checks as an earlier call noted them, of the same model and images; they are not run again.
        note: called with all checks so far after each.
    Returns: JSON-ready {"suspicious", "n", "checks": [{"name", "title", "values", "suspicious", "why", "seconds"}]}.
    Raises: TypeError, ValueError naming the argument. Both models are left as they were.
    """
    for name, value in (("eps", eps), ("step_size", step_size)):
        if checks.real(name, value) == 0:
            raise ValueError(f"{name}: got 0; there is no gradient to examine")
    checks.choice("precision", precision, engine.JUDGING_PRECISIONS)
    checks.integer("images", images, 2)
    if other is not None and not isinstance(other, nn.Module):
        raise TypeError(f"other: got {type(other).__name__}; it must be a model")
    pgd = PGD(eps, step_size, STEPS, norm)
    device = resolve_device(model, device)
    bench = _Bench(model, _first(loader, images, device), precision, seed)
    engine.first_look(model, *bench.batches[0])
    with engine.attack_mode(model):
        plain = bench.after(pgd)
        found = list(known)
        todo = (
            partial(_steps, bench, pgd), partial(_budget, bench, pgd), partial(_scale, bench, pgd, plain),
            partial(_transfer, bench, pgd, plain, other), partial(_noise, bench, pgd, plain),
        )  # fmt: skip
        for check in todo[len(found) :]:
            if progress is not None:
                progress("masking", len(found), len(todo))
            began = time.perf_counter()
            found.append({**check(), "seconds": time.perf_counter() - began})
            if note is not None:
                note(found)
        if progress is not None:
            progress("masking", len(found), len(todo))
    return {"suspicious": any(check["suspicious"] for check in found), "n": len(plain), "checks": found}


# ---------------------------------------------------------------- the checks
def _steps(bench: _Bench, pgd: PGD) -> dict:
    correct, loss = bench.along(replace(pgd, steps=STEP_COUNTS[-1]), (0, *STEP_COUNTS))
    fgsm = bench.after(replace(pgd, steps=1, step_size=pgd.eps, random_start=False))
    faults = []
    rise, noise = _paired(loss[STEPS], loss[0])
    if rise <= noise:
        faults.append(f"{STEPS} steps do not raise the loss of the random start, {_mean(loss[0]):.3g}")
    for fewer, more in pairwise(STEP_COUNTS):
        gain, noise = _paired(correct[more], correct[fewer])
        if gain > noise:
            faults.append(f"{more} steps leave {_points(gain)} more images correct than {fewer}")
        fall, noise = _paired(loss[fewer], loss[more])
        if fall > noise + RISE * float(loss[fewer].mean()):
            faults.append(f"the loss after {more} steps is lower than after {fewer}, by {fall:.3g}")
    late, noise = _paired(correct[STEPS], correct[STEP_COUNTS[-1]])
    if late > noise + LATE_POINTS:
        faults.append(f"accuracy still falls by {_points(late)} from {STEPS} to {STEP_COUNTS[-1]} steps")
    ahead, noise = _paired(correct[STEPS], fgsm)
    if ahead > noise:
        faults.append(f"FGSM fools {_points(ahead)} more images than {STEPS} steps")
    values = {
        "steps": list(STEP_COUNTS), "accuracy": [_mean(correct[k]) for k in STEP_COUNTS],
        "loss": [_mean(loss[k]) for k in STEP_COUNTS], "fgsm": _mean(fgsm),
    }  # fmt: skip
    return _result("steps", "More steps make the attack stronger, until it levels off", values, faults)


def _budget(bench: _Bench, pgd: PGD) -> dict:
    """From the image itself: a random start in a large ball is noise, which fools models without any gradient."""
    shape = bench.batches[0][0].shape[1:]
    whole = math.sqrt(math.prod(shape)) if pgd.norm == "l2" else 1.0  # between the two farthest images
    factors = [1.0]
    while pgd.eps * factors[-1] < whole:
        factors.append(factors[-1] * 2)
    budgets = [min(pgd.eps * factor, max(whole, pgd.eps)) for factor in factors]  # beyond `whole` all are the same
    accuracy = []
    for eps, factor in zip(budgets, factors, strict=True):
        wide = replace(pgd, eps=eps, step_size=pgd.step_size * factor, random_start=False)
        accuracy.append(_mean(bench.after(wide)))
    chance = 1.0 / bench.classes
    noise = ERRORS * math.sqrt(chance * (1 - chance) / bench.n)
    faults = []
    if accuracy[-1] > chance + noise + POINTS:
        faults.append(f"with pixels free to move anywhere PGD still leaves {accuracy[-1]:.1%} correct")
    values = {"eps": budgets, "accuracy": accuracy, "chance": chance}
    return _result("budget", "A budget that covers all images fools the model", values, faults)


def _scale(bench: _Bench, pgd: PGD, plain: Tensor) -> dict:
    found = {f"ce of {c:g} z": bench.after(pgd, attacked=_Scaled(bench.model, c)) for c in SCALES}
    found["cw"] = bench.after(replace(pgd, loss="cw"))
    faults = []
    for name, correct in found.items():
        ahead, noise = _paired(plain, correct)
        if ahead > noise + POINTS:
            faults.append(f"PGD on {name} fools {_points(ahead)} more images than on the cross entropy")
        faults += bench.of_one_class(plain, correct, f"PGD on {name}")
    values = {"plain": _mean(plain)} | {name: _mean(correct) for name, correct in found.items()}
    return _result("scale", "The attack does not depend on the scale of the logits, nor on the loss", values, faults)


def _transfer(bench: _Bench, pgd: PGD, plain: Tensor, other: nn.Module | None) -> dict:
    title = "Examples made on another model are no stronger than its own"
    if other is None:
        return _result("transfer", title, {}, [], done="not run: no other model")
    with engine.attack_mode(other):
        x, _ = bench.batches[0]
        if (classes := logits_at(other, x[:2], bench.precision).shape[1]) != bench.classes:
            raise ValueError(f"other: knows {classes} classes, and the model {bench.classes}")
        correct = bench.after(pgd, attacked=other)
    ahead, noise = _paired(plain, correct)
    faults = [f"they fool {_points(ahead)} more images"] if ahead > noise else []
    return _result("transfer", title, {"plain": _mean(plain), "transfer": _mean(correct)}, faults)


def _noise(bench: _Bench, pgd: PGD, plain: Tensor) -> dict:
    correct = bench.under_noise(pgd)
    ahead, noise = _paired(plain, correct)
    faults = [f"the best of {NOISE_DRAWS} draws fools {_points(ahead)} more images than PGD"] if ahead > noise else []
    faults += bench.of_one_class(plain, correct, f"the best of {NOISE_DRAWS} draws")
    values = {"plain": _mean(plain), "noise": _mean(correct), "draws": NOISE_DRAWS}
    return _result("noise", "Random noise is no stronger than PGD", values, faults)


def _result(name: str, title: str, values: dict, faults: list[str], done: str = "as it should be") -> dict:
    return {
        "name": name, "title": title, "values": values, "suspicious": bool(faults), "why": "; ".join(faults) or done,
    }  # fmt: skip


# ---------------------------------------------------------------- attacks on the same images
class _Scaled(nn.Module):
    """c times the logits, in fp32."""

    def __init__(self, model: nn.Module, c: float):
        super().__init__()
        self.model, self.c = model, c

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).float() * self.c


@dataclass
class _Bench:
    """A model in attack_mode and the images it is examined on. Everything returned is (n,) on the CPU, in double."""

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    precision: str
    seed: int
    classes: int = 0

    @property
    def n(self) -> int:
        return sum(len(y) for _, y in self.batches)

    def of_one_class(self, plain: Tensor, correct: Tensor, by: str) -> list[str]:
        """What tells that PGD is led astray in one class, where an average over all would hide it."""
        y = torch.cat([y for _, y in self.batches]).cpu()
        classes = y.unique()
        beyond = torch.special.ndtr(torch.tensor(-ERRORS, dtype=torch.double))  # all classes share it
        errors = -float(torch.special.ndtri(beyond / len(classes)))
        found = []
        for c in classes.tolist():
            ahead, noise = _paired(plain[y == c], correct[y == c], errors)
            if ahead > noise + CLASS_POINTS:
                found.append(f"in class {c} {by} fools {_points(ahead)} more images than PGD")
        return found

    def after(self, pgd: PGD, attacked: nn.Module | None = None) -> Tensor:
        """Which images stay correct when PGD runs against this model, or against another one."""
        correct = []
        for b, (x, y) in enumerate(self.batches):
            target = self.model if attacked is None else attacked
            attack, at = walk(target, x, y, pgd, seed=self.seed, batch=b, precision=self.precision)
            z = at[pgd.steps] if attacked is None else logits_at(self.model, attack.rows.x_adv, self.precision)
            self.classes = z.shape[1]
            correct.append(correct_rows(z, y))
        return _joined(correct)

    def along(self, pgd: PGD, counts: tuple[int, ...]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Correct flags and cross entropies after each number of steps: one attack passes all of them."""
        correct, loss = ({k: [] for k in counts} for _ in range(2))
        for b, (x, y) in enumerate(self.batches):
            _, at = walk(self.model, x, y, pgd, seed=self.seed, batch=b, precision=self.precision, look_at=counts)
            for k in counts:
                correct[k].append(correct_rows(at[k], y))
                loss[k].append(F.cross_entropy(at[k].double(), y, reduction="none"))
        return tuple({k: _joined(parts) for k, parts in found.items()} for found in (correct, loss))

    def under_noise(self, pgd: PGD) -> Tensor:
        """Which images no draw of noise in the ball turns."""
        correct = []
        for b, (x, y) in enumerate(self.batches):
            holds = torch.ones_like(y, dtype=torch.bool)
            for draw in range(NOISE_DRAWS):
                step = NOISE_STEP + b * NOISE_DRAWS + draw
                noisy = random_start(x, pgd.eps, seed=self.seed, step=step, norm=pgd.norm)
                holds &= correct_rows(logits_at(self.model, noisy, self.precision), y)
            correct.append(holds)
        return _joined(correct)


def _first(loader: Iterable, images: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Batches of the first `images` images."""
    taken = []
    for _, x, y in batches(loader, device):
        taken.append((x[:images], y[:images]))
        images -= len(taken[-1][1])
        if images == 0:
            break
    return taken


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).cpu().double()


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _points(share: float) -> str:
    """A difference of two shares, in percentage points."""
    return f"{100 * share:.1f} points"


def _paired(a: Tensor, b: Tensor, errors: float = ERRORS) -> tuple[float, float]:
    """mean(a - b), and how much of it is noise: differences on the same images, so many standard errors."""
    difference = a - b
    return float(difference.mean()), errors * float(difference.std(correction=0)) / math.sqrt(len(difference))
