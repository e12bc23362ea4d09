"""index.html and frontier.html: what data.json says in words, tables and embedded figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..comparing.frontier import as_compared
from ..drawing.plot import Plot
from ..reading.evaluations import WEIGHTS
from ..text_format import attack_title
from .class_tables import class_tables
from .frontier_tables import class_table, frontier_table
from .render import render
from .tables import all_accuracies, article_tables, confusion_table, paper_table, worth_table

_SETTINGS = {
    "model": "model.name", "training images": "data.train_images", "batch size": "data.batch_size",
    "epochs": "optim.epochs", "learning rate": "optim.lr", "K": "attack.steps", "step size": "attack.step_size",
    "first epoch that mines": "method.start_epoch", "M": "method.screen_steps", "λ": "method.lam",
    "decay of the weight average": "run.ema_decay", "precision": "run.precision",
    "generated images": "data.generated", "their share of a batch": "data.generated_share",
}  # fmt: skip
_OFF_IF_MISSING = ("data.train_images", "data.generated", "data.generated_share")  # others are unknown then
_TABLES = {
    "table": paper_table, "worth": worth_table, "accuracies": all_accuracies, "confusions": confusion_table,
    "by_class": class_tables,
}  # fmt: skip


def pages(data: dict[str, Any], plots: Sequence[Sequence[Plot]], absent: Sequence[Sequence[str]]) -> dict[str, str]:
    """{file: text}; the page of the frontier where there is one.

    plots, absent (titles of figures without data): one entry per section of `data`.
    """
    sections = [
        section
        | {"number": i, "absent": missing, "articles": article_tables(section, number=i + 1)}
        | {"plots": [p for p in drawn if not p.frontier], "frontier_plots": [p for p in drawn if p.frontier]}
        | {"shown": _shown(section, data["runs"]), "shared": _shared_settings(section["groups"])}
        | {name: table(section) for name, table in _TABLES.items()}
        for i, (section, drawn, missing) in enumerate(zip(data["sections"], plots, absent, strict=True))
    ]
    found = {"index.html": render("page.html.jinja", data=data, sections=sections)}
    compared = [
        section | {"frontier_table": frontier_table(section), "class_table": class_table(section)}
        for section in filter(None, map(as_compared, sections))
    ]
    if compared:
        found["frontier.html"] = render("frontier.html.jinja", data=data, sections=compared)
    return found


def _shown(section: dict, runs: Sequence[dict]) -> dict[str, Any] | None:
    """Which weights, epochs, images and attacks the section shows; None where nothing is evaluated."""
    mine = [run["shown"] for run in runs if run["section"] == section["title"] and run["shown"]]
    attacks = (_attack(name, n, shown["images"]) for shown in mine for name, n in shown["attacks"].items())
    images = {f"{s['images'] or '?'} {s['part'] or ''} images of {s['dataset'] or 'unknown data'}" for s in mine}
    return mine and {
        "weights": sorted({WEIGHTS[s["weights"]] for s in mine}),
        "epochs": sorted({s["epoch"] for s in mine} - {None, 0}),  # a model trained elsewhere has none
        "images": sorted(images),
        "attacks": dict.fromkeys(attacks),
        "precision": sorted({s["precision"] for s in mine} - {None, ""}),
    }


def _attack(name: str, n: int | None, images: int | None) -> str:
    return attack_title(name) + (f" (on {n} images)" if n and n != images else "")


def _shared_settings(groups: Sequence[dict]) -> list[str]:
    """Those that have one value in all groups that were trained here; of the mining ones, in all that mine."""
    found, groups = [], [g for g in groups if not g["adopted"]]
    for words, key in _SETTINGS.items():
        asked = [g["settings"] for g in groups if g["mines_hard_rows"] or not key.startswith("method.")]
        values = {None if settings.get(key) is None else str(settings[key]) for settings in asked}
        if key not in _OFF_IF_MISSING:
            values.discard(None)
        found += [f"{words} {value}" for value in values if len(values) == 1 and value is not None]
    return found
