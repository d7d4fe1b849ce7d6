"""The softened-logit family behind the door: one set of settings, rows on any backend, and the
chunked form for a language model's head.

``soft_kl``, ``soft_reverse_kl`` and ``soft_jsd`` are one formula with a mixture weight ``beta`` (0,
1 and between), so the compiled operators, and everything here, know only ``beta``. The chunked form
never holds the logits of all tokens: a chunk of student and teacher logits is computed by a matrix
product, its rows replace the student's logits by their gradient, and two more products carry that
to the hidden states and the head.

Legend: N rows (tokens), C classes (vocabulary), H hidden size; ``_s`` student, ``_t`` teacher,
``d`` gradient of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metakd import ops, reference
from metakd.functional.checks import MODULES

# Tokens of a chunk are a multiple of this where there are enough: matrix products like full tiles.
CHUNK_MULTIPLE = 128


class Settings(NamedTuple):
    """What the rows mean; the tail of every operator of the family, in its order."""

    vocab_size: int
    temperature: float
    scale: float  # factor of the divergence: T^2, or 1
    beta: float
    hard_weight: float


def rows(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    label: Tensor | None,
    settings: Settings,
) -> Tensor:
    """``scale * divergence + hard_weight * cross-entropy`` of each row: [N, C_s], [N, C_t] -> [N].

    ``mask`` is bool [N]; what it hides gives 0 and no gradient, whatever it holds.
    """
    if backend not in MODULES:
        return ops.compiled(backend, "soft_kl_fwd")(student, teacher, mask, label, *settings)[0]
    student, teacher = student[:, : settings.vocab_size], teacher[:, : settings.vocab_size]
    if mask is not None:
        # The fill cuts the student's gradient, so the teacher's masked rows may hold anything.
        student = student.masked_fill(~mask[:, None], 0.0)
        label = None if label is None else label.masked_fill(~mask, 0)
    value = MODULES[backend].soft_jsd(student, teacher, settings.beta, settings.temperature, False)
    value = value * settings.scale
    if label is not None:
        value = value + settings.hard_weight * reference.cross_entropy(student, label)
    return value if mask is None else value.masked_fill(~mask, 0.0)


def mixture_rows(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    shares: Tensor,
    mask: Tensor | None,
    temperature: float,
    scale: float,
) -> Tensor:
    """``scale * KL(mixture of teachers || student)`` of each row: [N, C], [N, M, C], shares [N, M]
    -> [N]. ``mask`` as for ``rows``."""
    if backend not in MODULES:
        operator = ops.compiled(backend, "mixture_kl_fwd")
        return operator(student, teacher, shares, mask, temperature, scale)[0]
    if mask is not None:
        # The fills cut all gradients, so what is masked may hold anything.
        masked = ~mask[:, None]
        student, teacher = (
            student.masked_fill(masked, 0.0),
            teacher.masked_fill(masked[..., None], 0.0),
        )
        shares = shares.masked_fill(masked, 1 / teacher.shape[1])
    value = MODULES[backend].mixture_kl(student, teacher, shares, temperature, False) * scale
    return value if mask is None else value.masked_fill(~mask, 0.0)


def _rows_and_gradient_(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    drows: Tensor,
    mask: Tensor | None,
    label: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Rows [N]; ``student`` [N, C_s] is replaced by its gradient for the upstream gradient
    ``drows``."""
    if backend not in MODULES:
        operator = ops.compiled(backend, "soft_kl_fwd_bwd_")
        return operator(student, teacher, drows, mask, label, *settings)
    with torch.enable_grad():
        leaf = student.detach().clone().requires_grad_()
        value = rows(backend, leaf, teacher, mask, label, settings)
        student.copy_(torch.autograd.grad(value, leaf, drows)[0])
    return value.detach()


# The chunked form


class Head(NamedTuple):
    """Where logits come from: ``hidden @ weight.T + bias``, or ``hidden`` without a weight."""

    hidden: Tensor  # [N, H]; without a weight [N, C]
    weight: Tensor | None = None  # [C, H]
    bias: Tensor | None = None  # [C]

    @property
    def width(self) -> int:
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def bytes_per_token(self) -> int:
        return 0 if self.weight is None else self.width * self.hidden.element_size()

    def logits(self, tokens: slice) -> Tensor:
        """[n, C], in the dtype of the hidden states as from a linear layer under autocast."""
        hidden = self.hidden[tokens]
        if self.weight is None:
            return hidden
        weight = self.weight.to(hidden.dtype)
        if self.bias is None:
            return hidden @ weight.mT
        return torch.addmm(self.bias.to(hidden.dtype), hidden, weight.mT)


