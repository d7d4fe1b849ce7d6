"""A corpus in memory: from the ``data`` block of a configuration to tokenised splits.

``load_corpus`` reads and checks (``data.reading``), tokenises and splits, or takes from a cache
(``data.cache``) what it tokenised before; a ``Split`` holds its examples. Sizes: N examples of a
split.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from metakd import __version__
from metakd.config import DataConfig
from metakd.data.cache import TensorCache
from metakd.data.digests import content_key
from metakd.data.reading import ONE_DOMAIN, UNLABELLED, Row, read_corpus, read_plain_texts
from metakd.data.soft_labels import as_logits
from metakd.data.tables import LeftOut
from metakd.errors import ConfigError, DataError
from metakd.method.tasks import SINGLE_LABEL, TASKS, Task

SOFT = "soft"
"""Column of what a teacher elsewhere said of each text: logits [N, M]."""

UNKNOWN_WARNED, UNKNOWN_REFUSED = 0.2, 0.8
"""Shares of tokens unknown to the tokenizer above which a corpus is doubtful, and useless."""

_TOKENISE_AT_ONCE = 1024
_OWN_COLUMNS = (
    *("input_ids", "attention_mask", "token_type_ids", "real_tokens"),
    *("labels", "domain", "index"),
)


class Tokens(Sequence[list[int]]):
    """Token ids of N examples in one tensor; reads as a list of lists, in a fraction of the memory.

    Args:
        flat: ids of all examples one after the other, an integer tensor.
        lengths: tokens of each example, ``[N]`` int64.
    """

    def __init__(self, flat: Tensor, lengths: Tensor):
        self.flat = flat
        self.lengths = lengths
        self._ends = lengths.cumsum(0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> list[int]:
        end = int(self._ends[i])
        return self.flat[end - int(self.lengths[i]) : end].tolist()

    @classmethod
    def joined(cls, parts: Sequence[Tokens]) -> Tokens:
        """The examples of all parts, one after the other."""
        return cls(
            torch.cat([part.flat for part in parts]), torch.cat([part.lengths for part in parts])
        )

    def select(self, rows: Tensor) -> Tokens:
        """The examples ``rows`` [n], in that order."""
        lengths = self.lengths[rows]
        # Positions in ``flat``: those of each example's start, plus 0, 1, 2, ... inside it.
        shift = self._ends[rows] - lengths.cumsum(0)
        positions = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
        return Tokens(self.flat[positions], lengths)


@dataclass(eq=False)
class Split(Dataset):
    """Tokenised examples in memory.

    Args:
        input_ids: token ids of each example, special tokens included, not padded.
        labels: of each example, as ``task`` has them: classes ``[N]`` int64, for one.
        domain: domain of each example, ``[N]`` int64.
        index: the example's 0-based row in its source as read, ``[N]`` int64. It survives views,
            and after a held-out validation split the indices of train have gaps.
        token_type_ids: like ``input_ids``, or None where the tokenizer has none.
        columns: further values per example, each ``[N, ...]``, which batches carry under the same
            name.
        task: what labels mean.
    """

    input_ids: Tokens
    labels: Tensor
    domain: Tensor
    index: Tensor
    token_type_ids: Tokens | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    task: Task = SINGLE_LABEL

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        return self.input_ids.lengths.tolist()

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict:
        example = {"input_ids": self.input_ids[i]}
        if self.token_type_ids is not None:
            example["token_type_ids"] = self.token_type_ids[i]
        tensors = {
            "labels": self.labels,
            "domain": self.domain,
            "index": self.index,
            **self.columns,
        }
        return example | {name: tensor[i] for name, tensor in tensors.items()}

    def view(self, domain: int | None = None, fraction: float = 1.0, seed: int = 0) -> Split:
        """A part of the split, in the same order.

        Args:
            domain: keep this domain only; None keeps all.
            fraction: share to keep, drawn per domain and label so that their proportions stay; of
                every combination that occurs at least one example is kept.
            seed: of the draw.
        """
        rows = (
            torch.arange(len(self))
            if domain is None
            else torch.nonzero(self.domain == domain).flatten()
        )
        if fraction < 1.0:
            rows = rows[_stratified(self.select(rows), fraction, seed)]
        return self.select(rows)

    @property
    def strata(self) -> Tensor:
        """[N], groups of the labels whose shares are kept where examples are drawn."""
        return self.task.strata(self.labels)

    def with_column(self, name: str, values: Tensor) -> Split:
        """The same split with a value per example added or replaced; batches then carry ``name``.

        Raises:
            ValueError: if ``name`` is one of the split's own or the values are not one per example.
        """
        if name in _OWN_COLUMNS:
            raise ValueError(f"name: {name!r} is reserved")
        if len(values) != len(self):
            raise ValueError(f"values: {len(values)} for {len(self)} examples")
        return replace(self, columns={**self.columns, name: values})

    @classmethod
    def joined(cls, parts: Sequence[Split]) -> Split:
        """The examples of all parts, one after the other; they must have the same columns."""
        kinds = [part.token_type_ids for part in parts]
        known = [kind for kind in kinds if kind is not None]
        return cls(
            Tokens.joined([part.input_ids for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat([part.domain for part in parts]),
            torch.cat([part.index for part in parts]),
            Tokens.joined(known) if len(known) == len(parts) else None,
            {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns},
            parts[0].task,
        )

    def select(self, rows: Tensor) -> Split:
        """The examples ``rows`` [n], in that order."""
        kinds = self.token_type_ids
        return Split(
            self.input_ids.select(rows),
            self.labels[rows],
            self.domain[rows],
            self.index[rows],
            None if kinds is None else kinds.select(rows),
            {name: values[rows] for name, values in self.columns.items()},
            self.task,
        )


@dataclass(eq=False)
class Corpus:
    """The splits, the names of the domains (``Split.domain`` indexes them) and the ids of what
    models have an output for."""

    train: Split
    validation: Split
    test: Split | None
    domains: list[str]
    label2id: dict[str, int]
    unlabelled: Split | None = None  # its indices go on after those of train
    left_out: Sequence[LeftOut] = ()  # rows of the sources that the configuration drops
    doubts: Sequence[str] = ()  # what was said of them

    @property
    def task(self) -> Task:
        """What labels mean."""
        return self.train.task


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def load_corpus(
    config: DataConfig,
    tokenizer,
    *,
    seed: int = 0,
    cache: Path | None = None,
    say: Callable[[str], None] = _warn,
) -> Corpus:
    """Reads, checks and tokenises a corpus; ``reading.read_corpus`` says what is accepted.

    Domains are sorted by name; label ids follow the sorted labels of train, integers in numeric
    order. Without a ``validation`` source, ``validation_fraction`` of train is held out, stratified
    by domain and label; an example that also occurs on the other side goes back to train.
    ``data_fraction`` then subsamples what is left of train, stratified alike, so that validation
    does not depend on it. ``withhold`` is only checked here: which model goes without those domains
    is for its trainer to say. Last, of the domains in ``labels`` so many rows of train are kept,
    stratified alike, and as many at most of validation; the others join the unlabelled texts.

    Args:
        config: the ``data`` block.
        tokenizer: a Hugging Face tokenizer. Longer examples are cut at ``config.max_length``
            tokens, of a pair the longer text first.
        seed: of the held-out split and the subsample.
        cache: folder that keeps the tokenised splits between runs, keyed by the content of the
            sources, the tokenizer, ``max_length``, the columns and the version. Only a corpus
            without a problem is kept; one from the hub, whose content has no digest here, is not.
            Several processes may share the folder; to have it tokenised once, let one of them come
            first.
        say: told what is doubtful, and when a cache could not be used or written, a line each; by
            default as warnings.

    Raises:
        DataError: with every problem of every file.
        ConfigError: if ``max_length`` is more than the tokenizer says its model can take.
    """
    limit = tokenizer.model_max_length
    if config.max_length > limit:
        raise ConfigError(
            f"data.max_length is {config.max_length}, the model of the tokenizer "
            f"{tokenizer.name_or_path} takes {limit} tokens",
            f"Set data.max_length to at most {limit}.",
        )
    whole = _cached(config, tokenizer, cache, say)
    for text in whole.warnings:
        say(text)
    train, validation = whole.splits["train"], whole.splits.get("validation")
    if validation is None:
        train, validation = _hold_out(train, whole.first_alike, config, seed)
    train = train.view(fraction=config.data_fraction, seed=seed)
    label2id = {name: i for i, name in enumerate(whole.labels)}
    test, unlabelled = whole.splits.get("test"), whole.splits.get(UNLABELLED)
    if unlabelled is not None:
        index = unlabelled.index + len(whole.splits["train"])
        unlabelled = replace(unlabelled, index=index)
    task = train.task.fitted(train.labels)
    known = [
        None if split is None else replace(split, task=task)
        for split in (train, validation, test, unlabelled)
    ]
    corpus = Corpus(*known[:3], whole.domains, label2id, known[3], whole.left_out, whole.warnings)
    for name, wanted in config.labels.items():
        if name not in whole.domains:
            raise ConfigError(
                f"data.labels: {name} is not among {', '.join(whole.domains)}", "correct the name"
            )
        _keep_labels(corpus, whole.domains.index(name), wanted, seed)
    return corpus


def _keep_labels(corpus: Corpus, domain: int, wanted: float, seed: int) -> None:
    """Leave so many labels of a domain in train, and no more in validation."""
    train, size = corpus.train, int((corpus.train.domain == domain).sum())
    number = wanted if isinstance(wanted, int) else max(1, round(wanted * size))
    classes = len(train.labels[train.domain == domain].unique(dim=0))
    if train.task.one_class and number < classes:
        raise ConfigError(
            f"data.labels: {number} of {corpus.domains[domain]}, which has {classes} classes",
            "give at least one of each",
        )
    kept = _kept_rows(train, domain, number, seed)
    demoted = train.select(torch.nonzero(~kept).flatten())
    corpus.train = train.select(torch.nonzero(kept).flatten())
    kept = _kept_rows(corpus.validation, domain, number, seed)
    corpus.validation = corpus.validation.select(torch.nonzero(kept).flatten())
    if len(demoted):
        demoted = replace(demoted, labels=demoted.task.unknown(demoted.labels))
        parts = [demoted] if corpus.unlabelled is None else [corpus.unlabelled, demoted]
        corpus.unlabelled = Split.joined(parts)


def _kept_rows(split: Split, domain: int, number: int, seed: int) -> Tensor:
    """[N], False for rows of a domain that are more than so many."""
    kept = torch.ones(len(split), dtype=torch.bool)
    rows = torch.nonzero(split.domain == domain).flatten()
    if number < len(rows):
        kept[rows] = False
        kept[rows[_stratified(split.select(rows), number, seed)]] = True
    return kept


@dataclass
class _Whole:
    """A corpus as its sources hold it, tokenised."""

    splits: dict[str, Split]
    first_alike: Tensor  # [N] of train: the first row with the same text, pair and domain
    domains: list[str]
    labels: list[str]
    warnings: list[str]  # of the checks
    left_out: list[LeftOut]


def _cached(
    config: DataConfig, tokenizer, folder: Path | None, say: Callable[[str], None]
) -> _Whole:
    named = config.train, config.validation, config.test, config.unlabelled
    sources = [Path(source) for source in named if source is not None]
    if folder is None or not all(source.exists() for source in sources):
        return _read_and_tokenise(config, tokenizer)
    later = {"validation_fraction", "data_fraction", "labels"}
    decides = config.model_dump(mode="json", exclude=later)
    settled = json.dumps([__version__, decides], sort_keys=True)
    key = content_key(settled, *sources, *_tokenizer_state(tokenizer))
    store = TensorCache(folder, say)
    return _kept(store, "corpus", key, lambda: _read_and_tokenise(config, tokenizer), config)


def _kept(
    store: TensorCache, name: str, key: str, make: Callable[[], _Whole], config: DataConfig
) -> _Whole:
    if found := store.get(name, key):
        return _from_tensors(*found, TASKS[config.task])
    whole = make()
    store.put(name, key, *_to_tensors(whole))
    return whole


def load_texts(
    files: Sequence[str],
    config: DataConfig,
    tokenizer,
    label2id: dict[str, int],
    *,
    cache: Path,
    say: Callable[[str], None],
) -> Split:
    """Reads, checks and tokenises texts beside a corpus, which have neither label nor domain;
    ``reading.read_plain_texts`` says what is accepted.

    Args:
        files: of texts.
        config: the ``data`` block.
        tokenizer: the corpus'.
        label2id: the corpus'.
        cache: folder that keeps them, tokenised.
        say: told what ``data.on_problem`` left out, and when a cache could not be used.

    Returns:
        The texts, under the number of the first domain.

    Raises:
        DataError: with every problem of every file.
    """
    written = {"text", "max_length", "on_problem", "encoding", "delimiter", "quoting", "task"}
    decides = config.model_dump(mode="json", include=written)
    settled = json.dumps([__version__, decides, len(label2id)], sort_keys=True)
    key = content_key(settled, *map(Path, files), *_tokenizer_state(tokenizer))

    def read() -> _Whole:
        rows, left_out = read_plain_texts(files, config)
        split = _tokenise(rows, tokenizer, config, {ONE_DOMAIN: 0}, label2id)
        said = [str(one) for one in left_out]
        return _Whole({"texts": split}, torch.empty(0), [ONE_DOMAIN], [], said, left_out)

    whole = _kept(TensorCache(cache, say), "texts", key, read, config)
    for text in whole.warnings:
        say(text)
    return whole.splits["texts"]


def _tokenizer_state(tokenizer) -> Iterator[str | bytes]:
    """All that decides what a tokenizer says, from the files it would save."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.name == "tokenizer.json":
                # Its last call left its truncation and padding in there.
                state = json.loads(file.read_bytes()) | {"truncation": None, "padding": None}
                yield from (file.name, json.dumps(state, sort_keys=True))
            elif file.is_file():
                yield from (file.name, file.read_bytes())


