"""A judgement as text: what is said at the end of `ham evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.one_class import answers_one_class
from ..evaluation.gradient_masking import COST
from ..report.text_format import attack_title, distinct, duration


def verdict(result: dict[str, Any], run: Path) -> str:
    """The text of what evaluation/*.json holds, empty line first."""
    weights = f"weights {result['weights']} (epoch {result['epoch']})" if result["epoch"] else "weights of others"
    what = f"{weights}, {result['part']} images, eps {result['eps']:g}"
    lines = ["", f"{run}, {what}", "accuracy in %, 95 % interval over images; std, nstd over classes", ""]
    lines += [*_attacks(result), *limits(result), *_parts(result), "", "per class", *_classes(result)]
    if "masking" in result:
        lines += ["", *_masking(result["masking"])]
    else:
        lines += [
            "",
            f"gradient masking: not checked; --masking does, with some {COST} forwards and backwards an image",
        ]
    if "confidence" in result:
        c = result["confidence"]
        shares = [s for s in c["overconfident"] if s is not None]
        lines += [
            "",
            f"over-confident adversarial examples (true class >= {c['threshold']:g}, training images): "
            f"{100 * c['overconfident_all']:.1f} %, by class {100 * min(shares):.1f} to {100 * max(shares):.1f} %",
        ]
    if "easy" in result:
        steps = result["easy"]["steps"]
        lines.append(f"easy after M steps, and of these still easy after K = {steps} (training images):")
        lines += [
            f"  M={m['m']}: {percent(m['easy_fraction'])} % of the images are easy, {percent(m['stay_share'])} % of "
            "these stay so"
            for m in result["easy"]["by_m"]
        ]
    return "\n".join(lines)


def under_budget(result: dict[str, Any]) -> str:
    """One line of a judgement under another budget than the run's."""
    found = [
        f"{attack_title(name)} {interval(a['accuracy'])}, worst class {interval(a['worst_class'])}"
        for name, a in result["attacks"].items()
    ]
    return f"weights {result['weights']}, eps {result['eps']:g}: {'; '.join(found)}"


def _attacks(result: dict[str, Any]) -> list[str]:
    worst = [f"class {_worst(a, result['classes'])}: {interval(a['worst_class'])}" for a in result["attacks"].values()]
    width = max(26, *(len(w) + 2 for w in worst))
    lines = [f"{'attack':<14}{'accuracy':>22}{'worst class':>{width}}{'std':>8}{'nstd':>8}{'images':>8}"]
    for (name, a), w in zip(result["attacks"].items(), worst, strict=True):
        lines.append(
            f"{attack_title(name):<14}{interval(a['accuracy']):>22}{w:>{width}}"
            f"{percent(a['std']['value']):>8}{_number(a['nstd']['value']):>8}{a['n']:>8}"
        )
    return lines


def limits(result: dict[str, Any]) -> list[str]:
    """A model that answers one class, attacks that had no gradient."""
    return _one_answer(result) + [
        f"{attack_title(name)}: gradient missing for {a['no_gradient']} of {a['n']} images, which were not attacked"
        for name, a in result.get("attacks", {}).items()
        if a.get("no_gradient")
    ]


def _one_answer(result: dict[str, Any]) -> list[str]:
    """That it answers one class for nearly all images, if it does."""
    clean = result.get("attacks", {}).get("clean")
    if clean is None:
        return []
    answers = [int(answer) for answer in clean.get("answers", "").split()]
    if (answer := answers_one_class([c["value"] for c in clean["per_class"]], answers)) is None:
        return []
    return [f"{result['classes'][answer]} is its answer for nearly all images: do not rank it"]


def _parts(result: dict[str, Any]) -> list[str]:
    """Which part of AutoAttack took how many images; a search without gradients that takes many hints at masking.

    All parts that the number of classes allows.
    """
    found = {}
    for name, a in result["attacks"].items():
        if "lost" in a:
            parts = a["settings"].get("parts", a["lost"])
            found[name] = ", ".join(f"{a['lost'].get(part, 0)} by {part.upper()}" for part in parts)
    return [f"{attack_title(name)} took {told}" for name, told in found.items() if told]


def _classes(result: dict[str, Any]) -> list[str]:
    names, classes = list(result["attacks"]), [" ".join(name.split()) for name in result["classes"]]
    width = max(12, *(len(c) + 2 for c in classes))
    lines = [" " * width + "".join(f"{attack_title(n):>14}" for n in names)]
    for i, c in enumerate(classes):
        row = "".join(f"{percent(result['attacks'][n]['per_class'][i]['value']):>14}" for n in names)
        lines.append(f"{c:<{width}}{row}")
    return lines


def _masking(masked: dict[str, Any]) -> list[str]:
    """A check without values was not run, and says nothing of the model."""
    checks = masked["checks"]
    run = sum(bool(check["values"]) for check in checks)
    bad = sum(check["suspicious"] for check in checks)
    found = f"SUSPICIOUS in {bad} of" if masked["suspicious"] else "no sign of it in"
    missing = f", {len(checks) - run} not run" if run < len(checks) else ""
    seconds = [check["seconds"] for check in checks if "seconds" in check]
    took = f" ({duration(sum(seconds))})" if seconds else ""
    lines = [f"gradient masking: {found} {run} checks{missing}{took}"]
    for check in checks:
        mark = "!!" if check["suspicious"] else "ok" if check["values"] else "not run"
        lines.append(f"  {mark:<7}  {check['title']}: {check['why'].removeprefix('not run: ')}")
    return lines


def _worst(attack: dict[str, Any], classes: list[str]) -> str:
    values = {i: c["value"] for i, c in enumerate(attack["per_class"]) if c["value"] is not None}
    return distinct(classes)[min(values, key=values.get)]


def interval(i: dict[str, float | None]) -> str:
    return f"{percent(i['value'])} [{percent(i['low'])}, {percent(i['high'])}]"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
