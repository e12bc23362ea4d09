"""The tables of methods: with all that was judged for the page, what fits an article, and how unequal classes are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from ..comparing.accuracies import judged
from ..comparing.frontier import FEWEST_CLASSES
from ..reading.evaluations import WEIGHTS
from ..strength import CLEAN, of_each_family
from ..text_format import unit_of_time
from . import columns as c
from .columns import Column, accuracy, cost, mark_best, share, title_of
from .table import Cell, Table

ARTICLE = ("clean.avg", "avg", "worst", "std", "time", "relative", "forwards")  # what fits an article
BOLD = "Bold: the best value, and those that a 95 % interval of the difference does not tell from it."


def paper_table(section: dict[str, Any]) -> Table:
    """Method, average and worst class of clean accuracy and that under each attack, std, nstd, time; best marked."""
    groups = _shown(section)
    robust = section["attack"]
    judged_by = _attacks(groups)
    attacks = [CLEAN] if any(CLEAN in names for names in judged_by) else []
    attacks += reversed(of_each_family(judged_by, robust))
    columns = [accuracy(attack, name) for attack in attacks for name in ("avg", "worst")]
    if robust in attacks:
        columns += [accuracy(robust, name, f"{title_of(robust)} over classes") for name in ("std", "nstd")]
    return _table(section, groups, [*columns, *_costs(section, groups, c.COSTS[:2])])


def article_tables(section: dict[str, Any], names: Sequence[str] = (), number: int = 1) -> list[Table]:
    """Accuracy and cost of the methods, as two tables with a label each, that are no wider than an article's page.

    names: of their columns, see `columns.asked`; of none ARTICLE, as far as the runs have it. What was not judged here
    is a dash.
    """
    groups = _shown(section)
    attacks = set(chain(*_attacks(groups)))
    judged_so = {"clean.avg": CLEAN in attacks, **dict.fromkeys(("avg", "worst", "std"), section["attack"] is not None)}
    usual = [name for name in ARTICLE if judged_so.get(name, True)]
    found = [one for one in c.asked(names or usual) if one[0] or section["attack"] or one[1] in c.COSTS]
    told = {
        "accuracy": [accuracy(attack or section["attack"], name) for attack, name in found if name in c.MEASURES],
        "cost": _costs(section, groups, [name for _, name in found if name in c.COSTS], in_units=True),
    }
    tables = []
    for what, columns in told.items():
        if columns and groups:
            tables.append(_table(section, groups, columns))
            tables[-1].label = f"tab:{what}" + (f"-{number}" if number > 1 else "")
    return tables


def worth_table(section: dict[str, Any]) -> Table:
    """What each model is worth under the attack of the headline, and how unequal its classes are."""
    groups = [g for g in _shown(section) if judged(g, section["attack"])]
    columns = [accuracy(CLEAN, "avg")] if any(judged(g, CLEAN) for g in groups) else []
    few = len(section["classes"]) < FEWEST_CLASSES
    names = [name for name in c.MEASURES if not (few and name == "worst3")]
    columns += [accuracy(section["attack"], name) for name in names] if groups else []
    table = _table(section, groups, columns)
    table.head.append((columns[-1].span if columns else "", "worst class"))
    for row, group in zip(table.rows, groups, strict=True):
        row.append(Cell(_worst_classes(judged(group, section["attack"]), section["classes"]), words=True))
    return table


def _worst_classes(accuracies: dict, classes: Sequence[str]) -> str:
    """The class that is lowest on average over seeds, or those that share the place."""
    means = [spread["mean"] for spread in accuracies["per_class"]]
    lowest = min((mean for mean in means if mean is not None), default=None)
    names = [name for name, mean in zip(classes, means, strict=True) if mean is not None and mean == lowest]
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} classes"


def all_accuracies(section: dict[str, Any]) -> Table:
    """Every attack and every kind of weights that was evaluated."""
    attacks = list(dict.fromkeys(a for g in section["groups"] for acc in g["accuracy"].values() for a in acc))
    head = [("", "Method"), ("", "Weights"), ("", "Seeds")]
    head += [(f"{title_of(a)}, %", name) for a in attacks for name in ("avg", "worst", "std", "nstd")]
    table = Table(head)
    for group in section["groups"]:
        for weights, accuracies in group["accuracy"].items():
            seeds = max((acc["average"]["n"] for acc in accuracies.values()), default=0)
            row = [Cell(group["title"]), Cell(WEIGHTS[weights]), Cell(str(seeds))]
            for attack in attacks:
                row += [share(accuracies.get(attack), m) for m in ("average", "worst", "std", "nstd")]
            table.rows.append(row)
    return table


def confusion_table(section: dict[str, Any]) -> Table:
    """The most frequent confusions of each method."""
    table = Table([("", "Method"), ("", "Class"), ("", "taken for"), ("", "of its images, %"), ("", "images")])
    by = [g["confusion"]["attack"] for g in section["groups"] if g["confusion"]]
    table.caption = f"Under {title_of(by[0])}, all seeds together." if by else ""
    for group in section["groups"]:
        for pair in (group["confusion"] or {"pairs": ()})["pairs"][: 10 if len(section["groups"]) == 1 else 3]:
            names = (section["classes"][pair[of]] for of in ("label", "answer"))
            cells = [Cell(group["title"], words=True), *(Cell(name, words=True) for name in names)]
            table.rows.append([*cells, Cell(f"{100 * pair['share']:.1f}"), Cell(str(pair["images"]))])
    return table


def _shown(section: dict[str, Any]) -> list[dict]:
    return [g for g in section["groups"] if g["accuracy"] or g["time"]["mean"] is not None]


def _attacks(groups: Sequence[dict]) -> list[list[str]]:
    return [list(g["accuracy"].get(g["weights"], {})) for g in groups]


def _costs(section: dict, groups: Sequence[dict], names: Sequence[str], in_units: bool = False) -> list[Column]:
    """Those that have a value in some group."""
    times = [g["time"]["mean"] for g in groups if g["time"]["mean"] is not None]
    has = {
        "time": bool(times),
        "relative": any(g["relative_time"] is not None and not g["baseline"] for g in groups),
        "forwards": any(g["forwards"]["mean"] is not None for g in groups),
    }
    unit = unit_of_time(max(times)) if in_units and times else None
    return [cost(name, section["baseline"], unit) for name in names if has[name]]


def _table(section: dict, groups: Sequence[dict], columns: Sequence[Column]) -> Table:
    table = Table([("", "Method"), *((column.span, column.name) for column in columns)])
    mixed = len({g["weights"] for g in groups if not g["adopted"]} - {None}) > 1
    table.rows = [[Cell(_method(g, mixed)), *(column.cell(g) for column in columns)] for g in groups]
    mark_best(table, columns, groups)
    bold = any(cell.best for row in table.rows for cell in row)
    table.caption = f"{_caption(section, groups, columns)}.{f' {BOLD}' if bold else ''}"
    return table


# ---------------------------------------------------------------- words
def _method(group: dict, mixed: bool) -> str:
    weights = f" [{WEIGHTS[group['weights']]}]" if mixed and group["weights"] and not group["adopted"] else ""
    one_class = " (answers one class)" if group["weights"] in group["one_class"] else ""
    return f"{group['title']}{weights}{one_class}{'' if group['finished'] else ' (not finished)'}"


def _caption(section: dict, groups: Sequence[dict], columns: Sequence[Column]) -> str:
    attacks = [column.attack for column in columns if column.attack]
    counts = {
        max((judged(g, a)["average"]["n"] for a in attacks if judged(g, a)), default=len(g["runs"])) for g in groups
    }
    if not counts:
        return section["title"]
    seeds = "one seed" if counts == {1} else f"{_range(counts)} seeds, mean ± standard deviation"
    weights = {g["weights"] for g in groups if not g["adopted"]} - {None}
    of = f"; {WEIGHTS[weights.pop()]}" if len(weights) == 1 else ""
    told = _fewer_seeds(groups, attacks) + _images(groups, columns) + _no_gradient(groups, columns)
    return f"{section['title']}; {seeds}{of}{told}"


def _fewer_seeds(groups: Sequence[dict], attacks: Sequence[str]) -> str:
    """ "; of fewer seeds: HAM under AutoAttack (1 of 3)"."""
    found = [
        f"{g['title']} under {title_of(attack)} ({n} of {len(g['runs'])})"
        for attack in dict.fromkeys(attacks)
        for g in groups
        if judged(g, attack) and 0 < (n := judged(g, attack)["average"]["n"]) < len(g["runs"])
    ]
    return "; of fewer seeds: " + ", ".join(found) if found else ""


def _images(groups: Sequence[dict], columns: Sequence[Column]) -> str:
    """Where attacks or methods differ in them: "; images: 517 (Clean, PGD-20), 40 to 60 (AutoAttack)"."""
    attacks: dict[str, list[str]] = {}
    for attack in dict.fromkeys(one.attack for one in columns if one.attack):
        found = {n for g in groups for n in judged(g, attack).get("images", ())} - {None}
        attacks.setdefault(_range(found) or "unknown", []).append(title_of(attack))
    if len(attacks) < 2 and not any(" to " in images for images in attacks):
        return ""
    return "; images: " + ", ".join(f"{images} ({', '.join(names)})" for images, names in attacks.items())


def _no_gradient(groups: Sequence[dict], columns: Sequence[Column]) -> str:
    """ "; gradient missing: HAM under PGD-20 for 12 images", of the run that has most."""
    found = [
        f"{g['title']} under {title_of(attack)} for {max(rows.values())} images"
        for attack in dict.fromkeys(one.attack for one in columns if one.attack)
        for g in groups
        if (rows := judged(g, attack).get("no_gradient"))
    ]
    return "; gradient missing: " + ", ".join(found) if found else ""


def _range(numbers: set[int]) -> str:
    """ "40 to 60", "40" where all are the same, "" of none."""
    return " to ".join(str(n) for n in sorted({min(numbers), max(numbers)})) if numbers else ""
