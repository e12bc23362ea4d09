"""A group: runs with the same settings but for the seed. A section: groups with the same data, budget and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...methods.registry import warm_up_of
from ...methods.settings import Method
from ...runs.config_file import to_dict
from ...runs.settings import TrainSettings
from ..reading.evaluations import WEIGHTS, Evaluation
from ..reading.runs import Run

# What changes neither the trained weights nor how long training takes, or is in the section's title.
NOT_SETTINGS = {
    "run.seed", "run.label", "run.checkpoint_minutes", "run.log", "data.path", "data.dataset", "data.root",
    "data.download", "data.workers", "data.test_images",
}  # fmt: skip
# What has an effect with some settings alone: told apart among runs that have it.
CONDITIONAL = {
    "data.generated_share", "optim.momentum", "optim.adam_betas", "optim.adam_eps", "optim.milestones",
    "optim.lr_decay", "model.normalize", "warm_up.name", "warm_up.natural_epochs",
}  # fmt: skip
# What a run did whose config.toml is older than these settings: their defaults.
_YOUNGER = {"data": ("balance",), "optim": ("optimizer", "adam_betas", "adam_eps", "grad_clip")}


@dataclass
class Group:
    """Runs with the same settings."""

    runs: list[Run]
    settings: dict[str, Any]
    title: str = ""
    weights: str | None = None  # the evaluation shown, see `choose_weights`

    @property
    def finished(self) -> bool:
        return any(run.finished for run in self.runs)

    @property
    def adopted(self) -> bool:
        """Trained elsewhere, so that nothing is known of how."""
        return all(run.adopted for run in self.runs)

    @property
    def counted(self) -> list[Run]:
        """What means are taken over: the finished ones, if any, and of each draw one, that judged by most attacks.

        A copy of a run, or one of the same seed, says nothing of chance.
        """
        found: dict[tuple, Run] = {}
        for run in [run for run in self.runs if run.finished] or self.runs:
            if run.draw not in found or run.verdicts > found[run.draw].verdicts:
                found[run.draw] = run
        return list(found.values())

    @property
    def method(self) -> Method | None:
        """None where this version knows no such method, or not its settings."""
        return self.runs[0].method

    @property
    def method_name(self) -> str | None:
        return self.settings.get("method.name")

    @property
    def is_pgd_at(self) -> bool:
        """Plain PGD-AT, no switch of it changed: what others are compared with."""
        method = self.method
        if self.method_name != "pgd_at" or method is None:
            return self.method_name == "pgd_at"
        return replace(method, start_epoch=1).in_effect() == type(method)(start_epoch=1).in_effect()

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
    attack: str | None = None  # asked for in place of the strongest
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
    if run.adopted:  # told apart by what a person calls them
        called = run.label if run.named else str(run.folder)
        found = {key: value for key, value in flat.items() if key.startswith(("attack.", "model."))} | {"": called}
        return found | {f"origin.{key}": run.origin[key] for key in ("class", "parameters") if key in run.origin}
    usual = to_dict(TrainSettings())
    younger = {f"{section}.{key}": usual[section][key] for section, keys in _YOUNGER.items() for key in keys}
    flat = {key: value for key, value in ((younger if flat else {}) | flat).items() if key not in NOT_SETTINGS}
    if run.first_weights is not None:
        of = run.begun.get("run") or Path(run.first_weights).name
        flat["run.weights"] = f"{flat.get('optim.epochs')} epochs from {of}"
        if run.before("epochs"):
            flat["optim.epochs"] = int(run.before("epochs"))  # of what it goes on from: it is compared with its like
    method = run.method
    whole_run = method is not None and (method.start_epoch == 1 or _is_its_own_warm_up(method, flat))
    idle = _idle(flat) | ({"warm_up.name", "warm_up.natural_epochs"} if whole_run else set())
    flat = {key: _spelled(key, value) for key, value in flat.items() if key not in idle}
    if run.device is not None:
        flat["run.device"] = run.device
    if method is None:
        return flat
    flat = {key: value for key, value in flat.items() if not key.startswith("method.")}
    told = method.in_effect() | ({"start_epoch": 1} if whole_run else {})
    return flat | {f"method.{key}": list(v) if isinstance(v, tuple) else v for key, v in told.items()}


def _spelled(key: str, value: Any) -> Any:
    """One word for what does the same: "require" asks for it more sternly than "on"."""
    if key.startswith("engine.") and value == "require":
        return "on"
    return value.removeprefix("require-") if key == "run.precision" and isinstance(value, str) else value


def _idle(flat: Mapping[str, Any]) -> set[str]:
    """Settings that others leave without effect."""
    out = {"data.generated_share"} if "data.generated" not in flat else set()
    out |= {"optim.momentum"} if flat.get("optim.optimizer") == "adamw" else {"optim.adam_betas", "optim.adam_eps"}
    if flat.get("optim.schedule", "step") != "step":
        out |= {"optim.milestones", "optim.lr_decay"}
    if "model.mean" in flat:
        out.add("model.normalize")
    return out


def _is_its_own_warm_up(method: Method, settings: dict[str, Any]) -> bool:
    """Then where it starts has no effect."""
    try:
        warm_up = warm_up_of(method, settings.get("warm_up.name", "pgd_at"))
    except (TypeError, ValueError):
        return False
    return warm_up == method and not settings.get("warm_up.natural_epochs")


def passes_of(settings: Mapping[str, Any]) -> Any:
    """Epochs times the updates of each batch: trainings with as many make as many updates. As it stands, where a run
    tells no number."""
    epochs = settings.get("optim.epochs")
    return epochs * settings.get("method.replays", 1) if isinstance(epochs, int) else epochs


def canonical(value: Any) -> str:
    """The same text for 1 and 1.0, as TOML written by hand has either; and for a tuple and a list."""
    if isinstance(value, (list, tuple)):
        return repr([canonical(v) for v in value])
    return repr(float(value)) if isinstance(value, int) and not isinstance(value, bool) else repr(value)
