"""Kinds of task: texts of several classes or none, and texts with a number."""

from __future__ import annotations

import csv
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, f1_score
from tiny_runs import config_refusal, make_source, refusal, rows_of, write_rows
from transformers import AutoModelForSequenceClassification, pipeline
from typer.testing import CliRunner

import metakd
from metakd import cli, front
from metakd.config import DataConfig
from metakd.data.corpus import Corpus, Split, Tokens, _keep_labels, folds_of, load_corpus
from metakd.data.reading import read_corpus, read_texts
from metakd.data.soft_labels import as_logits
from metakd.data.tables import _from_dataset
from metakd.deploy import Predictor, export_onnx
from metakd.errors import ConfigError, DataError
from metakd.method.tasks import (
    COUNTS,
    METRICS,
    NO_LABEL,
    TASKS,
    Labels,
    Value,
    by_domain,
    task_of,
)
from metakd.models.sources import load_tokenizer
from metakd.pipeline.doubts import doubt

SINGLE, MULTI, NUMBERS = TASKS.values()
TRIALS = Path(__file__).parent / "trials"


def write_csv(path: Path, rows: list[dict]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


# Reading


def test_the_trial_of_several_classes():
    raw = read_corpus(DataConfig(train=str(TRIALS / "multi_label.jsonl"), task="multi_label"))
    rows = raw.splits["train"]
    assert raw.labels == ["delivery", "quality", "service"]
    assert len(rows) == 24
    assert [row.label for row in rows[1:5]] == [
        ("delivery",),
        ("delivery", "quality"),
        ("service",),
        (),
    ]


def test_the_trial_of_numbers():
    raw = read_corpus(DataConfig(train=str(TRIALS / "scores.csv"), task="regression"))
    assert raw.labels == ["label"]
    assert [row.label for row in raw.splits["train"][:2]] == [0.9, 0.21]


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        ("a,b", ("a", "b")),
        (" b , a ", ("a", "b")),
        ("b,b", ("b",)),
        ("", ()),
        ("[]", ()),
        ('["a", "b"]', ("a", "b")),
        ("['b', 'a']", ("a", "b")),  # as pandas writes lists
        ("[1, 2]", ("1", "2")),
        ("[a", ("[a",)),
        ('["\\ud83d\\ude00", "a\\/b"]', ("a/b", "\U0001f600")),  # as JSON escapes them
    ],
)
def test_lists_in_a_csv(tmp_path, cell, label):
    rows = [{"text": "x", "label": cell}, {"text": "y", "label": "c"}]
    file = write_csv(tmp_path / "train.csv", rows)
    raw = read_corpus(DataConfig(train=file, domain=None, task="multi_label"))
    assert raw.splits["train"][0].label == label


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("['a' 'b']", "is no list that can be read"),  # as NumPy prints one
        ("[1 2]", "is no list that can be read"),
        ("['a', nan]", "is no list that can be read"),
        ('["x", null]', "missing label"),
        ("['x', None]", "missing label"),
        ("[NaN]", "NaN is not a label"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, cell, said):
    rows = [{"text": "x", "label": cell}, {"text": "y", "label": "a"}]
    file = write_csv(tmp_path / "train.csv", rows)
    assert said in refusal(train=file, domain=None, task="multi_label").cause


def test_names_of_a_hub_that_are_missing():
    from datasets import ClassLabel, Dataset, Features, List, Value

    names = ClassLabel(names=["a", "b"])
    features = Features({"text": Value("string"), "label": List(names), "one": names})
    rows = {"text": ["x", "y"], "label": [[0, 1], [-1]], "one": [0, -1]}
    table = _from_dataset("hub", Dataset.from_dict(rows, features=features))
    assert [row["label"] for _, row in table.rows] == [["a", "b"], [None]]
    assert [row["one"] for _, row in table.rows] == ["a", None]


def test_another_separator_between_labels(tmp_path):
    rows = [{"text": "x", "label": "a|b, c"}, {"text": "y", "label": "a"}]
    file = write_csv(tmp_path / "train.csv", rows)
    keys = {"task": "multi_label", "domain": None, "label_separator": "|"}
    assert read_corpus(DataConfig(train=file, **keys)).labels == ["a", "b, c"]
    [first, _] = read_texts(file, label="label", task="multi_label", label_separator="|")
    assert first.label == ("a", "b, c")


