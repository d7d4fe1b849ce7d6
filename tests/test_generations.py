"""Recursive distillation: the operators, the contraction, and runs of several generations."""

import json

import pytest
import torch
from tiny_runs import assert_same_bits, config_refusal, distil_until_stopped, losses

from metakd.config import DistillConfig
from metakd.deploy.report import write_report
from metakd.errors import ConfigError
from metakd.functional import soft_kl
from metakd.method.anchoring import mixed
from metakd.method.objective import Distillation
from metakd.method.tasks import MultiLabel, Regression, SingleLabel
from metakd.method.terms import PredictionTerm
from metakd.models.taps import Features
from metakd.pipeline.compare import compare

ONE = ["distill.domains=[hiking]", "distill.method=logits_kd", "teacher.kind=mix"]


def blend(*parts, weights, operator="mixture", temperature=1.0, task=None):
    return mixed(
        parts, weights, operator=operator, temperature=temperature, task=task or SingleLabel()
    )


# Operators


def test_a_mixture_by_hand():
    """p = (4, 1) / 5, q = (1, 1) / 2, lambda = 1 / 3: (4 / 15 + 1 / 3, 1 / 15 + 1 / 3)."""
    p, q = torch.tensor([[4.0, 1.0]]).log(), torch.zeros(1, 2)
    found = blend(p, q, weights=(1.0, 2.0)).softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[9 / 15, 6 / 15]]))
    # Softened by T = 2: p becomes (2, 1) / 3.
    found = (blend(p, q, weights=(0.5, 0.5), temperature=2.0) / 2).softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[7 / 12, 5 / 12]]))
    assert blend(p, q, weights=(0.0, 0.3)).softmax(-1).tolist() == [[0.5, 0.5]]


def test_a_geometric_mean_by_hand():
    """Square roots of 4 x 1 and 1 x 1, scaled to sum to 1: (2, 1) / 3."""
    p, q = torch.tensor([[0.8, 0.2]]).log(), torch.zeros(1, 2)
    found = blend(p, q, weights=(0.5, 0.5), operator="geometric").softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 1 / 3]]))


def test_several_classes_and_numbers_have_mixtures_too():
    p, q = torch.tensor([[0.9, 0.2]]), torch.tensor([[0.5, 0.6]])
    found = blend(p.logit(), q.logit(), weights=(0.25, 0.75), task=MultiLabel()).sigmoid()
    torch.testing.assert_close(found, 0.25 * p + 0.75 * q)
    for operator in ("mixture", "geometric"):
        found = blend(p, q, weights=(0.25, 0.75), operator=operator, task=Regression())
        torch.testing.assert_close(found, 0.25 * p + 0.75 * q)


def test_a_student_that_can_be_its_target_contracts_to_rounding():
    """Tabular logits, fitted exactly: L1 shrinks by 1 - lambda, KL at least by as much."""
    torch.manual_seed(0)
    teacher, share = 2 * torch.randn(20, 10, dtype=torch.float64), 0.3
    learned = torch.zeros_like(teacher)
    p = teacher.softmax(-1)

    def apart() -> tuple[float, float]:
        q = learned.softmax(-1)
        return (p - q).abs().sum().item(), (p * (p / q).log()).sum(-1).mean().item()

    (l1, kl), seen = apart(), []
    for number in range(1, 41):
        learned = blend(teacher, learned, weights=(share, 1 - share))
        now, divergence = apart()
        assert now == pytest.approx(l1 * (1 - share) ** number, rel=1e-9)
        assert divergence <= kl * (1 - share) ** number
        seen.append(divergence)
    assert seen[-1] / seen[-2] == pytest.approx((1 - share) ** 2, rel=1e-2)


def test_without_an_anchor_errors_add_up():
    """Each generation learns with an error of its own; held to the teacher it stays small."""

    def distance(share: float, generations: int) -> float:
        torch.manual_seed(1)
        teacher = torch.randn(200, 5)
        learned = teacher.clone()
        for _ in range(generations):
            target = blend(teacher, learned, weights=(share, 1 - share))
            learned = target + 0.2 * torch.randn(200, 5)
        return soft_kl(learned, teacher).item()

    assert distance(0.0, 40) > 5 * distance(0.0, 4)
    assert distance(0.5, 40) < 2 * distance(0.5, 4)


