"""Classifiers by name: our own, torchvision's, timm's, RobustBench's, and those that a function of the user makes."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

from torch import nn

from ..common import checks, imports
from .nets import PreActResNet18, SmallCNN, WideResNet, normalisation

_OWN: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": lambda classes, channels, mean, std: SmallCNN(channels, classes, mean=mean, std=std),
    "preact_resnet18": lambda classes, **how: PreActResNet18(classes, **how),
    "wrn_34_10": lambda classes, **how: WideResNet(34, 10, classes, **how),
    "wrn_28_10": lambda classes, **how: WideResNet(28, 10, classes, **how),
    "preact_resnet18_kuangliu": lambda classes, **how: PreActResNet18(classes, last_norm=False, **how),
    "preact_resnet18_wong": lambda classes, **how: PreActResNet18(classes, last_norm=False, raw_shortcut=True, **how),
}
# with their auxiliary classifiers they would return three tensors; a given init_weights silences a warning
_WITHOUT_AUXILIARIES = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}
OBJECT = "object"  # "object:CLASS" stands for a model that came as an object, and cannot be made again


def names() -> list[str]:
    """Our own models, then torchvision's classifiers where torchvision is installed; `create` knows others beside."""
    return [*_OWN, *_torchvision_names()]


def is_known(name: str) -> bool:
    """Whether a name is one of `names()`; of our own models without torchvision, which takes seconds to import."""
    return name in _OWN or name in _torchvision_names()


def create(
    name: str, classes: int, *, channels: int = 3, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:  # fmt: skip
    """A classifier: images (n, channels, H, W) in [0, 1] -> logits (n, classes).

    Args:
        name: with random weights, one of `names()`: "small_cnn", "preact_resnet18", "wrn_34_10", "wrn_28_10", or a
            classifier of torchvision.models; "timm:NAME" of timm. As it is made there: "MODULE:FUNCTION", a function
            without arguments in a module that can be imported from the current folder; "robustbench:NAME",
            "robustbench:DATASET/THREAT/NAME" of RobustBench's model zoo, with its weights (CIFAR-10, Linf unless told).
        classes: >= 2.
        channels: of the images; torchvision's classifiers take 3 only.
        mean, std: normalisation inside the model, one value per channel; None for no normalisation.
    Raises: TypeError, ValueError naming the argument, with close matches for an unknown name; ImportError.
    """
    checks.integer("classes", classes, 2)
    checks.integer("channels", channels, 1)
    if name in _OWN:
        return _OWN[name](classes, channels=channels, mean=mean, std=std)
    before = normalisation(channels, mean, std)
    source, colon, inner = str(name).partition(":")
    if not colon:
        model = _of_torchvision(name, classes, channels)
    elif source == "timm":
        model = of_timm(inner, num_classes=classes, in_chans=channels)
    elif source == "robustbench":
        model = _of_robustbench(inner)
    else:
        model = made_by(name)
    return model if mean is None else nn.Sequential(before, model)


def is_architecture(name: str) -> bool:
    """Whether a name stands for random weights, and for no normalisation but that which `create` puts before it."""
    return ":" not in name or name.startswith("timm:")


def made_by(name: str) -> nn.Module:
    """The model that MODULE:FUNCTION makes, or is. Raises: ValueError, TypeError, ImportError naming `name`."""
    module = name.partition(":")[0]
    if module == OBJECT:
        raise ValueError(f"name: {name} was given as an object, and is made by no name; give the model itself again")
    make = imports.named(name, "name", "MODULE:FUNCTION, such as my_net:make_model")
    if not callable(make):
        raise ValueError(f"name: {name} is no function")
    model = make if isinstance(make, nn.Module) else make()
    if not isinstance(model, nn.Module):
        raise TypeError(f"name: {name} gave {type(model).__name__}; it must be a torch.nn.Module")
    return model


def _of_torchvision(name: str, classes: int, channels: int) -> nn.Module:
    theirs = _torchvision_names()
    if name not in theirs:
        raise ValueError(_unknown(name, theirs))
    if channels != 3:
        raise ValueError(f"channels: got {channels}; torchvision's {name} takes 3 (of {', '.join(_OWN)} any number)")
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=classes, **_WITHOUT_AUXILIARIES.get(name, {}))


def of_timm(name: str, **how) -> nn.Module:
    """timm.create_model. Raises: ValueError for an unknown name, ImportError; OSError where it cannot download."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"name: timm:{name} needs timm; `pip install timm`") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=4)
        raise ValueError(f"name: got 'timm:{name}'; {_hint(close)}timm.list_models() lists all")
    return timm.create_model(name, **how)


def _of_robustbench(name: str) -> nn.Module:
    try:
        with _stand_ins():
            from robustbench.utils import load_model
    except ImportError as error:
        raise ImportError(f"name: robustbench:{name} needs RobustBench; `pip install robustbench` ({error})") from error
    dataset, threat, name = ["cifar10", "Linf", name.strip("/")] if "/" not in name else _three(name)
    try:
        return load_model(name, dataset=dataset, threat_model=threat)
    except (KeyError, ValueError) as error:
        raise ValueError(f"name: RobustBench has no {name!r} for {dataset}, {threat} ({error})") from error
    except OSError as error:
        where = f"models/{dataset}/{threat}/{name}.pt"
        raise FileNotFoundError(f"name: {where} cannot be downloaded ({error}); put it there") from error


@contextmanager
def _stand_ins() -> Iterator[None]:
    """For what RobustBench 1.1 imports and an environment of today lacks: AutoAttack under its name of before it was on
    PyPI, and a part of old setuptools. Loading a model uses neither."""
    found = {}
    if find_spec("autoattack") is None:
        found = {f"autoattack{part}": importlib.import_module(f"pyautoattack{part}") for part in ("", ".state")}
    if find_spec("pkg_resources") is None:
        found["pkg_resources"] = ModuleType("pkg_resources")
    sys.modules.update(found)
    try:
        yield
    finally:
        for name in found:
            sys.modules.pop(name, None)


def _three(name: str) -> list[str]:
    parts = name.split("/")
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"name: got 'robustbench:{name}'; it must be NAME or DATASET/THREAT/NAME, as cifar10/L2/NAME")
    return parts


def _torchvision_names() -> list[str]:
    try:
        from torchvision import models
    except ImportError:
        return []
    return models.list_models(module=models)


def _unknown(name: str, theirs: list[str]) -> str:
    close = difflib.get_close_matches(str(name).lower().replace("-", "_"), [*_OWN, *theirs])
    more = "models.names() lists all" if theirs else "torchvision, which has many more, is not installed"
    hint = _hint(close) or f"allowed are {', '.join(_OWN)}; "
    return f"name: got {name!r}; {hint}{more}"


def _hint(close: list[str]) -> str:
    return f"close are {', '.join(close)}; " if close else ""
