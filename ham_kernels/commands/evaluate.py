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
from .assemble import device_of, facts_of, images_of, load_model, trained_model
from .verdict import print_verdict

FORMAT = 1


def evaluate_run(path: str | Path, settings: EvaluateSettings | None = None, *, quiet: bool = False) -> list[Path]:
    """Judges a run's weights and writes one JSON file each below evaluation/; returns their paths.

    The file is WEIGHTS.json for the test images under the run's own budget, in fp32, with seed 0; any other choice
    has a file of its own. A second call adds further attacks, each on its own number of images; an attack that was
    judged on as many images or more stays. Stopped or killed, the same call goes on after the last batch.
    Raises: FileNotFoundError, ValueError, TypeError naming what is wrong, before any attack; BlockingIOError while
        another process judges the run; CheckpointError.
    """
    settings = settings or EvaluateSettings()
    settings.check()
    run = RunFolder.open(path)
    told = run.settings()
    how = _how(settings, told)
    plans(settings.attacks, restarts=settings.restarts, **{k: how[k] for k in ("eps", "step_size", "norm")})
    if settings.masking and 0 in (how["eps"], how["step_size"]):
        raise ValueError("eps: got 0 for it or step_size; there is no gradient to examine, give --no-masking")
    states = {kind: run.load_weights(kind) for kind in _kinds(settings, run, told)}
    device = device_of(settings.device)
    images = images_of(told)
    run.check_data_facts(facts_of(images))  # other images may be split anew, and test what was trained on
    if settings.part not in images.counts:
        raise ValueError(f"part: got {settings.part!r}, but {run.path} was trained without validation images")
    other = None if settings.transfer_from is None else _other_model(settings.transfer_from, run, device)
    written = []
    with run.alone("evaluation/.lock"):
        for kind, state in states.items():
            model = trained_model(told, run.data_facts(), state["model"], device)
            judge = _Judge(run, kind, state, told, settings, how, images, model, other, device, quiet)
            result = judge.work()
            written.append(run.path / judge.name)
            if not quiet:
                print_verdict(result, run.path)
    return written


def _how(settings: EvaluateSettings, told: TrainSettings) -> dict[str, Any]:
    """What every attack of a judgement shares; the run's own budget unless told otherwise."""
    return {
        "eps": told.attack.eps if settings.eps is None else settings.eps,
        "step_size": told.attack.step_size if settings.step_size is None else settings.step_size,
        "norm": told.attack.norm, "precision": settings.precision, "seed": settings.seed,
    }  # fmt: skip


def _kinds(settings: EvaluateSettings, run: RunFolder, told: TrainSettings) -> tuple[str, ...]:
    if settings.weights == ("all",):
        return tuple(run.available_weights())
    return settings.weights or (("last",) if told.run.ema_decay is None else ("ema",))


def _other_model(path: Path, run: RunFolder, device: torch.device) -> nn.Module:
    """The averaged (else last) weights of another run, which must know the same classes."""
    other = RunFolder.open(path)
    if any(other.data_facts()[k] != run.data_facts()[k] for k in ("classes", "channels")):
        raise ValueError(f"transfer_from: {path} was trained on other classes or images than {run.path}")
    kind = "last" if other.settings().run.ema_decay is None else "ema"
    return load_model(path, kind, device)


class _Judge:
    """One set of weights under judgement. What is done is on disk at once."""

    def __init__(
        self, run: RunFolder, kind: str, state: dict, told: TrainSettings, settings: EvaluateSettings, how: dict,
        images, model: nn.Module, other: nn.Module | None, device: torch.device, quiet: bool,
    ):  # fmt: skip
        self.run, self.settings, self.how, self.images = run, settings, how, images
        self.model, self.other, self.device, self.quiet = model, other, device, quiet
        self.steps, self.workers = told.attack.steps, told.data.workers
        of_part = images.counts[settings.part]
        self.n = min(settings.images or of_part, of_part)
        usual = how == _how(EvaluateSettings(), told) and settings.part == "test"
        special = f".{settings.part}-eps{how['eps']:g}-step{how['step_size']:g}-{how['precision']}-seed{how['seed']}"
        self.stem = kind + ("" if usual else special)
        self.name = f"evaluation/{self.stem}.json"
        self.identity = {
            "weights": kind, "checkpoint_sha256": state["sha256"], "epoch": state["epoch"],
            "dataset": told.data.path or told.data.dataset, "part": settings.part, "images": of_part, **how,
        }  # fmt: skip

    def work(self) -> dict[str, Any]:
        s = self.settings
        result = self._begin()
        facts = environment.machine()
        on = {"cpu": facts["cpu"], "gpu": facts["gpu"], "torch": torch.__version__, "commit": environment.commit()}
        with _Progress(self.quiet) as progress:
            loader = self._loader(s.part, self.n)
            for attack in s.attacks:
                name = f"{attack}-r{s.restarts}" if s.restarts > 1 and attack.startswith(("pgd", "cw")) else attack
                if result["attacks"].get(name, {}).get("n", 0) >= self.n:
                    continue
                found = judging.judge(
                    self.model, loader, (attack,), classes=len(self.images.classes), restarts=s.restarts,
                    device=self.device, store=self.run.path / "evaluation" / f".{self.stem}.flags.json",
                    identity=self.identity, progress=progress, **self.how,
                )  # fmt: skip
                result["attacks"][name] = {**found[attack], "on": on}
                self.run.write_json(self.name, result)
            if s.masking:
                other = None if s.transfer_from is None else RunFolder.open(s.transfer_from).newest_digest()
                self._once(result, "masking", {"images": s.masking_images, "other": other}, self._masking)
            if s.analyses:
                key = {"images": s.analysis_images, "part": "train", "steps": self.steps, "threshold": s.threshold}
                self._once(result, "confidence", key, self._confidence)
                self._once(result, "easy", key, self._easy)
        return result

    def _begin(self) -> dict[str, Any]:
        """The file's earlier results, where they are of the same weights."""
        fresh = {
            "format": FORMAT, **self.identity, "classes": list(self.images.classes), "machine": environment.machine(),
            "versions": environment.versions("torchattacks"), "commit": environment.commit(), "attacks": {},
        }  # fmt: skip
        path = self.run.path / self.name
        if path.exists():
            try:
                old = json.loads(path.read_text())
                if all(old.get(k) == v for k, v in self.identity.items()):
                    return {**old, **{k: v for k, v in fresh.items() if k != "attacks"}}
                print(f"{path} is of epoch {old.get('epoch')}, the weights are of epoch {fresh['epoch']}: judged anew",
                      file=sys.stderr)  # fmt: skip
            except (ValueError, AttributeError):
                print(f"{path} cannot be read and is made anew", file=sys.stderr)
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
        loader = self._loader(s.part, s.masking_images)
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
        found = judging.easy_stays_easy(self.model, loader, steps=self.steps, device=self.device, **self.how)
        return {"part": "train", **found}

    def _loader(self, part: str, count: int | None):
        images = self.images.limit(part, count)
        return data.part_loader(images, part, self.settings.batch_size, device=self.device, workers=self.workers)


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
            self._bar.total = total or self._bar.total  # known after the first attack
            self._bar.update(done - self._bar.n)
