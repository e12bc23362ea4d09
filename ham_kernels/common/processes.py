"""What a launcher of several processes has told this one."""

from __future__ import annotations

import os

from . import troubles


def launched() -> int:
    """How many processes a launcher such as torchrun has started."""
    world = os.environ.get("WORLD_SIZE", "1")
    return int(world) if world.isdecimal() else 1


def speaks() -> bool:
    """Whether this process says what all of them would: it is the first, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def alone() -> dict[str, str]:
    """The environment of a process that works by itself on the GPU of this one, if it has one."""
    own = {k: v for k, v in os.environ.items() if k not in _OF_LAUNCHERS and not k.startswith("TORCHELASTIC_")}
    if launched() > 1:
        gpus, local = own.get("CUDA_VISIBLE_DEVICES"), int(os.environ.get("LOCAL_RANK", "0"))
        listed = [str(local)] if gpus is None else gpus.split(",")[local : local + 1]
        own["CUDA_VISIBLE_DEVICES"] = ",".join(listed)
    return own


_OF_LAUNCHERS = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip


def refuse_several() -> None:
    """For a command that works in one process. Raises: ValueError in one of several."""
    if (world := launched()) > 1:
        raise troubles.error("several_processes", world=world)
