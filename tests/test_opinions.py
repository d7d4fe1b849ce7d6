"""Steadier teachers: opinions of those who have not seen an example, means of several seeds; and
terms on one scale."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import losses, rows_of

from metakd.data.corpus import folds_of
from metakd.errors import ConfigError
from metakd.functional import domain_expertise
from metakd.method.balance import balanced
from metakd.method.methods import Method, Weighted, build_terms
from metakd.method.objective import Distillation
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.method.terms import HiddenTerm, PredictionTerm
from metakd.models.taps import Features
from metakd.pipeline.lessons import Lesson
from metakd.training.scoring import logits_of

ONE = ["distill.domains=[hiking]", "distill.training.per_device_train_batch_size=8"]

# Folds


def test_folds_are_even_and_keep_alike_texts_together(make):
    train = make().corpus.train
    twice = train.select(torch.cat([torch.arange(len(train)), torch.arange(10)]))
    fold = folds_of(twice, 3, seed=1)
    assert torch.equal(fold[:10], fold[len(train) :])
    sizes = fold[: len(train)].bincount(minlength=3)
    assert sizes.max() - sizes.min() <= 1
    for domain in range(4):
        for label in range(2):
            cell = (train.domain == domain) & (train.labels == label)
            counts = fold[: len(train)][cell].bincount(minlength=3)
            assert counts.max() - counts.min() <= 1
    assert torch.equal(fold, folds_of(twice, 3, seed=1))
    assert not torch.equal(fold, folds_of(twice, 3, seed=2))


@pytest.mark.parametrize("kind", ["mix", "single"])
def test_an_opinion_is_of_a_teacher_that_has_not_seen_the_example(make, kind):
    run = make("teacher.folds=3", "data.withhold=[software]")
    opinions, train = run.opinions(kind, 42), run.corpus.train
    withheld = train.domain == run.corpus.domains.index("software")
    assert torch.equal(opinions.isnan().all(1), withheld)
    assert opinions[~withheld].isfinite().all()
    folder, seen = run.folder / "teachers", []
    for number in (1, 2, 3):
        place = folder / f"{kind}-s42-fold{number}of3"
        assert not list(place.rglob("model.safetensors")), "its weights serve nobody"
        for file in place.rglob("opinions.safetensors"):
            kept = load_file(file)
            assert torch.equal(opinions[kept["index"]], kept["logits"])
            seen += kept["index"].tolist()
    assert sorted(seen) == train.index[~withheld].tolist(), "each example once"


def test_a_teacher_of_one_domain_speaks_for_itself_of_others(make):
    run = make("teacher.folds=2", "teacher.kind=single", "distill.method=logits_kd", *ONE,
               "distill.transfer=all", "distill.domains=[hiking]")  # fmt: skip
    run.distill()
    folds = {p.name for p in run.folder.glob("teachers/single-s42-fold*/*")}
    assert folds == {"hiking"}
    lesson = run.lesson_of("hiking")
    opinion = run.texts(lesson, lesson.texts).columns["opinion"]
    assert opinion[:12].isfinite().all() and opinion[12:].isnan().all()


def test_logits_are_those_of_the_model(make):
    run = make()
    [place] = run.teach("mix")
    teacher = Teacher.load(place).eval()
    split = run.corpus.test
    found = run.logits(teacher.logits, split, run.config.teacher.training)
    batch = run.collate([split[row] for row in range(len(split))])
    torch.testing.assert_close(found, teacher.logits(batch), rtol=1e-5, atol=1e-6)
    assert logits_of.__doc__


def test_students_learn_from_opinions_and_lambda_is_logged_beside(make):
    run = make("teacher.folds=2", *ONE)
    [place] = run.distill()
    steps = [row for row in rows_of(place / "log.jsonl") if row["split"] == "train"]
    assert all(0 <= row["expertise_in_sample"] <= 1 for row in steps)
    assert any(row["expertise"] != row["expertise_in_sample"] for row in steps)
    [plain] = make(*ONE, output="plain").distill()
    assert losses(place) != losses(plain)
    # The same with kept outputs, and again without a training.
    run = make("teacher.folds=2", "distill.cache_teacher=all", *ONE)
    [kept] = run.distill()
    assert not any("teachers/" in line and "running" in line for line in run.said)
    for values in zip(losses(kept)["."], [row["loss"] for row in steps], strict=True):
        assert values[0] == pytest.approx(values[1], rel=2e-5, abs=1e-8)


def test_what_no_teacher_has_seen_is_the_teachers_own_opinion(make_batch, tiny_bert):
    batch = make_batch(rows=4, domains=2)
    taught = Features(mask=batch["attention_mask"], logits=torch.randn(4, 2))
    mine = taught.logits.clone()
    batch["opinion"] = torch.randn(4, 2)
    batch["opinion"][2:] = torch.nan
    expected = torch.cat([batch["opinion"][:2], mine[2:]])
    module = Distillation(tiny_bert(), [PredictionTerm()], weigh_by_expertise=True)
    output = module(batch, taught)
    torch.testing.assert_close(taught.logits, expected)
    t, labels = batch["t"], batch["labels"]
    in_sample = output.terms["expertise_in_sample"]
    torch.testing.assert_close(in_sample, domain_expertise(mine, labels, t).mean())
    torch.testing.assert_close(
        output.terms["expertise"], domain_expertise(expected, labels, t).mean()
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["distill.method=mtn_kd", "teacher.kind=single"], "from several teachers"),
        (
            ["data.data_fraction=0.05", "teacher.kind=single", "distill.method=logits_kd"],
            "too many",
        ),
    ],
)
def test_folds_that_cannot_be_are_refused(make, options, said):
    with pytest.raises(ConfigError, match=r"teacher\.folds: .*" + said):
        make("teacher.folds=20", "distill.domains=[hiking]", *options).distill()


# Ensembles


@pytest.mark.parametrize("method", ["tinybert_kd", "mtn_kd", "meta"])
def test_an_ensemble_teaches_by_its_mean(make, method):
    kind = {"meta": "meta", "mtn_kd": "single"}.get(method, "mix")
    run = make("teacher.ensemble=2", f"distill.method={method}", f"teacher.kind={kind}", *ONE)
    [place] = run.distill()
    members = run.ensemble(kind, 42)
    assert [places[0].parts[len(run.folder.parts) + 1] for places in members] == [
        f"{kind}-s42",
        f"{kind}-s1042",
    ]
    assert run.evaluate()["teacher"].keys() >= {"accuracy/hiking"}
    alone = make(f"distill.method={method}", f"teacher.kind={kind}", *ONE)
    assert alone.teach(kind) == members[0], "the first is the one that there would be"
    assert not any("running" in line for line in alone.said)
    assert alone.distill() == [place] and any("running" in line for line in alone.said)


def test_of_several_domains_teachers_only_logits_have_a_mean():
    with pytest.raises(ValueError, match="only logits have a mean"):
        Method("m", (Weighted(HiddenTerm),), "", "", combine="mean")


# Balance


@pytest.mark.parametrize(
    ("method", "attention", "packed"),
    [("meta", "scores", False), ("meta", "kl", True), ("minilmv2", "scores", False)],
)
def test_balanced_terms_of_a_student_that_says_nothing_are_one(make, method, attention, packed):
    run = make(f"distill.method={method}", f"packed={packed}", f"distill.attention={attention}",
               "distill.relation_heads=2", "student.layers=[0, 1]")  # fmt: skip
    terms = build_terms(run.config.distill, student_layers=2, teacher_layers=2)
    [place] = run.teach("meta")
    needs = frozenset().union(*(term.needs for term in terms))
    batch = run.collate([run.corpus.train[row] for row in range(6)])
    with FrozenTeacher([Teacher.load(place)], needs, packed=packed) as show:
        taught = show(batch)
        found = balanced(terms, [(taught, batch)])
        for term in found:
            if not term.intermediate:
                assert not term.scales
                continue
            zeros = Features(mask=taught.mask)
            for name in term.needs:
                shown = getattr(taught, name)
                many = not isinstance(shown, torch.Tensor)
                made = [torch.zeros_like(s) for s in shown] if many else torch.zeros_like(shown)
                setattr(zeros, name, made)
            layers = max(1, len(term.scales))
            rows = term.rows(zeros, taught, batch, None)
            assert rows.mean().item() == pytest.approx(layers, rel=1e-5), term.name


def test_balanced_students_say_their_scales(make):
    run = make("distill.balance=variance", "student.layers=[0, 1]", *ONE)
    [place] = run.distill()
    scales = json.loads((place / "stage.json").read_text())["result"]["scales"]
    assert {name: len(values) for name, values in scales.items()} == {
        "embedding": 1,
        "hidden": 2,
        "attention": 2,
        "transfer": 1,
    }
    assert all(0 < value < 1e3 for values in scales.values() for value in values)
    [again] = make("distill.balance=variance", "distill.cache_teacher=all",
                   "student.layers=[0, 1]", *ONE, output="kept").distill()  # fmt: skip
    kept = json.loads((again / "stage.json").read_text())["result"]["scales"]
    for name, values in scales.items():
        assert kept[name] == pytest.approx(values, rel=1e-4)


def test_scores_are_read_where_nothing_is_unlabelled(make):
    """Every row has its label: the transfer set is smaller, and no error."""
    run = make("data.labels={hiking: 12}", "distill.transfer=all+unlabelled", *ONE)
    assert run.corpus.unlabelled is None
    lesson = Lesson("hiking", run.config.student, run.config.distill, "meta", 42)
    assert run.texts(lesson, lesson.texts).columns["t"].shape == (48,)
