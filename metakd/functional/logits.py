"""Losses on logits: softened divergences, with hard labels in the same pass, and the same from a
language model's head."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metakd import ops
from metakd.functional import soft
from metakd.functional.checks import (
    REDUCTIONS,
    as_mask,
    check_choice,
    check_fraction,
    check_index,
    check_integer,
    check_positive,
    check_teacher,
    check_tensor,
    count_rows,
    is_number,
    leave_out_weightless,
    reduce_rows,
    require,
    widest,
    without_autocast,
)


class _Options(NamedTuple):
    """What the logit losses share, see ``soft_kl``; ``beta`` 0 is the forward and 1 the reverse
    divergence."""

    beta: float
    temperature: float
    scale_by_temperature: bool
    label: Tensor | None
    hard_weight: float
    ignore_index: int
    vocab_size: int | None
    mask: Tensor | None


def _soft_problem(
    tokens: torch.Size, widths: tuple[int, int], device: torch.device, options: _Options
) -> tuple[Tensor | None, Tensor | None, soft.Settings]:
    """Checks the options; gives the mask [...] with ignored labels in it, the labels [...] and the
    settings."""
    beta, temperature = options.beta, options.temperature
    scale_by_temperature, hard_weight = options.scale_by_temperature, options.hard_weight
    label, vocab_size = options.label, options.vocab_size
    check_positive("temperature", temperature)
    check_fraction("beta", beta)
    check_integer("ignore_index", options.ignore_index)
    if vocab_size is None:
        vocab_size = widths[0]
        require(
            widths[0] == widths[1],
            lambda: (
                f"vocab_size is needed where student and teacher differ in classes, got {widths}"
            ),
        )
    check_integer("vocab_size", vocab_size, 1, min(widths))
    mask = as_mask("mask", options.mask, tokens, device)
    if label is not None:
        require(
            is_number(hard_weight) and 0 <= hard_weight < math.inf,
            lambda: f"hard_weight must be a finite number of at least 0, got {hard_weight!r}",
        )
        check_tensor("label", label, tokens, device, "int64")
        counted = label != options.ignore_index
        mask = counted if mask is None else mask & counted
        if device.type == "cpu" and not torch.compiler.is_compiling():
            check_index("label", label[mask], int(mask.sum()), vocab_size, device)
    scale = _scale(temperature, scale_by_temperature)
    return (
        mask,
        label,
        soft.Settings(vocab_size, float(temperature), scale, float(beta), hard_weight),
    )


def _scale(temperature: float, scale_by_temperature: bool) -> float:
    return float(temperature) ** 2 if scale_by_temperature else 1.0


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flatten()


def _check_student(student: Tensor) -> None:
    require(
        isinstance(student, Tensor) and student.dim() >= 2 and student.shape[-1] >= 1,
        lambda: (
            f"student must be a tensor [..., C], C >= 1, got {getattr(student, 'shape', student)!r}"
        ),
    )
    check_tensor("student", student, student.shape)


def _soft(
    op: str,
    student: Tensor,
    teacher: Tensor,
    options: _Options,
    weight: Tensor | None,
    reduction: str,
    backend: str,
) -> Tensor:
    _check_student(student)
    tokens, device = student.shape[:-1], student.device
    check_teacher("teacher", teacher, (*tokens, "C"), device)
    widths = student.shape[-1], teacher.shape[-1]
    mask, label, settings = _soft_problem(tokens, widths, device, options)
    heard = leave_out_weightless(mask, weight, tokens, tokens, device)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    rows = without_autocast(
        device,
        soft.rows,
        ops.select(op, backend, device, dtype),
        student.flatten(0, -2),
        teacher.flatten(0, -2),
        _flat(heard),
        _flat(label),
        settings,
    )
    if len(tokens) > 1:
        rows = rows.unflatten(0, tokens)
    return reduce_rows(rows, weight, mask, reduction)


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
            may then differ in C, and the others hold anything); None: all, and C must agree.
        mask: [...], which rows count.
        weight: [...], factor of each row; 0 leaves it out, but for the count of a mean.
        reduction: ``mean`` (over the unmasked rows), ``sum`` (divide it by the rows of a whole step
            under gradient accumulation, where a mean of means is another loss), or ``none`` (rows,
            [...]).
        backend: ``auto``, ``reference``, ``eager``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [...], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad.
        UnsupportedError: the backend asked for cannot run here.

    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2; L_pred of Meta-KD.
    """
    how = (0.0, temperature, scale_by_temperature, label, hard_weight, ignore_index)
    options = _Options(*how, vocab_size, mask)
    return _soft("soft_kl", student, teacher, options, weight, reduction, backend)


