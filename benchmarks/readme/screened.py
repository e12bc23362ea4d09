"""HAM's screening with the field's methods: what it changes, seed by seed, from the kept report of that sweep."""

from __future__ import annotations

from pathlib import Path

from readme import measured
from readme.output import markdown
from readme.questions import difference

SWEEP = "sweep_screened_digits"
SCREENED = ", early drop, easy rows jump"


def screened(here: Path) -> str:
    (section,) = measured.read(f"{SWEEP}/data.json")["sections"]
    attack, groups = section["frontier"]["attack"], {g["title"]: g for g in section["groups"]}
    rows = [["screened against unscreened, points", "average", "worst class", "std over classes", "time", "forwards"]]
    for title, base in groups.items():
        if (group := groups.get(title + SCREENED)) is None:
            continue
        points = [difference(group, base, attack, measure) for measure in ("average", "worst", "std")]
        costs = [group[cost]["mean"] / base[cost]["mean"] for cost in ("cpu_time", "forwards")]
        rows.append([title, *points, *(f"{cost:.2f}" for cost in costs)])
    kept = measured.report(here, SWEEP, SAID)
    return f"{kept}\n\nSeed by seed, ± half the 95 % interval of the difference:\n\n{markdown(rows)}"


SAID = (
    "`ham sweep methods --only trades wat mart trades-jump wat-jump mart-jump --screen-steps 5 --no-masking --seeds "
    "{seeds} --attacks clean pgd20 cw20 autoattack --search fast --out runs/screened-digits` on the digits, AutoAttack "
    "on all 517 test images; TRADES and MART have seeds 0 to 2; {machines}. CPU times are of "
    "one thread; the other core had other work."
)