@pytest.mark.parametrize("task", ["single_label", "regression"])
def test_several_columns_of_labels_are_of_several_classes(tmp_path, task):
    file = write_rows(tmp_path / "train.jsonl", [{"text": "x", "a": 1, "b": 0}])
    with pytest.raises(ConfigError, match=r"data\.label: 2 columns, and each text has"):
        read_texts(file, label=["a", "b"], task=task)


@pytest.mark.parametrize("values", [("1", "0"), ("1.0", "0.0"), (1, 0), (True, False), (1.0, 0.0)])
def test_a_column_for_each_class(tmp_path, values):
    yes, no = values
    rows = [{"text": "x", "rude": yes, "loud": no}, {"text": "y", "rude": no, "loud": no}]
    make = write_csv if isinstance(yes, str) else write_rows
    file = make(tmp_path / ("train.csv" if isinstance(yes, str) else "train.jsonl"), rows)
    keys = {"task": "multi_label", "domain": None, "label": ["rude", "loud"]}
    with pytest.warns(UserWarning, match="or none, have label loud"):
        raw = read_corpus(DataConfig(train=file, **keys))
    assert raw.labels == ["rude", "loud"]  # in the order that was given
    assert [row.label for row in raw.splits["train"]] == [("rude",), ()]


MULTI_REFUSED = [
    ([{"label": None}], "missing label"),
    ([{"label": [None]}], "missing label"),
    ([{"label": [" a"]}], "white space"),
    ([{"label": 1.5}], "float 1.5 is not a list of labels"),
    ([{"label": [["a"]]}], "is not a label"),
    ([{"label": []}, {"label": []}], "no text has a label"),
    ([{"label": ["O", "B-PER"]}], "are of words (token classification)"),
    ([{"text": ["a", "b"], "label": ["a"]}], "token classification"),
]


@pytest.mark.parametrize(("rows", "said"), MULTI_REFUSED)
def test_labels_that_are_no_lists(tmp_path, rows, said):
    rows = [{"text": f"text {number}", **row} for number, row in enumerate(rows)]
    file = write_rows(tmp_path / "train.jsonl", rows)
    assert said in refusal(train=file, domain=None, task="multi_label").cause


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "missing label"),
        ("", "missing label"),
        ("3,5", "'3,5' is not a number"),
        ("nan", "'nan' is not a number"),
        (float("inf"), "inf is not a finite number"),
        (10**400, "is not a finite number"),
        (True, "True is not a number"),
        ([1.0], "[1.0] is not a number"),
    ],
)
def test_labels_that_are_no_numbers(tmp_path, value, said):
    rows = [{"text": "x", "label": 1}, {"text": "y", "label": 2.5}, {"text": "z", "label": value}]
    file = write_rows(tmp_path / "train.jsonl", rows)
    found = refusal(train=file, domain=None, task="regression")
    assert ":3:label:" in found.cause and said in found.cause
    assert "data.on_problem: drop" in found.remedy


def test_one_number_is_nothing_to_predict(tmp_path):
    file = write_rows(tmp_path / "train.jsonl", [{"text": t, "label": 2} for t in "ab"])
    assert "only one number, 2:" in refusal(train=file, domain=None, task="regression").cause


def test_numbers_far_from_0_are_doubtful(tmp_path):
    rows = [{"text": f"text {n}", "label": 1000 * n} for n in range(10)]
    file = write_rows(tmp_path / "train.jsonl", rows)
    with pytest.warns(UserWarning, match="mean 4500 and standard deviation 2872: .* scale them"):
        read_corpus(DataConfig(train=file, domain=None, task="regression"))


def test_a_class_that_only_validation_has(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"text": t, "label": [t]} for t in "ab"])
    other = write_rows(tmp_path / "dev.jsonl", [{"text": "c", "label": ["a", "c"]}])
    found = refusal(train=train, validation=other, domain=None, task="multi_label")
    assert "label not in train: 'c' is unknown" in found.cause


