"""index.html: what data.json says in words, tables and embedded figures. Every name from a file is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from ..drawing.plot import Plot
from ..reading.evaluations import WEIGHTS
from ..text_format import NONE, attack_title, duration
from . import style
from .tables import Table, all_accuracies, html_table, latex, markdown

PAPER = "https://arxiv.org/abs/2308.01823"


def page(
    data: dict[str, Any], tables: Sequence[Table], plots: Sequence[Sequence[Plot]], absent: Sequence[Sequence[str]]
) -> str:
    """The whole page. tables, plots, absent (titles of figures without data): one entry per section of `data`."""
    body = [f"<h1>{escape(data['title'])}</h1>", _made(data), _attention(data)]
    many = len(data["sections"]) > 1
    if many:
        links = "".join(f'<li><a href="#s{i}">{escape(s["title"])}</a></li>' for i, s in enumerate(data["sections"]))
        body.append(f"<p>Different data or budgets are not compared; each has a section:</p><ul>{links}</ul>")
    for i, section in enumerate(data["sections"]):
        body.append(f'<section id="s{i}"><h2>{escape(section["title"])}</h2>')
        body += _section(section, data["runs"], tables[i], plots[i], absent[i])
        body.append("</section>")
    body += ["<h2>All runs</h2>", _runs(data["runs"]), _provenance(data["runs"])]
    return style.PAGE.substitute(title=escape(data["title"]), style=style.STYLE, body="\n".join(filter(None, body)))


def _made(data: dict) -> str:
    return (
        f'<p class="muted">{len(data["runs"])} run{"s" * (len(data["runs"]) != 1)}; made {escape(data["made"])} by '
        f"ham_kernels {escape(data['version'])}. Method and claims: hard adversarial example mining, "
        f'<a href="{PAPER}">arXiv 2308.01823</a>.</p>'
    )


def _attention(data: dict) -> str:
    """What is missing or broken, and the command that helps."""
    lines = [
        f"<li><strong>{escape(cell['run'])}</strong> has no run folder in {escape(cell['folder'])}: "
        f"{escape(cell['problem'])}</li>"
        for cell in data["lost"]
    ]
    for run in data["runs"]:
        for gap in run["missing"]:
            command = f": <code>{escape(gap['command'])}</code>" if gap["command"] else ""
            lines.append(f"<li><strong>{escape(run['name'])}</strong>: {escape(gap['what'])}{command}</li>")
        lines += [f"<li><strong>{escape(run['name'])}</strong>: {escape(note)}</li>" for note in run["notes"]]
        if run["message"] and run["state"] != "finished":
            lines.append(f"<li><strong>{escape(run['name'])}</strong> says: {escape(str(run['message']))}</li>")
    return f'<div class="box"><h3>Missing or unreadable</h3><ul>{"".join(lines)}</ul></div>' if lines else ""


# ---------------------------------------------------------------- one section
def _section(
    section: dict, runs: Sequence[dict], table: Table, plots: Sequence[Plot], absent: Sequence[str]
) -> list[str]:
    out = [_honesty(section, runs)]
    if section["claims"]:
        out += ["<h3>The paper's claims</h3>", _claims(section)]
    out.append("<h3>Results</h3>")
    if table.rows:
        out.append(html_table(table))
        out.append(
            "<details><summary>The same table in Markdown and LaTeX</summary>"
            f"<pre>{escape(markdown(table))}</pre><pre>{escape(latex(table))}</pre></details>"
        )
    else:
        out.append("<p>No run here has been trained or evaluated yet.</p>")
    out += [_figure(plot) for plot in plots]
    if absent:
        out.append(
            f'<p class="muted">Without data, and so without a figure: {escape(", ".join(absent))}. '
            "Missing evaluations come from <code>ham evaluate RUN</code>.</p>"
        )
    out += ["<h3>Checks for gradient masking</h3>", _masking(section)]
    accuracies = all_accuracies(section)
    if accuracies.rows:
        out += ["<h3>All attacks, all weights</h3>", html_table(accuracies)]
    return out


def _honesty(section: dict, runs: Sequence[dict]) -> str:
    """Which weights, images and attacks the section shows, and what limits the comparison."""
    mine = [run["shown"] for run in runs if run["section"] == section["title"] and run["shown"]]
    lines = []
    if mine:
        images = sorted(
            {f"{s['images'] or '?'} {s['part'] or ''} images of {s['dataset'] or 'unknown data'}" for s in mine}
        )
        weights = sorted({WEIGHTS[s["weights"]] for s in mine})
        epochs = sorted({str(s["epoch"]) for s in mine if s["epoch"] is not None}, key=int)
        precision = sorted({s["precision"] for s in mine if s["precision"]})
        attacks = dict.fromkeys(
            attack_title(a) + (f" (on {n} images)" if n and n != s["images"] else "")
            for s in mine
            for a, n in s["attacks"].items()
        )
        lines += [
            f"Weights: {', '.join(weights)} (of epoch {', '.join(epochs) or 'unknown'}). "
            "The weight average is shown where it is evaluated, else the last weights.",
            f"Images: {'; '.join(images)}. Attacks: {', '.join(attacks)}"
            f"{f', in {chr(44).join(precision)}' if precision else ''}. "
            f"“Robust” means {attack_title(section['attack'])}.",
        ]
    if shared := _shared_settings(section["groups"]):
        lines.append(f"Settings of all: {shared}.")
    base = section["baseline"]
    if base:
        lines.append(f"Baseline: {base}. Training time is that of the training steps, without validation.")
    unfinished = [g["title"] for g in section["groups"] if not g["finished"]]
    if unfinished:
        lines.append(f"Not finished, so neither ranked nor judged: {'; '.join(unfinished)}.")
    lines += section["notes"]
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


_SETTINGS = {
    "model": "model.name", "training images": "data.train_images", "batch size": "data.batch_size",
    "epochs": "optim.epochs", "learning rate": "optim.lr", "K": "attack.steps", "step size": "attack.step_size",
    "first epoch that mines": "method.start_epoch", "M": "method.screen_steps", "λ": "method.lam",
    "decay of the weight average": "run.ema_decay", "precision": "run.precision",
}  # fmt: skip


def _shared_settings(groups: Sequence[dict]) -> str:
    """Those that have one value in all groups; of the mining ones, in all that mine."""
    found = []
    for words, key in _SETTINGS.items():
        asked = [g["settings"] for g in groups if g["mines_hard_rows"] or not key.startswith("method.")]
        values = {str(settings[key]) for settings in asked if settings.get(key) is not None}
        if len(values) == 1:
            found.append(f"{words} {values.pop()}")
    return ", ".join(found)


def _claims(section: dict) -> str:
    """One row per method, one column per claim."""
    words = {True: '<span class="holds">holds here</span>', False: '<span class="fails">does not hold here</span>'}
    found: dict[str, dict[str, dict]] = {}
    for claim in section["claims"]:
        found.setdefault(claim["group"], {})[claim["claim"]] = claim
    names = list(dict.fromkeys(claim["claim"] for claim in section["claims"]))
    rows = []
    for group, claims in found.items():
        cells = [f"<td>{escape(group)}</td>"]
        for name in names:
            claim = claims.get(name)
            judged = claim is not None and claim["holds"] is not None
            few = " (one seed: an indication only)" if judged and claim["seeds"] == 1 else ""
            verdict = f"<br>{words[claim['holds']]}" if judged else ""
            cells.append(f"<td>{escape(claim['measured']) if claim else NONE}{few}{verdict}</td>")
        rows.append("".join(cells))
    head = [f"Against {section['baseline']}", *names]
    return (
        f'<div class="box">{_text_table(head, rows)}</div>{_warnings(section)}'
        '<p class="muted">Judged by means over seeds; ± is their standard deviation. Undecided: the claimed number '
        "lies in the 95 % interval of the mean over seeds (Student's t), which leaves out that all seeds are judged on "
        "the same images. A std over classes also falls where all classes are worse, hence its change relative to the "
        "average. The paper's figures are for its own data and models.</p>"
    )


def _warnings(section: dict) -> str:
    """Of methods whose accuracy under PGD the checks for gradient masking do not trust."""
    lines = [
        f"<li><strong>{escape(group['title'])}</strong>: “{escape(check['check'])}” does not hold in "
        f"{len(check['suspicious'])} of {check['runs']} runs, so its accuracy under PGD alone proves little.</li>"
        for group in section["groups"]
        for check in group["masking"]
        if check["suspicious"]
    ]
    return f'<div class="box"><h3>Gradient masking</h3><ul>{"".join(lines)}</ul></div>' if lines else ""


def _figure(plot: Plot) -> str:
    image = base64.b64encode(plot.png).decode()
    return (
        f"<h3>{escape(plot.title)}</h3><figure>"
        f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{escape(plot.caption)} <small>{escape(plot.file)}</small></figcaption></figure>"
    )


def _masking(section: dict) -> str:
    rows = []
    for group in section["groups"]:
        for check in group["masking"]:
            bad, left_out = len(check["suspicious"]), len(check["not_run"])
            verdict = f'<span class="fails">suspicious in {bad}</span>' if bad else '<span class="holds">passed</span>'
            verdict = f"{verdict} of {check['runs']}" if check["runs"] else ""
            verdict += f"{', ' if verdict else ''}not run in {left_out}" if left_out else ""
            why = [f"{run}: {reason}" for run, reason in zip(check["suspicious"], check["why"], strict=True)]
            why = "; ".join([*why, *dict.fromkeys(filter(None, check["not_run"]))])
            rows.append(
                f"<td>{escape(group['title'])}</td><td>{escape(check['check'])}</td><td>{verdict}</td>"
                f"<td>{escape(why)}</td>"
            )
    if not rows:
        return '<p class="muted">Not made for these runs. <code>ham evaluate RUN</code> makes them.</p>'
    return _text_table(("Method", "Check", "Runs", "Why"), rows)


# ---------------------------------------------------------------- all runs
def _runs(runs: Sequence[dict]) -> str:
    head = ("Run", "Method", "Data", "Seed", "State", "Epochs", "Time", "Evaluated")
    rows = []
    for run in runs:
        seed = NONE if run["seed"] is None else str(run["seed"])
        epochs = f"{run['epoch'] or 0} of {run['epochs'] or '?'}"
        state = escape(run["state"])
        cells = [run["name"], run["group"], run["section"], seed, None, epochs, duration(run["seconds"])]
        cells.append(", ".join(WEIGHTS[w] for w in run["weights"]) or "no")
        marked = state if run["state"] == "finished" else f'<span class="fails">{state}</span>'
        rows.append("".join(f"<td>{marked if cell is None else escape(cell)}</td>" for cell in cells))
    return _text_table(head, rows)


def _provenance(runs: Sequence[dict]) -> str:
    """Machine, versions, commit, dates and the checkpoint judged, of each run."""
    head = ("Run", "Machine", "Versions", "Commit", "Trained", "Checkpoint judged")
    rows = []
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items()) or "unknown"
        when = f"{run['started'] or 'unknown'} to {run['ended'] or 'unknown'}"
        when += f", in {run['sessions']} sessions" if run["sessions"] > 1 else ""
        shown = run["shown"]
        digest = f"{shown['weights']}, sha256 {(shown['checkpoint_sha256'] or 'unknown')[:12]}" if shown else NONE
        cells = (run["name"], run["machine"], versions, str(run["commit"] or "unknown"), when, digest)
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    return "<h3>Where the numbers come from</h3>" + _text_table(head, rows)


def _text_table(head: Sequence[str], rows: Sequence[str]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table class="text"><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'
