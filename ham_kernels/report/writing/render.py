"""The templates, and what they may call: one per format, everything in HTML escaped."""

from __future__ import annotations

import base64
import re
import unicodedata
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..reading.evaluations import WEIGHTS
from ..text_format import NONE, attack_title, duration, markdown
from .columns import latex_cell, latex_column

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", "±": r"$\pm$",
    "×": r"$\times$", "λ": r"$\lambda$", "ε": r"$\varepsilon$", "∞": r"$\infty$", "–": "--", "−": "$-$", "≥": r"$\geq$",
    "…": r"\ldots{}", "[": "{[}", "]": "{]}",
}  # fmt: skip


_GREEK = (
    "ALPHA", "BETA", "GAMMA", "DELTA", "ZETA", "ETA", "THETA", "IOTA", "KAPPA", "MU", "NU", "XI", "PI", "RHO", "SIGMA",
    "TAU", "UPSILON", "PHI", "CHI", "PSI", "OMEGA",
)  # fmt: skip


def render(template: str, **values: Any) -> str:
    return (_LATEX if template.endswith(".tex.jinja") else _PLAIN).get_template(template).render(values)


def _tex(text: str) -> str:
    return "".join(_TEX.get(c) or _greek(c) for c in re.sub(r"\s+", " ", text))


def _greek(letter: str) -> str:
    """A Greek letter as a command; what pdfLaTeX has no letter for otherwise stays, for XeLaTeX and LuaLaTeX."""
    words = unicodedata.name(letter, "").removeprefix("GREEK ").split(" LETTER ")
    if len(words) != 2 or words[1] not in _GREEK:
        return letter
    return f"$\\{words[1].lower()}$" if words[0] == "SMALL" else f"$\\{words[1].title()}$"


def _wanting(run: dict) -> list[tuple[str, str | None]]:
    """(what a run's name is followed by, the command that helps) of all that is missing or broken."""
    found = [(f": {gap['what']}", gap["command"]) for gap in run["missing"]]
    found += [(f": {note}", None) for note in run["notes"]]
    return [*found, (f" says: {run['message']}", None)] if run["message"] and run["state"] != "finished" else found


def _reasons(check: dict) -> list[str]:
    """Why a check for gradient masking is suspicious, run by run, and why it was not run."""
    why = [f"{run}: {reason}" for run, reason in zip(check["suspicious"], check["why"], strict=True)]
    return [*why, *dict.fromkeys(filter(None, check["not_run"]))]


_PLAIN = Environment(
    loader=PackageLoader(__package__), autoescape=lambda name: name.endswith(".html.jinja"), undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
_PLAIN.globals["NONE"] = NONE
_PLAIN.filters |= {
    "attack_title": attack_title, "duration": duration, "weights": WEIGHTS.get, "md": markdown, "tex": _tex,
    "wanting": _wanting, "reasons": _reasons, "base64": lambda png: base64.b64encode(png).decode(),
    "markdown": lambda table: render("table.md.jinja", table=table),
    "latex_column": latex_column, "latex_cell": latex_cell,
    "latex": lambda table: render("table.tex.jinja", table=table),
}  # fmt: skip
_LATEX = _PLAIN.overlay(variable_start_string="<<", variable_end_string=">>")  # braces are LaTeX's own
