"""What ``metakd quickstart`` runs on: a corpus with one scarce domain, an encoder, and the
configuration that joins them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from metakd.demo.encoders import pretrained_encoder
from metakd.demo.made_up import write_corpus
from metakd.demo.rated import DOMAINS, Most, rated_corpus


class _Corpus(NamedTuple):
    """What tells one corpus from the other in the configuration."""

    scarce: str
    labels: int
    splits: tuple[str, ...]


_RATED = _Corpus("news", 100, ("train", "validation", "test", "unlabelled"))
_MADE_UP = _Corpus("novels", 40, ("train", "validation", "test"))
# As many as train in a few minutes on two cores; the test part of the scarce domain is whole, and
# no student learns from other domains' texts without labels.
_SIZES: dict[str, Most] = {
    "train": 400,
    "validation": 50,
    "test": {**dict.fromkeys(DOMAINS, 300), _RATED.scarce: 1000},
    "unlabelled": {_RATED.scarce: 2000},
}


def prepare(folder: str | Path) -> Path:
    """Everything the quickstart needs: real short texts of four domains, made-up ones where the
    package index cannot be reached; an encoder; and a configuration in which one domain has few
    labels.

    Args:
        folder: receives ``corpus/``, ``encoder/`` and ``config.yaml``; what is there already is
            kept.

    Returns:
        The configuration's path, for ``metakd run`` or ``metakd compare``.
    """
    folder = Path(folder)
    files, config = folder / "corpus", folder / "config.yaml"
    if not (files / "test.jsonl").is_file():
        try:
            rated_corpus(files, **_SIZES)
        except OSError as error:
            print(f"the rated texts could not be fetched ({error}): making up reviews instead")
            write_corpus(files)
    corpus = _RATED if (files / "unlabelled.jsonl").is_file() else _MADE_UP
    with (files / "train.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    encoder = pretrained_encoder(folder / "encoder", texts)
    if not config.is_file():
        # In quotes: a folder may be called 1, or no.
        quoted = {
            name: json.dumps(str(at), ensure_ascii=False)
            for name, at in {"folder": folder, "encoder": encoder}.items()
        }
        data = "".join(
            f"  {name}: {json.dumps(str(files / f'{name}.jsonl'), ensure_ascii=False)}\n"
            for name in corpus.splits
        )
        content = _CONFIG.format(data=data, domain=corpus.scarce, labels=corpus.labels, **quoted)
        config.write_text(content, encoding="utf-8")
    return config


_CONFIG = """\
# Made by `metakd quickstart`; change it and run `metakd run` or `metakd compare` on it.
output_dir: {folder}
data:
{data}  max_length: 64
  labels: {{{domain}: {labels}}}  # the scarce domain; its other texts count as unlabelled
teacher:
  model: {encoder}
  training: {{num_train_epochs: 2, learning_rate: 2.0e-4, selection: last}}
student:
  layers: [0, 2, 5]
  freeze_embeddings: true  # words that its few texts lack keep their meaning
distill:
  domains: [{domain}]
  transfer: unlabelled  # learn from those, too
  layer_map: copied  # each layer learns from the one it was copied from
  terms: {{attention: 0.1}}  # raw attention scores are large
  cache_teacher: all
  training: {{max_steps: 140, num_train_epochs: 1000, learning_rate: 4.0e-4, selection: last}}
compare:
  rows:
    # Higher rates do worse without a teacher; 60 steps see each of 100 labels 19 times.
    - {{method: finetune, learning_rate: 1.0e-4, max_steps: 60}}
    - {{method: finetune_all, learning_rate: 1.0e-4}}
    - {{method: meta, teacher: meta}}
  seeds: [42]
  keep_students: true
"""
