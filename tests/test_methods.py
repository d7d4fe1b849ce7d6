"""The table of methods and the kinds of teacher: what a row decides, and that a new one needs
nothing but itself."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import write_config

from metakd.config import CompareRow, DistillConfig, StudentConfig, load_config
from metakd.errors import CheckpointError, ConfigError
from metakd.method.kinds import TEACHER_KINDS, TeacherKind
from metakd.method.methods import DEFAULT_ROWS, MEAN, METHODS, Method, Weighted, as_markdown
from metakd.method.teachers import Teacher
from metakd.method.terms import HardLabelTerm, HiddenTerm, PredictionTerm
from metakd.pipeline import compare as comparison
from metakd.pipeline.lessons import Lesson

ROOT = Path(__file__).resolve().parents[1]


def test_every_row_can_be_configured_and_compared():
    for name, method in METHODS.items():
        assert name == method.name and DistillConfig(method=name).method == name
        for kind in method.possible_teachers or (None,):
            assert CompareRow(method=name, teacher=kind).teacher == kind
        assert method.line and method.source and method.terms
    for method, kind in DEFAULT_ROWS:
        CompareRow(method=method, teacher=kind)


def test_every_key_of_a_row_is_one_of_the_configuration():
    config = DistillConfig()
    for method in METHODS.values():
        for key in method.keys:
            block, _, name = key.rpartition(".")
            assert hasattr(getattr(config, block) if block else config, name), (method.name, key)


@pytest.mark.parametrize(
    ("method", "configured", "taught_by"),
    [
        ("finetune", "mix", None),
        ("logits_kd", "mtl", "mtl"),
        ("mtn_kd", "meta", "single"),
        ("meta", "mix", "meta"),
    ],
)
def test_who_teaches_where_another_kind_is_configured(method, configured, taught_by):
    assert METHODS[method].teacher(configured) == taught_by


def test_a_row_refuses_teachers_that_cannot_teach_it():
    assert METHODS["mtn_kd"].why_not("mix") == "method mtn_kd needs teacher single, got mix"
    assert METHODS["finetune"].why_not("mix") == "method finetune needs teacher None, got mix"
    assert METHODS["tinybert_kd"].why_not("mix") is None


def test_places_of_outputs_tell_one_teacher_from_the_mean_of_several():
    def place(method, kind):
        student = StudentConfig(layers=[0])
        return Lesson("books", student, DistillConfig(method=method), kind, 3).place

    assert place("logits_kd", "single") == "teachers/single-s3/books"
    assert place("mtn_kd", "single") == "teachers/single-s3-mean/books"
    assert place("gated_kd", "single") == "teachers/single-s3-gate/books"
    assert place("logits_kd", "mix") == "teachers/mix-s3/books"


def test_the_documentation_shows_the_table():
    assert as_markdown() in (ROOT / "docs" / "method.md").read_text(encoding="utf-8")


# Rows of one's own: what follows is all that a new method and a new kind of teacher take.


class Smoothed(TeacherKind):
    """A teacher that is not told more than 90 % of a label, with a layer of its own beside."""

    name = "smoothed"
    line = "one teacher, with smoothed labels"

    def parts(self, teacher):
        from torch import nn

        return {"temperature": nn.Linear(1, 1, bias=False)}

    def answer(self, teacher, features, batch):
        features.logits = features.logits * teacher.temperature.weight[0, 0]

    def loss(self, teacher, features, batch):
        from torch.nn.functional import cross_entropy

        rows = cross_entropy(
            features.logits.float(), batch["labels"], reduction="none", label_smoothing=0.1
        )
        return rows, {"ce": rows}


HIDDEN_ONLY = Method(
    "hidden_kd",
    (Weighted(HiddenTerm, "terms.hidden"), Weighted(HardLabelTerm)),
    "hidden states beside the label",
    "this test",
    teachers=("smoothed", "single"),
)


@pytest.fixture
def own_rows(monkeypatch):
    monkeypatch.setitem(TEACHER_KINDS, "smoothed", Smoothed())
    monkeypatch.setitem(METHODS, "hidden_kd", HIDDEN_ONLY)


def test_a_row_and_a_kind_of_one_s_own_are_compared(own_rows, make):
    rows = "{method: hidden_kd, teacher: smoothed}, {method: logits_kd, teacher: smoothed}"
    run = make(f"compare={{seeds: [1], rows: [{rows}]}}", "distill.domains=[hiking]")
    result = comparison.compare(run)
    labels = ["hidden_kd-from-smoothed", "logits_kd-from-smoothed"]
    assert list(result["summary"]) == ["teacher: smoothed", *labels]
    assert set(result["terms"][labels[0]]) == {"hidden", "hard_label"}
    folder = run.folder / "teachers" / "smoothed-s1"
    assert json.loads((folder / "metakd.json").read_text())["kind"] == "smoothed"
    loaded = Teacher.load(folder)
    assert loaded.temperature.weight.shape == (1, 1) and loaded.kind is TEACHER_KINDS["smoothed"]


def test_a_teacher_of_a_kind_that_is_not_known_here_is_not_called_damaged(
    source, tmp_path, tiny_bert, monkeypatch
):
    monkeypatch.setitem(TEACHER_KINDS, "smoothed", Smoothed())

    class NoTokenizer:
        def save_pretrained(self, folder):
            pass

    Teacher(tiny_bert(), "smoothed", ["a", "b"]).save(tmp_path, NoTokenizer())
    monkeypatch.delitem(TEACHER_KINDS, "smoothed")
    with pytest.raises(CheckpointError, match="no kind of teacher called 'smoothed'") as raised:
        Teacher.load(tmp_path)
    assert "remove" not in raised.value.remedy


def test_own_rows_are_offered_and_checked_like_the_others(own_rows, source, tmp_path):
    path = write_config(source, tmp_path, "run")
    with pytest.raises(ConfigError, match="'meta' or 'hidden_kd'"):
        load_config(path, ["distill.method=hidden"])
    with pytest.raises(ConfigError, match="needs teacher smoothed or single, got mix"):
        load_config(path, ["distill.method=hidden_kd", "teacher.kind=mix"])
    for method in (HIDDEN_ONLY, replace(HIDDEN_ONLY, terms=HIDDEN_ONLY.terms[:1])):
        METHODS["hidden_kd"] = method
        overrides = ["distill.method=hidden_kd", "distill.terms.hidden=0"]
        if method is HIDDEN_ONLY:  # its second term has a weight that no key can take
            load_config(path, overrides)
        else:
            with pytest.raises(ConfigError, match=r"every weight is 0 that hidden_kd has \(hidden"):
                load_config(path, overrides)


def test_gamma2_is_swept_for_rows_that_listen_to_it(own_rows, make, monkeypatch):
    listening = Method(
        "own_transfer",
        (Weighted(PredictionTerm, "gamma2"),),
        "predictions weighted by gamma2",
        "this test",
        combine=MEAN,
    )
    monkeypatch.setitem(METHODS, "own_transfer", listening)
    rows = [
        CompareRow(method="own_transfer", teacher="mix"),
        CompareRow(method="logits_kd", teacher="mix"),
    ]
    swept = comparison._expand(rows, [0.1, 0.2])
    assert [row.gamma2 for row in swept] == [0.1, 0.2, None]


def test_rows_are_all_that_the_package_compares():
    """No other module asks for a method or a kind by name: it is the rows that say what to do.
    (``file`` is a word that tables of files have, too; what it is asked by is ``in_data``.)"""
    names = "|".join({*METHODS, *TEACHER_KINDS} - {"file"})
    quoted = re.compile(rf'"({names})"')
    table = {ROOT / "metakd" / "method" / f"{name}.py" for name in ("methods", "kinds")}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "metakd").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if quoted.search(line) and path not in table and 'torch.device("meta")' not in line
    ]
    assert not found
