"""The attack that the headline figures of a section are by."""

from __future__ import annotations

from collections.abc import Sequence

from ..reading.evaluations import Attack
from ..strength import strongest
from .groups import Group


def headline_attack(groups: Sequence[Group], chosen: str | None = None) -> str | None:
    """The attack behind "robust accuracy": the strongest that all runs compared were judged with, on the same images.

    Where none is, that of most runs. `chosen` in its place, where a run has it.
    """
    run = attacks_run(groups)
    if any(chosen in attacks for attacks in run):
        return chosen
    alike = [{name for name in attacks if _same_images([r[name] for r in run if name in r])} for attacks in run]
    return strongest(alike) or strongest(run)


def _same_images(judged: Sequence[Attack]) -> bool:
    return len({a.n for a in judged}) == 1 and len({a.images_sha256 for a in judged} - {None}) <= 1


def attacks_run(groups: Sequence[Group]) -> list[dict[str, Attack]]:
    """Attacks of each run compared: where training is finished, and for the weights shown."""
    finished = [g for g in groups if g.finished]
    return [dict(e.attacks) for g in finished or groups for e in g.evaluated(g.weights)]
