"""What a teacher or a student holds of the domains: a layer that corrupts them, false labels to
teach it with, heads to choose from.

``h_d(X) = tanh((E(X) + DomEmb[k]) W + b)``. Sizes: B batch, H hidden width, K domains, M classes, N
examples.

Source: Meta-KD section 3.2, equations 3-5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DomainLayer(nn.Module):
    """``h_d = tanh((E + DomEmb[k]) W + b)`` [B, H]: the domain-corrupted representation.

    Args:
        hidden: H.
        num_domains: K.
        tanh: False gives h_d before its tanh, which the release compares in L_TKD.
    """

    def __init__(self, hidden: int, num_domains: int, tanh: bool = True):
        super().__init__()
        self.tanh = tanh
        self.embedding = nn.Embedding(num_domains, hidden)
        self.dense = nn.Linear(hidden, hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, embedding: Tensor, domain: Tensor) -> Tensor:
        """E(X) [B, H] and domain [B] to h_d [B, H]."""
        corrupted = self.dense(embedding.to(self.dense.weight.dtype) + self.embedding(domain))
        return torch.tanh(corrupted) if self.tanh else corrupted


def false_domains(
    domain: Tensor, num_domains: int, *, seed: int, always_false: bool = True
) -> Tensor:
    """A wrong domain for every example [N], uniform over the others and the same for the same seed.

    Args:
        domain: true domains [N].
        num_domains: K >= 2.
        seed: of the draw; use another one each epoch.
        always_false: False gives EasyTransfer's permutation of the true labels, which hits the
            truth by chance.

    Raises:
        ValueError: only one domain exists, so no label can be false.
    """
    if num_domains < 2:
        raise ValueError(f"num_domains: {num_domains}; domain corruption needs at least 2")
    generator = torch.Generator().manual_seed(seed)
    if not always_false:
        return domain[torch.randperm(len(domain), generator=generator)]
    return (domain + torch.randint(1, num_domains, domain.shape, generator=generator)) % num_domains


class HeadChoice(nn.Module):
    """Of the K heads of a multi-task classifier each example's own; the mean of those that were
    trained, where its own was not.

    Args:
        trained: of each domain, K of them.
        num_classes: M.
    """

    def __init__(self, trained: Sequence[bool], num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        seen = torch.tensor(trained)  # [K]
        # Row k mixes the K heads into the answer for domain k.
        shares = torch.where(seen[:, None], torch.eye(len(seen)), seen / seen.sum())  # [K, K]
        self.register_buffer("shares", shares, persistent=False)

    def forward(self, logits: Tensor, domain: Tensor) -> Tensor:
        """Logits [B, K * M] and domain [B] to logits [B, M]."""
        by_head = logits.unflatten(-1, (-1, self.num_classes))  # [B, K, M]
        return torch.einsum("bk,bkm->bm", self.shares[domain].to(logits.dtype), by_head)


def domain_loss_floor(num_domains: int) -> tuple[float, float]:
    """(ln K, ln (K - 1)): L_DA settles near the first; well below the second the domain leaks
    through."""
    return math.log(num_domains), math.log(max(num_domains - 1, 1))
