"""Bad input gets an error here, before any kernel: it names the argument, the value, and what is allowed.

What depends on data on a GPU (pixel range, NaN, label range) is not read here, since reading it would stall the
GPU; `engine.BatchGuard` gathers it and `data_facts` below judges it with the one read that a step makes anyway.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST = torch.finfo(torch.float32).max


# ---------------------------------------------------------------- numbers
def real(name: str, value, low: float = 0.0, high: float = math.inf) -> float:
    """A finite float in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {_show(value)}; it must be a number")
    value = float(value)
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name}: got {value}; it must be finite and {_range(low, high)}")
    return value


def integer(name: str, value, low: int, high: int | None = None) -> int:
    """An int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {_show(value)}; it must be an integer")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: got {value}; it must be {_range(low, high)}")
    return int(value)


def flag(name: str, value) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {_show(value)}; it must be True or False")
    return value


def choice(name: str, value, allowed: tuple) -> str:
    """One of a few words (or of True and False)."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(map(repr, allowed))}")
    return value


def screening(steps, screen_steps) -> None:
    """K >= 1 steps in all, of which 1 <= M < K screen."""
    integer("steps", steps, 1)
    integer("screen_steps", screen_steps, 1)
    if screen_steps >= steps:
        raise ValueError(
            f"screen_steps: got {screen_steps} with steps={steps}; it must be less than steps, "
            "or no attack is left for the hard examples"
        )


def limits(lo, hi) -> None:
    """The range of valid pixels."""
    if real("lo", lo, -math.inf) >= real("hi", hi, -math.inf):
        raise ValueError(f"lo: got {lo} with hi={hi}; it must be less than hi")


def norm(value) -> bool:
    """True for "l2", False for "linf"."""
    return choice("norm", value, ("linf", "l2")) == "l2"


def per_row(name: str, value, x: Tensor) -> tuple[float, Tensor | None]:
    """eps or step_size: (float, None) for a number, (0.0, fp32 tensor (n,)) for one value per row of x."""
    if not isinstance(value, Tensor):
        return min(real(name, value), _LARGEST), None  # the ops reckon in fp32, where a larger one is infinite
    if value.shape != (x.shape[0],):
        raise ValueError(
            f"{name}: got a tensor of shape {tuple(value.shape)}; it must be a number or one value "
            f"per row, shape ({x.shape[0]},)"
        )
    if not value.is_floating_point():
        raise TypeError(f"{name}: got a tensor of {value.dtype}; it must be floating point")
    _on_device_of(name, value, "x", x)
    value = value.detach().to(torch.float32).contiguous()
    if _readable(value) and value.numel() and not bool((value.isfinite() & (value >= 0)).all()):
        raise ValueError(f"{name}: got values from {value.min():g} to {value.max():g}; each must be finite and >= 0")
    return 0.0, value


def class_values(name: str, values) -> Tensor:
    """(classes,) fp32 on the CPU, from finite numbers >= 0, one per class."""
    try:
        found = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {_show(values)}; it must be one number per class") from error
    if found.dim() != 1 or not len(found) or not bool((found.isfinite() & (found >= 0)).all()):
        raise ValueError(f"{name}: got {_show(values)}; it must be one number per class, each finite and >= 0")
    return found


# ---------------------------------------------------------------- tensors, as far as no data is read
def tensor(name: str, value) -> Tensor:
    """A tensor on a CPU or a CUDA GPU."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {_show(value)}; it must be a torch.Tensor")
    if value.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: is on device {value.device}; it must be on a CPU or a CUDA GPU")
    return value


def images(name: str, x) -> None:
    """A batch of images of floating point; their range is data and judged elsewhere."""
    tensor(name, x)
    if x.dtype not in IMAGE_DTYPES:
        hint = "; divide by 255 first" if x.dtype == torch.uint8 else ""
        raise TypeError(f"{name}: got {x.dtype}; images must be float32, float16 or bfloat16 in [0, 1]{hint}")
    if x.dim() < 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; it must be (n, channels, height, width)")


def same(name: str, t, other_name: str, other: Tensor) -> None:
    """Shape, dtype and device as another tensor's."""
    tensor(name, t)
    if t.shape != other.shape:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}; it must be that of {other_name}, {tuple(other.shape)}")
    if t.dtype != other.dtype:
        raise TypeError(f"{name}: got {t.dtype}; it must be that of {other_name}, {other.dtype}")
    _on_device_of(name, t, other_name, other)


