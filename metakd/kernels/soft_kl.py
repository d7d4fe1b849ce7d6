"""Triton kernels of the soft_kl family: temperature-softened KL, reverse KL and Jensen-Shannon
divergence between logits, with an optional cross-entropy against labels.

Launchers: ``soft_kl_fwd``, ``soft_kl_bwd``, ``soft_kl_fwd_bwd_``, with the names and signatures of
``metakd.ops.SCHEMAS``. Imports torch, triton and ``metakd.errors``.

Gradients. With s' = (s - max s) / T, lsum_s = log sum_c exp s'_c, log q = s' - lsum_s, of the
teacher t', lsum_t and log p likewise, and r = log p - log q = (t' - s') - (lsum_t - lsum_s):
d log q_c / d s_k = ([c = k] - q_k) / T. Hence

- forward KL: D = sum p r, so dD/ds_k = -sum_c p_c ([c = k] - q_k) / T = (q_k - p_k) / T.
- reverse KL: D = sum q g, g = -r. As dq_c/ds_k = q_c ([c = k] - q_k) / T,
  dD/ds_k = q_k (g_k - sum_c q_c g_c) / T + sum_c q_c d g_c / ds_k, and the last term is
  sum_c dq_c/ds_k = 0. So dD/ds_k = q_k (g_k - inner) / T with inner = sum q g = D.
- Jensen-Shannon: m = beta p + (1 - beta) q, D = beta KL(p || m) + (1 - beta) KL(q || m). Through
  log m, D changes by -sum_c (beta p_c + (1 - beta) q_c) / m_c dm_c = -sum_c dm_c = 0, and through
  log q by 0, as above. What is left is (1 - beta) sum_c dq_c (log q_c - log m_c), which is
  q_k (g_k - inner) / T with g = (1 - beta) (log q - log m) and inner = sum q g.
  With z = exp(-|r|) and w the weight of the larger of p and q, m is the larger times
  w + (1 - w) z: so log q - log m and log p - log m stay small numbers where p and q are close.
- cross-entropy (temperature 1): softmax(s)_k - [k = label].

Where one class has nearly all of q, the reverse KL and the mixture subtract from its g an inner
that is nearly the same; at a low temperature g is in the thousands and the digits that count would
be lost. Hence g, in inner too, is counted from its value at the student's maximum, where it is
exactly 0 then, and shift = t - max t there is kept for the backward.

A class without mass on the side that weighs it counts exactly 0, written ``p == 0`` so that a NaN
fails the test and stays visible.

Rows of up to ``TILE_CLASSES`` classes fit a tile and are read once. Longer ones are walked by one
program each. Every lane (16 bytes of a thread) keeps its own running maxima, so the loop has no
barrier and rescales once per lane and block: 2 + 2 / 8 exp2 a pair in half precision, against 4
with a maximum per element. The walk over a row that was just read goes backwards, because its end
is still in the L2. Rows whose pitch is no multiple of 16 bytes (30522 and 50257 classes) are cut at
aligned addresses instead of at their first class, so that all but the lanes at their ends are read
and written 16 bytes at a time.

Bytes moved (b per element, N rows, C classes), reads that the L2 answers included:

=======================  ===========  =========  ===============================================
.                        long rows    in a tile  .
=======================  ===========  =========  ===============================================
soft_kl_fwd, KL          2NCb         2NCb       a long row is read twice if its divergence is
                                                 infinite
soft_kl_fwd, JSD         4NCb         2NCb       m needs p and q normalised
soft_kl_bwd              3NCb         3NCb       reads both, writes one
fwd and bwd, KL or JSD   5 or 7NCb    5NCb
soft_kl_fwd_bwd_         5 or 7NCb    3NCb       long rows: 3NCb if the L2 holds all under way
=======================  ===========  =========  ===============================================

Legend: N rows, C classes in memory, V <= C classes that count, ROWS rows a program, LANES lanes of
PER classes; ``_s`` student, ``_t`` teacher; rate = log2(e) / T, cool = 1 / T; soft, hard: what the
derivatives of divergence and cross-entropy are multiplied by.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakd.errors import UnsupportedError

FORWARD: tl.constexpr = tl.constexpr(0)
REVERSE: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

STATS: tl.constexpr = tl.constexpr(7)  # statistics of a row, in the order of metakd.ops.STATS

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN_2: tl.constexpr = tl.constexpr(math.log(2.0))
INFINITY: tl.constexpr = tl.constexpr(math.inf)
# Where a running maximum starts: finite, so that no class at all never makes inf - inf.
LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
# Rows are cut at multiples of so many elements; 16 bytes in every dtype, and what Triton calls
# divisible.
CUT: tl.constexpr = tl.constexpr(16)

TILE_CLASSES = 2048
# Longer rows in one read, by a cluster that reduces over distributed shared memory. Needs compute
# capability 9.0 or 10.0 and Triton >= 3.8. Compiled and inspected, not run yet: hence off.
CLUSTERS = False
CLUSTER_CLASSES = 65536


# Element by element: the maths of the module docstring, for tiles of any shape


@triton.jit
def _over_mixture(r, beta):
    """log q - log m, log p - log m."""
    z = tl.exp2(-tl.abs(r) * LOG2_E)
    weight = tl.where(r >= 0, beta, 1.0 - beta)  # of the larger of p and q
    log_m = _log(weight + (1.0 - weight) * z)  # over the larger
    return -tl.maximum(r, 0.0) - log_m, tl.minimum(r, 0.0) - log_m


@triton.jit
def _shift(at_top, max_t, KIND: tl.constexpr):
    """From the teacher's logit at the student's maximum. If that is -inf, the reverse KL is
    infinite, and the mixture sees no difference between -inf and the lowest number."""
    shift = at_top - max_t
    if KIND == FORWARD:
        return tl.zeros_like(shift)
    else:
        return tl.where(shift == -INFINITY, 0.0 if KIND == REVERSE else LOWEST, shift)


@triton.jit
def _log_ratio(from_s, from_t, gap, shift, cool, KIND: tl.constexpr):
    """r; for the reverse KL less its value at the student's maximum."""
    if KIND == REVERSE:
        return ((from_t - shift) - from_s) * cool
    else:
        return (from_t - from_s) * cool - gap


