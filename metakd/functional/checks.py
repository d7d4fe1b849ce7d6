"""What every loss shares: checks of arguments, no autocast inside, weights and reduction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from metakd import eager, reference

# The backends that are modules, whose functions go by the name of the loss; the others are
# operators (``ops.compiled``).
MODULES = {"eager": eager, "reference": reference}

REDUCTIONS = ("mean", "sum", "none")


def require(condition: bool, message: Callable[[], str]) -> None:
    """The message is made where it is needed only: it costs time, and sizes that `torch.compile`
    leaves open cannot be printed."""
    if not condition:
        raise ValueError(message())


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    require(value in choices, lambda: f"{name} must be one of {', '.join(choices)}, got {value!r}")


def is_number(value: object) -> bool:
    """True is a number to Python, and was not meant as one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_integer(name: str, value: int, low: int | None = None, high: int | None = None) -> None:
    """Of Python or NumPy; ``high`` needs a ``low``."""

    def want() -> str:
        if low is None:
            return ""
        return f" of at least {low}" if high is None else f" in {low}..{high}"

    whole = isinstance(value, (int, torch.SymInt, Integral))
    require(
        whole
        and not isinstance(value, bool)
        and (low is None or value >= low)
        and (high is None or value <= high),
        lambda: f"{name} must be an integer{want()}, got {value!r}",
    )


def check_fraction(name: str, value: float) -> None:
    require(
        is_number(value) and 0 <= value <= 1,
        lambda: f"{name} must be in [0, 1], got {value!r}",
    )


def check_positive(name: str, value: float) -> None:
    require(
        is_number(value) and 0 < value < math.inf,
        lambda: f"{name} must be a finite number above 0, got {value!r}",
    )


_KINDS = {
    "floating point": lambda dtype: dtype.is_floating_point,
    "int64": lambda dtype: dtype == torch.int64,
    # Floats are refused as masks, because additive masks mean the opposite.
    "boolean or integer": lambda dtype: not (dtype.is_floating_point or dtype.is_complex),
}


def _listed(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def check_tensor(
    name: str,
    value: Tensor,
    shape: Sequence[int | str],
    device: torch.device | None = None,
    kind: str = "floating point",
) -> None:
    """``shape`` holds a number where the size is known and a letter where it is free."""

    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor {_listed(shape)}, got {type(value).__name__}")
    have = value.shape
    # No `require`: there are two tensors a layer, and its closures took longer than the questions.
    fits = len(have) == len(shape)
    for wanted, size in zip(shape, have):
        if wanted != size and not isinstance(wanted, str):
            fits = False
    if not fits:
        raise ValueError(f"{name} must have shape {_listed(shape)}, got {list(have)}")
    if not _KINDS[kind](value.dtype):
        raise ValueError(f"{name} must be {kind}, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the rest, got {value.device}")


def check_teacher(
    name: str, value: Tensor, shape: Sequence[int | str], device: torch.device | None = None
) -> None:
    check_tensor(name, value, shape, device)
    require(
        not value.requires_grad,
        lambda: (
            f"{name} requires grad (shape {list(value.shape)}): detach it or use torch.no_grad()"
        ),
    )


def as_mask(
    name: str, mask: Tensor | None, shape: Sequence[int], device: torch.device
) -> Tensor | None:
    if mask is None:
        return None
    check_tensor(name, mask, shape, device, "boolean or integer")
    return mask != 0


def leave_out_weightless(
    mask: Tensor | None,
    weight: Tensor | None,
    rows: Sequence[int],
    shape: Sequence[int],
    device: torch.device,
) -> Tensor | None:
    """The mask, of this shape, of what is computed: without rows whose weight is 0, which times a
    loss that is infinite or NaN would not be 0.

    A weight that requires grad keeps them, because a row's loss is the gradient of its weight.
    ``rows`` is the shape of the weight, with which ``shape`` begins.
    """
    if weight is None:
        return mask
    check_tensor("weight", weight, rows, device)
    if weight.requires_grad:
        return mask
    heard = weight != 0
    if len(rows) < len(shape):
        heard = heard[:, None].expand(*shape)
    return heard if mask is None else mask & heard


def check_index(name: str, value: Tensor, rows: int, size: int, device: torch.device) -> None:
    check_tensor(name, value, (rows,), device, "int64")
    if value.device.type == "cpu" and rows:
        low, high = int(value.min()), int(value.max())
        require(
            low >= 0 and high < size,
            lambda: f"{name} must lie in 0..{size - 1}, got {low if low < 0 else high}",
        )


def widest(*tensors: Tensor) -> torch.dtype:
    """The dtype that holds all of them."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


# torch 2.11 cannot trace the question. This is all that `torch.compiler.assume_constant_result`
# does, once it has imported torch's compiler, which takes a second.
vars(_has_autocast)["_dynamo_marked_constant"] = True


def without_autocast(device: torch.device, compute: Callable, *args, **kwargs):
    """``compute`` in the dtypes given."""
    kind = device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return compute(*args, **kwargs)
    with torch.autocast(kind, enabled=False):
        return compute(*args, **kwargs)


def reduce_rows(rows: Tensor, weight: Tensor | None, mask: Tensor | None, reduction: str) -> Tensor:
    """Weighted rows, reduced; ``leave_out_weightless`` has checked the weight. Masked rows are
    replaced by 0, never multiplied by it."""
    check_choice("reduction", reduction, REDUCTIONS)
    if weight is not None:
        rows = rows * weight.to(rows.dtype)
    if mask is not None:
        rows = rows.masked_fill(~mask, 0.0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if mask is None and rows.numel():
        return rows.mean()
    return rows.sum() / count_rows(rows, mask)


def count_rows(rows: Tensor, mask: Tensor | None) -> Tensor | int:
    """What a mean over rows divides by."""
    return max(rows.numel(), 1) if mask is None else mask.sum().clamp(min=1)
