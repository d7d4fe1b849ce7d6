"""The door: one documented function per loss. It checks, picks a backend, and reduces.

Every loss is computed as **rows** (one value per token or example) before anything else happens to
it; weights, masks and the reduction are ordinary PyTorch above the rows, so that a weight per
example reaches every term. Common to all:

- ``student`` and ``teacher`` may differ in floating dtype. Half precision is computed in float32,
  doubles stay double; autocast has no say inside. A teacher that requires grad is refused.
- Masks are boolean or integer, True or non-zero = real. A masked row or token has exactly zero
  effect, whatever it holds. A NaN in a real one gives NaN.
- ``reduction="mean"`` divides the sum of weighted rows by the **number of rows that are not
  masked** (at least 1), not by the sum of the weights. An example without a single real token is a
  masked row. No rows at all give 0.0.
- ``backend``: ``auto`` may choose; an explicit name runs as asked or raises ``UnsupportedError``
  with the reason.
- Nothing synchronises with the host: indices out of range raise for CPU tensors only, where looking
  is free.

Imports torch, ``metakd.ops``, ``metakd.soft`` and ``metakd.reference``. Sizes: N rows, C classes, B
batch, L length, H hidden size, A heads, D head size, K domains, M classes of the task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metakd import ops, reference, soft

Pair = tuple[Tensor, Tensor]  # (query, key)

REDUCTIONS = ("mean", "sum", "none")

_BACKENDS = {"reference": reference}


# Checks and reduction shared by the losses


def _require(condition: bool, message: Callable[[], str]) -> None:
    """The message is made where it is needed only: it costs time, and sizes that `torch.compile`
    leaves open cannot be printed."""
    if not condition:
        raise ValueError(message())


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    _require(value in choices, lambda: f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_fraction(name: str, value: float) -> None:
    _require(
        isinstance(value, (int, float)) and 0 <= value <= 1,
        lambda: f"{name} must be in [0, 1], got {value!r}",
    )


def _check_positive(name: str, value: float) -> None:
    _require(
        isinstance(value, (int, float)) and 0 < value < math.inf,
        lambda: f"{name} must be a finite number above 0, got {value!r}",
    )


_KINDS = {
    "floating point": lambda dtype: dtype.is_floating_point,
    "int64": lambda dtype: dtype == torch.int64,
    # Floats are refused as masks, because additive masks mean the opposite.
    "boolean or integer": lambda dtype: not (dtype.is_floating_point or dtype.is_complex),
}


def _check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    device: torch.device | None = None,
    kind: str = "floating point",
) -> None:
    """``shape`` holds a number where the size is known and a letter where it is free."""

    def want() -> str:
        return f"[{', '.join(map(str, shape))}]"

    _require(
        isinstance(value, Tensor),
        lambda: f"{name} must be a tensor {want()}, got {type(value).__name__}",
    )
    fits = all(isinstance(size, str) or size == have for size, have in zip(shape, value.shape))
    _require(
        value.dim() == len(shape) and fits,
        lambda: f"{name} must have shape {want()}, got {list(value.shape)}",
    )
    _require(_KINDS[kind](value.dtype), lambda: f"{name} must be {kind}, got {value.dtype}")
    _require(
        device is None or value.device == device,
        lambda: f"{name} must be on {device} like the rest, got {value.device}",
    )


def _check_teacher(
    name: str, value: object, shape: Sequence[int | str], device: torch.device | None = None
) -> None:
    _check_tensor(name, value, shape, device)
    _require(
        not value.requires_grad,
        lambda: (
            f"{name} requires grad (shape {list(value.shape)}): detach it or use torch.no_grad()"
        ),
    )


def _as_mask(
    name: str, mask: Tensor | None, shape: Sequence[int], device: torch.device
) -> Tensor | None:
    if mask is None:
        return None
    _check_tensor(name, mask, shape, device, "boolean or integer")
    return mask != 0


def _check_index(name: str, value: Tensor, rows: int, size: int, device: torch.device) -> None:
    _check_tensor(name, value, (rows,), device, "int64")
    if value.device.type == "cpu" and rows:
        low, high = int(value.min()), int(value.max())
        _require(
            low >= 0 and high < size,
            lambda: f"{name} must lie in 0..{size - 1}, got {low if low < 0 else high}",
        )


def _without_autocast(device: torch.device, compute: Callable, *args, **kwargs):
    """``compute`` in the dtypes given."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return compute(*args, **kwargs)
    with torch.autocast(kind, enabled=False):
        return compute(*args, **kwargs)


