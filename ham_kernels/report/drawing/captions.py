"""What is said under figures: (section of data.json) -> text."""

from __future__ import annotations

from collections.abc import Iterable

from ..text_format import MANY_CLASSES, attack_title
from . import by_class, curves, failures, figures
from .figures import Section


def _errors(spreads: Iterable[dict], drawn: str = "Error bars") -> str:
    """Of these, which are drawn."""
    counts = {spread["n"] for spread in spreads if spread["mean"] is not None}
    several = "one standard deviation over seeds"
    one = "the 95 % interval over test images"
    if counts == {1}:
        return f"{drawn}: {one} (one seed each)."
    return f"{drawn}: {several}." if 1 not in counts else f"{drawn}: {several}; with one seed, {one}."


MAPPED = "Means over seeds; their errors are in data.json."


def many(section: Section) -> bool:
    return len(section["classes"]) > MANY_CLASSES


def bars(section: Section) -> str:
    what = f"Accuracy of each class under {attack_title(section['attack'])}."
    drawn = [found for g in section["groups"] if (found := figures.shown(g, section))]
    if by_class.mapped(drawn):
        return f"{what} {MAPPED}"
    errors = _errors((spread for found in drawn for spread in found["per_class"]), _of_classes(section))
    return (
        f"{what} {errors} Level dashed lines: the worst class, as in the table (mean "
        "over seeds of each run's worst; below the class that is lowest on average where seeds differ in it)."
    )


def _of_classes(section: Section) -> str:
    return "Bands" if many(section) else "Error bars"


def _gains(section: Section) -> str:
    what = (
        f"Accuracy under {attack_title(section['attack'])} minus that of {section['baseline']}, for the same weights."
    )
    if many(section):
        several = sum(bool(g["differences"]) for g in section["groups"]) > 1
        what += (
            f" The {by_class.of_extremes(len(section['classes']))}{', by the mean of the methods' if several else ''}: "
            "of many classes, the extremes owe part of their size to chance."
        )
    return what


def _differences_mapped(section: Section) -> bool:
    return by_class.mapped([g for g in section["groups"] if g["differences"]])


def differences(section: Section) -> str:
    if _differences_mapped(section):
        return f"{_gains(section)} {MAPPED}"
    return (
        f"{_gains(section)} Error bars: standard deviation of the differences seed by seed; with one seed each and the "
        "same images, a 95 % bootstrap interval of both answers in pairs; else both sides' spreads combined (squares "
        "added)."
    )


def time(section: Section) -> str:
    drawn = [worst for _, _, worst in figures.timed(section)]
    counts = sorted({worst["n"] for worst in drawn})
    runs = f"{' to '.join(str(n) for n in sorted({counts[0], counts[-1]}))} run{'s' * (counts != [1])} each"
    return (
        f"Upper left is better. Large: mean of a method ({runs}), small: its runs. {_errors(drawn)} "
        "Dotted lines: the baseline. Time is that of the training steps."
    )


def confidence(section: Section) -> str:
    return f"Softmax probability of the true class at adversarial examples ({_attacked(section)}), mean over seeds."


def _attacked(section: Section) -> str:
    """ "PGD-10, 2048 training images"."""
    names = {"train": "training", None: "unknown"}
    parts = [g["confidence"] for g in section["groups"] if g["confidence"]]
    told = {f"PGD-{p['steps'] or '?'}, {p['images']} {names.get(p['part'], p['part'])} images" for p in parts}
    return "; ".join(sorted(told))


def overconfident(section: Section) -> str:
    bounds = sorted({g["confidence"]["threshold"] for g in section["groups"] if g["confidence"]} - {None})
    above = f" of {' or '.join(f'{b:g}' for b in bounds)} or more" if bounds else " above the threshold"
    mapped = by_class.mapped([g for g in section["groups"] if g["confidence"]])
    errors = MAPPED if mapped else _spread(_of_classes(section))
    return (
        f"Share of each class's adversarial examples ({_attacked(section)}) whose true class has a "
        f"probability{above}. {errors}"
    )


def _spread(drawn: str = "Error bars") -> str:
    return f"{drawn}: one standard deviation over seeds, where there are several."


def hard(section: Section) -> str:
    dotted = " Dotted: the first epoch that mines." if curves.start_of_mining(section) is not None else ""
    return f"{_band(section)}{dotted}"


def training(section: Section) -> str:
    mines = any(g["mines_hard_rows"] and "loss" in g["curves"] for g in section["groups"])
    loss = " Where a method mines, its loss is of the rows that stay: not comparable with others." if mines else ""
    return f"{hard(section)}{loss}"


def _band(section: Section) -> str:
    if not curves.has_bands(section):
        return (
            f"Means over seeds. Bands are left out for more than {figures.MANY_GROUPS} methods; they are in data.json."
        )
    return f"{_spread('Bands')} Those of shares are cut at 0 and 100 %."


def easy(section: Section) -> str:
    return (
        "Left: of the examples that resist M attack steps, the share that resists to the end; the star is the "
        f"paper's figure. Right: how many resist M steps. {_spread()}"
    )


def frontier(section: Section) -> str:
    return (
        "Upper left is better. In colour: what nothing dominates, named at least once, numbered as in the table where "
        "another has more in this panel at no more cost. Grey: another method costs no more and is no worse in average "
        "and worst class. Bars: 95 % intervals of the mean over seeds (Student's t), with one seed over test images; "
        "long ones end outside. Solid: the most that so much buys. Dotted: the baseline. A triangle at the lower edge "
        "stands for a value far below, which is beside it."
    )


def changes(section: Section) -> str:
    """Of the frontier's classes."""
    errors = (
        MAPPED
        if _differences_mapped(section)
        else "Error bars: 95 % intervals, as in the table; long ones end outside."
    )
    return f"{_gains(section)} {errors}"


def confusion(section: Section) -> str:
    attack = attack_title(_of_groups(section, "confusion"))
    return (
        f"Of the images of each class, the share that is taken for another under {attack}; on the diagonal those that "
        f"the model still gets right. All seeds together.{_left_out(section, 'confusion', failures.CONFUSED)}"
    )


def over_eps(section: Section) -> str:
    attack = attack_title(_of_groups(section, "over_eps"))
    found = [g["over_eps"] for g in section["groups"] if g["over_eps"]]
    errors = _errors(spread for curve in found for spread in curve["average"])
    return f"{attack}, step sizes in proportion to ε. Dotted: the ε that everything else is by. {errors}"


def examples(section: Section) -> str:
    attacks = sorted({attack_title(g["examples"]["attack"]) for g in section["groups"] if g["examples"]})
    return (
        f"One image of each class (of many, of ten), by {' or '.join(attacks)}: the image, what is added to it "
        "(magnified to the full range, grey is none), and their sum. Above: what the model answers, and how sure it is."
        f"{_left_out(section, 'examples', failures.SEEN)}"
    )


def _of_groups(section: Section, key: str) -> str:
    """The attack that this part of every group is by."""
    return next(group[key]["attack"] for group in section["groups"] if group[key])


def _left_out(section: Section, key: str, count: int) -> str:
    more = sum(bool(g[key]) for g in section["groups"]) - count
    return f" Shown are the baseline and the best worst classes; data.json has {more} more." if more > 0 else ""
