"""`ham report RUN...`: any number of run folders as one HTML page, figures and tables for a paper."""

from __future__ import annotations

import datetime
import json
import math
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.provenance import package_version
from .comparing.requirements import requirements
from .comparing.sections import sections
from .reading.find_runs import lost_cells, read_runs
from .reading.runs import MARKS, Run, read_run

TITLE = "Fair adversarial training: comparison of runs"
AUDIT = "Audit of robust classifiers"
_ALWAYS = ("index.html", "table.md", "table.tex", "classes.csv", "data.json")

__all__ = ["Run", "build", "read_run", "read_runs"]


def build(
    runs: Sequence[str | Path], out: str | Path, *, title: str | None = None, baseline: str | None = None,
    attack: str | None = None, audit: bool = False, require: Sequence[str] = (), columns: Sequence[str] = (),
    pdf: bool = True,
) -> Path:  # fmt: skip
    """Writes index.html (needs no other file), table.md, table.tex, classes.csv, data.json and figures/*.png, *.pdf.

    Where methods can be compared, frontier.html too (frontier.md, frontier.tex): accuracy under the strongest attack
    against training time and forwards.

    Args:
        runs: run folders, or folders of them such as a sweep's; what is missing or unreadable is said in the page.
        out: folder of the report, no run folder, made where it is missing. An earlier report's files are replaced.
        title: of the page.
        baseline: title of the group that others are compared with; None takes PGD-AT.
        attack: what robust accuracy is by, such as "cw20"; None takes the strongest that all runs compared have.
        audit: whether the page is of what models are worth alone: no claims of a paper, no frontier.
        require: what each model must meet, such as "worst_class>=20" (percent), "autoattack.class cat>=30",
            "gini<=0.2"; measures are accuracy, worst_class, worst3 (mean of the three worst), range, std, nstd, gini.
            Verdicts are in the page and in data.json, sections' "audit".
        pdf: whether figures are written as PDF too, which takes as long as all else.
        columns: of the paper's tables, such as "clean.avg", "worst", "time"; of none, what fits an article.
    Returns: the path of index.html.
    Raises: TypeError, ValueError, FileNotFoundError naming the argument, before anything is written.
    """
    out = Path(out)
    _check_out(out)
    for name, value in (("title", title), ("baseline", baseline), ("attack", attack)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name}: got {value!r} ({type(value).__name__}); it must be text")
    for name, value in (("require", require), ("columns", columns)):
        if isinstance(value, str) or not all(isinstance(one, str) for one in value):
            raise TypeError(f"{name}: got {value!r}; it must be a list of texts")
    required = requirements(require)
    found = sections(read_runs(runs), baseline, attack)
    from .comparing.summary import summarise
    from .drawing import figure_list  # matplotlib loads here
    from .writing.class_tables import classes_csv
    from .writing.page import pages
    from .writing.table_files import table_files

    told = {
        "title": title, "baseline": baseline, "attack": attack, "audit": audit, "require": require, "columns": columns,
    }  # fmt: skip
    head = {"format": 1, "title": title or (AUDIT if audit else TITLE), "audit": bool(audit)}
    head["made"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    head |= {"version": package_version(), "command": _command(runs, out, told, pdf)}
    data = _plain({**head, **summarise(found, required), "lost": lost_cells(runs)})
    for section in data["sections"] if audit else ():
        section |= {"frontier": None, "claims": []}
    files = {name: text.encode() for name, text in table_files(data["sections"], columns).items()}
    files["classes.csv"] = classes_csv(found).encode("utf-8", "replace")
    plots, absent = figure_list.plots(data, pdf=pdf)
    drawn = [plot for section in plots for plot in section]
    data["figures"] = [plot.file for plot in drawn]
    files |= {plot.file: plot.png for plot in drawn} | {_pdf(plot.file): plot.pdf for plot in drawn if plot.pdf}
    written = pages(data, plots, absent)
    data["files"] = [name for name in (*files, *written) if name.startswith("frontier")]
    files["data.json"] = json.dumps(data, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    # last: they belong to all that is before them
    files |= {name: text.encode() for name, text in sorted(written.items())}
    _replace(out, files)
    return out / "index.html"


def _check_out(out: Path) -> None:
    """A report replaces files, and a run folder has a data.json too."""
    above = next(path for path in (out, *out.parents) if path.exists())
    if not above.is_dir():
        raise ValueError(f"out: {out} is a file; it must be a folder" if above == out else f"out: {above} is a file")
    if any((out / mark).exists() for mark in MARKS):
        raise ValueError(f"out: {out} is a run folder, whose data.json a report would replace; try {out / 'report'}")
    for name, kind in (("figures", Path.is_dir), *((name, Path.is_file) for name in _ALWAYS)):
        if (out / name).exists() and not kind(out / name):
            raise ValueError(f"out: {out / name} is in the way of the report's own; give another folder")
    if out.name in ("evaluation", "checkpoints") and (out.resolve().parent / "config.toml").exists():
        raise ValueError(f"out: {out} is a part of a run folder; give another")


def _command(runs: Sequence[str | Path], out: Path, told: Mapping[str, Any], pdf: bool) -> str:
    """What makes this report again."""
    words = ["ham", "report", *map(str, runs), "--out", str(out)]
    for name, value in told.items():
        given = [value] if isinstance(value, str) else [] if isinstance(value, bool) else value
        words += [f"--{name}", *given] if value else []
    words += [] if pdf else ["--no-pdf"]
    return shlex.join(words)


def _pdf(png: str) -> str:
    return str(PurePosixPath(png).with_suffix(".pdf"))


def _plain(value: Any) -> Any:
    """As JSON in UTF-8 can hold it: settings may be dates or NaN, names may be no text."""
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return str(value).encode("utf-8", "replace").decode()


def _replace(out: Path, files: dict[str, bytes]) -> None:
    """All files into a folder beside `out` first, then one by one into place: none is ever half written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    old = _written_before(out / "data.json")
    beside = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True)
    with beside as temporary:
        for name, content in files.items():
            path = Path(temporary, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for name in files:
            os.replace(Path(temporary, name), out / name)
    for name in old - set(files):
        (out / name).unlink(missing_ok=True)


def _written_before(path: Path) -> set[str]:
    """Figures and files that an earlier report wrote and not every one does, so that none stays beside a new one."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        figures = {f"figures/{Path(name).name}" for name in told["figures"] if name.endswith(".png")}
        return (
            figures
            | set(map(_pdf, figures))
            | {Path(name).name for name in told.get("files", ()) if name.startswith("frontier.")}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
