"""The processes of a training, and the meetings at which they hear of each other before anything is changed.

Collectives used: all_reduce (sum) alone, which gloo and NCCL serve alike. Sums that an all_reduce gives are the same on
all processes bit by bit, so that what is computed from them cannot drift apart.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common import checks, troubles
from ..common.processes import launched

TIMEOUT = timedelta(hours=2)  # an attack of minutes on one process keeps the others waiting
PATIENT = timedelta(days=365)  # where one process may have hours of work that the others have no part in


class RankError(ValueError):
    """What another process met, by its number. `left`: its caller ended the training there, and nothing failed."""

    def __init__(self, message: str, *, left: bool = False):
        super().__init__(message)
        self.left = left


@dataclass(frozen=True)
class Ranks:
    """Processes 0, ..., world - 1 of a group, of which this one is `rank`."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def several(self) -> bool:
        return self.world > 1

    def sum_(self, t: Tensor) -> Tensor:
        """Over the processes, in place."""
        if self.several:
            dist.all_reduce(t, group=self.group)
        return t

    def table(self, mine: Tensor) -> Tensor:
        """(world, k): row r holds what process r gave, (k,) each."""
        rows = mine.new_zeros(self.world, len(mine))
        rows[self.rank] = mine
        return self.sum_(rows)

    def mean_of(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Means over the processes of tensors that have the same shapes, and the same gaps, on each."""
        found = [t for t in tensors if t is not None]
        if not self.several or not found:
            return list(tensors)
        flat = self.sum_(torch.cat([t.detach().flatten() for t in found])) / self.world
        parts = iter(flat.split([t.numel() for t in found]))
        return [t if t is None else next(parts).view(t.shape) for t in tensors]

    def from_first(self, value: Any = None) -> Any:
        """What process 0 gives, on each; such as a path, or what it has read."""
        if not self.several:
            return value
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, dist.get_global_rank(self.group, 0), group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in their order, on each."""
        if not self.several:
            return [value]
        found = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found

    @contextmanager
    def first_alone(self, what: str) -> Iterator[None]:
        """Process 0 runs the block before the others do; where it fails there, they raise RankError.

        For what one process makes and the others then find: a download, a folder, a cache.
        """
        with Meeting(self, torch.device("cpu"), what=what) as meeting:
            if self.rank == 0:
                yield
            meeting.table([])
        if self.rank:
            yield

    def first_makes(self, make: Callable[[], Any]) -> Any:
        """What process 0 makes, on each; where it fails, they raise RankError."""
        made = None
        with self.first_alone("what process 0 makes"):
            if self.rank == 0:
                made = make()
        return self.from_first(made)

    def check_alike(self, model: nn.Module) -> None:
        """Raises: RankError where the weights or buffers of the processes differ in a bit."""
        if not self.several:
            return
        tensors = [t.detach() for t in (*model.parameters(), *model.buffers()) if t.numel()]
        digest = hashlib.sha256()
        for t in tensors:
            digest.update(t.cpu().contiguous().flatten().view(torch.uint8).numpy())
        mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.int32)[:4]  # 128 bits, exact in fp64
        rows = self.table(mine.double().to(self.device(tensors[0].device)))
        if wrong := [r for r, row in enumerate(rows) if not torch.equal(row, rows[0])]:
            raise RankError(f"model: the weights of process {wrong[0]} are no longer those of process 0")

    def device(self, like: torch.device) -> torch.device:
        """Where small tensors lie that are sent: NCCL takes those of a GPU, gloo those of the CPU."""
        if not self.several or dist.get_backend(self.group) != "nccl":
            return torch.device("cpu")
        return like if like.type == "cuda" else torch.device("cuda", torch.cuda.current_device())


ALONE = Ranks()


def ranks_of(group: str | dist.ProcessGroup | None = "auto") -> Ranks:
    """The processes of a group. "auto": of the default one, where it has been started; None: this process alone.

    Raises: TypeError, ValueError naming the argument, also where a launcher has started several processes and nothing
        joins them.
    """
    if group is None or (group == "auto" and not _joined()):
        if group == "auto" and (world := launched()) > 1:
            raise troubles.error("several_processes", world=world)
        return ALONE
    if group == "auto":
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f'group: got {group!r}; it must be "auto", None or a torch.distributed process group')
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: this process is none of it")
    world = dist.get_world_size(group)
    return Ranks(rank, world, group) if world > 1 else ALONE


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def start(backend: str | None = None, timeout: timedelta = TIMEOUT) -> Ranks:
    """Joins the processes that torchrun has started, by the variables that it sets; nothing in a single one.

    backend: "nccl" or "gloo"; None: NCCL where each process has a GPU of its own, also where its launcher shows it no
        other, else gloo. With NCCL it is the current one.
    timeout: how long processes wait for each other.
    Returns: the processes. A second call, or one behind init_process_group, returns those that are there.
    """
    if launched() > 1 and not _joined():
        gpu = _gpu_of_this_process()
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        backend = backend or _agreed_backend(store, rank, world, "" if gpu is None else _name_of(gpu))
        if backend == "nccl" and gpu is not None:  # else NCCL says what is missing
            torch.cuda.set_device(gpu)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return ranks_of()


