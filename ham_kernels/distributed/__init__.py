"""Several processes that train one model: who they are and where they meet (`ranks`), BatchNorm over all (`batchnorm`).

It knows nothing of attacks. `start()` joins the processes that torchrun has started; `Ranks` are then those of a group,
and ALONE is one process, which sends nothing.
"""

from .batchnorm import synced_batchnorm
from .ranks import (
    ALONE,
    PATIENT,
    TIMEOUT,
    Meeting,
    RankError,
    Ranks,
    forwards_meet,
    inner_model,
    ranks_of,
    start,
    stop,
    wrapped,
)

__all__ = [
    "ALONE", "PATIENT", "TIMEOUT", "Meeting", "RankError", "Ranks", "forwards_meet", "inner_model", "ranks_of", "start",
    "stop", "synced_batchnorm", "wrapped",
]  # fmt: skip
