"""What ``metakd quickstart`` runs on."""

from __future__ import annotations

import json
from pathlib import Path

from metakd.demo.encoders import pretrained_encoder
from metakd.demo.made_up import write_corpus


def prepare(folder: str | Path) -> Path:
    """Everything the quickstart needs: a corpus, an encoder, and the configuration that joins them.

    Args:
        folder: receives ``corpus/``, ``encoder/`` and ``config.yaml``; what is there already is
            kept.

    Returns:
        The configuration's path, for ``metakd run`` or ``metakd compare``.
    """
    folder = Path(folder)
    corpus, config = folder / "corpus", folder / "config.yaml"
    if not (corpus / "test.jsonl").is_file():
        write_corpus(corpus)
    with (corpus / "train.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    encoder = pretrained_encoder(folder / "encoder", texts)
    if not config.is_file():
        places = {"folder": folder, "encoder": encoder}
        places |= {name: corpus / f"{name}.jsonl" for name in ("train", "validation", "test")}
        # In quotes: a folder may be called 1, or no.
        quoted = {name: json.dumps(str(at), ensure_ascii=False) for name, at in places.items()}
        config.write_text(_CONFIG.format(**quoted), encoding="utf-8")
    return config


# Two of the encoder's layers, so that the student has something to gain from a teacher. Every row
# of the comparison starts from the same copied layers of the pre-trained encoder.
_CONFIG = """\
# Made by `metakd quickstart`; change it and run `metakd run` or `metakd compare` on it.
output_dir: {folder}
data:
  train: {train}
  validation: {validation}
  test: {test}
  max_length: 64
teacher:
  model: {encoder}
  training: {{num_train_epochs: 4, learning_rate: 5.0e-5}}
student:
  layers: [1, 3]
  copy_from: encoder
distill:
  terms: {{attention: 0.1, hard_label: 1.0}}  # raw attention scores are large
  training: {{num_train_epochs: 6, learning_rate: 1.0e-4, per_device_train_batch_size: 16}}
compare:
  rows:
    - {{method: finetune}}
    - {{method: meta, teacher: meta}}
  seeds: [42]
  keep_students: true
"""
