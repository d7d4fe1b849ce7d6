"""Taps see what an eager run would show, and leave no trace: in the logits, the model or its files."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from metakd.method.taps import Features, Taps, encoder_layers, layer_map, model_inputs, pool

EVERYTHING = {"embedding", "hidden", "last_hidden", "query", "key", "value"}
LAYERS, HEADS, HIDDEN = 3, 4, 32
SHAPE = {
    "vocab_size": 50,
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "attn_implementation": "sdpa",
}


def _distilbert():
    names = {"num_hidden_layers": "n_layers", "hidden_size": "dim", "num_attention_heads": "n_heads"}
    names["intermediate_size"] = "hidden_dim"
    return DistilBertForSequenceClassification(
        DistilBertConfig(**{names.get(name, name): value for name, value in SHAPE.items()})
    )


def _modernbert():
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    return ModernBertForSequenceClassification(ModernBertConfig(**SHAPE, **special))


BUILDERS = {
    "distilbert": _distilbert,
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SHAPE)),
    # Embeddings narrower than the layers: what counts as embedding output is the projected one.
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SHAPE, embedding_size=16)),
    "modernbert": _modernbert,
}


@pytest.fixture
def build(tiny_bert):
    def named(name):
        model = tiny_bert(LAYERS, HIDDEN, HEADS) if name == "bert" else BUILDERS[name]()
        return model.eval()

    return named


ARCHITECTURES = ["bert", *BUILDERS]
WITH_SEPARATE_PROJECTIONS = [name for name in ARCHITECTURES if name != "modernbert"]


def query_key_value(layer: nn.Module) -> list[nn.Linear]:
    attention = layer.attention
    if hasattr(attention, "q_lin"):
        return [attention.q_lin, attention.k_lin, attention.v_lin]
    return [getattr(attention.self, name) for name in ("query", "key", "value")]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_plain_sdpa_bit_for_bit(build, make_batch, name):
    model, batch = build(name), make_batch()
    plain = model(**model_inputs(batch) | _without_types(name)).logits
    features = Taps(model, EVERYTHING)(_known(batch, name))
    assert torch.equal(features.logits, plain)


def _without_types(name):
    return {} if name in ("bert", "electra", "roberta") else {"token_type_ids": None}


def _known(batch, name):
    """The batch as the architecture's own tokenizer would give it."""
    keep = name in ("bert", "electra", "roberta")
    return {key: value for key, value in batch.items() if keep or key != "token_type_ids"}