def chunks(student: Head, teacher: Head, chunk_bytes: int) -> Iterator[slice]:
    total = student.hidden.shape[0]
    size = max(chunk_bytes // (student.bytes_per_token + teacher.bytes_per_token), 1)
    if size > CHUNK_MULTIPLE:
        size -= size % CHUNK_MULTIPLE
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, summed in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and torch.compiler.is_compiling():
        # The sum in one call, below, is not traceable in every version of torch that we support.
        total += torch.mm(left, right, out_dtype=total.dtype)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _sweep(
    student: Head,
    teacher: Head,
    mask: Tensor | None,
    label: Tensor | None,
    settings: Settings,
    chunk_bytes: int,
    backend: str,
    drows: Tensor | None = None,
    wanted: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Rows [N], chunk by chunk; with ``drows`` [N] the gradients of hidden, weight and bias too, as
    far as wanted.

    The gradients of weight and bias are sums over chunks: float32, whatever the parameters are.
    """
    found = []
    weight, bias = student.weight, student.bias
    dhidden = dweight = dbias = None
    wide = torch.promote_types(student.hidden.dtype, torch.float32)
    if drows is not None:
        dhidden = torch.empty_like(student.hidden) if wanted[0] else None
        if weight is not None and wanted[1]:
            dweight = torch.zeros_like(weight, dtype=wide)
        if bias is not None and wanted[2]:
            dbias = torch.zeros_like(bias, dtype=wide)
    for tokens in chunks(student, teacher, chunk_bytes):
        part = (
            None if mask is None else mask[tokens],
            None if label is None else label[tokens],
        )
        logits, logits_t = student.logits(tokens), teacher.logits(tokens)
        if drows is None:
            found.append(rows(backend, logits, logits_t, *part, settings))
            continue
        found.append(_rows_and_gradient_(backend, logits, logits_t, drows[tokens], *part, settings))
        dlogits = logits  # replaced in place
        hidden = student.hidden[tokens]
        if part[0] is not None:  # zero times what a masked token holds must stay zero
            hidden = hidden.masked_fill(~part[0][:, None], 0.0)
        if dhidden is not None:
            assert weight is not None, "a student that learns has a head"
            # Zero times what a class of padding holds must stay zero, too. The other products keep
            # the padded width: vocabularies are padded so that rows of logits are aligned.
            real = slice(settings.vocab_size)
            torch.mm(dlogits[:, real], weight[real].to(hidden.dtype), out=dhidden[tokens])
        if dweight is not None:
            _add_product_(dweight, dlogits.mT, hidden)
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=wide)
    rows_found = torch.cat(found) if found else student.hidden.new_empty(0, dtype=wide)
    return rows_found, (dhidden, dweight, dbias)


class _LinearRows(torch.autograd.Function):
    """Rows [N] for any upstream gradient: the backward computes every chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, *rest):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.rest = rest
        return _sweep(Head(hidden, weight, bias), *rest)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        head = Head(*ctx.saved_tensors)
        _, gradients = _sweep(head, *ctx.rest, drows, ctx.needs_input_grad[:3])
        return (*_like(gradients, head), *[None] * len(ctx.rest))


class _LinearLoss(torch.autograd.Function):
    """Sum of ``factors * rows``: with the factors known the gradients are computed on the way
    forward, and no logits twice."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, factors, *rest):
        head = Head(hidden, weight, bias)
        if not any(ctx.needs_input_grad[:3]):
            return (_sweep(head, *rest)[0] * factors).sum()
        value, gradients = _sweep(head, *rest, factors, ctx.needs_input_grad[:3])
        ctx.save_for_backward(hidden, weight, bias, *gradients)
        ctx.count = 1 + len(rest)
        return (value * factors).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        head, gradients = Head(*ctx.saved_tensors[:3]), ctx.saved_tensors[3:]
        scaled = [
            # Rounded as it is written: a float32 product would be the largest tensor of all.
            None if x is None else torch.mul(x, dloss, out=torch.empty_like(x, dtype=own.dtype))
            for x, own in zip(gradients, head)
        ]
        return (*scaled, *[None] * ctx.count)


def _like(gradients: Sequence[Tensor | None], head: Head) -> list[Tensor | None]:
    return [
        None if x is None or own is None else x.to(own.dtype) for x, own in zip(gradients, head)
    ]


def linear_rows(student: Head, *rest) -> Tensor:
    """Rows [N] of ``Head(...)`` against ``Head(...)``; ``rest``: teacher, mask, label, settings,
    chunk_bytes, backend."""
    return _LinearRows.apply(*student, *rest)


def linear_loss(student: Head, factors: Tensor, *rest) -> Tensor:
    """``sum(factors * rows)`` for factors [N] that hold 0 for masked rows; ``rest`` as for
    ``linear_rows``."""
    return _LinearLoss.apply(*student, factors, *rest)
