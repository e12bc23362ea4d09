"""Run folders fabricated from given numbers, consistent in themselves: averages, worst classes and std follow from
the accuracies per class (all classes with equally many images)."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ham_kernels import report

report.build.__kwdefaults__["pdf"] = False  # half of a report's time; tests of PDF files ask for them

MACHINE = {"cpu": "Test CPU", "cores": "2, torch uses 2 threads", "gpu": "none", "system": "Linux 6.1"}
CONFIG = {
    "data": {"dataset": "digits", "batch_size": 320, "root": "data", "download": True},
    "model": {"name": "small_cnn", "normalize": False},
    "attack": {"eps": 0.2, "step_size": 0.05, "steps": 10, "norm": "linf"},
    "method": {
        "name": "ham", "screen_steps": 3, "start_epoch": 2, "lam": 1.0, "reweight": True, "early_drop": True,
        "rows": "hard", "freeze_bn": False, "bn_rows": "hard",
    },
    "optim": {"epochs": 4, "lr": 0.1, "momentum": 0.9, "milestones": [3]},
    "run": {"seed": 0, "precision": "fp32", "ema_decay": 0.97},
}  # fmt: skip


def fake_run(
    folder: Path, method: str = "ham", seed: int = 0, *, accuracy: dict[str, list] | None = None,
    seconds: list[float] = (2.0, 1.0, 1.0, 1.0), classes: list[str] | None = None, weights=("ema",),
    state: str = "finished", settings: dict[str, Any] | None = None, parts: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """One run folder.

    accuracy: {attack: accuracies per class, None for a class without images}; None: not evaluated.
    seconds: of each epoch logged.  settings: {"section.key": value} instead of CONFIG's; None drops a key.
    parts: "masking", "confidence", "easy" of the evaluation, as they are.
    """
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    for name, value in {"method.name": method, "run.seed": seed, **(settings or {})}.items():
        section, key = name.split(".")
        config.setdefault(section, {})[key] = value
    (folder / "config.toml").write_text(toml(config), encoding="utf-8")
    epochs = config["optim"]["epochs"]
    status = {"state": state, "epoch": len(seconds), "epochs": epochs, "message": ""}
    write_json(folder / "status.json", status)
    write_json(folder / "environment.json", environment())
    images = config["data"].get("path") or config["data"]["dataset"]
    write_json(folder / "data.json", {"sha256": hashlib.sha256(images.encode()).hexdigest()})
    lines = [epoch_line(i, s, config) for i, s in enumerate(seconds, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in weights if accuracy else ():
        write_json(folder / "evaluation" / f"{name}.json", evaluation(name, accuracy, config, classes, epochs, parts))
    return folder


def environment() -> dict:
    return {
        "versions": {"python": "3.11.7", "torch": "2.15.0", "ham_kernels": "0.1.0"},
        "machine": MACHINE,
        "commit": "abc1234",
        "sessions": [{"started": "2026-01-02T03:04:05+00:00", "ended": "2026-01-02T03:05:05+00:00", "from_epoch": 0}],
    }


def epoch_line(epoch: int, seconds: float, config: dict) -> dict:
    method = config["method"]
    late = epoch >= (method.get("start_epoch") or 1)
    mines = method["name"] == "ham" and late
    n_hard = 1280 // 4 if mines else 1280
    robust = 0.3 + 0.02 * epoch
    val = {
        "clean": {"accuracy": 0.9, "per_class": [0.85, 0.95], "worst_class": 0.85, "std": 0.05, "n": 160},
        "pgd10": {"accuracy": robust, "per_class": [robust - 0.1, robust + 0.1], "worst_class": robust - 0.1, "n": 160},
    }
    val_ema = {name: {**entry, "accuracy": entry["accuracy"] + 0.01} for name, entry in val.items()}
    return {
        "epoch": epoch, "phase": method["name"] if late else "pgd_at", "loss": 2.0 / epoch, "n": 1280, "n_hard": n_hard,
        "hard_fraction": n_hard / 1280, "skipped": 0, "seconds": seconds, "images_per_s": 1280 / seconds, "lr": 0.1,
        "val": val, "val_ema": val_ema,
    }  # fmt: skip


def evaluation(weights: str, accuracy: dict[str, list], config: dict, classes, epochs: int, parts) -> dict:
    count = len(next(iter(accuracy.values())))
    return {
        "format": 1, "weights": weights, "checkpoint_sha256": "0123456789abcdef" * 4, "epoch": epochs,
        "dataset": config["data"]["dataset"], "classes": classes or [str(c) for c in range(count)], "part": "test",
        "images": 100 * count, "eps": config["attack"]["eps"], "step_size": config["attack"]["step_size"],
        "norm": config["attack"]["norm"], "precision": "fp32", "seed": 0,
        "attacks": {name: attack(per_class) for name, per_class in accuracy.items()},
        **(parts or {}),
    }  # fmt: skip


def attack(per_class: list) -> dict:
    known = [value for value in per_class if value is not None]
    mean, std = statistics.fmean(known), statistics.pstdev(known)
    return {
        "settings": {}, "n": 100 * len(known), "seconds": 1.0,
        "accuracy": interval(mean), "per_class": [interval(value) for value in per_class],
        "worst_class": interval(min(known)), "std": interval(std), "nstd": interval(std / mean if mean else None),
    }  # fmt: skip


def with_flags(attack: dict, flags: list[str], images: str = "the same") -> None:
    """Gives an attack the flags of each class's images, and the accuracies that follow."""
    labels = " ".join(str(c) for c, of_class in enumerate(flags) for _ in of_class)
    shares = [of_class.count("1") / len(of_class) if of_class else None for of_class in flags]
    known, correct = [share for share in shares if share is not None], "".join(flags)
    attack |= {"correct": correct, "labels": labels, "images_sha256": images, "n": len(correct)}
    attack |= {"accuracy": interval(correct.count("1") / len(correct)), "per_class": list(map(interval, shares))}
    mean, std = statistics.fmean(known), statistics.pstdev(known)
    attack |= {
        "worst_class": interval(min(known)),
        "std": interval(std),
        "nstd": interval(std / mean if mean else None),
    }


