"""How steps run on the hardware: modes, precision, memory, compiled passes, CUDA graphs, and what the host reads.

Below: `modes` (eval and train mode, autocast), `first_look` (what a model must be to be believed), `host_reads` (the
host's reads, clocks), `buffers` (put back after an error), `options` (what can be asked for, and what happens where it
cannot be had), `memory`, `half_weights`, `eval_batchnorm` and `winograd` (layers made cheaper), `graphs` (capture and
replay), `engine` (Engine, which ties them together), `asked` (its logits, for attacks of others). Nothing here knows an
attack or a method.
"""

from .asked import logits_of
from .buffers import Buffers, LastWrite
from .engine import PLAIN, Engine, fast, plain
from .first_look import ROWS, findings, first_look, look_once, runnable
from .host_reads import BatchGuard, NonFiniteError, Stopwatch, largest_entries, no_gradient, start_read
from .memory import keep_freed_memory, return_freed_memory
from .modes import (
    JUDGING_PRECISIONS,
    PRECISIONS,
    attack_mode,
    autocast,
    model_device,
    modes_kept,
    note_resting,
    update_mode,
)
from .options import EngineError, EngineOptions, EngineWarning

__all__ = [
    "JUDGING_PRECISIONS",
    "PLAIN",
    "PRECISIONS",
    "ROWS",
    "BatchGuard",
    "Buffers",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineWarning",
    "NonFiniteError",
    "LastWrite",
    "Stopwatch",
    "attack_mode",
    "fast",
    "autocast",
    "findings",
    "first_look",
    "keep_freed_memory",
    "largest_entries",
    "logits_of",
    "no_gradient",
    "look_once",
    "model_device",
    "modes_kept",
    "note_resting",
    "plain",
    "return_freed_memory",
    "runnable",
    "start_read",
    "update_mode",
]
