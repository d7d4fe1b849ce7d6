"""Tiny random encoders of the architectures that taps and packing serve."""

from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

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
    names = {
        "num_hidden_layers": "n_layers",
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
    }
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
