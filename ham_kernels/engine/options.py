"""What can be asked of the engine, and what happens where model or device cannot serve it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..common import checks, troubles
from .modes import PRECISIONS

REQUIRE = "require"
SWITCHES = ("channels_last", "compile", "cuda_graphs", "winograd")
Choice = bool | Literal["require"]


class EngineWarning(UserWarning):
    """An engine option was asked for and cannot be served; the work goes on without it."""


class EngineError(RuntimeError):
    """An engine option was required and cannot be served."""


@dataclass(frozen=True)
class EngineOptions:
    """Each option is off (False), on (True) or "require".

    Where model or device cannot serve an option that is on, the engine goes on without it after one warning that names
    the reason; where it was required, EngineError is raised. None of them changes the method: rows, losses and
    updates are the same up to the rounding of the arithmetic chosen.
    """

    precision: str = "fp32"  # "bf16", "fp16" (autocast), or "require-bf16", "require-fp16"
    channels_last: Choice = False  # weights and images in NHWC order
    compile: Choice = False  # torch.compile of the model as the attack sees it: eval mode, no weight gradients
    cuda_graphs: Choice = False  # attack steps captured per number of rows, updates where their shape repeats
    winograd: Choice = False  # on the CPU, 3x3 convolutions of stride 1 with a quarter of the multiplications
    keep_memory: bool = True  # on the CPU, freed memory stays with the process

    def __post_init__(self):
        checks.choice("precision", self.precision, (*PRECISIONS, *(f"{REQUIRE}-{p}" for p in PRECISIONS[1:])))
        for name in SWITCHES:
            value = checks.choice(name, getattr(self, name), (False, True, "off", "on", REQUIRE))
            object.__setattr__(self, name, {"off": False, "on": True}.get(value, value))
        checks.flag("keep_memory", self.keep_memory)


def refuse(option: str, reason: str, required: bool) -> None:
    """Raises EngineError where the option was required, else warns."""
    if required:
        raise EngineError(f"{option}: was required, but {reason}")
    troubles.warn("option_not_served", category=EngineWarning, option=option, reason=reason)


def half_problem(precision: str, device: torch.device) -> str | None:
    """Why a device has no arithmetic of this precision, or None where it has."""
    if device.type == "cuda":
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic"
        return None
    if device.type != "cpu":
        return None
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else _older_capabilities()
    wanted = ("avx512_bf16", "amx_bf16", "bf16") if precision == "bf16" else ("avx512_fp16", "amx_fp16", "fp16", "fphp")
    if any(has.get(name) for name in wanted):
        return None
    return f"this CPU has no {precision} arithmetic (torch would emulate it, slower than fp32)"


def _older_capabilities() -> dict[str, bool]:
    """torch 2.10 tells of bf16 by these two only."""
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_bf16": torch.cpu._is_amx_tile_supported()}


def reason(what: str, error: Exception) -> str:
    """A failure in one line."""
    words = " ".join(str(error).split()) or "no message"
    return f"{what} ({type(error).__name__}: {words if len(words) <= 300 else words[:297] + '...'})"
