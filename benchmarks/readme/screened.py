"""HAM's screening with the field's methods: what it changes, seed by seed, from the kept reports of those sweeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from readme import measured, reports
from readme.output import markdown
from readme.questions import difference

SWEEP, OTHERS = "sweep_screened_digits", "sweep_screened_field_digits"
UNSCREENED = (OTHERS, "sweep_fair_digits", "sweep_field_digits")  # a method's is of the first that has it
SCREENED = ", early drop, easy rows jump"


def screened(here: Path) -> str:
    return _report(here, SWEEP, (SWEEP,), SAID, "Seed by seed, ± half the 95 % interval of the difference:")


def screened_field(here: Path) -> str:
    said = (
        "Seed by seed against the unscreened methods, most of them of the tables above and so of other processors; "
        "times are divided by that of each table's PGD-AT; ± half the 95 % interval of the difference:"
    )
    return _report(here, OTHERS, UNSCREENED, SAID_OF_OTHERS, said)


def _report(here: Path, sweep: str, unscreened: Sequence[str], said: str, said_of_differences: str) -> str:
    head = ["screened against unscreened, points", "average", "worst class", "std over classes", "time", "forwards"]
    rows = [head, *_differences(sweep, unscreened)]
    return f"{reports.report(here, sweep, said)}\n\n{said_of_differences}\n\n{markdown(rows)}"


def _differences(sweep: str, unscreened: Sequence[str]) -> Iterator[list[str]]:
    (section,) = measured.read(f"{sweep}/data.json")["sections"]
    attack = section["frontier"]["attack"]
    bases: dict[str, tuple[dict, dict]] = {}
    for name in unscreened:
        (other,) = measured.read(f"{name}/data.json")["sections"]
        for group in other["groups"]:
            bases.setdefault(group["title"], (group, other))
    for group in section["groups"]:
        title = group["title"].removesuffix(SCREENED)
        if title == group["title"] or title not in bases:
            continue
        base, of = bases[title]
        points = [difference(group, base, attack, measure) for measure in ("average", "worst", "std")]
        costs = [_cost(group, section, name) / _cost(base, of, name) for name in ("cpu_time", "forwards")]
        yield [title, *points, *(f"{cost:.2f}" for cost in costs)]


def _cost(group: dict, section: dict, name: str) -> float:
    """Over that of its table's PGD-AT, where it has one."""
    baseline = next((g for g in section["groups"] if g["baseline"]), None)
    return group[name]["mean"] / (1.0 if baseline is None else baseline[name]["mean"])


SAID = (
    "`ham sweep methods --only trades wat mart trades-jump wat-jump mart-jump --screen-steps 5 --no-masking --seeds "
    "{seeds} --attacks clean pgd20 cw20 autoattack --search fast --out runs/screened-digits` on the digits, AutoAttack "
    "on all 517 test images; TRADES and MART have seeds 0 to 2; {machines}. CPU times are of "
    "one thread; the other core had other work."
)
SAID_OF_OTHERS = (
    "`ham train --method trades --model small_cnn --seed 9 --out runs/teacher`, then `ham sweep methods --only pgd_at "
    "pgd_at-jump fair-jump fsr-jump frl-jump mail-jump bat-jump cfol-jump fat-jump fair_tat-jump rslad-jump "
    "fair_ard-jump absld-jump --screen-steps 5 --no-masking --seeds {seeds} --teacher runs/teacher --attacks clean "
    "pgd20 cw20 autoattack --search fast --out runs/screened-field` on the digits, AutoAttack on all 517 test images; "
    "{machines}. CPU times are of one thread; both cores had other work, so that they scatter: forwards tell more."
)
