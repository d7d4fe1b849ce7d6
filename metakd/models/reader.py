"""A tokenizer with padding under which what its model says of a text does not depend on the texts
beside it.

Classifiers of decoders look for a text's last token by ``config.pad_token_id``, absolute positions
move with padding on the left, and some architectures have no mask at all. None of this is asked of
a table of architectures: a small model of the same shape is shown a text alone and beside a longer
one.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from metakd.models.inputs import (
    LONG,
    SAME,
    SIDES,
    Inputs,
    differing,
    input_names,
    knows_words,
    positions,
    see_that_it_pads,
)
from metakd.models.sources import load_config, load_tokenizer, small

_found: dict[tuple, float | None] = {}  # each costs a model


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
    question = shape.to_json_string(), pad, side, str(tokenizer(LONG)["input_ids"])
    if question not in _found:
        _found[question] = None
        with suppress(Exception):  # architectures raise anything; ``fit`` finds out what it is
            if (model := small(shape)) is not None:

                @torch.no_grad()
                def logits(batch: Inputs):
                    given = {name: torch.from_numpy(values) for name, values in batch.items()}
                    return model(**given).logits.numpy()

                names, limit = input_names(shape), positions(shape)
                _found[question] = differing(logits, tokenizer, names, pad, side, limit)
    return _found[question]
