"""Triton kernels of the KL divergence of a student from a mixture of teachers.

Launchers: ``mixture_kl_fwd``, ``mixture_kl_bwd``, with the names and signatures of
``metakd.ops.SCHEMAS``. Imports torch, triton and ``metakd.kernels.shared``.

With s' = (s - max s) / T, lsum_s = log sum_c exp s'_c, log q = s' - lsum_s, of teacher m t', lsum_m
and p_m likewise, and shares a, the mixture is p = sum_m a_m p_m and the loss

    D = sum_c p_c r_c = sum_m a_m inner_m,   r = log p - log q,   inner_m = sum_c p_mc r_c.

log p_c is that of the largest part a_m p_mc, whose difference to log q_c is formed from differences
to the maxima, and log(p_c / largest part), of a number from 1 to M: no digits of p are needed where
it is tiny, and a single teacher that the student equals but for a constant gives exactly 0.

Gradients. d log q_c / d s_k = ([c = k] - q_k) / T, so dD/ds_k = (q_k sum_m a_m - p_k) / T: shares
are free numbers, whose sum need not be 1. And dD/da_m = sum_c p_mc (r_c + 1) = inner_m + 1, which
the forward has: the backward reads the logits for the student's gradient alone. A share of 0 has no
part in the loss, and no gradient.

A class without mass in the mixture counts exactly 0, written ``p == 0`` so that a NaN fails the
test and stays visible; so it does where it is of a teacher that nobody listens to, in every class
of whom it is by then.

Bytes moved (b per element, N rows, M teachers, C classes), reads that the L2 answers included: the
forward 2 (1 + M) NCb, or half of it where a row fits a block; the backward (2 + M) NCb.

Legend: ROWS rows a program, TEACHERS lanes for M of them, BLOCK classes at a time; ``_s`` student,
``_t`` teachers; rate = log2(e) / T, cool = 1 / T. Strides in units of ALIGN elements.
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
    in_rows,
    narrow,
    refuse_doubles,
    stride_of,
)

LN_2: tl.constexpr = tl.constexpr(math.log(2.0))
INFINITY: tl.constexpr = tl.constexpr(math.inf)
# Where a running maximum starts: finite, so that no class at all never makes inf - inf.
LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
# Statistics of the student and of each teacher, see metakd.ops.
OF_STUDENT: tl.constexpr = tl.constexpr(2)
OF_TEACHER: tl.constexpr = tl.constexpr(3)

# Nothing is compiled anew for another value of these.
UNSPECIAL = ["N", "M", "stride_s", "stride_t", "stride_m", "stride_mask", "stride_drows"]


@triton.jit
def _places(mask, stride_mask, N, M, ROWS: tl.constexpr, TEACHERS: tl.constexpr):
    """Rows of the program [ROWS], which of them are inside and which real, lanes of teachers
    [TEACHERS], and which of both are some [ROWS, TEACHERS]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    real = inside
    if mask is not None:
        real &= tl.load(mask + row * stride_mask, mask=inside, other=0) != 0
    lane = tl.arange(0, TEACHERS)
    return row, inside, real, lane, real[:, None] & (lane < M)[None, :]


@triton.jit
def _load_block(at_s, at_t, real, told, first, C, BLOCK: tl.constexpr):
    """Logits [ROWS, BLOCK] and [ROWS, TEACHERS, BLOCK], -inf where there are none."""
    column = first + tl.arange(0, BLOCK)
    inside = column < C
    read_s = real[:, None] & inside[None, :]
    read_t = told[:, :, None] & inside[None, None, :]
    s = tl.load(at_s[:, None] + column[None, :], mask=read_s, other=-INFINITY)
    t = tl.load(at_t[:, :, None] + column[None, None, :], mask=read_t, other=-INFINITY)
    return s.to(tl.float32), t.to(tl.float32)


@triton.jit
def _load_shares(shares, row, lane, told, M):
    """Less than nothing has no logarithm."""
    at = shares + row[:, None] * M + lane[None, :]
    share = tl.load(at, mask=told, other=0.0).to(tl.float32)
    return tl.where(share >= 0, share, float("nan"))


