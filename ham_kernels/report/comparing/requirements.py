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
ROUNDING = 1e-9
FORM = re.compile(r"(?:([a-z]+[0-9]*(?:-r[0-9]+)?)\.)?(.+?)\s*(>=|<=)\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*(%?)")
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

    @property
    def of_class(self) -> str | None:
        return self.measure.removeprefix(CLASS).strip() if self.measure.startswith(CLASS) else None

    @property
    def most(self) -> float:
        """That the measure can be."""
        return {"nstd": float("inf"), "gini": 1.0}.get(self.measure, 100.0)

    def met_by(self, value: float) -> bool:
        """100 * 0.29 is a rounding less than 29."""
        return value >= self.bound - ROUNDING if self.at_least else value <= self.bound + ROUNDING


def requirements(texts: Sequence[str]) -> list[Requirement]:
    """Raises: ValueError naming `require`."""
    return [_requirement(text) for text in texts]


def _requirement(text: str) -> Requirement:
    found = FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"require: got {text!r}; it must be a measure, >= or <=, and a number, such as {EXAMPLES}")
    attack, measure, sign, number, percent = found.groups()
    bound = float(number)
    if measure not in MEASURES and not measure.startswith(CLASS):
        known = ", ".join([*MEASURES, "class NAME"])
        raise ValueError(f"require: {text!r} has no measure that is known; they are {known}")
    if measure in RATIOS and percent:
        raise ValueError(f"require: got {text!r}; {measure} is a ratio, not in percent")
    most = None if measure == "nstd" else 1.0 if measure == "gini" else 100.0
    if bound < 0 or (most is not None and bound > most):
        limit = "at least 0" if most is None else f"from 0 to {most:g}"
        raise ValueError(f"require: got {text!r}; {measure} is {limit}")
    if most == 100.0 and 0 < bound <= 1 and not percent:
        raise ValueError(
            f"require: got {text!r}; {measure} is in percent; did you mean {100 * bound:g}? If not, write {number} %"
        )
    return Requirement(text.strip(), attack, measure, sign == ">=", bound)
