"""What the figures draw: which classes, which ticks, and errors only where they are known."""

from __future__ import annotations

import json

import fake_runs
import numpy as np
import pytest
from fake_runs import fake_run

from ham_kernels import report
from ham_kernels.report.drawing import by_class, curves, figure_list, figures


def section_of(runs, out, monkeypatch):
    """(section of data.json, styles), without drawing."""
    with monkeypatch.context() as patch:
        patch.setattr(figure_list, "ENTRIES", ())
        report.build(runs, out)
    data = json.loads((out / "data.json").read_text())
    return data["sections"][0], data["styles"]


def caption_of(name, section):
    (entry,) = [entry for entry in figure_list.ENTRIES if entry.name == name]
    return entry.caption(section)


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
    caption = caption_of("class_differences", section)
    assert words in caption
    assert ("by the mean of the methods" in caption) == (methods > 1)


def test_the_page_names_the_figure_by_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(figure_list, "ENTRIES", [e for e in figure_list.ENTRIES if e.name == "class_differences"])
    for classes, title in ((20, "What each class gains or loses"), (21, "Classes that gain or lose most")):
        root = tmp_path / str(classes)
        runs = [
            fake_run(root / m, m, accuracy={"pgd20": [0.5, 0.3, *[0.4] * (classes - 2)]}) for m in ("pgd_at", "ham")
        ]
        assert f"<h3>{title}</h3>" in report.build(runs, root / "out").read_text()


def test_a_title_that_says_robust_names_the_attack(tmp_path, monkeypatch):
    monkeypatch.setattr(figure_list, "ENTRIES", [e for e in figure_list.ENTRIES if e.name == "class_accuracy"])
    run = fake_run(tmp_path / "run", accuracy={"pgd20": [0.5, 0.3]})
    bare = fake_run(tmp_path / "bare")
    page = report.build([run], tmp_path / "out").read_text()
    assert "<h3>Robust accuracy of each class under PGD-20</h3>" in page
    assert "without a figure: Robust accuracy of each class." in report.build([bare], tmp_path / "none").read_text()


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


def methods_of(tmp_path, count, **how):
    """PGD-AT and HAM methods, `count` in all."""
    runs = [fake_run(tmp_path / "p", "pgd_at", accuracy={"pgd20": [0.5, 0.3]}, **how)]
    runs += [
        fake_run(tmp_path / f"h{i}", accuracy={"pgd20": [0.5, 0.3]}, settings={"method.lam": 1.0 + i}, **how)
        for i in range(count - 1)
    ]
    return runs


@pytest.mark.parametrize("count", [2, 6, 7])
def test_bands_are_drawn_or_said_to_be_left_out(tmp_path, monkeypatch, count):
    section, styles = section_of(methods_of(tmp_path, count), tmp_path / "out", monkeypatch)
    for name, draw in (("hard_fraction", curves.hard_fraction), ("training", curves.training)):
        bands = len(draw(section, styles).axes[0].collections)
        caption = caption_of(name, section)
        assert bands == (count if count < 7 else 0)
        assert ("Bands: one standard deviation" in caption) == (count < 7)
        assert ("Bands are left out for more than 6 methods" in caption) == (count == 7)
        assert ("its loss is of the rows that stay" in caption) == (name == "training")
        assert "Dotted: the first epoch that mines" in caption


def test_bands_end_at_0_and_100_percent(tmp_path, monkeypatch):
    section, styles = section_of(methods_of(tmp_path, 2), tmp_path / "out", monkeypatch)
    for group in section["groups"]:
        for name, curve in group["curves"].items():
            if name not in ("epoch", "phase", "mines"):
                curve["low"], curve["high"] = [-0.2] * 4, [1.2] * 4

    def heights(axes):
        found = np.concatenate([path.vertices[:, 1] for band in axes.collections for path in band.get_paths()])
        return found.min(), found.max()

    assert heights(curves.hard_fraction(section, styles).axes[0]) == (0, 100)
    *validation, loss = [axes for axes in curves.training(section, styles).axes if axes.lines]
    assert {heights(axes) for axes in validation} == {(0, 100)}
    assert heights(loss) == pytest.approx((-0.2, 1.2))


@pytest.mark.parametrize("value", [0.0, 0.3, 0.9])
def test_axes_of_accuracies_begin_at_0(tmp_path, monkeypatch, value):
    section, styles = section_of(methods_of(tmp_path, 2), tmp_path / "out", monkeypatch)
    for group in section["groups"]:
        for name, curve in group["curves"].items():
            if name not in ("epoch", "phase", "mines"):
                curve |= {key: [value] * 4 for key in ("mean", "low", "high")}
    *validation, _ = [axes for axes in curves.training(section, styles).axes if axes.lines]
    for axes in validation:
        low, high = axes.get_ylim()
        assert low == 0
        assert high == pytest.approx(max(105 * value, 10), rel=0.1)


def test_bands_over_many_classes_end_at_0_and_100_percent(tmp_path, monkeypatch):
    run = fake_run(tmp_path / "run", accuracy={"pgd20": [0.0, *[1.0] * 20]})
    section, styles = section_of([run], tmp_path / "out", monkeypatch)
    (axes,) = by_class.class_bars(section, styles).axes
    (band,) = axes.collections
    assert (band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()) == (0, 100)
    assert axes.get_xlabel() == "21 classes, sorted by the first method's accuracy under PGD-20"
    assert "Bands: the 95 % interval over test images" in caption_of("class_accuracy", section)


