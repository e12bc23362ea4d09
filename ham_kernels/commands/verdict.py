"""A judgement as text: what is said at the end of `ham evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..report.wording import attack_title


def print_verdict(result: dict[str, Any], run: Path) -> None:
    what = f"weights {result['weights']} (epoch {result['epoch']}), {result['part']} images, eps {result['eps']:g}"
    print(f"\n{run}, {what}")
    print("accuracy in %, 95 % bootstrap interval over images; std, nstd over classes\n")
    print(f"{'attack':<14}{'accuracy':>22}{'worst class':>26}{'std':>8}{'nstd':>8}{'images':>8}")
    for name, a in result["attacks"].items():
        worst = _worst(a, result["classes"])
        print(
            f"{attack_title(name):<14}{_interval(a['accuracy']):>22}{worst + ' ' + _interval(a['worst_class']):>26}"
            f"{_percent(a['std']['value']):>8}{_number(a['nstd']['value']):>8}{a['n']:>8}"
        )
    print("\nper class")
    names = list(result["attacks"])
    width = max(12, *(len(c) + 2 for c in result["classes"]))
    print(" " * width + "".join(f"{attack_title(n):>14}" for n in names))
    for i, c in enumerate(result["classes"]):
        row = "".join(f"{_percent(result['attacks'][n]['per_class'][i]['value']):>14}" for n in names)
        print(f"{c:<{width}}{row}")
    if "masking" in result:
        masked = result["masking"]
        print(f"\ngradient masking: {'SUSPICIOUS' if masked['suspicious'] else 'no sign of it'}")
        for check in masked["checks"]:
            print(f"  {'!!' if check['suspicious'] else 'ok'}  {check['title']}: {check['why']}")
    if "confidence" in result:
        c = result["confidence"]
        shares = [s for s in c["overconfident"] if s is not None]
        print(
            f"\nover-confident adversarial examples (true class >= {c['threshold']:g}, training images): "
            f"{100 * c['overconfident_all']:.1f} %, by class {100 * min(shares):.1f} to {100 * max(shares):.1f} %"
        )
    if "easy" in result:
        print(f"easy after M steps and still easy after K = {result['easy']['steps']} (training images):")
        print(
            "  "
            + ", ".join(
                f"M={m['m']}: {_percent(m['stay_share'])} of {_percent(m['easy_fraction'])}"
                for m in result["easy"]["by_m"]
            )
        )


def _worst(attack: dict[str, Any], classes: list[str]) -> str:
    values = {name: c["value"] for name, c in zip(classes, attack["per_class"], strict=True) if c["value"] is not None}
    return min(values, key=values.get)[:12]


def _interval(i: dict[str, float | None]) -> str:
    return f"{_percent(i['value'])} [{_percent(i['low'])}, {_percent(i['high'])}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
