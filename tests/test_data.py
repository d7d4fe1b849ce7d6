"""Data: what is read and how it is batched, and what every kind of broken file is answered with."""

from __future__ import annotations

import json
import warnings
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from metakd.config import DataConfig
from metakd.data.batches import StepSampler, collate
from metakd.data.corpus import Split, load_corpus
from metakd.data.reading import read_corpus, read_texts
from metakd.demo import train_tokenizer
from metakd.errors import ConfigError, DataError

ROWS = [
    {"text": f"number {i} is {label}", "label": label, "domain": domain}
    for i, (label, domain) in enumerate(
        (label, domain)
        for _ in range(6)
        for label in ("bad", "good")
        for domain in ("pans", "tents")
    )
]
HEADER = "text,label,domain\n"
CSV = HEADER + "".join(f"{r['text']},{r['label']},{r['domain']}\n" for r in ROWS)
TEST = HEADER + "another one,good,pans\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        [row["text"] for row in ROWS] + ["NA null premise claim"], vocab_size=200
    )


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(**changes) -> dict:
    return {"text": "x y", "label": "good", "domain": "pans"} | changes


def parquet(**columns):
    def write(path):
        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    return write


def put(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


# id -> (files, keys of the data block beside train, problems expected: all of them, in this order).
# train is train.csv unless the keys say otherwise; {d} is the folder.
BROKEN = {
    "missing file": ({}, {}, ["train.csv:-:-: no such file or folder"]),
    "missing file, near miss": (
        {"trian.csv": CSV},
        {},
        [
            "train.csv:-:-: no such file or folder, nor a hub id owner/name; "
            "did you mean 'trian.csv'?"
        ],
    ),
    "missing test file": (
        {"train.csv": CSV, "test.csv": None},
        {"test": "{d}/test.csv"},
        ["test.csv:-:-: no such file"],
    ),
    "empty file": ({"train.csv": ""}, {}, ["train.csv:-:-: empty file"]),
    "only blank lines": ({"train.csv": "\n\n \n"}, {}, ["train.csv:-:-: empty file"]),
    "only a byte order mark": ({"train.csv": b"\xef\xbb\xbf"}, {}, ["train.csv:-:-: empty file"]),
    "header only": ({"train.csv": HEADER}, {}, ["train.csv:1:-: header only, no rows"]),
    "ragged, too short": (
        {"train.csv": CSV + "short,good\n"},
        {},
        ["train.csv:26:-: 2 fields where the header has 3"],
    ),
    "ragged, too long": (
        {"train.csv": CSV + "a, b,good,pans\n"},
        {},
        ["train.csv:26:-: 4 fields where the header has 3"],
    ),
    "ragged after a quoted line end": (
        {"train.csv": CSV + '"two\nlines",good,pans\nshort\n'},
        {},
        ["train.csv:28:-: 1 fields where the header has 3"],
    ),
    "blank line inside": (
        {"train.csv": CSV + "\nmore,good,pans\n"},
        {},
        ["train.csv:26:-: blank line"],
    ),
    "bad UTF-8": (
        {"train.csv": (HEADER + "ok,good,pans\n").encode() + b"caf\xe9,bad,pans\n"},
        {},
        ["train.csv:3:-: bad UTF-8, byte 0xe9 at byte offset 34"],
    ),
    "bad UTF-8 after a byte order mark": (
        {"train.csv": b"\xef\xbb\xbf" + HEADER.encode() + b"\xff,bad,pans\nok,good,pans\n"},
        {},
        ["train.csv:2:-: bad UTF-8, byte 0xff at byte offset 21"],
    ),
    "UTF-16": ({"train.csv": CSV.encode("utf-16")}, {}, ["train.csv:1:-: UTF-16"]),
    "NUL byte": (
        {"train.csv": CSV + "a\0b,good,pans\n"},
        {},
        [f"train.csv:26:-: NUL byte at byte offset {len(CSV) + 1}"],
    ),
    "unclosed quote": (
        {"train.csv": CSV + '"never closed,good,pans\nnext,bad,pans\n'},
        {"test": "{d}/test.csv"},
        ["train.csv:26:-: unclosed or misplaced quote"],
    ),
    "text after a closing quote": (
        {"train.csv": CSV + '"quoted" not whole,good,pans\n'},
        {},
        ["train.csv:26:-: unclosed or misplaced quote"],
    ),
    "column given twice": (
        {"train.csv": CSV.replace("text,label", "text,text", 1).replace("domain", "label", 1)},
        {"domain": "label"},
        ["train.csv:1:text: column name given 2 times"],
    ),
    "missing column": (
        {"train.csv": CSV.replace("label", "lable", 1)},
        {},
        [
            "train.csv:1:label: missing column: 'label' is unknown; did you mean 'lable'? "
            "(there are: 'text', 'lable', 'domain')"
        ],
    ),
    "missing pair column": (
        {"train.csv": CSV},
        {"text_pair": "claim"},
        ["train.csv:1:claim: missing column"],
    ),
    "wrong separator": (
        {"train.tsv": CSV},
        {"train": "{d}/train.tsv"},
        ["train.tsv:1:text: missing", "train.tsv:1:label: missing", "train.tsv:1:domain: missing"],
    ),
    "empty text": ({"train.csv": CSV + ",good,pans\n"}, {}, ["train.csv:26:text: empty text"]),
    "white space text": (
        {"train.csv": CSV + "  ,bad,pans\n"},
        {},
        ["train.csv:26:text: empty text"],
    ),
    "empty label": ({"train.csv": CSV + "a,,pans\n"}, {}, ["train.csv:26:label: missing label"]),
    "label with white space": (
        {"train.csv": CSV + "a,good ,pans\n"},
        {},
        ["train.csv:26:label: label 'good ' has white space around it"],
    ),
    "empty domain": ({"train.csv": CSV + "a,good,\n"}, {}, ["train.csv:26:domain: missing domain"]),
    "only one class": (
        {"train.csv": HEADER + "a,good,pans\nb,good,pans\n"},
        {},
        ["train.csv:-:label: only one class, 'good'"],
    ),
    "unknown label in test": (
        {"train.csv": CSV, "test.csv": HEADER + "a,goood,pans\n"},
        {"test": "{d}/test.csv"},
        ["test.csv:2:label: label not in train: 'goood' is unknown; did you mean 'good'?"],
    ),
    "unknown domain in validation": (
        {"train.csv": CSV, "dev.csv": HEADER + "a,good,pans\nb,bad,boats\n"},
        {"validation": "{d}/dev.csv"},
        ["dev.csv:3:domain: domain not in train: 'boats' is unknown"],
    ),
    "overlap": (
        {"train.csv": CSV, "test.csv": HEADER + "new,bad,pans\n" + "number 2 is good,good,pans\n"},
        {"test": "{d}/test.csv"},
        ["test.csv:3:text: the same example is in train, {d}/train.csv:4"],
    ),
    "withheld domain unknown": (
        {"train.csv": CSV},
        {"withhold": ["tent"]},
        ["train.csv:-:domain: withheld domain 'tent' is unknown; did you mean 'tents'?"],
    ),
    "extension not known": (
        {"train.xlsx": b"PK"},
        {"train": "{d}/train.xlsx"},
        [
            "train.xlsx:-:-: file extension '.xlsx' is not known; expected .csv, "
            ".tsv, .jsonl, .parquet"
        ],
    ),
    "problems in two files": (
        {"train.csv": CSV + ",good,pans\n", "test.csv": HEADER + "a,great,pans\nb,good\n"},
        {"test": "{d}/test.csv"},
        [
            "train.csv:26:text: empty",
            "test.csv:2:label: label not in train",
            "test.csv:3:-: 2 fields",
        ],
    ),
    "folder: empty": ({"shops/.keep": ""}, {"train": "{d}/shops"}, ["shops:-:-: empty folder"]),
    "folder: other columns": (
        {
            "shops/pans.jsonl": jsonl({"text": "a", "label": 1}, {"text": "b", "label": 0}),
            "shops/tents.jsonl": jsonl({"text": "a", "label": 1, "stars": 5}),
        },
        {"train": "{d}/shops"},
        ["shops/tents.jsonl:1:-: columns text, label, stars differ from text, label in "],
    ),
    "folder: the domain twice": (
        {
            "shops/pans.csv": "text,label\na,good\nb,bad\n",
            "shops/pans.tsv": "text\tlabel\na\tgood\nb\tbad\n",
        },
        {"train": "{d}/shops"},
        ["shops/pans.tsv:-:-: domain 'pans' is also in {d}/shops/pans.csv"],
    ),
    "folder: a folder inside": (
        {"shops/pans.csv": "text,label\na,good\nb,bad\n", "shops/more/x.csv": ""},
        {"train": "{d}/shops"},
        ["shops/more:-:-: a folder; expected"],
    ),
}
# The last row of a JSONL file of which the others are right, and what is said of it.
BROKEN_JSON = {
    "not JSON": ('{"text": "a", "label": }\n', "-: invalid JSON: Expecting value at character 24"),
    "cut off": ('{"text": "a", "lab', "-: invalid JSON"),
    "not an object": ('["a", "good", "pans"]\n', "-: ['a', 'good', 'pans'] is not a JSON object"),
    "a bare null": ("null\n", "-: None is not a JSON object"),
    "key given twice": (
        '{"label": "good", "label": "bad"}\n',
        "-: invalid JSON: key 'label' given",
    ),
    "NUL byte": (jsonl(row()).replace("x y", "x\0y"), "-: NUL byte at byte offset"),
    "NUL escaped": (jsonl(row(text="a\0")), "text: NUL character at position 1"),
    "half a surrogate pair": (jsonl(row(text="a\ud800")), "text: half of a surrogate pair"),
    "null text": (jsonl(row(text=None)), "text: missing text"),
    "no text": (jsonl({"label": "good", "domain": "pans"}), "text: missing text"),
    "NaN text": (jsonl(row(text=float("nan"))), "text: NaN is not a text"),
    "number as text": (jsonl(row(text=7)), "text: int 7 is not a text"),
    "list as text": (jsonl(row(text=["a"])), "text: list ['a'] is not a text"),
    "null label": (jsonl(row(label=None)), "label: missing label"),
    "NaN label": (jsonl(row(label=float("nan"))), "label: NaN is not a label"),
    "float label": (jsonl(row(label=1.0)), "label: float 1.0 is not a label: give a string or"),
    "bool label": (jsonl(row(label=True)), "label: bool True is not a label"),
    "list label": (jsonl(row(label=["good"])), "label: list ['good'] is not a label"),
    "mixed labels": (jsonl(row(label=1)), "label: label 1 is int, in row 1 it is str"),
    "null domain": (jsonl(row(domain=None)), "domain: missing domain"),
    "float domain": (jsonl(row(domain=2.5)), "domain: float 2.5 is not a domain"),
}
for _name, (_line, _reason) in BROKEN_JSON.items():
    BROKEN[f"JSONL: {_name}"] = (
        {"train.jsonl": jsonl(*ROWS) + _line},
        {"train": "{d}/train.jsonl"},
        [f"train.jsonl:25:{_reason}"],
    )
BROKEN_PARQUET = {
    "not Parquet": (b"PAR1 nothing", "-:-: unreadable Parquet"),
    "no rows": (parquet(text=[], label=[], domain=[]), "-:-: no rows"),
    "missing column": (
        parquet(text=["a", "b"], label=["x", "y"], domains=["d", "d"]),
        "-:domain: missing column: 'domain' is unknown; did you mean 'domains'?",
    ),
    "null": (
        parquet(text=["a", None], label=["x", "y"], domain=["d", "d"]),
        "2:text: missing text",
    ),
    "NaN label": (
        parquet(text=["a", "b", "c"], label=["x", "y", None], domain=["d", "d", "d"]),
        "3:label: missing label",
    ),
}
for _name, (_content, _reason) in BROKEN_PARQUET.items():
    BROKEN[f"Parquet: {_name}"] = (
        {"train.parquet": _content},
        {"train": "{d}/train.parquet"},
        [f"train.parquet:{_reason}"],
    )


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_end_in_one_error_with_the_place(name, tmp_path, tokenizer):
    files, keys, expected = BROKEN[name]
    for file, content in ({"test.csv": TEST} | files).items():
        if content is not None:
            put(tmp_path / file, content)

    def fill(value):
        return value.replace("{d}", str(tmp_path)) if isinstance(value, str) else value

    config = DataConfig(**{k: fill(v) for k, v in ({"train": "{d}/train.csv"} | keys).items()})
    with pytest.raises(DataError) as caught:
        load_corpus(config, tokenizer)
    head, *lines = caught.value.cause.splitlines()
    assert head.startswith(f"{len(expected)} problem") and caught.value.exit_code == 3
    assert len(lines) == len(expected)
    for line, reason in zip(lines, expected, strict=True):
        assert line.startswith(f"  {tmp_path}/{fill(reason)}")
    assert caught.value.remedy


def test_there_are_at_least_thirty_broken_files():
    assert len(BROKEN) >= 60


def test_the_first_twenty_problems_and_totals_per_file(tmp_path, tokenizer):
    put(tmp_path / "train.csv", CSV + ",good,pans\n" * 30)
    put(tmp_path / "test.csv", TEST + "a,good\n" * 7)
    config = DataConfig(train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"))
    with pytest.raises(DataError) as caught:
        load_corpus(config, tokenizer)
    head, *lines = caught.value.cause.splitlines()
    assert head.startswith("37 problems in the data (") and head.endswith("the first 20:")
    assert f"{tmp_path}/train.csv 30" in head and f"{tmp_path}/test.csv 7" in head
    assert len(lines) == 20


def test_what_an_unreadable_train_lacks_is_not_held_against_test(tmp_path, tokenizer):
    put(tmp_path / "train.csv", HEADER + 'a,bad,pans\n"b,good,tents\n')
    put(tmp_path / "test.csv", HEADER + "c,good,tents\n")
    config = DataConfig(train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"))
    with pytest.raises(DataError) as caught:
        load_corpus(config, tokenizer)
    assert "quote" in caught.value.cause and "not in train: 'tents'" not in caught.value.cause


def test_few_shared_rows_warn_and_many_are_problems(tmp_path):
    put(tmp_path / "train.csv", CSV)
    shared = "number 2 is good,good,pans\n"
    for others, accepted in ((99, True), (98, False)):
        rows = "".join(f"other {i},good,pans\n" for i in range(others))
        put(tmp_path / "test.csv", HEADER + rows + shared)
        config = DataConfig(train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"))
        if accepted:
            with pytest.warns(UserWarning, match=r"1 of 100 rows of test are also in train"):
                read_corpus(config)
        else:
            with pytest.raises(DataError, match=r"test\.csv:100:text: the same example"):
                read_corpus(config)


def test_the_same_text_in_another_domain_is_no_overlap(tmp_path):
    put(tmp_path / "train.csv", CSV)
    put(tmp_path / "test.csv", HEADER + "number 2 is good,good,tents\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_corpus(DataConfig(train=f"{tmp_path}/train.csv", test=f"{tmp_path}/test.csv"))


def _write_format(kind: str, folder) -> str:
    """Writes ROWS in one of the formats and returns what the configuration's ``train`` says."""
    path = folder / f"train.{kind}"
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    contents = {
        "csv": CSV,
        "tsv": CSV.replace(",", "\t"),
        "jsonl": jsonl(*ROWS),
        "parquet": parquet(**columns),
    }
    if kind in contents:
        put(path, contents[kind])
        return str(path)
    for domain in ("tents", "pans"):
        lines = [f"{row['label']},{row['text']}\n" for row in ROWS if row["domain"] == domain]
        put(folder / "shops" / f"{domain}.csv", "label,text\n" + "".join(lines))
    return str(folder / "shops")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "folder"])
def test_every_format_gives_the_same_examples(kind, tmp_path):
    raw = read_corpus(DataConfig(train=_write_format(kind, tmp_path)))
    found = sorted((row.text, row.label, row.domain) for row in raw.splits["train"])
    assert found == sorted((row["text"], row["label"], row["domain"]) for row in ROWS)
    assert raw.domains == ["pans", "tents"] and raw.labels == ["bad", "good"]


@pytest.mark.parametrize("change", ["bom", "crlf", "cr", "quoted", "trailing lines", "no last end"])
def test_harmless_variants_of_csv(change, tmp_path):
    variants = {
        "bom": b"\xef\xbb\xbf" + CSV.encode(),
        "crlf": CSV.replace("\n", "\r\n"),
        "cr": CSV.replace("\n", "\r"),
        "quoted": '"text","label","domain"\n"one, two","bad","pans"\n"a ""b""\nc",good,pans\n',
        "trailing lines": CSV + "\n\n",
        "no last end": CSV[:-1],
    }
    put(tmp_path / "train.csv", variants[change])
    rows = read_corpus(DataConfig(train=str(tmp_path / "train.csv"))).splits["train"]
    if change == "quoted":
        assert [(row.row, row.text) for row in rows] == [(2, "one, two"), (3, 'a "b"\nc')]
    else:
        assert [row.text for row in rows] == [row["text"] for row in ROWS]
        assert [row.row for row in rows] == list(range(2, 26))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_texts_that_look_missing_stay_texts(kind, tmp_path):
    texts = ["NA", "null", "nan", "None", "1.50", "true", "\u2028 line"]
    rows = [row(text=text, label=("bad", "good")[i % 2]) for i, text in enumerate(texts)]
    lines = "".join(f"{r['text']},{r['label']},{r['domain']}\n" for r in rows)
    put(tmp_path / f"train.{kind}", HEADER + lines if kind == "csv" else jsonl(*rows))
    raw = read_corpus(DataConfig(train=str(tmp_path / f"train.{kind}")))
    assert [row.text for row in raw.splits["train"]] == texts


def test_integer_labels_are_kept_as_text_in_numeric_order(tmp_path, tokenizer):
    labels = [10, 9, 2, 1] * 4
    put(
        tmp_path / "train.jsonl",
        jsonl(*(row(text=f"x {i}", label=label) for i, label in enumerate(labels))),
    )
    corpus = load_corpus(
        DataConfig(train=f"{tmp_path}/train.jsonl", validation_fraction=0.25), tokenizer
    )
    assert corpus.label2id == {"1": 0, "2": 1, "9": 2, "10": 3}


@pytest.mark.parametrize("column", ["domain", "label"])
def test_texts_to_serve_may_stand_in_any_column(tmp_path, column):
    put(tmp_path / "sites.csv", f"{column},other\n two words ,x\n")
    (row,) = read_texts(str(tmp_path / "sites.csv"), text=column)
    assert (row.text, row.label, row.domain) == (" two words ", None, None)


def test_hub_ids_go_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        features = datasets.Features(
            text=datasets.Value("string"),
            label=datasets.ClassLabel(names=["good", "bad"]),
            domain=datasets.Value("string"),
        )
        rows = {"text": ["a", "b"], "label": [0, 1], "domain": ["d", "d"]}
        if split == "test":
            rows = {"text": ["c"], "label": [-1], "domain": ["d"]}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    raw = read_corpus(DataConfig(train="owner/reviews"))
    assert asked == [("owner/reviews", "train")]
    assert [(row.label, row.file) for row in raw.splits["train"]] == [
        ("good", "owner/reviews[train]"),
        ("bad", "owner/reviews[train]"),
    ]
    with pytest.raises(DataError, match=r"owner/reviews\[test\]:1:label: missing label"):
        read_corpus(DataConfig(train="owner/reviews", test="owner/reviews"))


def test_a_hub_id_that_fails_is_a_problem(monkeypatch):
    def load_dataset(name, split):
        raise FileNotFoundError("nothing there\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"owner/none:-:-: no such file, and as a hub id: .*nothing"
    ):
        read_corpus(DataConfig(train="owner/none"))


def test_pairs(tmp_path, tokenizer):
    rows = [
        {"premise": f"premise {i} " * 20, "claim": "claim", "label": i % 3, "genre": "g"}
        for i in range(30)
    ]
    put(tmp_path / "train.jsonl", jsonl(*rows))
    names = {"text": "premise", "text_pair": "claim", "domain": "genre"}
    config = DataConfig(train=f"{tmp_path}/train.jsonl", max_length=16, **names)
    train = load_corpus(config, tokenizer).train
    assert set(train.lengths) == {16}
    second = [i for i, kind in zip(train.input_ids[0], train.token_type_ids[0]) if kind == 1]
    assert tokenizer.decode(second) == "claim [SEP]"  # the longer text is the one that is cut


def test_max_length_beyond_the_tokenizer_is_refused(tmp_path, tokenizer):
    put(tmp_path / "train.csv", CSV)
    with pytest.raises(ConfigError, match=r"data\.max_length is 1024"):
        load_corpus(DataConfig(train=f"{tmp_path}/train.csv", max_length=1024), tokenizer)


@pytest.fixture
def big(tmp_path):
    """200 examples in two domains of 150 and 50, three quarters of them good, all different."""
    rows = [
        row(
            text="word " * (1 + i % 13) + str(i),
            label="bad" if i % 4 == 0 else "good",
            domain="pans" if i < 150 else "tents",
        )
        for i in range(200)
    ]
    put(tmp_path / "train.jsonl", jsonl(*rows))
    return f"{tmp_path}/train.jsonl"


def cells(split: Split) -> Counter:
    return Counter(zip(split.domain.tolist(), split.labels.tolist()))


def test_held_out_validation_is_stratified_and_disjoint(big, tokenizer):
    corpus = load_corpus(DataConfig(train=big, validation_fraction=0.2), tokenizer, seed=3)
    assert len(corpus.validation) == 40 and len(corpus.train) == 160 and corpus.test is None
    assert cells(corpus.validation) == {(0, 0): 8, (0, 1): 22, (1, 0): 2, (1, 1): 8}
    both = torch.cat([corpus.train.index, corpus.validation.index])
    assert sorted(both.tolist()) == list(range(200))
    again = load_corpus(DataConfig(train=big, validation_fraction=0.2), tokenizer, seed=3)
    other = load_corpus(DataConfig(train=big, validation_fraction=0.2), tokenizer, seed=4)
    assert torch.equal(again.validation.index, corpus.validation.index)
    assert not torch.equal(other.validation.index, corpus.validation.index)


def test_duplicates_never_stand_on_both_sides_of_the_held_out_split(tmp_path, tokenizer):
    rows = [row(text=f"text {i % 30}", label=("bad", "good")[i % 2]) for i in range(60)]
    put(tmp_path / "train.jsonl", jsonl(*rows))
    config = DataConfig(train=f"{tmp_path}/train.jsonl", validation_fraction=0.5)
    corpus = load_corpus(config, tokenizer)
    train, validation = (
        {i % 30 for i in s.index.tolist()} for s in (corpus.train, corpus.validation)
    )
    assert not train & validation and len(corpus.train) + len(corpus.validation) == 60


def test_too_few_rows_to_hold_out(tmp_path, tokenizer):
    put(tmp_path / "train.csv", HEADER + "a,good,pans\nb,bad,pans\n")
    with pytest.raises(DataError, match="2 rows are too few to hold out"):
        load_corpus(DataConfig(train=f"{tmp_path}/train.csv"), tokenizer)


def test_data_fraction_thins_train_only(big, tokenizer):
    whole = load_corpus(DataConfig(train=big), tokenizer)
    part = load_corpus(DataConfig(train=big, data_fraction=0.25), tokenizer)
    assert torch.equal(whole.validation.index, part.validation.index)
    assert len(part.train) == 45
    assert set(part.train.index.tolist()) < set(whole.train.index.tolist())
    tiny = load_corpus(DataConfig(train=big, data_fraction=0.001), tokenizer)
    assert set(cells(tiny.train).values()) == {1} and len(tiny.train) == 4


def test_views_and_columns(big, tokenizer):
    train = load_corpus(DataConfig(train=big), tokenizer).train
    train = train.with_column("score", torch.arange(len(train)).float())
    view = train.view(domain=1)
    assert set(view.domain.tolist()) == {1} and len(view) == 45
    for i in (0, 20, 44):
        whole = int(view.columns["score"][i])
        assert view.index[i] == train.index[whole]
        assert view.input_ids[i] == train.input_ids[whole]
    assert "score" in view[0] and view.view(fraction=0.5).columns["score"].shape == (22,)
    assert torch.equal(view.view(fraction=0.5, seed=1).index, view.view(fraction=0.5, seed=1).index)
    with pytest.raises(ValueError, match="'labels' is reserved"):
        train.with_column("labels", train.labels)
    with pytest.raises(ValueError, match="3 for 180 examples"):
        train.with_column("score", torch.zeros(3))


def test_collate(big, tokenizer):
    train = load_corpus(DataConfig(train=big), tokenizer).train
    train = train.with_column("hidden", torch.randn(len(train), 2, 3))
    examples = [train[i] for i in (0, 3, 7)]
    batch = collate(tokenizer, pad_to_multiple_of=8)(examples)
    longest = max(len(example["input_ids"]) for example in examples)
    assert batch["input_ids"].shape[1] % 8 == 0
    assert collate(tokenizer)(examples)["input_ids"].shape == (3, longest)
    assert batch["attention_mask"].sum(1).tolist() == [train.lengths[i] for i in (0, 3, 7)]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert torch.equal(batch["labels"], train.labels[[0, 3, 7]])
    assert torch.equal(batch["index"], train.index[[0, 3, 7]])
    assert torch.equal(batch["hidden"], train.columns["hidden"][[0, 3, 7]])
    assert set(batch) == {
        *("input_ids", "token_type_ids", "attention_mask"),
        *("labels", "domain", "index", "hidden"),
    }


# N, step size, micro-batches: whole steps, a rest, a rest that joins, one step, odd cuts
@pytest.mark.parametrize(
    ("n", "size", "micro"),
    [(64, 8, 2), (67, 8, 2), (65, 8, 4), (5, 8, 4), (4, 8, 4), (103, 10, 3), (7, 7, 7), (9, 1, 1)],
)
@pytest.mark.parametrize("group", [True, False])
def test_step_sampler_covers_each_example_once(n, size, micro, group):
    lengths = torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    sampler = StepSampler(
        lengths, step_size=size, micro_batches=micro, seed=5, group_by_length=group
    )
    for epoch in range(3):
        steps = sampler.epoch(epoch)
        assert len(steps) == len(sampler)
        for step in steps:
            sizes = [len(part) for part in step]
            assert len(sizes) == micro and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        assert all(sum(map(len, step)) == size for step in steps[:-1])
        assert sum(map(len, steps[-1])) < size + micro
        assert sorted(i for step in steps for part in step for i in part) == list(range(n))


def test_step_sampler_is_deterministic_and_shuffles_epochs():
    def steps(seed, epoch):
        return StepSampler(range(1, 101), step_size=8, micro_batches=2, seed=seed).epoch(epoch)

    assert steps(1, 0) == steps(1, 0)
    assert steps(1, 0) != steps(1, 1) and steps(1, 0) != steps(2, 0)


def test_ranks_share_out_the_same_steps():
    sampler = StepSampler(range(1, 101), step_size=12, micro_batches=4, seed=0)
    for step in sampler.epoch(0):
        for world in (1, 2, 4):
            shared = [part for rank in range(world) for part in step[rank::world]]
            assert sorted(map(sorted, shared)) == sorted(map(sorted, step))
            assert {len(step[rank::world]) for rank in range(world)} == {4 // world}


def test_length_grouping_saves_padding():
    lengths = torch.randint(4, 128, (4000,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(group):
        sampler = StepSampler(lengths, step_size=32, micro_batches=2, seed=0, group_by_length=group)
        parts = [part for step in sampler.epoch(0) for part in step]
        return sum(len(part) * max(lengths[i] for i in part) for part in parts) / sum(lengths)

    assert padded(True) < 1.1 < 1.6 < padded(False)


def test_the_rest_is_not_always_the_longest():
    lengths = list(range(103))
    sampler = StepSampler(lengths, step_size=10, micro_batches=1, seed=0)
    rests = [sampler.epoch(epoch)[-1][0] for epoch in range(20)]
    assert all(len(rest) == 3 for rest in rests)
    assert min(lengths[row] for rest in rests for row in rest) < 50


def test_step_sampler_refuses_what_it_cannot_cut():
    with pytest.raises(DataError, match="3 training examples cannot fill the 4 micro-batches"):
        StepSampler([5, 5, 5], step_size=8, micro_batches=4, seed=0)
    with pytest.raises(ValueError, match="step_size: 2 examples"):
        StepSampler([5] * 9, step_size=2, micro_batches=4, seed=0)


# What one byte of a file can become: nothing, a line end, a mark, a byte that is no UTF-8.
ONE_BYTE = [b"", b"\n", b"\r", b",", b"\t", b'"', b"\0", b"\xff", b"{", b"x"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_whatever_happens_to_one_byte_no_row_is_dropped(kind, tmp_path):
    """Each byte of a small file is replaced by each of ten: the file is refused with a place in it,
    or every row is still there."""
    rows = [row(text=f"w{i}", label=("a", "b")[i % 2], domain="d") for i in range(4)]
    content = {
        "csv": HEADER + "".join(f"{r['text']},{r['label']},{r['domain']}\n" for r in rows),
        "tsv": "text\tlabel\tdomain\n"
        + "".join(f"{r['text']}\t{r['label']}\t{r['domain']}\n" for r in rows),
        "jsonl": jsonl(*rows),
    }[kind].encode()
    path = tmp_path / f"train.{kind}"
    refused = 0
    for position in range(len(content)):
        for byte in ONE_BYTE:
            path.write_bytes(content[:position] + byte + content[position + 1 :])
            try:
                read = read_corpus(DataConfig(train=str(path))).splits["train"]
            except DataError as error:
                refused += 1
                assert f"  {path}:" in error.cause
            else:
                assert len(read) == len(rows), (position, byte)
    assert refused > len(content)