def _to_tensors(whole: _Whole) -> tuple[dict[str, Tensor], dict]:
    tensors = {"first_alike": whole.first_alike}
    for name, split in whole.splits.items():
        tensors |= {
            f"{name}.input_ids": split.input_ids.flat,
            f"{name}.lengths": split.input_ids.lengths,
            f"{name}.labels": split.labels,
            f"{name}.domain": split.domain,
        }
        if split.token_type_ids is not None:
            tensors[f"{name}.token_type_ids"] = split.token_type_ids.flat
        tensors |= {f"{name}.{column}": values for column, values in split.columns.items()}
    described = {"domains": whole.domains, "labels": whole.labels, "warnings": whole.warnings}
    return tensors, described | {"splits": list(whole.splits), "left_out": whole.left_out}


def _from_tensors(tensors: dict[str, Tensor], described: dict, task: Task) -> _Whole:
    splits = {}
    for name in described.pop("splits"):
        lengths, kinds = tensors[f"{name}.lengths"], tensors.get(f"{name}.token_type_ids")
        splits[name] = Split(
            Tokens(tensors[f"{name}.input_ids"], lengths),
            tensors[f"{name}.labels"],
            tensors[f"{name}.domain"],
            torch.arange(len(lengths)),
            None if kinds is None else Tokens(kinds, lengths),
            {SOFT: tensors[f"{name}.{SOFT}"]} if f"{name}.{SOFT}" in tensors else {},
            task,
        )
    left_out = [LeftOut(*one) for one in described.pop("left_out")]
    return _Whole(splits, tensors["first_alike"], left_out=left_out, **described)


