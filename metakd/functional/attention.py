"""Losses on attention, from queries and keys: scores before the softmax, maps after it, and
relations of a layer with itself.

Every loss takes one layer or a list of them, and a list is one call of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from metakd import ops, reference
from metakd.errors import UnsupportedError
from metakd.functional.checks import (
    MODULES,
    as_mask,
    check_choice,
    check_integer,
    check_positive,
    check_teacher,
    check_tensor,
    leave_out_weightless,
    reduce_rows,
    require,
    widest,
    without_autocast,
)
from metakd.reference import EVERYWHERE, Reach

Pair = tuple[Tensor, Tensor]  # (query, key)
Layers = tuple[list[Tensor], list[Tensor]]  # queries, keys

# Below this part of |S_s|^2 + |S_t|^2 the Gram form has lost too many digits of a head's loss: with
# form="auto" a compiled backend computes that head from tiles.
GRAM_GUARD = 1e-5


def _check_layers(name: str, states: Sequence[Tensor], first: Tensor, check) -> None:
    """Layers of a side have the shape and dtype of its first."""
    for tensor in states:
        check(name, tensor, first.shape, first.device)
        require(
            tensor.dtype == first.dtype,
            lambda: f"{name} must be {first.dtype} in all layers, got {tensor.dtype}",
        )


def _check_first(name: str, states: Tensor, shape: tuple[int | str, ...], check) -> None:
    check(name, states, shape)
    require(
        min(states.shape[1], states.shape[3]) >= 1,
        lambda: f"{name} must have A >= 1 and D >= 1, got shape {list(states.shape)}",
    )


def _check_sides(student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]]) -> None:
    """Both sides' states by name, one per layer: as many layers, one batch and length."""
    counts = [len(states) for states in (*student.values(), *teacher.values())]
    require(min(counts) >= 1, lambda: "student must hold at least one layer, got 0")
    require(
        len(set(counts)) == 1,
        lambda: f"teacher must hold as many layers as the student ({counts[0]}), got {counts[-1]}",
    )
    own, taught = (next(iter(side.values()))[0] for side in (student, teacher))
    _check_first(f"student{next(iter(student))}", own, ("B", "A_s", "L", "D_s"), check_tensor)
    batch, _, length, _ = own.shape
    _check_first(
        f"teacher{next(iter(teacher))}", taught, (batch, "A_t", length, "D_t"), check_teacher
    )
    require(
        own.device == taught.device,
        lambda: f"teacher must be on {own.device} like the student, got {taught.device}",
    )
    for name, states in student.items():
        _check_layers(f"student{name}", states, own, check_tensor)
    for name, states in teacher.items():
        _check_layers(f"teacher{name}", states, taught, check_teacher)


def _as_layers(name: str, side: Pair | Sequence[Pair]) -> Layers:
    """(query, key) or a list of such as the list of queries and the list of keys."""
    layers = [side] if _is_one(side) else side
    for pair in layers if isinstance(layers, (tuple, list)) else [layers]:
        require(
            isinstance(pair, (tuple, list)) and len(pair) == 2,
            lambda: f"{name} must be a pair (query, key) or a list of pairs, got {_kind(pair)}",
        )
    return [query for query, _ in layers], [key for _, key in layers]


def _is_one(side: Pair | Sequence[Pair]) -> TypeGuard[Pair]:
    """Is it one layer, and no list of them?"""
    return isinstance(side, (tuple, list)) and len(side) > 0 and isinstance(side[0], Tensor)


def _kind(value: object) -> str:
    return f"{len(value)} of them" if isinstance(value, (tuple, list)) else type(value).__name__


class _View(NamedTuple):
    """Which pairs of positions are compared, and how their number is counted."""

    query_mask: Tensor | None
    key_mask: Tensor | None
    reach: Reach
    scale: float | None
    mean_over: str

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        return self.query_mask, self.key_mask


def _attention(
    op: str,
    student: Pair | Sequence[Pair],
    teacher: Pair | Sequence[Pair],
    view: _View,
    weight: Tensor | None,
    reduction: str,
    backend: str,
    rows_of: Callable[..., Tensor],
    **options,
) -> Tensor:
    own, taught = _as_layers("student", student), _as_layers("teacher", teacher)
    _check_sides({" query": own[0], " key": own[1]}, {" query": taught[0], " key": taught[1]})
    check_choice("mean_over", view.mean_over, ("real", "all"))
    view = _checked(view, own[0][0])
    batch, _, length, _ = own[0][0].shape
    device = own[0][0].device
    query_mask, key_mask = (
        leave_out_weightless(mask, weight, (batch,), (batch, length), device) for mask in view.masks
    )
    heard = view._replace(query_mask=query_mask, key_mask=key_mask)
    rows = without_autocast(device, rows_of, op, backend, own, taught, heard, **options)
    real = [mask.any(1) for mask in view.masks if mask is not None]
    return reduce_rows(rows, weight, torch.stack(real).all(0) if real else None, reduction)


