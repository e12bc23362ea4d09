"""One look at a model before it is believed: what makes an attack on it blind, or an accuracy of it worthless."""

from __future__ import annotations

from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..common import checks, troubles
from .buffers import Buffers
from .host_reads import BatchGuard, largest_entries, no_gradient
from .modes import attack_mode

ROWS = 16  # looked at
Finding = tuple[str, dict]  # a name in troubles.TROUBLES, and its facts

# how far outputs of one image may differ by rounding, relative to the largest logit of the batch
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TF32 = 5e-3


believed: WeakSet[nn.Module] = WeakSet()  # looked at before they were trained


def look_once(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """first_look at a model that is trained, the first time that it comes."""
    if model not in believed:
        first_look(model, x, y, judged=False)
        believed.add(model)


def first_look(model: nn.Module, x: Tensor, y: Tensor, *, judged: bool = True, attacked: bool = True) -> None:
    """Looks at a few images, and warns of what it finds. Two forwards and one backward; random generators and
    buffers are as before.

    Args:
        model: classifier.  x: (n, ...) in [0, 1].  y: (n,) int64. The first 16 rows are used.
        judged: the model is to be judged by more than these rows do, so that one answer to all of them counts as a
            finding; while it learns it does not, nor where all images tell.
        attacked: attacks follow its gradients; else those are not looked at.
    Raises: TypeError, ValueError where no attack can run at all, or images or labels are bad; NonFiniteError.
    """
    before = Buffers(model)
    try:
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            found = findings(model, x[:ROWS], y[:ROWS], attacked)
    finally:
        before.undo()
    for name, facts in found:
        if name != "one_answer" or judged:
            troubles.warn(name, **facts)


def findings(model: nn.Module, x: Tensor, y: Tensor, attacked: bool = True) -> list[Finding]:
    """What is wrong with a model, as far as these rows tell. Raises as `first_look`."""
    guard = BatchGuard(x, y)
    with attack_mode(model), runnable(model, x):
        point = x.detach().clone().requires_grad_()
        z = model(point)
        checks.model_output(z, len(x))
        guard.logits(z)
        guard.read()
        # y that was made under torch.inference_mode could not be kept for a backward
        gradient = _gradient(z, y.clone(), point) if attacked else None
        with torch.no_grad():
            twice = model(torch.cat([part := x[: (len(x) + 1) // 2], part]))
    z, twice = z.detach().float(), twice.float()
    found = [*_not_logits(z), *_not_repeated(z, twice, _tolerance(model, x))]
    if gradient is not None:
        fooled = z.argmax(1) != y
        bad = no_gradient(largest_entries(gradient))
        finite = gradient.flatten(1).isfinite().all(1)
        rows = {"gradient_not_finite": ~finite, "gradient_zero": bad & finite & ~fooled}
        found += [(name, {"rows": int(k.sum()), "n": len(x)}) for name, k in rows.items() if k.any()]
    answers, most = z.argmax(1).unique(), int(y.unique(return_counts=True)[1].amax())  # images may come class by class
    if len(answers) == 1 and 2 * most <= len(y) and len(x) >= ROWS // 2:
        found.append(("one_answer", {"answer": int(answers), "n": len(x)}))
    return found


@contextmanager
def runnable(model: nn.Module, x: Tensor):
    """A model that fails at once on images of another dtype than its weights says so in our words."""
    try:
        yield
    except RuntimeError as error:
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if not dtypes or x.dtype in dtypes or ("dtype" not in (said := str(error).lower()) and "type" not in said):
            raise
        weights = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        images = str(x.dtype).removeprefix("torch.")
        raise troubles.error("dtype", TypeError, weights=weights, images=images) from error


def _gradient(z: Tensor, y: Tensor, point: Tensor) -> Tensor:
    """Of the cross entropy to the images, in the dtype of the images."""
    gradient = None
    if z.requires_grad:
        loss = nn.functional.cross_entropy(z.float(), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point, allow_unused=True)
    if gradient is None:
        raise troubles.error("no_way_to_the_images")
    return gradient


def _not_logits(z: Tensor) -> list[Finding]:
    if bool((z < 0).any()) or bool((z > 1 + 1e-3).any()):
        return []
    if bool(((z.sum(1) - 1).abs() < 1e-2).all()):
        return [("probabilities", {"n": len(z)})]
    sigmoids = z.numel() >= 40 and bool((z.amax() - z.amin()) > 1e-3) and bool((z > 0).all() or (z > 0.99).any())
    return [("between_0_and_1", {"n": len(z)})] if sigmoids else []


def _not_repeated(z: Tensor, twice: Tensor, tolerance: float) -> list[Finding]:
    """`twice`: logits of the first half of the rows, given two times in one batch."""
    first, second = twice.chunk(2)
    n, limit = len(first), tolerance * float(z.abs().amax().clamp_min(1e-6))

    def differ(a: Tensor, b: Tensor) -> int:
        return int(((a - b).abs().amax(1) > limit).sum())

    if noisy := differ(first, second):
        return [("random_output", {"rows": noisy, "n": n})]
    if coupled := differ(z[:n], first):
        return [("output_depends_on_batch", {"rows": coupled, "n": n})]
    return []


def _tolerance(model: nn.Module, x: Tensor) -> float:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | {x.dtype}
    if torch.is_autocast_enabled(x.device.type):
        dtypes.add(torch.get_autocast_dtype(x.device.type))
    tf32 = _TF32 if x.device.type == "cuda" else 0.0
    return max(tf32, *(_ROUNDING.get(d, _ROUNDING[torch.float16]) for d in dtypes))
