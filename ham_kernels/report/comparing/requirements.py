"""Requirements that models must meet, as texts: `worst_class>=20`, `autoattack.class cat>=30`, `gini<=0.2`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MEASURES = {
    "accuracy": "average", "worst_class": "worst", "worst3": "worst_three", "range": "range", "std": "std",
    "nstd": "nstd", "gini": "gini",
}  # fmt: skip
RATIOS = ("nstd", "gini")  # the others are in percent
CLASS = "class "
FORM = re.compile(r"(?:([a-z]+[0-9]*(?:-r[0-9]+)?)\.)?(.+?)\s*(>=|<=)\s*([-+]?[0-9]+(?:\.[0-9]*)?)\s*%?")
EXAMPLES = "'worst_class>=20', 'autoattack.accuracy>=45', 'clean.class cat>=70' or 'gini<=0.2'"


@dataclass(frozen=True)
class Requirement:
    """One measure under one attack, None for that of the headline, and its bound: in percent, but for RATIOS."""

    text: str
    attack: str | None
    measure: str
    at_least: bool
    bound: float

    @property
    def unit(self) -> float:
        return 1.0 if self.measure in RATIOS else 100.0

    def met_by(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def requirements(texts: Sequence[str]) -> list[Requirement]:
    """Raises: ValueError naming `require`."""
    return [_requirement(text) for text in texts]


def _requirement(text: str) -> Requirement:
    found = FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"require: got {text!r}; it must be a measure, >= or <=, and a number, such as {EXAMPLES}")
    attack, measure, sign, bound = found.groups()
    if measure not in MEASURES and not measure.startswith(CLASS):
        known = ", ".join([*MEASURES, "class NAME"])
        raise ValueError(f"require: {text!r} has no measure that is known; they are {known}")
    return Requirement(text.strip(), attack, measure, sign == ">=", float(bound))
