"""Corpora and encoders to start from, so that everything runs without data or models at hand.

``rated_corpus`` fetches short texts that people rated, ``write_corpus`` makes up reviews;
``pretrained_encoder`` fetches MiniLM, ``scratch_encoder`` trains a small encoder where there is no
network; ``prepare`` joins them in a configuration.
"""

from metakd.demo.encoders import pretrained_encoder, scratch_encoder, train_tokenizer
from metakd.demo.made_up import made_up_texts, write_corpus
from metakd.demo.quickstart import prepare
from metakd.demo.rated import rated_corpus

__all__ = [
    "made_up_texts",
    "prepare",
    "pretrained_encoder",
    "rated_corpus",
    "scratch_encoder",
    "train_tokenizer",
    "write_corpus",
]
