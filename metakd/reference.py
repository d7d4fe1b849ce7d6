"""The oracle: every loss of metakd in eager PyTorch, on any device, in any floating dtype.

Each function returns **rows** (one value per token or example) before any weight, mean or sum;
formulas and sources stand in ``metakd.functional``. Inputs are trusted: the door has checked them.
Masks are boolean, True = real. Half precision is computed in float32, doubles stay double, and
nothing synchronises with the host. Imports torch only.

Two rules hold throughout. What a mask hides is replaced *before* any product, because zero times
NaN would still poison a gradient; and tests for "no mass" are written ``p == 0``, which a NaN
fails, so that NaN stays visible.

Legend: N rows, C classes, B batch, L length, H hidden size, A heads, D head size, K domains, M
classes of the task, R relation heads; ``_s`` student, ``_t`` teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Queries per tile of the attention losses: the largest score map alive is [B, A, QUERY_TILE, L].
QUERY_TILE = 256
# Where the Gram form of attention_score_mse starts to win over tiles (see prefers_gram).
GRAM_FROM_LENGTH = 256

Pair = tuple[Tensor, Tensor]
# How many positions before and after its own a query sees; None: all of them.
Reach = tuple[int | None, int | None]
EVERYWHERE: Reach = (None, None)


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest of their dtypes, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _common(*tensors: Tensor) -> list[Tensor]:
    """All tensors in the widest of their dtypes, float32 at least."""
    dtype = common_dtype(*tensors)
    return [tensor.to(dtype) for tensor in tensors]


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; classes without mass under p count exactly 0, whatever q
    says."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)


# Logits


def _from_logits(
    divergence: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    scale_by_temperature: bool,
) -> Tensor:
    log_s, log_t = (F.log_softmax(logits / temperature, -1) for logits in _common(student, teacher))
    return divergence(log_s, log_t) * (temperature**2 if scale_by_temperature else 1.0)


def soft_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, scale_by_temperature: bool = True
) -> Tensor:
    """[N, C], [N, C] -> rows [N]."""
    return _from_logits(
        lambda log_s, log_t: _divergence(log_t, log_s),
        student,
        teacher,
        temperature,
        scale_by_temperature,
    )


def soft_reverse_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, scale_by_temperature: bool = True
) -> Tensor:
    """[N, C], [N, C] -> rows [N]."""
    return _from_logits(_divergence, student, teacher, temperature, scale_by_temperature)


def soft_jsd(
    student: Tensor,
    teacher: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    """[N, C], [N, C] -> rows [N]."""
    if beta in (0.0, 1.0):
        end = soft_kl if beta == 0.0 else soft_reverse_kl
        return end(student, teacher, temperature, scale_by_temperature)

    def divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
        # logaddexp has no gradient where both sides are -inf; without mass any value will do.
        dead = (log_s == -math.inf) & (log_t == -math.inf)
        log_m = torch.logaddexp(
            log_t.masked_fill(dead, 0.0) + math.log(beta),
            log_s.masked_fill(dead, 0.0) + math.log1p(-beta),
        )
        return beta * _divergence(log_t, log_m) + (1.0 - beta) * _divergence(log_s, log_m)

    return _from_logits(divergence, student, teacher, temperature, scale_by_temperature)


def mixture_kl(
    student: Tensor,
    teachers: Tensor,
    shares: Tensor,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    """[N, C], [N, M, C], [N, M] -> rows [N]."""

    def divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
        unheard = share == 0  # has no logarithm with a gradient
        log_share = share.masked_fill(unheard, 1.0).log().masked_fill(unheard, -math.inf)
        parts = log_share[:, :, None] + log_t
        # Nor has logsumexp a gradient where no teacher gives a class any mass.
        dead = (parts == -math.inf).all(1)
        log_p = parts.masked_fill(dead[:, None], 0.0).logsumexp(1).masked_fill(dead, -math.inf)
        return _divergence(log_p, log_s)

    student, teachers, share = _common(student, teachers, shares)
    return _from_logits(divergence, student, teachers, temperature, scale_by_temperature)


def cross_entropy(student: Tensor, label: Tensor) -> Tensor:
    """[N, C], [N] -> rows [N]."""
    (student,) = _common(student)
    return F.cross_entropy(student, label, reduction="none")


# Hidden states


def hidden_mse(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Layers of [B, L, H] on both sides, mask [B, L] -> rows [B]."""
    batch, length, _ = student[0].shape
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=student[0].device)
    tokens = mask.sum(1).clamp(min=1)
    rows = []
    for layer_s, layer_t in zip(student, teacher):
        layer_s, layer_t = _common(layer_s, layer_t)
        residual = (layer_s - layer_t).masked_fill(~mask[:, :, None], 0.0)
        rows.append(residual.square().sum((1, 2)) / (tokens * residual.shape[2]))
    return reduce(torch.add, rows)


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, L, H], [B, L] -> [B, H] in the dtype of ``hidden``."""
    (values,) = _common(hidden)
    total = values.masked_fill(~mask[:, :, None], 0.0).sum(1)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(hidden.dtype)


# Attention


def _attention_inputs(
    student: Pair,
    teacher: Pair,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
) -> tuple[Pair, Pair, Tensor, Tensor]:
    """Both sides with hidden tokens zeroed and the scale folded into the queries, and both masks
    [B, L]."""
    tensors = _common(*student, *teacher)
    batch, _, length, _ = tensors[0].shape
    everyone = torch.ones(batch, length, dtype=torch.bool, device=tensors[0].device)
    query_mask = everyone if query_mask is None else query_mask
    key_mask = everyone if key_mask is None else key_mask

    def side(query: Tensor, key: Tensor) -> Pair:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        query = query.masked_fill(~query_mask[:, None, :, None], 0.0) * factor
        return query, key.masked_fill(~key_mask[:, None, :, None], 0.0)

    return side(*tensors[:2]), side(*tensors[2:]), query_mask, key_mask


def _real_below(key_mask: Tensor, offset: int) -> Tensor:
    """How many real keys stand before each position plus ``offset``: [B, L]."""
    length = key_mask.shape[1]
    place = torch.arange(offset, length + offset, device=key_mask.device).clamp(0, length)
    return F.pad(key_mask.cumsum(1), (1, 0))[:, place]


def _visible_keys(
    length: int, query_mask: Tensor | None, key_mask: Tensor | None, reach: Reach
) -> Tensor | None:
    """How many keys each real query sees, 0 for a masked query: [B, L]; None where all see all that
    their reach lets them."""
    if query_mask is None:
        if key_mask is None:
            return None
        query_mask = torch.ones_like(key_mask)
    elif key_mask is None:
        key_mask = torch.ones_like(query_mask)
    before, after = reach
    seen = key_mask.sum(1, keepdim=True) if after is None else _real_below(key_mask, after + 1)
    if before is not None:
        seen = seen - _real_below(key_mask, -before)
    return seen * query_mask


def count_pairs(
    length: int, query_mask: Tensor | None, key_mask: Tensor | None, reach: Reach, mean_over: str
) -> Tensor | int:
    """What a mean over (query, key) divides by, by example [B] or for all alike; at least 1."""
    visible = _visible_keys(length, query_mask, key_mask, reach)
    if mean_over == "all":
        return max(length, 1) ** 2
    if visible is None:
        sides = [length - 1 if side is None else min(side, length - 1) for side in reach]
        # Of the pairs at a distance d, in one direction, there are length - d.
        return max(length + sum(d * length - d * (d + 1) // 2 for d in sides), 1)
    return visible.sum(1).clamp(min=1)


def count_queries(
    length: int, query_mask: Tensor | None, key_mask: Tensor | None, reach: Reach, mean_over: str
) -> Tensor | int:
    """What a mean over queries divides by, by example [B] or for all alike; at least 1."""
    visible = _visible_keys(length, query_mask, key_mask, reach)
    if mean_over == "all" or visible is None:
        return max(length, 1)
    return (visible > 0).sum(1).clamp(min=1)


def _over_tiles(
    term: Callable[[Tensor, Tensor, Tensor], Tensor],
    student: Pair,
    teacher: Pair,
    query_mask: Tensor,
    key_mask: Tensor,
    reach: Reach,
) -> Tensor:
    """Sum of ``term(scores_s, scores_t, allowed)``, each [B, A, tile, keys in reach], over tiles of
    queries: [B].

    With more than one tile, the backward recomputes each, so that no L x L map is kept for it.
    """
    position = torch.arange(query_mask.shape[1], device=query_mask.device)
    before, after = reach

    def tile(start: int, query_s: Tensor, key_s: Tensor, query_t: Tensor, key_t: Tensor) -> Tensor:
        rows, keys = slice(start, start + QUERY_TILE), slice(None)
        if before is not None:
            keys = slice(max(start - before, 0), None)
        if after is not None:
            keys = slice(keys.start, start + QUERY_TILE + after)
        allowed = query_mask[:, None, rows, None] & key_mask[:, None, None, keys]
        gap = position[keys] - position[rows, None]
        if before is not None:
            allowed = allowed & (gap >= -before)
        if after is not None:
            allowed = allowed & (gap <= after)
        key_s, key_t = key_s[:, :, keys], key_t[:, :, keys]
        return term(query_s[:, :, rows] @ key_s.mT, query_t[:, :, rows] @ key_t.mT, allowed)

    starts = range(0, max(query_mask.shape[1], 1), QUERY_TILE)
    if len(starts) == 1:
        return tile(0, *student, *teacher)
    tiles = [
        checkpoint(tile, start, *student, *teacher, use_reentrant=False, preserve_rng_state=False)
        for start in starts
    ]
    return reduce(torch.add, tiles)


def prefers_gram(length: int, width: int) -> bool:
    """Whether Gram matrices (work L * width^2) beat score maps (L^2 * width); width is D_s + D_t.

    Measured forward and backward, float32, CPU time of one thread, tiles over Gram at L = 128, 256,
    512: 1.0, 1.8, 4.7 (D 32 / 32); 0.7, 1.2, 3.0 (D 26 / 64); 0.5, 0.9, 2.4 (D 64 / 64).
    """
    return length >= max(GRAM_FROM_LENGTH, 5 * width // 2)


def attention_score_mse(
    student: Pair,
    teacher: Pair,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    reach: Reach = EVERYWHERE,
    scale: float | None = None,
    mean_over: str = "real",
    form: str = "auto",
) -> Tensor:
    """(query, key), each [B, A, L, D], of both sides -> rows [B]."""
    student, teacher, query_mask, key_mask = _attention_inputs(
        student, teacher, query_mask, key_mask, scale
    )
    if student[0].shape[1] != teacher[0].shape[1]:
        student, teacher = _mean_of_heads(student), _mean_of_heads(teacher)
    (query_s, key_s), (query_t, key_t) = student, teacher
    _, heads, length, _ = query_s.shape

    if form == "auto":
        width = query_s.shape[-1] + query_t.shape[-1]
        form = "gram" if prefers_gram(length, width) and reach == EVERYWHERE else "tiled"
    if form == "gram":
        left = torch.cat([query_s, -query_t], -1)  # [B, A, L, D_s + D_t]
        right = torch.cat([key_s, key_t], -1)
        total = ((left.mT @ left) * (right.mT @ right)).sum((1, 2, 3))
    else:
        total = _over_tiles(_squared_score_gap, student, teacher, query_mask, key_mask, reach)

    return total / (heads * count_pairs(length, query_mask, key_mask, reach, mean_over))


def score_norm(
    query: Tensor,
    key: Tensor,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """[B, A, L, D] twice -> sum of squared scores [B, A]."""
    (query, key), *_ = _attention_inputs((query, key), (query, key), query_mask, key_mask, scale)
    return ((query.mT @ query) * (key.mT @ key)).sum((2, 3))


def _mean_of_heads(side: Pair) -> Pair:
    """One head whose scores are the mean over all heads: heads side by side in the feature
    dimension."""
    query, key = (tensor.transpose(1, 2).flatten(2)[:, None] for tensor in side)  # [B, 1, L, A * D]
    return query / side[0].shape[1], key


def _squared_score_gap(scores_s: Tensor, scores_t: Tensor, allowed: Tensor) -> Tensor:
    return (scores_s - scores_t).masked_fill(~allowed, 0.0).square().sum((1, 2, 3))


def _log_maps(scores_s: Tensor, scores_t: Tensor, allowed: Tensor) -> list[Tensor]:
    """Log attention maps; with different head counts, of each side's mean map.

    Disallowed keys get the most negative finite score: exactly zero mass, and gradients stay finite
    even where a query sees no key at all.
    """
    floor = torch.finfo(scores_s.dtype).min / 2
    maps = [
        F.log_softmax(scores.masked_fill(~allowed, floor), -1) for scores in (scores_s, scores_t)
    ]
    if scores_s.shape[1] != scores_t.shape[1]:
        maps = [log_map.logsumexp(1, keepdim=True) - math.log(log_map.shape[1]) for log_map in maps]
    return maps


def _map_divergence(scores_s: Tensor, scores_t: Tensor, allowed: Tensor) -> Tensor:
    log_s, log_t = _log_maps(scores_s, scores_t, allowed)
    return _divergence(log_t, log_s).masked_fill(~allowed.any(-1), 0.0).sum((1, 2))


def _squared_map_gap(scores_s: Tensor, scores_t: Tensor, allowed: Tensor) -> Tensor:
    log_s, log_t = _log_maps(scores_s, scores_t, allowed)
    return (log_s.exp() - log_t.exp()).masked_fill(~allowed, 0.0).square().sum((1, 2, 3))


def _map_heads(student: Pair, teacher: Pair) -> int:
    """Number of maps compared: all heads one to one, or the two mean maps."""
    heads = student[0].shape[1]
    return heads if heads == teacher[0].shape[1] else 1


def attention_kl(
    student: Pair,
    teacher: Pair,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    reach: Reach = EVERYWHERE,
    scale: float | None = None,
    mean_over: str = "real",
) -> Tensor:
    """(query, key), each [B, A, L, D], of both sides -> rows [B]."""
    student, teacher, query_mask, key_mask = _attention_inputs(
        student, teacher, query_mask, key_mask, scale
    )
    total = _over_tiles(_map_divergence, student, teacher, query_mask, key_mask, reach)
    count = count_queries(query_mask.shape[1], query_mask, key_mask, reach, mean_over)
    return total / (_map_heads(student, teacher) * count)


def attention_prob_mse(
    student: Pair,
    teacher: Pair,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    reach: Reach = EVERYWHERE,
    scale: float | None = None,
    mean_over: str = "real",
) -> Tensor:
    """(query, key), each [B, A, L, D], of both sides -> rows [B]."""
    student, teacher, query_mask, key_mask = _attention_inputs(
        student, teacher, query_mask, key_mask, scale
    )
    total = _over_tiles(_squared_map_gap, student, teacher, query_mask, key_mask, reach)
    count = count_pairs(query_mask.shape[1], query_mask, key_mask, reach, mean_over)
    return total / (_map_heads(student, teacher) * count)


def regroup(states: Tensor, relation_heads: int) -> Tensor:
    """Heads side by side, cut into R: [B, A, L, D] -> [B, R, L, A * D / R]."""
    return states.transpose(1, 2).flatten(2).unflatten(2, (relation_heads, -1)).transpose(1, 2)


def relation_kl(
    student: Tensor, teacher: Tensor, relation_heads: int, mask: Tensor | None = None
) -> Tensor:
    """[B, A, L, D] of both sides (queries, keys or values) -> rows [B]."""
    # Before a tensor becomes query and key at once, so that a half's gradient is summed in float32.
    own, taught = (regroup(states, relation_heads) for states in _common(student, teacher))
    return attention_kl((own, own), (taught, taught), query_mask=mask, key_mask=mask)


# Prototypes and instance weights


def class_prototypes(
    embedding: Tensor, domain: Tensor, label: Tensor, num_domains: int, num_classes: int
) -> tuple[Tensor, Tensor]:
    """[N, H], [N], [N] -> prototypes [K, M, H], counts [K, M].

    One pass per cell rather than ``index_add``: no float atomics, and a NaN stays in its own cell.
    """
    (embedding,) = _common(embedding)
    cells = [
        (domain == k) & (label == m) for k in range(num_domains) for m in range(num_classes)
    ]  # each [N]
    counts = torch.stack([cell.sum() for cell in cells])
    sums = torch.stack([embedding.masked_fill(~cell[:, None], 0.0).sum(0) for cell in cells])
    prototypes = sums / counts.clamp(min=1)[:, None]
    return prototypes.unflatten(0, (num_domains, num_classes)), counts.unflatten(
        0, (num_domains, num_classes)
    )


def prototype_score(
    embedding: Tensor,
    prototypes: Tensor,
    counts: Tensor,
    domain: Tensor,
    label: Tensor,
    alpha: float = 0.5,
    center: Tensor | None = None,
) -> Tensor:
    """[N, H], [K, M, H], [K, M], [N], [N] -> t [N]."""
    embedding, prototypes, *shift = _common(
        embedding, prototypes, *([] if center is None else [center])
    )
    for origin in shift:
        embedding, prototypes = embedding - origin, prototypes - origin
    cosines = (
        F.normalize(embedding, dim=-1) @ F.normalize(prototypes, dim=-1).flatten(0, 1).mT
    )  # [N, K * M]
    same_class = label[:, None, None].expand(-1, len(prototypes), 1)
    cosines = cosines.unflatten(1, counts.shape).gather(2, same_class).squeeze(2)  # [N, K]

    exists = (counts > 0).T[label]  # [N, K]
    is_own = torch.arange(len(prototypes), device=domain.device) == domain[:, None]
    own, others = exists & is_own, exists & ~is_own
    own_cosine = cosines.masked_fill(~own, 0.0).sum(1)
    others_cosine = cosines.masked_fill(~others, 0.0).sum(1) / others.sum(1).clamp(min=1)
    # A part that does not exist has cosine 0, so the plain sum is the other part at full weight.
    mixed = alpha * own_cosine + (1.0 - alpha) * others_cosine
    return torch.where(own.any(1) & others.any(1), mixed, own_cosine + others_cosine)


def domain_expertise(teacher_logits: Tensor, label: Tensor, t: Tensor) -> Tensor:
    """[N, M], [N], [N] -> lambda [N]."""
    teacher_logits, t = _common(teacher_logits, t)
    p_label = teacher_logits.softmax(-1).gather(1, label[:, None]).squeeze(1)
    return (1.0 + t) / (torch.exp((1.0 - p_label).square()) + 1.0)