def _read_and_tokenise(config: DataConfig, tokenizer) -> _Whole:
    with warnings.catch_warnings(record=True) as raised:
        raw = read_corpus(config)
    domain_id = {name: i for i, name in enumerate(raw.domains)}
    label2id = {name: i for i, name in enumerate(raw.labels)}
    splits = {
        name: _tokenise(rows, tokenizer, config, domain_id, label2id)
        for name, rows in raw.splits.items()
    }
    first: dict[tuple, int] = {}
    alike = [first.setdefault(row.example, i) for i, row in enumerate(raw.splits["train"])]
    said = [str(warning.message) for warning in raised]
    said += _unknown_tokens(splits["train"], tokenizer, config.train)
    return _Whole(splits, torch.tensor(alike), raw.domains, raw.labels, said, raw.left_out)


def _unknown_tokens(train: Split, tokenizer, source: str) -> list[str]:
    """A warning of a tokenizer that does not know many of the words.

    Raises:
        DataError: it knows next to nothing, and a model would learn from the texts' lengths.
    """
    unknown = tokenizer.unk_token_id
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if unknown is None or unknown in marks:
        return []
    ids = train.input_ids.flat
    special = torch.tensor([i for i in tokenizer.all_special_ids if i != unknown], dtype=ids.dtype)
    words = ids[~torch.isin(ids, special)]
    share = (words == unknown).double().mean().item() if len(words) else 0.0
    if share <= UNKNOWN_WARNED:
        return []
    reads = tokenizer.name_or_path
    said = f"{source}: {share:.0%} of the tokens are unknown to the tokenizer"
    remedy = f"take an encoder of the texts' language and script in place of {reads}"
    if share > UNKNOWN_REFUSED:
        raise DataError(said, remedy)
    return [f"{said}; {remedy}"]