def _reach(causal: bool, window: int | None) -> Reach:
    if window is None:
        return None, 0 if causal else None
    check_integer("window", window, 0)
    return int(window), 0 if causal else int(window)


def _checked(view: _View, states: Tensor) -> _View:
    """With boolean masks that fit these states, and no bound that excludes none of them."""
    if view.scale is not None:
        check_positive("scale", view.scale)
    batch, _, length, _ = states.shape
    query_mask, key_mask = (
        as_mask(name, mask, (batch, length), states.device)
        for name, mask in zip(("query_mask", "key_mask"), view.masks)
    )
    before, after = (None if x is None or x >= length - 1 else x for x in view.reach)
    return _View(query_mask, key_mask, (before, after), view.scale, view.mean_over)


def _by_module(backend: str, op: str, student: Layers, teacher: Layers, *rest) -> Tensor:
    layers = zip(zip(*student), zip(*teacher))
    compute = getattr(MODULES[backend], op)
    return reduce(torch.add, [compute(own, taught, *rest) for own, taught in layers])


def _select(op: str, backend: str, student: Layers, teacher: Layers) -> str:
    own, taught = student[0][0], teacher[0][0]
    width = max(own.shape[3], taught.shape[3])
    return ops.select(op, backend, own.device, widest(own, taught), width)


def _factor(scale: float | None, states: Tensor) -> float:
    return states.shape[-1] ** -0.5 if scale is None else scale


def _score_rows(
    op: str,
    backend: str,
    student: Layers,
    teacher: Layers,
    view: _View,
    form: str,
    teacher_norm: Tensor | None,
) -> Tensor:
    factors = [_factor(view.scale, side[0][0]) for side in (student, teacher)]
    sides = [student, teacher]
    heads = [side[0][0].shape[1] for side in sides]
    own = student[0][0]
    require(
        form != "gram" or view.reach == EVERYWHERE,
        lambda: (
            f"form must be auto or tiled with a window within {own.shape[2]} positions, got 'gram'"
        ),
    )
    if teacher_norm is not None:
        shape = (*own.shape[:1], heads[1])
        if teacher_norm.dim() == 3:
            shape = (len(student[0]), *shape)
        check_teacher("teacher_norm", teacher_norm, shape, own.device)
        require(
            heads[0] == heads[1],
            lambda: f"teacher_norm is of single heads, got {heads[0]} and {heads[1]} of them",
        )
    if heads[0] != heads[1]:
        sides = [(_one_head(queries), _one_head(keys)) for queries, keys in sides]
        factors = [factor / count for factor, count in zip(factors, heads)]
    backend = _select(op, backend, *sides)
    if backend in MODULES:
        return _by_module(backend, op, student, teacher, *view, form)
    own, taught = sides[0][0][0], sides[1][0][0]
    guard = _gram_guard(form, view.reach, own.shape[2], own.shape[3] + taught.shape[3])
    if teacher_norm is not None:
        dtype = torch.promote_types(widest(own, taught), torch.float32)
        teacher_norm = teacher_norm.to(dtype).expand(len(student[0]), -1, -1)
        if view.query_mask is not None:  # no term cancels that of an example without real queries
            teacher_norm = teacher_norm.masked_fill(~view.query_mask.any(1)[:, None], 0.0)
    found, *_ = ops.compiled(backend, "attention_score_mse_fwd")(
        *sides[0], *sides[1], *view.masks, *view.reach, *factors, teacher_norm, guard
    )
    count = reference.count_pairs(own.shape[2], *view.masks, view.reach, view.mean_over)
    return found.sum((0, 2)) / (own.shape[1] * count)


def _one_head(states: list[Tensor]) -> list[Tensor]:
    """Heads side by side in one: its scores are the sum of theirs. [B, A, L, D] -> [B, 1, L, A *
    D]."""
    return [x.transpose(1, 2).flatten(2)[:, None] for x in states]


def _gram_guard(form: str, reach: Reach, length: int, width: int) -> float:
    """The ``guard`` of attention_score_mse_fwd.

    Gram matrices of width W = D_s + D_t pay off once the length reaches W. Measured forward and
    backward, C++ on a CPU, 2 threads, B 4, A 12, float32, tiles over Gram at L = 64, 96, 128: 1.0,
    1.4, 1.5 (W 64); 0.7, 1.0, 1.3 (W 90); 0.6, 0.7, 0.95 (W 128). Not measured on a GPU.
    """
    if form == "gram":
        return 0.0
    gram = form == "auto" and reach == EVERYWHERE and length >= width
    return GRAM_GUARD if gram else math.inf


