"""Classifiers with their normalisation inside, so that attacks work on images in [0, 1]; weights of others for them."""

from .named import create, is_known, names
from .nets import CIFAR10_MEAN, CIFAR10_STD, Normalize, PreActBlock, PreActResNet18, SmallCNN, WideResNet, normalisation

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "Normalize",
    "PreActBlock",
    "PreActResNet18",
    "SmallCNN",
    "WideResNet",
    "create",
    "is_known",
    "names",
    "normalisation",
]
