"""`ham evaluate`: what the weights of a run are worth, written beside them."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import data, evaluation
from ..common import provenance
from ..common.files import write_atomically
from ..distributed import PATIENT, Ranks
from ..evaluation.gradient_masking import COST as MASKING_COST
from ..evaluation.gradient_masking import IMAGES as MASKING_IMAGES
from ..evaluation.named_attacks import plans, searcher
from ..report.text_format import attack_title
from ..runs.folder import JUDGING_LOCK, RunFolder
from ..runs.judge_settings import EvaluateSettings
from ..runs.settings import TrainSettings, check_step
from . import run_images
from .evaluation_text import under_budget, verdict
from .from_settings import device_of, join, load_model, trained_model
from .noted_images import NotedLoader, drop_altered, has_examples, write_examples
from .progress import JudgeProgress, say

FORMAT = 1


def evaluate_run(
    path: str | Path, settings: EvaluateSettings | None = None, *, quiet: bool = False, model: nn.Module | None = None
) -> list[Path]:
    """Judges a run's weights and writes one JSON file each below evaluation/; returns their paths.

    The file is WEIGHTS.json for the test images under the run's own budget, in fp32, with seed 0; any other choice
    has a file of its own, and so has each budget of eps_curve, under which there are attacks alone. A second call adds
    further attacks, each on its own number of images; an attack that was judged on as many images or more stays.
    Stopped or killed, the same call goes on after the last batch. Under torchrun all processes call this and share the
    attacks; the first writes, and does the rest alone. What was found of later weights, whose checkpoint is
    damaged now, is not overwritten. `model`: one with these weights, where no name makes it.
    Raises: FileNotFoundError, ValueError, TypeError naming what is wrong, before any attack; BlockingIOError while
        another process judges the run; CheckpointError.
    """
    settings = settings or EvaluateSettings()
    settings.check()
    ranks = join(settings.device, PATIENT)  # the checks for masking and the analyses are the work of one
    run = RunFolder.open(path, writes=ranks.rank == 0)
    if run.writes:
        run.check_writable("run")
    told = run.settings()
    how = check_how(settings, told)
    device = device_of(settings.device)
    other = None if settings.transfer_from is None else _other_model(settings.transfer_from, run, device)
    states = {kind: run.load_weights(kind) for kind in _kinds(settings, run)}
    if settings.part not in run.data_facts()["counts"]:
        raise ValueError(f"part: got {settings.part!r}, but {run.path} was trained without validation images")
    with ranks.first_alone("the search for the images"):
        images, *_ = run_images.find(told, run, settings.path, generated=False)  # not others, which would be split anew
    quiet = quiet or not run.writes
    with run.alone(JUDGING_LOCK):
        judges = [
            _Judge(run, kind, state, told, what, under, images, model, other, device, quiet, ranks)
            for kind, state in states.items()
            for what, under in ((settings, how), *_curve(settings, how))
        ]
        for judge in judges:
            with ranks.first_alone("the look at what is judged already"):
                judge.begin()
            judge.result = ranks.from_first(judge.result)
        for judge in judges:
            judge.work()
            if not quiet:
                say(verdict(judge.result, run.path) if judge.how == how else under_budget(judge.result))
    return [judge.path for judge in judges]


def check_how(settings: EvaluateSettings, told: TrainSettings) -> dict[str, Any]:
    """What every attack of a judgement shares. Raises: ValueError, ImportError naming the setting."""
    how = _how(settings, told)
    if settings.eps is not None and settings.step_size is None:
        check_step(how["eps"], how["norm"], "eps")  # of which the step is a part
    check_step(how["step_size"], how["norm"])
    for eps in settings.eps_curve:
        check_step(eps, how["norm"], "eps_curve")
        if how["eps"] == 0:
            raise ValueError(f"eps_curve: got {eps:g} with eps=0, to which no step size is in proportion; give an eps")
    plans(settings.attacks, restarts=settings.restarts, **{k: how[k] for k in ("eps", "step_size", "norm")})
    if settings.masking is not False and 0 in (how["eps"], how["step_size"]):
        raise ValueError("eps: got 0 for it or step_size; there is no gradient to examine, give --no-masking")
    return how


def _how(settings: EvaluateSettings, told: TrainSettings) -> dict[str, Any]:
    """The run's own budget unless told otherwise; a step that is not told is the same part of another budget."""
    own, eps, step_size = told.attack, settings.eps, settings.step_size
    eps = own.eps if eps is None else eps
    if step_size is None:
        step_size = _in_proportion(own.step_size, own.eps, eps)
    return {
        "eps": eps, "step_size": step_size, "norm": own.norm, "precision": settings.precision, "seed": settings.seed,
    }  # fmt: skip


