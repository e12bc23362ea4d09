"""How steps run on the hardware: modes, precision, memory, compiled passes, CUDA graphs, and what the host reads.

Below: `modes` (eval and train mode, autocast), `reads` (the host's reads, clocks), `options` (what can be asked for,
and what happens where it cannot be had), `memory`, `halves` (weights in half precision), `winograd` (convolutions on
the CPU), `graphs` (capture and replay), `core` (Engine, which ties them together). Nothing here knows an attack or a
method.
"""

from .engine import PLAIN, Engine, plain
from .host_reads import BatchGuard, NonFiniteError, Stopwatch, start_read
from .memory import keep_freed_memory, return_freed_memory
from .modes import JUDGING_PRECISIONS, PRECISIONS, attack_mode, autocast, model_device, update_mode
from .options import EngineError, EngineOptions, EngineWarning

__all__ = [
    "JUDGING_PRECISIONS",
    "PLAIN",
    "PRECISIONS",
    "BatchGuard",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineWarning",
    "NonFiniteError",
    "Stopwatch",
    "attack_mode",
    "autocast",
    "keep_freed_memory",
    "model_device",
    "plain",
    "return_freed_memory",
    "start_read",
    "update_mode",
]
