"""Triton kernels of attention_score_mse: the squared difference of two models' attention scores.

Launchers: ``attention_score_mse_fwd``, ``attention_score_mse_bwd``, with the names and signatures
of ``metakd.ops.SCHEMAS``. Imports torch, triton and ``metakd.kernels.shared``.

Two forms of f = sum over real queries i and keys j of (S_s - S_t)_ij^2, S = scale Q K^T.

- Tiles: the differences themselves, block by block. df/dS_s = 2 (S_s - S_t).
- Gram: with masked rows zero, X = [scale_s Q_s | -scale_t Q_t] and Y = [K_s | K_t] (L x W), the
  differences are X Y^T, so f = tr(X Y^T Y X^T) = <X^T X, Y^T Y>: linear in L. As both matrices are
  symmetric, df = 2 <X^T dX, Y^T Y> + 2 <X^T X, Y^T dY>, so df/dX = 2 X (Y^T Y) and df/dY = 2 Y (X^T
  X). Of these the student's columns: of the Gram matrices, too, only the student's columns are
  kept, and with dX_s = scale_s dQ_s

      dQ_s = 2 scale_s (scale_s Q_s (Y^T Y)_ss - scale_t Q_t (Y^T Y)_ts)
      dK_s = 2 (K_s (X^T X)_ss + K_t (X^T X)_ts)

  Where the models agree the parts <ss>, 2 <ts> and <tt> cancel: below guard * (<ss> + <tt>), which
  are the squares of both models' scores, a head goes by tiles.

Bytes moved by the Gram form (b per element, L tokens of a head): forward 2 L W b, once where heads
are up to 64 wide, and 8 W D_s; backward 2 L (W + D_s) b, and the Gram matrices, from the L2, for
each block of rows. Products, of 2 flops: forward 2 L (D_s^2 + D_s D_t + D_t^2), backward 2 L W D_s,
each three times with bfloat16, of whose factors one is in float32, and twice with float16. The
tiles' are in ``metakd.kernels.shared``.

Legend: as in ``metakd.kernels.shared``, and W = D_s + D_t; ``q_``, ``k_`` queries and keys.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakd.kernels import shared
from metakd.kernels.shared import (
    GRADIENT_SIZES,
    SCORES,
    SIZES,
    Pairs,
    dot,
    hand_over,
    head_of,
    head_width,
    is_real,
    launches_in_parts,
    like,
    load_rows,
    narrow,
    others_of,
    places,
    query_block,
    score_block,
    score_gradient,
    score_shape,
    wide_dot,
)

# Gram form


@triton.jit
def _store_block(gram, x, row, column, D_S: tl.constexpr, ROWS: tl.constexpr):
    at = gram + row[:, None] * D_S + column[None, :]
    tl.store(at, x, mask=(row < ROWS)[:, None] & (column < D_S)[None, :])


@triton.jit
def _common_dot(a, b, total):
    if a.dtype == b.dtype:
        return dot(a, b, total)
    else:
        return dot(a.to(tl.float32), b.to(tl.float32), total)


@triton.jit(do_not_specialize=SIZES)
def _gram_kernel(
    query_s, key_s, query_t, key_t, query_mask, key_mask, norm_t, heads, gram, tiled,
    B, A, L, qs_b, qs_a, qs_l, ks_b, ks_a, ks_l, qt_b, qt_a, qt_l, kt_b, kt_a, kt_l, qm_b, km_b,
    scale_s, scale_t, guard,
    D_S: tl.constexpr, D_T: tl.constexpr, ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A head: the Gram matrices in BLOCKS x BLOCKS blocks of each pair of models, the student's
    columns of which are stored, the value, and whether it is to be computed by tiles."""
    head = tl.program_id(0).to(tl.int64)
    layer, b, a = head // A // B, head // A % B, head % A
    query_s = head_of(query_s, layer, b, a, qs_b, qs_a, ALIGN_S)
    key_s = head_of(key_s, layer, b, a, ks_b, ks_a, ALIGN_S)
    query_t = head_of(query_t, layer, b, a, qt_b, qt_a, ALIGN_T)
    key_t = head_of(key_t, layer, b, a, kt_b, kt_a, ALIGN_T)
    if query_mask is not None:
        query_mask += b * qm_b
    if key_mask is not None:
        key_mask += b * km_b
    gram_x = gram + head * (2 * (D_S + D_T) * D_S)
    gram_y = gram_x + (D_S + D_T) * D_S
    by_s, by_t, by_both = 0.0, 0.0, 0.0

    for block in range(BLOCKS * BLOCKS):
        column_s = block % BLOCKS * WIDTH_S + tl.arange(0, WIDTH_S)
        column_t = block % BLOCKS * WIDTH_T + tl.arange(0, WIDTH_T)
        row_s = block // BLOCKS * WIDTH_S + tl.arange(0, WIDTH_S)
        row_t = block // BLOCKS * WIDTH_T + tl.arange(0, WIDTH_T)
        x_ss = tl.zeros([WIDTH_S, WIDTH_S], tl.float32)
        y_ss = tl.zeros([WIDTH_S, WIDTH_S], tl.float32)
        x_ts = tl.zeros([WIDTH_T, WIDTH_S], tl.float32)
        y_ts = tl.zeros([WIDTH_T, WIDTH_S], tl.float32)
        x_tt = tl.zeros([WIDTH_T, WIDTH_T], tl.float32)
        y_tt = tl.zeros([WIDTH_T, WIDTH_T], tl.float32)
        for first in range(0, L, STEP):
            place = first + tl.arange(0, STEP)
            real = is_real(query_mask, place, L)
            q_s = load_rows(query_s, place, qs_l, real, column_s, D_S, ALIGN_S)
            q_t = load_rows(query_t, place, qt_l, real, row_t, D_T, ALIGN_T)
            left_s, right_t = q_s, q_t
            if BLOCKS > 1:
                left_s = load_rows(query_s, place, qs_l, real, row_s, D_S, ALIGN_S)
                right_t = load_rows(query_t, place, qt_l, real, column_t, D_T, ALIGN_T)
            x_ss = dot(tl.trans(left_s), q_s, x_ss)
            x_ts = _common_dot(tl.trans(q_t), q_s, x_ts)
            if norm_t is None:
                x_tt = dot(tl.trans(q_t), right_t, x_tt)
            real = is_real(key_mask, place, L)
            k_s = load_rows(key_s, place, ks_l, real, column_s, D_S, ALIGN_S)
            k_t = load_rows(key_t, place, kt_l, real, row_t, D_T, ALIGN_T)
            left_s, right_t = k_s, k_t
            if BLOCKS > 1:
                left_s = load_rows(key_s, place, ks_l, real, row_s, D_S, ALIGN_S)
                right_t = load_rows(key_t, place, kt_l, real, column_t, D_T, ALIGN_T)
            y_ss = dot(tl.trans(left_s), k_s, y_ss)
            y_ts = _common_dot(tl.trans(k_t), k_s, y_ts)
            if norm_t is None:
                y_tt = dot(tl.trans(k_t), right_t, y_tt)
        x_ss *= scale_s * scale_s
        x_ts *= -scale_s * scale_t
        by_s += tl.sum(x_ss * y_ss)
        by_both += tl.sum(x_ts * y_ts)
        by_t += tl.sum(x_tt * y_tt)
        _store_block(gram_x, x_ss, row_s, column_s, D_S, D_S)
        _store_block(gram_y, y_ss, row_s, column_s, D_S, D_S)
        _store_block(gram_x + D_S * D_S, x_ts, row_t, column_s, D_S, D_T)
        _store_block(gram_y + D_S * D_S, y_ts, row_t, column_s, D_S, D_T)

    by_t *= scale_t * scale_t
    if norm_t is not None:
        by_t = tl.load(norm_t + head)
    value = by_s + 2 * by_both + by_t
    tl.store(heads + head, value)
    # Rounding may leave a value below 0, which guard = 0 takes as well.
    tl.store(tiled + head, (guard > 0) & (value < guard * (by_s + by_t)))


