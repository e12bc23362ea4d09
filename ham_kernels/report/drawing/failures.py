"""Figures of how models fail: (section of data.json, styles) -> matplotlib Figure, or None without data."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..comparing.over_seeds import reach
from ..text_format import attack_title
from . import names
from .figures import Section, Styles, handles_of, legend_below, shown, style_of

CONFUSED = 4  # methods whose confusions are drawn
SEEN = 2  # methods whose examples are drawn
MANY_LETTERS = 10  # classes: above, cells hold no numbers


def worth_showing(section: Section, key: str, count: int) -> list[dict[str, Any]]:
    """The groups with a value of `key`: the baseline, then those whose worst class is best, then whose average is."""
    found = [g for g in section["groups"] if g[key]]

    def rank(group: dict) -> tuple:
        accuracy = shown(group, section)
        best = [-(accuracy[of]["mean"] or 0.0) if accuracy else 0.0 for of in ("worst", "average")]
        return not group["baseline"], *best

    return sorted(found, key=rank)[:count]


def confusion(section: Section, styles: Styles) -> Figure | None:
    """For each class, what its images are taken for under the attack."""
    groups = [g for g in worth_showing(section, "confusion", CONFUSED) if g["confusion"]["shares"]]
    if not groups:
        return None
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(6.5, 0.2 + (2.8 if columns == 2 else 5.2) * rows), layout="constrained")
    called, titles = names.classes(section, 10), names.titles(section, 34)
    for axes, group in zip(figure.subplots(rows, columns, squeeze=False).flat, groups, strict=False):
        values = np.array([[np.nan] * len(called) if row is None else row for row in group["confusion"]["shares"]])
        image = axes.imshow(100 * values, vmin=0, vmax=100, cmap="cividis")
        axes.grid(visible=False)
        axes.set_title(titles[group["title"]])
        axes.set_xticks(range(len(called)), called, rotation=45, ha="right", rotation_mode="anchor", fontsize=7)
        axes.set_yticks(range(len(called)), called, fontsize=7)
        axes.set(xlabel="taken for", ylabel="class")
        if len(called) <= MANY_LETTERS:
            _write(axes, 100 * values)
    for axes in figure.axes[len(groups) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=figure.axes, label="share of the class's images, %", shrink=0.6, location="right")
    return figure


def _write(axes: Axes, percent: np.ndarray) -> None:
    for (i, j), value in np.ndenumerate(percent):
        if np.isfinite(value) and value >= 0.5:
            ink = "black" if value > 55 else "white"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color=ink)


def over_eps(section: Section, styles: Styles) -> Figure | None:
    """Average and worst class against eps, from clean images on."""
    groups = [g for g in section["groups"] if g["over_eps"]]
    if not groups:
        return None
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    for axes, measure, words in zip(
        figure.subplots(1, 2, sharey=True), ("average", "worst"), ("average", "worst class"), strict=True
    ):
        for group in groups:
            look, found = style_of(group, styles), group["over_eps"]
            mean = [100 * s["mean"] for s in found[measure]]
            error = 100 * np.array([reach(s) for s in found[measure]]).T
            axes.errorbar(found["eps"], mean, error, capsize=2, elinewidth=0.8, markersize=5, **look)
        axes.axvline(section["eps"], color="#444444", linewidth=0.8, linestyle="dotted")
        axes.set(xlabel="ε", title=words, xlim=(0, None), ylim=(-3, 103))
    figure.axes[0].set_ylabel(f"accuracy under {attack_title(groups[0]['over_eps']['attack'])}, %")
    legend_below(figure, handles_of(groups, section, styles))
    return figure


def examples(section: Section, styles: Styles) -> Figure | None:
    """For each method: images, what is added to them, their sum, and what the model answers before and after."""
    read = [(g, pictures) for g in worth_showing(section, "examples", SEEN) if (pictures := _read(g))]
    if not read:
        return None
    columns = max(len(x) for _, (x, _) in read)
    figure = Figure(figsize=(6.5, (0.9 + 3.4 * min(0.8, 6.3 / columns)) * len(read)), layout="constrained")
    called, titles = names.classes(section, 8), names.titles(section)
    for part, (group, (x, x_adv)) in zip(np.atleast_1d(figure.subfigures(len(read), 1)), read, strict=True):
        part.suptitle(titles[group["title"]], fontsize=9)
        grid = part.subplots(3, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for i, row in enumerate(group["examples"]["rows"]):
            delta = x_adv[i] - x[i]
            magnified = 0.5 + delta / (2 * max(np.abs(delta).max(), 1e-6))
            for axes, picture in zip(grid[:, i], (x[i], magnified, x_adv[i]), strict=True):
                _picture(axes, picture)
            for k, answer, sure in (
                (0, row["answer"], row["probability"]),
                (2, row["answer_adv"], row["probability_adv"]),
            ):
                right = answer == row["label"]
                mark = "✓" if right else "✗"
                grid[k, i].set_title(f"{mark} {called[answer]}\n{100 * sure:.0f} %", fontsize=7, pad=2)
    return figure


def _read(group: dict) -> tuple[np.ndarray, np.ndarray] | None:
    """x and x_adv, (n, C, H, W); None where the file is gone, or is not the one that was written."""
    told = group["examples"]
    try:
        content = Path(told["file"]).read_bytes()
        if told["sha256"] not in (None, hashlib.sha256(content).hexdigest()):
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as held:
            x, x_adv = (np.asarray(held[key], np.float32) for key in ("x", "x_adv"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return (x, x_adv) if x.ndim == 4 and x.shape == x_adv.shape and len(x) == len(told["rows"]) else None


def _picture(axes: Axes, picture: np.ndarray) -> None:
    """(C, H, W) in [0, 1]; of one channel, or of other numbers than three the mean, in grey."""
    if len(picture) == 3:
        axes.imshow(np.clip(picture.transpose(1, 2, 0), 0, 1), interpolation="nearest")
    else:
        axes.imshow(picture.mean(0), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
