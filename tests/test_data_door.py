"""Data as people have them: read, left out by a policy, or refused with the way out."""

from __future__ import annotations

import io
import json
import time
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import make_source, rows_of

import metakd
from metakd import demo
from metakd.config import DataConfig
from metakd.config.loading import load_config
from metakd.data.corpus import load_corpus
from metakd.data.reading import read_corpus, read_texts
from metakd.data.tables import LeftOut
from metakd.demo import train_tokenizer
from metakd.deploy import Predictor, export_onnx
from metakd.errors import ConfigError, DataError

TRIALS = Path(__file__).parent / "trials"
GOOD = [f"text {i}\t{('bad', 'good')[i % 2]}\t{('pans', 'tents')[i // 20]}" for i in range(40)]


def config(train: str, **keys) -> DataConfig:
    if "test" in keys:
        keys["test"] = str(TRIALS / keys["test"])
    return DataConfig(train=str(TRIALS / train), **keys)


def write(path: Path, lines: list[str], header: str = "text\tlabel\tdomain") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def refusal(data: DataConfig) -> DataError:
    with pytest.raises(DataError) as caught:
        read_corpus(data)
    return caught.value


def said_by(data: DataConfig) -> list[str]:
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        read_corpus(data)
    return [str(warning.message) for warning in raised]


# Each file as it is: why it is refused, and the way out.
REFUSED = {
    "semicolon.csv": ("missing column: 'text'", ['set data.delimiter: ";"']),
    "semicolon_quoted.csv": ("missing column: 'text'", ['set data.delimiter: ";"']),
    "swallow.tsv": (":2:-: a quote swallows line ends: lines 2 to 3", ["set data.quoting: none"]),
    "inch_marks.tsv": (":3:-: unclosed or misplaced quote", ["set data.quoting: none"]),
    "cp1252.csv": (
        ":2:-: bad UTF-8, byte 0xe9",
        ["set data.encoding: cp1252", "iconv -f CP1252 -t UTF-8", "2 of 26 rows (7.69%)"],
    ),
    "utf16.tsv": ("UTF-16 text", ["set data.encoding: utf-16", "iconv -f UTF-16 -t UTF-8"]),
    "one_in_a_thousand.jsonl": (
        ":18:label: missing label",
        ["3 of 27 rows (11.11%)", "data.on_problem: drop"],
    ),
    "no_domain.csv": ("missing column: 'domain'", ["set data.domain: null"]),
    "split_folder": ("missing column: 'domain'", ["set data.domain: null"]),
    "spellings.csv": ("label 'negative ' has white space around it", ["data.on_problem: drop"]),
    "multi_label.jsonl": ("list ['quality'] is not a label", []),
    "scores.csv": (":2:label: float 0.900 is not a label", []),
    "soft_labels.jsonl": ("missing column: 'label'", []),
}
# With which keys it is read, how many rows there are then, and of which labels.
READ = [
    ("semicolon_quoted.csv", {"delimiter": ";"}, 25, ["negative", "positive"]),
    ("semicolon.csv", {"delimiter": ";", "on_problem": "drop"}, 24, ["negative", "positive"]),
    ("swallow.tsv", {"quoting": "none"}, 26, ["negative", "positive"]),
    ("swallow.tsv", {"on_problem": "drop"}, 24, ["negative", "positive"]),
    ("inch_marks.tsv", {"quoting": "none"}, 28, ["negative", "positive"]),
    ("inch_marks.tsv", {"on_problem": "drop"}, 26, ["negative", "positive"]),
    ("cp1252.csv", {"encoding": "cp1252"}, 26, ["negative", "positive"]),
    ("cp1252.csv", {"on_problem": "drop"}, 24, ["negative", "positive"]),
    ("utf16.tsv", {"encoding": "utf-16"}, 24, ["negative", "positive"]),
    ("one_in_a_thousand.jsonl", {"on_problem": "drop"}, 24, ["negative", "positive"]),
    ("no_domain.csv", {"domain": None}, 12, ["card_arrival", "top_up"]),
    ("split_folder", {"domain": None}, 16, ["negative", "positive"]),
    (
        "soft_labels.jsonl",
        {"soft_labels": ["p_negative", "p_positive"]},
        24,
        ["negative", "positive"],
    ),
    ("conflicting.jsonl", {}, 26, ["negative", "positive"]),
    ("unnamed_columns.csv", {}, 24, ["negative", "positive"]),
    (
        "disjoint_classes.jsonl",
        {},
        24,
        ["garden_mow", "garden_water", "lights_dim", "lights_switch"],
    ),
    (
        "spellings.csv",
        {"on_problem": "drop"},
        28,
        ["0", "1.0", "NEGATIVE", "Positive", "negative", "positive"],
    ),
]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_shown_the_way_out(name):
    cause, ways = REFUSED[name]
    found = refusal(config(name))
    assert cause in found.cause
    for way in ways:
        assert way in found.remedy