@triton.jit
def _add_product(
    total, rows, place, stride, real, gram, factor, column,
    D: tl.constexpr, D_S: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """total + factor * rows (of D columns) times gram [D, D_S], CHUNK columns at a time."""
    for first in range(0, D, CHUNK):
        within = first + tl.arange(0, CHUNK)
        x = load_rows(rows, place, stride, real, within, D, ALIGN)
        inside = (within < D)[:, None] & (column < D_S)[None, :]
        block = tl.load(gram + within[:, None] * D_S + column[None, :], mask=inside, other=0.0)
        total = wide_dot(x, block * factor, total, 3 if x.dtype == tl.bfloat16 else 2)
    return total


@triton.jit
def _times_gram(
    rows_s, rows_t, place, stride_s, stride_t, real, gram, factor_s, factor_t, column,
    D_S: tl.constexpr, D_T: tl.constexpr, ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    CHUNK_S: tl.constexpr, CHUNK_T: tl.constexpr,
):  # fmt: skip
    """factor_s rows_s gram_ss + factor_t rows_t gram_ts."""
    total = tl.zeros([place.shape[0], column.shape[0]], tl.float32)
    total = _add_product(
        total, rows_s, place, stride_s, real, gram, factor_s, column, D_S, D_S, ALIGN_S, CHUNK_S
    )
    return _add_product(
        total, rows_t, place, stride_t, real, gram + D_S * D_S, factor_t, column,
        D_T, D_S, ALIGN_T, CHUNK_T,
    )  # fmt: skip


@triton.jit(do_not_specialize=GRADIENT_SIZES)
def _gram_bwd_kernel(
    dheads, query_s, key_s, query_t, key_t, query_mask, key_mask, gram, tiled, dquery, dkey,
    B, A, L, dh_n, dh_b, dh_a, dq_b, dq_a, dq_l, dk_b, dk_a, dk_l,
    qs_b, qs_a, qs_l, ks_b, ks_a, ks_l, qt_b, qt_a, qt_l, kt_b, kt_a, kt_l, qm_b, km_b,
    scale_s, scale_t,
    D_S: tl.constexpr, D_T: tl.constexpr, ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    WIDTH_S: tl.constexpr, ROWS: tl.constexpr, CHUNK_S: tl.constexpr, CHUNK_T: tl.constexpr,
):  # fmt: skip
    """dquery or dkey of a block of rows, unless the head is ``tiled``."""
    blocks = tl.cdiv(L, ROWS)
    head = tl.program_id(0).to(tl.int64) // blocks
    if tiled is not None:  # noqa: SIM102 (at compile time)
        if tl.load(tiled + head) != 0:
            return
    layer, b, a = head // A // B, head // A % B, head % A
    weight = 2 * tl.load(dheads + layer * dh_n + b * dh_b + a * dh_a)
    place = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH_S)
    write = (place < L)[:, None] & (column < D_S)[None, :]
    gram_x = gram + head * (2 * (D_S + D_T) * D_S)
    gram_y = gram_x + (D_S + D_T) * D_S

    if query_mask is not None:
        query_mask += b * qm_b
    real = is_real(query_mask, place, L)
    x_s = head_of(query_s, layer, b, a, qs_b, qs_a, ALIGN_S)
    x_t = head_of(query_t, layer, b, a, qt_b, qt_a, ALIGN_T)
    total = _times_gram(
        x_s, x_t, place, qs_l, qt_l, real, gram_y, scale_s * scale_s, -scale_s * scale_t, column,
        D_S, D_T, ALIGN_S, ALIGN_T, CHUNK_S, CHUNK_T,
    )  # fmt: skip
    total = narrow(tl.where(real[:, None], total * weight, 0.0), x_s.dtype.element_ty)
    dquery = head_of(dquery, layer, b, a, dq_b, dq_a, ALIGN_S)
    tl.store(dquery + places(place, dq_l, column, ALIGN_S), total, mask=write)

    if key_mask is not None:
        key_mask += b * km_b
    real = is_real(key_mask, place, L)
    y_s = head_of(key_s, layer, b, a, ks_b, ks_a, ALIGN_S)
    y_t = head_of(key_t, layer, b, a, kt_b, kt_a, ALIGN_T)
    total = _times_gram(
        y_s, y_t, place, ks_l, kt_l, real, gram_x, 1.0, 1.0, column,
        D_S, D_T, ALIGN_S, ALIGN_T, CHUNK_S, CHUNK_T,
    )  # fmt: skip
    total = narrow(tl.where(real[:, None], total * weight, 0.0), y_s.dtype.element_ty)
    dkey = head_of(dkey, layer, b, a, dk_b, dk_a, ALIGN_S)
    tl.store(dkey + places(place, dk_l, column, ALIGN_S), total, mask=write)