def own_memory(name: str, t: Tensor) -> None:
    """A tensor that is written in place: each element has a place of its own, as in slices and transposes of one."""
    reach, strides = 0, t.stride()  # reach: of the dimensions so far, from the smallest stride on
    for dim in sorted(range(t.dim()), key=lambda dim: strides[dim]):  # torch 2.10 compiles no sort of tuples
        stride, size = strides[dim], t.shape[dim]
        if size > 1 and t.numel() and stride <= reach:
            raise ValueError(
                f"{name}: has strides {strides} for shape {tuple(t.shape)}, so that elements share memory, but it "
                "is written in place; give it memory of its own (.clone() or .contiguous())"
            )
        reach += (size - 1) * stride


def step_gradient(grad, x: Tensor, index, count) -> None:
    """grad, index and count of a PGD step; on a GPU the entries of index and count are not read."""
    tensor("grad", grad)
    if grad.dtype not in IMAGE_DTYPES:
        raise TypeError(f"grad: got {grad.dtype}; it must be float32, float16 or bfloat16")
    _on_device_of("grad", grad, "x", x)
    rows = x.shape[0] if index is None else grad.shape[0]
    if grad.shape != (rows, *x.shape[1:]):
        raise ValueError(f"grad: got shape {tuple(grad.shape)}; it must be {(rows, *x.shape[1:])}")
    for name, t, shape in (("index", index, None), ("count", count, (1,))):
        if t is None:
            continue
        tensor(name, t)
        if t.dtype != torch.int32:
            raise TypeError(f"{name}: got {t.dtype}; it must be int32")
        if t.dim() != 1 or (shape and t.shape != shape) or not t.is_contiguous():
            wanted = shape or "(k,) and contiguous"
            raise ValueError(f"{name}: got shape {tuple(t.shape)}; it must be {wanted}")
        _on_device_of(name, t, "x", x)
    if index is not None and grad.shape[0] > index.shape[0]:
        raise ValueError(f"grad: has {grad.shape[0]} rows but index only {index.shape[0]} entries")
    if not _readable(x):
        return
    if count is not None and not 0 <= int(count) <= grad.shape[0]:
        raise ValueError(f"count: got {int(count)}; it must be in 0..{grad.shape[0]}, the rows of grad")
    if index is not None:
        used = index[: grad.shape[0] if count is None else int(count)]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= x.shape[0]):
            raise ValueError(
                f"index: names rows {int(used.min())} to {int(used.max())}; it must stay in 0..{x.shape[0] - 1}"
            )
        row, times = used.unique(return_counts=True)
        if row.numel() < used.numel():
            raise ValueError(
                f"index: names row {int(row[times.argmax()])} {int(times.max())} times; each row may be named once, "
                "since it is written in place"
            )


def labels(y, x: Tensor, x_name: str = "x") -> None:
    """One int64 label per row of x; the range of the labels is data and judged elsewhere."""
    tensor("y", y)
    if y.dim() == 2 and y.is_floating_point():
        raise TypeError(
            f"y: got soft labels, {y.dtype} {tuple(y.shape)}, as mixup and CutMix make them; an attack turns a row "
            "away from one class, which is hard or easy by it: give class numbers (int64), and perhaps label_smoothing"
        )
    if y.dtype != torch.int64:
        raise TypeError(f"y: got {y.dtype}; labels must be int64 class numbers")
    if y.shape != (x.shape[0],):
        raise ValueError(f"y: got shape {tuple(y.shape)}; it must be ({x.shape[0]},), one label per row of {x_name}")
    _on_device_of("y", y, x_name, x)


def logits(name: str, z) -> None:
    """(n, classes) with at least two classes."""
    tensor(name, z)
    if z.dtype not in IMAGE_DTYPES:
        raise TypeError(f"{name}: got {z.dtype}; it must be float32, float16 or bfloat16")
    if z.dim() != 2 or z.shape[1] < 2:
        raise ValueError(f"{name}: got shape {tuple(z.shape)}; it must be (n, classes) with classes >= 2")


def vector(name: str, t, n: int, other: Tensor) -> None:
    """A floating-point vector of n entries on the device of another tensor."""
    tensor(name, t)
    if not t.is_floating_point():
        raise TypeError(f"{name}: got {t.dtype}; it must be floating point")
    if t.shape != (n,):
        raise ValueError(f"{name}: got shape {tuple(t.shape)}; it must be ({n},)")
    _on_device_of(name, t, "logits", other)


def max_step(t, n: int, other: Tensor) -> None:
    """(n,) maximum adversarial step sizes, >= 0; on a GPU they are not read."""
    vector("max_step", t, n, other)
    if _readable(t) and not bool((t >= 0).all()):
        low = "NaN" if bool(t.isnan().any()) else f"{float(t.min()):g}"
        raise ValueError(f"max_step: holds {low}; step sizes must be >= 0 (a NaN comes from a model's NaN logits)")