def test_the_objective_learns_what_is_mixed(make_batch, tiny_bert):
    batch = make_batch(rows=4, domains=2)
    taught = Features(mask=batch["attention_mask"], logits=torch.randn(4, 2))
    batch["elder"] = torch.randn(4, 2)
    wanted = 0.25 * taught.logits + 0.75 * batch["elder"]
    module = Distillation(
        tiny_bert(), [PredictionTerm()], anchored=lambda p, q: 0.25 * p + 0.75 * q
    )
    rows = module(batch, taught).rows
    plain = Distillation(module.student, [PredictionTerm()])
    expected = plain(batch, Features(mask=batch["attention_mask"], logits=wanted)).rows
    torch.testing.assert_close(rows, expected)


# Runs


def test_generations_are_stages_that_learn_from_each_other(make):
    run = make("distill.generations=3", "distill.anchor=0.25", *ONE)
    [place] = run.distill()
    before = [
        run.folder / f"generations/{number}/logits_kd-from-mix-s42/hiking" for number in (0, 1)
    ]
    result = json.loads((place / "stage.json").read_text())["result"]
    assert [len(json.loads((p / "stage.json").read_text())["result"]["generations"])
            for p in (*before, place)] == [1, 2, 3]  # fmt: skip
    assert all(one["anchor_kl"] >= 0 and 0 <= one["score"] <= 1 for one in result["generations"])
    [alone] = make(*ONE, output="alone").distill()
    assert losses(before[0]) == losses(alone), "the first learns from the teacher alone"
    assert losses(before[0]) != losses(before[1]) != losses(place)
    # One more: the first two are there.
    longer = make("distill.generations=4", "distill.anchor=0.25", *ONE)
    longer.distill()
    running = [line for line in longer.said if line.endswith(": running")]
    assert [line.split("/")[:2] for line in running] == [
        ["generations", "2"],
        ["students", "logits_kd-from-mix-s42"],
    ]


@pytest.mark.parametrize("cached", ["none", "logits"])
def test_what_a_generation_learns_is_between_teacher_and_elder(make, monkeypatch, cached):
    run = make("distill.generations=2", "distill.anchor=0.25", f"distill.cache_teacher={cached}",
               *ONE)  # fmt: skip
    seen = []
    forward = Distillation.forward

    def watched(module, batch, taught=None):
        own = taught.logits.clone()
        output = forward(module, batch, taught)
        if "elder" in batch:
            seen.append((batch["index"], own, batch["elder"], taught.logits))
        return output

    monkeypatch.setattr(Distillation, "forward", watched)
    run.distill()
    assert seen
    for _, own, elder, target in seen:
        expected = blend(own, elder, weights=(0.25, 0.75))
        torch.testing.assert_close(target, expected)


def test_a_whole_anchor_is_the_teacher_alone_and_none_the_elder(make):
    [first] = make("distill.generations=2", "distill.anchor=1.0", *ONE, output="held").distill()
    [alone] = make(*ONE, output="alone").distill()
    assert losses(first) == losses(alone)
    [free] = make("distill.generations=2", "distill.anchor=0.0", *ONE, output="free").distill()
    elder = free.parents[2] / "generations/0" / free.relative_to(free.parents[1])
    assert losses(free)["."][0] > 0 and losses(free) != losses(elder)


def test_a_run_that_was_stopped_in_its_second_generation_ends_with_the_same_bits(make, monkeypatch):
    options = ["distill.generations=2", "save_steps=1",
               "distill.training.per_device_train_batch_size=4", *ONE]  # fmt: skip
    [whole] = make(*options, output="whole").distill()
    run = make(*options, output="cut")
    run.student(run.lesson_of("hiking").elder, run.config.seed)
    distil_until_stopped(run, monkeypatch, looks=2)
    run = make(*options, output="cut")
    [cut] = run.distill()
    assert any(line.startswith("going on from checkpoint") for line in run.said)
    assert_same_bits(whole, cut)
    assert (
        json.loads((cut / "stage.json").read_text())["result"]["generations"]
        == json.loads((whole / "stage.json").read_text())["result"]["generations"]
    )


def test_several_teachers_hold_by_their_shares(make):
    run = make("distill.anchors={single: 0.25}", "distill.anchor=0.25", *ONE)
    [place] = run.distill()
    assert (run.folder / "teachers/single-s42/hiking/model.safetensors").is_file()
    lesson = run.lesson_of("hiking")
    generation = run._generation(lesson, None)
    heard = run.texts(lesson, lesson.texts)
    beside = generation.beside(heard, heard, run.reader)
    [folder] = [p for p in run.teach("single") if p.name == "hiking"]
    expected = generation._said_by([folder], heard)
    torch.testing.assert_close(beside.softmax(-1), expected.softmax(-1))
    own = generation._said_by(run.teach("mix"), heard)
    target = generation.anchored(own, beside).softmax(-1)
    torch.testing.assert_close(target, (own.softmax(-1) + expected.softmax(-1)) / 2)
    assert "anchor_kl" in json.loads((place / "stage.json").read_text())["result"]


