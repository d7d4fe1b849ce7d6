"""Students: small encoders made from a preset, from a teacher's own layers, or loaded from a
directory or the hub.

A student is a plain ``AutoModelForSequenceClassification``; everything that only distillation needs
(projections, the domain layer) lives in ``objective.Distillation`` and is never saved with it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from metakd.config import StudentConfig
from metakd.models.sources import (
    CLASSES,
    check_embeddings,
    check_positions,
    damaged,
    load_classifier,
    load_config,
    shortened,
    unallocated,
)
from metakd.models.taps import encoder_layers

# Layers, hidden width, heads, feed-forward width. The first is TinyBERT-4 (Jiao et al. 2020), the
# others BERT-mini and BERT-tiny (Turc et al. 2019), the first of them renamed after its shape.
PRESETS = {
    "tinybert-4l-312": (4, 312, 12, 1200),
    "mini-4l-256": (4, 256, 4, 1024),
    "tiny-2l-128": (2, 128, 2, 512),
}


def student_shape(
    student: StudentConfig, taught: PretrainedConfig, max_length: int = 0
) -> PretrainedConfig:
    """The configuration of the student's model, as far as its sizes go.

    Args:
        student: preset, layers to copy, or a model.
        taught: the teacher's configuration.
        max_length: tokens that an example may have.

    Raises:
        ValueError: a layer to copy does not exist in the teacher, or its layers share weights.
        OSError: there is no such model.
    """
    if student.model is not None:
        return load_config(student.model)
    if student.layers is not None:
        with torch.device("meta"):
            return keep_layers(unallocated(taught), student.layers).config
    return bert_shape(
        PRESETS[student.preset],
        taught.vocab_size,
        max_position_embeddings=max(512, max_length),
    )


def bert_shape(sizes: tuple[int, int, int, int], vocab_size: int, **options) -> BertConfig:
    """The configuration of a BERT of these sizes, in the order of ``PRESETS``."""
    layers, hidden, heads, feed_forward = sizes
    return BertConfig(
        vocab_size=vocab_size,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        **options,
    )


def build_student(
    config: StudentConfig,
    *,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    label2id: dict[str, int],
    max_length: int = 0,
    problem_type: str = CLASSES,
    pad_token_id: int | None = None,
    start: Path | None = None,
) -> PreTrainedModel:
    """A fresh student.

    Args:
        config: preset, layers to copy, or a model.
        source: directory or hub id of the encoder whose layers are copied (``layers`` only).
        tokenizer: that it reads with; presets take its vocabulary size and padding token.
        label2id: M classes.
        max_length: tokens that an example may have; presets get as many positions, 512 at least.
        problem_type: written into its configuration.
        pad_token_id: likewise, but for presets; None leaves that of the model.
        start: what pretraining has left of a preset (``fresh_encoder``); None: random weights.

    Raises:
        ValueError: a layer to copy does not exist in ``source``; a model of fewer tokens than the
            tokenizer or with fewer positions than ``max_length``.
        CheckpointError: ``start`` cannot be read.
    """
    if config.model is not None:
        shape = load_config(config.model)
        check_embeddings(config.model, shape, tokenizer)
        check_positions(config.model, shape, max_length)
        student = load_classifier(config.model, label2id, None, problem_type, pad_token_id)
    elif config.layers is not None:
        whole = load_classifier(source, label2id, None, problem_type, pad_token_id)
        student = keep_layers(whole, config.layers)
    elif start is not None:
        try:
            student = load_classifier(str(start), label2id, problem_type=problem_type)
        except (OSError, ValueError) as error:
            raise damaged(start, error) from error
    else:
        shape = _preset_shape(
            config.preset,
            tokenizer,
            max_length,
            label2id=label2id,
            id2label={i: name for name, i in label2id.items()},
        )
        student = BertForSequenceClassification(shape)
        student.config.problem_type = problem_type
    if config.freeze_embeddings:
        word_embeddings(student).requires_grad_(False)
    return student


def word_embeddings(model: PreTrainedModel) -> nn.Module:
    """The table that is not trained where ``freeze_embeddings`` says so.

    Raises:
        ValueError: this architecture has none.
    """
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        name = type(model).__name__
        raise ValueError(f"student.freeze_embeddings: {name} has no table of words") from None


def fresh_encoder(
    preset: str, tokenizer: PreTrainedTokenizerBase, max_length: int = 0
) -> PreTrainedModel:
    """The encoder of a preset with random weights, to be pretrained: without a head, and without
    the pooler, which would learn nothing."""
    return BertModel(_preset_shape(preset, tokenizer, max_length), add_pooling_layer=False)


def _preset_shape(
    preset: str, tokenizer: PreTrainedTokenizerBase, max_length: int, **options
) -> BertConfig:
    return bert_shape(
        PRESETS[preset],
        len(tokenizer),
        max_position_embeddings=max(512, max_length),
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
        **options,
    )


def _shortened(taught: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    depth = taught.num_hidden_layers
    if any(layer >= depth for layer in layers):
        raise ValueError(
            f"student.layers: {layers} names a layer outside 0..{depth - 1} of the source"
        )
    return shortened(taught, layers)


def keep_layers(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A copy of ``model`` with only these layers (0-based, in this order); every other weight is
    kept.

    Where an architecture builds its first layer otherwise (ModernBERT's has no norm before its
    attention, because the embeddings end in one), a layer that comes first leaves such a norm
    behind, and one that was first has a fresh one.

    Raises:
        ValueError: a layer number is out of range, or layers are built differently in other ways.
    """
    stack = encoder_layers(model)
    config = _shortened(model.config, layers)
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    kept = {}
    for name, value in model.state_dict().items():
        if name.startswith(prefix):
            number, rest = name[len(prefix) :].split(".", 1)
            for new, layer in enumerate(layers):  # one of them may be wanted twice
                if str(layer) == number:
                    kept[f"{prefix}{new}.{rest}"] = value
        else:
            kept[name] = value
    try:
        type(config).from_dict(config.to_dict())  # as who loads the student will
        smaller = type(model)(config)
    except Exception as error:  # architectures raise anything
        raise ValueError(
            f"student.layers: {type(model).__name__} cannot be built of {layers}: {error}"
        ) from error
    own = smaller.state_dict()
    for name in own.keys() ^ kept.keys():
        if not name.startswith(prefix) or (own | kept)[name].dim() != 1:
            raise ValueError(
                f"student.layers: {layers} of {type(model).__name__}: its layers are built "
                f"differently ({name})"
            )
    smaller.load_state_dict(kept, strict=False)
    return smaller
