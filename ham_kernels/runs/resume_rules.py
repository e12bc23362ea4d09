"""What a run may not change on its way: the settings that a checkpoint belongs to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..methods.registry import warm_up_of
from ..methods.settings import Method
from .config_file import merge, to_dict
from .settings import TrainSettings, lr_factor

_FREE = {
    "data": ("path", "root", "download", "workers", "generated"),  # data.json tells whether the images are the same
    "optim": ("epochs",),  # as far as the learning rate of the epochs done stays
    "run": ("device", "label", "checkpoint_minutes", "log", "teacher"),  # its digest tells whether it is the same
    "engine": ("channels_last", "compile", "cuda_graphs", "winograd", "keep_memory"),  # how, not what
}


def noted(settings: TrainSettings) -> dict[str, Any]:
    """What a checkpoint keeps of its run's settings."""
    return {"settings": _fixed(settings), "method": to_dict(settings)["method"], "epochs": settings.optim.epochs}


def check_unchanged(state: dict[str, Any], settings: TrainSettings) -> None:
    """Raises: ValueError naming a setting that differs from those of the checkpoint's run.

    The method may differ until start_epoch: before it all methods train alike, and share their warm-ups.
    """
    usual = _fixed(TrainSettings())  # of settings that are younger than the checkpoint
    for section, values in _fixed(settings).items():
        before = usual[section] | state["settings"].get(section, {})
        for name, value in values.items():
            _same(f"{section}.{name}", before.get(name), value)
    running = state["trainer"]["running"]
    begun = state["trainer"]["epoch"] + (running is not None and running["batches"] > 0)
    if settings.optim.epochs < begun:
        raise ValueError(
            f"optim.epochs: config.toml says {settings.optim.epochs}, but the checkpoint is of epoch {begun}; give "
            f"{begun} or more"
        )
    before = replace(settings.optim, epochs=state.get("epochs", settings.optim.epochs))
    if any(lr_factor(before, epoch) != lr_factor(settings.optim, epoch) for epoch in range(1, begun + 1)):
        _same("optim.epochs", before.epochs, settings.optim.epochs)
    if "method" not in state:  # of an earlier version
        return
    then = merge(replace(settings, method=type(settings.method)()), {"method": state["method"]}).method
    if _decides(then, begun, settings) != _decides(settings.method, begun, settings):
        before, now = then.in_effect(), settings.method.in_effect()
        for name in {**now, **before}:
            _same(f"method.{name}", before.get(name), now.get(name))


def _same(name: str, then: Any, now: Any) -> None:
    if then != now:
        raise ValueError(
            f"{name}: the checkpoint is of a run with {then}, config.toml says {now}; such a change needs a new run"
        )


def _fixed(settings: TrainSettings) -> dict[str, dict]:
    fixed = {
        section: {k: v for k, v in values.items() if k not in _FREE.get(section, ())}
        for section, values in to_dict(settings).items()
        if section != "method"
    }
    fixed["data"]["generated"] = settings.data.generated is not None  # the file may move
    return fixed


def _decides(method: Method, epoch: int, settings: TrainSettings) -> Any:
    """What of the method an epoch's training, and that of those before it, hangs on."""
    warm_up = warm_up_of(method, settings.warm_up.name)
    trains = warm_up if epoch < method.start_epoch else method
    told = trains.in_effect()
    if trains == warm_up:  # where the next method starts says nothing of this one
        del told["start_epoch"]
    return told
