"""One process trains and judges a model; what is started as one of several says so before it begins."""

from __future__ import annotations

import os
import sys

from . import troubles


def refuse_several(model=None) -> None:
    """Raises: ValueError in one of several processes of a launcher, or for a model that is wrapped for them."""
    wrapper = type(model).__name__ if model is not None else ""
    if wrapper in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise troubles.error("wrapped_model", wrapper=wrapper)
    world = os.environ.get("WORLD_SIZE", "1")
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        world = str(torch.distributed.get_world_size())
    if world.isdecimal() and int(world) > 1:
        raise troubles.error("several_processes", world=world)