@pytest.mark.parametrize(("name", "keys", "rows", "labels"), READ)
def test_what_is_read_with_which_keys(name, keys, rows, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = read_corpus(config(name, **keys))
    assert len(raw.splits["train"]) == rows and raw.labels == labels


def test_every_trial_has_its_outcome():
    named = {*REFUSED, *(name for name, *_ in READ), "leak_train.jsonl", "leak_test.jsonl"}
    assert named | {"mostly_unknown.csv"} == {path.name for path in TRIALS.iterdir()}


# Policies


def test_dropped_rows_are_counted_by_file_and_reason():
    raw = read_corpus(config("one_in_a_thousand.jsonl", on_problem="drop"))
    file = str(TRIALS / "one_in_a_thousand.jsonl")
    assert raw.left_out == [LeftOut(file, "empty text", 2), LeftOut(file, "missing label", 1)]
    assert str(raw.left_out[0]) == f"{file}: 2 rows left out: empty text"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("short\tgood", "wrong number of fields"),
        ("", "blank line"),
        ("a \udcff\tgood\tpans", "bad UTF-8"),
        ("a \0\tgood\tpans", "NUL byte"),
        ('"open\tgood\tpans', "unclosed or misplaced quote"),
        ('"a" b\tgood\tpans', "unclosed or misplaced quote"),
        (" \tgood\tpans", "empty text"),
        ("a\t\tpans", "missing label"),
        ("a\tgood\t", "missing domain"),
        ("a\tgood \tpans", "label that cannot be used"),
        ("a\tgood\t../pans", "domain that cannot be used"),
    ],
)
@pytest.mark.parametrize("at", [0, 17, 39])
def test_a_bad_line_anywhere_costs_that_line_alone(tmp_path, line, reason, at):
    lines = [*GOOD[:at], line, *GOOD[at:]]
    path = tmp_path / "train.tsv"
    text = "\n".join(["text\tlabel\tdomain", *lines]) + "\n"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    raw = read_corpus(DataConfig(train=str(path), on_problem="drop"))
    assert [row.text for row in raw.splits["train"]] == [row.split("\t")[0] for row in GOOD]
    assert raw.left_out == [LeftOut(str(path), reason, 1)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not JSON", "invalid JSON"),
        ('{"text": "a"', "invalid JSON"),
        ("[1]", "not a JSON object"),
        ('{"text": null, "label": "good", "domain": "pans"}', "missing text"),
        ('{"text": "a", "label": 0.5, "domain": "pans"}', "label that cannot be used"),
        ('{"text": 7, "label": "good", "domain": "pans"}', "text that cannot be used"),
        ('{"text": "a\\u0000", "label": "good", "domain": "pans"}', "text that cannot be used"),
    ],
)
def test_a_bad_object_costs_itself_alone(tmp_path, line, reason):
    rows = [dict(zip(("text", "label", "domain"), row.split("\t"))) for row in GOOD]
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*lines[:9], line, *lines[9:]]) + "\n")
    raw = read_corpus(DataConfig(train=str(path), on_problem="drop"))
    assert len(raw.splits["train"]) == 40
    assert raw.left_out == [LeftOut(str(path), reason, 1)]


def test_nothing_left_is_a_problem(tmp_path):
    path = write(tmp_path / "train.tsv", ["\tgood\tpans", "\tbad\ttents"])
    assert "no row is left" in refusal(DataConfig(train=str(path), on_problem="drop")).cause


