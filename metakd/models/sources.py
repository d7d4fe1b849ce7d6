"""Pre-trained models from directories and the hub, loaded without trust.

Nothing that a model's folder holds is ever run: weights come from safetensors only, and code of a
model's own stays where it is. Nothing is taken for granted either: weights that are missing, of
another shape or not finite are refused, except for a fresh classification head, and so are a
vocabulary and label names that do not fit the data. Messages are ``ValueError`` naming the source,
which the stages turn into errors of the configuration; of models that this toolkit has saved,
``CheckpointError``.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from metakd.config.places import closest, may_be_hub_id, meant
from metakd.errors import CheckpointError
from metakd.models.adapters import base_of, merged
from metakd.models.inputs import knows_words, positions

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_SHOWN = 3
_QUICKLY_MADE = 2e8  # weights that a model is given to be tried out
_BY_LAYER = (
    "layer_types",
    "attention_window",
    "no_rope_layers",
    "mlp_layer_types",
)  # of architectures whose layers differ
_OF_TOKENIZERS = re.compile(
    r"tokenizer|vocab|merges\.txt|spiece|sentencepiece|.*\.(model|tiktoken)$"
)
_NO_NAME = re.compile(r"(label_)?\d+")

CLASSES = "single_label_classification"
"""The usual ``problem_type`` of a configuration."""


def unallocated(shape: PretrainedConfig, **options) -> PreTrainedModel:
    """A classifier of this shape on the ``meta`` device, where weights take no room."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(
            shape, trust_remote_code=False, **options
        )


def small(shape: PretrainedConfig) -> PreTrainedModel | None:
    """A classifier of this shape with weights that were drawn, to be tried out: of its first and
    last layer if it can be built so, or else of all, or else a narrow one; None if that is not made
    quickly, or cannot be built."""
    return next(filter(None, (_drawn(shape, shrunk) for shrunk in (*WIDE, _narrow))), None)


def wide(shape: PretrainedConfig) -> PreTrainedModel | None:
    """As ``small``, but no narrow one, in which what makes a shape may not fit together."""
    return next(filter(None, (_drawn(shape, shrunk) for shrunk in WIDE)), None)


def _drawn(shape: PretrainedConfig, shrunk: Callable) -> PreTrainedModel | None:
    with suppress(Exception), torch.random.fork_rng(devices=[]):  # architectures raise anything
        candidate = shrunk(copy.deepcopy(shape))
        if unallocated(candidate).num_parameters() <= _QUICKLY_MADE:
            torch.manual_seed(0)
            return AutoModelForSequenceClassification.from_config(
                candidate, trust_remote_code=False, dtype=torch.float32
            ).eval()
    return None


def _as_it_is(shape: PretrainedConfig) -> PretrainedConfig:
    return shape


def _shallow(shape: PretrainedConfig) -> PretrainedConfig:
    return shortened(shape, sorted({0, shape.num_hidden_layers - 1}))


WIDE = (_shallow, _as_it_is)


def _narrow(shape: PretrainedConfig) -> PretrainedConfig:
    shape = _shallow(shape)
    shape.hidden_size, shape.intermediate_size = 8 * shape.num_attention_heads, 32
    if getattr(shape, "head_dim", None):
        shape.head_dim = 8
    return shape


