"""What a trained model is worth, class by class."""

from .accuracy import ClassAccuracy, evaluate
from .analyses import confidence, easy_stays_easy
from .flags import Interval, intervals
from .gradient_masking import masking
from .judgement import judge
from .store import StoreWarning

__all__ = [
    "ClassAccuracy",
    "evaluate",
    "judge",
    "intervals",
    "masking",
    "confidence",
    "easy_stays_easy",
    "Interval",
    "StoreWarning",
]
