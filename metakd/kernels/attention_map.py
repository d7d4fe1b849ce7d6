"""Triton kernels of attention_map: the divergence of two models' attention maps, from queries and
keys, without a map in memory. Serves attention_kl, attention_prob_mse and relation_kl.

Launchers: ``attention_map_fwd``, ``attention_map_bwd``, with the names and signatures of
``metakd.ops.SCHEMAS``. Imports torch, triton and ``metakd.kernels.shared``.

Per query, with S = scale q.k over its visible keys j, P = softmax(S):

- KL = sum_j P_t (log P_t - log P_s). d log P_s,j / d S_s,k = [j = k] - P_s,k, so
  dKL/dS_s,k = -sum_j P_t,j ([j = k] - P_s,k) = P_s,k - P_t,k.
  In one pass: with running maxima m and e = exp(S - m), sums l = sum e and
  gap = sum e_t ((S_t - m_t) - (S_s - m_s)), KL = gap / l_t + log (l_s / l_t). When the maxima move
  by d = old - new, l becomes exp(d) l, and gap becomes exp(d_t) (gap + l_t (d_t - d_s)).
- squared = sum_j (P_s - P_t)^2. With g = 2 (P_s - P_t) and dP_s,j / dS_s,k = P_s,j ([j = k] -
  P_s,k), d/dS_s,k = P_s,k (g_k - sum_j P_s,j g_j) = 2 P_s,k ((P_s - P_t)_k - inner), inner =
  sum_j P_s (P_s - P_t). A second pass, because sums of squares would cancel where the maps agree.

Exponents are of 2: log2(e) is folded into the scale, of differences to a row's maximum. ``stats``
hold log2 sum_j exp(S - m) of both models and a third number.

- float32 students: m is the row's maximum, which the backward finds again; so P is as accurate as
  softmax has it, to which peaked maps are sensitive: their gradients are small differences of
  numbers near 1. The third is inner, or 1.
- students in half precision: m is 0, to save that pass over the scores. Where the logarithm is
  100, its rounding makes a whole row of P 1e-6 to 1e-5 too large or small: (1 + lost) P, lost being
  known. The third makes good for what would be felt of it: for the KL it is 1 + lost_t - lost_s,
  the factor of P_s by which sum_j (P_s - P_t) = 0; for squared it is inner of the maps that the
  backward will have, sum_j P_s ((1 + lost_s) P_s - (1 + lost_t) P_t).

A key without mass under P_t counts exactly 0, written ``e_t == 0`` so that a NaN fails the test and
stays visible.

What is moved and multiplied stands in ``metakd.kernels.shared``, squared's forward twice; and 12
bytes of statistics a query and head.

Legend: as in ``metakd.kernels.shared``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakd.kernels.shared import (
    LOG2_E,
    MAPS_KL,
    MAPS_SQUARED,
    SIZES,
    Pairs,
    hand_over,
    launches_in_parts,
    like,
    others_of,
    probability,
    query_block,
    score_block,
    score_gradient,
    score_shape,
)

LN_2: tl.constexpr = tl.constexpr(math.log(2.0))
INFINITY: tl.constexpr = tl.constexpr(math.inf)
# Where a running maximum starts: finite, so that no key at all never makes inf - inf.
LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize=SIZES)
def _attention_map_kernel(
    query_s, key_s, query_t, key_t, query_mask, key_mask, parts, stats, maxima,
    B, A, L, qs_b, qs_a, qs_l, ks_b, ks_a, ks_l, qt_b, qt_a, qt_l, kt_b, kt_a, kt_l, qm_b, km_b,
    scale_s, scale_t,
    SQUARED: tl.constexpr, EXACT: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """parts [blocks of queries, heads] and stats of a block of queries; or its maxima alone."""
    blocks = tl.cdiv(L, OWN)
    head = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    if key_mask is not None:
        key_mask += head // A % B * km_b
    own, real, own_s, own_t, key_s, key_t = query_block(
        head, block, query_s, key_s, query_t, key_t, query_mask,
        B, A, L, qs_b, qs_a, qs_l, ks_b, ks_a, qt_b, qt_a, qt_l, kt_b, kt_a, qm_b,
        D_S, D_T, ALIGN_S, ALIGN_T, WIDTH_S, WIDTH_T, OWN,
    )  # fmt: skip
    start, end = others_of(own, real, L, BEFORE, AFTER)
    rate_s, rate_t = scale_s * LOG2_E, scale_t * LOG2_E

    max_s = tl.full([OWN], LOWEST, tl.float32)
    max_t = tl.full([OWN], LOWEST, tl.float32)
    sum_s = tl.zeros([OWN], tl.float32)
    sum_t = tl.zeros([OWN], tl.float32)
    gap = tl.zeros([OWN], tl.float32)
    for first in range(start, end, OTHER):
        s, t, visible, _, _ = score_block(
            own_s, own_t, own, real, key_s, key_t, ks_l, kt_l, key_mask, first, L,
            BEFORE, AFTER, D_S, D_T, ALIGN_S, ALIGN_T, WIDTH_S, WIDTH_T, OTHER,
        )  # fmt: skip
        s, t = tl.where(visible, s, -INFINITY), tl.where(visible, t, -INFINITY)
        new_s, new_t = tl.maximum(max_s, tl.max(s, 1)), tl.maximum(max_t, tl.max(t, 1))
        if maxima is None:
            from_s, from_t = (s - new_s[:, None]) * rate_s, (t - new_t[:, None]) * rate_t
            moved_s, moved_t = (max_s - new_s) * rate_s, (max_t - new_t) * rate_t
            e_t, keep_t = tl.exp2(from_t), tl.exp2(moved_t)
            if not SQUARED:
                more = tl.where(e_t == 0, 0.0, e_t * (from_t - from_s))
                moved = tl.where(sum_t == 0, 0.0, sum_t * (moved_t - moved_s))
                gap = keep_t * (gap + moved) + tl.sum(more, 1)
            sum_s = tl.exp2(moved_s) * sum_s + tl.sum(tl.exp2(from_s), 1)
            sum_t = keep_t * sum_t + tl.sum(e_t, 1)
        max_s, max_t = new_s, new_t
    if maxima is not None:
        maxima += head * 2 * L
        tl.store(maxima + own, max_s, mask=own < L)
        tl.store(maxima + L + own, max_t, mask=own < L)
    else:
        counts = real & (sum_t != 0)
        log_s, log_t = tl.log2(sum_s), tl.log2(sum_t)
        if SQUARED:
            value = tl.zeros([OWN], tl.float32)
            inner = tl.zeros([OWN], tl.float32)
            square = tl.zeros([OWN], tl.float32)
            for first in range(start, end, OTHER):
                s, t, visible, _, _ = score_block(
                    own_s, own_t, own, real, key_s, key_t, ks_l, kt_l, key_mask, first, L,
                    BEFORE, AFTER, D_S, D_T, ALIGN_S, ALIGN_T, WIDTH_S, WIDTH_T, OTHER,
                )  # fmt: skip
                p_s = probability(s, rate_s, max_s[:, None], log_s[:, None], True)
                p_t = probability(t, rate_t, max_t[:, None], log_t[:, None], True)
                p_s, p_t = tl.where(visible, p_s, 0.0), tl.where(visible, p_t, 0.0)
                value += tl.sum((p_s - p_t) * (p_s - p_t), 1)
                inner += tl.sum(p_s * (p_s - p_t), 1)
                square += tl.sum(p_s * p_s, 1)
            third = inner
        else:
            value = (gap / sum_t + tl.log2(sum_s / sum_t)) * LN_2
            third = tl.full([OWN], 1.0, tl.float32)
        if not EXACT:
            lse_s, lse_t = max_s * rate_s + log_s, max_t * rate_t + log_t
            every_s, every_t = (
                tl.full([OWN], rate_s, tl.float32),
                tl.full([OWN], rate_t, tl.float32),
            )
            lost_s = (tl.fma(max_s, every_s, -lse_s) + log_s) * LN_2
            lost_t = (tl.fma(max_t, every_t, -lse_t) + log_t) * LN_2
            if SQUARED:
                third += lost_s * square - lost_t * (square - inner)
            else:
                third += lost_t - lost_s
            log_s, log_t = lse_s, lse_t

        heads = tl.num_programs(0).to(tl.int64) // blocks
        tl.store(parts + block * heads + head, tl.sum(tl.where(counts, value, 0.0), 0))
        stats += head * 3 * L
        tl.store(stats + own, tl.where(counts, log_s, 0.0), mask=own < L)
        tl.store(stats + L + own, tl.where(counts, log_t, 0.0), mask=own < L)
        tl.store(stats + 2 * L + own, tl.where(counts, third, 0.0), mask=own < L)


def map_shape(D_s: int, D_t: int, itemsize: int, squared: bool) -> dict[str, int]:
    """Of the forward. For the second pass ptxas would rather spill than take more registers."""
    shape = score_shape(D_s, D_t, itemsize)
    return shape | {"maxnreg": 255} if squared and itemsize == 2 else shape


def _exact(pairs: Pairs) -> bool:
    """Whether gradients show what the rounding of a logarithm does to a row of P."""
    return pairs.sides[0][0].dtype == torch.float32


def attention_map_fwd(
    query_s: list[Tensor],
    key_s: list[Tensor],
    query_t: list[Tensor],
    key_t: list[Tensor],
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    before: int | None,
    after: int | None,
    scale_s: float,
    scale_t: float,
    squared: bool,
    same: bool,
) -> tuple[Tensor, Tensor]:
    """See ``metakd.ops.SCHEMAS``."""
    pairs = Pairs(
        query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t
    )
    heads, stats = pairs.per_head(), pairs.per_head(3, pairs.shape[3])
    shape = map_shape(*pairs.sizes, squared)
    for run, grid, args in launches_in_parts(pairs, shape["OWN"], heads):
        _attention_map_kernel[grid](
            stats=stats[run],
            maxima=None,
            SQUARED=squared,
            EXACT=_exact(pairs),
            **pairs.reach,
            **args,
            **shape,
        )
    return heads, stats


def attention_map_bwd(
    dheads: Tensor,
    query_s: list[Tensor],
    key_s: list[Tensor],
    query_t: list[Tensor],
    key_t: list[Tensor],
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    before: int | None,
    after: int | None,
    scale_s: float,
    scale_t: float,
    stats: Tensor,
    squared: bool,
    same: bool,
) -> list[Tensor]:
    """See ``metakd.ops.SCHEMAS``."""
    pairs = Pairs(
        query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t
    )
    results, written = like(query_s if same else [*query_s, *key_s])
    maxima = None
    if _exact(pairs):
        maxima = pairs.per_head(2, pairs.shape[3])
        shape = map_shape(*pairs.sizes, False)
        for run, count, args in pairs.launches():
            _attention_map_kernel[(count * triton.cdiv(args["L"], shape["OWN"]),)](
                parts=None,
                stats=None,
                maxima=maxima[run],
                SQUARED=False,
                EXACT=True,
                **pairs.reach,
                **args,
                **shape,
            )
    kind = MAPS_SQUARED.value if squared else MAPS_KL.value
    score_gradient(dheads, pairs, stats.contiguous(), maxima, None, kind, written, same)
    return hand_over(results, written)
