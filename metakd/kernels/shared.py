"""What the Triton kernels of the feature losses share: layers side by side in one launch, masks,
products that keep float32's digits, blocks of score maps and their gradients, and sums of partial
results in a fixed order.

Score maps. A program owns a block of rows, as queries or as keys, and walks the other side's rows
in blocks: a block of both models' raw products q.k is all of a map that ever exists. With
S_s = scale_s Q_s K_s^T and f a sum over visible pairs, dQ_s = scale_s (df/dS_s) K_s and
dK_s = scale_s (df/dS_s)^T Q_s; ``score_gradient_kernel`` has one formula of df/dS_s for each KIND,
derived in the module of its loss:

- SCORES, attention_score_mse: 2 (S_s - S_t)
- MAPS_KL, attention_map: P_s - P_t
- MAPS_SQUARED, attention_map: 2 P_s ((P_s - P_t) - inner)

A query sees keys from BEFORE positions before to AFTER behind its own (None: all), so a key is seen
by queries from AFTER before to BEFORE behind: the two change places with the roles. Blocks of
others that none of the own rows may see are not visited.

Each program computes the gradient of its own rows once as queries and once as keys, so nothing is
added atomically. The forward reads b (D_s + D_t) a query once and a key once for each block of
queries, from the L2 but for the first; the backward twice that, and writes 2 b D_s a token.
Products per visible pair, of 2 flops: forward D_s + D_t, backward 2 (D_s + D_t) + 2 D_s, the last
two in as many pieces as ``wide_dot`` takes.

Legend: n layers, B batch, A heads, L length, D head size, in blocks WIDTH wide; OWN rows of a
program, OTHER rows that it meets at a time; ``_s`` student, ``_t`` teacher, ``d`` gradient of.
Strides are passed in units of ALIGN elements, so that the compiler knows what they are a multiple
of. Imports torch, triton and ``metakd.errors``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakd.errors import UnsupportedError

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))

SCORES: tl.constexpr = tl.constexpr(0)
MAPS_KL: tl.constexpr = tl.constexpr(1)
MAPS_SQUARED: tl.constexpr = tl.constexpr(2)

# Of one launch: each has up to six pointers.
LAYERS = 16

# Names of the kernels' strides in batch, head and length, and of sizes: nothing is compiled anew
# for another value of these.
SIDES = ("qs", "ks", "qt", "kt")
GRADIENTS = ("dq", "dk")
SIZES = ["B", "A", "L", "qm_b", "km_b", *(f"{side}_{axis}" for side in SIDES for axis in "bal")]
GRADIENT_SIZES = SIZES + [f"{side}_{axis}" for side in GRADIENTS for axis in "bal"]
GRADIENT_SIZES += ["dh_n", "dh_b", "dh_a"]

# Triton 3.10 changes this default.
COMPILE = {"enable_fp_fusion": True}


# Layers, masks, rows


@triton.jit
def pick(tensors, layer):
    chosen = tensors[0]
    for other in tl.static_range(1, len(tensors)):
        chosen = tl.where(layer == other, tensors[other], chosen)
    return chosen


@triton.jit
def is_real(mask, place, L):
    real = place < L
    if mask is not None:
        real = real & (tl.load(mask + place, mask=real, other=0) != 0)
    return real


@triton.jit
def count_real(mask, L, STEP: tl.constexpr):
    """At least 1, what a mean divides by."""
    count = tl.zeros([STEP], tl.int32)
    for first in range(0, L, STEP):
        count += is_real(mask, first + tl.arange(0, STEP), L).to(tl.int32)
    return tl.maximum(tl.sum(count, 0), 1).to(tl.float32)


@triton.jit
def places(place, stride, column, ALIGN: tl.constexpr):
    return place.to(tl.int64)[:, None] * stride * ALIGN + column[None, :]


@triton.jit
def load_rows(pointer, place, stride, real, column, D: tl.constexpr, ALIGN: tl.constexpr):
    """Zero where it is not real: what a mask hides has no say, whatever it holds."""
    inside = real[:, None] & (column < D)[None, :]
    return tl.load(pointer + places(place, stride, column, ALIGN), mask=inside, other=0.0)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # rounded here: the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


# Products


@triton.jit
def dot(a, b, total):
    """total + a b: halves on the tensor cores, float32 in full.

    A backward must meet the bits of its forward's scores, whatever the blocks and whichever factor
    comes first. On a GPU it does; in the interpreter, where numpy adds, if it adds in double. Left
    alone the interpreter would also take the bits of bfloat16 for integers."""
    if INTERPRETED:
        wide = tl.dot(a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64))
        return total + wide.to(tl.float32)
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _top(x, dtype: tl.constexpr):
    """What fits beside a factor of this dtype: bfloat16 has the range for it, beside float16 it is
    TF32, of which every half is one."""
    if dtype == tl.bfloat16:
        return x.to(tl.bfloat16)
    else:
        return (x.to(tl.int32, bitcast=True) & ~0x1FFF).to(tl.float32, bitcast=True)


@triton.jit
def wide_dot(a, b, total, PIECES: tl.constexpr):
    """total + a b where one factor is a half and the other is in float32, of which it keeps 8 bits
    a piece beside bfloat16 and 11 beside float16."""
    if a.dtype == b.dtype:
        total = dot(a, b, total)
    elif a.dtype == tl.float32:
        for _ in tl.static_range(PIECES):
            top = _top(a, b.dtype)
            a -= top.to(tl.float32)
            total = _tensor_dot(top, b.to(top.dtype), total)
    else:
        for _ in tl.static_range(PIECES):
            top = _top(b, a.dtype)
            b -= top.to(tl.float32)
            total = _tensor_dot(a.to(top.dtype), top, total)
    return total


@triton.jit
def _tensor_dot(a, b, total):
    if INTERPRETED:
        return dot(a, b, total)
    else:
        return tl.dot(a, b, total, input_precision="tf32")


# Score maps


@triton.jit
def head_of(tensors, layer, b, a, stride_b, stride_a, ALIGN: tl.constexpr):
    """Where a head's rows start."""
    return pick(tensors, layer) + (b * stride_b + a * stride_a) * ALIGN


