"""Texts that teacher and student read with tokenizers of their own: one text, two rows of tokens.

A batch of such texts has the student's tokens under their usual names and the teacher's beside
them, ``teacher.input_ids`` and so on; what is known of a text stands there once. Only what is said
of whole texts can then be compared (``Term.compares_tokens``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from metakd.data.batches import Batch, Collate
from metakd.data.corpus import Corpus, Split
from metakd.models.taps import Features

_TEACHER = "teacher."
_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "real_tokens")


def _places(split: Split) -> Tensor:
    """Row of each example by its index."""
    rows = torch.full((int(split.index.max()) + 1,), -1)
    rows[split.index] = torch.arange(len(split))
    return rows


def reread(texts: Split, corpus: Corpus) -> Split:
    """The same texts with the tokens that they have in another reading of the corpus."""
    known = [corpus.train] + ([corpus.unlabelled] if corpus.unlabelled is not None else [])
    whole = Split.joined([replace(split, columns={}) for split in known])
    places = _places(whole)[texts.index]
    assert (places >= 0).all(), "both readings are of one corpus"
    same = whole.select(places)
    return replace(texts, input_ids=same.input_ids, token_type_ids=same.token_type_ids)


def read_twice(collate: Collate, teachers: Collate, texts: Split) -> Collate:
    """As ``collate``, with the teacher's tokens in the batch.

    Args:
        collate: the student's.
        teachers: the teacher's.
        texts: as the teacher reads them.
    """
    places = _places(texts)

    def both(examples: list[dict]) -> Batch:
        batch = collate(examples)
        heard = teachers([texts[row] for row in places[batch["index"]].tolist()])
        return batch | {_TEACHER + name: heard[name] for name in _TOKENS if name in heard}

    return both


def as_teacher_reads(show: Callable[[Batch], Features]) -> Callable[[Batch], Features]:
    """What a teacher shows of batches that ``read_twice`` has made."""

    def shown(batch: Batch) -> Features:
        kept = {name: value for name, value in batch.items() if name not in _TOKENS}
        heard = {n: batch[_TEACHER + n] for n in _TOKENS if _TEACHER + n in batch}
        return show(kept | heard)

    return shown
