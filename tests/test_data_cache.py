"""The cache of tokenised corpora, tokens in one tensor, batches made ahead."""

import json
import os
import stat
import threading
import warnings

import datasets
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from metakd.config import DataConfig
from metakd.data import corpus
from metakd.data.batches import collate, prefetch
from metakd.data.cache import TensorCache
from metakd.data.corpus import Tokens, load_corpus
from metakd.data.digests import content_key
from metakd.data.tables import LeftOut
from metakd.demo import train_tokenizer
from metakd.errors import DataError
from metakd.models.packing import real_tokens

CPU = torch.device("cpu")
ROWS = [
    {"text": "word " * (1 + i % 7) + str(i // 2), "label": ("bad", "good")[i % 2], "domain": domain}
    for i, domain in enumerate(["pans", "tents"] * 20)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([row["text"] for row in ROWS], vocab_size=200)


class Place:
    """A corpus with a cache; counts how often it was read."""

    def __init__(self, folder, tokenizer, monkeypatch):
        self.folder, self.tokenizer = folder, tokenizer
        self.cache = folder / "run" / ".cache"
        self.file = self.cache / "corpus.safetensors"
        self.train = folder / "train.jsonl"
        write(self.train, ROWS)
        self.said, self.reads = [], 0
        read = corpus.read_corpus

        def counted(config):
            self.reads += 1
            return read(config)

        monkeypatch.setattr(corpus, "read_corpus", counted)

    def load(self, cache=True, tokenizer=None, **keys):
        config = DataConfig(**{"train": str(self.train), "max_length": 16} | keys)
        folder = self.cache if cache else None
        return load_corpus(
            config, tokenizer or self.tokenizer, cache=folder, say=self.said.append, seed=1
        )


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch):
    return Place(tmp_path, tokenizer, monkeypatch)


def assert_same_corpus(one, other):
    assert (one.domains, one.label2id) == (other.domains, other.label2id)
    for name in ("train", "validation", "test"):
        splits = getattr(one, name), getattr(other, name)
        if splits[1] is None:
            assert splits[0] is None
            continue
        examples = [[split[i] for i in range(len(split))] for split in splits]
        assert len(examples[0]) == len(examples[1])
        for mine, theirs in zip(*examples, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(
                torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine
            )


# What is kept


def test_the_second_run_neither_reads_nor_tokenises(place, monkeypatch):
    plain = place.load(cache=False)
    assert_same_corpus(place.load(), plain)
    assert place.reads == 2
    monkeypatch.setattr(corpus, "_tokenise", None)
    assert_same_corpus(place.load(), plain)
    assert (place.reads, place.said) == (2, [])


def test_every_split_and_pairs_are_kept(place):
    write(place.train.with_name("test.jsonl"), [ROWS[0] | {"text": "another", "pair": "x"}])
    write(place.train, [row | {"pair": f"second {i}"} for i, row in enumerate(ROWS)])
    keys = {"test": str(place.train.with_name("test.jsonl")), "text_pair": "pair"}
    first = place.load(**keys)
    assert first.train.token_type_ids is not None
    assert_same_corpus(place.load(**keys), first)
    assert place.reads == 1


def test_splitting_is_not_part_of_what_is_kept(place):
    place.load()
    part = place.load(data_fraction=0.5, validation_fraction=0.25)
    assert place.reads == 1
    assert_same_corpus(part, place.load(cache=False, data_fraction=0.5, validation_fraction=0.25))


def test_an_earlier_call_of_the_tokenizer_changes_nothing(place):
    place.load()
    place.tokenizer(["a text"], truncation=True, padding="max_length", max_length=5)
    place.load()
    assert place.reads == 1


def test_a_warning_of_the_checks_comes_again(place):
    many = [row | {"text": f"text {i}"} for i, row in enumerate(ROWS * 5)]
    test = place.train.with_name("test.jsonl")
    write(place.train, many)
    write(test, [many[0], *(row | {"text": f"other {i}"} for i, row in enumerate(many))])
    for _ in range(2):
        place.load(test=str(test))
    again = place.said[: len(place.said) // 2]
    assert place.said == again * 2
    assert any("1 of 201 rows of test are also in train" in text for text in again)
    assert place.reads == 1


def test_rows_that_were_left_out_are_remembered(place):
    write(place.train, [*ROWS, ROWS[0] | {"text": ""}])
    found = [place.load(on_problem="drop").left_out for _ in range(2)]
    assert found[0] == found[1] == [LeftOut(str(place.train), "empty text", 1)]
    assert place.reads == 1


CHANGES = {
    "the data": lambda p, _: write(p.train, [*ROWS[:-1], ROWS[-1] | {"text": "wore"}]),
    "max_length": lambda *_: {"max_length": 12},
    "a column": lambda *_: {"domain": "label"},
    "the tokenizer": lambda *_: {"tokenizer": train_tokenizer(["other words"] * 9, vocab_size=90)},
    "the version": lambda _, patch: patch.setattr(corpus, "__version__", "0.0.0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_decides_is_noticed(place, monkeypatch, change):
    place.load()
    keys = CHANGES[change](place, monkeypatch) or {}
    assert_same_corpus(place.load(**keys), place.load(cache=False, **keys))
    assert (place.reads, place.said) == (3, [])


def test_a_new_file_in_a_folder_is_noticed(place):
    folder = place.train.with_name("corpus")
    folder.mkdir()
    write(folder / "pans.jsonl", ROWS)
    assert place.load(train=str(folder)).domains == ["pans"]
    write(folder / "tents.jsonl", ROWS)
    assert place.load(train=str(folder)).domains == ["pans", "tents"]


def test_broken_data_are_reported_each_time_and_never_kept(place):
    write(place.train, [*ROWS, {"text": "", "label": "good", "domain": "pans"}])
    for _ in range(2):
        with pytest.raises(DataError, match=r"train\.jsonl:41:text"):
            place.load()
    assert not place.cache.exists()


def test_a_corpus_of_the_hub_is_not_kept(place, monkeypatch):
    rows = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    given = datasets.Dataset.from_dict(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: given)
    place.load(train="owner/reviews")
    assert not place.cache.exists()


# What is never trusted


def flip(place):
    data = bytearray(place.file.read_bytes())
    data[-3] ^= 16
    place.file.write_bytes(data)


def relabel(place):
    """A well-formed file with other content, under the old digest."""
    tensors = load_file(place.file)
    with safe_open(place.file, "pt") as opened:
        header = opened.metadata()
    tensors["train.labels"] = 1 - tensors["train.labels"]
    save_file(tensors, place.file, metadata=header)


DAMAGE = {
    "a flipped bit": flip,
    "other content under the old digest": relabel,
    "truncated": lambda p: p.file.write_bytes(p.file.read_bytes()[:-100]),
    "cut in the header": lambda p: p.file.write_bytes(p.file.read_bytes()[:40]),
    "empty": lambda p: p.file.write_bytes(b""),
    "no safetensors": lambda p: p.file.write_bytes(b"\x80\x04pickle? " * 40),
    "a header that is no object": lambda p: p.file.write_bytes(b"\x02" + bytes(7) + b"[]"),
    "no metadata": lambda p: save_file({"x": torch.ones(1)}, p.file),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_anew_with_one_line(place, damage):
    plain = place.load()
    DAMAGE[damage](place)
    assert_same_corpus(place.load(), plain)
    assert place.reads == 2
    assert [line.split(": ", 1)[1] for line in place.said] == ["damaged; made anew"]
    assert_same_corpus(place.load(), plain)
    assert place.reads == 2


def test_every_flipped_byte_of_the_tensors_is_seen(tmp_path):
    said = []
    store = TensorCache(tmp_path, said.append)
    tensors = {"a": torch.arange(4), "b": torch.tensor([], dtype=torch.int32)}
    store.put("x", "key", tensors, {"n": 1})
    path = tmp_path / "x.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        found = store.get("x", "key")
        # A header may differ in a way that says the same; nothing else may be handed out.
        if found is not None:
            assert found[1] == {"n": 1}
            assert found[0].keys() == tensors.keys()
            assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)
        elif position >= len(whole) - 32:
            assert said.pop().endswith("damaged; made anew")


def test_a_file_that_others_may_write_is_not_used(place):
    place.load()
    place.file.chmod(0o620)
    place.load()
    assert place.reads == 2
    assert "another user could have written it" in place.said[0]


def test_a_file_of_another_user_is_not_used(place, monkeypatch):
    place.load()
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(place.file).st_uid + 1)
    place.load()
    assert place.reads == 2
    assert len(place.said) == 2  # not read; and its folder, not written
    assert "not a folder of this user's" in place.said[1]


def test_a_link_is_not_followed(place):
    place.load()
    elsewhere = place.file.rename(place.folder / "elsewhere.safetensors")
    place.file.symlink_to(elsewhere)
    place.load()
    assert place.reads == 2 and len(place.said) == 1
    assert not place.file.is_symlink()  # replaced, not written through
    place.load()
    assert place.reads == 2


def test_files_are_for_their_owner_alone(place):
    place.cache.mkdir(parents=True, mode=0o777)
    place.load()
    assert stat.S_IMODE(place.cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(place.file.stat().st_mode) == 0o600
    assert [path.name for path in place.cache.iterdir()] == ["corpus.safetensors"]


def test_what_cannot_be_written_costs_a_line(place, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(place.load().train) > 0
    assert [line.split(": ", 1)[1] for line in place.said] == [
        "No space left on device; nothing is cached"
    ]
    assert list(place.cache.iterdir()) == []


def test_by_default_the_line_is_a_warning(place):
    place.load()
    flip(place)
    config = DataConfig(train=str(place.train), max_length=16)
    with pytest.warns(UserWarning, match="damaged; made anew"):
        load_corpus(config, place.tokenizer, cache=place.cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_corpus(config, place.tokenizer, cache=place.cache)


def test_keys_of_different_parts_differ(tmp_path):
    (tmp_path / "one").write_text("ab")
    keys = [
        content_key("ab", "c"),
        content_key("a", "bc"),
        content_key("abc"),
        content_key(tmp_path / "one"),
        content_key(tmp_path),  # the same content under a name
    ]
    assert len(set(keys)) == len(keys)
    assert content_key(tmp_path) == keys[-1]


# Tokens


def test_tokens_read_like_a_list_of_lists():
    lists = [[5, 6], [], [7], [8, 9, 10]]
    flat = torch.tensor([x for ids in lists for x in ids], dtype=torch.int32)
    tokens = Tokens(flat, torch.tensor([len(ids) for ids in lists]))
    assert list(tokens) == lists
    assert tokens[-1] == lists[-1]
    for rows in ([3, 0, 0, 1], [], [2]):
        picked = tokens.select(torch.tensor(rows, dtype=torch.long))
        assert list(picked) == [lists[row] for row in rows]
        assert picked.flat.dtype == torch.int32
    with pytest.raises(IndexError):
        tokens[4]


def test_a_packed_batch_knows_its_real_tokens(place):
    train = place.load(cache=False).train
    batch = collate(place.tokenizer, packed=True)([train[i] for i in range(5)])
    assert torch.equal(batch["real_tokens"], real_tokens(batch["attention_mask"]))
    with pytest.raises(ValueError, match="'real_tokens' is reserved"):
        train.with_column("real_tokens", train.labels)


# Batches made ahead


def batches(count, failing_at=None, threads=None):
    for i in range(count):
        if threads is not None:
            threads.add(threading.current_thread())
        if i == failing_at:
            raise DataError("this batch is broken")
        yield {"x": torch.full((2,), i)}


def numbers(ahead):
    return [int(batch["x"][0]) for batch in ahead]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [t for t in threading.enumerate() if t.name == "metakd-prefetch"]


@pytest.mark.parametrize("depth", [1, 2, 50])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_all_batches_come_in_order(count, depth):
    threads = set()
    assert numbers(prefetch(batches(count, threads=threads), CPU, depth)) == list(range(count))
    assert threading.current_thread() not in threads


@pytest.mark.parametrize("at", [0, 3])
def test_an_exception_comes_in_its_place(at):
    ahead = prefetch(batches(9, failing_at=at), CPU)
    for _ in range(at):
        next(ahead)
    with pytest.raises(DataError, match="this batch is broken"):
        next(ahead)


# taken: none, so that the thread never starts; one; as many as there are, without asking for more
@pytest.mark.parametrize("taken", [0, 1, 4])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_consumer_may_stop_early(taken, depth):
    ahead = prefetch(batches(4), CPU, depth)
    for _ in range(taken):
        next(ahead)
    ahead.close()


def test_a_consumer_that_fails_ends_the_thread():
    with pytest.raises(ZeroDivisionError):
        for batch in prefetch(batches(100), CPU):
            assert batch["x"][0] // 1 == 0
            raise ZeroDivisionError


def test_no_more_than_depth_are_made_ahead():
    made = []

    def counted():
        for i, batch in enumerate(batches(20)):
            made.append(i)
            yield batch

    ahead = prefetch(counted(), CPU, depth=2)
    next(ahead)
    for _ in range(50):  # the thread has had the time to run away, were it not held
        threading.Event().wait(0.002)
    assert len(made) <= 1 + 2 + 1  # taken, waiting, in hand
    ahead.close()


def test_random_numbers_stay_the_consumers(place):
    train = place.load(cache=False).train
    pad = collate(place.tokenizer)

    def drawn(ahead):
        torch.manual_seed(3)
        source = (pad([train[i], train[i + 1]]) for i in range(8))
        return [torch.rand(1).item() for _ in (prefetch(source, CPU) if ahead else source)]

    assert drawn(ahead=True) == drawn(ahead=False)


def test_a_depth_of_nothing_is_refused():
    with pytest.raises(ValueError, match="depth: 0"):
        prefetch(batches(1), CPU, depth=0)
