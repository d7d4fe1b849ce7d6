"""Who is listened to: a share for each of several teachers, by example, and the loss of a student
that follows the mixture of them.

Sizes: B batch, H hidden width, T teachers, M outputs of a classifier.

Source: Haase, da Silva, *HPM-KD* (arXiv 2512.09886), whose draft has the two layers, 128 wide with
dropout, what they read (the example and all that the teachers say of it), and the entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metakd.functional import mixture_kl
from metakd.method.tasks import Task

WIDTH = 128


class Gate(nn.Module):
    """``a(x) = softmax(W2 dropout(relu(W1 [x; t_1; ..; t_T] + b1)) + b2)``.

    Args:
        hidden: H.
        teachers: T.
        outputs: M.
        task: what they mean.
        dropout: share of the inner layer that is left out in training.
    """

    def __init__(self, hidden: int, teachers: int, outputs: int, task: Task, dropout: float):
        super().__init__()
        self.task = task
        told = teachers * outputs * (1 if task.one_class else 2)
        self.first = nn.Linear(hidden + told, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(WIDTH, teachers)

    def forward(self, pooled: Tensor, votes: Tensor) -> Tensor:
        """A student's E(X) [B, H] and the teachers' logits [B, T, M] to shares [B, T] in fp32 that
        sum to 1.

        The draft reads images, which nothing trains: E(X) is detached likewise, so that the student
        does not learn to please its gate.
        """
        told = _distributions(self.task, votes.float()).softmax(-1).flatten(1)
        read = torch.cat([pooled.detach().float(), told], 1).to(self.first.weight.dtype)
        return self.second(self.dropout(self.first(read).relu())).float().softmax(-1)


def mixture_divergence(
    task: Task, student: Tensor, votes: Tensor, shares: Tensor, **options
) -> Tensor:
    """Loss [B] of a student's logits [B, M] with the probabilities of teachers, of logits
    [B, T, M], in shares [B, T]: the mean over classes where a text may have several. Options as for
    ``metakd.mixture_kl``."""
    own, told = _distributions(task, student), _distributions(task, votes).transpose(1, 2)
    heard = shares[:, None].expand(told.shape[:-1])
    return mixture_kl(own, told, heard, reduction="none", **options).mean(-1)


def entropy(shares: Tensor) -> Tensor:
    """H(a) [B] of shares [B, T]."""
    # The smallest number for 0, whose logarithm has no gradient; times 0 it adds nothing either.
    least = torch.finfo(shares.dtype).tiny
    return -(shares * shares.clamp(min=least).log()).sum(-1)


def _distributions(task: Task, logits: Tensor) -> Tensor:
    """Logits [..., D, C] of the distributions that those of a task [..., M] stand for: one over all
    classes, or of each class one over it and its opposite, as in ``metakd.sigmoid_kl``."""
    if task.one_class:
        return logits[..., None, :]
    return torch.stack((logits, torch.zeros_like(logits)), -1)
