"""What runs where no kernel can: losses of ``metakd.reference`` in PyTorch's own operations,
arranged to be fast.

A row of a loss depends on its own slice of the student's tensors only, so its gradient is computed
on the way forward, for an upstream gradient of 1, and the backward multiplies by the row's own. No
map, no softmax is kept for it. On a CPU rows go in blocks that stay in the cache. What a function
here does not do better than the reference it leaves to it: heads that differ in number, windows,
second derivatives, and all that is traced, where a compiler fuses the reference's passes anyway.

Functions, shapes, legend and rules are those of ``metakd.reference``. Imports torch and that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from metakd import reference
from metakd.reference import EVERYWHERE, Pair, Reach

# Numbers of a block: a few of them fit the cache of a processor, and each is work enough for one
# call; on other devices a few of them fit the memory.
BLOCK = 1 << 17
LARGE_BLOCK = 1 << 26

Found = tuple[Tensor, Sequence[Tensor]]  # rows, and their gradients of the student's tensors


class _Rows(torch.autograd.Function):
    """Rows [N] of tensors [N, ...], whose gradients are ready when the forward ends."""

    @staticmethod
    def forward(ctx, compute: Callable[..., Found], oracle: Callable[..., Tensor], *student):
        rows, gradients = compute(*student, learns=True)
        ctx.oracle = oracle
        ctx.save_for_backward(*student, *gradients)
        return rows

    @staticmethod
    def backward(ctx, drows):
        count = len(ctx.saved_tensors) // 2
        student, gradients = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if torch.is_grad_enabled():  # a second derivative is wanted
            # Views, because one tensor may be query and key at once.
            student = [x.view_as(x) for x in student]
            learned = [x for x in student if x.requires_grad]
            rows = ctx.oracle(*student)
            found = torch.autograd.grad(rows, learned, drows, create_graph=True)
        else:
            sides = zip(student, gradients)
            found = [_times(slope, drows, own) for own, slope in sides if own.requires_grad]
        slopes = iter(found)
        return None, None, *(next(slopes) if x.requires_grad else None for x in student)


def _times(gradient: Tensor, drows: Tensor, own: Tensor) -> Tensor:
    """In the dtype and layout of ``own``, rounded as it is written."""
    factor = drows.view(-1, *[1] * (gradient.dim() - 1))
    return torch.mul(gradient, factor, out=torch.empty_like(own))


def _rows(compute: Callable[..., Found], oracle: Callable[..., Tensor], *student: Tensor) -> Tensor:
    """``compute(*student, learns)`` with its gradients; ``oracle(*student)`` are the same rows."""
    if torch.compiler.is_compiling():
        return oracle(*student)
    if torch.is_grad_enabled() and any(x.requires_grad for x in student):
        return _Rows.apply(compute, oracle, *student)
    return compute(*student, learns=False)[0]


def _unless_hidden(rows: Tensor, *masks: Tensor | None) -> Tensor:
    """0 for examples of which a mask [B, L] hides everything, whose rows' gradient may be NaN."""
    for mask in masks:
        if mask is not None:
            rows = rows.masked_fill(~mask.any(1), 0.0)
    return rows