def test_what_is_wrong_with_a_file_is_refused_whatever_the_policy(tmp_path):
    path = write(tmp_path / "train.tsv", GOOD, header="text\tlable\tdomain")
    found = refusal(DataConfig(train=str(path), on_problem="drop"))
    assert "missing column: 'label'" in found.cause


def test_mostly_bad_rows_are_not_offered_to_be_dropped():
    assert "on_problem" not in refusal(config("multi_label.jsonl")).remedy


LEAK = {"train": "leak_train.jsonl", "test": "leak_test.jsonl"}


def test_a_leak_is_refused_with_share_limit_and_both_ways_on():
    found = refusal(config(**LEAK))
    assert "leak_test.jsonl:1:text: the same example is in train" in found.cause
    assert "2 of 40 rows of test are also in train, 5.0%, and 1% are accepted" in found.remedy
    assert "data.overlap: drop_train" in found.remedy and "allow" in found.remedy


def test_a_leak_is_left_out_of_train():
    raw = read_corpus(config(**LEAK, overlap="drop_train"))
    assert {name: len(rows) for name, rows in raw.splits.items()} == {"train": 58, "test": 40}
    assert raw.left_out == [LeftOut(str(TRIALS / "leak_train.jsonl"), "also in test", 2)]


def test_a_leak_may_be_allowed():
    assert any(
        "2 of 40 rows of test are also in train" in text
        for text in said_by(config(**LEAK, overlap="allow"))
    )


def test_a_leak_of_unlabelled_texts_is_left_out_too(tmp_path):
    train = write(tmp_path / "train.tsv", GOOD)
    test = write(tmp_path / "test.tsv", ["new\tgood\tpans", "seen\tbad\ttents"])
    texts = write(tmp_path / "texts.tsv", ["seen\ttents", "other\tpans"], header="text\tdomain")
    data = {"train": str(train), "test": str(test), "unlabelled": str(texts)}
    raw = read_corpus(DataConfig(**data, overlap="drop_train"))
    assert [row.text for row in raw.splits["unlabelled"]] == ["other"]
    assert raw.left_out == [LeftOut(str(texts), "also in test", 1)]


def test_one_shared_row_in_a_hundred_is_dropped_if_asked(tmp_path):
    """Below the limit ``refuse`` warns; ``drop_train`` leaves out every one."""
    train = write(tmp_path / "train.tsv", GOOD)
    lines = [*(f"new {i}\tgood\tpans" for i in range(199)), GOOD[0]]
    test = write(tmp_path / "test.tsv", lines)
    raw = read_corpus(DataConfig(train=str(train), test=str(test), overlap="drop_train"))
    assert len(raw.splits["train"]) == 39


def test_a_drop_does_not_switch_off_the_other_checks(tmp_path):
    """A broken quote in train says nothing of which labels and domains there are."""
    train = write(tmp_path / "train.tsv", [*GOOD, '"a" b\tgood\tpans'])
    for line, reason in (("new\tGood\tpans", "label not in"), ("new\tgood\tpots", "domain not")):
        test = write(tmp_path / "test.tsv", [line])
        data = {"train": str(train), "test": str(test), "on_problem": "drop"}
        assert reason in refusal(DataConfig(**data)).cause


def test_nothing_is_left_after_a_leak(tmp_path):
    train = write(tmp_path / "train.tsv", GOOD)
    test = write(tmp_path / "test.tsv", ["a\tgood\tpans", "b\tbad\ttents"])
    texts = write(tmp_path / "texts.tsv", ["a\tpans"], header="text\tdomain")
    data = {"train": str(train), "overlap": "drop_train"}
    found = refusal(DataConfig(**data, validation=str(train)))
    assert "no row is left: all are also in validation or test" in found.cause
    raw = read_corpus(DataConfig(**data, test=str(test), unlabelled=str(texts)))
    assert list(raw.splits) == ["train", "test"]


def test_a_row_that_train_cannot_use_is_there_for_others(tmp_path):
    rows = [
        line if i % 3 else line.replace("bad", "").replace("good", "")
        for i, line in enumerate(GOOD)
    ]
    path = write(tmp_path / "all.tsv", rows)
    raw = read_corpus(DataConfig(train=str(path), unlabelled=str(path), on_problem="drop"))
    assert (len(raw.splits["train"]), len(raw.splits["unlabelled"])) == (26, 40)
    assert raw.left_out == [LeftOut(str(path), "missing label", 14)]