def row_flags(name: str, flags, x: Tensor) -> None:
    """One bool per row of x."""
    tensor(name, flags)
    if flags.dtype != torch.bool:
        raise TypeError(f"{name}: got {flags.dtype}; it must be bool")
    if flags.shape != (x.shape[0],):
        raise ValueError(f"{name}: got shape {tuple(flags.shape)}; it must be ({x.shape[0]},), one flag per row")
    _on_device_of(name, flags, "x_adv", x)


def batch(x, y, *, empty: bool = False) -> None:
    """Images and labels of one batch; `empty`: it may have no row, as other processes have some."""
    images("x", x)
    if x.shape[0] == 0 and not empty:
        raise ValueError(f"x: got shape {tuple(x.shape)}; an empty batch cannot be attacked or trained on")
    labels(y, x)


def pair(name: str, given, *, empty: bool = False) -> tuple[Tensor, Tensor]:
    """(x, y) of what a loader gave, see `batch`. Raises: TypeError, ValueError naming the loader, x or y."""
    if not (isinstance(given, (tuple, list)) and len(given) == 2):
        kind = type(given).__name__ + (f" of {len(given)}" if isinstance(given, (tuple, list, dict)) else "")
        raise TypeError(
            f"{name}: gave a {kind}; each batch must be a pair (x, y), as [(b['image'], b['label']) for b in loader] "
            "makes them of dicts"
        )
    x, y = given
    batch(x, y, empty=empty)
    return x, y


def model_output(z, rows: int) -> None:
    """What a classifier returned for `rows` images."""
    if not isinstance(z, Tensor):
        raise TypeError(f"model: returned {_show(z)}; it must return one tensor of logits (n, classes)")
    if z.dim() != 2 or z.shape[0] != rows or z.shape[1] < 2:
        raise ValueError(
            f"model: returned shape {tuple(z.shape)} for {rows} images; it must be ({rows}, classes) with classes >= 2"
        )
    if z.dtype not in IMAGE_DTYPES:
        raise TypeError(f"model: returned {z.dtype}; logits must be float32, float16 or bfloat16")


# ---------------------------------------------------------------- data, judged on the host
def label_range(y: Tensor, classes: int) -> None:
    """Labels on the CPU lie in 0..classes-1 (labels on a GPU are judged with `data_facts`)."""
    if _readable(y) and y.numel():
        data_facts(0.0, 0.0, float(y.min()), float(y.max()), classes)


def data_facts(x_min: float, x_max: float, y_min: float, y_max: float, classes: int | None) -> None:
    """Judges the extremes of a batch: pixels in [0, 1] without NaN, labels in 0..classes-1."""
    if math.isnan(x_min) or math.isnan(x_max):
        raise ValueError("x: holds NaN; images must be finite and in [0, 1]")
    if x_min < 0.0 or x_max > 1.0:
        rounding = x_min > -1e-3 and x_max < 1 + 1e-3
        raise ValueError(
            f"x: pixels run from {x_min:.9g} to {x_max:.9g}; images must be in [0, 1] "
            + ("(rounding? x.clamp(0, 1))" if rounding else "(normalisation belongs inside the model)")
        )
    if y_min < 0 or (classes is not None and y_max >= classes):
        top = "classes-1" if classes is None else classes - 1
        raise ValueError(f"y: labels run from {int(y_min)} to {int(y_max)}; the model knows classes 0..{top}")


def _readable(t: Tensor) -> bool:
    """Whether data may decide: not on a GPU, where it would cost a sync, nor while torch.compile traces."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _on_device_of(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.device != other.device:
        raise ValueError(f"{name}: is on device {t.device}; it must be on that of {other_name}, {other.device}")


def _range(low, high) -> str:
    if high is None or high == math.inf:
        return "any number" if low == -math.inf else f">= {low}"
    return f"in [{low}, {high}]"


def _show(value) -> str:
    text = repr(value)
    return f"{type(value).__name__}" if len(text) > 40 else f"{text} ({type(value).__name__})"


# ---------------------------------------------------------------- states
def module(name: str, value) -> None:
    """A torch.nn.Module, whose mode and parameters can be seen; a function around one hides them."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: got {type(value).__name__}; it must be a torch.nn.Module")


def state_fits(name: str, model: nn.Module, state: dict[str, Tensor]) -> None:
    """A state dict of this model's architecture."""
    own, other = (
        {k: tuple(v.shape) if isinstance(v, Tensor) else "a state of its own" for k, v in of.items()}
        for of in (model.state_dict(), state)
    )  # get_extra_state may give anything
    wrong = sorted(k for k in own.keys() | other.keys() if own.get(k) != other.get(k))
    if wrong:
        k = wrong[0]
        raise ValueError(
            f"state: {name} has another architecture than this trainer's ({len(wrong)} entries differ, the first is "
            f"{k}: {other.get(k, 'missing')} for {own.get(k, 'none')})"
        )
