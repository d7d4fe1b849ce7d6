"""Comparisons: students of several shapes, numbers of labels, and how sure what they say is."""

import csv
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import rows_of, write_config

from metakd import front
from metakd.cli import app, main
from metakd.config import load_config
from metakd.errors import ConfigError
from metakd.method.fit import check_models
from metakd.models.sources import load_tokenizer
from metakd.pipeline import labels as by_labels
from metakd.pipeline.statistics import (
    accuracy_difference,
    label_efficiency,
    labels_to_reach,
)
from metakd.pipeline.table import AVERAGE, Cell, answers_of, show_interval

# Statistics


def made_up(accuracy: float, examples: int = 400, seeds: int = 3, seed: int = 0) -> dict:
    """Answers on two domains, right as often as that, each seed otherwise."""
    drawn = np.random.default_rng(seed)
    return {
        name: {
            s: "".join("01"[int(x < accuracy)] for x in drawn.random(examples))
            for s in range(seeds)
        }
        for name in ("films", "news")
    }


def shares(answers: dict) -> float:
    return 100 * np.mean([r.count("1") / len(r) for by in answers.values() for r in by.values()])


def test_a_difference_lies_between_its_bounds():
    worse, better = made_up(0.7, seed=1), made_up(0.8, seed=2)
    found = accuracy_difference(better, worse)
    assert found.value == pytest.approx(shares(better) - shares(worse))
    assert 0 < found.low < found.value < found.high < 20


def test_pairs_are_compared_on_the_same_draws():
    """What is right and wrong together is no difference, however hard the examples are."""
    base = made_up(0.5, examples=100)
    better = {
        name: {seed: "1" + right[1:] for seed, right in by_seed.items()}
        for name, by_seed in base.items()
    }
    assert accuracy_difference(base, base) == (0.0, 0.0, 0.0)
    found = accuracy_difference(better, base)
    assert found.high - found.low < 5, "one example decides, and not a hundred"


def test_an_interval_holds_the_truth_as_often_as_it_says():
    hits = 0
    for trial in range(60):
        # The same seeds with the same answers: only the examples vary.
        first = {"d": {1: made_up(0.8, 300, 1, 2 * trial)["films"][0]}}
        second = {"d": {1: made_up(0.7, 300, 1, 2 * trial + 1)["films"][0]}}
        found = accuracy_difference(first, second)
        hits += found.low <= 10 <= found.high
    assert 51 <= hits <= 60


def test_other_seeds_or_examples_are_not_compared():
    answers = made_up(0.7)
    assert accuracy_difference(answers, made_up(0.7, examples=399)) is None
    assert accuracy_difference(answers, {"tweets": answers["news"]}) is None
    others = {name: {seed + 7: r for seed, r in by.items()} for name, by in answers.items()}
    assert accuracy_difference(answers, others) is None
    assert label_efficiency([1], [{"news": answers["news"]}], answers, 1) is None
    # What they share is compared.
    fewer = {name: {1: by_seed[1]} for name, by_seed in made_up(0.6, seed=4).items()}
    common = {name: {1: by_seed[1]} for name, by_seed in answers.items()}
    assert accuracy_difference(answers, fewer) == accuracy_difference(common, fewer)


@pytest.mark.parametrize(
    ("accuracy", "labels"),
    [
        (60, 0),  # less than the first point: nobody knows
        (70, 10),
        (75, math.sqrt(1000)),  # half-way in the logarithm
        (80, 100),
        (85, 1000),
        (85.1, math.inf),
    ],
)
def test_labels_to_reach(accuracy, labels):
    assert labels_to_reach([10, 100, 1000], [70, 80, 85], accuracy) == pytest.approx(labels)


def test_efficiency_is_how_many_times_the_labels():
    curves = [made_up(accuracy, seed=n) for n, accuracy in enumerate((0.6, 0.7, 0.8))]
    found = label_efficiency([10, 100, 1000], curves, curves[1], 10)
    assert found == pytest.approx((10, 10, 10)), "paired with itself"
    found = label_efficiency([10, 100, 1000], curves, made_up(0.7, seed=9), 10)
    assert found.low < 10 < found.high and 5 < found.value < 20
    beyond = label_efficiency([10, 100, 1000], curves, made_up(0.95), 10)
    assert beyond == (math.inf,) * 3
    assert show_interval([None, 2.04, None]) == "∞ (2.0 to ∞)" and show_interval(None) == "-"


def test_cells_without_answers_have_none():
    cells = [Cell("a", "d", 1, 50.0, "01"), Cell("a", "d", 2, 50.0), Cell("b", "d", 1, 0.0, "00")]
    assert answers_of(cells, "a") == {} and answers_of(cells, "b") == {"d": {1: "00"}}