# Domains


def test_without_domains_there_is_one():
    assert read_corpus(config("no_domain.csv", domain=None)).domains == ["all"]


def test_files_of_a_folder_are_one_domain_if_there_are_none(tmp_path):
    for name, lines in {"a": GOOD[:20], "b": GOOD[20:]}.items():
        write(tmp_path / f"{name}.tsv", lines)
    assert read_corpus(DataConfig(train=str(tmp_path))).domains == ["a", "b"]
    raw = read_corpus(DataConfig(train=str(tmp_path), domain=None))
    assert raw.domains == ["all"] and len(raw.splits["train"]) == 40


def test_a_folder_of_splits_is_no_folder_of_domains():
    raw = read_corpus(config("split_folder", domain=None))
    assert {name: len(rows) for name, rows in raw.splits.items()} == {"train": 16, "test": 8}


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_folder_of_splits_by_its_names(tmp_path, name):
    for split in ("train", name, "test"):
        lines = [f"{split} {line}" for line in GOOD]
        write(tmp_path / f"{split}.tsv", lines)
    raw = read_corpus(DataConfig(train=str(tmp_path)))
    assert list(raw.splits) == ["train", "validation", "test"]
    assert raw.splits["validation"][0].text == f"{name} text 0" and raw.domains == ["pans", "tents"]
    other = write(tmp_path / "mine.csv", ["mine,good,pans"], header="text,label,domain")
    other = other.rename(tmp_path.parent / "mine.csv")
    raw = read_corpus(DataConfig(train=str(tmp_path), test=str(other)))
    assert [row.text for row in raw.splits["test"]] == ["mine"]
    raw = read_corpus(DataConfig(train=str(other.parent / tmp_path.name), test=str(tmp_path)))
    assert raw.splits["test"][0].text == "test text 0"


@pytest.mark.parametrize(
    ("files", "question"),
    [
        (["train", "books"], "books.tsv, train.tsv: are these domains, or splits?"),
        (["test", "dev"], "dev.tsv, test.tsv: which one is train?"),
        (["train", "training"], "train.tsv, training.tsv: which one is train?"),
    ],
)
def test_a_folder_that_may_be_either_is_refused(tmp_path, files, question):
    for name in files:
        write(tmp_path / f"{name}.tsv", GOOD)
    found = refusal(DataConfig(train=str(tmp_path)))
    assert question in found.cause and "name the files in data.train" in found.remedy


# Reading


def test_a_stray_pair_of_quotes_far_apart_is_found(tmp_path):
    """The rows between would become one, without a word."""
    lines = [f"text {i}\t{('bad', 'good')[i % 2]}\tpans" for i in range(10_000)]
    lines[100], lines[150] = '"' + lines[100], lines[150].replace("\t", '"\t', 1)
    path = write(tmp_path / "train.tsv", lines)
    assert "lines 102 to 152 would be one row" in refusal(DataConfig(train=str(path))).cause
    whole = read_corpus(DataConfig(train=str(path), quoting="none"))
    assert len(whole.splits["train"]) == 10_000
    raw = read_corpus(DataConfig(train=str(path), on_problem="drop"))
    assert len(raw.splits["train"]) == 9_949 and raw.left_out[0].rows == 51