# ---------------------------------------------------------------- lines
def drawn_at(look, at):
    """Whether a line of this look is drawn at these lengths along it."""
    if look["linestyle"] == "solid":
        return np.ones(len(at), dtype=bool)
    pattern = look["linestyle"][1]
    ends = np.cumsum(pattern)
    return np.searchsorted(ends, at % ends[-1], side="right") % 2 == 0


@pytest.mark.parametrize("others", [0, 1, 2, 6, 7, 20])
def test_lines_that_coincide_are_all_seen(others):
    styles = {str(i): i for i in range(others)}
    looks = [figures.style_of({"title": title, "baseline": False}, styles) for title in styles]
    looks.append(figures.style_of({"title": "PGD-AT", "baseline": True}, styles))
    assert len({str(look["linestyle"]) for look in looks}) == others + 1
    assert all(look["zorder"] < looks[-1]["zorder"] for look in looks[:-1])
    at = np.arange(0.05, 200, 0.1)  # line widths
    on = np.array([drawn_at(look, at) for look in looks])
    for i in range(others + 1):
        assert (on[i] & ~on[i + 1 :].any(0)).any(), i  # drawn, and nothing above it


def test_the_baseline_is_drawn_dashed_and_last(tmp_path, monkeypatch):
    section, styles = section_of(
        methods_of(tmp_path, 3, parts={"confidence": fake_runs.confidence([0.2, 0.4], [[1, 1], [0, 2]])}),
        tmp_path / "out", monkeypatch,
    )  # fmt: skip
    for draw in (figures.confidence, curves.hard_fraction, curves.training):
        axes = draw(section, styles).axes[0]
        lines = [artist for artist in (*axes.lines, *axes.patches) if artist.get_label() in ("PGD-AT", *styles)]
        assert len(lines) == 3
        top = max(lines, key=lambda line: line.get_zorder())
        assert top.get_label() == "PGD-AT"
        assert top.get_linestyle() not in ("-", "solid")


# ---------------------------------------------------------------- axes
def test_bars_at_100_are_seen_whole(tmp_path, monkeypatch):
    run = fake_run(tmp_path / "run", accuracy={"pgd20": [1.0, 0.3]})
    (axes,) = by_class.class_bars(*section_of([run], tmp_path / "out", monkeypatch)).axes
    assert axes.get_ylim()[1] > 102
    assert max(axes.get_yticks()) == 100
    assert axes.get_xlabel() == "class"


@pytest.mark.parametrize(
    ("shares", "top"), [([0.0, 0.0], 10), ([0.004, 0.0], 10), ([0.2, 0.1], 20), ([0.21, 0.1], 30), ([0.93, 0.1], 100)]
)
def test_bars_end_where_the_data_do(tmp_path, monkeypatch, shares, top):
    run = fake_run(
        tmp_path / "run", accuracy={"pgd20": [0.5, 0.3]},
        parts={"confidence": fake_runs.confidence(shares, [[1, 1], [0, 2]])},
    )  # fmt: skip
    figure = by_class.overconfident(*section_of([run], tmp_path / "out", monkeypatch))
    (axes,) = figure.axes
    assert (max(axes.get_yticks()), axes.get_ylim()) == (top, (0, pytest.approx(1.04 * top)))
    assert any("0 % in all classes" in text.get_text() for text in axes.texts) == (shares == [0.0, 0.0])
    with figures.drawing():
        figure.draw_without_rendering()
    box = axes.yaxis.label.get_window_extent()
    assert 0 <= box.y0 < box.y1 <= figure.bbox.height


def test_bars_leave_room_for_their_errors(tmp_path, monkeypatch):
    run = fake_run(tmp_path / "run", accuracy={"pgd20": [0.38, 0.3]})  # -+ 0.04
    (axes,) = by_class.class_bars(*section_of([run], tmp_path / "out", monkeypatch)).axes
    assert max(axes.get_yticks()) == 50


@pytest.mark.parametrize(("seconds", "expected"), [(60.0, 0.8 * 60), (49.0, 0.0)])
def test_time_starts_at_0_only_where_times_differ_much(tmp_path, monkeypatch, seconds, expected):
    runs = [
        fake_run(tmp_path / m, m, accuracy={"pgd20": [0.5, 0.3]}, seconds=[s / 4] * 4)
        for m, s in (("pgd_at", 100.0), ("ham", seconds))
    ]
    (axes,) = figures.worst_against_time(*section_of(runs, tmp_path / "out", monkeypatch)).axes
    assert axes.get_xlim() == pytest.approx((expected, 104))


def test_the_heat_map_has_the_tables_digits_in_letters_that_are_seen(tmp_path, monkeypatch):
    runs = methods_of(tmp_path, 7)
    for run in runs:
        fake_runs.change_evaluation(
            run, lambda raw: raw["attacks"]["pgd20"].update(per_class=[fake_runs.interval(v) for v in (0.425, 0.435)])
        )
    figure = by_class.class_bars(*section_of(runs, tmp_path / "out", monkeypatch))
    assert {(text.get_text(), text.get_color()) for text in figure.axes[0].texts} == {
        ("42.5", "white"), ("43.5", "black"),
    }  # fmt: skip


def test_captions_say_on_which_images(tmp_path, monkeypatch):
    parts = {"confidence": fake_runs.confidence([0.2, 0.4], [[1, 1], [0, 2]])}
    run = fake_run(tmp_path / "run", accuracy={"pgd20": [0.5, 0.3]}, parts=parts)
    section, _ = section_of([run], tmp_path / "out", monkeypatch)
    assert "(PGD-10, 4 training images)" in caption_of("overconfident", section)


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
