"""Losses on hidden states: squared error, layer by layer and projected, and the mean over
tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from metakd import ops, reference
from metakd.functional.checks import (
    MODULES,
    as_mask,
    check_teacher,
    check_tensor,
    leave_out_weightless,
    reduce_rows,
    require,
    widest,
    without_autocast,
)


def _as_layers(
    name: str, value: Tensor | Sequence[Tensor] | None, count: int
) -> list[Tensor] | None:
    """One parameter per layer; a single tensor is shared by all of them."""
    if value is None:
        return None
    layers = [value] * count if isinstance(value, Tensor) else list(value)
    require(
        len(layers) == count,
        lambda: f"{name} must be one tensor or {count} of them, got {len(layers)}",
    )
    return layers


def hidden_mse(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    projection: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Squared error between hidden states, layer pair by layer pair, the student's optionally
    projected.

    ``rows_b = sum over layers of mean over real tokens i and features j of (H_s W + c -
    H_t)_bij^2``.

    Args:
        student: [B, L, H_s], or a pooled vector [B, H_s], or a list of such (one per layer pair).
        teacher: [B, L, H_t] or [B, H_t], as many as the student's, without grad.
        projection: W, [H_s, H_t]; one tensor for all layers or one per layer. Needed where H_s
            differs from H_t. The product runs in the dtype of the student's states, as a linear
            layer's does.
        bias: c, [H_t]; one for all layers or one per layer.
        mask: [B, L] (pooled: [B]), which tokens count; an example without any is a masked row.
        weight: [B], factor of each example; 0 leaves it out, but for the count of a mean.
        reduction: ``mean`` (over the examples with a real token), ``sum``, or ``none`` (rows, [B]).
        backend: ``auto``, ``reference``, ``eager``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [B], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype or device; a teacher that requires grad.
        UnsupportedError: the backend asked for cannot run here.

    Source: Jiao et al. 2020, *TinyBERT* (arXiv 1909.10351), equations 8 and 9; L_embd, L_hidn and
    L_TKD of Meta-KD.
    """
    layers_s = [student] if isinstance(student, Tensor) else list(student)
    layers_t = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    require(len(layers_s) >= 1, lambda: "student must hold at least one layer, got 0")
    require(
        len(layers_t) == len(layers_s),
        lambda: (
            f"teacher must hold as many layers as the student ({len(layers_s)}), "
            f"got {len(layers_t)}"
        ),
    )
    projections = _as_layers("projection", projection, len(layers_s))
    biases = _as_layers("bias", bias, len(layers_s))

    pooled = isinstance(layers_s[0], Tensor) and layers_s[0].dim() == 2
    check_tensor("student[0]", layers_s[0], ("B", "H_s") if pooled else ("B", "L", "H_s"))
    device, tokens = layers_s[0].device, layers_s[0].shape[:-1]
    for layer, (layer_s, layer_t) in enumerate(zip(layers_s, layers_t)):
        check_tensor(f"student[{layer}]", layer_s, (*tokens, "H_s"), device)
        check_teacher(f"teacher[{layer}]", layer_t, (*tokens, "H_t"), device)
        widths = layer_s.shape[-1], layer_t.shape[-1]
        if projections is not None:
            check_tensor(f"projection[{layer}]", projections[layer], widths, device)
        else:
            require(
                widths[0] == widths[1],
                lambda: (
                    "projection is needed where widths differ, "
                    f"got None and {widths} in layer {layer}"
                ),
            )
        if biases is not None:
            check_tensor(f"bias[{layer}]", biases[layer], widths[1:], device)
    mask = as_mask("mask", mask, tokens, device)
    heard = leave_out_weightless(mask, weight, tokens[:1], tokens, device)
    if pooled:
        layers_s, layers_t = (
            [states[:, None] for states in layers] for layers in (layers_s, layers_t)
        )
        mask, heard = (None if x is None else x[:, None] for x in (mask, heard))

    backend = ops.select("hidden_mse", backend, device, widest(layers_s[0], layers_t[0]))
    rows = without_autocast(
        device, _hidden_rows, backend, layers_s, layers_t, projections, biases, heard
    )
    return reduce_rows(rows, weight, None if mask is None else mask.any(1), reduction)


def _hidden_rows(
    backend: str,
    student: list[Tensor],
    teacher: list[Tensor],
    projections: list[Tensor] | None,
    biases: list[Tensor] | None,
    mask: Tensor | None,
) -> Tensor:
    if projections is not None or biases is not None:
        nothing = [None] * len(student)
        parameters = zip(student, projections or nothing, biases or nothing)
        student = [_projected(*layer, mask) for layer in parameters]
    if backend in MODULES:
        return MODULES[backend].hidden_mse(student, teacher, mask)
    forward = ops.compiled(backend, "hidden_mse_fwd")
    layers = list(zip(student, teacher))
    kinds = [(own.shape, own.dtype, taught.dtype) for own, taught in layers]
    if all(kind == kinds[0] for kind in kinds):  # one launch for all of them
        return forward(student, teacher, mask).sum(0)
    return sum(forward([own], [taught], mask)[0] for own, taught in layers)


def _projected(
    layer: Tensor, projection: Tensor | None, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """``layer @ projection + bias``, as a linear layer in the dtype of ``layer``."""
    if projection is None:
        return layer if bias is None else layer + bias.to(layer.dtype)
    if mask is not None:  # zero times what a masked token holds must stay zero in dW
        layer = layer.masked_fill(~mask[:, :, None], 0.0)
    return functional.linear(
        layer, projection.to(layer.dtype).mT, None if bias is None else bias.to(layer.dtype)
    )


def masked_mean(hidden: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean of the hidden states over real tokens, E(X): ``sum_i mask_i * h_i / sum_i mask_i``.

    Args:
        hidden: [B, L, H].
        mask: [B, L], which tokens count. An example without any gives zeros.
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        [B, H], in the dtype of ``hidden`` (halves are summed in float32).

    Raises:
        ValueError: an argument of wrong shape, dtype or device.
        UnsupportedError: the backend asked for cannot run here.

    Source: Pan et al. 2021, *Meta-KD* (arXiv 2012.01266), section 3.1.
    """
    check_tensor("hidden", hidden, ("B", "L", "H"))
    check_tensor("mask", mask, hidden.shape[:2], hidden.device, "boolean or integer")
    backend = ops.select("masked_mean", backend, hidden.device, hidden.dtype)
    compute = reference.masked_mean
    if backend != "reference":
        compute = ops.compiled(backend, "masked_mean_fwd")
    return without_autocast(hidden.device, compute, hidden, mask != 0)
