"""Students of a teacher elsewhere, of which there are probabilities or logits in a file."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import config_refusal, make_source, refusal, rows_of, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import metakd
from metakd.config import DataConfig
from metakd.data.reading import read_corpus
from metakd.data.soft_labels import as_logits
from metakd.deploy import Predictor, export_onnx

TRIAL = Path(__file__).parent / "trials" / "soft_labels.jsonl"
COLUMNS = ["p_negative", "p_positive"]


# Reading


def test_a_file_without_labels_takes_the_likeliest_class():
    raw = read_corpus(DataConfig(train=str(TRIAL), soft_labels=COLUMNS))
    first, second = raw.splits["train"][:2]
    assert raw.labels == ["negative", "positive"]
    assert (first.label, first.soft) == ("positive", [0.05, 0.95])
    assert (second.label, second.soft) == ("negative", [0.87, 0.13])


@pytest.mark.parametrize(
    ("soft", "values"),
    [
        (["p_no", "p_yes"], {"p_no": 0.25, "p_yes": 0.75}),
        (["no", "yes"], {"no": "0.25", "yes": "7.5e-1"}),
        ({"yes": "a", "no": "b"}, {"a": 0.75, "b": 0.25}),
        ("soft", {"soft": {"yes": 0.75, "no": 0.25}}),
        ("soft", {"soft": [0.25, 0.75]}),
        ("soft", {"soft": "[0.25, 0.75]"}),
        ("soft", {"soft": '{"yes": 0.75, "no": 0.25}'}),
    ],
)
def test_every_way_to_write_them(tmp_path, soft, values):
    rows = [{"text": f"t {i}", "label": ("no", "yes")[i % 2], **values} for i in range(4)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    raw = read_corpus(DataConfig(train=train, domain=None, soft_labels=soft))
    assert raw.labels == ["no", "yes"]
    assert all(row.soft == [0.25, 0.75] for row in raw.splits["train"])
    assert [row.label for row in raw.splits["train"]] == ["no", "yes"] * 2


def test_a_list_without_labels_numbers_the_classes(tmp_path):
    rows = [{"text": f"t {i}", "soft": [0.1, 0.2, 0.7][i:] + [0.1, 0.2, 0.7][:i]} for i in range(3)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    raw = read_corpus(DataConfig(train=train, domain=None, soft_labels="soft"))
    assert raw.labels == ["0", "1", "2"]
    assert [row.label for row in raw.splits["train"]] == ["2", "1", "0"]


def test_a_class_that_is_never_the_label_is_a_class(tmp_path):
    soft = {"a": 0.5, "b": 0.3, "c": 0.2}
    rows = [{"text": f"t {i}", "label": "ab"[i % 2], "soft": soft} for i in range(4)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    assert read_corpus(DataConfig(train=train, domain=None, soft_labels="soft")).labels == [*"abc"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"p_a": 0.5, "p_b": 0.4}, "probabilities sum to 0.9, not to 1 (for logits set"),
        ({"p_a": -0.5, "p_b": 1.5}, "-0.5 is not a probability"),
        ({"p_a": math.nan, "p_b": 1.0}, "nan is not a probability"),
        ({"p_a": math.inf, "p_b": 0.0}, "inf is not a probability"),
        ({"p_a": None, "p_b": 1.0}, "None is not a probability"),
        ({"p_a": "half", "p_b": 0.5}, "'half' is not a probability"),
        ({"p_a": True, "p_b": 0.0}, "True is not a probability"),
        ({"p_a": [0.5], "p_b": 0.5}, "[0.5] is not a probability"),
        ({"p_a": 10**400, "p_b": 0.5}, "is not a probability"),
        ({"p_a": 1e300, "p_b": 0.5}, "1e+300 is not a probability"),
        ({"p_a": 0.5}, "None is not a probability"),
    ],
)
def test_a_row_of_bad_numbers(tmp_path, values, reason):
    good = {"label": "a", "p_a": 0.6, "p_b": 0.4}
    rows = [good | {"text": "t 0"}, {"text": "t 1", "label": "b", **values}]
    rows.append(good | {"text": "t 2", "label": "b"})
    keys = {"train": write_rows(tmp_path / "train.jsonl", rows), "domain": None}
    keys["soft_labels"] = ["p_a", "p_b"]
    found = refusal(**keys)
    assert f"train.jsonl:2:p_{'b' if 'p_b' not in values else 'a'}" in found.cause
    assert reason in found.cause
    raw = read_corpus(DataConfig(**keys, on_problem="drop"))
    assert len(raw.splits["train"]) == 2
    assert raw.left_out[0].reason == "soft labels that cannot be used"


@pytest.mark.parametrize(
    "value", [0.5, "a", None, [], [1.0], {}, {"a": 1.0}, "[1", "{}", "[" * 99_999]
)
def test_a_cell_that_holds_no_numbers(tmp_path, value):
    rows = [{"text": f"t {i}", "label": "ab"[i % 2], "soft": [0.5, 0.5]} for i in range(4)]
    rows[1]["soft"] = value
    train = write_rows(tmp_path / "train.jsonl", rows)
    found = refusal(train=train, domain=None, soft_labels="soft")
    assert "train.jsonl:2:soft: " in found.cause


def test_classes_must_be_the_same_everywhere(tmp_path):
    rows = [
        {"text": f"t {i}", "label": "ab"[i % 2], "soft": {"a": 0.5, "b": 0.5}} for i in range(4)
    ]
    rows[0]["soft"] = {"a": 0.5, "c": 0.5}
    train = write_rows(tmp_path / "train.jsonl", rows)
    found = refusal(train=train, domain=None, soft_labels="soft")
    assert "1 problem" in found.cause
    assert "train.jsonl:1:-: soft labels are not of the classes 'a', 'b'" in found.cause
    raw = read_corpus(DataConfig(train=train, domain=None, soft_labels="soft", on_problem="drop"))
    assert len(raw.splits["train"]) == 3 and raw.left_out[0].rows == 1
    rows = [
        {"text": f"t {i}", "label": "ac"[i % 2], "soft": {"a": 0.5, "b": 0.5}} for i in range(4)
    ]
    train = write_rows(tmp_path / "train.jsonl", rows)
    found = refusal(train=train, domain=None, soft_labels="soft")
    assert "soft labels say nothing of class 'c' (there are 'a', 'b')" in found.cause


def test_a_label_column_that_is_named_must_be_there():
    found = refusal(train=str(TRIAL), soft_labels=COLUMNS, label="sentimant")
    assert "missing column: 'sentimant'" in found.cause


def test_conflicting_soft_labels_are_counted(tmp_path):
    rows = [{"text": "t", "soft": soft} for soft in ([0.9, 0.1], [0.1, 0.9])]
    train = write_rows(tmp_path / "train.jsonl", [*rows, {"text": "u", "soft": [0.9, 0.1]}])
    with pytest.warns(UserWarning, match="1 text of train has more than one label"):
        read_corpus(DataConfig(train=train, domain=None, soft_labels="soft"))


def test_a_missing_column_is_named(tmp_path):
    rows = [{"text": f"t {i}", "label": "ab"[i % 2], "p_a": 1.0} for i in range(4)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    found = refusal(train=train, domain=None, soft_labels=["p_a", "p_b"])
    assert "missing column: 'p_b' is unknown; did you mean 'p_a'?" in found.cause


def test_logits_and_probabilities_of_nothing():
    logits = DataConfig(train="x", soft_labels="s", soft_labels_as="logits")
    assert as_logits([[-3.0, 2.0]], logits).tolist() == [[-3.0, 2.0]]
    found = as_logits([[0.0, 1.0]], DataConfig(train="x", soft_labels="s"))
    assert found.isfinite().all() and found[0, 1] == 0


def test_a_temperature_flattens_probabilities():
    """p^(1/T), scaled to sum to 1."""
    p = torch.tensor([0.9, 0.1], dtype=torch.float64)
    found = as_logits([p.tolist()], DataConfig(train="x", soft_labels="s"))[0] / 2
    torch.testing.assert_close(found.softmax(0).double(), p.sqrt() / p.sqrt().sum())


# Keys


@pytest.mark.parametrize(
    "changes",
    [
        {"data.soft_labels": []},
        {"data.soft_labels": ["p"]},
        {"data.soft_labels": ""},
        {"data.soft_labels": {"a": "p"}},
        {"data.soft_labels": {"a": 1, "b": 2}},
        {"data.soft_labels": 3},
        {"data.soft_labels": [1, 2]},
        {"data.soft_labels": ["p_", "p_x"]},
        {"data.soft_labels": ["p", "p"]},
        {"data.soft_labels_as": "odds"},
        {"data.soft_labels_as": None},
        {"teacher.kind": "file"},
        {"teacher.kind": "file", "data.soft_labels": "s", "distill.method": "tinybert_kd"},
        {"teacher.kind": "file", "data.soft_labels": "s", "distill.method": "meta"},
        {"teacher.kind": "file", "data.soft_labels": "s", "teacher.folds": 2},
        {"teacher.kind": "file", "data.soft_labels": "s", "teacher.ensemble": 2},
        {"compare.rows": [{"method": "logits_kd", "teacher": "file"}]},
        {
            "compare.rows": [{"method": "minilmv2", "teacher": "file"}],
            "data.soft_labels": "s",
        },
        {"compare.rows": [{"method": "finetune", "teacher": "file"}], "data.soft_labels": "s"},
    ],
)
def test_keys_that_do_not_go_together(changes):
    found = config_refusal(changes, method="logits_kd")
    assert any(name in found.cause for name in changes)


# Training


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_source(folder)
    return folder


def settings(source: Path, output: Path, **data) -> dict:
    corpus = {n: str(source / "corpus" / f"{n}.jsonl") for n in ("train", "validation", "test")}
    rates = {"num_train_epochs": 2, "learning_rate": 1e-3}
    return {
        "output_dir": str(output),
        "data": {**corpus, "max_length": 24, **data},
        "teacher": {"model": str(source / "encoder"), "training": rates},
        "student": {"layers": [1], "copy_from": "encoder"},
        "distill": {
            "method": "logits_kd",
            "temperature": 2.0,
            "domains": ["hiking", "novels"],
            "training": rates,
        },
        "report_to": ["jsonl"],
    }


def test_as_from_the_teacher_itself(source, tmp_path):
    """Its probabilities in a file teach what it would, to rounding; also of texts without
    labels."""
    labels = {"labels": {"hiking": 4}}
    metakd.run(settings(source, tmp_path / "model", **labels), ["teacher.kind=mix"])
    folder = tmp_path / "model" / "teachers" / "mix-s42"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = rows_of(source / "corpus" / "train.jsonl")
    for row in rows:
        inputs = tokenizer(row["text"], truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            told = model(**inputs).logits[0].double().softmax(0)
        row |= {f"p_{model.config.id2label[n]}": float(value) for n, value in enumerate(told)}
    columns = [f"p_{name}" for name in model.config.label2id]
    data = {"train": write_rows(tmp_path / "soft.jsonl", rows), "soft_labels": columns, **labels}
    config = settings(source, tmp_path / "file", **data)
    result = metakd.run(config, ["teacher.kind=file"])
    assert not (tmp_path / "file" / "teachers").exists()
    for domain in ("hiking", "novels"):
        one, other = (
            load_file(
                tmp_path / f"{name}/students/logits_kd-from-{kind}-s42/{domain}/model.safetensors"
            )
            for name, kind in (("model", "mix"), ("file", "file"))
        )
        assert all((one[key] - other[key]).abs().max() < 1e-5 for key in one)
    assert set(result.scores) == {"logits_kd-from-file"}
    [student, _] = result.students["logits_kd-from-file"]
    texts = [row["text"] for row in rows]
    export_onnx(student, texts, labels=[row["label"] for row in rows])
    assert {answer.label for answer in Predictor(student)(texts)} <= set(model.config.label2id)
    # Stopped and started again it is all there, from the kept corpus, too.
    again = metakd.run(config, ["teacher.kind=file"])
    assert again.scores == result.scores
    shutil.rmtree(tmp_path / "file" / "students")
    assert metakd.run(config, ["teacher.kind=file"]).scores == result.scores


def test_the_whole_way_with_probabilities_alone(source, tmp_path):
    """No labels, no teacher, no domains: student, comparison, report."""
    rows = [
        {"text": row["text"], "soft": {"bad": 0.1, "good": 0.9} if n % 2 else {"bad": 1, "good": 0}}
        for n, row in enumerate(rows_of(source / "corpus" / "train.jsonl"))
    ]
    config = settings(source, tmp_path / "run")
    train = write_rows(tmp_path / "train.jsonl", rows)
    config["data"] = {"train": train, "domain": None, "soft_labels": "soft", "max_length": 24}
    del config["distill"]["domains"]
    config["compare"] = {
        "seeds": [1],
        "rows": [
            {"method": "finetune"},
            {"method": "logits_kd", "teacher": "file"},
            {"method": "pseudo_labels", "teacher": "file"},
        ],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = metakd.compare(config)
    assert set(result.scores) == {"finetune", "logits_kd-from-file", "pseudo_labels-from-file"}
    assert all(path.exists() for path in result.report())