def _in_proportion(step_size: float, eps: float, other: float) -> float:
    """The step under another budget; the same to the last bit where the budget is."""
    return step_size * (other / eps) if eps > 0 else step_size


def _curve(settings: EvaluateSettings, how: dict[str, Any]) -> list[tuple[EvaluateSettings, dict[str, Any]]]:
    """What is judged, and how, under each budget of eps_curve that is not judged anyway."""
    attacks = tuple(name for name in settings.attacks if name != "clean")
    what = replace(settings, attacks=attacks, masking=False, analyses=False)
    others = [eps for eps in settings.eps_curve if f"{eps:g}" != f"{how['eps']:g}"]  # as files are named
    return [
        (what, {**how, "eps": eps, "step_size": _in_proportion(how["step_size"], how["eps"], eps)}) for eps in others
    ]


def _kinds(settings: EvaluateSettings, run: RunFolder) -> tuple[str, ...]:
    if settings.weights == ("all",):
        return tuple(run.available_weights())
    return settings.weights or (run.usual_weights(),)


def _other_model(path: Path, run: RunFolder, device: torch.device) -> nn.Module:
    """The averaged (else last) weights of another run, which must know the same classes."""
    try:
        other = RunFolder.open(path)
        facts = other.data_facts()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"transfer_from: {str(error).removeprefix('run: ')}") from error
    if other.path.samefile(run.path):
        raise ValueError(f"transfer_from: {path} is the run itself; give one that was trained apart from it")
    if any(facts[k] != run.data_facts()[k] for k in ("classes", "channels")):
        raise ValueError(f"transfer_from: {path} was trained on other classes or images than {run.path}")
    return load_model(path, other.usual_weights(), device)


