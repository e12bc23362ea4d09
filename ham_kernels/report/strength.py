"""Which of the attacks that runs were judged with is the strongest: the one that every headline figure is by."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

FAMILIES = ("fgsm", "pgd", "cw", "apgd", "odi", "autoattack")  # weakest first; names not known are weaker than these
CLEAN = "clean"
MANY_RESTARTS = 10  # of ODI, as it was measured beside AutoAttack; one of fewer is no headline


def base_attack(name: str) -> tuple[str, int]:
    """ "pgd20-r5" -> ("pgd20", 5), "pgd20" -> ("pgd20", 1)."""
    base, _, restarts = name.partition("-r")
    return (base, int(restarts)) if restarts.isdecimal() else (name, 1)


def family_of(name: str) -> str:
    """ "pgd20-r5" -> "pgd"; a name not known stays as it is."""
    word = re.match(r"[a-z]*", name)[0]
    return word if word in FAMILIES else base_attack(name)[0]


def strength(name: str) -> tuple[int, int, int, str]:
    """What attacks are ordered by: family, steps (of ODI restarts), restarts; the name decides between equals."""
    (base, restarts), family = base_attack(name), family_of(name)
    steps = base.removeprefix(family)
    number = int(steps) if steps.isdecimal() else 0
    if family == "odi" and number < MANY_RESTARTS:
        family = "fgsm"
    place = FAMILIES.index(family) if family in FAMILIES else -1
    return place, number, restarts, name


def strongest(judged: Sequence[Collection[str]]) -> str | None:
    """The strongest attack that all have, one collection of names each; else of those that most have.

    None where none was attacked: clean images are no attack.
    """
    found = _attacks(judged)
    return max(set(found), key=lambda name: (found.count(name), strength(name)), default=None)


def of_each_family(judged: Sequence[Collection[str]], *more: str | None) -> list[str]:
    """The attacks to show beside each other, strongest first: one each of PGD, the CW loss, APGD, AutoAttack; `more`.

    Of a family the one that most have; of those the strongest.
    """
    found, best = _attacks(judged), {}
    for name in sorted(set(found), key=lambda name: (found.count(name), strength(name))):
        best[family_of(name)] = name
    shown = {best[family] for family in FAMILIES[1:] if family in best} | (set(more) & set(found))
    return sorted(shown, key=strength, reverse=True)


def _attacks(judged: Iterable[Collection[str]]) -> list[str]:
    """Each attack as many times as there are that have it."""
    return [name for names in judged for name in set(names) if name != CLEAN]
