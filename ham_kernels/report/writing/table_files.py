"""The files of tables for a paper: table.md, table.tex, and those of the frontier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .columns import asked
from .frontier_tables import frontier_article, frontier_table
from .render import render
from .table import Table
from .tables import article_tables, paper_table


def table_files(sections: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> dict[str, str]:
    """{file: text} of all sections, one table after the other; LaTeX as wide as an article allows.

    columns: of the tables, in both formats. Raises: ValueError naming `columns`.
    """
    judged = [g["accuracy"].get(g["weights"], {}) for section in sections for g in section["groups"]]
    asked(columns, sorted({name for accuracies in judged for name in accuracies}))
    articles = [table for i, section in enumerate(sections, 1) for table in article_tables(section, columns, i)]
    tables = {"table.md": articles if columns else [paper_table(section) for section in sections]}
    tables["table.tex"] = articles
    compared = [(i, section) for i, section in enumerate(sections, 1) if section["frontier"]]
    if compared:
        tables["frontier.md"] = [frontier_table(section) for _, section in compared]
        tables["frontier.tex"] = [frontier_article(section, i) for i, section in compared]
    return {name: _in_turn(f"table.{name.split('.')[1]}.jinja", found) for name, found in tables.items()}


def _in_turn(template: str, tables: Sequence[Table]) -> str:
    return "\n".join(render(template, table=table) for table in tables)