def interval(value: float | None, half: float = 0.04) -> dict:
    """An interval of the given half width around a value."""
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - half, "high": value + half}


def confidence(overconfident: list, histogram: list[list[int]]) -> dict:
    bins = len(histogram[0])
    known = [value for value in overconfident if value is not None]
    return {
        "threshold": 0.9, "steps": 10, "part": "train", "edges": [i / bins for i in range(bins + 1)],
        "overconfident": overconfident, "overconfident_all": statistics.fmean(known),
        "wrong_confident": [0.0] * len(overconfident), "histogram": histogram,
    }  # fmt: skip


def easy(stay_shares: list) -> dict:
    by_m = [
        {"m": m, "easy": 100 - 10 * m, "easy_fraction": 1 - 0.1 * m, "stay": 0, "stay_share": share, "per_class": []}
        for m, share in enumerate(stay_shares, 1)
    ]
    return {"steps": 10, "part": "train", "by_m": by_m}


def masking(suspicious: bool, why: str = "") -> dict:
    check = {
        "name": "steps", "title": "More steps are stronger", "values": {"fgsm": 0.5}, "suspicious": suspicious,
        "why": why,
    }  # fmt: skip
    return {"suspicious": suspicious, "checks": [check]}


# ---------------------------------------------------------------- files
def change_evaluation(run: Path, change: Callable[[dict], None], weights: str = "ema") -> None:
    """Rewrites evaluation/WEIGHTS.json with what `change` does to it in place."""
    path = run / "evaluation" / f"{weights}.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    write_json(path, raw)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def toml(config: dict[str, dict[str, Any]]) -> str:
    """Numbers, booleans, strings and lists are written in TOML as in JSON; None is left out."""
    lines = []
    for section, values in config.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"