@triton.jit
def _top(gap, shift, cool, beta, KIND: tl.constexpr):
    """What the mixture's log q - log m is counted from: its value at the student's maximum."""
    if KIND == JSD:
        top, _ = _over_mixture(shift * cool - gap, beta)
        return top
    else:
        return tl.zeros_like(gap)


@triton.jit
def _shares(q, p, r, top, beta, KIND: tl.constexpr):
    """Classes' parts of inner, but for its 1 - beta, and of the divergence, which for the reverse
    KL follows from inner."""
    if KIND == FORWARD:
        return tl.zeros_like(p), tl.where(p == 0, 0.0, p * r)
    elif KIND == REVERSE:
        return tl.where(q == 0, 0.0, q * -r), tl.zeros_like(q)
    else:
        q_over_m, p_over_m = _over_mixture(r, beta)
        by_p = tl.where(p == 0, 0.0, beta * p * p_over_m)
        by_q = tl.where(q == 0, 0.0, (1.0 - beta) * q * q_over_m)
        return tl.where(q == 0, 0.0, q * (q_over_m - top)), by_p + by_q


@triton.jit
def _divergence(inner, value, ratio, gap, shift, cool, beta, KIND: tl.constexpr):
    """Divergence and inner from the sums of ``_shares``. ratio: log sum_t / sum_s, gap: the same
    from two rounded logarithms. To first order the Jensen-Shannon divergence does not feel it."""
    if KIND == FORWARD:
        return value + (gap - ratio), inner
    elif KIND == REVERSE:
        return inner - shift * cool + ratio, inner
    else:
        return value, (1.0 - beta) * inner


@triton.jit
def _slope(q, p, r, top, inner, beta, KIND: tl.constexpr):
    """T dD/ds."""
    if KIND == FORWARD:
        return q - p
    elif KIND == REVERSE:
        return tl.where(q == 0, 0.0, q * (-r - inner))
    else:
        q_over_m, _ = _over_mixture(r, beta)
        return tl.where(q == 0, 0.0, q * ((1.0 - beta) * (q_over_m - top) - inner))


@triton.jit
def _log(x):
    return tl.log2(x) * LN_2


@triton.jit
def _log_sums(sum_s, sum_t):
    """lsum_s, lsum_t, and log sum_t / sum_s without their rounding. NaN for a row whose classes
    are all -inf, as log_softmax has it."""
    lsum_s = tl.where(sum_s == 0, float("nan"), _log(sum_s))
    lsum_t = tl.where(sum_t == 0, float("nan"), _log(sum_t))
    return lsum_s, lsum_t, _log(sum_t / sum_s)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # rounded here: the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _recall(s, t, max_s, lsum_s, max_t, lsum_t, shift, rate, cool, KIND: tl.constexpr):
    """q, p and r from the statistics."""
    from_s, from_t = s - max_s, t - max_t
    q = tl.exp2(from_s * rate - lsum_s * LOG2_E)
    p = tl.exp2(from_t * rate - lsum_t * LOG2_E)
    return q, p, _log_ratio(from_s, from_t, lsum_t - lsum_s, shift, cool, KIND)


@triton.jit
def _in_range(label, V):
    """In 32 bits, -1 where it is no class."""
    return tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)


# Short rows: all classes in a tile [ROWS, BLOCK], one read


