"""Students: small encoders made from a preset, from a teacher's own layers, or loaded from a
directory or the hub.

A student is a plain ``AutoModelForSequenceClassification``; everything that only distillation needs
(projections, the domain layer) lives in ``objective.Distillation`` and is never saved with it.
"""

from __future__ import annotations

import copy

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from metakd.config import StudentConfig
from metakd.method.taps import encoder_layers

# Layers, hidden width, heads, feed-forward width. The first is TinyBERT-4 (Jiao et al. 2020), the
# others BERT-mini and BERT-tiny (Turc et al. 2019), the first of them renamed after its shape.
PRESETS = {
    "tinybert-4l-312": (4, 312, 12, 1200),
    "mini-4l-256": (4, 256, 4, 1024),
    "tiny-2l-128": (2, 128, 2, 512),
}


def load_classifier(
    source: str, label2id: dict[str, int], num_labels: int | None = None
) -> PreTrainedModel:
    """A sequence classifier from a directory or hub id, under SDPA, its head fresh where the
    classes differ.

    Args:
        source: directory or hub id; never runs code from the hub.
        label2id: written into the configuration.
        num_labels: outputs, where they are more than the labels (a multi-task teacher's K x M).
    """
    # A K x M head has no names of its own.
    names = (
        {}
        if num_labels
        else {"label2id": label2id, "id2label": {i: name for name, i in label2id.items()}}
    )
    return AutoModelForSequenceClassification.from_pretrained(
        source,
        num_labels=num_labels or len(label2id),
        attn_implementation="sdpa",
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        **names,
    )


def build_student(
    config: StudentConfig,
    *,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    label2id: dict[str, int],
    max_length: int = 0,
) -> PreTrainedModel:
    """A fresh student.

    Args:
        config: preset, layers to copy, or a model.
        source: directory or hub id of the encoder whose layers are copied (``layers`` only).
        tokenizer: the teacher's; presets take its vocabulary size and padding token.
        label2id: M classes.
        max_length: tokens that an example may have; presets get as many positions, 512 at least.

    Raises:
        ValueError: a layer to copy does not exist in ``source``; a model of another vocabulary or
            with fewer positions than ``max_length``.
    """
    if config.model is not None:
        _check_vocabulary(config.model, tokenizer)
        student = load_classifier(config.model, label2id)
        positions = getattr(student.config, "max_position_embeddings", max_length)
        if positions < max_length:
            raise ValueError(f"{config.model} takes {positions} tokens, max_length is {max_length}")
        return student
    if config.layers is not None:
        return keep_layers(load_classifier(source, label2id), config.layers)
    layers, hidden, heads, feed_forward = PRESETS[config.preset]
    shape = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=max(512, max_length),
        pad_token_id=tokenizer.pad_token_id,
        label2id=label2id,
        id2label={i: name for name, i in label2id.items()},
        attn_implementation="sdpa",
    )
    return BertForSequenceClassification(shape)


def _check_vocabulary(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    own = _vocabulary(model)
    if own is None:  # weights without a tokenizer: their size has to do
        size = AutoConfig.from_pretrained(model).vocab_size
        if size < len(tokenizer):
            raise ValueError(
                f"{model} knows {size} tokens, the teacher's tokenizer has {len(tokenizer)}"
            )
    elif own != tokenizer.get_vocab():
        raise ValueError(
            f"{model} has a vocabulary of {len(own)} tokens, the teacher another of "
            f"{len(tokenizer)}: student and teacher must read the same tokens"
        )


def _vocabulary(model: str) -> dict[str, int] | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return None
    # Without tokenizer files transformers makes one up that knows the special tokens alone.
    vocabulary = tokenizer.get_vocab()
    return vocabulary if set(vocabulary) - set(tokenizer.all_special_tokens) else None


def keep_layers(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A copy of ``model`` with only these layers (0-based, in this order); every other weight is
    kept.

    Raises:
        ValueError: a layer number is out of range.
    """
    depth = model.config.num_hidden_layers
    if any(layer >= depth for layer in layers):
        raise ValueError(
            f"student.layers: {layers} names a layer outside 0..{depth - 1} of the source"
        )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):  # architectures that alternate kinds of attention
        config.layer_types = [config.layer_types[layer] for layer in layers]
    stack = encoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    position = {str(layer): str(new) for new, layer in enumerate(layers)}
    kept = {}
    for name, value in model.state_dict().items():
        if name.startswith(prefix):
            layer, rest = name[len(prefix) :].split(".", 1)
            if layer in position:
                kept[f"{prefix}{position[layer]}.{rest}"] = value
        else:
            kept[name] = value
    smaller = type(model)(config)
    smaller.load_state_dict(kept)
    return smaller
