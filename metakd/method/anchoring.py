"""Recursive distillation: targets between what teachers say and what the student of the generation
before has learned.

Generation 0 learns from the teachers; generation n + 1 from ``A(p_T, q_n)``, where q_n are the
predictions of generation n and A one of ``OPERATORS`` with the share lambda of the teachers, the
anchor. For the mixture the distance to p_T shrinks by 1 - lambda in each generation that learns its
target: ``KL(p_T || q_n) <= (1 - lambda)^n KL(p_T || q_0)``, by the convexity of KL. Without an
anchor nothing holds later generations to the teacher, and errors add up.

Sizes: B examples, M classes.

Source: Flouro, Chadwick 2026, *Recursive Meta-Distillation* (arXiv 2601.13100); the bound is worked
out in docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metakd.method.tasks import Task


def mixed(
    parts: Sequence[Tensor],
    weights: Sequence[float],
    *,
    operator: str,
    temperature: float,
    task: Task,
) -> Tensor:
    """Logits whose predictions lie between those of several models.

    Args:
        parts: logits [B, M] of each model.
        weights: one each, not negative, some positive; scaled to sum to 1.
        operator: ``mixture``, ``sum_k w_k p_k`` of the predictions; ``geometric``, the mean of
            their logarithms, scaled to sum to 1, which is that of the logits. Numbers have one
            mean.
        temperature: T that predictions are softened by, here as in the loss: softened by it, the
            logits that are returned give the mixture of the softened predictions.
        task: what logits mean.

    Returns:
        Logits [B, M], at least float32.
    """
    total = sum(weights)
    pairs = zip(parts, weights, strict=True)
    exact = torch.promote_types(parts[0].dtype, torch.float32)
    kept = [(part.to(exact), weight / total) for part, weight in pairs if weight > 0]
    if operator == "geometric" or not task.softens:
        return torch.stack([weight * part for part, weight in kept]).sum(0)

    def shares(logits: Tensor) -> Tensor:  # log-probabilities; of several classes of each, not it
        scaled = logits / temperature
        if not task.one_class:
            scaled = torch.stack([scaled, torch.zeros_like(scaled)], -1)
        return scaled.log_softmax(-1)

    logs = torch.stack([shares(part) + math.log(weight) for part, weight in kept]).logsumexp(0)
    if not task.one_class:
        logs = logs[..., 0] - logs[..., 1]
    return temperature * logs