@pytest.mark.parametrize(
    ("file", "way_out"),
    [("multi_label.jsonl", "data.task: multi_label"), ("scores.csv", "data.task: regression")],
)
def test_without_a_task_the_way_out_is_named(file, way_out):
    assert way_out in refusal(train=str(TRIALS / file)).remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"data.task": "multilabel"},
        {"data.task": None},
        {"data.label": ["a", "b"]},
        {"data.label": ["a"], "data.task": "multi_label"},
        {"data.label": ["a", "a"], "data.task": "multi_label"},
        {"data.label": ["a", "b"], "data.task": "regression"},
        {"data.label_separator": ""},
        {"data.soft_labels": "s", "data.task": "regression"},
        {"distill.temperature": 2.0, "data.task": "regression"},
        {"distill.temperature_schedule": "loss", "data.task": "regression"},
        {"compat": "easytransfer", "distill.schedule": "two_stage", "data.task": "regression"},
        {"compat": "easytransfer", "distill.schedule": "two_stage", "data.task": "multi_label"},
    ],
)
def test_keys_that_do_not_go_together(changes):
    found = config_refusal(changes)
    assert any(name in found.cause for name in changes)


# Losses


def test_several_classes_are_as_transformers_has_them():
    logits, labels = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
    rows = MULTI.loss(logits, labels)
    expected = F.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(rows.mean(), expected)
    labels[1] = torch.nan
    rows = MULTI.loss(logits.requires_grad_(), labels)
    assert rows[1] == 0 and MULTI.known(labels).tolist() == [True, False, True, True, True]
    rows.sum().backward()
    assert not logits.grad[1].any() and logits.grad[[0, 2, 3, 4]].isfinite().all()
    said = MULTI.presumed(labels, logits)
    assert said[1].tolist() == (logits[1] > 0).tolist() and torch.equal(said[0], labels[0])
    assert MULTI.unknown(labels).isnan().all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_labels_of_several_classes(temperature):
    student, teacher = torch.randn(4, 6, dtype=torch.double), torch.randn(4, 6, dtype=torch.double)
    p, q = (teacher / temperature).sigmoid(), (student / temperature).sigmoid()
    by_class = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    rows = metakd.sigmoid_kl(student, teacher, temperature=temperature, reduction="none")
    torch.testing.assert_close(rows, temperature**2 * by_class.mean(-1))
    weight, mask = torch.rand(4, dtype=torch.double), torch.tensor([True, False, True, True])
    student[1] = torch.nan
    found = metakd.sigmoid_kl(student, teacher, temperature=temperature, weight=weight, mask=mask)
    torch.testing.assert_close(found, (weight * rows)[mask].sum() / 3)
    unscaled = MULTI.divergence(
        student[:1], teacher[:1], temperature=temperature, scale_by_temperature=False
    )
    torch.testing.assert_close(unscaled, rows[:1] / temperature**2)
    # Its gradient is that of binary cross-entropy with the teacher's probabilities.
    wanted, other = (student[2:].clone().requires_grad_() for _ in range(2))
    metakd.sigmoid_kl(wanted, teacher[2:], reduction="sum").backward()
    F.binary_cross_entropy_with_logits(other, teacher[2:].sigmoid(), reduction="sum").backward()
    torch.testing.assert_close(wanted.grad, other.grad / 6)


def test_numbers_count_in_units_of_their_spread():
    labels = torch.tensor([1.0, 3.0, torch.nan])
    task = NUMBERS.fitted(torch.tensor([0.0, 4.0]))
    assert task.spread == 2.0
    student = torch.tensor([[2.0], [3.0], [9.0]], requires_grad=True)
    rows = task.loss(student, labels)
    assert rows.tolist() == [0.25, 0.0, 0.0]
    rows.sum().backward()
    assert student.grad.flatten().tolist() == [0.5, 0.0, 0.0]
    teacher = torch.tensor([[2.0], [5.0], [9.0]])
    assert task.divergence(student, teacher, temperature=1.0).tolist() == [0.0, 1.0, 0.0]
    assert task.presumed(labels, teacher).tolist() == [1.0, 3.0, 9.0]
    constant = NUMBERS.fitted(torch.tensor([7.0, 7.0]))
    assert constant.spread == 1.0


