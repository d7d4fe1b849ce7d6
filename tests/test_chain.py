"""Assistants between teacher and student: their shapes, who teaches whom, and when a chain ends."""

import json

import pytest
import torch
from tiny_runs import assert_same_bits, config_refusal, distil_until_stopped, losses, rows_of
from transformers import AutoModelForSequenceClassification, BertConfig

from metakd import demo
from metakd.config import DistillConfig, StudentConfig
from metakd.errors import ConfigError
from metakd.method.objective import Distillation
from metakd.models.student import student_shape
from metakd.pipeline import chain
from metakd.pipeline.compare import compare
from metakd.pipeline.memory import count_parameters

ONE = ["distill.domains=[hiking]", "distill.method=tinybert_kd", "teacher.kind=mix"]
LISTED = 'distill.chain=[{"layers": [0, 1]}]'


def stage(place) -> dict:
    return json.loads((place / "stage.json").read_text())["result"]


# Shapes


def bert(layers: int) -> BertConfig:
    return BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
    )


def test_sizes_are_between_by_their_ratio():
    taught, student = bert(12), StudentConfig(layers=[2, 5], freeze_embeddings=True)
    learning = student_shape(student, taught)
    found = chain.between(2, student, taught, learning)
    whole, small = count_parameters(taught), count_parameters(learning)
    for step, one in enumerate(found, 1):
        wanted = whole * (small / whole) ** (step / 3)
        sizes = [
            count_parameters(student_shape(StudentConfig(layers=list(range(n))), taught))
            for n in range(3, 12)
        ]
        own = count_parameters(student_shape(one, taught))
        assert abs(own - wanted) == min(abs(size - wanted) for size in sizes)
        assert {2, 5} < set(one.layers) and one.freeze_embeddings
    assert len(found[0].layers) > len(found[1].layers)


def test_layers_lie_apart_and_hold_those_of_the_student():
    assert chain._spread(4, [0, 2], 6) == (0, 1, 2, 5)
    assert chain._spread(3, [], 6) == (0, 2, 5)
    assert chain._spread(5, [0, 2, 5], 6) == (0, 1, 2, 3, 5)


def test_there_may_be_room_for_fewer_or_none():
    taught = bert(4)
    student = StudentConfig(layers=[0, 3])
    assert len(chain.between(3, student, taught, student_shape(student, taught))) == 1
    student = StudentConfig(layers=[0, 1, 3])
    assert not chain.between(3, student, taught, student_shape(student, taught))


def test_matched_layers_are_those_that_an_assistant_has_of_the_teachers():
    distill = DistillConfig(layer_map=[0, 5])
    assert distill.through(StudentConfig(layers=[0, 2, 5])).layer_map == [0, 2]
    assert distill.through(StudentConfig(layers=[1, 2, 5])).layer_map == "uniform"
    assert distill.through(StudentConfig(preset="tiny-2l-128")).layer_map == "uniform"
    assert distill.taking(StudentConfig(layers=[0, 2, 5])).layer_map == [0, 2, 5]
    assert DistillConfig(layer_map="last").through(StudentConfig(layers=[1])).layer_map == "last"


# Runs