def _gpu_of_this_process() -> int | None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local, here = (int(os.environ.get(name, usual)) for name, usual in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    return local if gpus >= max(here, local + 1) else 0 if gpus == 1 else None


def _name_of(gpu: int) -> str:
    """That no other GPU has, on whatever machine."""
    return str(torch.cuda.get_device_properties(gpu).uuid)


def _agreed_backend(store: dist.Store, rank: int, world: int, gpu: str) -> str:
    """NCCL where the GPUs of all processes are there, and no two the same: on all processes alike."""
    store.set(f"ham_gpu_{rank}", gpu)
    gpus = [store.get(f"ham_gpu_{r}").decode() for r in range(world)]
    return "nccl" if all(gpus) and len(set(gpus)) == world else "gloo"


def stop() -> None:
    """Parts from the other processes when the work of all is done: one that ended before would end the others too."""
    if _joined():
        dist.barrier()
        dist.destroy_process_group()


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside a wrapper for several processes: what an attack runs on, so that it reduces and sends nothing.

    FSDP2 has no wrapper: each forward of such a model is a collective, and is left to it. Raises: TypeError.
    """
    checks.module("model", model)
    while isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "_FabricModule":
        model = model.module
    return model


def forwards_meet(model: nn.Module) -> bool:
    """Whether a forward waits for the other processes, as those of FSDP do, which gather weights."""
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return not kinds.isdisjoint({"FSDPModule", "FullyShardedDataParallel"})


def wrapped(model: nn.Module, ranks: Ranks) -> nn.Module | None:
    """torch's DistributedDataParallel around a model, which takes the weights of process 0; None for one process.

    Buffers are not sent: BatchNorm's are made alike by its own sums, and a broadcast in each forward would disturb a
    loss that has two.
    """
    if not ranks.several:
        return None
    known = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch 2.14, and before
    return nn.parallel.DistributedDataParallel(model, process_group=ranks.group, **{name: False})


# ---------------------------------------------------------------- meetings
_FINE, _FAILED, _LEFT = 0.0, 1.0, 2.0
_WIDTH = 8  # numbers of each process; all meetings have so many, so that processes at unlike ones hear that they are


class Meeting:
    """One point of the work at which all processes meet: who fails on the way there says so, and all raise.

    Within `with`, `table` is called once, with as many numbers on each process, 8 at most. An error before it, in place
    of the call, is told to the others, whose own call raises RankError, as that of all does where one is at another
    point, or knows another `alike`.

    Args: device: of the model.  what: names the point.  alike: a number that must be the same on all.
    """

    def __init__(self, ranks: Ranks, device: torch.device, *, what: str = "this step", alike: int = 0):
        self._ranks, self._what = ranks, what
        self._point = float(zlib.crc32(f"{what} {alike}".encode()))
        self._device = ranks.device(device)
        self._held = not ranks.several

    def table(self, mine: Sequence[float] | Tensor) -> list[list[float]]:
        """Row r: the numbers of process r. Waits for the device. Raises: RankError where another has failed."""
        if not self._ranks.several:
            return [list(mine)]
        mine = torch.as_tensor(mine, dtype=torch.float64, device=self._device)
        if (n := len(mine)) > _WIDTH:
            raise ValueError(f"mine: got {n} numbers; a meeting hears {_WIDTH}")
        return [numbers[:n] for numbers in self._hear(_FINE, nn.functional.pad(mine, (0, _WIDTH - n)))]

    def _hear(self, how: float, mine: Tensor) -> list[list[float]]:
        self._held = True
        head = (mine.new_full((1,), number) for number in (how, self._point))  # filled there, not copied to it
        heard = self._ranks.table(torch.cat([*head, mine])).tolist()
        others = [(r, row) for r, row in enumerate(heard) if r != self._ranks.rank]
        for r, (how_is_it, *_) in others:
            if how_is_it == _LEFT:
                raise RankError(f"process {r} ended the training before {self._what}", left=True)
            if how_is_it == _FAILED:
                raise RankError(f"process {r} failed before the end of {self._what}; its own message says why")
        if how == _FINE and (apart := [r for r, (_, point, *_) in others if point != self._point]):
            raise RankError(
                f"process {apart[0]} is not where this one is, at {self._what}; all must be given the same work: as "
                "many batches, of loaders that are told their rank and the world"
            )
        return [numbers for _, _, *numbers in heard]

    def leave(self) -> None:
        """Tells the others that this process goes, and nothing has failed."""
        self._tell(_LEFT)

    def _tell(self, how: float) -> None:
        if self._held:
            return
        with suppress(RankError):  # both fail, each with its own message
            self._hear(how, torch.zeros(_WIDTH, dtype=torch.float64, device=self._device))

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            asked = getattr(error, "ends_well", False) or not isinstance(error, Exception)
            self._tell(_LEFT if asked else _FAILED)
