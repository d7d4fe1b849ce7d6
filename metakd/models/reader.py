"""A tokenizer with padding under which what its model says of a text does not depend on the texts
beside it.

Classifiers of decoders look for a text's last token by ``config.pad_token_id``, absolute positions
move with padding on the left, and some architectures have no mask at all. None of this is asked of
a table of architectures: a small model of the same shape is shown a text alone and beside a longer
one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from metakd.models.sources import (
    input_names,
    knows_words,
    load_config,
    load_tokenizer,
    positions,
    small,
)

SAME = 2e-5
"""Of the largest logit: far above float32's rounding, far below what a wrong token does."""

_SHORT, _LONG = "a good one", "a good one, and not at all what somebody would have thought of it"

_found: dict[tuple, float | None] = {}  # each costs a model

SIDES = ("right", "left")
"""Where to pad, in the order in which they are tried: only few models need it on the left."""


class Reader(NamedTuple):
    """How a model reads texts."""

    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int  # that the model's configuration has to have
    changed: bool = False  # is it, or the side, another than model and tokenizer came with?


def open_reader(source: str, max_length: int) -> Reader:
    """The reader of a directory or hub id.

    Args:
        source: where model and tokenizer are.
        max_length: tokens at which texts are cut, whoever serves the model; the tokenizer's own
            limit if that is less.

    Raises:
        ValueError: there is no tokenizer, or it goes with no padding, see ``padding_of``.
        OSError: there is no model.
    """
    tokenizer = load_tokenizer(source)
    if not knows_words(tokenizer):
        raise ValueError(f"{source} holds no tokenizer; save one beside the model")
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_length)
    see_that_it_pads(source, tokenizer)
    shape, before = load_config(source), tokenizer.padding_side
    *_, last = SIDES
    for tokenizer.padding_side in SIDES:
        try:
            number = padding_of(source, shape, tokenizer)
        except ValueError:
            if tokenizer.padding_side == last:
                raise
        else:
            break
    changed = number != shape.pad_token_id or tokenizer.padding_side != before
    return Reader(tokenizer, number, changed)


def see_that_it_pads(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a padding token one that it has: the end, or the unknown.

    Raises:
        ValueError: it has neither.
    """
    if tokenizer.pad_token_id is None:
        stands_in = tokenizer.eos_token or tokenizer.unk_token
        if stands_in is None:
            raise ValueError(f"{source}: its tokenizer has no padding token; give it one")
        tokenizer.pad_token = stands_in


def padding_of(source: str, shape: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The ``pad_token_id`` that a model has to have to go with this tokenizer; its own if it will
    do.

    Args:
        source: of the model, for messages.
        shape: its configuration.
        tokenizer: with a padding token.

    Raises:
        ValueError: under none do its logits of a text stay the same in a batch.
    """
    for number in dict.fromkeys((shape.pad_token_id, tokenizer.pad_token_id)):
        if number is not None:
            found = _differing(shape, number, tokenizer)
            if found is None or found < SAME:  # None: it does not run, for other reasons
                return number
    raise ValueError(
        f"{source}: what a {shape.model_type} model says of a text depends on the padding beside "
        "it, and so on the other texts of its batch, on whichever side it is padded"
    )


def _differing(
    shape: PretrainedConfig, number: int, tokenizer: PreTrainedTokenizerBase
) -> float | None:
    """See ``differing``, of a small model of this shape whose ``pad_token_id`` is ``number``."""
    shape = copy.deepcopy(shape)
    shape.pad_token_id = number
    pad, side = tokenizer.pad_token_id, tokenizer.padding_side
    question = shape.to_json_string(), pad, side, str(tokenizer(_LONG)["input_ids"])
    if question not in _found:
        _found[question] = None
        with suppress(Exception):  # architectures raise anything; ``fit`` finds out what it is
            if (model := small(shape)) is not None:
                _found[question] = differing(
                    lambda batch: model(**batch).logits,
                    tokenizer,
                    input_names(shape),
                    pad,
                    side,
                    positions(shape),
                )
    return _found[question]


@torch.no_grad()
def differing(
    logits: Callable[[dict[str, Tensor]], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    names: frozenset[str],
    pad: int,
    side: str,
    max_length: int | None = None,
) -> float:
    """By how much the logits of a text differ alone and beside a longer one, as a part of the
    largest.

    Args:
        logits: of a batch of ``names``, each [B, L].
        tokenizer: the model's.
        names: what the model reads.
        pad: the token that fills up.
        side: where, left or right.
        max_length: tokens that the model has positions for.
    """
    texts = tokenizer(
        [_SHORT, _LONG],
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
    )
    short, long = map(len, texts["input_ids"])
    if short >= long:  # both were cut
        short = long // 2
        texts = {name: [rows[0][:short], rows[1]] for name, rows in texts.items()}
    if not short:  # no room, or a tokenizer that knows none of it and has nothing for the unknown
        return 0.0

    def batch(rows: int, length: int) -> dict[str, Tensor]:
        kept = {name: values[:rows] for name, values in texts.items() if name in names}
        kept |= {name: [[]] * rows for name in names - kept.keys()}  # types, of which it makes none
        kept["attention_mask"] = [[1] * len(row) for row in texts["input_ids"][:rows]]
        made = {}
        for name, part in kept.items():
            filled = torch.full((rows, length), pad if name == "input_ids" else 0)
            for row, values in zip(filled, part):
                place = (
                    slice(len(values)) if side == "right" else slice(length - len(values), length)
                )
                row[place] = torch.tensor(values, dtype=row.dtype)
            made[name] = filled
        return made

    alone, beside = logits(batch(1, short)), logits(batch(2, long))
    size = torch.cat([alone, beside]).abs().max().clamp(min=1e-30)
    return float((alone[0] - beside[0]).abs().max() / size)
