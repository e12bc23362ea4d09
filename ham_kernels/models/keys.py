"""Names of weights in the field's code, and ours: PreActResNet-18 as in pytorch-cifar, "Overfitting in adversarially
robust deep learning" and RobustBench; wide ResNets as in TRADES and RobustBench."""

from __future__ import annotations

from torch import Tensor, nn

from .nets import PreActBlock, PreActNet, WideResNet

State = dict[str, Tensor]


def to_theirs(model: nn.Module, state: State) -> State:
    """Our state_dict of a PreActResNet18 or WideResNet under the names of the field's code, without normalisation.

    TRADES' own class also has a `sub_block1` that it never uses: load there with strict=False.
    Raises: TypeError for another model.
    """
    names = _names(model)
    return {_renamed(key, names): value for key, value in state.items() if _prefix(key, names) is not None}


def to_ours(model: nn.Module, state: State) -> State:
    """The other way; names that are none of theirs stay as they are."""
    if not isinstance(model, PreActNet):
        return state
    names = {theirs: ours for ours, theirs in _names(model).items()}
    unused = ("sub_block1.",) if isinstance(model, WideResNet) else ()
    return {_renamed(key, names): value for key, value in state.items() if not key.startswith(unused or "\0")}


def _names(model: nn.Module) -> dict[str, str]:
    """{our prefix: theirs} of all layers with weights."""
    if not isinstance(model, PreActNet):
        raise TypeError(f"names: {type(model).__name__} has none of the field's; only PreActResNet18 and WideResNet do")
    wide = isinstance(model, WideResNet)
    found: dict[str, str] = {}
    for i, layer in enumerate(model):
        if isinstance(layer, nn.Conv2d):
            found[f"{i}."] = "conv1."
        elif isinstance(layer, PreActBlock):
            stage, block = divmod(i - 2, model.blocks)
            theirs = f"block{stage + 1}.layer.{block}." if wide else f"layer{stage + 1}.{block}."
            found[f"{i}.shortcut."] = theirs + ("convShortcut." if wide else "shortcut.0.")
            found[f"{i}."] = theirs
        elif isinstance(layer, nn.BatchNorm2d):
            found[f"{i}."] = "bn1." if wide else "bn."
        elif isinstance(layer, nn.Linear):
            found[f"{i}."] = "fc." if wide else "linear."
    return found


def _prefix(key: str, names: dict[str, str]) -> str | None:
    """The longest that fits: a shortcut lies in a block."""
    return max((p for p in names if key.startswith(p)), key=len, default=None)


def _renamed(key: str, names: dict[str, str]) -> str:
    prefix = _prefix(key, names)
    return key if prefix is None else names[prefix] + key.removeprefix(prefix)