def _call(op: str, backend: str, device: torch.device, *args, **kwargs):
    """Run ``op`` on the backend chosen for ``device``."""
    compute = getattr(_BACKENDS[ops.select(op, backend, device)], op)
    return _without_autocast(device, compute, *args, **kwargs)


def _reduce(rows: Tensor, weight: Tensor | None, mask: Tensor | None, reduction: str) -> Tensor:
    """Weighted rows, reduced. Masked rows are replaced by 0, never multiplied by it."""
    _check_choice("reduction", reduction, REDUCTIONS)
    if weight is not None:
        _check_tensor("weight", weight, rows.shape, rows.device)
        rows = rows * weight.to(rows.dtype)
    if mask is not None:
        rows = rows.masked_fill(~mask, 0.0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if mask is None and rows.numel():
        return rows.mean()
    return rows.sum() / _count(rows, mask)


def _count(rows: Tensor, mask: Tensor | None) -> Tensor | int:
    """What a mean over rows divides by."""
    return max(rows.numel(), 1) if mask is None else mask.sum().clamp(min=1)


# Logits


def _soft_problem(
    tokens: torch.Size,
    widths: tuple[int, int],
    device: torch.device,
    *,
    beta: float,
    temperature: float,
    scale_by_temperature: bool,
    label: Tensor | None,
    hard_weight: float,
    ignore_index: int,
    vocab_size: int | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, soft.Settings]:
    """Checks what the logit losses share; gives the mask [...] with ignored labels in it, the
    labels [...] and the settings."""
    _check_positive("temperature", temperature)
    _check_fraction("beta", beta)
    if vocab_size is None:
        vocab_size = widths[0]
        _require(
            widths[0] == widths[1],
            lambda: (
                f"vocab_size is needed where student and teacher differ in classes, got {widths}"
            ),
        )
    _require(
        1 <= vocab_size <= min(widths),
        lambda: f"vocab_size must be in 1..{min(widths)}, got {vocab_size!r}",
    )
    mask = _as_mask("mask", mask, tokens, device)
    if label is not None:
        _require(
            isinstance(hard_weight, (int, float)) and 0 <= hard_weight < math.inf,
            lambda: f"hard_weight must be a finite number of at least 0, got {hard_weight!r}",
        )
        _check_tensor("label", label, tokens, device, "int64")
        counted = label != ignore_index
        mask = counted if mask is None else mask & counted
        if device.type == "cpu" and not torch.compiler.is_compiling():
            _check_index("label", label[mask], int(mask.sum()), vocab_size, device)
    scale = float(temperature) ** 2 if scale_by_temperature else 1.0
    return (
        mask,
        label,
        soft.Settings(vocab_size, float(temperature), scale, float(beta), hard_weight),
    )


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flatten()


def _soft(
    op: str,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    reduction: str,
    backend: str,
    **options,
) -> Tensor:
    _require(
        isinstance(student, Tensor) and student.dim() >= 2 and student.shape[-1] >= 1,
        lambda: (
            f"student must be a tensor [..., C], C >= 1, got {getattr(student, 'shape', student)!r}"
        ),
    )
    _check_tensor("student", student, student.shape)
    tokens, device = student.shape[:-1], student.device
    _check_teacher("teacher", teacher, (*tokens, "C"), device)
    widths = student.shape[-1], teacher.shape[-1]
    mask, label, settings = _soft_problem(tokens, widths, device, **options)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    rows = _without_autocast(
        device,
        soft.rows,
        ops.select(op, backend, device, dtype),
        student.flatten(0, -2),
        teacher.flatten(0, -2),
        _flat(mask),
        _flat(label),
        settings,
    )
    if len(tokens) > 1:
        rows = rows.unflatten(0, tokens)
    return _reduce(rows, weight, mask, reduction)


def soft_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    label: Tensor | None = None,
    hard_weight: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Forward KL divergence of the student from the teacher, from logits, and the cross-entropy of
    hard labels in the same pass if there are any.

    ``rows = T^2 * sum_c p_c * (log p_c - log q_c) + hard_weight * CE``, with ``p = softmax(teacher
    / T)``, ``q = softmax(student / T)`` and ``CE = -log softmax(student)_label`` (temperature 1;
    only with ``label``). The gradient of the first part is that of the soft cross-entropy, from
    which it differs by the teacher's entropy. A class whose logit is ``-inf`` on both sides counts
    0, the exact limit.

    Args:
        student: logits, [..., C].
        teacher: logits, [..., C], without grad.
        temperature: T, above 0.
        scale_by_temperature: multiply by T^2, so that gradients keep their size as T grows.
        label: int64 [...], in 0..C-1 or ``ignore_index``.
        hard_weight: factor of the cross-entropy; at 0 the labels only say which rows to ignore.
        ignore_index: a row with this label is a masked row, for both parts.
        vocab_size: use the first so many classes of both, where a vocabulary is padded (the two
            may then differ in C); None: all, and C must agree.
        mask: [...], which rows count.
        weight: [...], factor of each row.
        reduction: ``mean`` (over the unmasked rows), ``sum``, or ``none`` (rows, [...]).
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [...], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad.
        UnsupportedError: the backend asked for cannot run here.

    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2; L_pred of Meta-KD.
    """
    return _soft(
        "soft_kl",
        student,
        teacher,
        weight,
        reduction,
        backend,
        beta=0.0,
        temperature=temperature,
        scale_by_temperature=scale_by_temperature,
        label=label,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        mask=mask,
    )


def soft_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    label: Tensor | None = None,
    hard_weight: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Reverse KL divergence: ``rows = T^2 * sum_c q_c * (log q_c - log p_c) + hard_weight * CE``, p
    the teacher, q the student.

    Arguments, result and errors are those of ``soft_kl``.

    Source: Gu, Dong, Wei, Huang 2024, *MiniLLM* (arXiv 2306.08543), equation 1, on given logits.
    """
    return _soft(
        "soft_reverse_kl",
        student,
        teacher,
        weight,
        reduction,
        backend,
        beta=1.0,
        temperature=temperature,
        scale_by_temperature=scale_by_temperature,
        label=label,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        mask=mask,
    )


def soft_jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    label: Tensor | None = None,
    hard_weight: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Generalised Jensen-Shannon divergence between teacher p and student q.

    ``rows = T^2 * (beta * KL(p || m) + (1 - beta) * KL(q || m)) + hard_weight * CE`` with ``m =
    beta * p + (1 - beta) * q``. Divided by beta it tends to ``soft_kl`` as beta goes to 0, divided
    by 1 - beta to ``soft_reverse_kl`` as beta goes to 1; at exactly 0 and 1, where the formula
    itself vanishes, those limits are returned.

    Args:
        beta: weight of the teacher in the mixture, in [0, 1]. The other arguments, the result and
            the errors are those of ``soft_kl``.

    Source: Agarwal et al. 2024, *On-Policy Distillation of Language Models* (arXiv 2306.13649),
    equation 1.
    """
    return _soft(
        "soft_jsd",
        student,
        teacher,
        weight,
        reduction,
        backend,
        beta=beta,
        temperature=temperature,
        scale_by_temperature=scale_by_temperature,
        label=label,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        mask=mask,
    )


def linear_soft_kl(
    student: Tensor,
    head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    label: Tensor | None = None,
    hard_weight: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    chunk_bytes: int = 1 << 28,
    backend: str = "auto",
) -> Tensor:
    """``soft_kl``, ``soft_reverse_kl`` or ``soft_jsd`` of a language model's head, without ever
    holding the logits of all tokens.

    The same value and gradients as ``soft_kl(student @ head.T + bias, teacher @ teacher_head.T +
    teacher_bias)``. Under ``mean`` and ``sum`` the gradients are computed on the way forward (8 N C
    H flops at equal widths and no logits twice); with ``none`` the backward repeats the products of
    the forward pass. Products run in the dtype of the hidden states, the gradients of head and bias
    are summed over chunks in float32. Differentiable once. ``weight`` gets no gradient.

    Args:
        student: hidden states, [..., H_s].
        head: [C, H_s] (``lm_head.weight``; under ZeRO-3 the gathered weight).
        teacher: hidden states [..., H_t], or with ``teacher_head=None`` its logits or
            log-probabilities [..., C]; without grad.
        teacher_head: [C, H_t], without grad.
        bias: [C], of the student's head.
        teacher_bias: [C], without grad; only with ``teacher_head``.
        divergence: ``kl``, ``reverse_kl`` or ``jsd``.
        beta: weight of the teacher in the mixture of ``jsd``, in [0, 1].
        chunk_bytes: bound on the logits of both models that are held at a time (at least one token
            is). The sum of the head's gradient (C * H_s float32) and, with
            ``backend="reference"``, several copies of a chunk come on top.
        temperature, scale_by_temperature, label, hard_weight, ignore_index, vocab_size, mask,
            weight, reduction, backend: as for ``soft_kl``.

    Returns:
        The reduced loss, or rows [...], float32 (float64 for doubles).

    Raises:
        ValueError: as for ``soft_kl``.
        UnsupportedError: the backend asked for cannot run here.

    Source: as for the three divergences; chunks of tokens as in Hsu et al. 2024, *Liger Kernel*
    (arXiv 2410.10989), section 3.2.
    """
    _check_choice("divergence", divergence, ("kl", "reverse_kl", "jsd"))
    _check_choice("reduction", reduction, REDUCTIONS)
    _require(
        isinstance(student, Tensor) and student.dim() >= 2,
        lambda: f"student must be a tensor [..., H_s], got {getattr(student, 'shape', student)!r}",
    )
    _check_tensor("student", student, student.shape)
    tokens, device = student.shape[:-1], student.device
    _check_tensor("head", head, ("C", student.shape[-1]), device)
    _check_teacher("teacher", teacher, (*tokens, "C" if teacher_head is None else "H_t"), device)
    classes_t = teacher.shape[-1]
    if teacher_head is not None:
        _check_teacher("teacher_head", teacher_head, ("C", teacher.shape[-1]), device)
        classes_t = len(teacher_head)
    if bias is not None:
        _check_tensor("bias", bias, (len(head),), device)
    if teacher_bias is not None:
        _require(teacher_head is not None, lambda: "teacher_bias needs a teacher_head, got None")
        _check_teacher("teacher_bias", teacher_bias, (classes_t,), device)
    _require(
        isinstance(chunk_bytes, int) and chunk_bytes >= 1,
        lambda: f"chunk_bytes must be an integer of at least 1, got {chunk_bytes!r}",
    )
    mask, label, settings = _soft_problem(
        tokens,
        (len(head), classes_t),
        device,
        beta={"kl": 0.0, "reverse_kl": 1.0, "jsd": beta}[divergence],
        temperature=temperature,
        scale_by_temperature=scale_by_temperature,
        label=label,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        mask=mask,
    )
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    own = soft.Head(student.flatten(0, -2), head, bias)
    rest = (
        soft.Head(teacher.flatten(0, -2), teacher_head, teacher_bias),
        _flat(mask),
        _flat(label),
        settings,
        chunk_bytes,
        ops.select("linear_soft_kl", backend, device, dtype),
    )
    if reduction == "none":
        rows = _without_autocast(device, soft.linear_rows, own, *rest)
        return _reduce(rows.unflatten(0, tokens), weight, mask, reduction)
    # The reduction of constant rows is linear in them: its gradient is the factor of each row.
    ones = student.new_ones(tokens, dtype=torch.promote_types(dtype, torch.float32))
    factors = _reduce(ones, weight, mask, "none")
    if reduction == "mean":
        factors = factors / _count(ones, mask)
    return _without_autocast(device, soft.linear_loss, own, factors.detach().flatten(), *rest)


# Hidden states


def _as_layers(
    name: str, value: Tensor | Sequence[Tensor] | None, count: int
) -> list[Tensor] | None:
    """One parameter per layer; a single tensor is shared by all of them."""
    if value is None:
        return None
    layers = [value] * count if isinstance(value, Tensor) else list(value)
    _require(
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
            differs from H_t.
        bias: c, [H_t]; one for all layers or one per layer.
        mask: [B, L] (pooled: [B]), which tokens count; an example without any is a masked row.
        weight: [B], factor of each example.
        reduction: ``mean`` (over the examples with a real token), ``sum``, or ``none`` (rows, [B]).
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

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
    _require(len(layers_s) >= 1, lambda: "student must hold at least one layer, got 0")
    _require(
        len(layers_t) == len(layers_s),
        lambda: (
            f"teacher must hold as many layers as the student ({len(layers_s)}), "
            f"got {len(layers_t)}"
        ),
    )
    projections = _as_layers("projection", projection, len(layers_s))
    biases = _as_layers("bias", bias, len(layers_s))

    pooled = isinstance(layers_s[0], Tensor) and layers_s[0].dim() == 2
    _check_tensor("student[0]", layers_s[0], ("B", "H_s") if pooled else ("B", "L", "H_s"))
    device, tokens = layers_s[0].device, layers_s[0].shape[:-1]
    for layer, (layer_s, layer_t) in enumerate(zip(layers_s, layers_t)):
        _check_tensor(f"student[{layer}]", layer_s, (*tokens, "H_s"), device)
        _check_teacher(f"teacher[{layer}]", layer_t, (*tokens, "H_t"), device)
        widths = layer_s.shape[-1], layer_t.shape[-1]
        if projections is not None:
            _check_tensor(f"projection[{layer}]", projections[layer], widths, device)
        else:
            _require(
                widths[0] == widths[1],
                lambda: (
                    "projection is needed where widths differ, "
                    f"got None and {widths} in layer {layer}"
                ),
            )
        if biases is not None:
            _check_tensor(f"bias[{layer}]", biases[layer], widths[1:], device)
    mask = _as_mask("mask", mask, tokens, device)
    if pooled:
        layers_s, layers_t = (
            [states[:, None] for states in layers] for layers in (layers_s, layers_t)
        )
        mask = None if mask is None else mask[:, None]

    rows = _call("hidden_mse", backend, device, layers_s, layers_t, projections, biases, mask)
    return _reduce(rows, weight, None if mask is None else mask.any(1), reduction)


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
    _check_tensor("hidden", hidden, ("B", "L", "H"))
    _check_tensor("mask", mask, hidden.shape[:2], hidden.device, "boolean or integer")
    return _call("masked_mean", backend, hidden.device, hidden, mask != 0)


# Attention


def _check_pair(student: Pair, teacher: Pair) -> torch.device:
    for name, side in (("student", student), ("teacher", teacher)):
        _require(
            isinstance(side, (tuple, list)) and len(side) == 2,
            lambda: f"{name} must be a pair (query, key), got {type(side).__name__}",
        )
    (query_s, key_s), (query_t, key_t) = student, teacher
    _check_states("student query", query_s, "teacher query", query_t)
    _check_tensor("student key", key_s, query_s.shape, query_s.device)
    _check_teacher("teacher key", key_t, query_t.shape, query_s.device)
    return query_s.device


def _check_states(name_s: str, student: Tensor, name_t: str, teacher: Tensor) -> None:
    _check_tensor(name_s, student, ("B", "A_s", "L", "D_s"))
    batch, _, length, _ = student.shape
    _check_teacher(name_t, teacher, (batch, "A_t", length, "D_t"), student.device)
    for name, states in ((name_s, student), (name_t, teacher)):
        _require(
            min(states.shape[1], states.shape[3]) >= 1,
            lambda: f"{name} must have A >= 1 and D >= 1, got shape {list(states.shape)}",
        )


def _attention(
    op: str,
    student: Pair,
    teacher: Pair,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
    scale: float | None,
    mean_over: str,
    weight: Tensor | None,
    reduction: str,
    backend: str,
    **options,
) -> Tensor:
    device = _check_pair(student, teacher)
    _check_choice("mean_over", mean_over, ("real", "all"))
    if scale is not None:
        _check_positive("scale", scale)
    batch, _, length, _ = student[0].shape
    query_mask = _as_mask("query_mask", query_mask, (batch, length), device)
    key_mask = _as_mask("key_mask", key_mask, (batch, length), device)
    rows = _call(
        op,
        backend,
        device,
        student,
        teacher,
        query_mask,
        key_mask,
        causal,
        scale,
        mean_over,
        **options,
    )
    real = [mask.any(1) for mask in (query_mask, key_mask) if mask is not None]
    return _reduce(rows, weight, torch.stack(real).all(0) if real else None, reduction)


def attention_score_mse(
    student: Pair,
    teacher: Pair,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mean_over: str = "real",
    form: str = "auto",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Squared error between attention scores before the softmax, from queries and keys.

    ``rows_b = sum over heads a, real queries i, real keys j of (S_s - S_t)_aij^2 / count``, ``S = Q
    K^T / sqrt(D)``, D of each side. ``mean_over="real"`` counts the pairs that are summed, A * n_q
    * n_k; ``"all"`` counts A * L * L: masked scores are 0 and count, which with a key mask alone is
    TinyBERT's rule ``where(score <= -1e2, 0)`` under a plain mean.

    With as many heads on both sides, head is compared to head; otherwise each side's scores are
    averaged over its heads first (A = 1). The Gram form uses ``||S_s - S_t||^2 = <X^T X, Y^T Y>``,
    ``X = [Q_s / sqrt(D_s) | -Q_t / sqrt(D_t)]``, ``Y = [K_s | K_t]``: linear in L, no L x L map.
    Its rounding error is relative to ``||S_s||^2 + ||S_t||^2``, not to the loss, so ask for
    ``tiled`` where student and teacher agree to better than 0.1 % (and do not let float32 products
    round to TF32). The tiled form keeps one map of 256 queries at a time.

    Args:
        student: (query, key), each [B, A_s, L, D_s].
        teacher: (query, key), each [B, A_t, L, D_t], without grad.
        query_mask: [B, L], which queries count; None: all, padding included.
        key_mask: [B, L], which keys count; None: all.
        causal: a query sees keys at its own position and before only (tiled form).
        scale: factor of the scores instead of 1 / sqrt(D), for both sides.
        mean_over: ``real`` or ``all``.
        form: ``auto`` (Gram for long inputs), ``gram`` or ``tiled``.
        weight: [B], factor of each example.
        reduction: ``mean`` (over the examples with a real pair), ``sum``, or ``none`` (rows, [B]).
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [B], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad; ``form="gram"`` with ``causal=True``.
        UnsupportedError: the backend asked for cannot run here.

    Source: Jiao et al. 2020, *TinyBERT* (arXiv 1909.10351), equation 7; L_attn of Meta-KD.
    """
    _check_choice("form", form, ("auto", "gram", "tiled"))
    _require(
        not (causal and form == "gram"),
        lambda: "form must be auto or tiled with causal=True, got 'gram'",
    )
    return _attention(
        "attention_score_mse",
        student,
        teacher,
        query_mask,
        key_mask,
        causal,
        scale,
        mean_over,
        weight,
        reduction,
        backend,
        form=form,
    )


def attention_kl(
    student: Pair,
    teacher: Pair,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mean_over: str = "real",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """KL divergence between attention maps, teacher to student, from queries and keys.

    ``rows_b = sum over heads a, real queries i of KL(P_t,ai || P_s,ai) / count``, ``P = softmax
    over real keys of Q K^T / sqrt(D)``. ``mean_over="real"`` counts A * (real queries that see a
    key), ``"all"`` counts A * L. With different head counts each side's map is averaged over its
    heads first (A = 1).

    Args:
        student: (query, key), each [B, A_s, L, D_s].
        teacher: (query, key), each [B, A_t, L, D_t], without grad.
        query_mask: [B, L], which queries count; None: all.
        key_mask: [B, L], which keys count; None: all.
        causal: a query sees keys at its own position and before only.
        scale: factor of the scores instead of 1 / sqrt(D), for both sides.
        mean_over: ``real`` or ``all``.
        weight: [B], factor of each example.
        reduction: ``mean`` (over the examples with a real pair), ``sum``, or ``none`` (rows, [B]).
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [B], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad.
        UnsupportedError: the backend asked for cannot run here.

    Source: Wang et al. 2020, *MiniLM* (arXiv 2002.10957), equation 6.
    """
    return _attention(
        "attention_kl",
        student,
        teacher,
        query_mask,
        key_mask,
        causal,
        scale,
        mean_over,
        weight,
        reduction,
        backend,
    )


def attention_prob_mse(
    student: Pair,
    teacher: Pair,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mean_over: str = "real",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Squared error between attention maps after the softmax, from queries and keys.

    ``rows_b = sum over heads a, real queries i, real keys j of (P_s - P_t)_aij^2 / count``, P as in
    ``attention_kl``, count as in ``attention_score_mse``. With different head counts each side's
    map is averaged over its heads first (A = 1).

    Args:
        student: (query, key), each [B, A_s, L, D_s].
        teacher: (query, key), each [B, A_t, L, D_t], without grad.
        query_mask: [B, L], which queries count; None: all.
        key_mask: [B, L], which keys count; None: all.
        causal: a query sees keys at its own position and before only.
        scale: factor of the scores instead of 1 / sqrt(D), for both sides.
        mean_over: ``real`` or ``all``.
        weight: [B], factor of each example.
        reduction: ``mean`` (over the examples with a real pair), ``sum``, or ``none`` (rows, [B]).
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [B], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad.
        UnsupportedError: the backend asked for cannot run here.

    Source: the post-softmax variant of *TinyBERT* (arXiv 1909.10351), equation 7.
    """
    return _attention(
        "attention_prob_mse",
        student,
        teacher,
        query_mask,
        key_mask,
        causal,
        scale,
        mean_over,
        weight,
        reduction,
        backend,
    )


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    relation_heads: int,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """KL divergence between self-relations of queries, keys or values, teacher to student.

    The heads are laid side by side and cut into R relation heads of width d_r = A * D / R, on each
    side its own. Then ``rows_b = mean over r, real tokens i of KL(P_t,ri || P_s,ri)``, ``P =
    softmax over real tokens of x x^T / sqrt(d_r)``.

    Args:
        student: queries, keys or values, [B, A_s, L, D_s].
        teacher: the same states of the teacher, [B, A_t, L, D_t], without grad.
        relation_heads: R, a divisor of A_s * D_s and of A_t * D_t.
        mask: [B, L], which tokens count.
        weight: [B], factor of each example.
        reduction: ``mean`` (over the examples with a real token), ``sum``, or ``none`` (rows, [B]).
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [B], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad.
        UnsupportedError: the backend asked for cannot run here.

    Source: Wang et al. 2021, *MiniLMv2* (arXiv 2012.15828), equations 4 to 6.
    """
    _check_states("student", student, "teacher", teacher)
    _require(
        isinstance(relation_heads, int) and relation_heads >= 1,
        lambda: f"relation_heads must be an integer of at least 1, got {relation_heads!r}",
    )
    for name, states in (("student", student), ("teacher", teacher)):
        width = states.shape[1] * states.shape[3]
        _require(
            width % relation_heads == 0,
            lambda: f"relation_heads must divide the {name}'s width {width}, got {relation_heads}",
        )
    mask = _as_mask("mask", mask, (student.shape[0], student.shape[2]), student.device)
    rows = _call("relation_kl", backend, student.device, student, teacher, relation_heads, mask)
    return _reduce(rows, weight, None if mask is None else mask.any(1), reduction)


# Prototypes and instance weights


def class_prototypes(
    embedding: Tensor,
    domain: Tensor,
    label: Tensor,
    *,
    num_domains: int,
    num_classes: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean embedding of every (domain, class) cell: ``p[k, m] = mean of E(X_i) over {i: domain k,
    label m}``.

    Args:
        embedding: E(X), [N, H].
        domain: int64 [N], in 0..K-1.
        label: int64 [N], in 0..M-1.
        num_domains: K.
        num_classes: M.
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        Prototypes [K, M, H] (zeros in an empty cell), float32 (float64 for doubles), and counts
        int64 [K, M].

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range.
        UnsupportedError: the backend asked for cannot run here.

    Source: Pan et al. 2021, *Meta-KD* (arXiv 2012.01266), section 3.1.
    """
    for name, size in (("num_domains", num_domains), ("num_classes", num_classes)):
        _require(
            isinstance(size, int) and size >= 1,
            lambda: f"{name} must be an integer of at least 1, got {size!r}",
        )
    _check_tensor("embedding", embedding, ("N", "H"))
    device, rows = embedding.device, len(embedding)
    _check_index("domain", domain, rows, num_domains, device)
    _check_index("label", label, rows, num_classes, device)
    return _call(
        "class_prototypes", backend, device, embedding, domain, label, num_domains, num_classes
    )


def prototype_score(
    embedding: Tensor,
    prototypes: Tensor,
    counts: Tensor,
    domain: Tensor,
    label: Tensor,
    *,
    alpha: float = 0.5,
    center: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Prototype score of each example: how typical it is of its class, at home and in the other
    domains.

    ``t_i = alpha * cos(e_i, p[k, y]) + zeta * sum over k' != k of cos(e_i, p[k', y])`` for an
    example of domain k and label y, ``zeta = (1 - alpha) / (number of other domains whose cell (k',
    y) is not empty)``. Where only one of the two parts exists it has full weight; where neither
    does, t = 0. High t = transferable across domains.

    Args:
        embedding: e, [N, H].
        prototypes: p, [K, M, H].
        counts: [K, M], examples behind each prototype; 0 = empty cell.
        domain: int64 [N], in 0..K-1.
        label: int64 [N], in 0..M-1.
        alpha: weight of the own domain, in [0, 1].
        center: [H], subtracted from embeddings and prototypes before the cosines (embeddings of
            language models share a large common component that pushes every cosine towards 1).
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        t, [N], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range.
        UnsupportedError: the backend asked for cannot run here.

    Source: Pan et al. 2021, *Meta-KD* (arXiv 2012.01266), section 3.1.
    """
    _check_tensor("embedding", embedding, ("N", "H"))
    device, (rows, hidden) = embedding.device, embedding.shape
    _check_tensor("prototypes", prototypes, ("K", "M", hidden), device)
    _check_tensor("counts", counts, prototypes.shape[:2], device, "boolean or integer")
    _check_index("domain", domain, rows, prototypes.shape[0], device)
    _check_index("label", label, rows, prototypes.shape[1], device)
    _check_fraction("alpha", alpha)
    if center is not None:
        _check_tensor("center", center, (hidden,), device)
    return _call(
        "prototype_score",
        backend,
        device,
        embedding,
        prototypes,
        counts,
        domain,
        label,
        alpha,
        center,
    )


def domain_expertise(
    teacher_logits: Tensor, label: Tensor, t: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Domain-expertise weight of each example: large where it is typical (t) and the teacher is
    right about it.

    ``lambda_i = (1 + t_i) / (exp((1 - p_i)^2) + 1)``, p_i the teacher's probability of the gold
    label.

    Args:
        teacher_logits: [N, M], without grad.
        label: int64 [N], in 0..M-1.
        t: prototype scores, [N].
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        lambda, [N], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad.
        UnsupportedError: the backend asked for cannot run here.

    Source: Pan et al. 2021, *Meta-KD* (arXiv 2012.01266), section 3.3.
    """
    _check_teacher("teacher_logits", teacher_logits, ("N", "M"))
    device, (rows, classes) = teacher_logits.device, teacher_logits.shape
    _check_index("label", label, rows, classes, device)
    _check_tensor("t", t, (rows,), device)
    return _call("domain_expertise", backend, device, teacher_logits, label, t)