def test_each_is_taught_by_the_one_before(make, monkeypatch):
    run = make('distill.chain=[{"layers": [0, 1]}, {"preset": "tiny-2l-128"}]',
               "distill.layer_map=copied", *ONE)  # fmt: skip
    taught = []
    forward = Distillation.forward

    def watched(module, batch, features=None):
        shown = features.logits.detach().clone()
        taught.append((batch, shown, features.hidden[-1].shape[-1], len(features.hidden)))
        return forward(module, batch, features)

    monkeypatch.setattr(Distillation, "forward", watched)
    [place] = run.distill()
    label = "tinybert_kd-from-mix-s42/hiking"
    first = run.folder / "assistants/layers-0-1" / label
    second = run.folder / "assistants/tiny-2l-128" / label
    assert stage(place)["tutor"] == "tiny-2l-128" and stage(second)["tutor"] == "layers-0-1"
    assert "tutor" not in stage(first)
    steps = len(taught) // 3
    assert [width for *_, width, _ in taught] == [32] * steps + [32] * steps + [128] * steps
    assert [depth for *_, depth in taught] == [2] * len(taught)
    for folder, seen in ((first, taught[steps]), (second, taught[-1])):
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        batch, shown, *_ = seen
        names = ("input_ids", "attention_mask", "token_type_ids")
        with torch.no_grad():
            expected = model(**{n: batch[n] for n in names if n in batch}).logits
        torch.testing.assert_close(shown, expected)
    assert stage(first)["parameters"] != stage(place)["parameters"]
    again = make('distill.chain=[{"layers": [0, 1]}, {"preset": "tiny-2l-128"}]',
                 "distill.layer_map=copied", *ONE)  # fmt: skip
    assert again.distill() == [place] and not any("running" in line for line in again.said)


def test_a_chain_ends_where_too_little_is_gained(make):
    shapes = 'distill.chain=[{"layers": [0, 1]}, {"layers": [0]}]'
    for limit, tutor in ((5.0, "layers-0-1"), (-0.99, "layers-0")):
        run = make(shapes, f"distill.chain_stop={limit}", *ONE, output=f"stop{limit}")
        [place] = run.distill()
        assert stage(place)["tutor"] == tutor
        assert any("the chain ends" in line for line in run.said) == (limit > 0)
        assert (run.folder / "assistants/layers-0").exists() == (limit < 0)


def test_who_comes_later_decides_nothing_for_an_assistant(make):
    run = make(LISTED, *ONE)
    run.distill()
    for options in (
        ['distill.chain=[{"layers": [0, 1]}, {"layers": [0]}]', "distill.chain_stop=-0.5"],
        ['distill.chain=[{"preset": "tiny-2l-128"}, {"layers": [0, 1]}]'],
    ):
        again = make(*options, *ONE)
        again.distill()
        anew = [line for line in again.said if line.startswith("assistants/layers-0-1")]
        # The same after nobody, and another after a preset.
        ends = "skipped" if "chain_stop" in options[-1] else "running"
        assert anew[0].endswith(ends)


def test_a_chain_is_judged_by_scores_of_its_domain(make):
    """Each single teacher knows its own; the mean of all of them teaches."""
    chained = ['distill.chain=[{"layers": [0, 1]}, {"layers": [0]}]', "distill.chain_stop=5.0"]
    run = make(*chained, "distill.domains=[novels]", "distill.method=mtn_kd", "teacher.kind=single")
    [place] = run.distill()
    teachers = {p.name: stage(p)["validation"] for p in run.teach("single")}
    best = teachers["novels"]["accuracy/novels"]
    own = stage(next(run.folder.glob("assistants/layers-0-1/*/novels")))["validation"]
    [said] = [line for line in run.said if "the chain ends" in line]
    assert f"{100 * (own['accuracy/novels'] - best) / best:+.1f} %" in said
    assert stage(place)["seconds_before"] > 0


def test_rows_without_a_teacher_have_no_assistants(make):
    rows = [{"method": "finetune"}, {"method": "tinybert_kd", "teacher": "mix"}]
    run = make(f"compare.rows={json.dumps(rows)}", LISTED, "compare.seeds=[1]", *ONE)
    found = compare(run)
    assert set(found["seconds"]) == {"finetune", "tinybert_kd-from-mix"}
    assert not list(run.folder.glob("assistants/*/finetune*"))
    with pytest.raises(ConfigError, match=r"distill\.chain: .*names a layer outside"):
        make('distill.chain=[{"layers": [0, 7]}]', *ONE).distill()


def test_a_cache_is_kept_for_the_first_assistant(make):
    run = make(LISTED, "distill.cache_teacher=all", *ONE)
    [folder] = run.cache()
    assert folder.is_dir() and not (run.folder / "assistants").exists()


