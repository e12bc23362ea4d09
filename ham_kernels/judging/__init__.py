"""What a trained model is worth, class by class."""

from .accuracy import ClassAccuracy, evaluate

__all__ = ["ClassAccuracy", "evaluate"]