def test_a_row_may_be_missing_at_a_point():
    def cells(rows: dict[str, float]) -> list[Cell]:
        return [
            Cell(row, domain, seed, 100 * right.count("1") / len(right), right)
            for row, accuracy in rows.items()
            for domain, by_seed in made_up(accuracy).items()
            for seed, right in by_seed.items()
        ]

    counts = {10: {"finetune": 0.6, "meta-from-meta": 0.7}, 100: {"finetune": 0.7}}
    points = [
        by_labels.point(n, dict.fromkeys(("films", "news"), n), cells(rows))
        for n, rows in counts.items()
    ]
    found = by_labels.against_base(points)
    assert {(entry["row"], entry["labels"]) for entry in found["against_base"]} == {
        ("meta-from-meta", 10)
    }
    average = next(e for e in found["against_base"] if e["domain"] == AVERAGE)
    assert average["efficiency"][0] == pytest.approx(10)


# Runs

ROWS = json.dumps(
    [
        {"method": "finetune", "learning_rate": 1e-4},
        {"method": "logits_kd", "teacher": "mix", "transfer": "unlabelled"},
    ]
)
OPTIONS = [
    f"compare.rows={ROWS}",
    "compare.seeds=[1, 2]",
    "distill.domains=[hiking, novels]",
    "distill.training.max_steps=2",
    "teacher.training.max_steps=2",
]


def test_a_row_may_have_a_student_of_its_own(source, tmp_path):
    small = {"preset": "tiny-2l-128"}
    frozen = {"layers": [0, 1], "freeze_embeddings": True}
    longer = {"num_train_epochs": 2}  # of one step each
    rows = [
        {"method": "tinybert_kd", "teacher": "mix", "max_steps": 1, "student": small},
        {"method": "tinybert_kd", "teacher": "mix", "student": frozen, **longer},
        {"method": "finetune", "student": {"model": str(source / "small")}, **longer},
        {"method": "finetune"},
    ]
    options = [*OPTIONS[3:], f"compare.rows={json.dumps(rows)}", "compare.seeds=[1]"]
    options += ["compare.keep_students=true", "distill.domains=[hiking]"]
    path = write_config(source, tmp_path, "run")
    scores = front.compare(str(path), options).scores
    shapes = {
        "tinybert_kd-from-mix-as-tiny-2l-128": (2, 128, 1),
        "tinybert_kd-from-mix-as-layers-0-1-frozen": (2, 32, 2),
        "finetune-as-small": (2, 24, 2),
        "finetune": (1, 32, 1),
    }
    assert scores.keys() == {"teacher: mix", *shapes}
    for row, (layers, hidden, steps) in shapes.items():
        folder = tmp_path / "run" / "students" / f"{row}-s1" / "hiking"
        config = json.loads((folder / "config.json").read_text())
        assert (config["num_hidden_layers"], config["hidden_size"]) == (layers, hidden)
        assert max(line["step"] for line in rows_of(folder / "log.jsonl")) == steps
    # Frozen word embeddings are the teacher's, what is beside them has learned.
    folders = ["teachers/mix-s1", "students/tinybert_kd-from-mix-as-layers-0-1-frozen-s1/hiking"]
    teacher, student = (load_file(tmp_path / "run" / f / "model.safetensors") for f in folders)
    for name, same in {"word_embeddings": True, "position_embeddings": False}.items():
        name = f"bert.embeddings.{name}.weight"
        assert torch.equal(teacher[name], student[name]) is same


def test_random_embeddings_are_not_to_be_frozen(source, tmp_path):
    options = ["student={preset: tiny-2l-128, freeze_embeddings: true}"]
    with pytest.raises(ConfigError, match="freeze_embeddings: those of a preset are random"):
        load_config(write_config(source, tmp_path, "run"), options)


def test_a_students_model_of_a_row_must_fit(source, tmp_path):
    rows = json.dumps([{"method": "finetune", "student": {"layers": [0, 7]}}])
    path = str(write_config(source, tmp_path, "run"))
    with pytest.raises(ConfigError, match=r"compare\.rows\.0\.student: .* layer outside 0\.\.1"):
        front.run(path, [f"compare.rows={rows}"])
    # It is the row's method that it must fit, not the configuration's.
    wide = {"student": {"layers": [0, 1]}}
    options = ["distill.layer_map=[1]"]
    for method, fits in (("finetune", True), ("tinybert_kd", False)):
        teacher = {"teacher": "mix"} if method == "tinybert_kd" else {}
        config = load_config(
            path, [*options, f"compare.rows={json.dumps([{'method': method, **teacher, **wide}])}"]
        )
        tokenizer, labels = load_tokenizer(config.teacher.model), {"a": 0, "b": 1}
        with nullcontext() if fits else pytest.raises(ConfigError, match=r"compare\.rows\.0: "):
            check_models(config, tokenizer, labels)


