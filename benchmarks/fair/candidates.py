"""The settings that bench_fair.py chooses among, by name."""

from __future__ import annotations

from ham_kernels.methods import ATTA, HAM, PGDAT, TRADES, Method
from ham_kernels.runs.presets import LONG

BASELINE = "PGD-AT"
RULES = {  # by name: rule and strength
    "no class weights": ("none", None),
    "hard share ^ 0.5": ("hard_share", 0.5),
    "hard share ^ 0.75": ("hard_share", 0.75),
    "hard share ^ 1": ("hard_share", 1.0),
    "hedge 0.3": ("hedge", 0.3),
    "hedge 0.6": ("hedge", 0.6),
    "hedge 1": ("hedge", 1.0),
    "hedge 1.5": ("hedge", 1.5),
    "exponentiated 1": ("exponentiated", 1.0),
    "KL ball 0.1": ("kl_ball", 0.1),
}
SCHEDULES = {  # by name: steps in units of eps
    "1 ½ ¼ ε": (1.0, 0.5, 0.25),
    "2 1 ½ ε": (2.0, 1.0, 0.5),
    "2 1 ε": (2.0, 1.0),
    "2 ε": (2.0,),
}
ONE_STEP = {"¼": (0.25,), "½": (0.5,), "1": (1.0,)}  # of an attack that goes on from epoch to epoch
USUAL, BEFORE = "hedge 0.6", "hard share ^ 0.75"
_TWO, _GOES_ON = f"boosted CE, {USUAL}, steps 2 1 ε", f"boosted CE, {USUAL}, ATTA, 1 ε a step"


def _weights(rule: str) -> dict:
    return dict(zip(("class_weights", "class_strength"), RULES[rule], strict=True))


def _fair(rule: str, **switches) -> Method:
    """As it was first."""
    return PGDAT(start_epoch=1, loss="boosted_ce", **_weights(rule), **switches)


HEDGES = [rule for rule in RULES if rule.startswith("hedge")]
FULL: dict[str, Method] = {
    BASELINE: PGDAT(start_epoch=1),
    **{f"{BASELINE}, {rule}": PGDAT(start_epoch=1, **_weights(rule)) for rule in HEDGES},
    **{f"boosted CE, {rule}": _fair(rule) for rule in RULES},
}
CHEAP: dict[str, Method] = {
    **{f"PGD-AT, steps {words}": PGDAT(start_epoch=1, step_sizes=sizes) for words, sizes in SCHEDULES.items()},
    **{f"boosted CE, {USUAL}, steps {words}": _fair(USUAL, step_sizes=sizes) for words, sizes in SCHEDULES.items()},
    f"boosted CE, {BEFORE}, steps 2 1 ½ ε": _fair(BEFORE, step_sizes=(2.0, 1.0, 0.5)),
    f"boosted CE, {BEFORE}, steps 1 ½ ¼ ε": _fair(BEFORE, step_sizes=(1.0, 0.5, 0.25)),
    f"boosted CE, {USUAL}, jump": _fair(USUAL, early_drop=True, easy="jump"),
    "HAM from epoch 1": HAM(start_epoch=1),
    **{f"ATTA, {words} ε a step": ATTA(step_sizes=sizes) for words, sizes in ONE_STEP.items()},
    **{
        f"boosted CE, {USUAL}, ATTA, {words} ε a step": ATTA(loss="boosted_ce", step_sizes=sizes, **_weights(USUAL))
        for words, sizes in ONE_STEP.items()
    },
}
CHEAP[f"PGD-AT, {USUAL}, steps 2 1 ½ ε"] = PGDAT(start_epoch=1, step_sizes=(2.0, 1.0, 0.5), **_weights(USUAL))
TRUSTS = {  # class rule, trust, eps_factor; three large steps each
    f"PGD-AT, {rule}, trust {trust}, trained at {factor} ε, steps 2 1 ½ ε": PGDAT(
        start_epoch=1, step_sizes=(2.0, 1.0, 0.5), trust=trust, eps_factor=factor, **_weights(rule)
    )
    for rule, trust, factor in (
        (USUAL, 0.5, 1), (USUAL, 1, 1), (USUAL, 0, 1.25), (USUAL, 0.25, 1.25), (USUAL, 0.5, 1.25), (USUAL, 0.5, 1.5),
        ("hedge 1", 0.5, 1), ("hedge 1", 0.5, 1.25), ("hedge 1.5", 0.5, 1.25),
        ("no class weights", 0, 1.25), ("no class weights", 0.5, 1.25),
    )
}  # fmt: skip
TIMED = {  # share of PGD-AT's time: what is trained in as many epochs as it allows
    LONG: [name for name in CHEAP if ("2 1 ½ ε" in name and BEFORE not in name) or name in (_TWO, _GOES_ON)],
    0.43: [_TWO, _GOES_ON],
}
TIMED = {share: [*names, *TRUSTS] for share, names in TIMED.items()}
LONGER: dict[str, tuple[Method, float]] = {
    f"{name}, time {share}": ((CHEAP | TRUSTS)[name], share) for share, names in TIMED.items() for name in names
}
DEARER: dict[str, Method] = {
    "TRADES": TRADES(),
    **{f"TRADES, {rule}": TRADES(**_weights(rule)) for rule in HEDGES},
}
ALL = FULL | CHEAP | {name: method for name, (method, _) in LONGER.items()} | DEARER