def test_expertise_of_every_task():
    """(1 + t) / (exp(e^2) + 1), whatever the error e is."""
    t = torch.tensor([0.5, -0.2])
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.1]])
    classes = torch.tensor([0, 1])
    p = logits.softmax(-1)[[0, 1], classes]
    torch.testing.assert_close(
        SINGLE.expertise(logits, classes, t), (1 + t) / (((1 - p) ** 2).exp() + 1)
    )
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    error = ((labels - logits.sigmoid()) ** 2).mean(-1)
    torch.testing.assert_close(MULTI.expertise(logits, labels, t), (1 + t) / (error.exp() + 1))
    numbers = torch.tensor([1.0, 0.5])
    error = torch.tensor([0.25, 0.0])
    task = NUMBERS.fitted(torch.tensor([0.0, 4.0]))
    torch.testing.assert_close(
        task.expertise(logits[:, :1], numbers, t), (1 + t) / (error.exp() + 1)
    )


# Prototypes


def test_a_text_is_in_the_cell_of_each_of_its_classes():
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert MULTI.num_cells(2) == 3
    rows, cells = MULTI.cells(labels)
    assert list(zip(rows.tolist(), cells.tolist())) == [(0, 0), (1, 0), (1, 1), (2, 2)]
    by_cell = torch.tensor([[1.0, 2.0, 4.0]]).expand(3, -1)
    assert MULTI.score_of(by_cell, labels).tolist() == [1.0, 1.5, 4.0]
    numbers = torch.tensor([0.3, 7.0])
    assert NUMBERS.num_cells(1) == 1
    assert [part.tolist() for part in NUMBERS.cells(numbers)] == [[0, 1], [0, 0]]
    assert NUMBERS.score_of(torch.tensor([[0.5], [0.7]]), numbers).tolist() == pytest.approx(
        [0.5, 0.7]
    )
    classes = torch.tensor([2, 0])
    assert [part.tolist() for part in SINGLE.cells(classes)] == [[0, 1], [2, 0]]
    assert SINGLE.score_of(by_cell[:2], classes).tolist() == [4.0, 1.0]


# Drawing


def split_of(task, labels: torch.Tensor) -> Split:
    number = len(labels)
    ids = Tokens(torch.arange(number), torch.ones(number, dtype=torch.long))
    domain = torch.zeros(number, dtype=torch.long)
    return Split(ids, labels, domain, torch.arange(number), task=task)


def test_draws_keep_the_rarest_classes():
    labels = torch.zeros(100, 3)
    labels[:60, 0] = 1
    labels[:30, 1] = 1
    labels[[3, 70], 2] = 1
    split = split_of(MULTI, labels)
    assert split.strata[:2].tolist() == [1, 1] and split.strata[[3, 70, 99]].tolist() == [2, 2, 3]
    for seed in range(5):
        part = split.view(fraction=0.2, seed=seed)
        assert 20 <= len(part) <= 21 and (part.labels.sum(0) > 0).all()
    assert folds_of(split, 4, seed=0).bincount().tolist() == [25] * 4


