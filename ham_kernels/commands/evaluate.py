"""`ham evaluate`: what the weights of a run are worth, written beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .. import data, environment, judging
from ..judging.attacks import plans
from ..runs import RunFolder
from ..settings import EvaluateSettings, TrainSettings
from .assemble import device_of, images_of, load_model, model_of
from .verdict import print_verdict

FORMAT = 1


def evaluate_run(path: str | Path, settings: EvaluateSettings | None = None, *, quiet: bool = False) -> list[Path]:
    """Judges a run's weights and writes one JSON file each, evaluation/WEIGHTS.json; returns their paths.

    A second call adds further attacks, each on its own number of images. Stopped or killed, the same call goes on
    after the last batch.
    Raises: FileNotFoundError, ValueError, TypeError naming what is wrong, before any attack; CheckpointError.
    """
    settings = settings or EvaluateSettings()
    settings.check()
    run = RunFolder.open(path)
    told = run.settings()
    kinds = settings.weights or (("last",) if told.run.ema_decay is None else ("ema",))
    states = {kind: run.load_weights(kind) for kind in kinds}
    device = device_of(settings.device)
    images = images_of(told)
    counts = images.counts
    if settings.part not in counts:
        raise ValueError(f"part: got {settings.part!r}, but {run.path} was trained without validation images")
    other = None if settings.transfer_from is None else _other_model(settings.transfer_from, run, device)
    written = []
    for kind, state in states.items():
        model = model_of(told, len(images.classes), images.channels)
        model.load_state_dict(state["model"])
        judge = _Judge(run, kind, state, told, settings, images, model.to(device).eval(), other, device, quiet)
        result = judge.work()
        written.append(judge.file)
        if not quiet:
            print_verdict(result, run.path)
    return written


class _Judge:
    """One set of weights under judgement. What is done is on disk at once."""

    def __init__(
        self, run: RunFolder, kind: str, state: dict, told: TrainSettings, settings: EvaluateSettings, images,
        model: nn.Module, other: nn.Module | None, device: torch.device, quiet: bool,
    ):  # fmt: skip
        self.kind, self.settings, self.images, self.model, self.other = kind, settings, images, model, other
        self.device, self.quiet, self.run = device, quiet, run
        self.how = {
            "eps": told.attack.eps if settings.eps is None else settings.eps,
            "step_size": told.attack.step_size if settings.step_size is None else settings.step_size,
            "norm": told.attack.norm, "precision": settings.precision, "seed": settings.seed,
        }  # fmt: skip
        self.steps, self.workers = told.attack.steps, told.data.workers
        self.name = f"evaluation/{kind}.json"
        self.file = run.path / self.name
        counts = images.counts
        self.n = min(settings.images or counts[settings.part], counts[settings.part])
        self.loader = self._loader(settings.part, self.n)
        self.identity = {
            "weights": kind, "checkpoint_sha256": state["sha256"], "epoch": state["epoch"],
            "dataset": told.data.path or told.data.dataset, "part": settings.part, "images": counts[settings.part],
            **self.how,
        }  # fmt: skip

    def work(self) -> dict[str, Any]:
        s = self.settings
        plans(s.attacks, restarts=s.restarts, **{k: self.how[k] for k in ("eps", "step_size", "norm")})  # judges names
        result = self._begin()
        self.file.parent.mkdir(exist_ok=True)
        with _Progress(self.quiet) as progress:
            for attack in s.attacks:
                found = judging.judge(
                    self.model, self.loader, (attack,), classes=len(self.images.classes), restarts=s.restarts,
                    device=self.device, store=self.run.path / "evaluation" / f".{self.kind}.flags.json",
                    identity=self.identity, progress=progress, **self.how,
                )  # fmt: skip
                result["attacks"] |= found
                self.run.write_json(self.name, result)
            if s.masking:
                key = {"images": s.masking_images, "other": str(s.transfer_from)}
                self._once(result, "masking", key, self._masking)
            if s.analyses:
                key = {"images": s.analysis_images, "part": "train", "steps": self.steps, "threshold": s.threshold}
                self._once(result, "confidence", key, self._confidence)
                self._once(result, "easy", key, self._easy)
        return result

    def _begin(self) -> dict[str, Any]:
        """The file's earlier results, where they are of the same weights, images and budget."""
        fresh = {
            "format": FORMAT, **self.identity, "classes": list(self.images.classes), "machine": environment.machine(),
            "versions": environment.versions("torchattacks"), "commit": environment.commit(), "attacks": {},
        }  # fmt: skip
        if self.file.exists():
            try:
                old = json.loads(self.file.read_text())
                if all(old.get(k) == v for k, v in self.identity.items()):
                    return {**old, **{k: v for k, v in fresh.items() if k != "attacks"}}
            except (ValueError, AttributeError):
                print(f"{self.file} cannot be read and is made anew", file=sys.stderr)
        return fresh

    def _once(self, result: dict, name: str, key: dict, make) -> None:
        if result.get(name, {}).get("key") == key:
            return
        if not self.quiet:
            print(f"{name} ...", file=sys.stderr, flush=True)
        result[name] = {"key": key, **make()}
        self.run.write_json(self.name, result)

    def _masking(self) -> dict:
        s = self.settings
        loader = self._loader(s.part, min(s.masking_images, self.n))
        return judging.masking(
            self.model, loader, device=self.device, other=self.other, images=s.masking_images, **self.how
        )

    def _confidence(self) -> dict:
        loader = self._loader("train", self.settings.analysis_images)
        found = judging.confidence(
            self.model, loader, steps=self.steps, threshold=self.settings.threshold, device=self.device, **self.how
        )
        return {"part": "train", **found}

    def _easy(self) -> dict:
        loader = self._loader("train", self.settings.analysis_images)
        return {
            "part": "train",
            **judging.easy_stays_easy(self.model, loader, steps=self.steps, device=self.device, **self.how),
        }

    def _loader(self, part: str, count: int | None):
        images = self.images.limit(part, count)
        return data.part_loader(images, part, self.settings.batch_size, device=self.device, workers=self.workers)


def _other_model(path: Path, run: RunFolder, device: torch.device) -> nn.Module:
    """The averaged (else last) weights of another run, which must know the same classes."""
    other = RunFolder.open(path)
    if any(other.data_facts()[k] != run.data_facts()[k] for k in ("classes", "channels")):
        raise ValueError(f"transfer_from: {path} was trained on other classes or images than {run.path}")
    kind = "last" if other.settings().run.ema_decay is None else "ema"
    return load_model(path, kind, device)


class _Progress:
    """A bar per attack on a terminal, else a line per attack."""

    def __init__(self, quiet: bool):
        self._quiet, self._lines = quiet, not sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._attack = ""

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, attack: str, done: int, total: int | None) -> None:
        if self._quiet:
            return
        if attack != self._attack:
            self._attack = attack
            if self._lines:
                print(f"{attack} ...", file=sys.stderr, flush=True)
            else:
                self.__exit__()
                self._bar = tqdm(total=total, desc=attack, unit="image", dynamic_ncols=True)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