def test_every_domain_is_scarce_in_turn(source, tmp_path, monkeypatch, capsys):
    path = write_config(source, tmp_path, "run")
    monkeypatch.setattr("sys.argv", ["metakd"])
    words = ["compare", str(path), "data.labels={novels: 2}", *OPTIONS, "--labels", "all,4,99"]
    app(words, standalone_mode=False)
    said = capsys.readouterr().out
    folder = tmp_path / "run-labels"
    assert f"{folder}/labels.md" in said.replace("\n", "")
    assert sorted(p.name for p in folder.iterdir() if (p / "compare.json").exists()) == [
        "all",
        *(f"{domain}-4-s{seed}" for domain in ("hiking", "novels") for seed in (1, 2)),
    ]
    found = json.loads((folder / "labels.json").read_text())
    few, every = found["points"]  # no domain has 99
    assert few["labels"] == {"hiking": 4, "novels": 4}
    assert every["labels"] == {"hiking": 12, "novels": 12} and every["asked"] == "all"
    row = "logits_kd-from-mix-on-unlabelled"
    assert few["summary"].keys() == {"teacher: mix", "finetune", row}
    for point in found["points"]:
        assert {cell["domain"] for cell in point["cells"]} == {"hiking", "novels"}
        for cell in point["cells"]:
            assert 100 * cell["right"].count("1") / 6 == pytest.approx(cell["accuracy"])
    assert found["base"] == "finetune"
    entries = {(e["row"], e["domain"], e["labels"]): e for e in found["against_base"]}
    assert entries.keys() == {
        (name, domain, asked)
        for name in (row, "teacher: mix")
        for domain in ("average", "hiking", "novels")
        for asked in (4, "all")
    }
    difference = entries[row, "average", 4]["difference"]
    means = {name: few["summary"][name]["average"]["mean"] for name in (row, "finetune")}
    assert difference[0] == pytest.approx(means[row] - means["finetune"])
    rows = list(csv.DictReader((folder / "labels.csv").open()))
    assert len(rows) == sum(len(point["cells"]) for point in found["points"])
    # In the scarce domain its student, and only it, has seen few labels.
    records = {
        name: json.loads((folder / name / "students/finetune-s1/hiking/stage.json").read_text())
        for name in ("hiking-4-s1", "all")
    }
    assert {k: r["result"]["origin"]["examples"] for k, r in records.items()} == {
        "hiking-4-s1": 4,
        "all": 12,
    }
    # A row may have a learning rate of its own.
    logs = [folder / f"all/students/{name}-s1/hiking/log.jsonl" for name in ("finetune", row)]
    rates = [rows_of(log)[0]["learning_rate"] for log in logs]
    assert rates[0] == pytest.approx(rates[1] / 10)
    # Each seed draws other labels; what teachers said is not kept for thirteen settings.
    places = [f"hiking-4-s{seed}/students/finetune-s{seed}/hiking" for seed in (1, 2)]
    drawn = [json.loads((folder / place / "stage.json").read_text()) for place in places]
    assert drawn[0]["inputs"] != drawn[1]["inputs"]
    assert not list(folder.rglob(".cache/teachers"))
    # Again, nothing is trained; from Python, as a result by row.
    result = front.compare(str(path), OPTIONS, labels=["all", 4])
    assert "running" not in capsys.readouterr().out
    assert result.scores[f"{row}, 4 labels"]["average"] == pytest.approx(means[row])


@pytest.mark.parametrize("text", ["", ",", "0", "ten", "10,", "-3", "1.5"])
def test_what_is_no_number_of_labels_is_refused(source, tmp_path, monkeypatch, capsys, text):
    path = write_config(source, tmp_path, "run")
    monkeypatch.setattr("sys.argv", ["metakd", "compare", str(path), "--labels", text])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "compare.labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["distill.one_student_for_all=true"], "one_student_for_all leaves no domain"),
        (["compare.labels=[1000, 99]"], "no domain has more than 99 labels"),
        (["compare.labels=[1]"], "data.labels: 1 of hiking, which has 2 classes"),
    ],
)
def test_what_cannot_be_compared_by_labels_is_refused(make, options, said):
    with pytest.raises(ConfigError, match=said):
        by_labels.compare_labels(make(*options))


def test_several_run_directories_have_no_common_tag(make):
    run = make("compare.labels=[4]")
    run.resume = "phase0-step00000001"
    with pytest.raises(ConfigError, match="has several run directories"):
        by_labels.compare_labels(run)
