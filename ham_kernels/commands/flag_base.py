"""What the flags of a training start from: presets, a TOML file, the run of --from. Imports no torch."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

from ..methods.registry import with_name
from ..runs.config_file import from_toml, read_toml
from ..runs.presets import LONG, epochs_in_time, for_folder, preset, rescaled, stretched, with_fewer_epochs
from ..runs.settings import TrainSettings
from .experiments import without_idle_teacher
from .fine_tuning import EPOCHS, FINE_TUNED, config_of, fine_tuning

# Of --preset: the method, its switches, and its time where it is not in as many epochs as PGD-AT.
PRESETS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "fair": ("fair", {"fast": True}, LONG),
    "fast": ("fair", {"fast": True}, None),
    "paper": ("wat", {}, None),
}
ADAMW_LR = 1e-3  # presets have SGD's


def base_of(argv: list[str], stretch: float | None = None) -> TrainSettings:
    """What the flags start from: the preset of the data set, then the TOML file, in as many epochs as asked for.

    --epochs stretches the course of both, so that it keeps its shape; epochs in the file stretch the preset's; then
    `stretch` does. --from takes the settings of a run for the file.
    """
    config, epochs, origin = seen(argv, "--config"), seen(argv, "--epochs"), seen(argv, "--from")
    of_run = None if origin is None else config_of(origin)
    if origin is not None and seen(argv, "--weights") is not None:
        raise ValueError(f"weights: cannot be given with --from {origin}, which has its own")
    if of_run is not None and config is not None:
        raise ValueError(f"config: cannot be given with --from {origin}, whose settings it would be")
    config = config if of_run is None else of_run
    told = {} if config is None else read_toml(config)
    named, switches = _method_named(argv)
    of_flag = None if get(told, "method", "name") else named  # whose settings the file's are, where it does not say
    if config is not None:
        from_toml(config, TrainSettings(), of_flag)  # judges keys and types before anything is made of them
    path = seen(argv, "--path") or get(told, "data", "path")
    named_set, set_of_file = seen(argv, "--dataset"), get(told, "data", "dataset")
    if named_set not in (None, set_of_file) and seen(argv, "--path") is None and get(told, "data", "path"):
        raise ValueError(
            f"dataset: got {named_set!r}, but {config} has the path {path}; give --path too (--path None for the data "
            "set's own images)"
        )
    dataset = named_set or set_of_file
    if path not in (None, "", "None") and not dataset:
        numbers = {key: _number(argv, told, key) for key in ("size", "train_images", "batch_size")}
        base = for_folder(str(path), **numbers)
    else:
        base = preset(dataset or "digits")
    if config is not None:
        own_epochs = get(told, "optim", "epochs")
        base = from_toml(config, rescaled(base, own_epochs) if own_epochs else base, of_flag)
    count = int(epochs) if epochs is not None and epochs.isdecimal() and int(epochs) > 0 else None
    if origin is not None:
        tuned_before = base.run.weights is not None
        base = fine_tuning(base, origin, stretched(EPOCHS if count is None else count, stretch))
        switches = {**switches, "start_epoch": 1}
    if named is not None:
        method = with_name(base.method, named, base.optim.epochs)
        base = without_idle_teacher(replace(base, method=replace(method, **switches)))
    if seen(argv, "--teacher") is not None:  # another than that of the file, or other weights
        base = replace(base, run=replace(base.run, teacher_digest=None))
    optimizer, was = seen(argv, "--optimizer"), base.optim
    others_lr = get(told, "optim", "lr") is not None and optimizer not in (None, was.optimizer)
    if others_lr and seen(argv, "--lr") is None:
        raise ValueError(f"lr: {config} has {was.lr:g}, for {was.optimizer}; give --lr for {optimizer}")
    if get(told, "optim", "lr") is None:
        adamw = (optimizer or base.optim.optimizer) == "adamw"
        lr = ADAMW_LR if adamw else base.optim.lr
        tuned = seen(argv, "--weights") or base.run.weights
        base = replace(base, optim=replace(base.optim, lr=lr / FINE_TUNED if tuned else lr))
    elif of_run is not None and not tuned_before:
        base = replace(base, optim=replace(base.optim, lr=base.optim.lr / FINE_TUNED))
    if origin is not None:
        return base
    if stretch is not None:
        return rescaled(base, stretched(base.optim.epochs if count is None else count, stretch))
    if epochs is None and get(told, "optim", "epochs") is None:
        replays = seen(argv, "--replays")
        return with_fewer_epochs(base, int(replays) if replays and replays.isdecimal() and int(replays) else None)
    return base if count is None else rescaled(base, count)  # tyro and check() say what is wrong with another


def stretch_of(argv: list[str], wanted: TrainSettings) -> float | None:
    """Epochs of what is wanted, as it was read, that cost --time of what one of PGD-AT does; None where not asked.

    A preset has a time of its own, unless epochs are told. Raises: ValueError naming `time`.
    """
    share, chosen, config = seen(argv, "--time"), PRESETS.get(seen(argv, "--preset") or ""), seen(argv, "--config")
    if share is None and chosen is not None and seen(argv, "--epochs") is None:
        told = {} if config is None else read_toml(config)
        share = chosen[2] if get(told, "optim", "epochs") is None else None
    if share is None:
        return None
    try:
        time = number(str(share))
    except ValueError:
        return None  # tyro says what is wrong with it
    if not 0 < time < math.inf:
        raise ValueError(f"time: got {share}; it must be a finite number > 0")
    return epochs_in_time(wanted, time)


def _method_named(argv: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The method of --method, or of --preset with its switches. Raises: ValueError where both are given."""
    named, chosen = seen(argv, "--method"), seen(argv, "--preset")
    if chosen not in PRESETS:  # tyro says what is wrong with another
        return named, {}
    if named is not None:
        raise ValueError(f"preset: got {chosen!r} with --method {named}; give one of them")
    return PRESETS[chosen][:2]


def _number(argv: list[str], told: dict[str, Any], key: str) -> int | None:
    """A setting of images as it is given; None where it is not, or is no count (tyro and check() say what is wrong)."""
    given = seen(argv, f"--{key.replace('_', '-')}")
    given = get(told, "data", key) if given is None else given
    try:
        return max(int(given), 0) or None
    except (TypeError, ValueError):
        return None


def get(sections: dict[str, Any], section: str, key: str) -> Any:
    """A value of a TOML file that is not checked yet; None where it is missing."""
    values = sections.get(section)
    return values.get(key) if isinstance(values, dict) else None


def number(word: str) -> float:
    """0.1, 1e-3 or 8/255. Raises: ValueError."""
    above, slash, below = word.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"got {word!r}; it must be a number, or a fraction such as 8/255") from error


def hyphened(argv: list[str]) -> list[str]:
    """--train_images as --train-images: flags may be written both ways."""

    def of(word: str) -> str:
        flag, is_, value = word.partition("=")
        return flag.replace("_", "-") + is_ + value if flag.startswith("--") else word

    return [of(word) for word in argv]


def seen(argv: list[str], flag: str) -> str | None:
    """The value that a flag has on the command line, before the flags as a whole are read."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument(flag, dest="value", nargs="?", const=None)
    return early.parse_known_args(argv)[0].value


def without(argv: list[str], flag: str) -> list[str]:
    """The command line less a flag and its value."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument(flag)
    return early.parse_known_args(argv)[1]
