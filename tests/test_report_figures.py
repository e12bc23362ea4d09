"""What the figures draw: which classes, which ticks, and errors only where they are known."""

from __future__ import annotations

import json

import fake_runs
import numpy as np
import pytest
from fake_runs import fake_run

from ham_kernels import report
from ham_kernels.report import by_class, curves, drawn


def section_of(runs, out, monkeypatch):
    """(section of data.json, styles), without drawing."""
    with monkeypatch.context() as patch:
        patch.setattr(drawn, "ENTRIES", ())
        report.build(runs, out)
    data = json.loads((out / "data.json").read_text())
    return data["sections"][0], data["styles"]


def labels(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


# ---------------------------------------------------------------- many classes
@pytest.mark.parametrize("methods", [1, 2, 7])  # bars of one, of two, and a heat map
def test_differences_of_many_classes_show_losses_and_gains(tmp_path, monkeypatch, methods):
    """The classes worst under the baseline gain, if only by regression to the mean. Here those in the middle lose."""
    n = 41
    base = [0.2 + 0.01 * c for c in range(n)]
    gain = [0.0] * n
    for i, c in enumerate(range(30, 15, -1)):
        gain[c] = -0.01 * (i + 1)  # 16 loses most
    for i, c in enumerate(range(12)):
        gain[c + 2] = 0.01 * (i + 1)  # 13 gains most
    ours = [b + g for b, g in zip(base, gain, strict=True)]
    base[40] = ours[40] = None
    runs = [fake_run(tmp_path / "p", "pgd_at", accuracy={"pgd20": base})]
    runs += [
        fake_run(tmp_path / f"h{i}", accuracy={"pgd20": ours}, settings={"method.lam": 1.0 + i}) for i in range(methods)
    ]
    section, styles = section_of(runs, tmp_path / "out", monkeypatch)
    figure = by_class.class_differences(section, styles)
    expected = [*range(16, 26), *range(4, 14)]  # largest losses first, largest gains last
    assert labels(figure.axes[0]) == [str(c) for c in expected]
    words = "10 largest losses and 10 largest gains of 41 classes"
    assert words in figure.axes[0].get_xlabel()
    (entry,) = [entry for entry in drawn.ENTRIES if entry.name == "class_differences"]
    assert words in entry.caption(section)
    assert ("by the mean of the methods" in entry.caption(section)) == (methods > 1)


def test_the_page_names_the_figure_by_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "ENTRIES", [e for e in drawn.ENTRIES if e.name == "class_differences"])
    for classes, title in ((20, "What each class gains or loses"), (21, "Classes that gain or lose most")):
        root = tmp_path / str(classes)
        runs = [
            fake_run(root / m, m, accuracy={"pgd20": [0.5, 0.3, *[0.4] * (classes - 2)]}) for m in ("pgd_at", "ham")
        ]
        assert f"<h3>{title}</h3>" in report.build(runs, root / "out").read_text()


# ---------------------------------------------------------------- errors
def drawn_errors(axes):
    """Lengths of all error bars drawn."""
    return [
        np.ptp(segment[:, 1])
        for container in axes.containers
        if hasattr(container, "has_yerr")
        for bars in container.lines[2]
        for segment in bars.get_segments()
        if segment.size and np.isfinite(segment).all()
    ]


@pytest.mark.parametrize("seeds", [1, 2])
def test_error_bars_need_more_than_one_value(tmp_path, monkeypatch, seeds):
    """Shares of over-confident and of easy examples have no bootstrap interval."""
    runs = []
    for seed in range(seeds):
        parts = {
            "confidence": fake_runs.confidence([0.2, 0.4 + 0.2 * seed], [[1, 1], [0, 2]]),
            "easy": fake_runs.easy([0.5, 0.6 + 0.1 * seed, 0.7]),
        }
        runs.append(fake_run(tmp_path / str(seed), "ham", seed, accuracy={"pgd20": [0.5, 0.3]}, parts=parts))
    section, styles = section_of(runs, tmp_path / "out", monkeypatch)
    found = [drawn_errors(draw(section, styles).axes[0]) for draw in (by_class.overconfident, curves.easy)]
    if seeds == 1:
        assert found == [[], []]
    else:  # 0 where both seeds agree is known, and drawn
        assert found[0] == pytest.approx([0, 20 * 2**0.5])
        assert found[1] == pytest.approx([0, 10 * 2**0.5, 0])
    assert len(drawn_errors(by_class.class_bars(section, styles).axes[0])) == 2  # bootstrap intervals, or std


# ---------------------------------------------------------------- axes
def test_bars_at_100_are_seen_whole(tmp_path, monkeypatch):
    run = fake_run(tmp_path / "run", accuracy={"pgd20": [1.0, 0.3]})
    (axes,) = by_class.class_bars(*section_of([run], tmp_path / "out", monkeypatch)).axes
    assert axes.get_ylim()[1] > 102
    assert max(axes.get_yticks()) == 100
    assert axes.get_xlabel() == "class"


@pytest.mark.parametrize(("steps", "expected"), [(9, [*range(1, 10)]), (2, [1, 2, 3]), (49, [1, 3, 5, 9, 13])])
def test_easy_has_a_tick_at_the_papers_m(tmp_path, monkeypatch, steps, expected):
    run = fake_run(
        tmp_path / "run", accuracy={"pgd20": [0.5, 0.3]}, parts={"easy": fake_runs.easy([0.5] * steps)}
    )  # fmt: skip
    figure = curves.easy(*section_of([run], tmp_path / "out", monkeypatch))
    for axes in figure.axes:
        ticks = list(axes.get_xticks())
        assert ticks[: len(expected)] == expected
        assert len(ticks) <= 15