class _Judge:
    """One set of weights under judgement. What is done is on disk at once."""

    def __init__(
        self, run: RunFolder, kind: str, state: dict, told: TrainSettings, settings: EvaluateSettings, how: dict,
        images, model: nn.Module | None, other: nn.Module | None, device: torch.device, quiet: bool, ranks: Ranks,
    ):  # fmt: skip
        self.model, self.ranks = model, ranks
        self.run, self.state, self.told, self.settings, self.how, self.images = run, state, told, settings, how, images
        self.other, self.device = other, device
        self.progress = JudgeProgress(quiet, "" if how["eps"] == told.attack.eps else f" at eps {how['eps']:g}")
        self.steps, self.workers = told.attack.steps, told.data.workers
        self.search = searcher(settings.search, device)
        of_part = images.counts[settings.part]
        self.n = min(settings.images or of_part, of_part)
        self.checked = settings.masking_images or MASKING_IMAGES
        usual = how == _how(EvaluateSettings(), told) and settings.part == "test"
        special = f".{settings.part}-eps{how['eps']:g}-step{how['step_size']:g}-{how['precision']}-seed{how['seed']}"
        self.stem = kind + ("" if usual else special)
        self.name = f"evaluation/{self.stem}.json"
        self.path = run.path / self.name
        self.examples = self.path.with_name(f"{self.stem}.examples.npz")
        self.result: dict[str, Any] = {}
        self.identity = {
            "weights": kind, "checkpoint_sha256": state["sha256"], "epoch": state["epoch"],
            "dataset": run.source(), "part": settings.part, "images": of_part, **how,
        }  # fmt: skip

    def work(self) -> None:
        s, result = self.settings, self.result
        if self.model is None:
            self.model = trained_model(self.told, self.run.data_facts(), self.state["model"], self.device)
        facts = provenance.machine()
        on = {"cpu": facts["cpu"], "gpu": facts["gpu"], "torch": torch.__version__, "commit": provenance.commit()}
        with self.progress as progress:
            loader = NotedLoader(self._loader(s.part, self.n))
            for attack in s.attacks:
                name = f"{attack}-r{s.restarts}" if s.restarts > 1 and attack.startswith(("pgd", "cw")) else attack
                if (old := result["attacks"].get(name)) and self._stays(old):
                    self._tell_kept(name, old)
                    continue
                found = evaluation.judge(
                    self.model, loader, (attack,), classes=len(self.images.classes), restarts=s.restarts,
                    device=self.device, store=self.run.path / "evaluation" / f".{self.stem}.flags.json",
                    identity=self.identity, progress=progress, search=self.search, ranks=self.ranks, **self.how,
                )  # fmt: skip
                result["attacks"][name] = {**found[attack], **loader.noted, "on": on}
                self.run.write_json(self.name, result)
            if not self.run.writes:  # what follows is the work of one process
                return
            if self._checks_masking():
                self._once(result, "masking", self._masking_key(result), self._masking)
            if s.analyses:
                if not has_examples(self.examples, result.get("examples")):
                    result.pop("examples", None)
                key = {"images": s.analysis_images, "part": s.part, "steps": self.steps}
                self._once(result, "examples", key, self._examples)
                key = {"images": s.analysis_images, "part": "train", "steps": self.steps, "threshold": s.threshold}
                self._once(result, "confidence", key, self._confidence)
                if self.steps > 1:  # an attack of one step has no step in between
                    self._once(result, "easy", key, self._easy)
        del self.model  # the next kind of weights may need its memory

    def _stays(self, old: dict[str, Any]) -> bool:
        """An attack is not judged again on fewer images, nor on as many by a search that is less exact."""
        as_exact = self.search is not None or "search" not in old["settings"]
        return old["n"] > self.n or (old["n"] == self.n and as_exact)

    def _tell_kept(self, name: str, old: dict[str, Any]) -> None:
        if self.run.writes and self.search is None and "search" in old["settings"]:
            told = f"stays as a fast search found it on {old['n']} images, more than {self.n}"
            say(f"{attack_title(name)}: {told}", sys.stderr)

    def begin(self) -> None:
        """Takes over the file's earlier results, where they are of the same weights.

        Those of earlier weights are kept beside it. Raises: ValueError naming the file where they are of later ones.
        """
        self.result = fresh = {
            "format": FORMAT, **self.identity, "classes": list(self.images.classes), "machine": provenance.machine(),
            "versions": provenance.versions("pyautoattack"), "commit": provenance.commit(), "attacks": {},
        }  # fmt: skip
        if not self.path.exists():
            return
        try:
            old = dict(json.loads(self.path.read_text()))
        except (TypeError, ValueError):
            say(f"{self.path} cannot be read and is made anew", sys.stderr)
            return
        if all(old.get(k) == v for k, v in self.identity.items()):
            self.result = {**old, **{k: v for k, v in fresh.items() if k != "attacks"}}
            drop_altered(self.result["attacks"], self.path)
            return
        epoch, have = old.get("epoch"), self.identity["epoch"]
        if isinstance(epoch, int) and epoch > have:
            raise ValueError(self._later(epoch, have))
        if not self.run.writes:
            return
        content = self.path.read_bytes()
        stem = f"{self.path.name}.epoch{epoch}-{str(old.get('checkpoint_sha256'))[:8]}"
        tails = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
        paths = (self.path.with_name(stem + tail) for tail in tails)
        kept = next(path for path in paths if not path.exists() or path.read_bytes() == content)
        write_atomically(kept, content)
        apart = [f"{k} {old.get(k)}, now {v}" for k, v in self.identity.items() if old.get(k) != v]
        say(f"{self.path} is of {'; '.join(apart)}: judged anew, the old file is {kept}", sys.stderr)

    def _later(self, epoch: int, have: int) -> str:
        """Why a damaged checkpoint's judgement stays."""
        path = self.state["path"]
        damaged = self.run.damaged_after(path) if self.identity["weights"] in ("last", "ema") else []
        why = f"{', '.join(damaged)} is damaged, and {path.name}" if damaged else path.name
        return (
            f"weights: {self.path} judges those of epoch {epoch}; {why} has those of epoch {have}. Go on with "
            f"`ham train --resume {shlex.quote(str(self.run.path))}`, or move the file away to judge these"
        )

    def _once(self, result: dict, name: str, key: dict, make) -> None:
        if result.get(name, {}).get("key") == key:
            return
        result[name] = {"key": key, **make()}
        self.run.write_json(self.name, result)

    def _masking_key(self, result: dict) -> dict:
        s, known = self.settings, result.get("masking", {}).get("key", {})
        if s.transfer_from is not None:
            return {"images": self.checked, "other": RunFolder.open(s.transfer_from).newest_digest()}
        # without another model, an earlier result that had one stays: it says more
        return known if known.get("images") == self.checked else {"images": self.checked, "other": None}

    def _checks_masking(self) -> bool:
        """As asked for; else where that costs no more than the attacks."""
        s = self.settings
        if s.masking is not None or s.masking_images is not None or s.transfer_from is not None:
            return s.masking is not False
        attacks = plans(s.attacks, restarts=s.restarts, **{k: self.how[k] for k in ("eps", "step_size", "norm")})
        of_attacks = self.n * sum(plan.passes for plan in attacks.values())
        checked = min(self.checked, self.images.counts[s.part])  # however few the attacks are judged on
        return checked * MASKING_COST <= of_attacks

    def _masking(self) -> dict:
        """Check by check, each kept at once: they may take longer than the attacks."""
        key, begun = self._masking_key(self.result), self.result.get("masking_begun", {})

        def note(found: list[dict]) -> None:
            self.result["masking_begun"] = {"key": key, "checks": found}
            self.run.write_json(self.name, self.result)

        found = evaluation.masking(
            self.model, self._loader(self.settings.part, self.checked), device=self.device, other=self.other,
            images=self.checked, progress=self.progress, known=begun["checks"] if begun.get("key") == key else (),
            note=note, **self.how,
        )  # fmt: skip
        self.result.pop("masking_begun", None)
        return found

    def _confidence(self) -> dict:
        self.progress.begin("confidence")
        loader = self._loader("train", self.settings.analysis_images)
        found = evaluation.confidence(
            self.model, loader, steps=self.steps, threshold=self.settings.threshold, device=self.device, **self.how
        )
        return {"part": "train", **found}

    def _easy(self) -> dict:
        self.progress.begin("easy")
        loader = self._loader("train", self.settings.analysis_images)
        found = evaluation.easy_stays_easy(self.model, loader, steps=self.steps, device=self.device, **self.how)
        return {"part": "train", **found}

    def _examples(self) -> dict:
        self.progress.begin("examples")
        part, count = self.settings.part, self.settings.analysis_images
        classes = set(self.images.limit(part, count).labels(part).tolist())
        found = evaluation.examples(
            self.model, self._loader(part, count), classes, steps=self.steps, device=self.device, **self.how
        )
        return {"attack": f"pgd{self.steps}", "part": part, **write_examples(self.examples, found)}

    def _loader(self, part: str, count: int | None):
        images = self.images.limit(part, count)
        return data.part_loader(images, part, self.settings.batch_size, device=self.device, workers=self.workers)