def _tokenise(
    rows: list[Row],
    tokenizer,
    config: DataConfig,
    domain_id: dict[str, int],
    label2id: dict[str, int],
) -> Split:
    lengths: list[int] = []
    flat: dict[str, list[Tensor]] = {"input_ids": [], "token_type_ids": []}
    for start in range(0, len(rows), _TOKENISE_AT_ONCE):
        part = rows[start : start + _TOKENISE_AT_ONCE]
        pairs = None if part[0].pair is None else [row.pair for row in part]
        encoded = tokenizer(
            [row.text for row in part], pairs, truncation=True, max_length=config.max_length
        )
        lengths += map(len, encoded["input_ids"])
        for name, chunks in flat.items():
            ids = list(chain.from_iterable(encoded.get(name, [])))
            chunks += [torch.tensor(ids, dtype=torch.int32)] if ids else []
    tokens = {
        name: Tokens(torch.cat(chunks), torch.tensor(lengths))
        for name, chunks in flat.items()
        if chunks
    }
    task = TASKS[config.task]
    return Split(
        tokens["input_ids"],
        task.encode([row.label for row in rows], label2id),
        torch.tensor([domain_id[row.domain] for row in rows]),
        torch.arange(len(rows)),
        tokens.get("token_type_ids"),
        {SOFT: as_logits([row.soft for row in rows], config)} if rows[0].soft else {},
        task,
    )


