"""A model that answers one class for nearly all images: its accuracies say nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence


def answers_one_class(per_class: Sequence[float | None], answers: Sequence[int] = ()) -> int | None:
    """The class that a model gives to nearly all images, by its accuracies in [0, 1] on clean images; else None.

    That is the one class of which 90 % are right, while of every other at most 2 % are; and, where the answers to the
    images are known, 90 % of them: a model whose classes are in another order may be right in one alone. None and NaN
    are classes without images; where only one class has images nothing can be told.
    """
    known = {c: a for c, a in enumerate(per_class) if a is not None and not math.isnan(a)}
    right = [c for c, a in known.items() if a > 0.02]
    if len(known) < 2 or len(right) != 1 or known[right[0]] < 0.9:
        return None
    return right[0] if not answers or sum(answer == right[0] for answer in answers) >= 0.9 * len(answers) else None
