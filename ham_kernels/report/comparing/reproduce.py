"""The commands that make the numbers of a run again."""

from __future__ import annotations

import shlex

from ..reading.evaluations import Evaluation
from ..reading.runs import Run
from ..strength import base_attack


def commands(run: Run, shown: Evaluation | None) -> list[str]:
    """Its training, as far as it was here, and the judgement of the weights shown."""
    out = [] if run.adopted or not run.config else [f"ham train --config {_quoted(run, 'config.toml')} --out NEW"]
    if shown is None:
        return out
    begun = f"ham evaluate {_quoted(run)} --weights {shown.weights}"
    for told, attacks in _alike(shown).items():
        out.append(f"{begun} --attacks {' '.join(attacks)}{told}")
    curves: dict[str, list[float]] = {}
    for other in (e for e in run.other_eps if e.weights == shown.weights and e.eps is not None):
        for told, attacks in _alike(other).items():
            curves.setdefault(f" --attacks {' '.join(attacks)}{told}", []).append(other.eps)
    out += [f"{begun}{told} --eps-curve {' '.join(map(repr, sorted(eps)))}" for told, eps in curves.items()]
    return out


def _alike(shown: Evaluation) -> dict[str, list[str]]:
    """{flags: the attacks that share them}."""
    out: dict[str, list[str]] = {}
    for name, attack in shown.attacks.items():
        base, restarts = base_attack(name)
        told = f" --images {attack.n}" if attack.n not in (None, shown.images) else ""
        told += f" --restarts {restarts}" if restarts > 1 else ""
        told += " --search fast" if attack.searched_fast else ""
        out.setdefault(told, []).append(base)
    return out


def _quoted(run: Run, *inside: str) -> str:
    return shlex.quote(str(run.folder.joinpath(*inside)))
