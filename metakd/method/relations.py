"""Weights of layers and domains, from a graph attention network over the domains' prototypes.

What a student shows of a domain at a layer, the mean over its texts, is the domain's prototype
there. Of each domain the prototypes of this layer and those below are compared with a reference
that the domains make of each other, and summed by how close they are; a graph attention network
over all domains turns the sums into one score per domain, a softmax the scores into weights:

    reference   q[l, d] = sum_j softmax_j(p[l, d] U[l] p[l, j]) p[l, j]
    compare     b[l, d, m] = softmax_{m <= l}(p[m, d] V[l, d] q[l, d])
    aggregate   c[l, d] = sum_m b[l, d, m] p[m, d]
    attention   g(x)[d] = ELU(sum_j softmax_j(LeakyReLU(a W x[d] + a' W x[j])) W x[j])
    weights     r[l, .] = |S| softmax_S(g_out(concat_heads g(c[l, .])))

Every layer has its own U, V, W and a; layer 0 is the embedding. S are the domains that have been
seen: their weights have the mean 1, which a domain without a prototype has, and the only domain.

Prototypes are running means that change between optimizer steps, constants to the gradient: a step
has the same weights, but for dropout, however it is cut into micro-batches and processes, all
processes hold the same prototypes, and they are buffers, so that checkpoints hold them.

Sizes: B batch, H hidden width, K domains, N layers and the embedding, A heads.

Source: Dong et al. 2021, *HRKD* (arXiv 2110.08551); heads, slope, first weights and the last ELU
are those of the code released with it. ``docs/method.md`` says where this departs from that.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from metakd.functional import masked_mean
from metakd.models.taps import Features

PACE = 0.1
"""Share of a prototype that a step replaces."""
_SLOPE = 0.2  # of LeakyReLU below zero, as in graph attention networks


class Relations(nn.Module):
    """The network and the prototypes that it reads.

    Args:
        hidden: H of the student.
        layers: of the student.
        num_domains: K.
        dropout: on what the attention reads and on its shares, in training.
        heads: A, of H channels each.
    """

    def __init__(
        self, hidden: int, layers: int, num_domains: int, dropout: float = 0.0, heads: int = 8
    ):
        super().__init__()
        self.dropout = dropout
        count = layers + 1
        self.reference = _drawn(count, hidden, hidden)  # U
        self.compare = _drawn(count, num_domains, hidden, hidden)  # V
        self.project = _drawn(count, heads, hidden, hidden)  # W
        self.attend = _drawn(count, heads, 2 * hidden, 1)  # a and a'
        self.project_out = _drawn(count, 1, heads * hidden, 1)
        self.attend_out = _drawn(count, 1, 2, 1)
        self.register_buffer("prototypes", torch.zeros(count, num_domains, hidden))
        self.register_buffer("known", torch.zeros(num_domains, dtype=torch.bool))
        self._noted: Tensor | None = None  # [N, K, H + 1], of this step: sums, and of how many

    def _apply(self, fn, recurse=True):
        # DeepSpeed casts buffers with the weights; a running mean in halves would stand still.
        kept = self.prototypes
        super()._apply(fn, recurse)
        self.prototypes = kept.to(self.prototypes.device)
        return self

    @torch.no_grad()
    def note(self, seen: Features, domain: Tensor) -> None:
        """Add a batch to what ``settle`` takes into the prototypes.

        Args:
            seen: with ``embedding`` and every ``hidden`` of the student.
            domain: of each example [B].
        """
        shown = [seen.embedding, *seen.hidden]
        pooled = torch.stack([masked_mean(states, seen.mask).float() for states in shown])
        rows = F.pad(pooled, (0, 1), value=1.0)  # [N, B, H + 1]
        own = F.one_hot(domain, len(self.known)).to(rows.dtype)  # [B, K]
        sums = torch.einsum("bk,nbh->nkh", own, rows)
        self._noted = sums if self._noted is None else self._noted + sums

    @torch.no_grad()
    def settle(self) -> None:
        """Take what was noted on all processes into the prototypes, at the end of a step; what is
        not finite is left out."""
        if self._noted is None:
            return
        noted, self._noted = self._noted, None
        if dist.is_initialized():
            dist.all_reduce(noted)
        means = noted[..., :-1] / noted[..., -1:]  # of a domain without texts not a number
        found = means.isfinite().all(-1).all(0)  # [K]
        moved = self.prototypes.lerp(means, torch.where(self.known, PACE, 1.0)[:, None])
        self.prototypes.copy_(torch.where(found[:, None], moved, self.prototypes))
        self.known |= found

    def forward(self) -> Tensor:
        """The weights r [N, K]."""
        shares = self._shares(self.prototypes.to(self.project.dtype))
        return torch.where(self.known, self.known.sum() * shares, 1.0)

    def _shares(self, prototypes: Tensor) -> Tensor:
        """From prototypes p [N, K, H] to r / |S| [N, K]."""
        alike = prototypes @ self.reference @ prototypes.mT  # [N, K, K]
        reference = self._among_known(alike) @ prototypes  # q [N, K, H]
        wanted = (self.compare @ reference[..., None])[..., 0]  # V q [N, K, H]
        close = torch.einsum("mkh,nkh->nkm", prototypes, wanted)
        above = torch.ones_like(close[:, 0], dtype=torch.bool).triu(1)  # m > l
        close = close.masked_fill(above[:, None], -torch.inf)
        chosen = torch.einsum("nkm,mkh->nkh", close.softmax(-1), prototypes)  # c
        heads = self._attended(chosen[:, None], self.project, self.attend)  # [N, A, K, H]
        joined = heads.transpose(1, 2).flatten(2)[:, None]  # [N, 1, K, A H]
        scores = self._attended(joined, self.project_out, self.attend_out)  # [N, 1, K, 1]
        return self._among_known(scores[:, 0, :, 0].float())

    def _attended(self, seen: Tensor, project: Tensor, attend: Tensor) -> Tensor:
        """g of x [N, 1, K, I] with W [N, A, I, O], and a and a' [N, A, 2 O, 1]."""
        projected = self._dropped(seen) @ project  # [N, A, K, O]
        own, others = (projected @ part for part in attend.chunk(2, dim=2))  # [N, A, K, 1]
        shares = self._among_known(F.leaky_relu(own + others.mT, _SLOPE))  # [N, A, K, K]
        return F.elu(self._dropped(shares) @ projected)

    def _dropped(self, values: Tensor) -> Tensor:
        return F.dropout(values, self.dropout, self.training)

    def _among_known(self, scores: Tensor) -> Tensor:
        """Softmax over the domains that have been seen, [..., K]."""
        return scores.masked_fill(~self.known, torch.finfo(scores.dtype).min).softmax(-1)


def _drawn(*shape: int) -> nn.Parameter:
    """Matrices [..., fan in, fan out], each drawn as Glorot and Bengio 2010 have it, times sqrt(2)
    as the release has it."""
    bound = (12 / (shape[-2] + shape[-1])) ** 0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
