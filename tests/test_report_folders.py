"""Run folders with parts missing, torn or hostile: the page says so and shows the rest."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys

import fake_runs
import pytest
from fake_runs import fake_run, write_json

from ham_kernels import report

ACCURACY = {"clean": [0.9, 0.8], "pgd20": [0.5, 0.3]}


@pytest.fixture
def without_figures(monkeypatch):
    """Most of a report's time is drawing; these tests read its words."""
    from ham_kernels.report.drawing import figure_list

    monkeypatch.setattr(figure_list, "ENTRIES", ())


def built(runs, out, **options):
    """(index.html without its embedded images, data.json)."""
    report.build(runs, out, **options)
    page = re.sub(r"base64,[^\"]*", "", (out / "index.html").read_text(encoding="utf-8"))
    return page, json.loads((out / "data.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- no run folder
def test_no_run_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("nowhere", r"^runs: .*nowhere is not a folder"),
        ("empty", r"^runs: .*empty is no run folder"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            report.build([tmp_path / folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path):
    run = fake_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"^runs: got none"):
        report.build([], tmp_path / "out")
    with pytest.raises(TypeError, match=r"^runs: got str"):
        report.build(str(run), tmp_path / "out")
    with pytest.raises(TypeError, match=r"^title: got 3"):
        report.build([run], tmp_path / "out", title=3)
    with pytest.raises(ValueError, match=r"^out: .*config.toml is a file"):
        report.build([run], run / "config.toml")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- missing parts
@pytest.mark.slow
def test_unfinished_and_unevaluated_runs(tmp_path):
    runs = [
        fake_run(tmp_path / "p0", "pgd_at", 0, accuracy=ACCURACY),
        fake_run(tmp_path / "p1", "pgd_at", 1, seconds=[2.0, 1.0], state="interrupted"),
        fake_run(tmp_path / "my run", "ham", 0, accuracy=ACCURACY, seconds=[0.1], state="running"),
    ]
    page, data = built(runs, tmp_path / "out")
    assert f"ham train --resume {tmp_path}/p1</code>" in page
    assert f"ham evaluate {tmp_path}/p1</code>" in page
    assert f"ham train --resume '{tmp_path}/my run'</code>" in html.unescape(page)
    assert "interrupted at epoch 2 of 4" in page
    (section,) = data["sections"]
    base, ham = section["groups"]
    assert base["runs"] == ["p0"]  # the interrupted one is not in the means
    assert base["time"]["values"] == [5.0]
    assert (ham["finished"], ham["relative_time"]) == (False, None)
    assert [(c["measured"], c["holds"]) for c in section["claims"]] == [("not judged: training is not finished", None)]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "HAM (not finished)" in table
    assert "**" not in table  # one finished method: nothing to be better than
    assert "Not in the means, since not finished: p1." in page


@pytest.mark.parametrize("name", ["config.toml", "environment.json", "status.json", "metrics.jsonl", "evaluation"])
def test_any_part_may_be_missing(tmp_path, name, without_figures):
    run = fake_run(tmp_path / "run", "ham", accuracy=ACCURACY)
    shutil.rmtree(run / name) if name == "evaluation" else (run / name).unlink()
    page, data = built([run], tmp_path / "out")
    told = {
        "config.toml": "no settings (config.toml)", "environment.json": "unknown machine",
        "status.json": "finished", "metrics.jsonl": "no training log", "evaluation": "ham evaluate",
    }  # fmt: skip
    assert told[name] in page
    assert len(data["runs"]) == 1


@pytest.mark.parametrize("name", ["config.toml", "status.json", "metrics.jsonl"])
def test_a_single_part_is_a_run(tmp_path, name):
    run = fake_run(tmp_path / "run", "ham", accuracy=ACCURACY)
    for path in run.iterdir():
        if path.name != name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page, _ = built([run], tmp_path / "out")
    assert "not evaluated" in page
    assert "Without data, and so without a figure" in page


# ---------------------------------------------------------------- broken files
def test_a_torn_last_line(tmp_path, without_figures):
    run = fake_run(tmp_path / "run", "ham", seconds=[2.0, 1.0, 1.0])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "loss": 0.')
    page, data = built([run], tmp_path / "out")
    assert "metrics.jsonl, line 4: torn last line skipped" in page
    assert data["runs"][0]["seconds"] == 4.0


def test_a_broken_line_in_the_middle_leaves_no_training_time(tmp_path, without_figures):
    run = fake_run(tmp_path / "run", "ham")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[1] = "[]"
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page, data = built([run], tmp_path / "out")
    assert "metrics.jsonl, line 2: skipped" in page
    assert "no training time: epochs are missing" in page
    assert data["runs"][0]["seconds"] is None


def test_epochs_logged_again_after_a_resume_count_once(tmp_path):
    run = fake_run(tmp_path / "run", "ham", seconds=[1.0, 2.0, 4.0])
    config = json.loads(json.dumps(fake_runs.CONFIG))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(fake_runs.epoch_line(2, 8.0, config)) + "\n")
    write_json(run / "status.json", {"state": "interrupted", "epoch": 2, "epochs": 4})
    assert [(e.epoch, e.seconds) for e in report.read_run(run).epochs] == [(1, 1.0), (2, 8.0)]


BROKEN = {
    "cut short": lambda text: text[: len(text) // 2],
    "not text": lambda text: "\udcff\udcfe",
    "a list": lambda text: "[1, 2]",
    "another format": lambda text: text.replace('"format": 1', '"format": 9'),
    "no attacks": lambda text: text.replace('"attacks"', '"attack"'),
    "attacks a list": lambda text: json.dumps({**json.loads(text), "attacks": [1]}),
    "a class too few": lambda text: json.dumps({**json.loads(text), "classes": ["0"]}),
    "words for numbers": lambda text: text.replace('"value": 0.3', '"value": "0.3"'),
    "nested deeply": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_evaluation_is_named_and_left_out(tmp_path, how, without_figures):
    run = fake_run(tmp_path / "run", "ham", accuracy=ACCURACY, weights=("ema", "last"))
    path = run / "evaluation" / "ema.json"
    path.write_bytes(BROKEN[how](path.read_text()).encode("utf-8", "surrogateescape"))
    page, data = built([run], tmp_path / "out")
    assert "evaluation/ema.json: " in page
    assert data["sections"][0]["groups"][0]["weights"] == "last"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("confidence", {"edges": [0, 1], "histogram": [[1]], "overconfident": [0.5, 0.5]}),
        ("confidence", {"edges": "01", "histogram": None}),
        ("easy", {"by_m": [{"m": "three"}]}),
        ("easy", [1]),
        ("masking", {"checks": [{"name": "x"}]}),
    ],
)
def test_a_broken_part_of_an_evaluation_leaves_the_rest(tmp_path, part, value, without_figures):
    run = fake_run(tmp_path / "run", "ham", accuracy=ACCURACY, parts={part: value})
    page, data = built([run], tmp_path / "out")
    assert f"evaluation/ema.json: {part} cannot be read" in page
    assert data["sections"][0]["groups"][0]["accuracy"]["ema"]["pgd20"]["average"]["mean"] == 0.4
    assert data["sections"][0]["groups"][0][part] in (None, [])


@pytest.mark.parametrize("name", ["config.toml", "environment.json", "status.json"])
def test_other_broken_files(tmp_path, name, without_figures):
    run = fake_run(tmp_path / "run", "ham", accuracy=ACCURACY)
    (run / name).write_text('{"a": [')
    page, _ = built([run], tmp_path / "out")
    assert f"{name}: cannot be read" in page


def test_settings_of_the_wrong_kind(tmp_path, without_figures):
    run = fake_run(tmp_path / "run", "ham", accuracy=ACCURACY)
    (run / "config.toml").write_text(
        "loose = 1979-05-27\n[attack]\neps = true\nnorm = [1]\n[method]\nname = 3\nfreeze_bn = [1]\nlam = nan\n"
        '[run]\nseed = "a"\nlabel = 5\n'
    )
    write_json(run / "status.json", {"state": 5, "epochs": "many"})
    write_json(run / "environment.json", {"versions": 3, "machine": [1], "sessions": {"a": 1}})
    path = run / "evaluation" / "ema.json"
    path.write_text(path.read_text().replace('"classes": ["0"', '"classes": ["\\ud800"'))  # no character
    _, data = built([run], tmp_path / "out")
    assert data["runs"][0]["state"] == "5"
    assert data["sections"][0]["classes"] == ["?", "1"]
    assert data["sections"][0]["groups"][0]["settings"]["loose"] == "1979-05-27"
    assert data["sections"][0]["groups"][0]["settings"]["method.lam"] is None


# ---------------------------------------------------------------- names
def test_names_are_escaped(tmp_path):
    label = "a_b & 50% <i>$x$</i> | {c} \\ *d*"
    runs = [
        fake_run(tmp_path / "run&amp", "ham", accuracy=ACCURACY, classes=["<b>cat</b>", "$\\frac{dog$"],
                 settings={"run.label": label, "data.dataset": "<u>set</u>"},
                 parts={"masking": fake_runs.masking(True, "<script>alert(1)</script>")}),
    ]  # fmt: skip
    write_json(runs[0] / "environment.json", {**fake_runs.environment(), "commit": "<em>1</em>"})
    page, data = built(runs, tmp_path / "out", title="<h1>Mine</h1>")
    for tag in ("<b>", "<i>", "<u>", "<em>", "<script", "<h1>Mine"):
        assert tag not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert data["sections"][0]["classes"][0] == "<b>cat</b>"
    latex = (tmp_path / "out" / "table.tex").read_text()
    assert r"a\_b \& 50\% $<$i$>$\$x\$$<$/i$>$ $|$ \{c\} \textbackslash{} *d*} & " in latex
    markdown = (tmp_path / "out" / "table.md").read_text()
    assert r"| a\_b &amp; 50% &lt;i>$x$&lt;/i> \| {c} \\ \*d\* | " in markdown


@pytest.mark.slow
def test_a_class_without_images(tmp_path):
    runs = [
        fake_run(tmp_path / "p", "pgd_at", accuracy={"clean": [0.9, None, 0.8], "pgd20": [0.5, None, 0.3]}),
        fake_run(tmp_path / "h", "ham", accuracy={"clean": [0.9, None, 0.8], "pgd20": [0.5, None, 0.4]},
                 parts={"confidence": fake_runs.confidence([0.1, None, 0.3], [[1, 1], [0, 0], [1, 1]])}),
    ]  # fmt: skip
    page, data = built(runs, tmp_path / "out")
    ham = data["sections"][0]["groups"][1]
    assert [s["mean"] for s in ham["accuracy"]["ema"]["pgd20"]["per_class"]] == [0.5, None, 0.4]
    assert [s["mean"] for s in ham["differences"]] == [0.0, None, pytest.approx(0.1)]
    assert "nan" not in page.lower().replace("finance", "")
    assert "NaN" not in (tmp_path / "out" / "data.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "groups"), [(2, 2), (21, 2), (100, 8)])
def test_many_classes_and_methods(tmp_path, classes, groups):
    spread = [0.2 + 0.6 * c / classes for c in range(classes)]
    parts = {"confidence": fake_runs.confidence(spread, [[1, 2]] * classes)}
    runs = [fake_run(tmp_path / "p", "pgd_at", accuracy={"pgd20": spread}, parts=parts)]
    runs += [
        fake_run(tmp_path / f"h{i}", "ham", accuracy={"pgd20": spread[::-1]}, settings={"method.lam": float(i)})
        for i in range(1, groups)
    ]
    page, data = built(runs, tmp_path / "out")
    figures = page.count("<figure>"), (tmp_path / "out" / "frontier.html").read_text().count("<figure>")
    assert figures == (7, 3)  # all but "easy"
    assert sum(figures) == len(data["figures"])
    for name in data["figures"]:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert len(data["sections"][0]["groups"][1]["differences"]) == classes
    assert ("their errors are in data.json" in page) == (groups > 6)


# ---------------------------------------------------------------- writing
def test_a_run_given_twice_counts_once_and_equal_names_are_told_apart(tmp_path, without_figures):
    runs = [fake_run(tmp_path / part / "seed0", "ham", i) for i, part in enumerate("ab")]
    _, data = built([runs[0], runs[1], tmp_path / "b" / ".." / "a" / "seed0"], tmp_path / "out")
    assert [run["name"] for run in data["runs"]] == [str(run) for run in runs]


@pytest.mark.slow
def test_a_new_report_replaces_the_old_one(tmp_path):
    run = fake_run(tmp_path / "run", "ham", accuracy=ACCURACY, parts={"easy": fake_runs.easy([0.5])})
    out = tmp_path / "deep" / "out"
    built([run], out)
    assert (out / "figures" / "easy.png").exists()
    (out / "figures" / "mine.png").write_bytes(b"kept")
    path = run / "evaluation" / "ema.json"
    write_json(path, {**json.loads(path.read_text()), "easy": None})
    built([run], out)
    assert not (out / "figures" / "easy.png").exists()
    assert (out / "figures" / "mine.png").exists()
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # no temporary folder stays


def test_a_crash_leaves_the_old_page_whole(tmp_path, monkeypatch, without_figures):
    run = fake_run(tmp_path / "run", "ham", accuracy=ACCURACY)
    before, _ = built([run], tmp_path / "out", title="before")
    real = report.Path.write_bytes

    def full_disk(path, content):
        if path.name == "index.html":
            raise OSError("no space left")
        return real(path, content)

    monkeypatch.setattr(report.Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        report.build([run], tmp_path / "out", title="after")
    monkeypatch.undo()
    assert (tmp_path / "out" / "index.html").read_text() == before
    assert json.loads((tmp_path / "out" / "data.json").read_text())["title"] == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_importing_the_room_is_light():
    code = "import sys, ham_kernels.report; print([m for m in ('torch', 'matplotlib', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