def test_the_report_draws_distances_beside_their_bound(make):
    run = make("distill.generations=3", "distill.anchor=0.4", *ONE)
    run.distill()
    page, text, facts = write_report(run.folder)
    [found] = json.loads(facts.read_text())["generations"].values()
    first = found["generations"][0]["anchor_kl"]
    assert found["bound"] == pytest.approx([first, 0.6 * first, 0.36 * first])
    assert 'aria-label="logits_kd-from-mix: distance to the teachers' in page.read_text()
    assert "| logits_kd-from-mix | 3 |" in text.read_text()
    assert "it drifts" not in text.read_text()


def test_a_comparison_has_rows_of_generations(make):
    rows = [{"method": "logits_kd", "teacher": "mix"},
            {"method": "logits_kd", "teacher": "mix", "generations": 2, "anchor": 0.5}]  # fmt: skip
    run = make(f"compare.rows={json.dumps(rows)}", "compare.seeds=[1]", "distill.domains=[hiking]")
    result = compare(run)
    assert set(result["summary"]) == {
        "teacher: mix",
        "logits_kd-from-mix",
        "logits_kd-from-mix-generations-2-anchor-0.5",
    }


@pytest.mark.parametrize(
    ("changes", "distill", "said"),
    [
        ({}, {"generations": 0}, "generations"),
        ({}, {"generations": 2, "anchor": 1.5}, "anchor"),
        ({}, {"anchor": 0.3}, "needs distill.generations"),
        ({}, {"anchors": {"mix": 0.7}}, "sum to 1.2"),
        ({}, {"anchors": {"meta": 0.2}}, "is the teacher"),
        ({}, {"anchors": {"mixx": 0.2}}, "mixx"),
        ({}, {"anchors": {"file": 0.2}}, "no model"),
        ({}, {"generations": 2, "anchor_by": "mean"}, "anchor_by"),
        (
            {"compare.rows": [{"method": "logits_kd", "teacher": "single", "anchor": 0.9}]},
            {"anchors": {"single": 0.1}},
            "compare.rows.0.anchors: single is the teacher",
        ),
        (
            {"compare.rows": [{"method": "logits_kd", "teacher": "mix", "anchor": 0.9}]},
            {"anchors": {"single": 0.2}},
            "compare.rows.0.anchors: the shares of all teachers sum to 1.1",
        ),
        (
            {"compare.rows": [{"method": "logits_kd", "teacher": "mix", "anchor": 0.9}]},
            {},
            "compare.rows.0.anchor: needs generations",
        ),
        ({}, {"generation": 2}, "did you mean generations"),
        ({}, {"generations": 2, "method": "finetune"}, "no teacher"),
        (
            {"compare.rows": [{"method": "finetune", "generations": 2}]},
            {},
            "no teacher, to which generations are held",
        ),
    ],
)
def test_generations_that_cannot_be_are_refused(changes, distill, said):
    assert said in str(config_refusal(changes, **distill))


def test_shares_of_one_are_not_more_than_one():
    shares = {"single": 0.05, "mix": 0.55, "mtl": 0.3}
    assert DistillConfig(anchor=0.1, anchors=shares).held == 1.0


def test_the_mixture_is_softened_as_the_loss_is(make):
    release = ["compat=easytransfer", "distill.schedule=two_stage", "distill.temperature=4.0"]
    run = make("distill.generations=2", *release, *ONE)
    lesson = run.lesson_of("hiking")
    [place] = run.distill()
    generation = run._generation(lesson, place)
    assert generation.temperature == 1.0
    heard = run.texts(lesson, lesson.texts)
    said = [generation._said_by(run.teach("mix"), heard) for _ in range(2)]
    assert torch.equal(*said), "the release's dropout is for its students alone"
    assert (
        make("distill.temperature=4.0", "distill.generations=2", *ONE)
        ._generation(
            lesson._replace(distill=lesson.distill.model_copy(update={"temperature": 4.0})), None
        )
        .temperature
        == 4.0
    )


def test_generations_without_predictions_are_refused(make):
    run = make("distill.generations=2", "distill.method=tinybert_kd", "teacher.kind=mix",
               "distill.terms.prediction=0")  # fmt: skip
    with pytest.raises(ConfigError, match="learns no predictions"):
        run.distill()
    assert not (run.folder / "teachers").exists()