@pytest.mark.parametrize(
    "text",
    [
        "Good, cheap.\nBuy it",
        "One\ntwo, three\nfour, five, six",
        "a, b\nc, d\ne, f",
        "lines\n\nwith, commas, good",
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_texts_of_several_lines_with_commas_are_texts(tmp_path, text, last):
    """Which is what quotes are for."""
    rows = [f'"{text} {i}",{("bad", "good")[i % 2]}' for i in range(6)]
    header = "text,label"
    if last:
        rows = [f'{("bad", "good")[i % 2]},"{text} {i}"' for i in range(6)]
        header = "label,text"
    path = write(tmp_path / "train.csv", rows, header=header)
    raw = read_corpus(DataConfig(train=str(path), domain=None))
    assert [row.text for row in raw.splits["train"]] == [f"{text} {i}" for i in range(6)]


def test_quotes_are_characters_where_there_is_no_quoting(tmp_path):
    path = write(tmp_path / "train.tsv", ['"a "\tgood\tpans', 'b"\tbad\ttents'])
    rows = read_corpus(DataConfig(train=str(path), quoting="none")).splits["train"]
    assert [row.text for row in rows] == ['"a "', 'b"']


@pytest.mark.parametrize(
    "content",
    [
        'text,domain\n"Great product, works\nas described",books\n',
        'text\n"Dear shop, hello\nI liked it\nBye"\nfine\n',
        'text,id\n"Great product, works\nas described",7\n',
    ],
)
def test_texts_of_several_lines_without_labels(tmp_path, content):
    (tmp_path / "texts.csv").write_text(content)
    assert "\n" in read_texts(str(tmp_path / "texts.csv"))[0].text


def test_numbered_lines_of_a_text_are_no_rows(tmp_path):
    rows = ['1,"Pros:\n1, it is cheap\n0, none"', "0,bad", "1,good", "0,worse"]
    path = write(tmp_path / "train.csv", rows, header="label,text")
    assert len(read_corpus(DataConfig(train=str(path), domain=None)).splits["train"]) == 4


def test_whoever_says_that_quotes_are_quotes_is_believed(tmp_path):
    """The way out where a text of several lines does look like rows."""
    rows = ['1,"Pros:\n1,it is cheap\n0,none"', "0,bad", "1,good", "0,worse"]
    path = write(tmp_path / "train.csv", rows, header="label,text")
    found = refusal(DataConfig(train=str(path), domain=None))
    assert "where they are one row, data.quoting: csv" in found.remedy
    raw = read_corpus(DataConfig(train=str(path), domain=None, quoting="csv"))
    assert len(raw.splits["train"]) == 4


@pytest.mark.parametrize("where", ["train", "test"])
def test_a_swallow_of_all_rows_of_a_class_is_found(tmp_path, where):
    lines = [f"text {i},pos,books" for i in range(50)]
    lines = ['"5 inch phone,pos,books', *lines, 'seven inch",pos,books']
    others = [f"other {i},neg,books" for i in range(50)]
    header = "text,label,domain"
    train = write(tmp_path / "train.csv", [*lines, *others], header=header)
    if where == "test":
        both = [f"new {i},{('pos', 'neg')[i % 2]},books" for i in range(20)]
        train = write(tmp_path / "train.csv", both, header=header)
    test = write(tmp_path / "test.csv", lines, header=header)
    data = {"train": str(train)} | ({"test": str(test)} if where == "test" else {})
    assert f"{where}.csv:2:-: a quote swallows line ends" in refusal(DataConfig(**data)).cause


@pytest.mark.parametrize(
    ("header", "lines", "left"),
    [
        ("text", ["good", '"first half', 'second half" and more', "fine"], ["good", "fine"]),
        # A line with all its fields is a row, as between stray quotes.
        (
            "text\tdomain",
            ["good\tpans", '"first half\tpans', 'second half" and more\tpans', "fine\ttents"],
            ["good", 'second half" and more', "fine"],
        ),
    ],
)
def test_a_broken_text_of_several_lines_goes_as_a_whole(tmp_path, header, lines, left):
    path = write(tmp_path / "texts.tsv", lines, header=header)
    train = write(tmp_path / "train.tsv", GOOD)
    domain = "domain" if "domain" in header else None
    data = {"train": str(train), "unlabelled": str(path), "on_problem": "drop", "domain": domain}
    raw = read_corpus(DataConfig(**data))
    assert [row.text for row in raw.splits["unlabelled"]] == left


@pytest.mark.parametrize("header", ['text,"la"bel,domain', "text,lab\udcffel,domain"])
def test_a_broken_header_is_no_row_to_leave_out(tmp_path, header):
    rows = [line.replace("\t", ",") for line in GOOD]
    content = "\n".join([header, *rows]) + "\n"
    (tmp_path / "train.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    found = refusal(DataConfig(train=f"{tmp_path}/train.csv", on_problem="drop"))
    assert "train.csv:1:-: " in found.cause and "left out" not in found.cause


def test_many_broken_quotes_are_read_in_one_go(tmp_path):
    """Once as slow as the square of their number."""
    lines = [f'"{i}" inch\tgood\tpans' if i % 5 else GOOD[i % 40] for i in range(20_000)]
    path = write(tmp_path / "train.tsv", [*GOOD, *lines])
    began = time.perf_counter()
    raw = read_corpus(DataConfig(train=str(path), on_problem="drop"))
    assert raw.left_out[0].rows == 16_000 and time.perf_counter() - began < 10


def test_utf8_by_name_is_utf8(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"text,label\na,1\ncaf\xe9,0\nb,0\n")
    data = {"train": f"{tmp_path}/train.csv", "domain": None, "on_problem": "drop"}
    for encoding in ("utf-8", "UTF8", None):
        assert len(read_corpus(DataConfig(**data, encoding=encoding)).splits["train"]) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "cp1252", "shift_jis"])
def test_every_encoding_of_python(tmp_path, encoding):
    texts = ["pots", "pans"]
    content = "text,label\n" + "".join(f"{t},{i}\n" for i, t in enumerate(texts))
    (tmp_path / "train.csv").write_bytes(content.encode(encoding))
    data = DataConfig(train=f"{tmp_path}/train.csv", domain=None, encoding=encoding)
    assert [row.text for row in read_corpus(data).splits["train"]] == texts


def test_bytes_that_an_encoding_does_not_have(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"text,label\na,1\ncaf\x81,0\n")
    data = DataConfig(train=f"{tmp_path}/train.csv", domain=None, encoding="cp1252")
    assert "train.csv:3:-: bad cp1252, byte 0x81 at byte offset 18" in refusal(data).cause


def test_utf16_without_a_mark_is_recognised(tmp_path):
    (tmp_path / "train.csv").write_bytes("text,label\na,1\n".encode("utf-16-le"))
    found = refusal(DataConfig(train=f"{tmp_path}/train.csv", domain=None))
    assert "data.encoding: utf-16" in found.remedy


@pytest.mark.parametrize("mark", [";", "|", "\t"])
def test_another_delimiter(tmp_path, mark):
    rows = [line.replace("\t", mark) for line in GOOD]
    path = write(tmp_path / "train.csv", rows, header=f"text{mark}label{mark}domain")
    assert f"data.delimiter: {json.dumps(mark)}" in refusal(DataConfig(train=str(path))).remedy
    raw = read_corpus(DataConfig(train=str(path), delimiter=mark))
    assert len(raw.splits["train"]) == 40


def test_columns_that_nobody_uses_may_be_called_anything(tmp_path):
    rows = [f"{i}\t\t{line}\tx\tx" for i, line in enumerate(GOOD)]
    path = write(tmp_path / "train.tsv", rows, header="\t\ttext\tlabel\tdomain\tid\tid")
    assert len(read_corpus(DataConfig(train=str(path))).splits["train"]) == 40


# Labels


def test_numbers_are_no_classes_in_a_csv_either(tmp_path):
    rows = [f"text {i},{i / 7:.3f}" for i in range(60)]
    path = write(tmp_path / "train.csv", rows, header="text,label")
    found = refusal(DataConfig(train=str(path), domain=None))
    assert "train.csv:3:label: float 0.143 is not a label" in found.cause


@pytest.mark.parametrize(
    "values",
    [
        ["1.0", "2.0", "3.0"],
        ["+1", "-1"],
        ["3.9", "3.10", "3.11"],
        [f"{10**20 + n}" for n in range(15)],
        ["0.5", "1"],
    ],
)
def test_numbers_may_be_names_of_classes(tmp_path, values):
    rows = [f"text {i},{values[i % len(values)]}" for i in range(60)]
    path = write(tmp_path / "train.csv", rows, header="text,label")
    assert set(read_corpus(DataConfig(train=str(path), domain=None)).labels) == set(values)


def test_versions_are_classes_among_words(tmp_path):
    values = ["1.0", "2.0", "later"]
    rows = [f"text {i},{values[i % 3]}" for i in range(9)]
    path = write(tmp_path / "train.csv", rows, header="text,label")
    with pytest.warns(UserWarning, match="numbers among words: '1.0', '2.0'"):
        raw = read_corpus(DataConfig(train=str(path), domain=None))
    assert raw.labels == values


def test_lists_are_no_classes_in_a_csv_either(tmp_path):
    names = ["joy", "anger", "fear", "love"]
    combined = [f"{a},{b}" for a in names for b in names if a != b] + names
    rows = [f'text {i},"{label}"' for i, label in enumerate(combined)]
    path = write(tmp_path / "train.csv", rows, header="text,label")
    found = refusal(DataConfig(train=str(path), domain=None))
    assert "labels are lists of 4 names in 16 combinations, such as 'anger,fear'" in found.cause


def test_lists_in_another_order_are_lists(tmp_path):
    values = ["joy,anger", "anger,joy", "joy,fear", "fear,joy"]
    rows = [f'text {i},"{values[i % 4]}"' for i in range(8)]
    path = write(tmp_path / "train.csv", rows, header="text,label")
    assert "labels are lists of 3 names" in refusal(DataConfig(train=str(path), domain=None)).cause


@pytest.mark.parametrize(
    "values",
    [
        ["Arts, Crafts", "Arts, Music"],
        [f"{kind}, {grade}" for kind in ("Bug", "Idea", "Task") for grade in ("high", "low")],
        ["Portland, OR", "Portland, ME", "Salem, OR", "Salem, ME"],
    ],
)
def test_a_comma_in_the_name_of_a_class_is_no_list(tmp_path, values):
    rows = [f'text {i},"{values[i % len(values)]}"' for i in range(12)]
    path = write(tmp_path / "train.csv", rows, header="text,label")
    raw = read_corpus(DataConfig(train=str(path), domain=None))
    assert set(raw.labels) == set(values)


def test_what_is_left_out_has_no_say_in_what_labels_are(tmp_path):
    rows = [json.dumps({"text": f"t {i}", "label": "ab"[i % 2]}) for i in range(4)]
    rows.insert(1, json.dumps({"text": "", "label": 0}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    data = {"train": f"{tmp_path}/train.jsonl", "domain": None}
    assert len(read_corpus(DataConfig(**data, on_problem="drop")).splits["train"]) == 4


def test_spellings_are_listed_once():
    domains, labels = said_by(config("spellings.csv", on_problem="drop"))
    assert "'GARDEN', 'Garden', 'garden'" in domains
    assert "'NEGATIVE', 'negative'; 'Positive', 'positive'" in labels
    assert "numbers among words: '0', '1.0'" in labels


def test_conflicting_labels_are_counted():
    (said,) = said_by(config("conflicting.jsonl"))
    assert said.startswith("1 text of train has more than one label, the first at ")


# Tokens


@pytest.fixture(scope="module")
def english():
    return train_tokenizer(["a calm and sturdy bench, well glazed"] * 3, vocab_size=80)


def test_texts_that_the_tokenizer_does_not_know_are_refused(english):
    with pytest.raises(DataError, match="100% of the tokens are unknown") as caught:
        load_corpus(config("mostly_unknown.csv"), english)
    assert "language and script" in caught.value.remedy


def test_texts_that_it_hardly_knows_are_a_warning(english, tmp_path):
    lines = [f"calm bench and \u4e00 {line}" for line in GOOD]
    path = write(tmp_path / "train.tsv", lines)
    with pytest.warns(UserWarning, match="of the tokens are unknown to the tokenizer"):
        load_corpus(DataConfig(train=str(path)), english)


# Keys


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (key, value, key)
        for key, values in {
            "on_problem": ["Drop", "skip", "", 1, None, [], True],
            "overlap": ["drop", "drop_test", "", 0, None, {}, False],
            "encoding": ["utf8x", "base64", "rot13", "", 8, [], {"a": 1}, "\n", "mbcs-none"],
            "delimiter": [";;", "", "\n", "\r", '"', 5, [], True, "\r\n"],
            "quoting": ["minimal", "csv ", "", None, 0, [], "None", True],
            "domain": [5, [], {}, True, ["a"]],
        }.items()
        for value in values
    ],
)
def test_broken_keys_are_refused_by_name(tmp_path, key, value, reason):
    settings = {
        "output_dir": str(tmp_path),
        "data": {"train": "x.csv", key: value},
        "teacher": {"model": "m"},
        "student": {"layers": [0]},
    }
    with pytest.raises(ConfigError) as caught:
        load_config(settings)
    assert f"data.{reason}" in caught.value.cause


def test_the_page_on_data_says_what_the_messages_say():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    shared = ["bad UTF-8, byte 0xe9", "UTF-16 text", "label 'negative ' has white space around it"]
    causes = [cause.split(":-: ")[-1].split(":label: ")[-1] for cause, _ in REFUSED.values()]
    ways = [way for _, found in REFUSED.values() for way in found if way.startswith("set ")]
    said = refusal(config(**LEAK)).remedy.splitlines()[-1].strip().partition(":")[0]
    for text in {*shared, *causes, *ways, said} - {"missing column: 'label'"}:
        assert text in page or text == "set data.encoding: utf-16", text


# Texts alone


def test_a_text_a_line(tmp_path):
    (tmp_path / "texts.txt").write_text('A "calm", sturdy bench\n\t\nSecond\n')
    with pytest.raises(DataError, match=r"texts\.txt:2:text: empty text"):
        read_texts(str(tmp_path / "texts.txt"))
    (tmp_path / "texts.txt").write_text('A "calm", sturdy bench\nSecond\n\n')
    rows = read_texts(str(tmp_path / "texts.txt"))
    assert [(row.row, row.text) for row in rows] == [(1, 'A "calm", sturdy bench'), (2, "Second")]


def test_texts_from_the_standard_input(monkeypatch):
    class Input:
        buffer = io.BytesIO("caf\u00e9\r\nbench\n".encode())

    monkeypatch.setattr("sys.stdin", Input)
    assert [row.text for row in read_texts("-")] == ["caf\u00e9", "bench"]


def test_unlabelled_texts_may_be_plain_lines(tmp_path):
    train = write(tmp_path / "train.tsv", GOOD)
    (tmp_path / "more").mkdir()
    for name in ("pans", "tents"):
        (tmp_path / "more" / f"{name}.txt").write_text(f"new {name}\n")
    raw = read_corpus(DataConfig(train=str(train), unlabelled=str(tmp_path / "more")))
    found = [(row.text, row.domain) for row in raw.splits["unlabelled"]]
    assert found == [("new pans", "pans"), ("new tents", "tents")]


# The whole way


def test_one_domain_with_a_bad_row_from_files_to_report(tmp_path):
    """What was left out is told, recorded and reported; every kind of teacher has a student."""
    make_source(tmp_path)
    folder = tmp_path / "splits"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        rows = [
            {"text": row["text"], "label": row["label"]}
            for row in rows_of(tmp_path / "corpus" / f"{name}.jsonl")
        ]
        rows += [{"text": "", "label": "negative"}] * (name == "train")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = io.StringIO()
    result = metakd.compare(
        {
            "output_dir": str(tmp_path / "run"),
            "data": {"train": str(folder), "domain": None, "on_problem": "drop", "max_length": 24},
            "teacher": {"model": str(tmp_path / "encoder"), "training": {"num_train_epochs": 1}},
            "student": {"layers": [1]},
            "distill": {"training": {"num_train_epochs": 1}},
            "compare": {
                "seeds": [1],
                "keep_students": True,
                "rows": [
                    {"method": "finetune_all"},
                    {"method": "logits_kd", "teacher": "single"},
                    {"method": "meta", "teacher": "meta"},
                    {"method": "mtn_kd", "teacher": "single"},
                    {"method": "tinybert_kd", "teacher": "mtl"},
                ],
            },
            "report_to": ["jsonl"],
        },
        console=Console(file=out, width=80),
    )
    told = out.getvalue()
    file = str(folder / "train.jsonl")
    assert f"data: {file}: 1 row left out: empty text" in told
    assert told.count("with one domain a meta-teacher has no domain loss") == 1
    rows = {"finetune_all", "meta-from-meta", "mtn_kd-from-single", "logits_kd-from-single"}
    assert rows < set(result.scores)
    record = json.loads((tmp_path / "run" / "teachers" / "meta-s1" / "stage.json").read_text())
    assert record["left_out"] == [{"file": file, "reason": "empty text", "rows": 1}]
    [student] = result.students["meta-from-meta"]
    export_onnx(student, demo.made_up_texts(100))
    assert Predictor(student)(["a fine book"])[0].label in ("negative", "positive")
    page = next(path for path in result.report() if path.suffix == ".md").read_text()
    assert f"| {file} | empty text | 1 |" in page