def _blocks(like: Tensor, width: int) -> Iterator[slice]:
    """Slices of the rows of ``like``, each of so many numbers."""
    block = BLOCK if like.device.type == "cpu" else LARGE_BLOCK
    size = max(block // max(width, 1), 1)
    return (slice(start, start + size) for start in range(0, like.shape[0], size))


# Logits


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[..., C], which lose their maximum -> their exponentials and the sums of those [..., 1].

    A NaN anywhere makes a NaN of the sum.
    """
    powers = logits.sub_(logits.amax(-1, keepdim=True)).exp()
    return powers, powers.sum(-1, keepdim=True)


def _without_mass(products: Tensor) -> Tensor:
    """0 for 0 times infinity, which is what classes without mass come to. To compare them with 0
    costs more than all that is computed; who calls sees NaN in the sums of exponentials."""
    return products.nan_to_num_(0.0, math.inf, -math.inf)


def _forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) [...] of logits [..., C], which are overwritten, and q - p."""
    (e_s, sum_s), (e_t, sum_t) = _exponentials(student), _exponentials(teacher)
    gap = _without_mass(teacher.sub_(student).mul_(e_t)).sum(-1, keepdim=True)
    rows = gap / sum_t + (sum_s / sum_t).log()
    return rows.squeeze(-1), e_s.addcmul_(e_t, sum_s / sum_t, value=-1).div_(sum_s)


def _reverse_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) [...] of logits [..., C], which are overwritten, and its gradient of the
    student's: q (g - inner), with g counted from its value at the student's maximum, so that where
    one class has nearly all of q no digits are lost (docs/kernels.md)."""
    top = student.argmax(-1, keepdim=True)
    (e_s, sum_s), (_, sum_t) = _exponentials(student), _exponentials(teacher)
    shift = teacher.gather(-1, top)
    shift = shift.masked_fill(shift == -math.inf, 0.0)
    gap = student.sub_(teacher.sub_(shift))
    inner = _without_mass(gap * e_s).sum(-1, keepdim=True) / sum_s
    rows = inner - shift + (sum_t / sum_s).log()
    slope = _without_mass(gap.sub_(inner).mul_(e_s))
    return rows.squeeze(-1), slope.div_(sum_s + 0.0 * rows)


def _mixed(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon divergence, 0 < beta < 1, [...] of logits [..., C], which are overwritten, and
    its gradient of the student's."""
    top, sides = student.argmax(-1, keepdim=True), []
    for logits in (student, teacher):
        powers, total = _exponentials(logits)
        sides.append((powers.div_(total), logits.sub_(total.log())))
    (q, log_q), (p, log_p) = sides
    m = (beta * p).add_(q, alpha=1.0 - beta)
    # Where the mixture is no normal number, neither side weighs anything.
    log_m = m.clamp_(min=torch.finfo(m.dtype).tiny).log_()
    taught = _without_mass(log_p.sub_(log_m).mul_(p)).sum(-1, keepdim=True)
    gap = log_q.sub_(log_m)
    shift = gap.gather(-1, top)
    gap.sub_(shift)
    own = _without_mass(gap * q).sum(-1, keepdim=True)
    rows = beta * taught + (1.0 - beta) * (own + shift)  # shift is NaN where any is
    slope = _without_mass(gap.sub_(own).mul_(q))
    return rows.squeeze(-1), slope.mul_(1.0 - beta + 0.0 * rows)


