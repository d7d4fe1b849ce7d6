"""What a model reads, and how texts are filled up for it.

Imports neither torch nor transformers, so that who serves an exported model need not wait for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Inputs = dict[str, np.ndarray]

SAME = 2e-5
"""Of the largest logit: far above float32's rounding, far below what a wrong token does."""

SIDES = ("right", "left")
"""Where to pad, in the order in which they are tried: only few models need it on the left."""

SHORT, LONG = "a good one", "a good one, and not at all what somebody would have thought of it"
"""What padding is tried on."""

_BEHIND_PADDING = re.compile(
    "roberta|camembert|data2vec|esm|ibert|layoutlmv3|lilt|longformer|luke|markuplm|mpnet|xmod"
)


def input_names(shape: PretrainedConfig) -> frozenset[str]:
    """What a model reads; token types only where it tells them apart."""
    types = {"token_type_ids"} if getattr(shape, "type_vocab_size", 0) > 1 else set()
    return frozenset({"input_ids", "attention_mask"} | types)


def positions(shape: PretrainedConfig) -> int | None:
    """Tokens that a model has positions for, None where there is no limit."""
    number = getattr(shape, "max_position_embeddings", None)
    # DeBERTa's are relative; some of its kind have no others.
    if number is None or not getattr(shape, "position_biased_input", True):
        return None
    # RoBERTa and its kin count theirs from behind the padding's.
    return number - 1 - shape.pad_token_id if _BEHIND_PADDING.search(shape.model_type) else number


def knows_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Without tokenizer files transformers makes one up that knows the special tokens alone."""
    return bool(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


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


def differing(
    logits: Callable[[Inputs], np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    names: frozenset[str],
    pad: int,
    side: str,
    max_length: int | None = None,
) -> float:
    """By how much the logits of a text differ alone and beside a longer one, as a part of the
    largest.

    Args:
        logits: of a batch of ``names``, each [B, L], int64.
        tokenizer: the model's.
        names: what the model reads.
        pad: the token that fills up.
        side: where, left or right.
        max_length: tokens that the model has positions for.
    """
    texts = tokenizer(
        [SHORT, LONG],
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

    def batch(rows: int, length: int) -> Inputs:
        kept = {name: values[:rows] for name, values in texts.items() if name in names}
        kept |= {name: [[]] * rows for name in names - kept.keys()}  # types, of which it makes none
        kept["attention_mask"] = [[1] * len(row) for row in texts["input_ids"][:rows]]
        made = {}
        for name, part in kept.items():
            filled = np.full((rows, length), pad if name == "input_ids" else 0, np.int64)
            for row, values in zip(filled, part):
                place = (
                    slice(len(values)) if side == "right" else slice(length - len(values), length)
                )
                row[place] = values
            made[name] = filled
        return made

    alone, beside = logits(batch(1, short)), logits(batch(2, long))
    size = np.maximum(np.abs(np.concatenate([alone, beside])).max(), np.float32(1e-30))
    return float(np.abs(alone[0] - beside[0]).max() / size)