@triton.jit(do_not_specialize=["N"])
def _soft_kl_tile_kernel(
    student, teacher, mask, label, drows, rows, stats,
    stride_s, stride_t, stride_mask, stride_label, stride_drows, N, V, C,
    rate, cool, scale, beta, hard_weight,
    KIND: tl.constexpr, IN_PLACE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rows; and, IN_PLACE, the gradient over the student's logits, or else stats."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = row < N
    real = inside
    if mask is not None:
        real &= tl.load(mask + row * stride_mask, mask=inside, other=0) != 0
    columns = tl.arange(0, BLOCK)[None, :]
    read = real[:, None] & (columns < V)
    student += row[:, None] * stride_s + columns
    teacher += row[:, None] * stride_t + columns
    s = tl.load(student, mask=read, other=-INFINITY).to(tl.float32)  # [ROWS, BLOCK]
    t = tl.load(teacher, mask=read, other=-INFINITY).to(tl.float32)

    max_s, max_t = tl.max(s, 1), tl.max(t, 1)
    from_s, from_t = s - max_s[:, None], t - max_t[:, None]
    q, p = tl.exp2(from_s * rate), tl.exp2(from_t * rate)
    sum_s, sum_t = tl.sum(q, 1), tl.sum(p, 1)
    q *= (1.0 / sum_s)[:, None]
    p *= (1.0 / sum_t)[:, None]
    lsum_s, lsum_t, ratio = _log_sums(sum_s, sum_t)
    gap = lsum_t - lsum_s
    shift = max_t
    if KIND != FORWARD:
        shift = tl.max(tl.where(from_s == 0, t, -INFINITY), 1)
    shift = _shift(shift, max_t, KIND)
    top = _top(gap, shift, cool, beta, KIND)
    r = _log_ratio(from_s, from_t, gap[:, None], shift[:, None], cool, KIND)
    inner, value = _shares(q, p, r, top[:, None], beta, KIND)
    divergence, inner = _divergence(
        tl.sum(inner, 1), tl.sum(value, 1), ratio, gap, shift, cool, beta, KIND
    )
    loss = scale * divergence
    sum_1 = sum_s
    if label is not None:
        at = _in_range(tl.load(label + row * stride_label, mask=real, other=0), V)
        is_label = columns == at[:, None]
        q_1 = tl.exp2(from_s * LOG2_E)
        sum_1 = tl.sum(q_1, 1)
        # Not loaded again: when writing in place, another thread may have been there.
        at_label = tl.sum(tl.where(is_label, from_s, 0.0), 1)
        loss += hard_weight * (_log(sum_1) - tl.where(at >= 0, at_label, float("nan")))
    tl.store(rows + row, tl.where(real, loss, 0.0), mask=inside)

    if IN_PLACE:
        weight = tl.load(drows + row * stride_drows, mask=real, other=0.0)
        slope = _slope(q, p, r, top[:, None], inner[:, None], beta, KIND)
        slope *= (weight * scale * cool)[:, None]
        if label is not None:
            q_1 *= (1.0 / sum_1)[:, None]
            slope += (weight * hard_weight)[:, None] * (q_1 - tl.where(is_label, 1.0, 0.0))
        slope = _narrow(tl.where(read, slope, 0.0), student.dtype.element_ty)
        tl.store(student, slope, mask=inside[:, None] & (columns < C))
        for start in range(BLOCK, C, BLOCK):
            beyond = inside[:, None] & (start + columns < C)
            tl.store(student + start, tl.zeros_like(slope), mask=beyond)
    else:
        stats += row
        size = N.to(tl.int64)
        tl.store(stats, tl.where(real, max_s, 0.0), mask=inside)
        tl.store(stats + size, tl.where(real, lsum_s, 0.0), mask=inside)
        tl.store(stats + 2 * size, tl.where(real, max_t, 0.0), mask=inside)
        tl.store(stats + 3 * size, tl.where(real, lsum_t, 0.0), mask=inside)
        tl.store(stats + 4 * size, tl.where(real, inner, 0.0), mask=inside)
        tl.store(stats + 5 * size, tl.where(real, _log(sum_1), 0.0), mask=inside)
        tl.store(stats + 6 * size, tl.where(real, shift, 0.0), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _soft_kl_bwd_tile_kernel(
    drows, student, teacher, stats, mask, label, dstudent,
    stride_drows, stride_s, stride_t, stride_mask, stride_label, N, V, C,
    rate, cool, scale, beta, hard_weight,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = row < N
    real = inside
    if mask is not None:
        real &= tl.load(mask + row * stride_mask, mask=inside, other=0) != 0
    columns = tl.arange(0, BLOCK)[None, :]
    read = real[:, None] & (columns < V)
    student += row[:, None] * stride_s + columns
    teacher += row[:, None] * stride_t + columns
    dstudent += row[:, None] * C + columns
    s = tl.load(student, mask=read, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    t = tl.load(teacher, mask=read, other=0.0).to(tl.float32)
    weight = tl.load(drows + row * stride_drows, mask=real, other=0.0)
    stats += row
    size = N.to(tl.int64)
    max_s = tl.load(stats, mask=real, other=0.0)[:, None]
    lsum_s = tl.load(stats + size, mask=real, other=0.0)[:, None]
    max_t = tl.load(stats + 2 * size, mask=real, other=0.0)[:, None]
    lsum_t = tl.load(stats + 3 * size, mask=real, other=0.0)[:, None]
    inner = tl.load(stats + 4 * size, mask=real, other=0.0)[:, None]
    shift = tl.load(stats + 6 * size, mask=real, other=0.0)[:, None]
    q, p, r = _recall(s, t, max_s, lsum_s, max_t, lsum_t, shift, rate, cool, KIND)
    top = _top(lsum_t - lsum_s, shift, cool, beta, KIND)
    slope = (weight * scale * cool)[:, None] * _slope(q, p, r, top, inner, beta, KIND)
    if label is not None:
        at = _in_range(tl.load(label + row * stride_label, mask=real, other=0), V)
        lsum_1 = tl.load(stats + 5 * size, mask=real, other=0.0)[:, None]
        q_1 = tl.exp2((s - max_s) * LOG2_E - lsum_1 * LOG2_E)
        hit = tl.where(columns == at[:, None], 1.0, 0.0)
        slope += (weight * hard_weight)[:, None] * (q_1 - hit)
    slope = _narrow(tl.where(read, slope, 0.0), dstudent.dtype.element_ty)
    tl.store(dstudent, slope, mask=inside[:, None] & (columns < C))
    for start in range(BLOCK, C, BLOCK):
        beyond = inside[:, None] & (start + columns < C)
        tl.store(dstudent + start, tl.zeros_like(slope), mask=beyond)


# Long rows: one row a program, walked in blocks [LANES, PER]. Places are counted from the cut that
# is ``lead`` elements ahead of the row's first class.


@triton.jit
def _lead(row, stride, SHARED_CUT: tl.constexpr):
    return ((row * stride) % (CUT if SHARED_CUT else 1)).to(tl.int32)


@triton.jit
def _from_cut(pointer, row, stride, lead, SHARED_CUT: tl.constexpr):
    start = row * stride - lead
    if SHARED_CUT:
        start = tl.multiple_of(start, CUT)
    return pointer + start


@triton.jit
def _extent(lead, V, SIZE: tl.constexpr):
    """Number of the first complete block, of the one after the last complete one, of incomplete
    ones."""
    first = (lead > 0).to(tl.int32)
    last = tl.maximum((lead + V) // SIZE, first)
    return first, last, tl.cdiv(lead + V, SIZE) - (last - first)


@triton.jit
def _places(SHARED_CUT: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr):
    """The first block's places [LANES, PER]. Neighbours are in one lane if it can be read at once,
    else in neighbouring lanes, so that a warp reads them in one piece."""
    lane, within = tl.arange(0, LANES)[:, None], tl.arange(0, PER)[None, :]
    if SHARED_CUT:
        return lane * PER + within
    else:
        return within * LANES + lane


@triton.jit
def _inside(place, lead, V):
    """Which lanes of a block hold nothing but classes; and which other places are classes."""
    inside = (place >= lead) & (place < lead + V)
    whole = tl.min(inside.to(tl.int32), 1)[:, None] > 0
    return whole, inside & ~whole


@triton.jit
def _read(pointer, place, lead, V, EDGE: tl.constexpr):
    if EDGE:
        whole, some = _inside(place, lead, V)
        ends = tl.load(pointer + place, mask=some, other=-INFINITY)
        x = tl.where(whole, tl.load(pointer + place, mask=whole, other=0.0), ends)
    else:
        x = tl.load(pointer + place)
    return x.to(tl.float32)


@triton.jit
def _finite(x):
    return tl.where(x == -INFINITY, 0.0, x)


@triton.jit
def _fold(
    student, teacher, places, block, lead, V,
    max_s, sum_s, max_t, sum_t, top_t, mean, sum_1, rate,
    KIND: tl.constexpr, LABEL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """A block into the lanes' running maxima, sums of exponentials, the teacher's logit where the
    student has its maximum (of several the largest) and, for the KLs, mean difference over the
    side that weighs: sum e_t ((t - max_t) - (s - max_s)), or sum e_s ((t - top_t) - (s - max_s)),
    to which the student's largest class adds exactly 0."""
    place = block * places.numel + places
    s = _read(student, place, lead, V, EDGE)
    t = _read(teacher, place, lead, V, EDGE)
    new_s, new_t = tl.maximum(max_s, tl.max(s, 1)), tl.maximum(max_t, tl.max(t, 1))
    from_s, from_t = s - new_s[:, None], t - new_t[:, None]
    e_s, e_t = tl.exp2(from_s * rate), tl.exp2(from_t * rate)
    keep_s, keep_t = tl.exp2((max_s - new_s) * rate), tl.exp2((max_t - new_t) * rate)
    if KIND == FORWARD:
        moved = (max_t - new_t) - (max_s - new_s)
        more = tl.where(e_t == 0, 0.0, e_t * (from_t - from_s))
        mean = keep_t * (mean + sum_t * moved) + tl.sum(more, 1)
    else:
        new_top = tl.max(tl.where(from_s == 0, t, -INFINITY), 1)
        new_top = tl.where(new_s == max_s, tl.maximum(top_t, new_top), new_top)
        if KIND == REVERSE:
            at_top = _finite(new_top)
            moved = (_finite(top_t) - at_top) - (max_s - new_s)
            more = tl.where(e_s == 0, 0.0, e_s * ((t - at_top[:, None]) - from_s))
            mean = keep_s * (mean + sum_s * moved) + tl.sum(more, 1)
        top_t = new_top
    if LABEL:
        keep_1 = tl.exp2((max_s - new_s) * LOG2_E)
        sum_1 = keep_1 * sum_1 + tl.sum(tl.exp2(from_s * LOG2_E), 1)
    sum_s = keep_s * sum_s + tl.sum(e_s, 1)
    sum_t = keep_t * sum_t + tl.sum(e_t, 1)
    return new_s, sum_s, new_t, sum_t, top_t, mean, sum_1


@triton.jit
def _block_shares(
    student, teacher, places, block, lead, V,
    max_s, sum_s, max_t, sum_t, gap, shift, top, rate, cool, beta,
    KIND: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    place = block * places.numel + places
    from_s = _read(student, place, lead, V, EDGE) - max_s
    from_t = _read(teacher, place, lead, V, EDGE) - max_t
    q = tl.exp2(from_s * rate) * (1.0 / sum_s)
    p = tl.exp2(from_t * rate) * (1.0 / sum_t)
    r = _log_ratio(from_s, from_t, gap, shift, cool, KIND)
    inner, value = _shares(q, p, r, top, beta, KIND)
    return tl.sum(inner, 1), tl.sum(value, 1)


@triton.jit
def _look_back(
    student, teacher, places, lead, V,
    max_s, sum_s, max_t, sum_t, ratio, gap, shift, rate, cool, beta,
    KIND: tl.constexpr,
):  # fmt: skip
    """Divergence and inner of a row whose maxima and sums are known."""
    first, last, incomplete = _extent(lead, V, places.numel)
    inner = tl.zeros([places.shape[0]], tl.float32)
    value = tl.zeros([places.shape[0]], tl.float32)
    top = _top(gap, shift, cool, beta, KIND)
    for back in range(first, last):
        more_inner, more = _block_shares(
            student, teacher, places, last - 1 - (back - first), lead, V,
            max_s, sum_s, max_t, sum_t, gap, shift, top, rate, cool, beta, KIND, False,
        )  # fmt: skip
        inner += more_inner
        value += more
    for edge in range(incomplete):
        more_inner, more = _block_shares(
            student, teacher, places, tl.where(edge < first, 0, last + edge - first), lead, V,
            max_s, sum_s, max_t, sum_t, gap, shift, top, rate, cool, beta, KIND, True,
        )  # fmt: skip
        inner += more_inner
        value += more
    return _divergence(tl.sum(inner, 0), tl.sum(value, 0), ratio, gap, shift, cool, beta, KIND)


@triton.jit
def _row_statistics(
    student, teacher, places, lead, V, rate, cool, beta,
    KIND: tl.constexpr, LABEL: tl.constexpr,
):  # fmt: skip
    """max_s, lsum_s, max_t, lsum_t, inner, lsum_1, shift and the divergence of a row."""
    first, last, incomplete = _extent(lead, V, places.numel)
    max_s = tl.full([places.shape[0]], LOWEST, tl.float32)
    max_t = tl.full([places.shape[0]], LOWEST, tl.float32)
    sum_s = tl.zeros([places.shape[0]], tl.float32)
    sum_t = tl.zeros([places.shape[0]], tl.float32)
    top_t = tl.full([places.shape[0]], -INFINITY, tl.float32)
    mean = tl.zeros([places.shape[0]], tl.float32)
    sum_1 = tl.zeros([places.shape[0]], tl.float32)
    for edge in range(incomplete):
        max_s, sum_s, max_t, sum_t, top_t, mean, sum_1 = _fold(
            student, teacher, places, tl.where(edge < first, 0, last + edge - first), lead, V,
            max_s, sum_s, max_t, sum_t, top_t, mean, sum_1, rate, KIND, LABEL, True,
        )  # fmt: skip
    for block in range(first, last):
        max_s, sum_s, max_t, sum_t, top_t, mean, sum_1 = _fold(
            student, teacher, places, block, lead, V,
            max_s, sum_s, max_t, sum_t, top_t, mean, sum_1, rate, KIND, LABEL, False,
        )  # fmt: skip

    row_s, row_t = tl.max(max_s, 0), tl.max(max_t, 0)
    row_top = row_t
    if KIND != FORWARD:
        row_top = tl.max(tl.where(max_s == row_s, top_t, -INFINITY), 0)
    behind_s, behind_t = max_s - row_s, max_t - row_t
    total_s = tl.sum(sum_s * tl.exp2(behind_s * rate), 0)
    total_t = tl.sum(sum_t * tl.exp2(behind_t * rate), 0)
    total_1 = tl.sum(sum_1 * tl.exp2(behind_s * LOG2_E), 0)
    lsum_s, lsum_t, ratio = _log_sums(total_s, total_t)
    gap = lsum_t - lsum_s
    shift = _shift(row_top, row_t, KIND)
    if KIND == FORWARD:
        keep = tl.exp2(behind_t * rate)
        mean = tl.where(keep == 0, 0.0, keep * (mean + sum_t * (behind_t - behind_s)))
        r = tl.sum(mean, 0) / total_t * cool - gap
        divergence, inner = _divergence(tl.zeros_like(r), r, ratio, gap, shift, cool, beta, KIND)
    elif KIND == REVERSE:
        keep = tl.exp2(behind_s * rate)
        behind = (_finite(top_t) - _finite(row_top)) - behind_s
        mean = tl.where(keep == 0, 0.0, keep * (mean + sum_s * behind))
        r = tl.sum(mean, 0) / total_s * cool
        divergence, inner = _divergence(-r, -r, ratio, gap, shift, cool, beta, KIND)
    else:
        divergence, inner = ratio * 0.0, ratio * 0.0
    # A difference of infinity counts only if its class has mass in the end, which a lane could not
    # know when it met it.
    if KIND == JSD or not (tl.abs(divergence) < INFINITY):
        divergence, inner = _look_back(
            student, teacher, places, lead, V,
            row_s, total_s, row_t, total_t, ratio, gap, shift, rate, cool, beta,
            KIND,
        )  # fmt: skip
    return row_s, lsum_s, row_t, lsum_t, inner, _log(total_1), shift, divergence


@triton.jit
def _block_gradient(
    dstudent, student, teacher, places, block, lead, V,
    max_s, lsum_s, max_t, lsum_t, inner, lsum_1, shift, top, rate, cool, beta, soft, hard,
    KIND: tl.constexpr, LABEL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    place = block * places.numel + places
    s = _read(student, place, lead, V, EDGE)
    t = _read(teacher, place, lead, V, EDGE)
    q, p, r = _recall(s, t, max_s, lsum_s, max_t, lsum_t, shift, rate, cool, KIND)
    slope = soft * _slope(q, p, r, top, inner, beta, KIND)
    if LABEL:
        slope += hard * tl.exp2((s - max_s) * LOG2_E - lsum_1 * LOG2_E)
    slope = _narrow(slope, dstudent.dtype.element_ty)
    if EDGE:
        whole, some = _inside(place, lead, V)
        tl.store(dstudent + place, slope, mask=some)
        tl.store(dstudent + place, slope, mask=whole)
    else:
        tl.store(dstudent + place, slope)


@triton.jit
def _row_gradient(
    dstudent, student, teacher, places, lead, V, label, s_label, t_label,
    max_s, lsum_s, max_t, lsum_t, inner, lsum_1, shift, rate, cool, beta, soft, hard,
    KIND: tl.constexpr, LABEL: tl.constexpr,
):  # fmt: skip
    """Backwards through the row. dstudent may be student: an element is read by who writes it."""
    first, last, incomplete = _extent(lead, V, places.numel)
    top = _top(lsum_t - lsum_s, shift, cool, beta, KIND)
    for back in range(first, last):
        _block_gradient(
            dstudent, student, teacher, places, last - 1 - (back - first), lead, V,
            max_s, lsum_s, max_t, lsum_t, inner, lsum_1, shift, top, rate, cool, beta, soft, hard,
            KIND, LABEL, False,
        )  # fmt: skip
    for edge in range(incomplete):
        _block_gradient(
            dstudent, student, teacher, places,
            tl.where(edge < first, 0, last + edge - first), lead, V,
            max_s, lsum_s, max_t, lsum_t, inner, lsum_1, shift, top, rate, cool, beta, soft, hard,
            KIND, LABEL, True,
        )  # fmt: skip
    if LABEL and label >= 0:
        # Once more with its -1: cheaper than looking for it in every block.
        tl.debug_barrier()
        q, p, r = _recall(s_label, t_label, max_s, lsum_s, max_t, lsum_t, shift, rate, cool, KIND)
        q_1 = tl.exp2((s_label - max_s) * LOG2_E - lsum_1 * LOG2_E)
        slope = soft * _slope(q, p, r, top, inner, beta, KIND) + hard * (q_1 - 1.0)
        tl.store(dstudent + lead + label, _narrow(slope, dstudent.dtype.element_ty))


@triton.jit
def _logit(pointer, label):
    return tl.load(pointer + label, mask=label >= 0, other=float("nan")).to(tl.float32)


@triton.jit
def _clear(pointer, start, end, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    for at in range(start, end, SIZE):
        zeros = tl.zeros([SIZE], pointer.dtype.element_ty)
        tl.store(pointer + at + columns, zeros, mask=at + columns < end)


@triton.jit(do_not_specialize=["N"])
def _soft_kl_row_kernel(
    student, teacher, mask, label, drows, rows, stats,
    stride_s, stride_t, stride_mask, stride_label, stride_drows, N, V, C,
    rate, cool, scale, beta, hard_weight,
    KIND: tl.constexpr, IN_PLACE: tl.constexpr, SHARED_CUT: tl.constexpr,
    LANES: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """rows; and, IN_PLACE, the gradient over the student's logits, or else stats."""
    row = tl.program_id(0).to(tl.int64)
    size = N.to(tl.int64)
    if mask is not None:  # noqa: SIM102 (at compile time)
        if tl.load(mask + row * stride_mask) == 0:
            tl.store(rows + row, 0.0)
            if IN_PLACE:
                _clear(student + row * stride_s, 0, C, LANES * PER)
            else:
                for which in tl.static_range(STATS):
                    tl.store(stats + which * size + row, 0.0)
            return
    lead = _lead(row, stride_s, SHARED_CUT)
    student = _from_cut(student, row, stride_s, lead, SHARED_CUT)
    teacher = _from_cut(teacher, row, stride_t, lead, SHARED_CUT)
    places = _places(SHARED_CUT, LANES, PER)
    LABEL: tl.constexpr = label is not None
    at, s_label, t_label = 0, 0.0, 0.0
    if LABEL:
        at = _in_range(tl.load(label + row * stride_label), V)
        # Before the reductions, whose barriers keep it ahead of the writing in place.
        s_label, t_label = _logit(student + lead, at), _logit(teacher + lead, at)
    max_s, lsum_s, max_t, lsum_t, inner, lsum_1, shift, divergence = _row_statistics(
        student, teacher, places, lead, V, rate, cool, beta, KIND, LABEL
    )
    loss = scale * divergence
    if LABEL:
        loss += hard_weight * (lsum_1 - (s_label - max_s))
    tl.store(rows + row, loss)
    if IN_PLACE:
        weight = tl.load(drows + row * stride_drows)
        _row_gradient(
            student, student, teacher, places, lead, V, at, s_label, t_label,
            max_s, lsum_s, max_t, lsum_t, inner, lsum_1, shift,
            rate, cool, beta, weight * scale * cool, weight * hard_weight,
            KIND, LABEL,
        )  # fmt: skip
        _clear(student + lead, V, C, LANES * PER)
    else:
        stats += row
        tl.store(stats, max_s)
        tl.store(stats + size, lsum_s)
        tl.store(stats + 2 * size, max_t)
        tl.store(stats + 3 * size, lsum_t)
        tl.store(stats + 4 * size, inner)
        tl.store(stats + 5 * size, lsum_1)
        tl.store(stats + 6 * size, shift)


@triton.jit(do_not_specialize=["N"])
def _soft_kl_bwd_row_kernel(
    drows, student, teacher, stats, mask, label, dstudent,
    stride_drows, stride_s, stride_t, stride_mask, stride_label, N, V, C,
    rate, cool, scale, beta, hard_weight,
    KIND: tl.constexpr, SHARED_CUT: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    size = N.to(tl.int64)
    if mask is not None:  # noqa: SIM102 (at compile time)
        if tl.load(mask + row * stride_mask) == 0:
            _clear(dstudent + row * C, 0, C, LANES * PER)
            return
    lead = _lead(row, stride_s, SHARED_CUT)
    student = _from_cut(student, row, stride_s, lead, SHARED_CUT)
    teacher = _from_cut(teacher, row, stride_t, lead, SHARED_CUT)
    dstudent = _from_cut(dstudent, row, C, lead, SHARED_CUT)
    places = _places(SHARED_CUT, LANES, PER)
    LABEL: tl.constexpr = label is not None
    at, s_label, t_label = 0, 0.0, 0.0
    if LABEL:
        at = _in_range(tl.load(label + row * stride_label), V)
        s_label, t_label = _logit(student + lead, at), _logit(teacher + lead, at)
    stats += row
    weight = tl.load(drows + row * stride_drows)
    _row_gradient(
        dstudent, student, teacher, places, lead, V, at, s_label, t_label,
        tl.load(stats), tl.load(stats + size), tl.load(stats + 2 * size),
        tl.load(stats + 3 * size), tl.load(stats + 4 * size), tl.load(stats + 5 * size),
        tl.load(stats + 6 * size),
        rate, cool, beta, weight * scale * cool, weight * hard_weight,
        KIND, LABEL,
    )  # fmt: skip
    _clear(dstudent + lead, V, C, LANES * PER)


# Table and launchers

# Triton 3.10 changes this default.
COMPILE = {"enable_fp_fusion": True}


# Shapes of blocks, warps and, where ptxas spills rather than take more or takes more than it needs,
# registers. Nothing spills on sm_80, sm_90 and sm_100 (python tests/compile_triton.py --all).


def tile_shape(V: int) -> dict[str, int]:
    """ROWS and BLOCK of a tile that holds all V classes: 8 elements a thread and tensor. With 16, a
    gradient in place takes 110 to 144 registers."""
    block = triton.next_power_of_2(V)
    shape = {
        "ROWS": max(1, min(256 // block, 64)),
        "BLOCK": block,
        "num_warps": max(1, block // 256),
    }
    return shape | {"maxnreg": 96} if block == TILE_CLASSES else shape


def cluster_shape(V: int) -> dict[str, int]:
    """A tile of one row over the 8 blocks of a cluster, up to ``CLUSTER_CLASSES`` classes."""
    block = triton.next_power_of_2(V)
    return {"ROWS": 1, "BLOCK": block, "num_warps": block // 2048, "num_ctas": 8}


def row_shape(
    operator: str, kind: int, itemsize: int, major: int, shared_cut: bool
) -> dict[str, int | bool]:
    """SHARED_CUT, LANES and PER of a block of a long row, by operator (fwd, bwd, fwd_bwd), KIND,
    bytes of the wider dtype and major compute capability (0 in the interpreter).

    A lane is 16 bytes of the wider dtype, a thread has two: 16 elements in half precision, 8 in
    float32. In half precision all but bwd and, held to 64 registers, fwd of the forward KL would
    spill or take too many: they have one lane and 40 to 64 registers. Loads under way in an SM, if
    all its warps are at that point: 64 KB with two lanes and 64 registers, 48 with two and 80, 41
    with one and 48.
    Without a shared cut a thread has one lane of 8 elements that are apart."""
    warps, lanes, per, shape = 8, 2, 16 // itemsize, {}
    if not shared_cut:
        lanes, per = 1, 8
        shape = {} if operator == "fwd" else {"maxnreg": 96}
    elif itemsize == 2 and operator != "bwd":
        if operator == "fwd" and kind == FORWARD.value and major < 10:
            shape = {"maxnreg": 64}
        else:
            lanes = 1
            if operator == "fwd_bwd" and kind == JSD.value:
                shape = {"maxnreg": 64}
    elif operator == "fwd_bwd" or (itemsize == 2 and kind == JSD.value):
        shape = {"maxnreg": 80}
    elif operator == "fwd" and kind == REVERSE.value:
        shape = {"maxnreg": 64}
    shape |= {"SHARED_CUT": shared_cut, "LANES": lanes * 32 * warps, "PER": per}
    return shape | {"num_warps": warps}


def _major(x: Tensor) -> int:
    """Of the compute capability; 0 in the interpreter."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0


def _settings(
    temperature: float, scale: float, beta: float, hard_weight: float
) -> tuple[list[float], int]:
    """The kernels' rate, cool, scale, beta, hard_weight; and KIND."""
    kind = {0.0: FORWARD, 1.0: REVERSE}.get(beta, JSD).value
    return [math.log2(math.e) / temperature, 1.0 / temperature, scale, beta, hard_weight], kind


def _checked(student: Tensor, teacher: Tensor) -> list[Tensor]:
    """Both with unit column stride."""
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits.dtype == torch.float64:
            raise UnsupportedError(
                f"backend 'triton' does not compute in float64 ({name})", "use backend='reference'"
            )
    return [x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher)]


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _shared_cut(*pitches: int) -> bool:
    """Whether all rows of one number lie equally far behind a cut."""
    return len({pitch % CUT.value for pitch in pitches}) == 1


def _forward(student, teacher, mask, label, drows, rows, stats, vocab_size, *settings) -> None:
    """Launches what ``soft_kl_fwd`` (stats) and ``soft_kl_fwd_bwd_`` (drows) share."""
    N, C = student.shape
    if N == 0:
        return
    numbers, kind = _settings(*settings)
    args = [student, teacher, mask, label, drows, rows, stats]
    args += [student.stride(0), teacher.stride(0)]
    args += [_stride(x) for x in (mask, label, drows)]
    args += [N, vocab_size, C, *numbers]
    options = {"KIND": kind, "IN_PLACE": stats is None, **COMPILE}
    major = _major(student)
    with torch.cuda.device_of(student):
        if vocab_size <= TILE_CLASSES:
            shape = tile_shape(vocab_size)
            grid = (triton.cdiv(N, shape["ROWS"]),)
            _soft_kl_tile_kernel[grid](*args, **options, **shape)
        elif CLUSTERS and major in (9, 10) and vocab_size <= CLUSTER_CLASSES:
            _soft_kl_tile_kernel[(N,)](*args, **options, **cluster_shape(vocab_size))
        else:
            operator = "fwd_bwd" if stats is None else "fwd"
            itemsize = max(student.itemsize, teacher.itemsize)
            cut = _shared_cut(student.stride(0), teacher.stride(0))
            shape = row_shape(operator, kind, itemsize, major, cut)
            _soft_kl_row_kernel[(N,)](*args, **options, **shape)


def soft_kl_fwd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    label: Tensor | None,
    vocab_size: int,
    temperature: float,
    scale: float,
    beta: float,
    hard_weight: float,
) -> tuple[Tensor, Tensor]:
    """See ``metakd.ops.SCHEMAS``."""
    student, teacher = _checked(student, teacher)
    rows = student.new_empty(len(student), dtype=torch.float32)  # [N]
    stats = student.new_empty(STATS.value, len(student), dtype=torch.float32)  # [STATS, N]
    settings = vocab_size, temperature, scale, beta, hard_weight
    _forward(student, teacher, mask, label, None, rows, stats, *settings)
    return rows, stats


def soft_kl_bwd(
    drows: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    mask: Tensor | None,
    label: Tensor | None,
    vocab_size: int,
    temperature: float,
    scale: float,
    beta: float,
    hard_weight: float,
) -> Tensor:
    """See ``metakd.ops.SCHEMAS``."""
    N, C = student.shape
    dstudent = student.new_empty(N, C)
    if N == 0:
        return dstudent
    student, teacher = _checked(student, teacher)
    numbers, kind = _settings(temperature, scale, beta, hard_weight)
    args = [drows, student, teacher, stats.contiguous(), mask, label, dstudent]
    args += [drows.stride(0), student.stride(0), teacher.stride(0), _stride(mask), _stride(label)]
    args += [N, vocab_size, C, *numbers]
    with torch.cuda.device_of(student):
        if vocab_size <= TILE_CLASSES:
            shape = tile_shape(vocab_size)
            grid = (triton.cdiv(N, shape["ROWS"]),)
            _soft_kl_bwd_tile_kernel[grid](*args, KIND=kind, **shape, **COMPILE)
        else:
            itemsize = max(student.itemsize, teacher.itemsize)
            cut = _shared_cut(student.stride(0), teacher.stride(0), C)
            shape = row_shape("bwd", kind, itemsize, _major(student), cut)
            _soft_kl_bwd_row_kernel[(N,)](*args, KIND=kind, **shape, **COMPILE)
    return dstudent


def soft_kl_fwd_bwd_(
    student: Tensor,
    teacher: Tensor,
    drows: Tensor,
    mask: Tensor | None,
    label: Tensor | None,
    vocab_size: int,
    temperature: float,
    scale: float,
    beta: float,
    hard_weight: float,
) -> Tensor:
    """See ``metakd.ops.SCHEMAS``."""
    rows = student.new_empty(len(student), dtype=torch.float32)  # [N]
    logits, teacher = _checked(student, teacher)
    settings = vocab_size, temperature, scale, beta, hard_weight
    _forward(logits, teacher, mask, label, drows, rows, None, *settings)
    if logits is not student:
        student.copy_(logits)
    return rows
