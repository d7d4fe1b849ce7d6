"""The Python front: the README's example, and what differs from the command line."""

import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tiny_runs import write_config
from transformers import AutoModelForSequenceClassification

import metakd
from metakd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"console": Console(quiet=True)}


@pytest.fixture
def config(source, tmp_path) -> Path:
    return write_config(source, tmp_path, "config")


def test_the_readme_example(config, monkeypatch, world):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(import metakd\n\nresult.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(config.parent)
    scope = {}
    exec(compile(example, "README.md", "exec"), scope)
    result = scope["result"]
    assert list(result.scores) == ["teacher: meta", "tinybert_kd-from-meta"]
    domains = ["hiking", "kitchen", "novels", "software", "average"]
    assert list(result.frame().columns) == domains
    for scores in result.scores.values():
        assert list(scores) == domains and all(0 <= score <= 100 for score in scores.values())
    [(label, students)] = result.students.items()
    assert label == "tinybert_kd-from-meta" and len(students) == 4
    model = AutoModelForSequenceClassification.from_pretrained(students[0])
    assert model.config.num_labels == 2
    assert (result.folder / "report.html").is_file()
    assert str(result).startswith("| | hiking |") and result._repr_markdown_() == str(result)


def test_a_dictionary_gives_what_the_file_gives(config):
    read = metakd.load_config(config, ["seed=3"])
    given = yaml.safe_load(config.read_text())
    given["output_dir"] = Path(given["output_dir"])  # as a notebook would have it
    assert metakd.load_config(given, ["seed=3"]) == read
    assert given["output_dir"] == Path(read.output_dir) and "seed" not in given


def test_a_wrong_dictionary_is_refused_like_a_file():
    wrong = {"output_dir": "runs/x", "data": {"trian": "a.csv"}, "teacher": {"model": "m"}}
    with pytest.raises(ConfigError) as raised:
        metakd.load_config(wrong | {"student": {"layers": (0,)}}, ["bf16=maybe"])
    cause = raised.value.cause
    assert "configuration: data.trian: unknown key, did you mean train?" in cause
    assert "command line: bf16: must be a valid boolean" in cause


def test_a_comparison_and_its_variant(config, world):
    rows = "compare={seeds: [1, 2], teacher_seeds: 1, keep_students: true, rows: [%s]}"
    one = [rows % "{method: logits_kd, teacher: mix}", "distill.domains=[hiking]"]
    result = metakd.compare(config, one, data_fraction=0.5, **QUIET)
    assert result.folder == config.parent / "config-fraction-0.5"
    assert list(result.summary) == ["teacher: mix", "logits_kd-from-mix"]
    assert result.summary["logits_kd-from-mix"]["hiking"]["n"] == 2
    assert [place.parent.name for place in result.students["logits_kd-from-mix"]] == [
        "logits_kd-from-mix-s1",
        "logits_kd-from-mix-s2-t1",
    ]
    assert all((place / "model.safetensors").is_file() for place in result.students.popitem()[1])
    again = metakd.compare(config, [*one, "compare.keep_students=false"], **QUIET)
    assert again.folder == config.parent / "config" and again.students == {}


def test_finetuning_has_no_teacher_to_show(config, world):
    asked = ["distill.method=finetune", "distill.domains=[novels]"]
    result = metakd.run(metakd.load_config(config), asked, **QUIET)
    assert list(result.scores) == ["finetune"]
    assert list(result.scores["finetune"]) == ["novels", "average"]
