"""Prototypes of (domain, class) cells, and the weights of instances made from them."""

from __future__ import annotations

import torch
from torch import Tensor

from metakd import ops, reference
from metakd.errors import UnsupportedError
from metakd.functional.checks import (
    check_fraction,
    check_index,
    check_integer,
    check_teacher,
    check_tensor,
    widest,
    without_autocast,
)


def _weights(op: str, backend: str, first: Tensor, *rest):
    """``op(first, *rest)``. The compiled operators have no gradient: where one is wanted, which a
    weight of instances seldom is, the reference computes."""
    tensors = [x for x in (first, *rest) if isinstance(x, Tensor)]
    floats = [x for x in tensors if x.is_floating_point()]
    if torch.is_grad_enabled() and any(x.requires_grad for x in floats):
        if backend not in ("auto", "reference"):
            raise UnsupportedError(
                f"backend {backend!r} computes no gradient of {op}",
                "use torch.no_grad(), backend='auto' or backend='reference'",
            )
        backend = "reference"
    backend = ops.select(op, backend, first.device, widest(*floats))
    compute = getattr(reference, op) if backend == "reference" else ops.compiled(backend, op)
    return without_autocast(first.device, compute, first, *rest)


def class_prototypes(
    embedding: Tensor,
    domain: Tensor,
    label: Tensor,
    *,
    num_domains: int,
    num_classes: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean embedding of every (domain, class) cell: ``p[k, m] = mean of E(X_i) over {i: domain k,
    label m}``.

    Args:
        embedding: E(X), [N, H].
        domain: int64 [N], in 0..K-1.
        label: int64 [N], in 0..M-1.
        num_domains: K.
        num_classes: M.
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        Prototypes [K, M, H] (zeros in an empty cell), float32 (float64 for doubles), and counts
        int64 [K, M].

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range.
        UnsupportedError: the backend asked for cannot run here.

    Source: Pan et al. 2021, *Meta-KD* (arXiv 2012.01266), section 3.1.
    """
    for name, size in (("num_domains", num_domains), ("num_classes", num_classes)):
        check_integer(name, size, 1)
    check_tensor("embedding", embedding, ("N", "H"))
    device, rows = embedding.device, len(embedding)
    check_index("domain", domain, rows, num_domains, device)
    check_index("label", label, rows, num_classes, device)
    return _weights("class_prototypes", backend, embedding, domain, label, num_domains, num_classes)


def prototype_score(
    embedding: Tensor,
    prototypes: Tensor,
    counts: Tensor,
    domain: Tensor,
    label: Tensor,
    *,
    alpha: float = 0.5,
    center: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Prototype score of each example: how typical it is of its class, at home and in the other
    domains.

    ``t_i = alpha * cos(e_i, p[k, y]) + zeta * sum over k' != k of cos(e_i, p[k', y])`` for an
    example of domain k and label y, ``zeta = (1 - alpha) / (number of other domains whose cell (k',
    y) is not empty)``. Where only one of the two parts exists it has full weight; where neither
    does, t = 0. High t = transferable across domains.

    Args:
        embedding: e, [N, H].
        prototypes: p, [K, M, H].
        counts: [K, M], examples behind each prototype; 0 = empty cell.
        domain: int64 [N], in 0..K-1.
        label: int64 [N], in 0..M-1.
        alpha: weight of the own domain, in [0, 1].
        center: [H], subtracted from embeddings and prototypes before the cosines (embeddings of
            language models share a large common component that pushes every cosine towards 1).
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        t, [N], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range.
        UnsupportedError: the backend asked for cannot run here.

    Source: Pan et al. 2021, *Meta-KD* (arXiv 2012.01266), section 3.1.
    """
    check_tensor("embedding", embedding, ("N", "H"))
    device, (rows, hidden) = embedding.device, embedding.shape
    check_tensor("prototypes", prototypes, ("K", "M", hidden), device)
    check_tensor("counts", counts, prototypes.shape[:2], device, "boolean or integer")
    check_index("domain", domain, rows, prototypes.shape[0], device)
    check_index("label", label, rows, prototypes.shape[1], device)
    check_fraction("alpha", alpha)
    if center is not None:
        check_tensor("center", center, (hidden,), device)
    return _weights(
        "prototype_score",
        backend,
        embedding,
        prototypes,
        counts,
        domain,
        label,
        alpha,
        center,
    )


def domain_expertise(
    teacher_logits: Tensor, label: Tensor, t: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Domain-expertise weight of each example: large where it is typical (t) and the teacher is
    right about it.

    ``lambda_i = (1 + t_i) / (exp((1 - p_i)^2) + 1)``, p_i the teacher's probability of the gold
    label.

    Args:
        teacher_logits: [N, M], without grad.
        label: int64 [N], in 0..M-1.
        t: prototype scores, [N].
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        lambda, [N], float32 (float64 for doubles).

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range; a teacher that requires
            grad.
        UnsupportedError: the backend asked for cannot run here.

    Source: Pan et al. 2021, *Meta-KD* (arXiv 2012.01266), section 3.3.
    """
    check_teacher("teacher_logits", teacher_logits, ("N", "M"))
    device, (rows, classes) = teacher_logits.device, teacher_logits.shape
    check_index("label", label, rows, classes, device)
    check_tensor("t", t, (rows,), device)
    return _weights("domain_expertise", backend, teacher_logits, label, t)