def soft_jsd(
    student: Tensor,
    teacher: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    """[N, C], [N, C] -> rows [N]."""
    dtype = reference.common_dtype(student, teacher)
    divergence = {0.0: _forward_kl, 1.0: _reverse_kl}.get(beta, partial(_mixed, beta=beta))

    def compute(student: Tensor, learns: bool) -> Found:
        rows = student.new_empty(student.shape[0], dtype=dtype)
        gradients = [torch.empty_like(student, dtype=dtype)] if learns else []
        for part in _blocks(student, student.shape[1]):
            rows[part], slope = divergence(
                *(logits[part].to(dtype) / temperature for logits in (student, teacher))
            )
            for gradient in gradients:
                torch.div(slope, temperature, out=gradient[part])
        return rows, gradients

    def oracle(student: Tensor) -> Tensor:
        return reference.soft_jsd(student, teacher, beta, temperature, False)

    return _rows(compute, oracle, student) * (temperature**2 if scale_by_temperature else 1.0)


def mixture_kl(
    student: Tensor,
    teachers: Tensor,
    shares: Tensor,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    """[N, C], [N, M, C], [N, M] -> rows [N]."""
    dtype = reference.common_dtype(student, teachers, shares)

    def compute(student: Tensor, shares: Tensor, learns: bool) -> Found:
        rows = student.new_empty(student.shape[0], dtype=dtype)
        gradients = [torch.empty_like(x, dtype=dtype) for x in (student, shares) if learns]
        for part in _blocks(student, teachers.shape[1] * teachers.shape[2]):
            own, taught = (logits[part].to(dtype) / temperature for logits in (student, teachers))
            rows[part], *slopes = _mixture(own, taught, shares[part].to(dtype))
            if learns:
                torch.div(slopes[0], temperature, out=gradients[0][part])
                gradients[1][part] = slopes[1]
        return rows, gradients

    def oracle(student: Tensor, shares: Tensor) -> Tensor:
        return reference.mixture_kl(student, teachers, shares, temperature, False)

    rows = _rows(compute, oracle, student, shares)
    return rows * (temperature**2 if scale_by_temperature else 1.0)


def _mixture(student: Tensor, teachers: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n] and their gradients of logits [n, C] and of shares [n, M]; logits [n, C], [n, M, C]
    are overwritten."""
    (e_s, sum_s), (e_t, sums) = _exponentials(student), _exponentials(teachers)
    log_q = student.sub_(sum_s.log())
    parts = teachers.add_(share.log()[:, :, None] - sums.log())
    # Of classes that nobody gives any mass as well.
    top = parts.amax(1, keepdim=True).clamp_(min=torch.finfo(parts.dtype).min)
    log_p = parts.sub_(top).exp_().sum(1).log_().add_(top.squeeze(1))
    p = log_p.exp()
    gap = log_p.sub_(log_q).masked_fill_(p == 0, 0.0)
    slopes = e_t.mul_(gap[:, None]).sum(-1) / sums.squeeze(-1) + 1.0
    slope = e_s.mul_(p.sum(-1, keepdim=True) / sum_s).sub_(p)
    return gap.mul_(p).sum(-1), slope, slopes.masked_fill(share == 0, 0.0)


# Hidden states


def hidden_mse(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Layers of [B, L, H] on both sides, mask [B, L] -> rows [B]."""
    length = student[0].shape[1]
    tokens = max(length, 1) if mask is None else mask.sum(1).clamp(min=1)

    def layer(own: Tensor, taught: Tensor) -> Tensor:
        def compute(own: Tensor, learns: bool) -> Found:
            dtype = reference.common_dtype(own, taught)
            residual = own.to(dtype) - taught.to(dtype)
            if mask is not None:
                residual.masked_fill_(~mask[:, :, None], 0.0)
            squares = torch.linalg.vector_norm(residual, dim=-1).square()
            return squares.sum(1) / 2, (residual,)  # the gradient of half of it

        def oracle(own: Tensor) -> Tensor:
            return reference.hidden_mse([own], [taught], mask) * (tokens * own.shape[2] / 2)

        return _unless_hidden(_rows(compute, oracle, own), mask) / (tokens * own.shape[2] / 2)

    return reduce(torch.add, map(layer, student, teacher))


# Attention


def _over_heads(
    compare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    exact: Callable[..., Tensor],
    counter: Callable[..., Tensor | int],
    student: Pair,
    teacher: Pair,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    reach: Reach = EVERYWHERE,
    scale: float | None = None,
    mean_over: str = "real",
) -> Tensor:
    """Rows [B] of the reference's ``exact``: means over heads and what ``counter`` counts of
    ``compare(scores_s, scores_t)``, which may overwrite the scores [h, L, L] and gives values [h,
    L] and their gradient of the student's scores.

    Hidden queries and keys are 0, and so their scores on both sides; to those of hidden keys the
    lowest number is added, which leaves them out of a softmax, or where all are hidden makes one
    that is the same on both sides.
    """
    rest = teacher, query_mask, key_mask, reach, scale, mean_over
    # A window, of which it skips what nobody sees; mean maps; nothing.
    alike = student[0].shape[1] == teacher[0].shape[1]
    if reach != EVERYWHERE or not alike or student[0].shape[2] == 0:
        return exact(student, *rest)
    batch, heads, length, _ = student[0].shape
    dtype = reference.common_dtype(*student, *teacher)
    bias = None
    if key_mask is not None:
        bias = torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device)
        bias = bias.masked_fill_(~key_mask, torch.finfo(dtype).min / 2)
        bias = bias.repeat_interleave(heads, 0)[:, None]  # [B A, 1, L]

    def seen(states: Tensor, mask: Tensor | None, factor: float) -> Tensor:
        states = states.to(dtype) * factor
        if mask is not None:
            states = states.masked_fill_(~mask[:, None, :, None], 0.0)
        return states.flatten(0, 1)  # [B A, L, D]

    def compute(*student: Tensor, learns: bool) -> Found:
        sides, factors = [], []
        for query, key in (student, teacher):
            factors.append(query.shape[-1] ** -0.5 if scale is None else scale)
            sides.append((seen(query, query_mask, factors[-1]), seen(key, key_mask, 1.0)))
        values = student[0].new_empty(batch * heads, dtype=dtype)
        gradients = [torch.empty_like(x) for x in sides[0]] if learns else []
        for part in _blocks(values, length * length):
            scores = [query[part] @ key[part].mT for query, key in sides]
            if bias is not None:
                scores = [x.add_(bias[part]) for x in scores]
            value, slope = compare(*scores)
            values[part] = value.sum(-1)
            if learns:
                query, key = sides[0]
                torch.bmm(slope, key[part], out=gradients[0][part]).mul_(factors[0])
                torch.bmm(slope.mT, query[part], out=gradients[1][part])
        rows = values.unflatten(0, (batch, heads)).sum(1)
        return rows, [x.unflatten(0, (batch, heads)) for x in gradients]

    count = heads * counter(length, query_mask, key_mask, reach, mean_over)

    def oracle(*student: Tensor) -> Tensor:
        return exact(student, *rest) * count

    return _unless_hidden(_rows(compute, oracle, *student), query_mask, key_mask) / count


def _score_gap(scores_s: Tensor, scores_t: Tensor) -> tuple[Tensor, Tensor]:
    gap = scores_s.sub_(scores_t)
    squares = torch.linalg.vecdot(gap, gap)
    return squares, gap.mul_(2.0)


def _map_gap(scores_s: Tensor, scores_t: Tensor) -> tuple[Tensor, Tensor]:
    map_s = scores_s.softmax(-1)
    gap = map_s - scores_t.softmax(-1)
    squares, inner = torch.linalg.vecdot(gap, gap), torch.linalg.vecdot(map_s, gap)
    return squares, gap.sub_(inner[..., None]).mul_(map_s).mul_(2.0)


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
    """(query, key), each [B, A, L, D], of both sides -> rows [B]. Gram matrices are the
    reference's."""
    rest = student, teacher, query_mask, key_mask, reach, scale, mean_over
    width = student[0].shape[-1] + teacher[0].shape[-1]
    if (
        form == "auto"
        and reach == EVERYWHERE
        and reference.prefers_gram(student[0].shape[2], width)
    ):
        form = "gram"
    if form == "gram":
        return reference.attention_score_mse(*rest, form)
    exact = partial(reference.attention_score_mse, form="tiled")
    return _over_heads(_score_gap, exact, reference.count_pairs, *rest)


# (query, key), each [B, A, L, D], of both sides, and what they are asked with -> rows [B].
attention_kl = partial(_over_heads, _forward_kl, reference.attention_kl, reference.count_queries)
attention_prob_mse = partial(
    _over_heads, _map_gap, reference.attention_prob_mse, reference.count_pairs
)


def relation_kl(
    student: Tensor, teacher: Tensor, relation_heads: int, mask: Tensor | None = None
) -> Tensor:
    """[B, A, L, D] of both sides (queries, keys or values) -> rows [B]."""
    dtype = reference.common_dtype(student, teacher)  # in which both gradients are summed
    own, taught = (reference.regroup(x.to(dtype), relation_heads) for x in (student, teacher))
    return attention_kl((own, own), (taught, taught), query_mask=mask, key_mask=mask)
