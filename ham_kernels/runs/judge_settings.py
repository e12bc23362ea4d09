"""How models are judged: the flags of `ham evaluate`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Gt, Le

from ..common import field_types

_MASKING = tyro.conf.arg(
    constructor=bool,  # --masking, --no-masking, or neither
    help_behavior_hint="(default: where that costs no more than the attacks, or its other flags are given)",
)
_RUNS = tyro.conf.arg(help_behavior_hint="(default: the run's)")
_IN_PROPORTION = tyro.conf.arg(help_behavior_hint="(default: the run's, in proportion to eps)")


@dataclass(frozen=True)
class JudgeSettings:
    """How a model is judged."""

    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd20", "cw20")
    """clean, fgsm, pgdK, cwK (PGD on the CW loss), odiR (R restarts from random directions), apgd (APGD-CE and APGD-T),
    autoattack."""
    restarts: Annotated[int, Ge(1)] = 1
    """Random starts of pgdK and cwK; an image counts as robust if it resists all."""
    part: Literal["test", "val", "train"] = "test"
    images: Annotated[int | None, Ge(1)] = None
    """Judge only so many images of the part, class shares kept."""
    batch_size: Annotated[int, Ge(1)] = 256
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the model that is judged."""
    search: Literal["plain", "fast"] = "plain"
    """fast: attacks look for examples on a rounded, compiled form of the model; the plain one judges each."""
    seed: Annotated[int, Ge(0)] = 0
    masking: Annotated[bool | None, _MASKING] = None
    """Check for gradient masking, with some 350 forwards and backwards of each image."""
    masking_images: Annotated[int | None, Ge(2), tyro.conf.arg(help_behavior_hint="(default: 512)")] = None
    """So many images are checked."""
    transfer_from: Path | None = None
    """Another run, whose adversarial examples should not be stronger than this run's own."""
    analyses: bool = True
    """Over-confident adversarial examples, and which easy ones stay easy (on training images); an image of each class
    with its perturbation."""
    analysis_images: Annotated[int, Ge(1)] = 2048
    """At most so many images are analysed."""
    threshold: Annotated[float, Gt(0.5), Le(1)] = 0.9
    """Confidence from which an adversarial example counts as over-confident."""

    def check(self) -> None:
        """What can be told wrong without a run. Raises: TypeError, ValueError naming the field and its value."""
        field_types.check(self)
        if not self.attacks:
            raise ValueError("attacks: got none; give at least one, such as clean pgd20")
        if self.transfer_from is not None and self.masking is False:
            raise ValueError(
                f"transfer_from: got {self.transfer_from} with masking off, which alone uses it; leave one of them out"
            )


@dataclass(frozen=True)
class _WhichWeights:
    weights: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help_behavior_hint="(default: ema where the run keeps a weight average, else last)"),
    ] = ()
    """Of last, ema (both of the last epoch), best, best_ema (of the epoch that the validation images chose); or all."""


@dataclass(frozen=True)
class EvaluateSettings(JudgeSettings, _WhichWeights):
    """How a run is judged."""

    eps: Annotated[float | None, Ge(0), _RUNS] = None
    """Budget, in units of images in [0, 1]."""
    step_size: Annotated[float | None, Ge(0), _IN_PROPORTION] = None
    """Of one attack step."""
    eps_curve: Annotated[tuple[float, ...], Gt(0), tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    """Judge the attacks (but clean) under each of these budgets too, step_size in proportion, in files of their own."""
    path: str | None = None
    """Where the run's images lie now, if they have moved; they must be the same."""

    def check(self) -> None:
        super().check()
        given = " ".join(f"{eps:g}" for eps in self.eps_curve)
        if len(set(given.split())) < len(self.eps_curve):
            raise ValueError(f"eps_curve: got {given}; give each budget once")
        if self.eps_curve and set(self.attacks) == {"clean"}:
            raise ValueError(f"eps_curve: got {given} with attacks=clean, which no budget changes; add such as pgd20")
