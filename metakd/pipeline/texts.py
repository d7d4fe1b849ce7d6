"""Which texts a student learns from: its domain's, with labels and without, and other domains'.

A teacher reaches a student through text: what it has learned elsewhere cannot be shown on a hundred
labelled examples. Columns that batches then carry: ``t`` [N], or [N, C] by cell where a text may
have no label; ``weight`` [N] where sources weigh differently; ``foreign`` [N] where texts of other
domains are weighted by their score t. Sizes: N texts, M outputs, C cells of prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metakd.config import DistillConfig
from metakd.data.corpus import Corpus, Split
from metakd.errors import DataError
from metakd.pipeline.table import ALL_DOMAINS


def part_of(split: Split, corpus: Corpus, domain: str) -> Split:
    """The examples of a domain, or of ``all``."""
    return split if domain == ALL_DOMAINS else split.view(corpus.domains.index(domain))


def texts_of(
    corpus: Corpus,
    domain: str,
    names: Sequence[str],
    distill: DistillConfig,
    scores: dict[str, Tensor] | None = None,
    opinions: Tensor | None = None,
) -> Split:
    """What a student of a domain learns from.

    Args:
        corpus: all texts.
        domain: the student's, or ``all``, to which no other domain is left.
        names: where from, of ``methods.TEXTS``; where there are no such texts, none.
        distill: weights of the sources.
        scores: ``t`` [N] of training examples and ``unlabelled`` [N, C] by cell; None: batches
            need none.
        opinions: logits [N, M] of training examples from teachers that have not seen them, not a
            number where a teacher may speak for itself; batches then carry them for every text.

    Raises:
        DataError: there are no such texts.
    """
    without_labels = corpus.unlabelled is not None and any("unlabelled" in name for name in names)
    weights = {name: getattr(distill.transfer_weights, name) for name in names}
    parts = []
    for name in names:
        unlabelled = name.endswith("unlabelled")
        split = corpus.unlabelled if unlabelled else corpus.train
        if split is None:
            continue
        if scores is not None:
            t = scores["unlabelled" if unlabelled else "t"]
            if without_labels and t.dim() == 1:
                t = t[:, None].expand(-1, scores["unlabelled"].shape[1])
            split = split.with_column("t", t)
        if opinions is not None:
            none = torch.full((len(split), opinions.shape[1]), torch.nan)
            split = split.with_column("opinion", none if unlabelled else opinions)
        foreign = name.startswith("others")
        part = _others(split, corpus, domain) if foreign else part_of(split, corpus, domain)
        if any(weight != 1.0 for weight in weights.values()):
            part = part.with_column("weight", torch.full((len(part),), weights[name]))
        if distill.transfer_by_score and scores is not None:
            part = part.with_column("foreign", torch.full((len(part),), foreign))
        parts.append(part)
    if not any(map(len, parts)):
        raise DataError(
            f"domain {domain}: distill.transfer: there are no texts of {', '.join(names)}",
            "add own to the list, or give such texts",
        )
    return parts[0] if len(parts) == 1 else Split.joined(parts)


def _others(split: Split, corpus: Corpus, domain: str) -> Split:
    if domain == ALL_DOMAINS:
        return split.select(torch.empty(0, dtype=torch.long))
    return split.select((split.domain != corpus.domains.index(domain)).nonzero().flatten())