@triton.jit(do_not_specialize=UNSPECIAL)
def _mixture_kl_kernel(
    student, teacher, shares, mask, rows, stats,
    stride_s, stride_t, stride_m, stride_mask, N, M, C, rate, cool, scale,
    ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    ROWS: tl.constexpr, TEACHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, inside, real, lane, told = _places(mask, stride_mask, N, M, ROWS, TEACHERS)
    at_s = student + row * stride_s * ALIGN_S
    at_t = teacher + (row[:, None] * stride_t + lane.to(tl.int64)[None, :] * stride_m) * ALIGN_T

    max_s, sum_s = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    max_t, sum_t = (
        tl.full([ROWS, TEACHERS], LOWEST, tl.float32),
        tl.zeros([ROWS, TEACHERS], tl.float32),
    )
    for first in range(0, C, BLOCK):
        s, t = _load_block(at_s, at_t, real, told, first, C, BLOCK)
        new_s, new_t = tl.maximum(max_s, tl.max(s, 1)), tl.maximum(max_t, tl.max(t, 2))
        sum_s *= tl.exp2((max_s - new_s) * rate)
        sum_t *= tl.exp2((max_t - new_t) * rate)
        sum_s += tl.sum(tl.exp2((s - new_s[:, None]) * rate), 1)
        sum_t += tl.sum(tl.exp2((t - new_t[:, :, None]) * rate), 2)
        max_s, max_t = new_s, new_t
    # NaN for a row whose classes are all -inf, as log_softmax has it.
    sum_s = tl.where(sum_s == 0, float("nan"), sum_s)
    sum_t = tl.where(told, tl.where(sum_t == 0, float("nan"), sum_t), 1.0)

    share = _load_shares(shares, row, lane, told, M)
    # A maximum below may pass over a NaN of the student's.
    share = tl.where((sum_s == sum_s)[:, None], share, float("nan"))
    weight = share / sum_t
    offset = tl.log2(share * (sum_s[:, None] / sum_t)) * LN_2
    inner = tl.zeros([ROWS, TEACHERS], tl.float32)
    for first in range(0, C, BLOCK):
        s, t = _load_block(at_s, at_t, real, told, first, C, BLOCK)
        from_s, from_t = s - max_s[:, None], t - max_t[:, :, None]
        power = tl.exp2(from_t * rate)
        part = power * weight[:, :, None]
        p, largest = tl.sum(part, 1), tl.max(part, 1)
        gap = (from_t - from_s[:, None, :]) * cool + offset[:, :, None]
        gap = tl.max(tl.where(part == largest[:, None, :], gap, -INFINITY), 1)
        ratio = tl.where(p == 0, 0.0, gap + tl.log2(p / largest) * LN_2)  # log p - log q
        inner += tl.sum(tl.where(power == 0, 0.0, power * ratio[:, None, :]), 2)
    inner /= sum_t
    loss = scale * tl.sum(tl.where(share == 0, 0.0, share * inner), 1)
    tl.store(rows + row, tl.where(real, loss, 0.0), mask=inside)

    size = N.to(tl.int64)
    tl.store(stats + row, tl.where(real, max_s, 0.0), mask=inside)
    tl.store(stats + size + row, tl.where(real, tl.log2(sum_s) * LN_2, 0.0), mask=inside)
    stats += (lane.to(tl.int64) * OF_TEACHER + OF_STUDENT)[None, :] * size + row[:, None]
    write = inside[:, None] & (lane < M)[None, :]
    tl.store(stats, tl.where(told, max_t, 0.0), mask=write)
    tl.store(stats + size, tl.where(told, tl.log2(sum_t) * LN_2, 0.0), mask=write)
    tl.store(stats + 2 * size, tl.where(told, inner, 0.0), mask=write)


@triton.jit(do_not_specialize=UNSPECIAL)
def _mixture_kl_bwd_kernel(
    drows, student, teacher, shares, stats, mask, dstudent, dshares,
    stride_drows, stride_s, stride_t, stride_m, stride_mask, N, M, C, rate, cool, scale,
    ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    ROWS: tl.constexpr, TEACHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, inside, real, lane, told = _places(mask, stride_mask, N, M, ROWS, TEACHERS)
    at_s = student + row * stride_s * ALIGN_S
    at_t = teacher + (row[:, None] * stride_t + lane.to(tl.int64)[None, :] * stride_m) * ALIGN_T
    upstream = scale * tl.load(drows + row * stride_drows, mask=real, other=0.0)
    size = N.to(tl.int64)
    max_s = tl.load(stats + row, mask=real, other=0.0)
    lsum_s = tl.load(stats + size + row, mask=real, other=0.0) * LOG2_E
    stats += (lane.to(tl.int64) * OF_TEACHER + OF_STUDENT)[None, :] * size + row[:, None]
    max_t = tl.load(stats, mask=told, other=0.0)
    lsum_t = tl.load(stats + size, mask=told, other=0.0) * LOG2_E
    inner = tl.load(stats + 2 * size, mask=told, other=0.0)

    share = _load_shares(shares, row, lane, told, M)
    dshare = tl.where(share == 0, 0.0, upstream[:, None] * (inner + 1.0))
    at = dshares + row[:, None] * M + lane[None, :]
    dshare = narrow(tl.where(told, dshare, 0.0), dshares.dtype.element_ty)
    tl.store(at, dshare, mask=inside[:, None] & (lane < M)[None, :])

    heard, weight = tl.sum(share, 1)[:, None], (upstream * cool)[:, None]
    for first in range(0, C, BLOCK):
        s, t = _load_block(at_s, at_t, real, told, first, C, BLOCK)
        q = tl.exp2((s - max_s[:, None]) * rate - lsum_s[:, None])
        p = tl.exp2((t - max_t[:, :, None]) * rate - lsum_t[:, :, None])
        slope = weight * (heard * q - tl.sum(share[:, :, None] * p, 1))
        slope = narrow(tl.where(real[:, None], slope, 0.0), dstudent.dtype.element_ty)
        column = first + tl.arange(0, BLOCK)
        write = inside[:, None] & (column < C)[None, :]
        tl.store(dstudent + row[:, None] * C + column[None, :], slope, mask=write)


def mixture_shape(M: int, C: int) -> dict[str, int]:
    """Rows, lanes of teachers and classes of a tile: 16 logits of teachers a thread, but 16 classes
    of however many."""
    teachers = triton.next_power_of_2(M)
    block = min(triton.next_power_of_2(C), max(16, 2048 // teachers))
    rows = max(1, 2048 // (teachers * block))
    return {"ROWS": rows, "TEACHERS": teachers, "BLOCK": block, "num_warps": 4}


def _launch(
    kernel, student: Tensor, teacher: Tensor, shares: Tensor, mask: Tensor | None,
    temperature: float, scale: float, **others: Tensor | int,
) -> None:  # fmt: skip
    """``others``: what only this kernel has, by name."""
    refuse_doubles(student=student, teacher=teacher, shares=shares)
    student, teacher = in_rows(student), in_rows(teacher)
    (N, C), M = student.shape, teacher.shape[1]
    if N == 0:
        return
    unit_s, unit_t, shape = alignment(student), alignment(teacher), mixture_shape(M, C)
    args = {
        "student": student,
        "teacher": teacher,
        "shares": shares.contiguous(),
        "mask": mask,
        "stride_s": student.stride(0) // unit_s,
        "stride_t": teacher.stride(0) // unit_t,
        "stride_m": teacher.stride(1) // unit_t,
        "stride_mask": stride_of(mask),
        "N": N,
        "M": M,
        "C": C,
        "rate": LOG2_E.value / temperature,
        "cool": 1.0 / temperature,
        "scale": scale,
        "ALIGN_S": unit_s,
        "ALIGN_T": unit_t,
    }
    with torch.cuda.device_of(student):
        kernel[(triton.cdiv(N, shape["ROWS"]),)](**args, **others, **shape, **COMPILE)


def mixture_kl_fwd(
    student: Tensor,
    teacher: Tensor,
    shares: Tensor,
    mask: Tensor | None,
    temperature: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See ``metakd.ops.SCHEMAS``."""
    N, M = shares.shape
    rows = student.new_empty(N, dtype=torch.float32)  # [N]
    stats = rows.new_empty(OF_STUDENT.value + OF_TEACHER.value * M, N)
    settings = student, teacher, shares, mask, temperature, scale
    _launch(_mixture_kl_kernel, *settings, rows=rows, stats=stats)
    return rows, stats


def mixture_kl_bwd(
    drows: Tensor,
    student: Tensor,
    teacher: Tensor,
    shares: Tensor,
    stats: Tensor,
    mask: Tensor | None,
    temperature: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See ``metakd.ops.SCHEMAS``."""
    dstudent, dshares = student.new_empty(student.shape), shares.new_empty(shares.shape)
    _launch(
        _mixture_kl_bwd_kernel,
        *(student, teacher, shares, mask, temperature, scale),
        drows=drows,
        stride_drows=drows.stride(0),
        stats=stats.contiguous(),
        dstudent=dstudent,
        dshares=dshares,
    )
    return dstudent, dshares
