"""Terms on one scale: each layer's loss divided by what a student that says nothing would have.

Left alone, terms differ by what their targets measure: scores before a softmax reach into the
tens, so that their squared error is most of the loss. A student whose every feature is zero has the
mean square of a teacher's hidden states or scores (and of attention maps the distance from
uniform ones): divided by that, every term begins near 1, and weights mean something.

Measured once, on a sample of what is to be learned: the teacher is frozen, so that its targets do
not drift, and every process and every resumed run measures the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from metakd.method.terms import Term
from metakd.models.taps import Features

Batch = dict[str, Tensor]

SAMPLED = 256
"""Examples that the scales are measured on."""


def balanced(terms: Sequence[Term], taught: Iterable[tuple[Features, Batch]]) -> list[Term]:
    """Terms with their scales; those that compare no features stay as they are.

    Args:
        terms: trained together.
        taught: what the teacher shows of a sample, and its batches.
    """
    losses: dict[int, list[Tensor]] = {}
    for features, batch in taught:
        features.arrive()
        for number, term in enumerate(terms):
            if term.intermediate:
                losses.setdefault(number, []).append(_of_nothing(term, features, batch))
    scales = {number: torch.cat(rows).mean(0).tolist() for number, rows in losses.items()}
    return [
        replace(term, scales=tuple(scale if scale > 0 else 1.0 for scale in scales[number]))
        if number in scales
        else term
        for number, term in enumerate(terms)
    ]


@torch.no_grad()
def _of_nothing(term: Term, taught: Features, batch: Batch) -> Tensor:
    """The loss [B, layers] of a student whose features are zero."""
    rows = []
    for part in term.by_layer():
        blank = Features(mask=taught.mask)
        for name in part.needs:
            shown = getattr(taught, name)
            zeros = (
                torch.zeros_like(shown)
                if isinstance(shown, Tensor)
                else [torch.zeros_like(shown[part.layers[0]])]
            )
            setattr(blank, name, zeros)
        rows.append(part.rows(blank, taught, batch, None))
    return torch.stack(rows, 1)
