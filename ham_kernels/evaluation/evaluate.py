"""What a model is worth, class by class: clean accuracy and accuracy under attack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..common import checks, troubles
from ..distributed import ALONE, Meeting, Ranks, forwards_meet, inner_model, ranks_of
from .class_accuracy import ClassAccuracy, summary
from .named_attacks import Plan, batches, judged, plans, resolve_device, searcher, survivors

__all__ = ["ClassAccuracy", "evaluate"]


def evaluate(
    model: nn.Module, loader: Iterable, attacks: Sequence[str] = ("clean", "pgd20"), *, eps: float = 8 / 255,
    step_size: float = 2 / 255, norm: str = "linf", device: torch.device | str | None = None,
    precision: str = "fp32", seed: int = 0, restarts: int = 1, search: str = "plain", group: Any = "auto",
) -> dict[str, ClassAccuracy]:  # fmt: skip
    """Accuracy of a model over a data set, for each attack. The model is in eval mode and left as it was.

    Args:
        model: classifier, images (n, C, H, W) in [0, 1] -> logits (n, classes); also in DistributedDataParallel.
        loader: any iterable of (x in [0, 1], y).
        attacks: "clean"; "fgsm", one step of eps from the image itself; "pgdK" for K steps of PGD on the cross
            entropy from a random start ("pgd20"), "cwK" for the same on the margin loss; "autoattack", the standard
            version (arXiv 2003.01690) by pyautoattack; "apgd", its parts APGD-CE and APGD-T alone, an upper bound;
            "odiR", R restarts of PGD on the margin from random directions of the logits (see evaluation/odi.py).
            With 3 classes APGD-DLR stands for APGD-T, with 2 it is left out: that loss compares logits of more. Of
            PGD every image gets all K steps and is judged at the last point.
        eps, step_size, norm: of the attacks, in units of the images. AutoAttack chooses its own steps.
        device: where to run; None takes the model's.
        precision: of the model that is judged: "fp32", or "bf16" or "fp16" (autocast); AutoAttack takes no fp16.
        seed: of the random starts; batch b draws the same noise in every call.
        restarts: random starts of "pgdK" and "cwK"; an image is lost when any of them turns it.
        search: on what attacks look for examples: "plain", the model as it is; "fast", rounded to bf16, channels_last,
            compiled, with Winograd's convolutions or CUDA graphs, as far as the device has them. Each example is
            judged by the plain model in either case. It compiles first.
        group: processes that share the work, as in `Trainer`: whole batches in turn, of a loader that gives all images
            on each, so that each image counts once and as it does in one process.
    Returns: {attack: ClassAccuracy}; `no_gradient` counts the images that an attack could not work on.
    Warns: HamWarning where the model is not what attacks rely on (see docs/troubleshooting.md).
    Raises: TypeError, ValueError naming the argument; ImportError for "autoattack" without pyautoattack.
    """
    ranks, model = ranks_of(group), inner_model(model)
    if ranks.several and forwards_meet(model):
        raise ValueError(
            "group: FSDP gathers weights in each forward, and processes that judge batches in turn have not as many; "
            "give group=None, and the same images on each process"
        )
    wanted = plans(attacks, eps=eps, step_size=step_size, norm=norm, restarts=restarts)
    autoattack = any(plan.of_autoattack for plan in wanted.values())  # whose losses would vanish in fp16
    checks.choice("precision", precision, engine.JUDGING_PRECISIONS if autoattack else engine.PRECISIONS)
    checks.integer("seed", seed, 0)
    device = resolve_device(model, device)
    by = searcher(search, device)
    how = {"device": device, "precision": precision, "seed": seed, "look": True, "search": by}
    found = accuracies(model, loader, wanted, **how, ranks=ranks)
    tell_no_gradient({name: a.no_gradient for name, a in found.items()}, next(iter(found.values())).n)
    if "clean" in found and (answer := found["clean"].one_class) is not None:
        troubles.warn("one_answer", answer=answer, n=found["clean"].n)
    return found


def accuracies(
    model: nn.Module, loader: Iterable, wanted: Mapping[str, Plan], *, device: torch.device, precision: str, seed: int,
    look: bool = False, search: engine.Engine | None = None, ranks: Ranks = ALONE,
) -> dict[str, ClassAccuracy]:  # fmt: skip
    """`evaluate` of a model that has been looked at, or is now (`look`). Process r judges every batch b % world = r."""
    mine: list[Tensor] = []  # of each batch (2 + attacks, n): labels, flags, answers to clean images
    no_gradient, classes = [0] * len(wanted), 0
    with Meeting(ranks, device, what="the judgement") as meeting:
        with judged(model, search):
            for b, x, y in batches(loader, device, ranks):
                if look and not mine:
                    engine.first_look(model, x, y, judged="clean" not in wanted, attacked=wanted.keys() != {"clean"})
                rows, answers = [y], torch.zeros_like(y)
                for i, plan in enumerate(wanted.values()):
                    found = survivors(model, x, y, plan, seed=seed, batch=b, precision=precision, search=search)
                    rows.append(found.correct)
                    no_gradient[i] += found.no_gradient
                    classes = found.classes
                    answers = found.answers if plan.name == "clean" else answers
                mine.append(torch.stack([row.long() for row in (*rows, answers)]))
        heard = meeting.table([classes, len(mine)])
    check_turns([int(n) for _, n in heard])
    classes = int(max(k for k, _ in heard))
    told = ranks.gather(([t.cpu() for t in mine], no_gradient))
    in_turn = (t for turn in zip_longest(*(tables for tables, _ in told)) for t in turn if t is not None)
    y, *correct, answers = torch.cat(list(in_turn), 1)
    blind = [sum(counts) for counts in zip(*(counts for _, counts in told), strict=True)]
    return {
        name: summary(correct[i] > 0, y, classes, blind[i], answers if name == "clean" else None)
        for i, name in enumerate(wanted)
    }


def check_turns(batches_of: list[int]) -> None:
    """Raises: ValueError where loaders gave the processes other numbers of batches than turns of the same ones."""
    total, world = sum(batches_of), len(batches_of)
    if batches_of != [len(range(rank, total, world)) for rank in range(world)]:
        raise ValueError(
            f"loader: had {batches_of} batches for the processes to take in turn; it must give the same on each"
        )


def tell_no_gradient(rows: Mapping[str, int], n: int) -> None:
    """One warning for all attacks."""
    if blind := [name for name, k in rows.items() if k]:
        most = max(rows.values())
        troubles.warn("attack_without_gradient", attack=", ".join(blind), rows=most, n=n)
