"""A judgement that can be killed and goes on where it was: flags image by image, and what follows from them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import engine
from ..common import checks
from ..distributed import ALONE, Meeting, Ranks, inner_model
from .class_accuracy import Interval, intervals
from .evaluate import check_turns, tell_no_gradient
from .named_attacks import Plan, batches, judged, plans, resolve_device, searcher, survivors
from .partial_results import FlagStore, fingerprint_of_batch, fingerprint_of_model

Progress = Callable[[str, int, "int | None"], None]
_Told = tuple[str, Tensor, "dict | None", float]  # of a batch: fingerprint, labels, flags if they are new, seconds


def judge(
    model: nn.Module, loader: Iterable, attacks: Sequence[str], *, classes: int, eps: float, step_size: float,
    norm: str = "linf", restarts: int = 1, device: torch.device | str | None = None, precision: str = "fp32",
    seed: int = 0, store: str | Path | None = None, identity: dict | None = None, progress: Progress | None = None,
    search: str | engine.Engine | None = "plain", ranks: Ranks = ALONE,
) -> dict[str, dict]:  # fmt: skip
    """What a model is worth under each attack, with intervals, from one flag per image.

    The flags made so far go to `store` every few seconds, and whatever stops the run: the next one with the same
    model, data and settings goes on from there, and its result is the same to the last flag. Flags belong to the
    model's weights, `identity`, the settings of the attack, and the images and labels of their batch; flags of
    anything else are never used.

    Args:
        model: classifier, images (n, C, H, W) in [0, 1] -> logits (n, classes). In eval mode, left as it was.
        loader: (x in [0, 1], y) in the same order each time it is iterated (once per attack).
        attacks, eps, step_size, norm, restarts, device, precision, seed, search: as in `evaluate`; an engine
            (`engine.fast`) is kept over calls, and so is what it compiled.
        classes: how many classes there are.
        store: a file, made where it is missing; an altered one is reported by a StoreWarning and ignored. None
            keeps nothing.
        identity: what else the flags belong to, JSON-ready (sha256 of a checkpoint, name and part of a data set).
        ranks: processes that share the work: they take batches in turn, each of which one process judges as it would
            alone, and all have the result. The first reads and writes the store.
        progress: called as progress(attack, images done, images in all) after each batch; the last is None as long
            as it is not known. What it raises stops the run, after the flags are written.
    Returns: {attack: {"settings", "n", "seconds", "correct", "answers", "no_gradient", "accuracy", "per_class",
        "worst_class", "std", "nstd", "worst3", "range", "gini"}}, ready for JSON: "correct" has one character, 0 or 1,
        per image in the loader's order; "answers" the class that the model gives to each one's judged example, a space
        between them: the true class where "correct" is 1, else the one of the largest logit among the others (missing
        where flags of a store of before hold none); "no_gradient" counts the images whose attack began without a
        gradient to follow, "lost" (of AutoAttack) those that each of its parts took; each statistic is {"value", "low",
        "high"} (95 %, see `intervals`), null where there is nothing to measure.
    Raises: TypeError, ValueError, FileNotFoundError naming the argument, before work starts where possible;
        ImportError for "autoattack" without pyautoattack.
    """
    model = inner_model(model)
    wanted = plans(attacks, eps=eps, step_size=step_size, norm=norm, restarts=restarts)
    checks.integer("classes", classes, 2)
    checks.integer("seed", seed, 0)
    checks.choice("precision", precision, engine.JUDGING_PRECISIONS)
    if len(wanted) > 1 and isinstance(loader, Iterator):
        raise TypeError("loader: is an iterator, which can be read once; each attack reads the data anew")
    device = resolve_device(model, device)
    if ranks.rank:
        store = None
    weights = None if store is None else fingerprint_of_model(model)
    shelf = FlagStore(store, {"model": weights, "identity": identity, "classes": classes})
    by = searcher(search, device)
    told = _images_in(loader), "clean" not in wanted, wanted.keys() != {"clean"}
    run = _Run(model, loader, classes, device, precision, seed, by, shelf, progress, ranks, *told)
    return {name: run.attack(plan) for name, plan in wanted.items()}


@dataclass
class _Run:
    """What the attacks of one judgement share."""

    model: nn.Module
    loader: Iterable
    classes: int
    device: torch.device
    precision: str
    seed: int
    search: engine.Engine | None
    shelf: FlagStore
    progress: Progress | None
    ranks: Ranks
    images: int | None  # how many there are, as far as known
    unseen: bool  # nothing else tells whether the model has one answer to all images
    attacked: bool  # by more than clean images
    order: list[str] | None = None  # fingerprints of the batches, after the first attack
    labels: Tensor | None = None
    looked: bool = False  # at the model

    def attack(self, plan: Plan) -> dict:
        settings = plan.settings(self.classes) | {
            "precision": self.precision, "seed": self.seed, "device": self.device.type,
        }  # fmt: skip
        if self.search is not None and plan.name != "clean":  # for which nothing is searched
            settings["search"] = {name: served for name, served in self.search.active.items() if served}
        entry = self.shelf.entry(settings)
        if self.ranks.several:
            entry.update(self.ranks.from_first(entry))
        try:
            found = self._filled(entry["batches"], plan)
        finally:
            self.shelf.save(now=True)
        correct = "".join(batch["correct"] for batch in found)
        told = [batch["answers"] for batch in found if "answers" in batch]  # stores of before have none
        answers = {"answers": " ".join(told)} if len(told) == len(found) else {}
        no_gradient = sum(batch.get("no_gradient", 0) for batch in found)
        tell_no_gradient({plan.name: no_gradient}, len(correct))
        lost = sum((Counter(batch.get("lost", {})) for batch in found), Counter())
        seconds = sum(batch["seconds"] for batch in found)
        return {
            "settings": settings, "n": len(correct), "seconds": seconds, "correct": correct, **answers,
            "no_gradient": no_gradient, **({"lost": dict(lost)} if plan.of_autoattack else {}),
            **as_json(intervals(np.frombuffer(correct.encode(), np.uint8) == ord("1"), self.labels, self.classes)),
        }  # fmt: skip

    def _filled(self, kept: list[dict], plan: Plan) -> list[dict]:
        """Flags of every batch: those kept where they fit, and new ones, which are kept too.

        Noise is by the number of a batch, so that flags are of one batch at one place.
        """
        known = {(batch["at"], batch["data"]): batch for batch in kept}
        found, labels, images = [], [], 0
        with judged(self.model, self.search):
            mine = batches(self.loader, self.device, self.ranks)
            while told := self._turn(mine, plan, known, len(found)):
                for data, y, flags, seconds in told:
                    at = len(found)
                    if flags is not None:
                        known[at, data] = {"at": at, "data": data, "seconds": seconds, **flags}
                        kept.append(known[at, data])
                        self.shelf.save()
                    found.append(known[at, data])
                    labels.append(y)
                    images += len(y)
                    if self.progress is not None:
                        self.progress(plan.name, images, self.images)
        if self.order is not None and len(found) != len(self.order):
            raise _changed()
        self.order, self.labels, self.images = [batch["data"] for batch in found], torch.cat(labels), images
        return found

    def _turn(self, mine: Iterator, plan: Plan, known: Mapping[tuple[int, str], dict], so_far: int) -> list[_Told]:
        """Of the next batches, one of each process, in their order; [] behind the last."""
        told = None
        with Meeting(self.ranks, self.device, what="the judgement of these batches") as meeting:
            if (batch := next(mine, None)) is not None:
                b, x, y = batch
                data, start, found = fingerprint_of_batch(x, y), time.perf_counter(), None
                if self.order is not None and self.order[b : b + 1] != [data]:
                    raise _changed()
                if (b, data) not in known:
                    found = self._flags(x, y, plan, b)
                # together they take as long as one of them
                told = data, y.cpu(), found, (time.perf_counter() - start) / self.ranks.world
            meeting.table([])
        told_by = self.ranks.gather(told)
        check_turns([len(range(r, so_far, len(told_by))) + (told is not None) for r, told in enumerate(told_by)])
        return [told for told in told_by if told is not None]

    def _flags(self, x: Tensor, y: Tensor, plan: Plan, b: int) -> dict[str, Any]:
        if not self.looked:
            engine.first_look(self.model, x, y, judged=self.unseen, attacked=self.attacked)
            self.looked = True
        how = {"seed": self.seed, "precision": self.precision, "search": self.search}
        found = survivors(self.model, x, y, plan, batch=b, **how)
        if found.classes != self.classes:
            raise ValueError(f"classes: got {self.classes}; the model gives logits of {found.classes}")
        flags = {
            "correct": "".join(map(str, found.correct.int().tolist())),
            "answers": " ".join(map(str, found.answers.tolist())),
        }
        flags |= {"no_gradient": found.no_gradient} if found.no_gradient else {}
        return flags | ({"lost": found.lost} if found.lost else {})


def as_json(statistics: dict[str, Interval | list[Interval]]) -> dict:
    """What `intervals` found, ready for JSON: NaN becomes null."""
    return {name: [i.as_json() for i in v] if isinstance(v, list) else v.as_json() for name, v in statistics.items()}


def _changed() -> ValueError:
    return ValueError("loader: gave other batches for the second attack; it must give the same order each time")


def _images_in(loader: Iterable) -> int | None:
    """How many images a loader gives, where it can be known beforehand."""
    if isinstance(loader, (list, tuple)):
        return sum(len(checks.pair("loader", batch)[1]) for batch in loader)
    if isinstance(loader, DataLoader):
        plain = loader.batch_size is not None and not loader.drop_last and hasattr(loader.sampler, "__len__")
        return len(loader.sampler) if plain else None
    rows = getattr(loader, "rows", None)  # data.Batches and its kin
    return rows if isinstance(rows, int) else None
