"""A group: runs with the same settings but for the seed. A section: groups with the same data, budget and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..reading.evaluations import WEIGHTS, Evaluation
from ..reading.runs import Run

# What changes neither the trained weights nor how long training takes, or is in the section's title.
NOT_SETTINGS = {
    "run.seed", "run.label", "run.checkpoint_minutes", "data.path", "data.dataset", "data.root", "data.download",
}  # fmt: skip
_MINING = (
    "screen_steps", "start_epoch", "lam", "reweight", "early_drop", "rows", "freeze_bn", "bn_rows", "screen", "group",
    "group_updates", "round_to",
)  # fmt: skip


@dataclass
class Group:
    """Runs with the same settings. `counted` are those that means are taken over: the finished ones, if any."""

    runs: list[Run]
    settings: dict[str, Any]
    title: str = ""
    weights: str | None = None  # the evaluation shown, see `choose_weights`

    @property
    def finished(self) -> bool:
        return any(run.finished for run in self.runs)

    @property
    def counted(self) -> list[Run]:
        return [run for run in self.runs if run.finished] or self.runs

    @property
    def method(self) -> str | None:
        return self.settings.get("method.name")

    def evaluated(self, weights: str | None) -> list[Evaluation]:
        return [run.evaluations[weights] for run in self.counted if weights in run.evaluations]


@dataclass
class Section:
    """What may stand in one figure: the same data set, budget and classes."""

    dataset: str | None
    norm: str | None
    eps: float | None
    classes: tuple[str, ...]  # () where no run is evaluated
    groups: list[Group] = field(default_factory=list)
    baseline: Group | None = None
    notes: list[str] = field(default_factory=list)
    title: str = ""

    def __post_init__(self):
        norms = {"linf": "L∞", "l2": "L2"}
        eps = "ε unknown" if self.eps is None else f"ε {self.eps:.4g}"
        norm = f" ({norms.get(self.norm, self.norm)})" if self.norm else ""
        self.title = f"{self.dataset or 'unknown data'}, {eps}{norm}"


def choose_weights(runs: Sequence[Run]) -> str | None:
    """The weight average where it is evaluated, else the last weights, else the best."""
    return next((w for w in WEIGHTS if any(w in run.evaluations for run in runs)), None)


def settings_of(run: Run) -> dict[str, Any]:
    """{"section.key": value} of all that makes two runs different methods; what has no effect is left out."""
    flat = {
        f"{section}.{key}" if key else section: value
        for section, values in run.config.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
    flat = {key: value for key, value in flat.items() if key not in NOT_SETTINGS}
    if flat.get("method.group") == 1:
        flat.pop("method.group_updates", None)
    if run.method == "pgd_at":
        cheap = flat.get("warm_up.name", "pgd_at") != "pgd_at" or flat.get("warm_up.natural_epochs")
        flat = {
            key: value
            for key, value in flat.items()
            if key.removeprefix("method.") not in _MINING or (cheap and key == "method.start_epoch")
        }
    elif flat.get("method.reweight") is False:
        flat.pop("method.lam", None)
    return flat
