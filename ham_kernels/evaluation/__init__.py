"""What a trained model is worth, class by class."""

from .class_accuracy import Interval, intervals
from .evaluate import ClassAccuracy, evaluate
from .example_images import examples
from .gradient_masking import masking
from .paper_analyses import confidence, easy_stays_easy
from .partial_results import StoreWarning
from .resumable import judge

__all__ = [
    "ClassAccuracy",
    "evaluate",
    "judge",
    "intervals",
    "masking",
    "confidence",
    "easy_stays_easy",
    "examples",
    "Interval",
    "StoreWarning",
]