def _hold_out(
    train: Split, first_alike: Tensor, config: DataConfig, seed: int
) -> tuple[Split, Split]:
    kept = torch.zeros(len(train), dtype=torch.bool)
    kept[_stratified(train, 1.0 - config.validation_fraction, seed)] = True
    kept |= torch.isin(first_alike, first_alike[kept])
    if kept.all():
        raise DataError(
            f"{config.train}: {len(train)} rows are too few to hold out a share of "
            f"{config.validation_fraction:g} for validation, every domain and label keeping one",
            "Give data.validation, or a larger data.validation_fraction.",
        )
    return train.select(torch.nonzero(kept).flatten()), train.select(torch.nonzero(~kept).flatten())


def _stratified(split: Split, wanted: float, seed: int) -> Tensor:
    """Sorted positions of so many of the examples, at least one per domain and label; of a share of
    them (below 1) about as many."""
    generator = torch.Generator().manual_seed(seed)
    _, cell, sizes = torch.unique(
        torch.stack([split.domain, split.strata]), dim=1, return_inverse=True, return_counts=True
    )
    if 1 <= wanted < len(sizes):  # not even one of each
        drawn = torch.randperm(len(split), generator=generator)
        return drawn[: int(wanted)].sort().values
    fraction = wanted if wanted < 1 else wanted / len(split)
    # Largest remainders: each cell's share is rounded so that the total is right too.
    share = sizes.double() * fraction
    quota = share.floor().long()
    missing = round(fraction * len(split)) - int(quota.sum())
    quota[torch.argsort(quota - share, stable=True)[:missing]] += 1
    quota.clamp_(min=1)
    while wanted >= 1 and quota.sum() > wanted and quota.max() > 1:
        quota[quota.argmax()] -= 1
    kept = []
    for c in range(len(sizes)):
        members = torch.nonzero(cell == c).flatten()
        kept.append(members[torch.randperm(len(members), generator=generator)[: quota[c]]])
    return torch.cat(kept).sort().values if kept else torch.empty(0, dtype=torch.long)


def folds_of(split: Split, folds: int, seed: int) -> Tensor:
    """A fold [N] of so many for each example, all of a domain and label spread evenly; the same
    text is in one fold, wherever it occurs.

    Args:
        split: N examples.
        folds: how many.
        seed: of who is where.
    """
    shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    strata = split.strata
    keys = split.domain[shuffled] * (int(strata.max()) + 1) + strata[shuffled]
    order = shuffled[keys.argsort(stable=True)]
    fold_of_text: dict[tuple[int, ...], int] = {}
    found = torch.empty(len(split), dtype=torch.long)
    for row in order.tolist():
        text = tuple(split.input_ids[row])
        found[row] = fold_of_text.setdefault(text, len(fold_of_text) % folds)
    return found