def _map_rows(
    op: str,
    backend: str,
    student: Layers,
    teacher: Layers,
    view: _View,
    same: bool = False,
) -> Tensor:
    own, taught = student[0][0], teacher[0][0]
    heads = own.shape[1], taught.shape[1]
    chosen = _select(op, backend, student, teacher)
    if heads[0] != heads[1] and chosen not in MODULES:
        if backend != "auto":
            raise UnsupportedError(
                f"backend {backend!r} does not compute {op} of heads that differ in number {heads}",
                "use backend='auto' or backend='reference'",
            )
        chosen = "reference"
    squared = op == "attention_prob_mse"
    if chosen in MODULES:
        return _by_module(chosen, op, student, teacher, *view)
    factors = [_factor(view.scale, states) for states in (own, taught)]
    found, _ = ops.compiled(chosen, "attention_map_fwd")(
        *student, *teacher, *view.masks, *view.reach, *factors, squared, same
    )
    counter = reference.count_pairs if squared else reference.count_queries
    count = counter(own.shape[2], *view.masks, view.reach, view.mean_over)
    return found.sum((0, 2)) / (heads[0] * count)


def attention_score_mse(
    student: Pair | Sequence[Pair],
    teacher: Pair | Sequence[Pair],
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    mean_over: str = "real",
    form: str = "auto",
    teacher_norm: Tensor | None = None,
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
    Its rounding error is relative to ``||S_s||^2 + ||S_t||^2``, not to the loss (docs/kernels.md):
    under ``auto`` a compiled backend computes heads whose loss is below 1e-5 of that from tiles;
    the reference does not, so ask it for ``tiled`` where student and teacher agree to better than
    0.1 % (and do not let float32 products round to TF32). The tiled form keeps one tile of the
    score map at a time.

    Args:
        student: (query, key), each [B, A_s, L, D_s], or a list of such pairs, one per layer, whose
            losses are added.
        teacher: (query, key), each [B, A_t, L, D_t], or as many of them, without grad.
        query_mask: [B, L], which queries count; None: all, padding included.
        key_mask: [B, L], which keys count; None: all.
        causal: a query sees keys at its own position and before only (tiled form).
        window: a query sees keys at most so many positions of the padded sequence away, with
            ``causal`` before it only (tiled form); None: any. One of L - 1 or more hides nothing.
        scale: factor of the scores instead of 1 / sqrt(D), for both sides.
        mean_over: ``real`` or ``all``.
        form: ``auto`` (Gram for long inputs), ``gram`` or ``tiled``.
        teacher_norm: ``||S_t||^2`` by head from ``attention_score_norm`` under the same masks and
            scale, [B, A] (with a list of layers [n, B, A]): a teacher whose states are kept over
            epochs need not multiply them again. Only the Gram form of a compiled backend reads it.
        weight: [B], factor of each example; 0 leaves it out, but for the count of a mean.
        reduction: ``mean`` (over the examples with a real pair), ``sum``, or ``none`` (rows, [B]).
        backend: ``auto``, ``reference``, ``eager``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [B], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad; ``form="gram"`` with ``causal=True`` or a window of less than L - 1.
        UnsupportedError: the backend asked for cannot run here.

    Source: Jiao et al. 2020, *TinyBERT* (arXiv 1909.10351), equation 7; L_attn of Meta-KD.
    """
    check_choice("form", form, ("auto", "gram", "tiled"))
    require(
        not (causal and form == "gram"),
        lambda: "form must be auto or tiled with causal=True, got 'gram'",
    )
    view = _View(query_mask, key_mask, _reach(causal, window), scale, mean_over)
    asked = (student, teacher, view, weight, reduction, backend, _score_rows)
    return _attention("attention_score_mse", *asked, form=form, teacher_norm=teacher_norm)


def attention_score_norm(
    query: Tensor,
    key: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``||S||^2`` of each head, the sum of squares of its scores over real queries and keys, for
    ``attention_score_mse(teacher_norm=...)``.

    Args:
        query: [B, A, L, D].
        key: [B, A, L, D].
        query_mask: [B, L], which queries count; None: all.
        key_mask: [B, L], which keys count; None: all.
        scale: factor of the scores instead of 1 / sqrt(D).

    Returns:
        [B, A], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range.

    Source: ``||Q K^T||^2 = <Q^T Q, K^T K>``.
    """
    check_tensor("query", query, ("B", "A", "L", "D"))
    check_tensor("key", key, query.shape, query.device)
    view = _checked(_View(query_mask, key_mask, EVERYWHERE, scale, "real"), query)
    return without_autocast(query.device, reference.score_norm, query, key, *view.masks, view.scale)


def attention_kl(
    student: Pair | Sequence[Pair],
    teacher: Pair | Sequence[Pair],
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
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
        student: (query, key), each [B, A_s, L, D_s], or a list of such pairs, one per layer, whose
            losses are added.
        teacher: (query, key), each [B, A_t, L, D_t], or as many of them, without grad.
        query_mask: [B, L], which queries count; None: all.
        key_mask: [B, L], which keys count; None: all.
        causal: a query sees keys at its own position and before only.
        window: a query sees keys at most so many positions of the padded sequence away, with
            ``causal`` before it only; None: any.
        scale: factor of the scores instead of 1 / sqrt(D), for both sides.
        mean_over: ``real`` or ``all``.
        weight: [B], factor of each example; 0 leaves it out, but for the count of a mean.
        reduction: ``mean`` (over the examples with a real pair), ``sum``, or ``none`` (rows, [B]).
        backend: ``auto``, ``reference``, ``eager``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [B], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad.
        UnsupportedError: the backend asked for cannot run here.

    Source: Wang et al. 2020, *MiniLM* (arXiv 2002.10957), equation 6.
    """
    view = _View(query_mask, key_mask, _reach(causal, window), scale, mean_over)
    asked = (student, teacher, view, weight, reduction, backend, _map_rows)
    return _attention("attention_kl", *asked)


def attention_prob_mse(
    student: Pair | Sequence[Pair],
    teacher: Pair | Sequence[Pair],
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
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
        student: (query, key), each [B, A_s, L, D_s], or a list of such pairs, one per layer, whose
            losses are added.
        teacher: (query, key), each [B, A_t, L, D_t], or as many of them, without grad.
        query_mask: [B, L], which queries count; None: all.
        key_mask: [B, L], which keys count; None: all.
        causal: a query sees keys at its own position and before only.
        window: a query sees keys at most so many positions of the padded sequence away, with
            ``causal`` before it only; None: any.
        scale: factor of the scores instead of 1 / sqrt(D), for both sides.
        mean_over: ``real`` or ``all``.
        weight: [B], factor of each example; 0 leaves it out, but for the count of a mean.
        reduction: ``mean`` (over the examples with a real pair), ``sum``, or ``none`` (rows, [B]).
        backend: ``auto``, ``reference``, ``eager``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [B], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad.
        UnsupportedError: the backend asked for cannot run here.

    Source: the post-softmax variant of *TinyBERT* (arXiv 1909.10351), equation 7.
    """
    view = _View(query_mask, key_mask, _reach(causal, window), scale, mean_over)
    return _attention(
        "attention_prob_mse", student, teacher, view, weight, reduction, backend, _map_rows
    )


def relation_kl(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
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
        student: queries, keys or values, [B, A_s, L, D_s], or a list of such, whose losses are
            added.
        teacher: the same states of the teacher, [B, A_t, L, D_t], or as many, without grad.
        relation_heads: R, a divisor of A_s * D_s and of A_t * D_t.
        mask: [B, L], which tokens count.
        weight: [B], factor of each example; 0 leaves it out, but for the count of a mean.
        reduction: ``mean`` (over the examples with a real token), ``sum``, or ``none`` (rows, [B]).
        backend: ``auto``, ``reference``, ``eager``, ``cpp`` or ``triton``.

    Returns:
        The reduced loss, or rows [B], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad.
        UnsupportedError: the backend asked for cannot run here.

    Source: Wang et al. 2021, *MiniLMv2* (arXiv 2012.15828), equations 4 to 6.
    """
    own, taught = ([x] if isinstance(x, Tensor) else list(x) for x in (student, teacher))
    _check_sides({"": own}, {"": taught})
    check_integer("relation_heads", relation_heads, 1)
    for name, states in (("student", own[0]), ("teacher", taught[0])):
        width = states.shape[1] * states.shape[3]
        require(
            width % relation_heads == 0,
            lambda: f"relation_heads must divide the {name}'s width {width}, got {relation_heads}",
        )
    device, tokens = own[0].device, (own[0].shape[0], own[0].shape[2])
    mask = as_mask("mask", mask, tokens, device)
    heard = leave_out_weightless(mask, weight, tokens[:1], tokens, device)
    rows = without_autocast(device, _relation_rows, backend, own, taught, relation_heads, heard)
    return reduce_rows(rows, weight, None if mask is None else mask.any(1), reduction)


def _relation_rows(
    backend: str, student: list[Tensor], teacher: list[Tensor], heads: int, mask: Tensor | None
) -> Tensor:
    own, taught = ([reference.regroup(x, heads) for x in side] for side in (student, teacher))
    sides = (own, own), (taught, taught)
    backend = _select("relation_kl", backend, *sides)
    if backend in MODULES:
        compute = MODULES[backend].relation_kl
        rows = [compute(*layer, heads, mask) for layer in zip(student, teacher)]
        return reduce(torch.add, rows)
    view = _View(mask, mask, EVERYWHERE, None, "real")
    return _map_rows("relation_kl", backend, *sides, view, same=True)
