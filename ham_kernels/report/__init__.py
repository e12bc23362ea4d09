"""`ham report RUN...`: any number of run folders as one HTML page, figures and tables for a paper."""

from __future__ import annotations

import datetime
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.provenance import package_version
from .comparing.sections import sections
from .reading.find_runs import lost_cells, read_runs
from .reading.runs import MARKS, Run, read_run

if TYPE_CHECKING:
    from .writing.tables import Table

__all__ = ["Run", "build", "read_run", "read_runs"]


def build(
    runs: Sequence[str | Path], out: str | Path, *, title: str | None = None, baseline: str | None = None
) -> Path:
    """Writes index.html (needs no other file), table.md, table.tex, data.json and figures/*.png.

    Where methods can be compared, frontier.html too (frontier.md, frontier.tex): accuracy under the strongest attack
    against training time and forwards.

    Args:
        runs: run folders, or folders of them such as a sweep's; what is missing or unreadable is said in the page.
        out: folder of the report, no run folder, made where it is missing. An earlier report's files are replaced.
        title: of the page.
        baseline: title of the group that others are compared with; None takes PGD-AT.
    Returns: the path of index.html.
    Raises: TypeError, ValueError, FileNotFoundError naming the argument, before anything is written.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; it must be a folder")
    if any((out / mark).exists() for mark in MARKS):  # both have a data.json
        raise ValueError(f"out: {out} is a run folder, whose data.json a report would replace; try {out / 'report'}")
    for name, value in (("title", title), ("baseline", baseline)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name}: got {value!r} ({type(value).__name__}); it must be text")
    found = sections(read_runs(runs), baseline)
    from .comparing.summary import summarise
    from .drawing import figure_list  # matplotlib loads here
    from .writing.frontier_tables import frontier_table
    from .writing.page import pages
    from .writing.tables import paper_table

    head = {"format": 1, "title": title or "Fair adversarial training: comparison of runs"}
    head["made"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    data = _plain({**head, "version": package_version(), **summarise(found), "lost": lost_cells(runs)})
    plots, absent = figure_list.plots(data)
    papers = [paper_table(section) for section in data["sections"]]
    files = {plot.file: plot.png for section in plots for plot in section}
    data["figures"] = list(files)
    for name in ("table.md", "table.tex"):
        files[name] = _in_turn(name, papers)
    frontiers = [frontier_table(section) for section in data["sections"] if section["frontier"]]
    for name in ("frontier.md", "frontier.tex") if frontiers else ():
        files[name] = _in_turn(name.replace("frontier", "table"), frontiers)
    written = pages(data, papers, plots, absent)
    data["files"] = [name for name in (*files, *written) if name.startswith("frontier")]
    files["data.json"] = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    # last: they belong to all that is before them
    files |= {name: text.encode() for name, text in sorted(written.items())}
    _replace(out, files)
    return out / "index.html"


def _in_turn(name: str, tables: Sequence[Table]) -> bytes:
    """Tables one after the other, by the template of this file's format."""
    from .writing.render import render

    return "\n".join(render(f"{name}.jinja", table=table) for table in tables).encode()


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
        return figures | {Path(name).name for name in told.get("files", ()) if name.startswith("frontier.")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
