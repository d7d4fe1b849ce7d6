"""Triton kernels of sentence embeddings, class prototypes and instance weights.

Launchers: ``masked_mean_fwd``, ``masked_mean_bwd``, ``class_prototypes``, ``prototype_score``,
``domain_expertise``, with the names and signatures of ``metakd.ops.SCHEMAS``. Imports torch, triton
and ``metakd.kernels.shared``.

The mean over an example's real tokens passes its gradient to each of them in equal parts:
dhidden = dmean / tokens, 0 for the others. Prototypes and weights have no gradient.

An index out of range belongs to no cell; the score or expertise of its row is NaN.

Bytes moved (b per element): masked_mean BLHb and back; class_prototypes NHb, and 16 N of indices
for each cell and block of H, from the L2; prototype_score NHb, and K prototypes a row, from the L2;
domain_expertise NMb.

Legend: B batch, L length, H hidden size, N examples, K domains, M classes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakd.kernels.shared import (
    COMPILE,
    LOG2_E,
    alignment,
    count_real,
    in_rows,
    is_real,
    load_rows,
    narrow,
    places,
    refuse_doubles,
)

INFINITY: tl.constexpr = tl.constexpr(math.inf)
# F.normalize's least norm.
LEAST_NORM: tl.constexpr = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["stride_b", "stride_l", "stride_mask", "L"])
def _masked_mean_kernel(
    hidden, mask, mean, stride_b, stride_l, stride_mask, L,
    H: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    b = tl.program_id(0).to(tl.int64) // blocks
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    hidden += b * stride_b * ALIGN
    mask += b * stride_mask
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, L, ROWS):
        place = first + tl.arange(0, ROWS)
        real = is_real(mask, place, L)
        total += load_rows(hidden, place, stride_l, real, column, H, ALIGN).to(tl.float32)
    value = tl.sum(total, 0) / count_real(mask, L, 1024)
    tl.store(mean + b * H + column, narrow(value, mean.dtype.element_ty), mask=column < H)


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_mask", "L"])
def _masked_mean_bwd_kernel(
    dmean, mask, dhidden, stride_b, stride_h, stride_mask, L,
    H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, ROWS)
    b = tl.program_id(0).to(tl.int64) // blocks
    mask += b * stride_mask
    place = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    real = is_real(mask, place, L)
    tokens = count_real(mask, L, 1024)
    dhidden += b * L * H
    for first in range(0, H, BLOCK):
        column = first + tl.arange(0, BLOCK)
        at = dmean + b * stride_b + column.to(tl.int64) * stride_h
        share = tl.load(at, mask=column < H, other=0.0).to(tl.float32) / tokens
        share = tl.where(real[:, None], share[None, :], 0.0)
        write = (place < L)[:, None] & (column < H)[None, :]
        share = narrow(share, dhidden.dtype.element_ty)
        tl.store(dhidden + places(place, H, column, 1), share, mask=write)


@triton.jit(do_not_specialize=["stride", "stride_domain", "stride_label", "N", "PART", "K", "M"])
def _class_sums_kernel(
    embedding, domain, label, sums, counts, stride, stride_domain, stride_label, N, PART, K, M,
    H: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of PART rows, a cell's sum of a block of features, and its count."""
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    to = tl.program_id(0).to(tl.int64) // blocks
    cell, begin = to % (K * M), (to // (K * M)) * PART
    end = tl.minimum(begin + PART, N)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    members = tl.zeros([ROWS], tl.int32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        k = tl.load(domain + row * stride_domain, mask=row < end, other=-1)
        m = tl.load(label + row * stride_label, mask=row < end, other=-1)
        member = (k == cell // M) & (m == cell % M)
        members += member.to(tl.int32)
        total += load_rows(embedding, row, stride, member, column, H, ALIGN).to(tl.float32)
    tl.store(sums + to * H + column, tl.sum(total, 0), mask=column < H)
    if tl.program_id(0) % blocks == 0:
        tl.store(counts + to, tl.sum(members, 0).to(tl.int64))


@triton.jit(do_not_specialize=["stride", "stride_domain", "stride_label", "N", "K", "M"])
def _prototype_score_kernel(
    embedding, prototypes, counts, domain, label, center, t,
    stride, stride_domain, stride_label, N, K, M, alpha,
    H: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, DOMAINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cosines [ROWS, DOMAINS] of a block of rows with the prototypes of their class."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    own = tl.load(domain + row * stride_domain, mask=inside, other=-1)
    m = tl.load(label + row * stride_label, mask=inside, other=-1)
    known = (m >= 0) & (m < M)
    every = tl.arange(0, DOMAINS)[None, :]
    square = tl.zeros([ROWS], tl.float32)
    products = tl.zeros([ROWS, DOMAINS], tl.float32)
    squares = tl.zeros([ROWS, DOMAINS], tl.float32)
    for first in range(0, H, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = load_rows(embedding, row, stride, inside, column, H, ALIGN).to(tl.float32)
        if center is not None:
            origin = tl.load(center + column, mask=column < H, other=0.0).to(tl.float32)[None, :]
            x = x - origin
        square += tl.sum(x * x, 1)
        for k in range(K):
            p = load_rows(prototypes, k * M + m, H, known, column, H, 1).to(tl.float32)
            if center is not None:
                p = p - origin
            here = every == k
            products += tl.where(here, tl.sum(x * p, 1)[:, None], 0.0)
            squares += tl.where(here, tl.sum(p * p, 1)[:, None], 0.0)

    norm = tl.maximum(tl.sqrt(square), LEAST_NORM)[:, None]
    cosine = products / norm / tl.maximum(tl.sqrt(squares), LEAST_NORM)
    within = known[:, None] & (every < K)
    at = counts + every.to(tl.int64) * M + m[:, None]
    exists = within & (tl.load(at, mask=within, other=0) > 0)
    is_own = exists & (every == own[:, None])
    is_other = exists & (every != own[:, None])
    others = tl.sum(is_other.to(tl.int32), 1)
    by_own = tl.sum(tl.where(is_own, cosine, 0.0), 1)
    by_others = tl.sum(tl.where(is_other, cosine, 0.0), 1) / tl.maximum(others, 1).to(tl.float32)
    both = (tl.sum(is_own.to(tl.int32), 1) > 0) & (others > 0)
    # A part that does not exist is 0, so the sum is the other part at full weight.
    value = tl.where(both, alpha * by_own + (1.0 - alpha) * by_others, by_own + by_others)
    value = tl.where(known & (own >= 0) & (own < K), value, float("nan"))
    tl.store(t + row, value, mask=inside)


@triton.jit(do_not_specialize=["stride", "stride_label", "stride_t", "N"])
def _domain_expertise_kernel(
    logits, label, t, expertise, stride, stride_label, stride_t, N,
    M: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    m = tl.load(label + row * stride_label, mask=inside, other=-1)
    known = (m >= 0) & (m < M)
    top = tl.full([ROWS], -INFINITY, tl.float32)
    for first in range(0, M, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = load_rows(logits, row, stride, inside, column, M, ALIGN).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.where((column < M)[None, :], x, -INFINITY), 1))
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, M, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = load_rows(logits, row, stride, inside, column, M, ALIGN).to(tl.float32)
        e = tl.exp2((x - top[:, None]) * LOG2_E)
        total += tl.sum(tl.where((column < M)[None, :], e, 0.0), 1)
    at_label = logits + row * stride * ALIGN + m
    at_label = tl.load(at_label, mask=known, other=float("nan")).to(tl.float32)
    miss = 1.0 - tl.exp2((at_label - top) * LOG2_E) / total
    weight = 1.0 + tl.load(t + row * stride_t, mask=inside, other=0.0).to(tl.float32)
    tl.store(expertise + row, weight / (tl.exp2(miss * miss * LOG2_E) + 1.0), mask=inside)


# Tables and launchers

# Rows of a program that sums up cells, and how many sums there are at most: few cells alone would
# leave most of a GPU idle, and each part of the rows costs a sum for each cell.
PART_ROWS, MOST_SUMS = 2048, 2048


def mean_shape(H: int, itemsize: int) -> dict[str, int]:
    """Rows at a time and columns of a program, 16 bytes of four rows a thread: narrow blocks, so
    that a batch of sentences keeps a GPU busy."""
    block = max(16, min(triton.next_power_of_2(H), 128))
    return {"ROWS": 4 * 128 * 16 // (itemsize * block), "BLOCK": block, "num_warps": 4}


def score_shape(H: int, K: int) -> dict[str, int]:
    return {
        "ROWS": 4,
        "DOMAINS": triton.next_power_of_2(K),
        "BLOCK": max(16, min(triton.next_power_of_2(H), 512)),
        "num_warps": 4,
        "maxnreg": 128,
    }


def expertise_shape(M: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(M), 1024)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": 4}


def masked_mean_fwd(hidden: Tensor, mask: Tensor) -> Tensor:
    """See ``metakd.ops.SCHEMAS``."""
    refuse_doubles(hidden=hidden)
    B, L, H = hidden.shape
    mean = hidden.new_empty(B, H)
    if B * H:
        hidden, mask = in_rows(hidden), in_rows(mask)
        unit, shape = alignment(hidden), mean_shape(H, hidden.itemsize)
        strides = hidden.stride(0) // unit, hidden.stride(1) // unit, mask.stride(0)
        grid = (B * triton.cdiv(H, shape["BLOCK"]),)
        with torch.cuda.device_of(hidden):
            _masked_mean_kernel[grid](
                hidden, mask, mean, *strides, L, H=H, ALIGN=unit, **shape, **COMPILE
            )
    return mean


def masked_mean_bwd(dmean: Tensor, mask: Tensor) -> Tensor:
    """See ``metakd.ops.SCHEMAS``."""
    refuse_doubles(dmean=dmean)
    (B, L), H = mask.shape, dmean.shape[1]
    dhidden = dmean.new_empty(B, L, H)
    if dhidden.numel():
        mask, shape = in_rows(mask), mean_shape(H, dmean.itemsize)
        grid = (B * triton.cdiv(L, shape["ROWS"]),)
        with torch.cuda.device_of(dmean):
            _masked_mean_bwd_kernel[grid](
                dmean, mask, dhidden, *dmean.stride(), mask.stride(0), L, H=H, **shape, **COMPILE
            )
    return dhidden


def class_prototypes(
    embedding: Tensor, domain: Tensor, label: Tensor, num_domains: int, num_classes: int
) -> tuple[Tensor, Tensor]:
    """See ``metakd.ops.SCHEMAS``."""
    refuse_doubles(embedding=embedding)
    N, H = embedding.shape
    embedding = in_rows(embedding)
    unit, shape = alignment(embedding), mean_shape(H, embedding.itemsize)
    parts = max(1, min(N // PART_ROWS, MOST_SUMS // (num_domains * num_classes)))
    cells = parts, num_domains, num_classes
    sums = embedding.new_empty(*cells, H, dtype=torch.float32)
    counts = embedding.new_empty(cells, dtype=torch.int64)
    strides = embedding.stride(0) // unit, domain.stride(0), label.stride(0)
    sizes = N, triton.cdiv(N, parts), num_domains, num_classes
    grid = (counts.numel() * triton.cdiv(H, shape["BLOCK"]),)
    with torch.cuda.device_of(embedding):
        _class_sums_kernel[grid](
            embedding, domain, label, sums, counts, *strides, *sizes, H=H, ALIGN=unit, **shape,
            **COMPILE,
        )  # fmt: skip
    counts = counts.sum(0)  # [K, M]
    return sums.sum(0) / counts.clamp(min=1)[..., None], counts  # [K, M, H]


def prototype_score(
    embedding: Tensor,
    prototypes: Tensor,
    counts: Tensor,
    domain: Tensor,
    label: Tensor,
    alpha: float,
    center: Tensor | None,
) -> Tensor:
    """See ``metakd.ops.SCHEMAS``."""
    refuse_doubles(embedding=embedding, prototypes=prototypes)
    N, H = embedding.shape
    K, M = counts.shape
    t = embedding.new_empty(N, dtype=torch.float32)  # [N]
    if N == 0:
        return t
    if counts.dtype == torch.bool:
        counts = counts.view(torch.uint8)  # True > 0 as bytes, not as a bit with a sign
    if center is not None:
        refuse_doubles(center=center)
        center = center.contiguous()
    embedding = in_rows(embedding)
    unit, shape = alignment(embedding), score_shape(H, K)
    strides = embedding.stride(0) // unit, domain.stride(0), label.stride(0)
    args = [embedding, prototypes.contiguous(), counts.contiguous(), domain, label, center, t]
    args += [*strides, N, K, M, alpha]
    with torch.cuda.device_of(embedding):
        grid = (triton.cdiv(N, shape["ROWS"]),)
        _prototype_score_kernel[grid](*args, H=H, ALIGN=unit, **shape, **COMPILE)
    return t


def domain_expertise(teacher_logits: Tensor, label: Tensor, t: Tensor) -> Tensor:
    """See ``metakd.ops.SCHEMAS``."""
    refuse_doubles(teacher_logits=teacher_logits, t=t)
    N, M = teacher_logits.shape
    expertise = t.new_empty(N, dtype=torch.float32)  # [N]
    if N:
        logits = in_rows(teacher_logits)
        unit, shape = alignment(logits), expertise_shape(M)
        strides = logits.stride(0) // unit, label.stride(0), t.stride(0)
        grid = (triton.cdiv(N, shape["ROWS"]),)
        with torch.cuda.device_of(logits):
            _domain_expertise_kernel[grid](
                logits, label, t, expertise, *strides, N, M=M, ALIGN=unit, **shape, **COMPILE
            )
    return expertise
