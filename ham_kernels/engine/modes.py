"""Model modes of an attack and of an update, and autocast."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..common import troubles
from .eval_batchnorm import fast_eval_batchnorm

PRECISIONS = ("fp32", "bf16", "fp16")
JUDGING_PRECISIONS = PRECISIONS[:2]  # fp16 would hide what attacks on other losses than the cross entropy need
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_resting: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
_making_a_lock = threading.Lock()


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """One thread at a time has a model in a mode of ours: each puts back what it found."""
    with _making_a_lock:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each module is in the mode, train or eval, in which it was."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def attack_mode(model: nn.Module, *, fast_batchnorm: bool = True) -> Iterator[None]:
    """Eval mode and no weight gradients inside; afterwards every flag is as it was, also after an error.

    Gradients can be had inside whatever is around: torch.no_grad, or torch.inference_mode, which Lightning puts around
    validation. Threads that want the same model wait for each other. Raises: ValueError where no gradient can pass.
    """
    with _alone(model), modes_kept(model):
        parameters = list(model.parameters())
        learned = [p for p in parameters if p.requires_grad]
        if any(p.is_inference() for p in learned):
            raise troubles.error("inference_weights")
        try:
            with torch.inference_mode(False), torch.enable_grad():
                for m in model.modules():
                    m.training = False
                for p in learned:
                    p.requires_grad_(False)
                with fast_eval_batchnorm(model) if fast_batchnorm else nullcontext():
                    yield
        finally:
            for p in learned:
                p.requires_grad_(True)
            # behind a forward that no backward followed FSDP2 leaves gathered weights in the place of shards
            for p, now in zip(parameters, model.parameters(), strict=False):
                if p.requires_grad and now is not p:
                    now.requires_grad_(True)


def note_resting(model: nn.Module) -> WeakSet[nn.Module]:
    """Layers that the user keeps in eval mode while the model trains; as last seen, where it does not train now."""
    if model.training:
        _resting[model] = WeakSet(m for m in model.modules() if not m.training)
    return _resting.get(model, WeakSet())


@contextmanager
def update_mode(model: nn.Module, freeze_bn: bool) -> Iterator[None]:
    """Train mode inside, but for the layers that the user keeps in eval mode; afterwards every flag is as it was.

    A model that is in eval mode as a whole goes to train mode by its own train(). If frozen, BatchNorm uses its running
    statistics.
    """
    with _alone(model), modes_kept(model):
        resting = note_resting(model)
        if not model.training:
            model.train()
        for m in resting:
            m.training = False
        for m in model.modules() if freeze_bn else ():
            if isinstance(m, _NormBase):
                m.training = False
        yield


def autocast(precision: str, device: torch.device):
    """fp32: as it is. bf16, fp16: autocast; weights, images and losses stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def model_device(model: nn.Module) -> torch.device | None:
    """Where the model's parameters live; None for a model without any."""
    return next((p.device for p in model.parameters()), None)
