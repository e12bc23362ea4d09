"""The settings that bench_fair.py chooses among, by name."""

from __future__ import annotations

from ham_kernels.methods import HAM, PGDAT, Fair, Method

BASELINE = "PGD-AT"
SHORT = (1.0, 0.5, 0.25)
RULES = {  # by name: rule and strength
    "no class weights": ("none", None),
    "hard share ^ 0.5": ("hard_share", 0.5),
    "hard share ^ 1": ("hard_share", 1.0),
    "exponentiated 1": ("exponentiated", 1.0),
    "exponentiated 2": ("exponentiated", 2.0),
    "KL ball 0.1": ("kl_ball", 0.1),
    "KL ball 0.2": ("kl_ball", 0.2),
}


def _fair(rule: str, **switches) -> Method:
    kind, strength = RULES[rule]
    return Fair(class_weights=kind, class_strength=strength, **switches)


FULL: dict[str, Method] = {
    BASELINE: PGDAT(start_epoch=1),
    **{f"boosted CE, {rule}": _fair(rule) for rule in RULES},
}
CHEAP: dict[str, Method] = {
    "short PGD-AT": PGDAT(start_epoch=1, step_sizes=SHORT),
    **{f"short, boosted CE, {rule}": _fair(rule, step_sizes=SHORT) for rule in RULES},
    "jump, boosted CE, hard share ^ 1": _fair("hard share ^ 1", early_drop=True, easy="jump"),
    "HAM from epoch 1": HAM(start_epoch=1),
}
ALL = FULL | CHEAP