def test_a_number_of_assistants_is_of_the_teachers_layers(make, source, tmp_path):
    with pytest.raises(ConfigError, match="no number of the teacher's layers lies between"):
        make("distill.chain=1", *ONE).distill()
    texts = [row["text"] for row in rows_of(source / "corpus" / "train.jsonl")]
    deep = tmp_path / "deep"
    demo.scratch_encoder(
        deep, texts, hidden_size=24, layers=4, heads=2, vocab_size=300, mlm_steps=0
    )
    run = make("distill.chain=2", "student.layers=[3]", f"teacher.model={deep}", *ONE)
    assert stage(run.distill()[0])["tutor"] == "layers-0-3"
    assert stage(next(run.folder.glob("assistants/layers-0-3/*/hiking")))["tutor"] == "layers-0-1-3"


@pytest.mark.parametrize("cached", ["none", "all"])
def test_the_first_assistant_may_learn_from_what_is_kept(make, cached):
    run = make(LISTED, f"distill.cache_teacher={cached}", *ONE)
    [place] = run.distill()
    first = run.folder / "assistants/layers-0-1/tinybert_kd-from-mix-s42/hiking"
    assert (run.cache_root / "teachers").exists() == (cached == "all")
    assert losses(first) != losses(place)


def test_a_chain_that_was_stopped_ends_with_the_same_bits(make, monkeypatch):
    options = [LISTED, "save_steps=1", "distill.training.per_device_train_batch_size=4", *ONE]
    [whole] = make(*options, output="whole").distill()
    run = make(*options, output="cut")
    run.teach()
    distil_until_stopped(run, monkeypatch, looks=7)  # after three steps of the first
    assert list(run.folder.glob("assistants/*/*/hiking"))
    run = make(*options, output="cut")
    [cut] = run.distill()
    assert any(line.startswith("going on from checkpoint") for line in run.said)
    assert_same_bits(whole, cut)


def test_meta_needs_a_teacher_for_what_an_assistant_has_not_got(make):
    with pytest.raises(ConfigError, match=r"distill\.chain: transfer .* set distill\.gamma2: 0"):
        make(LISTED, "distill.domains=[hiking]").distill()
    run = make(LISTED, "distill.domains=[hiking]", "distill.gamma2=0", output="without")
    assert stage(run.distill()[0])["tutor"] == "layers-0-1"


def test_a_comparison_has_rows_of_chains(make):
    rows = [{"method": "tinybert_kd", "teacher": "mix", "chain": [{"layers": [0, 1]}]},
            {"method": "tinybert_kd", "teacher": "mix"}]  # fmt: skip
    run = make(f"compare.rows={json.dumps(rows)}", "compare.seeds=[1]", "distill.domains=[hiking]")
    assert "tinybert_kd-from-mix-chain-layers-0-1" in compare(run)["summary"]


@pytest.mark.parametrize(
    ("changes", "distill", "said"),
    [
        ({}, {"chain": 0}, "chain"),
        ({}, {"chain": []}, "chain"),
        ({}, {"chain": [{"model": "x"}]}, "made of the teacher's layers, or a preset"),
        ({}, {"chain": [{"layers": [0]}, {"layers": [0]}]}, "given twice"),
        ({}, {"chain": [{"layer": [0]}]}, "did you mean layers"),
        ({}, {"chains": 2}, "did you mean chain"),
        ({}, {"chain": 2, "chain_stop": -2}, "chain_stop"),
        ({}, {"chain_stop": 0.01}, "needs distill.chain"),
        ({}, {"chain": 2, "generations": 2}, "give one"),
        ({}, {"chain": 2, "method": "finetune"}, "no teacher"),
        ({"compare.rows": [{"method": "finetune", "chain": 2}]}, {}, "no teacher"),
    ],
)
def test_chains_that_cannot_be_are_refused(changes, distill, said):
    assert said in str(config_refusal(changes, **distill))