def shortened(shape: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model with only these of its layers, 0-based and in this order."""
    shape = copy.deepcopy(shape)
    shape.num_hidden_layers = len(layers)
    for name in _BY_LAYER:
        if isinstance(each := getattr(shape, name, None), list):
            setattr(shape, name, [each[layer] for layer in layers])
    return shape


def load_config(source: str) -> PretrainedConfig:
    """The configuration of a directory or hub id; of an adapter's folder, that of its base.

    Raises:
        ValueError: it needs code of its own.
        OSError: there is none.
    """
    return _without_code(AutoConfig, base_of(source) or source)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id; of an adapter's folder without one, its base's.

    Raises:
        ValueError: it needs code of its own.
        OSError: there is none.
    """
    base = base_of(source)
    if base is not None and not (Path(source) / "tokenizer_config.json").is_file():
        return _without_code(AutoTokenizer, base)
    return _without_code(AutoTokenizer, source)


def load_encoder(source: str) -> PreTrainedModel:
    """An encoder without head, fp32, under SDPA.

    Raises:
        ValueError: it cannot be loaded without running something, or its weights are incomplete or
            not finite.
        OSError: there is none.
    """
    shape = load_config(source)
    if base_of(source) is not None:  # made for a model with its head
        return _load(AutoModelForSequenceClassification, source, shape).base_model
    return _load(AutoModel, source, shape)


def load_classifier(
    source: str,
    label2id: dict[str, int],
    num_labels: int | None = None,
    problem_type: str = CLASSES,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """A sequence classifier, fp32, under SDPA, its head fresh where the classes differ in number.

    Args:
        source: directory or hub id.
        label2id: written into the configuration.
        num_labels: outputs, where they are more than the labels (a multi-task teacher's K x M).
        problem_type: written into the configuration, so that who loads the model elsewhere reads
            its outputs as they are meant.
        pad_token_id: written into the configuration, see ``reader``; None leaves its own.

    Raises:
        ValueError: as ``load_encoder``; or its own labels have these names in another order.
        OSError: there is none.
    """
    shape = load_config(source)
    check_classifies(source, shape)
    written = {}
    if not num_labels:  # a K x M head has no names of its own
        check_labels(source, shape, label2id)
        written = {"label2id": label2id, "id2label": {i: name for name, i in label2id.items()}}
    if pad_token_id is not None:
        written["pad_token_id"] = pad_token_id
    return _load(
        AutoModelForSequenceClassification,
        source,
        shape,
        num_labels=num_labels or len(label2id),
        ignore_mismatched_sizes=True,
        problem_type=problem_type,
        **written,
    )


def load_trained_classifier(folder: Path) -> PreTrainedModel:
    """A classifier that this toolkit has saved: every weight must be there, the head's included.

    Raises:
        CheckpointError: there is none, or what is there is not whole or not finite.
    """
    try:
        shape = load_config(str(folder))
        return _load(AutoModelForSequenceClassification, str(folder), shape, whole=True)
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """What is said of a folder of our own that cannot be read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{folder}: is damaged: {reason.removeprefix(f'{folder}: ')}",
        f"move {folder} away and build it again: `metakd teach` or `metakd distill`",
    )


def check_classifies(source: str, config: PretrainedConfig) -> None:
    """Has transformers a classifier of texts of this architecture?

    Raises:
        ValueError: with its name.
    """
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{source}: is a {config.model_type} model, of which transformers has no classifier of "
            "texts"
        )


def check_labels(source: str, config: PretrainedConfig, label2id: dict[str, int]) -> None:
    """A head that answers to the same names in another order would be renamed without a word.

    A head of another number of classes is replaced, and one without names (``LABEL_0``) or with
    quite other names is trained anew: both are fine. Of numbers nobody can tell which name is
    which.

    Raises:
        ValueError: with both maps.
    """
    own = {name.casefold(): number for name, number in config.label2id.items()}
    wanted = {name.casefold(): number for name, number in label2id.items()}
    if len(own) != len(wanted):
        return
    theirs = dict(sorted(config.label2id.items(), key=lambda item: item[1]))
    moved = [name for name, number in wanted.items() if own.get(name, number) != number]
    if moved:
        raise ValueError(
            f"{source} has the labels {theirs}, the data {label2id}: its head would give "
            f"wrong names to {', '.join(moved[:_SHOWN])}; save the model without its head to train "
            "a fresh one"
        )
    if all(map(str.isdecimal, wanted)) and not any(map(_NO_NAME.fullmatch, own)):
        raise ValueError(
            f"{source} has the labels {theirs}, the data only numbers: nobody can tell which is "
            "which; write the names in the data, or save the model without its head to train a "
            "fresh one"
        )


def why_not_alike(source: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """How the tokens that a model knows differ from those of this tokenizer; None if they have the
    same numbers. Weights without a tokenizer are taken to know them.

    Raises:
        ValueError: its tokenizer cannot be read.
        OSError: there is none.
    """
    own, taught = _vocabulary(source), tokenizer.get_vocab()
    if own is None or own == taught:
        return None
    token = min(
        token for token in own.keys() | taught.keys() if own.get(token) != taught.get(token)
    )
    return (
        f"{source} has a vocabulary of {len(own)} tokens, the teacher another of {len(taught)}: "
        f"{token!r} is number {own.get(token, 'none')} there and {taught.get(token, 'none')} here"
    )


def check_embeddings(
    source: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Has every token of the tokenizer an embedding?

    Raises:
        ValueError: with both numbers.
    """
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"{source} knows {config.vocab_size} tokens, the tokenizer has {len(tokenizer)}"
        )


def check_positions(model: str, shape: PretrainedConfig, max_length: int) -> None:
    """Has the model a position for every token of the longest text?

    Raises:
        ValueError: with both numbers.
    """
    limit = positions(shape)
    if limit is not None and limit < max_length:
        raise ValueError(f"{model} takes {limit} tokens, max_length is {max_length}")


def check_finite(source: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """One NaN among the weights of a teacher makes every loss NaN, many steps later.

    Raises:
        ValueError: with the first tensor's name, how many of its values are not finite, and one.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
            wrong = tensor[~finite]
            raise ValueError(
                f"{source}: {wrong.numel()} of the {tensor.numel()} values of {name} are not "
                f"finite (the first is {wrong[0].item()})"
            )


def _load(
    auto: type, source: str, shape: PretrainedConfig, whole: bool = False, **options
) -> PreTrainedModel:
    _check_weights_are_there(source)
    if base := base_of(source):
        adapted = merged(_load(auto, base, shape, **options), source)
        check_finite(source, dict(adapted.named_parameters()))
        return adapted
    try:
        model, found = _without_code(
            auto,
            source,
            use_safetensors=True,
            attn_implementation=_attention_of(auto, shape),
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (SafetensorError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source}: its weights cannot be read: {first}") from error
    different = {
        name: f"{stored} for {wanted}"
        for name, *sizes in found["mismatched_keys"]
        for stored, wanted in [(tuple(size) for size in sizes)]
    }
    lost = dict.fromkeys(found["missing_keys"], "missing") | different
    if not whole:
        lost = {name: why for name, why in lost.items() if not _may_be_fresh(name, model)}
    if lost:
        shown = ", ".join(f"{name} ({why})" for name, why in sorted(lost.items())[:_SHOWN])
        raise ValueError(f"{source}: {len(lost)} weights do not fit its config.json: {shown}")
    if getattr(model.config, "use_cache", False):  # of keys and values, for what writes texts
        model.config.use_cache = False
    # Of a model that is read into shards, this process can only check its own.
    own = {name: getattr(value, "ds_tensor", value) for name, value in model.named_parameters()}
    check_finite(source, own | dict(model.named_buffers()))
    return model


def _attention_of(auto: type, config: PretrainedConfig) -> str:
    """SDPA, which most architectures have, or else what they all have."""
    found = auto._model_mapping.get(type(config), ())
    [kind, *_] = found if isinstance(found, (list, tuple)) else [found]
    return "sdpa" if kind._supports_sdpa else "eager"


def _may_be_fresh(name: str, model: nn.Module) -> bool:
    """Is this a weight that a pre-trained encoder need not have: the head's or the pooler's?"""
    prefix = f"{model.base_model_prefix}."
    is_head = model.base_model is not model and not name.startswith(prefix)
    return is_head or name.removeprefix(prefix).startswith("pooler.")


def _check_weights_are_there(source: str) -> None:
    folder = Path(source)
    files = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if not folder.is_dir() or any(name.endswith(".safetensors") for name in files):
        return
    pickled = sorted(name for name in files if Path(name).suffix in _PICKLES)
    if not pickled:
        raise OSError(f"{source}: holds no weights (model.safetensors)")
    raise ValueError(
        f"{source} holds {', '.join(pickled[:_SHOWN])} and no safetensors: such files can run code "
        "when they are read, save the model with save_pretrained first"
    )


def _without_code(auto: type, source: str, **options):
    path = Path(source)
    if not path.exists() and not may_be_hub_id(source, bare=True):
        raise OSError(f"{source}: no such folder, nor a hub id owner/name{meant(path)}")
    if (path / "config.json").is_file():
        _look_at_config(path / "config.json")
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, SafetensorError, RuntimeError):
        raise
    except Exception as error:  # files with something wrong make libraries raise anything
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{source} needs code of its own, which is never run; use a model that "
                "transformers knows by itself"
            ) from None
        said = " ".join(str(error).split("\n\n")[0].split())
        kind = type(error).__name__
        raise ValueError(f"{source}: its files cannot be used: {kind}: {said}") from error


def _look_at_config(file: Path) -> None:
    """What transformers says of these in words that name neither file nor reason.

    Raises:
        ValueError: it is no configuration, or of no model that this transformers knows.
    """
    try:
        shape = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error})") from error
    kind = shape.get("model_type") if isinstance(shape, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{file}: names no model_type")
    if kind not in CONFIG_MAPPING and "auto_map" not in shape:
        version = transformers.__version__
        raise ValueError(
            f"{file}: model_type {kind!r} is not known to transformers {version}"
            f"{closest(kind, CONFIG_MAPPING)}"
        )


def _vocabulary(source: str) -> dict[str, int] | None:
    folder = Path(source)
    if folder.is_dir() and not any(map(_OF_TOKENIZERS.match, (f.name for f in folder.iterdir()))):
        return _vocabulary(base) if (base := base_of(source)) else None
    tokenizer = load_tokenizer(source)
    return tokenizer.get_vocab() if knows_words(tokenizer) else None
