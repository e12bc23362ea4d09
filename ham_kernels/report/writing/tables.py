"""The table for a paper, and others of the page: rows of cells, written as Markdown, LaTeX (booktabs) or HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

from ..comparing.comparable import same_images, same_work
from ..reading.evaluations import WEIGHTS
from ..text_format import NONE, attack_title, margin_attack, mean_std, mean_std_time


@dataclass(frozen=True)
class Cell:
    text: str
    error: str = ""  # " ± 1.1"
    value: float | None = None  # what the column is ranked by
    best: bool = False
    std: float | None = None  # of `value`


@dataclass
class Table:
    """`head` is (what spans several columns or "", what is said of each)."""

    head: list[tuple[str, str]]
    rows: list[list[Cell]] = field(default_factory=list)
    caption: str = ""


def paper_table(section: dict[str, Any]) -> Table:
    """Method, average and worst class of clean accuracy and that under each attack, std, nstd, time; best marked."""
    groups = [g for g in section["groups"] if g["accuracy"] or g["time"]["mean"] is not None]
    columns = _columns(section, groups)
    table = Table([("", "Method"), *((c.span, c.name) for c in columns)], caption=_caption(section, groups, columns))
    mixed = len({g["weights"] for g in groups} - {None}) > 1
    table.rows = [[Cell(_method(g, mixed)), *(c.cell(g) for c in columns)] for g in groups]
    judged = [i for i, g in enumerate(groups) if g["finished"]]
    for i, column in enumerate(columns, 1):
        ranked = [g for g in judged if table.rows[g][i].value is not None]
        if len(ranked) > 1 and column.alike([groups[g] for g in ranked]):
            _mark_best(table, i, ranked, column.best)
    return table


def all_accuracies(section: dict[str, Any]) -> Table:
    """Every attack and every kind of weights that was evaluated."""
    attacks = list(dict.fromkeys(a for g in section["groups"] for acc in g["accuracy"].values() for a in acc))
    head = [("", "Method"), ("", "Weights"), ("", "Seeds")]
    head += [(f"{attack_title(a)}, %", name) for a in attacks for name in ("avg", "worst", "std", "nstd")]
    table = Table(head)
    for group in section["groups"]:
        for weights, accuracies in group["accuracy"].items():
            row = [Cell(group["title"]), Cell(WEIGHTS[weights])]
            row.append(Cell(str(max(acc["average"]["n"] for acc in accuracies.values()) if accuracies else 0)))
            for attack in attacks:
                found = accuracies.get(attack)
                row += [Cell(*mean_std(found[m])) if found else Cell(NONE) for m in ("average", "worst", "std")]
                row.append(Cell(*mean_std(found["nstd"], 1, 3)) if found else Cell(NONE))
            table.rows.append(row)
    return table


# ---------------------------------------------------------------- columns of the paper's table
class _Column(NamedTuple):
    span: str
    name: str
    cell: Callable[[dict], Cell]  # of a group
    best: Callable  # max or min
    alike: Callable[[Sequence[dict]], bool]  # whether these groups may be ranked
    attack: str | None = None


def _columns(section: dict, groups: Sequence[dict]) -> list[_Column]:
    """Those that have a value in some group."""
    robust = section["attack"]
    judged_by = [a for g in groups for a in g["accuracy"].get(g["weights"], {})]
    attacks = [a for a in dict.fromkeys(("clean", robust, margin_attack(judged_by), "autoattack")) if a in judged_by]
    columns: list[_Column] = []
    for attack in attacks:
        span = "Clean, %" if attack == "clean" else f"{attack_title(attack)}, %"
        columns.append(_accuracy(span, "avg", max, attack, "average"))
        columns.append(_accuracy(span, "worst", max, attack, "worst"))
    if robust in attacks:
        span = f"{attack_title(robust)} over classes"
        columns.append(_accuracy(span, "std", min, robust, "std"))
        columns.append(_accuracy(span, "nstd", min, robust, "nstd", 1, 3))
    if any(g["time"]["mean"] is not None for g in groups):
        columns.append(_Column("Training", "time", _time, min, _same_work))
    if any(g["relative_time"] is not None and not g["baseline"] for g in groups):
        columns.append(_Column("Training", f"/ {section['baseline']}", _relative, min, _same_work))
    return columns


def _accuracy(
    span: str, name: str, best: Callable, attack: str, measure: str, scale: float = 100.0, digits: int = 1
) -> _Column:
    def cell(group: dict) -> Cell:
        found = _judged(group, attack)
        if not found:
            return Cell(NONE)
        value = found[measure]
        return Cell(*mean_std(value, scale, digits), value["mean"], std=value["std"])

    def alike(groups: Sequence[dict]) -> bool:
        return same_images(_judged(g, attack) for g in groups)

    return _Column(span, name, cell, best, alike, attack)


def _judged(group: dict, attack: str) -> dict:
    return group["accuracy"].get(group["weights"], {}).get(attack) or {}


def _same_work(groups: Sequence[dict]) -> bool:
    return same_work(g["training"] for g in groups)


def _time(group: dict) -> Cell:
    return Cell(*mean_std_time(group["time"]), group["time"]["mean"], std=group["time"]["std"])


def _relative(group: dict) -> Cell:
    ratio = group["relative_time"]
    return Cell(NONE) if ratio is None else Cell(f"{ratio:.2f}", value=ratio)


def _method(group: dict, mixed: bool) -> str:
    weights = f" [{WEIGHTS[group['weights']]}]" if mixed and group["weights"] else ""
    return f"{group['title']}{weights}{'' if group['finished'] else ' (not finished)'}"


def _caption(section: dict, groups: Sequence[dict], columns: Sequence[_Column]) -> str:
    counts = sorted({len(g["runs"]) for g in groups})
    if not counts:
        return section["title"]
    many = "one seed" if counts == [1] else f"{' to '.join(str(c) for c in (counts[0], *counts[1:][-1:]))} seeds"
    spread = "" if counts == [1] else ", mean ± standard deviation"
    weights = {g["weights"] for g in groups} - {None}
    of = f"; {WEIGHTS[next(iter(weights))]}" if len(weights) == 1 else ""
    return f"{section['title']}; {many}{spread}{of}{_images(groups, columns)}. {_BEST[counts == [1]]}"


_BEST = {
    False: "Bold: the best value, and those within its standard deviation.",
    True: "Best values in bold.",
}  # by whether there is one seed


def _images(groups: Sequence[dict], columns: Sequence[_Column]) -> str:
    """Where attacks or methods differ in them: "; images: 517 (Clean, PGD-20), 40 to 60 (AutoAttack)"."""
    counts: dict[str, list[str]] = {}
    for attack in dict.fromkeys(c.attack for c in columns if c.attack):
        found = {n for g in groups for n in _judged(g, attack).get("images", ())} - {None}
        words = " to ".join(str(n) for n in sorted({min(found), max(found)})) if found else "unknown"
        counts.setdefault(words, []).append("Clean" if attack == "clean" else attack_title(attack))
    if len(counts) < 2 and not any(" to " in words for words in counts):
        return ""
    return "; images: " + ", ".join(f"{words} ({', '.join(attacks)})" for words, attacks in counts.items())


def _mark_best(table: Table, column: int, ranked: Sequence[int], best: Callable) -> None:
    """The best value, all that look the same at the digits shown, and all within its standard deviation."""
    cells = {i: table.rows[i][column] for i in ranked}
    winner = best(cells.values(), key=lambda cell: cell.value)
    for i, cell in cells.items():
        near = cell.text == winner.text or abs(cell.value - winner.value) <= (winner.std or 0.0)
        table.rows[i][column] = replace(cell, best=near)


# ---------------------------------------------------------------- Markdown
def markdown(table: Table) -> str:
    names = [f"{span.removesuffix(', %')} {name}" if span else name for span, name in table.head]
    lines = [f"| {' | '.join(map(_md, names))} |", f"|---|{'---:|' * (len(names) - 1)}"]
    for row in table.rows:
        cells = [f"**{_md(c.text)}**{c.error}" if c.best else _md(c.text) + c.error for c in row]
        lines.append(f"| {' | '.join(cells)} |")
    return f"{_md(table.caption)}\n\n" + "\n".join(lines) + "\n"


def _md(text: str) -> str:
    text = " ".join(text.split()).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for mark in "|*_`[]":
        text = text.replace(mark, f"\\{mark}")
    return text


# ---------------------------------------------------------------- LaTeX
_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", "±": r"$\pm$",
    "×": r"$\times$", "λ": r"$\lambda$", "ε": r"$\varepsilon$", "∞": r"$\infty$", "–": "--", "−": "$-$", "≥": r"$\geq$",
    "…": r"\ldots{}", "[": "{[}", "]": "{]}",
}  # fmt: skip


def latex(table: Table) -> str:
    """A table environment; needs \\usepackage{booktabs}."""
    spans = [(span, len(list(columns))) for span, columns in groupby(span for span, _ in table.head)]
    over, rules, at = [], [], 1
    for span, width in spans:
        over.append(rf"\multicolumn{{{width}}}{{c}}{{{_tex(span)}}}" if span else "")
        if span:
            rules.append(rf"\cmidrule(lr){{{at}-{at + width - 1}}}")
        at += width
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule",
        rf"{' & '.join(over)} \\", "".join(rules),
        rf"{' & '.join(_tex(name) for _, name in table.head)} \\", r"\midrule",
    ]  # fmt: skip
    for row in table.rows:
        cells = [rf"\textbf{{{_tex(c.text)}}}{_tex(c.error)}" if c.best else _tex(c.text + c.error) for c in row]
        lines.append(rf"{' & '.join(cells)} \\")
    return "\n".join([*(line for line in lines if line), r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in re.sub(r"\s+", " ", text))


# ---------------------------------------------------------------- HTML
def html_table(table: Table) -> str:
    """A table that scrolls sideways where the screen is narrow."""
    parts = ['<div class="wide"><table>']
    if table.caption:
        parts.append(f"<caption>{html.escape(table.caption)}</caption>")
    parts.append("<thead>")
    if any(span for span, _ in table.head):
        spans = [(span, len(list(columns))) for span, columns in groupby(span for span, _ in table.head)]
        cells = "".join(f'<th colspan="{width}" class="span">{html.escape(span)}</th>' for span, width in spans)
        parts.append(f"<tr>{cells}</tr>")
    parts.append("<tr>" + "".join(f"<th>{html.escape(name)}</th>" for _, name in table.head) + "</tr></thead><tbody>")
    for row in table.rows:
        cells = []
        for cell in row:
            text = html.escape(cell.text)
            text = f"<strong>{text}</strong>" if cell.best else text
            cells.append(f"<td>{text}<small>{html.escape(cell.error)}</small></td>")
        parts.append(f"<tr>{''.join(cells)}</tr>")
    parts.append("</tbody></table></div>")
    return "".join(parts)