# Tiles


@triton.jit(do_not_specialize=SIZES)
def _tile_kernel(
    query_s, key_s, query_t, key_t, query_mask, key_mask, tiled, parts,
    B, A, L, qs_b, qs_a, qs_l, ks_b, ks_a, ks_l, qt_b, qt_a, qt_l, kt_b, kt_a, kt_l, qm_b, km_b,
    scale_s, scale_t,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr,
    ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """parts [blocks of queries, heads] of the heads that are ``tiled``."""
    blocks = tl.cdiv(L, OWN)
    head = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    if tiled is not None:  # noqa: SIM102 (at compile time)
        if tl.load(tiled + head) == 0:
            return
    if key_mask is not None:
        key_mask += head // A % B * km_b
    own, real, own_s, own_t, key_s, key_t = query_block(
        head, block, query_s, key_s, query_t, key_t, query_mask,
        B, A, L, qs_b, qs_a, qs_l, ks_b, ks_a, qt_b, qt_a, qt_l, kt_b, kt_a, qm_b,
        D_S, D_T, ALIGN_S, ALIGN_T, WIDTH_S, WIDTH_T, OWN,
    )  # fmt: skip
    start, end = others_of(own, real, L, BEFORE, AFTER)
    total = tl.zeros([OWN], tl.float32)
    for first in range(start, end, OTHER):
        s, t, visible, _, _ = score_block(
            own_s, own_t, own, real, key_s, key_t, ks_l, kt_l, key_mask, first, L,
            BEFORE, AFTER, D_S, D_T, ALIGN_S, ALIGN_T, WIDTH_S, WIDTH_T, OTHER,
        )  # fmt: skip
        gap = tl.where(visible, s * scale_s - t * scale_t, 0.0)
        total += tl.sum(gap * gap, 1)
    heads = tl.num_programs(0).to(tl.int64) // blocks
    tl.store(parts + block * heads + head, tl.sum(total, 0))


# Table and launchers


def gram_shape(D_s: int, D_t: int, itemsize: int, major: int) -> dict[str, int]:
    """Of the forward, by head sizes, bytes of the wider dtype and major compute capability."""
    widest = max(head_width(D_s), head_width(D_t))
    most = 64 if widest <= 64 or itemsize == 4 or major >= 9 else 32
    shape = {
        "WIDTH_S": min(head_width(D_s), most),
        "WIDTH_T": min(head_width(D_t), most),
        "BLOCKS": max(1, widest // most),
    }
    if itemsize == 2:
        return shape | {"STEP": 32 if major >= 9 else 16, "num_warps": 8, "num_stages": 3}
    return shape | {"STEP": 16, "num_warps": 16, "num_stages": 1, "maxnreg": 128}


def gram_bwd_shape(D_s: int, D_t: int, itemsize: int) -> dict[str, int]:
    """Of the backward: CHUNK columns of a factor at a time."""
    chunk = 32 if itemsize == 2 else 16
    shape = {
        "WIDTH_S": head_width(D_s),
        "CHUNK_S": min(head_width(D_s), chunk),
        "CHUNK_T": min(head_width(D_t), chunk),
    }
    if itemsize == 2:
        return shape | {"ROWS": 64, "num_warps": 4 if D_s <= 64 else 8, "num_stages": 2}
    return shape | {"ROWS": 32, "num_warps": 8, "num_stages": 1, "maxnreg": 128}


def attention_score_mse_fwd(
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
    norm_t: Tensor | None,
    guard: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``metakd.ops.SCHEMAS``."""
    pairs = Pairs(
        query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t
    )
    D_s, D_t, _ = pairs.sizes
    by_tiles_alone = guard == math.inf
    assert by_tiles_alone or before is after is None, "a map with bounds has no Gram form"
    heads = pairs.per_head()
    gram = pairs.per_head(2, 0 if by_tiles_alone else D_s + D_t, D_s)
    tiled = torch.full_like(heads, by_tiles_alone, dtype=torch.bool)
    if not by_tiles_alone:
        shape = gram_shape(*pairs.sizes, shared.major(heads))
        norm_t = None if norm_t is None else norm_t.contiguous()
        for run, count, args in pairs.launches():
            args["norm_t"] = None if norm_t is None else norm_t[run]
            _gram_kernel[(count,)](
                heads=heads[run], gram=gram[run], tiled=tiled[run], guard=guard, **args, **shape
            )
    if guard > 0:
        shape = score_shape(*pairs.sizes)
        only = None if by_tiles_alone else tiled
        for run, grid, args in launches_in_parts(pairs, shape["OWN"], heads, only):
            of_run = None if only is None else only[run]
            _tile_kernel[grid](tiled=of_run, **pairs.reach, **args, **shape)
    return heads, gram, tiled


def attention_score_mse_bwd(
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
    gram: Tensor,
    tiled: Tensor,
    guard: float,
) -> list[Tensor]:
    """See ``metakd.ops.SCHEMAS``."""
    pairs = Pairs(
        query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t
    )
    results, written = like([*query_s, *key_s])
    if guard < math.inf:
        shape = gram_bwd_shape(*pairs.sizes)
        for run, count, args in pairs.launches(written):
            grid = (count * triton.cdiv(args["L"], shape["ROWS"]),)
            _gram_bwd_kernel[grid](
                dheads[run],
                gram=gram[run],
                tiled=tiled[run] if guard > 0 else None,
                dh_n=dheads.stride(0),
                dh_b=dheads.stride(1),
                dh_a=dheads.stride(2),
                **args,
                **shape,
            )
    if guard > 0:
        only = tiled if guard < math.inf else None
        score_gradient(dheads, pairs, None, None, only, SCORES.value, written)
    return hand_over(results, written)