@triton.jit
def others_of(own, own_real, L, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """The first other row that the own rows may see, and the last one plus one."""
    start, end = 0, L
    if BEFORE is not None:
        start = tl.maximum(tl.min(own, 0) - BEFORE, 0)
    if AFTER is not None:
        end = tl.minimum(tl.max(own, 0) + AFTER + 1, L)
    return start, tl.where(tl.max(own_real.to(tl.int32), 0) > 0, end, start)


@triton.jit
def query_block(
    head, block, query_s, key_s, query_t, key_t, query_mask,
    B, A, L, qs_b, qs_a, qs_l, ks_b, ks_a, qt_b, qt_a, qt_l, kt_b, kt_a, qm_b,
    D_S: tl.constexpr, D_T: tl.constexpr, ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """A block of a head's queries as own rows: their places, which are real, both models' rows, and
    where its keys start."""
    layer, b, a = head // A // B, head // A % B, head % A
    own = block * OWN + tl.arange(0, OWN)
    if query_mask is not None:
        query_mask += b * qm_b
    real = is_real(query_mask, own, L)
    own_s = load_rows(
        head_of(query_s, layer, b, a, qs_b, qs_a, ALIGN_S), own, qs_l, real,
        tl.arange(0, WIDTH_S), D_S, ALIGN_S,
    )  # fmt: skip
    own_t = load_rows(
        head_of(query_t, layer, b, a, qt_b, qt_a, ALIGN_T), own, qt_l, real,
        tl.arange(0, WIDTH_T), D_T, ALIGN_T,
    )  # fmt: skip
    key_s = head_of(key_s, layer, b, a, ks_b, ks_a, ALIGN_S)
    key_t = head_of(key_t, layer, b, a, kt_b, kt_a, ALIGN_T)
    return own, real, own_s, own_t, key_s, key_t


@triton.jit
def scaled_from(x, rate, origin):
    """rate * x - origin, rounded once."""
    return tl.fma(x, tl.full(x.shape, rate, tl.float32), -origin)


@triton.jit
def probability(x, rate, maximum, log_sum, FROM_MAXIMUM: tl.constexpr):
    """2^(rate x) over a row's sum of such, of which log_sum is the logarithm to base 2: of the sum
    itself, or counted from rate * maximum."""
    if FROM_MAXIMUM:
        return tl.exp2((x - maximum) * rate - log_sum)
    else:
        return tl.exp2(scaled_from(x, rate, log_sum))


@triton.jit
def score_block(
    own_s, own_t, own, own_real, other_s, other_t, stride_s, stride_t, other_mask, first, L,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr,
    ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """Own rows against the block of others from ``first``: both models' products [OWN, OTHER],
    which of them are visible, the others' places and their student rows."""
    other = first + tl.arange(0, OTHER)
    real = is_real(other_mask, other, L)
    rows_s = load_rows(other_s, other, stride_s, real, tl.arange(0, WIDTH_S), D_S, ALIGN_S)
    rows_t = load_rows(other_t, other, stride_t, real, tl.arange(0, WIDTH_T), D_T, ALIGN_T)
    none = tl.zeros([own.shape[0], OTHER], tl.float32)
    s = dot(own_s, tl.trans(rows_s), none)
    t = dot(own_t, tl.trans(rows_t), none)
    visible = own_real[:, None] & real[None, :]
    if BEFORE is not None:
        visible = visible & (own[:, None] <= other[None, :] + BEFORE)
    if AFTER is not None:
        visible = visible & (other[None, :] <= own[:, None] + AFTER)
    return s, t, visible, other, rows_s


@triton.jit
def _load_stats(stats, maxima, row, inside, L):
    """Of both models, log2 of the sum and the maximum from which it is counted; and the third."""
    log_s = tl.load(stats + row, mask=inside, other=0.0)
    log_t = tl.load(stats + L + row, mask=inside, other=0.0)
    third = tl.load(stats + 2 * L + row, mask=inside, other=0.0)
    if maxima is None:
        return log_s, log_t, third, log_s, log_t
    else:
        max_s = tl.load(maxima + row, mask=inside, other=0.0)
        return log_s, log_t, third, max_s, tl.load(maxima + L + row, mask=inside, other=0.0)


@triton.jit
def _map_slope(s, t, stats, scale_s, scale_t, maxima, KIND: tl.constexpr):
    """df/dS_s, but for the factor 2 of MAPS_SQUARED."""
    log_s, log_t, third, max_s, max_t = stats
    EXACT: tl.constexpr = maxima is not None
    p_s = probability(s, scale_s * LOG2_E, max_s, log_s, EXACT)
    p_t = probability(t, scale_t * LOG2_E, max_t, log_t, EXACT)
    if KIND == MAPS_KL:
        return p_s * third - p_t
    else:
        return p_s * ((p_s - p_t) - third)


@triton.jit
def _row_gradient(
    total, own_s, own_t, own, own_real, other_s, other_t, stride_s, stride_t, other_mask, stats,
    maxima, L, scale_s, scale_t,
    KIND: tl.constexpr, AS_QUERIES: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """total + (df/dS_s) others' rows, of the own rows in one role."""
    start, end = others_of(own, own_real, L, BEFORE, AFTER)
    if KIND != SCORES and AS_QUERIES:
        own_stats = _load_stats(stats, maxima, own[:, None], own_real[:, None], L)
    for first in range(start, end, OTHER):
        s, t, visible, other, rows_s = score_block(
            own_s, own_t, own, own_real, other_s, other_t, stride_s, stride_t, other_mask, first,
            L, BEFORE, AFTER, D_S, D_T, ALIGN_S, ALIGN_T, WIDTH_S, WIDTH_T, OTHER,
        )  # fmt: skip
        if KIND == SCORES:
            slope = s * scale_s - t * scale_t
        elif AS_QUERIES:
            slope = _map_slope(s, t, own_stats, scale_s, scale_t, maxima, KIND)
        else:
            row = other[None, :]
            other_stats = _load_stats(stats, maxima, row, row < L, L)
            slope = _map_slope(s, t, other_stats, scale_s, scale_t, maxima, KIND)
        total = wide_dot(tl.where(visible, slope, 0.0), rows_s, total, 2)
    return total


@triton.jit(do_not_specialize=GRADIENT_SIZES)
def score_gradient_kernel(
    dheads, query_s, key_s, query_t, key_t, query_mask, key_mask, stats, maxima, tiled,
    dquery, dkey,
    B, A, L, dh_n, dh_b, dh_a, dq_b, dq_a, dq_l, dk_b, dk_a, dk_l,
    qs_b, qs_a, qs_l, ks_b, ks_a, ks_l, qt_b, qt_a, qt_l, kt_b, kt_a, kt_l, qm_b, km_b,
    scale_s, scale_t,
    KIND: tl.constexpr, SAME: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """dquery and dkey of a block of rows, or of a head that is not ``tiled`` nothing. SAME: keys
    are the queries, dquery gets the sum."""
    blocks = tl.cdiv(L, OWN)
    head = tl.program_id(0).to(tl.int64) // blocks
    own = (tl.program_id(0) % blocks) * OWN + tl.arange(0, OWN)
    if tiled is not None:  # noqa: SIM102 (at compile time)
        if tl.load(tiled + head) == 0:
            return
    layer, b, a = head // A // B, head // A % B, head % A
    query_s = head_of(query_s, layer, b, a, qs_b, qs_a, ALIGN_S)
    key_s = head_of(key_s, layer, b, a, ks_b, ks_a, ALIGN_S)
    query_t = head_of(query_t, layer, b, a, qt_b, qt_a, ALIGN_T)
    key_t = head_of(key_t, layer, b, a, kt_b, kt_a, ALIGN_T)
    dquery = head_of(dquery, layer, b, a, dq_b, dq_a, ALIGN_S)
    dkey = head_of(dkey, layer, b, a, dk_b, dk_a, ALIGN_S)
    if query_mask is not None:
        query_mask += b * qm_b
    if key_mask is not None:
        key_mask += b * km_b
    if KIND != SCORES:
        stats += head * 3 * L
    if maxima is not None:
        maxima += head * 2 * L
    weight = scale_s * tl.load(dheads + layer * dh_n + b * dh_b + a * dh_a)
    if KIND != MAPS_KL:
        weight *= 2
    dtype: tl.constexpr = dquery.dtype.element_ty
    column_s, column_t = tl.arange(0, WIDTH_S), tl.arange(0, WIDTH_T)
    write = (own < L)[:, None] & (column_s < D_S)[None, :]

    real = is_real(query_mask, own, L)
    own_s = load_rows(query_s, own, qs_l, real, column_s, D_S, ALIGN_S)
    own_t = load_rows(query_t, own, qt_l, real, column_t, D_T, ALIGN_T)
    total = _row_gradient(
        tl.zeros([OWN, WIDTH_S], tl.float32), own_s, own_t, own, real,
        key_s, key_t, ks_l, kt_l, key_mask, stats, maxima, L, scale_s,
        scale_t, KIND, True, BEFORE, AFTER, D_S, D_T, ALIGN_S, ALIGN_T, WIDTH_S, WIDTH_T, OTHER,
    )  # fmt: skip
    if not SAME:
        at = dquery + places(own, dq_l, column_s, ALIGN_S)
        tl.store(at, narrow(tl.where(real[:, None], total * weight, 0.0), dtype), mask=write)
        total = tl.zeros([OWN, WIDTH_S], tl.float32)
        dquery = dkey

    real = is_real(key_mask, own, L)
    own_s = load_rows(key_s, own, ks_l, real, column_s, D_S, ALIGN_S)
    own_t = load_rows(key_t, own, kt_l, real, column_t, D_T, ALIGN_T)
    total = _row_gradient(
        total, own_s, own_t, own, real,
        query_s, query_t, qs_l, qt_l, query_mask, stats, maxima, L, scale_s,
        scale_t, KIND, False, AFTER, BEFORE, D_S, D_T, ALIGN_S, ALIGN_T, WIDTH_S, WIDTH_T, OTHER,
    )  # fmt: skip
    if SAME:
        real = real | is_real(query_mask, own, L)
    at = dquery + places(own, dq_l if SAME else dk_l, column_s, ALIGN_S)
    tl.store(at, narrow(tl.where(real[:, None], total * weight, 0.0), dtype), mask=write)


# Sums over the programs of a row


@triton.jit(do_not_specialize=["N", "PARTS"])
def _sum_parts_kernel(
    parts, only, total, N, PARTS, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """total [N] = sum of parts [PARTS, N], where ``only`` is set. STEP parts at a time, so that
    zeros behind them change no bit."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    if only is not None:
        inside = inside & (tl.load(only + at, mask=inside, other=0) != 0)
    found = tl.zeros([BLOCK], tl.float32)
    for first in range(0, PARTS, STEP):
        part = first + tl.arange(0, STEP)
        read = (part < PARTS)[:, None] & inside[None, :]
        where = part.to(tl.int64)[:, None] * N + at[None, :]
        found += tl.sum(tl.load(parts + where, mask=read, other=0.0), 0)
    tl.store(total + at, found, mask=inside)


def sum_parts(parts: Tensor, only: Tensor | None, total: Tensor) -> None:
    """total = sum of parts [PARTS, *total.shape] over the first dimension; where ``only`` is False
    it keeps what it has."""
    N = total.numel()
    if N:
        with torch.cuda.device_of(total):
            grid = (triton.cdiv(N, 64),)
            _sum_parts_kernel[grid](
                parts, only, total, N, len(parts), BLOCK=64, STEP=16, num_warps=2, **COMPILE
            )


# Launchers


def refuse_doubles(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            raise UnsupportedError(
                f"backend 'triton' does not compute in float64 ({name})", "use backend='reference'"
            )


def major(x: Tensor) -> int:
    """Of the compute capability; 0 in the interpreter."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0


def in_rows(x: Tensor) -> Tensor:
    """With unit stride in the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def runs(*roles: Sequence[Tensor]) -> list[slice]:
    """Neighbouring layers whose tensors are laid out alike: what one launch takes."""
    layouts = [[x.stride() for x in layer] for layer in zip(*roles)]
    starts = [0]
    for layer in range(1, len(layouts)):
        if layer - starts[-1] == LAYERS or layouts[layer] != layouts[layer - 1]:
            starts.append(layer)
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(layouts)])]


def alignment(*tensors: Tensor) -> int:
    """Elements, at most 16 bytes of them, of which all strides but the last are a multiple."""
    strides = (stride for x in tensors for stride in x.stride()[:-1])
    return math.gcd(16 // tensors[0].itemsize, *strides)


def stride_of(mask: Tensor | None) -> int:
    return 0 if mask is None else mask.stride(0)


def like(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results for gradients, and what kernels write in their place: with unit stride in the last
    dimension. ``hand_over`` brings the one to the other."""
    results = [torch.empty_like(x) for x in tensors]
    return results, [
        x if x.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in results
    ]


def hand_over(results: list[Tensor], written: list[Tensor]) -> list[Tensor]:
    for result, own in zip(results, written):
        if own is not result:
            result.copy_(own)
    return results


def head_width(D: int) -> int:
    """Columns of a block that holds a head; 16 is the least of a product."""
    return max(16, triton.next_power_of_2(D))


class Pairs:
    """n layers of queries and keys of both models, and masks, as the kernels take them."""

    def __init__(
        self, query_s: list[Tensor], key_s: list[Tensor], query_t: list[Tensor],
        key_t: list[Tensor], query_mask: Tensor | None, key_mask: Tensor | None,
        before: int | None, after: int | None, scale_s: float, scale_t: float,
    ):  # fmt: skip
        refuse_doubles(query_s=query_s[0], query_t=query_t[0])
        self.shape = len(query_s), *query_s[0].shape[:3]  # n, B, A, L
        self.sides = [[in_rows(x) for x in side] for side in (query_s, key_s, query_t, key_t)]
        masks = [None if mask is None else in_rows(mask) for mask in (query_mask, key_mask)]
        _, B, A, L = self.shape
        self.common = {
            "query_mask": masks[0],
            "key_mask": masks[1],
            "qm_b": stride_of(masks[0]),
            "km_b": stride_of(masks[1]),
            "B": B,
            "A": A,
            "L": L,
            "scale_s": scale_s,
            "scale_t": scale_t,
            "D_S": query_s[0].shape[3],
            "D_T": query_t[0].shape[3],
        }
        self.reach = {"BEFORE": before, "AFTER": after}
        self.sizes = self.common["D_S"], self.common["D_T"], max(x[0].itemsize for x in self.sides)
        self.device = query_s[0].device

    def per_head(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, B, A, *shape], to be filled by launches: without a token there are none."""
        n, B, A, L = self.shape
        make = torch.empty if L else torch.zeros
        return make(n, B, A, *shape, dtype=dtype, device=self.device)

    def launches(
        self, gradients: list[Tensor] | None = None, same: bool = False
    ) -> Iterator[tuple[slice, int, dict]]:
        """For each run of layers: which they are, their number of heads, and the kernel's arguments
        by name. gradients: of the queries, then, unless they are the same, of the keys."""
        n, B, A, L = self.shape
        if B * A * L == 0:
            return
        roles = list(self.sides)
        if gradients is not None:
            roles += [gradients[:n], gradients[:n] if same else gradients[n:]]
        for run in runs(*roles):
            of_run = [tuple(role[run]) for role in roles]
            first = [layers[0] for layers in of_run]
            unit_s, unit_t = alignment(*first[:2], *first[4:]), alignment(*first[2:4])
            args = dict(zip(("query_s", "key_s", "query_t", "key_t", "dquery", "dkey"), of_run))
            args |= {"ALIGN_S": unit_s, "ALIGN_T": unit_t}
            for side, x in zip(SIDES + GRADIENTS, first):
                unit = unit_t if side in ("qt", "kt") else unit_s
                args |= {f"{side}_{axis}": size // unit for axis, size in zip("bal", x.stride())}
            with torch.cuda.device_of(first[0]):
                yield run, len(of_run[0]) * B * A, self.common | args | COMPILE


def launches_in_parts(
    pairs: Pairs, own: int, heads: Tensor, only: Tensor | None = None
) -> Iterator[tuple[slice, tuple[int], dict]]:
    """As ``pairs.launches`` for kernels whose programs see ``own`` queries each: which layers, the
    grid, and the arguments, with ``parts`` to write sums of a block to. They are added up into
    ``heads`` afterwards, where ``only`` is not False."""
    for run, count, args in pairs.launches():
        blocks = triton.cdiv(args["L"], own)
        # One block is the whole sum.
        parts = heads[run] if blocks == 1 else heads.new_empty(blocks, *heads[run].shape)
        yield run, (count * blocks,), {"parts": parts, **args}
        if blocks > 1:
            sum_parts(parts, None if only is None else only[run], heads[run])


# Blocks of the kernels that walk score maps, by head sizes and bytes of the wider dtype; and bounds
# on registers where ptxas, left alone, would rather spill than take more. Nothing spills on sm_80,
# sm_90 and sm_100 (python tests/compile_triton.py --all), except that the backward of float32 heads
# wider than 64 under a causal mask spills up to 32 bytes. float32 is multiplied without tensor
# cores, from registers that hold rows of both factors: hence its small blocks.


def score_shape(D_s: int, D_t: int, itemsize: int) -> dict[str, int]:
    """Of the forward."""
    shape = {"WIDTH_S": head_width(D_s), "WIDTH_T": head_width(D_t), "num_warps": 4}
    if itemsize == 2:
        return shape | {"OWN": 64, "OTHER": 64, "num_stages": 2}
    own, registers = (32, 168) if max(D_s, D_t) <= 64 else (16, 128)
    return shape | {"OWN": own, "OTHER": 16, "num_stages": 1, "maxnreg": registers}


def gradient_shape(D_s: int, D_t: int, itemsize: int) -> dict[str, int]:
    """Of the backward."""
    shape = {"WIDTH_S": head_width(D_s), "WIDTH_T": head_width(D_t), "num_warps": 4}
    thin = max(D_s, D_t) <= 64
    if itemsize == 2:
        return shape | {"OWN": 64 if thin else 32, "OTHER": 32, "num_stages": 2}
    registers = 208 if thin else 168
    return shape | {"OWN": 16, "OTHER": 16, "num_stages": 1, "maxnreg": registers}


def score_gradient(
    dheads: Tensor, pairs: Pairs, stats: Tensor | None, maxima: Tensor | None,
    tiled: Tensor | None, kind: int, written: list[Tensor], same: bool = False,
) -> None:  # fmt: skip
    """Gradients of the queries, and of the keys unless they are the same, into ``written``."""
    D_s, D_t, itemsize = pairs.sizes
    shape = gradient_shape(D_s, D_t, itemsize)
    for run, heads, args in pairs.launches(written, same):
        grid = (heads * triton.cdiv(args["L"], shape["OWN"]),)
        score_gradient_kernel[grid](
            dheads[run],
            stats=None if stats is None else stats[run],
            maxima=None if maxima is None else maxima[run],
            tiled=None if tiled is None else tiled[run],
            dh_n=dheads.stride(0),
            dh_b=dheads.stride(1),
            dh_a=dheads.stride(2),
            KIND=kind,
            SAME=same,
            **pairs.reach,
            **args,
            **shape,
        )