def test_draws_of_numbers_take_small_and_large_ones():
    split = split_of(NUMBERS, torch.arange(100.0))
    for seed in range(5):
        part = split.view(fraction=0.1, seed=seed)
        assert (part.labels // 20).long().bincount().tolist() == [2] * 5
    few = split_of(NUMBERS, torch.tensor([0.0] * 50 + [1.0] * 50))
    assert few.view(fraction=0.1).labels.sum() == 5


@pytest.mark.parametrize("wanted", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("task", [MULTI, NUMBERS])
def test_as_many_labels_are_kept_as_asked_for(task, wanted):
    """However many groups they would be drawn from, in a domain or in all."""
    number, classes = 60, 4
    labels = torch.arange(60.0)
    if task is MULTI:
        labels = F.one_hot(torch.arange(number) % classes, classes).float()
        labels[::5] = 0
    split = split_of(task, labels)
    split.domain[30:] = 1
    corpus = Corpus(split, split, None, ["a", "b"], {})
    _keep_labels(corpus, 1, wanted, seed=0)
    assert int((corpus.train.domain == 1).sum()) == wanted and len(corpus.unlabelled) == 30 - wanted


def test_unlabelled_texts_have_no_label(tmp_path):
    make_source(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "encoder"))
    for task, labels in ("multi_label", ["a", "b"]), ("regression", [0.5, 0.1]):
        rows = [
            {"text": f"text {n}", "label": [labels[n % 2]] if task == "multi_label" else n / 40}
            for n in range(40)
        ]
        file = write_rows(tmp_path / f"{task}.jsonl", rows)
        config = DataConfig(train=file, domain=None, task=task, labels={"all": 10})
        for _ in range(2):  # the second time from the cache
            corpus = load_corpus(config, tokenizer, cache=tmp_path / "cache", say=str)
            assert corpus.task.name == task and len(corpus.train) == 10
            assert not corpus.task.known(corpus.unlabelled.labels).any()
            assert corpus.task.known(corpus.train.labels).all()


# Scores


def test_scores_of_several_classes():
    labels, logits = torch.randint(0, 2, (40, 3)).float(), torch.randn(40, 3)
    labels[:, 2] = 0  # a class that no text has is left out of the mean of precisions
    gold, found = labels.numpy(), (logits > 0).numpy()
    scores = MULTI.scores(labels, logits)
    assert scores["micro_f1"] == f1_score(gold, found, average="micro")
    assert scores["macro_f1"] == f1_score(gold, found, average="macro")
    precision = [average_precision_score(gold[:, k], logits[:, k].numpy()) for k in range(2)]
    assert scores["mean_average_precision"] == pytest.approx(np.mean(precision))
    assert scores["exact_match"] == np.mean((gold == found).all(1))
    counts = MULTI.details(labels, logits, True)[COUNTS]
    right, wrong, missed = np.array(counts).T
    assert right.tolist() == ((gold == 1) & found).sum(0).tolist()
    assert (right + wrong).tolist() == found.sum(0).tolist()
    assert (right + missed).tolist() == gold.sum(0).tolist()
    one = MULTI.scores(torch.tensor([[1.0], [0.0], [0.0]]), torch.full((3, 1), -1.0))
    assert one["micro_f1"] == one["macro_f1"] == 0.0  # and not the share of right answers
    broken = logits.clone()
    broken[3] = torch.nan
    assert all(math.isfinite(value) for value in MULTI.scores(labels, broken).values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing = MULTI.scores(torch.zeros(3, 2), torch.full((3, 2), -1.0))
    assert set(nothing.values()) == {0.0, 1.0}


def test_scores_of_numbers():
    labels, logits = torch.randn(30), torch.randn(30, 1)
    logits[:, 0] += labels
    scores = NUMBERS.scores(labels, logits)
    assert scores["pearson"] == pytest.approx(pearsonr(labels, logits[:, 0]).statistic)
    assert scores["spearman"] == pytest.approx(spearmanr(labels, logits[:, 0]).statistic)
    assert scores["mse"] == pytest.approx((labels - logits[:, 0]).square().mean().item())
    assert scores["r2"] == pytest.approx(1 - scores["mse"] / labels.var(correction=0).item())
    for constant in (torch.zeros(30, 1), torch.full((30, 1), 1e6), torch.full((30, 1), 0.1)):
        flat = NUMBERS.scores(labels, constant)
        assert flat["pearson"] == flat["spearman"] == 0.0 and flat["r2"] < 0.1
    assert "r2" not in NUMBERS.scores(torch.ones(3), torch.rand(3, 1))
    logits[0] = torch.inf
    assert all(math.isfinite(value) for value in NUMBERS.scores(labels, logits).values())


def test_metrics_and_their_domains():
    assert list(METRICS) == ["accuracy", "micro_f1", "pearson"]
    scores = {"pearson": 0.5, "pearson/a": 0.4, "pearson/b": 0.6, "mse": 1.0, "counts/a": []}
    assert by_domain(scores) == {"a": 0.4, "b": 0.6}
    assert task_of("regression", 1) is NUMBERS and task_of(None, 2) is SINGLE
    assert task_of("regression", 3) is SINGLE  # of an encoder that was something else before
    assert task_of("multi_label_classification", 1) is MULTI


def test_models_of_no_use():
    assert doubt({"counts/a": [[0, 0, 3], [0, 0, 2]]}) == "gives no text any of its classes"
    assert doubt({"counts/a": [[0, 1, 3]]}) == doubt({"counts/a": [[0, 0, 0]]}) == ""
    assert "no closer to the numbers than their mean is (R² -0.50)" in doubt({"r2": -0.5})
    assert doubt({"r2": 0.1}) == ""


# Answers


def test_answers_of_every_task():
    logits = np.array([[2.0, -1.0, 0.0], [-3.0, -2.0, -1.0]])
    first, second = MULTI.answers(logits, ["a", "b", "c"])
    assert first.labels == ("a",) and second.labels == ()
    assert first.scores == pytest.approx({"a": 1 / (1 + math.exp(-2)), "b": 0.2689414, "c": 0.5})
    assert first.fields() == {"prediction": ["a"], "scores": first.scores}
    [number] = NUMBERS.answers(np.array([[0.25]]), ["label"])
    assert number == Value(0.25) and number.fields() == {"prediction": 0.25}
    [best, _] = SINGLE.answers(logits, ["a", "b", "c"])
    assert best.label == "a" and best.fields() == {"prediction": "a", "score": best.score}
    huge = MULTI.answers(np.array([[1e5, -1e5]]), ["a", "b"])[0]
    assert huge.scores == {"a": 1.0, "b": 0.0}


def test_which_answers_count_as_the_same():
    wanted = np.array([[1.0, -1.0], [2.0, 2.0]])
    assert MULTI.alike(wanted + 0.5, wanted).tolist() == [True, True]
    assert MULTI.alike(wanted - 1.5, wanted).tolist() == [False, True]
    numbers = np.array([[0.0], [1.0]])
    moved = numbers + np.array([[0.04], [0.06]])
    assert NUMBERS.alike(moved, numbers).tolist() == [True, False]
    assert NUMBERS.alike(np.array([[1.005]]), np.array([[1.0]])).tolist() == [True]
    for task in TASKS.values():
        assert task.alike(np.full((1, 2), np.nan), np.full((1, 2), -1.0)).tolist() == [False]
    assert MULTI.misfit(1) == NUMBERS.misfit(1) == SINGLE.misfit(2) == ""
    assert MULTI.misfit(0) and NUMBERS.misfit(2) and SINGLE.misfit(1)


# A teacher elsewhere


def test_soft_labels_of_each_class_by_itself(tmp_path):
    rows = [
        {"text": "x", "rude": 0.9, "loud": 0.8},
        {"text": "y", "rude": 0.1, "loud": 0.5},
        {"text": "z", "rude": 0.0, "loud": 0.2},
    ]
    file = write_rows(tmp_path / "train.jsonl", rows)
    config = DataConfig(
        train=file, domain=None, task="multi_label", soft_labels={"rude": "rude", "loud": "loud"}
    )
    raw = read_corpus(config)
    assert raw.labels == ["loud", "rude"]
    assert [row.label for row in raw.splits["train"]] == [("loud", "rude"), (), ()]
    soft = [row.soft for row in raw.splits["train"]]
    told = as_logits(soft, config).sigmoid()
    assert told.tolist() == [pytest.approx([b, a], abs=1e-7) for _, a, b in map(dict.values, rows)]
    wrong = write_rows(tmp_path / "wrong.jsonl", [*rows, {"text": "w", "rude": 2, "loud": 0}])
    found = refusal(train=wrong, domain=None, task="multi_label", soft_labels=["rude", "loud"])
    assert "2 is not a probability" in found.cause
    logits = config.model_copy(update={"soft_labels_as": "logits"})
    assert read_corpus(logits).splits["train"][2].label == ("loud",)


# The whole way


def labelled(rows: list[dict], task: str) -> list[dict]:
    """A corpus of one class each as one of several, or of numbers."""
    for number, row in enumerate(rows):
        good = row["label"] == "positive"
        if task == "multi_label":
            row["label"] = ["good"] * good + ["long"] * (len(row["text"]) > 60)
        else:
            row["label"] = good + number % 3 / 10
    return rows


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_source(folder)
    for task in ("multi_label", "regression"):
        (folder / task).mkdir()
        for split in ("train", "validation", "test"):
            rows = rows_of(folder / "corpus" / f"{split}.jsonl")
            write_rows(folder / task / f"{split}.jsonl", labelled(rows, task))
    return folder


def settings(source: Path, task: str, output: Path) -> dict:
    corpus = {n: str(source / task / f"{n}.jsonl") for n in ("train", "validation", "test")}
    rates = {"num_train_epochs": 2, "learning_rate": 1e-3}
    return {
        "output_dir": str(output),
        "data": {**corpus, "max_length": 24, "task": task, "labels": {"hiking": 6}},
        "teacher": {"model": str(source / "encoder"), "training": rates},
        "student": {"layers": [1]},
        "distill": {"training": rates, "domains": ["hiking", "novels"]},
        "compare": {
            "seeds": [1],
            "rows": [
                {"method": "finetune"},
                {"method": "pseudo_labels", "teacher": "mtl"},
                {"method": "meta", "teacher": "meta"},
            ],
        },
        "report_to": ["jsonl"],
    }


def invoke(*words: str) -> str:
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_the_whole_way(source, tmp_path, task):
    """Train, compare, report, export, predict; plain transformers say what we say."""
    config = settings(source, task, tmp_path / "run")
    rules = TASKS[task]
    result = metakd.run(config)
    assert set(result.scores["meta-from-meta"]) == {"hiking", "novels", "average"}
    [student, _] = result.students["meta-from-meta"]
    shape = json.loads((student / "config.json").read_text())
    assert shape["problem_type"] == rules.problem_type
    assert len(shape["id2label"]) == (2 if task == "multi_label" else 1)
    stage = json.loads((student / "stage.json").read_text())
    title = METRICS[rules.metric]
    assert title in (student / "README.md").read_text()
    assert by_domain(stage["result"]["test"]).keys() == {"hiking"}

    texts = [row["text"] for row in rows_of(source / task / "test.jsonl")]
    answers = Predictor(student, engine="eager")(texts)
    told = pipeline("text-classification", model=str(student), top_k=None)(texts, truncation=True)
    for answer, said in zip(answers, told):
        by_name = {one["label"]: one["score"] for one in said}
        ours = answer.scores if isinstance(answer, Labels) else {"label": answer.value}
        assert ours == pytest.approx(by_name, abs=1e-5)

    columns = ("--domain", "hiking", "--data", source / task / "test.jsonl")
    assert title.split()[0] in invoke("export", student, *columns)  # the rest may be wrapped
    exported = json.loads((student / "onnx" / "export.json").read_text())
    scored = (exported["checked"], exported["formats"]["model.onnx"])
    one, other = (found[rules.metric] for found in scored)
    assert one == pytest.approx(other, abs=0.02)
    with pytest.raises(DataError, match=r"is not among the model's|are none of a model"):
        export_onnx(student, texts, labels=[("bad",)] * len(texts))
    lines = invoke("predict", student, texts[0], "--engine", "eager").splitlines()
    said = json.loads(lines[-1])["prediction"]
    assert said == answers[0].fields()["prediction"] or said == pytest.approx(
        answers[0][0], abs=1e-5
    )

    compared = metakd.compare(config, ["distill.domains=[hiking]"])
    assert compared.details["metric"] == rules.metric
    cell = compared.details["cells"][0]
    assert -100 <= cell[rules.metric] <= 100 and cell["right"] == ""
    assert (
        (tmp_path / "run" / "compare.csv").read_text().startswith(f"row,domain,seed,{rules.metric}")
    )
    for path in compared.report():
        assert path.exists()
    page = (tmp_path / "run" / "report.md").read_text()
    assert f"{title[0].upper()}{title[1:]} by method and domain" in page
    assert ("precision" in page) == (task == "multi_label")
    assert "ccuracy" not in page and "onfusion" not in page

    again = metakd.run(config)
    assert again.scores == result.scores


def test_a_student_of_several_classes_learns(source, tmp_path):
    """Not only does it run: with time its scores are those of a model that has understood."""
    config = settings(source, "multi_label", tmp_path / "run")
    config["data"] |= {"labels": {}}
    config["distill"]["domains"] = ["hiking"]
    for block in ("teacher", "distill"):
        config[block]["training"] = {"num_train_epochs": 12, "learning_rate": 5e-3}
    scores = metakd.run(config).scores
    assert scores["meta-from-meta"]["average"] > 75


def test_probabilities_of_each_class_teach_as_their_teacher_does(source, tmp_path):
    """To rounding, those of texts without labels, too."""
    config = settings(source, "multi_label", tmp_path / "model")
    config["student"]["copy_from"] = "encoder"
    config["distill"] |= {"method": "logits_kd", "domains": ["hiking"], "temperature": 2.0}
    metakd.run(config, ["teacher.kind=mix"])
    rows = rows_of(source / "multi_label" / "train.jsonl")
    teacher = Predictor(tmp_path / "model" / "teachers" / "mix-s42", engine="eager")
    for row, answer in zip(rows, teacher([row["text"] for row in rows])):
        row["soft"] = answer.scores
    config["data"] |= {"train": write_rows(tmp_path / "soft.jsonl", rows), "soft_labels": "soft"}
    config["output_dir"] = str(tmp_path / "file")
    metakd.run(config, ["teacher.kind=file"])
    one, other = (
        load_file(tmp_path / f"{name}/students/logits_kd-from-{kind}-s42/hiking/model.safetensors")
        for name, kind in (("model", "mix"), ("file", "file"))
    )
    assert all((one[key] - other[key]).abs().max() < 1e-5 for key in one)


def test_scores_t_of_several_classes(source, tmp_path):
    """The mean over a text's classes, and by cell for texts whose classes nobody knows."""
    config = settings(source, "multi_label", tmp_path / "run")
    run = front.open_run(config)
    run.prototypes()
    stage = load_file(tmp_path / "run" / "prototypes" / "scores.safetensors")
    kept = load_file(tmp_path / "run" / "prototypes" / "prototypes.safetensors")
    assert kept["vectors"].shape[1] == 3 and stage["unlabelled"].shape == (6, 3)
    assert len(stage["t"]) == 42 and stage["t"].isfinite().all()


def test_a_model_of_another_task_is_trained_anew(source, tmp_path):
    """A teacher's folder says what it was for; a student of another task must not inherit it."""
    config = settings(source, "regression", tmp_path / "numbers")
    metakd.run(config, ["distill.domains=[hiking]"])
    model = next((tmp_path / "numbers").glob("teachers/meta-s42"))
    single = settings(source, "multi_label", tmp_path / "classes")
    single["data"] |= {"task": "single_label", "labels": {}} | {
        n: str(source / "corpus" / f"{n}.jsonl") for n in ("train", "validation", "test")
    }
    single["teacher"]["model"] = str(model)
    single["student"] = {"layers": [1], "copy_from": "encoder"}
    result = metakd.run(single)
    for folder in result.students["meta-from-meta"]:
        shape = AutoModelForSequenceClassification.from_pretrained(folder).config
        assert shape.problem_type == "single_label_classification" and shape.num_labels == 2


def test_the_configuration_of_the_documentation_is_one():
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```yaml\n")[1:]]
    tasks = [block for block in blocks if "task:" in block]
    assert len(tasks) >= 3
    for block in tasks:
        DataConfig.model_validate({"train": "x.csv", **yaml.safe_load(block)["data"]})


def test_no_label_is_no_class():
    labels = torch.tensor([0, NO_LABEL])
    assert SINGLE.known(labels).tolist() == [True, False]
    assert SINGLE.loss(torch.zeros(2, 2), labels).tolist() == pytest.approx([math.log(2), 0.0])
