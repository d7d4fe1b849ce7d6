"""Students: small encoders made from a preset, from a teacher's own layers, or loaded from a
directory or the hub; and whether teacher, student and data fit together.

A student is a plain ``AutoModelForSequenceClassification``; everything that only distillation needs
(projections, the domain layer) lives in ``objective.Distillation`` and is never saved with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from metakd.config import RunConfig, StudentConfig
from metakd.errors import ConfigError
from metakd.method.objective import build_terms, check_widths
from metakd.method.recipe import PAPER, Recipe
from metakd.method.sources import (
    check_embeddings,
    check_labels,
    check_vocabulary,
    load_classifier,
    load_config,
)
from metakd.method.taps import encoder_layers

# Layers, hidden width, heads, feed-forward width. The first is TinyBERT-4 (Jiao et al. 2020), the
# others BERT-mini and BERT-tiny (Turc et al. 2019), the first of them renamed after its shape.
PRESETS = {
    "tinybert-4l-312": (4, 312, 12, 1200),
    "mini-4l-256": (4, 256, 4, 1024),
    "tiny-2l-128": (2, 128, 2, 512),
}


def check_models(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    label2id: dict[str, int],
    recipe: Recipe = PAPER,
) -> None:
    """Do teacher, student, objective and data fit together? Reads configurations and tokenizers,
    no weights, so that a run can ask before it trains anything.

    Args:
        config: the whole configuration.
        tokenizer: the teacher's.
        label2id: of the data.
        recipe: form of the method.

    Raises:
        ConfigError: every pair that does not fit, with both values: number of tokens and token
            numbers, labels, positions, layers, widths.
    """
    problems: list[str] = []

    def note(key: str, check: Callable, *arguments, **options):
        try:
            return check(*arguments, **options)
        except (OSError, ValueError) as error:
            problems.append(f"{key}: {str(error).splitlines()[0]}")
            return None

    source, student = config.teacher.model, config.student
    taught = note("teacher.model", load_config, source)
    length = config.data.max_length
    if taught is not None:
        note("teacher.model", check_embeddings, source, taught, tokenizer)
        note("teacher.model", _check_positions, source, taught, length)
        if config.teacher.kind != "mtl":  # whose head is always fresh
            note("teacher.model", check_labels, source, taught, label2id)
    if student.model is not None:
        shape = note("student.model", load_config, student.model)
        if shape is not None:
            note("student.model", check_vocabulary, student.model, shape, tokenizer)
            note("student.model", check_labels, student.model, shape, label2id)
            note("student.model", _check_positions, student.model, shape, length)
    else:
        shape = None if taught is None else note("student", student_shape, student, taught)
    if taught is not None and shape is not None:
        terms = note(
            "distill",
            build_terms,
            config.distill,
            student_layers=shape.num_hidden_layers,
            teacher_layers=taught.num_hidden_layers,
            recipe=recipe,
        )
        note("distill", check_widths, terms or [], shape.hidden_size, taught.hidden_size)
    if problems:
        listed = "\n  ".join([f"{len(problems)} problems:", *problems])
        raise ConfigError(
            problems[0] if len(problems) == 1 else listed,
            "Choose models that fit each other and the data; nothing was trained.",
        )


def student_shape(student: StudentConfig, taught: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the student's model, as far as its sizes go.

    Args:
        student: preset, layers to copy, or a model.
        taught: the teacher's configuration.

    Raises:
        ValueError: a layer to copy does not exist in the teacher.
        OSError: there is no such model.
    """
    if student.model is not None:
        return load_config(student.model)
    if student.layers is not None:
        return _shortened(taught, student.layers)
    return bert_shape(PRESETS[student.preset], taught.vocab_size)


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
        shape = load_config(config.model)
        check_vocabulary(config.model, shape, tokenizer)
        _check_positions(config.model, shape, max_length)
        return load_classifier(config.model, label2id)
    if config.layers is not None:
        return keep_layers(load_classifier(source, label2id), config.layers)
    shape = bert_shape(
        PRESETS[config.preset],
        len(tokenizer),
        max_position_embeddings=max(512, max_length),
        pad_token_id=tokenizer.pad_token_id,
        label2id=label2id,
        id2label={i: name for name, i in label2id.items()},
        attn_implementation="sdpa",
    )
    return BertForSequenceClassification(shape)


def _check_positions(model: str, shape: PretrainedConfig, max_length: int) -> None:
    positions = getattr(shape, "max_position_embeddings", max_length)
    # DeBERTa's are relative; some of its kind have no others.
    if positions < max_length and getattr(shape, "position_biased_input", True):
        raise ValueError(f"{model} takes {positions} tokens, max_length is {max_length}")


def _shortened(taught: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    depth = taught.num_hidden_layers
    if any(layer >= depth for layer in layers):
        raise ValueError(
            f"student.layers: {layers} names a layer outside 0..{depth - 1} of the source"
        )
    shape = copy.deepcopy(taught)
    shape.num_hidden_layers = len(layers)
    if getattr(shape, "layer_types", None):  # architectures that alternate kinds of attention
        shape.layer_types = [shape.layer_types[layer] for layer in layers]
    return shape


def keep_layers(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A copy of ``model`` with only these layers (0-based, in this order); every other weight is
    kept.

    Raises:
        ValueError: a layer number is out of range.
    """
    config = _shortened(model.config, layers)
    stack = encoder_layers(model)
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
    smaller = type(model)(config)
    smaller.load_state_dict(kept)
    return smaller