def sigmoid_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Forward KL divergence of the student from the teacher where each class is a question of its
    own (multi-label), from logits, the mean over classes.

    ``rows = T^2 / C * sum_c KL(Bernoulli(p_c) || Bernoulli(q_c))``, with ``p = sigmoid(teacher /
    T)`` and ``q = sigmoid(student / T)``. A class is a softmax over its logit and 0, so that this
    is ``soft_kl`` of C pairs a row, in the same kernels. Arguments, result and errors are those of
    ``soft_kl``.

    Source: Yang, Xie, Zong et al. 2023, *Multi-Label Knowledge Distillation* (arXiv 2308.06453),
    section 3.2, which has the sum over classes; the mean goes with binary cross-entropy as
    transformers has it.
    """
    _check_student(student)
    rows = student.shape[:-1]
    check_teacher("teacher", teacher, student.shape, student.device)
    mask = as_mask("mask", mask, rows, student.device)
    heard = leave_out_weightless(mask, weight, rows, rows, student.device)
    against_zero = [torch.stack((side, torch.zeros_like(side)), -1) for side in (student, teacher)]
    by_class = soft_kl(
        *against_zero,
        temperature=temperature,
        scale_by_temperature=scale_by_temperature,
        mask=None if heard is None else heard[..., None].expand(student.shape),
        reduction="none",
        backend=backend,
    )
    return reduce_rows(by_class.mean(-1), weight, mask, reduction)


def mixture_kl(
    student: Tensor,
    teacher: Tensor,
    shares: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Forward KL divergence of the student from a mixture of teachers, from logits.

    ``rows = T^2 * sum_c p_c * (log p_c - log q_c)``, with ``p = sum_m a_m softmax(teacher_m / T)``
    and ``q = softmax(student / T)``. Its probabilities are mixed, not its logits: the mean of
    teachers that are sure of different things is unsure, that of their logits may be sure of a
    third. Computed in logarithms. A teacher whose share is 0 is left out, gradient included.

    Args:
        student: logits, [..., C].
        teacher: logits, [..., M, C], without grad.
        shares: a, [..., M], at least 0 and with the sum 1, which nobody checks; their gradient is
            that of free numbers.
        temperature, scale_by_temperature, mask, weight, reduction: as for ``soft_kl``.
        backend: ``auto``, ``reference``, ``eager``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [...], float32 (float64 for doubles).

    Raises:
        ValueError: as for ``soft_kl``.
        UnsupportedError: the backend asked for cannot run here.

    Source: Haase, da Silva, *HPM-KD* (arXiv 2512.09886), whose draft weights teachers by example.
    """
    _check_student(student)
    rows, classes, device = student.shape[:-1], student.shape[-1], student.device
    check_positive("temperature", temperature)
    check_teacher("teacher", teacher, (*rows, "M", classes), device)
    teachers = teacher.shape[-2]
    require(teachers >= 1, lambda: f"teacher must have M >= 1, got {list(teacher.shape)}")
    check_tensor("shares", shares, (*rows, teachers), device)
    mask = as_mask("mask", mask, rows, device)
    heard = leave_out_weightless(mask, weight, rows, rows, device)
    found = without_autocast(
        device,
        soft.mixture_rows,
        ops.select("mixture_kl", backend, device, widest(student, teacher, shares)),
        student.flatten(0, -2),
        teacher.flatten(0, -3),
        shares.flatten(0, -2),
        _flat(heard),
        float(temperature),
        _scale(temperature, scale_by_temperature),
    )
    if len(rows) > 1:
        found = found.unflatten(0, rows)
    return reduce_rows(found, weight, mask, reduction)


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
    how = (1.0, temperature, scale_by_temperature, label, hard_weight, ignore_index)
    options = _Options(*how, vocab_size, mask)
    return _soft("soft_reverse_kl", student, teacher, options, weight, reduction, backend)


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
    how = (beta, temperature, scale_by_temperature, label, hard_weight, ignore_index)
    options = _Options(*how, vocab_size, mask)
    return _soft("soft_jsd", student, teacher, options, weight, reduction, backend)


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
    check_choice("divergence", divergence, ("kl", "reverse_kl", "jsd"))
    check_choice("reduction", reduction, REDUCTIONS)
    require(
        isinstance(student, Tensor) and student.dim() >= 2,
        lambda: f"student must be a tensor [..., H_s], got {getattr(student, 'shape', student)!r}",
    )
    check_tensor("student", student, student.shape)
    tokens, device = student.shape[:-1], student.device
    check_tensor("head", head, ("C", student.shape[-1]), device)
    check_teacher("teacher", teacher, (*tokens, "C" if teacher_head is None else "H_t"), device)
    classes_t = teacher.shape[-1]
    if teacher_head is not None:
        check_teacher("teacher_head", teacher_head, ("C", teacher.shape[-1]), device)
        classes_t = len(teacher_head)
    if bias is not None:
        check_tensor("bias", bias, (len(head),), device)
    if teacher_bias is not None:
        require(teacher_head is not None, lambda: "teacher_bias needs a teacher_head, got None")
        check_teacher("teacher_bias", teacher_bias, (classes_t,), device)
    check_integer("chunk_bytes", chunk_bytes, 1)
    beta = {"kl": 0.0, "reverse_kl": 1.0, "jsd": beta}[divergence]
    how = (beta, temperature, scale_by_temperature, label, hard_weight, ignore_index)
    options = _Options(*how, vocab_size, mask)
    mask, label, settings = _soft_problem(tokens, (len(head), classes_t), device, options)
    heard = leave_out_weightless(mask, weight, tokens, tokens, device)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    own = soft.Head(student.flatten(0, -2), head, bias)
    rest = (
        soft.Head(teacher.flatten(0, -2), teacher_head, teacher_bias),
        _flat(heard),
        _flat(label),
        settings,
        chunk_bytes,
        ops.select("linear_soft_kl", backend, device, dtype),
    )
    if reduction == "none":
        rows = without_autocast(device, soft.linear_rows, own, *rest)
        return reduce_rows(rows.unflatten(0, tokens), weight, mask, reduction)
    # The reduction of constant rows is linear in them: its gradient is the factor of each row.
    ones = student.new_ones(tokens, dtype=torch.promote_types(dtype, torch.float32))
    factors = reduce_rows(ones, weight, mask, "none")
    if reduction == "mean":
        factors = factors / count_rows(ones, mask)
    return without_autocast(device, soft.linear_loss, own, factors.detach().flatten(), *rest)
