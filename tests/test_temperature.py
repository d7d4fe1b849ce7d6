"""A temperature that moves: its rules by hand, terms that follow it, runs that begin again."""

import math

import pytest
import torch
from tiny_runs import assert_same_bits, distil_until_stopped, rows_of

from metakd.config import DistillConfig
from metakd.method.objective import Distillation
from metakd.method.temperature import RULES, UPDATES, Temperature
from metakd.method.terms import DecoupledTerm, HiddenTerm, PredictionTerm
from metakd.models.taps import Features


def heard(rule: str, *losses: float | None, every: float = 0.25) -> list[float]:
    """The temperatures of a run with these mean losses, that before the first among them."""
    temperature = Temperature(rule, 2.0, 6.0)
    values = [temperature.value]
    for number, loss in enumerate(losses, 1):
        temperature.update(number * every, loss)
        values.append(temperature.value)
    return values


def test_along_a_cosine():
    slope = math.cos(math.pi / 4)
    expected = [6.0, 4 + 2 * slope, 4.0, 4 - 2 * slope, 2.0]
    assert heard("cosine", 9.0, None, 1.0, 1.0) == pytest.approx(expected)


def test_with_the_loss():
    assert heard("loss", 2.0, 1.0, 3.0, 0.0) == pytest.approx([6.0, 6.0, 4.0, 6.0, 2.0])


def test_by_how_fast_the_loss_moves():
    # In units of the first: down by 1/2, and up by 1/4, in a quarter of the run each.
    fast, slow = math.exp(-2.0), math.exp(-1.0)
    assert heard("gradient", 2.0, 1.0, 1.5) == pytest.approx([4.0, 4.0, 2 + 4 * fast, 2 + 4 * slow])
    assert heard("gradient_inverse", 2.0, 1.0, 1.5) == pytest.approx(
        [4.0, 4.0, 6 - 4 * fast, 6 - 4 * slow]
    )


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_known_tells_nothing(rule):
    """Steps without a loss, or with one that is no number, and a loss of 0 to begin with."""
    seen = heard(rule, 0.0, math.nan, None, 0.0, every=0.2)
    assert all(2.0 <= value <= 6.0 for value in seen)
    if rule.startswith("gradient"):  # over the time that passed, not that of one update
        known, missed = heard(rule, 2.0, 1.0, every=0.5), heard(rule, None, 2.0, None, 1.0)
        assert missed[-1] == pytest.approx(known[-1])


def test_another_run_begins_anew():
    temperature = Temperature("loss", 2.0, 6.0)
    for progress, loss in ((0.5, 2.0), (1.0, 1.0)):
        temperature.update(progress, loss)
    again = Temperature("loss", 2.0, 6.0)
    again.restore(temperature.state())
    assert again == temperature and again.value == 4.0
    again.begin()
    assert again == Temperature("loss", 2.0, 6.0)


def test_the_configuration_says_which():
    assert Temperature.configured(DistillConfig()) is None
    config = DistillConfig(temperature_schedule="loss")
    assert Temperature.configured(config) == Temperature("loss", 2.0, 6.0)
    config = DistillConfig(temperature_schedule="cosine", temperature_range=[1, 3])
    assert Temperature.configured(config) == Temperature("cosine", 1.0, 3.0)


def test_terms_that_soften_follow_it(tiny_bert, make_batch):
    batch = make_batch(labels=3)
    taught = Features(
        mask=batch["attention_mask"],
        logits=torch.randn(4, 3),
        hidden=[torch.randn(4, 7, 32) for _ in "ab"],
    )
    terms = [PredictionTerm(), DecoupledTerm(), HiddenTerm(layers=(0, 1))]
    temperature = Temperature("cosine", 2.0, 6.0)
    student = tiny_bert(labels=3)
    moving = Distillation(student, terms, teacher_hidden=32, temperature=temperature)
    for progress, value in ((0.0, 6.0), (0.5, 4.0)):
        temperature.update(progress, None)
        found = moving(batch, taught)
        wanted = Distillation(
            student,
            [PredictionTerm(temperature=value), DecoupledTerm(temperature=value), terms[2]],
            teacher_hidden=32,
        )(batch, taught)
        assert torch.equal(found.rows, wanted.rows)
        assert found.terms["temperature"].item() == value
    moving.restrict(terms[2:])
    assert "temperature" not in moving(batch, taught).terms


# Runs

# With labels: so small a teacher leaves nothing to learn but them.
RUN = ["distill.method=logits_kd", "teacher.kind=mix", "distill.domains=[hiking]",
       "distill.terms.hard_label=1",
       "distill.training.per_device_train_batch_size=1"]  # fmt: skip


def logged(place) -> list[dict]:
    return [row for row in rows_of(place / "log.jsonl") if row["split"] == "train"]


@pytest.mark.parametrize("rule", ["cosine", "gradient"])
def test_it_moves_with_the_run_and_is_held_between(make, rule):
    run = make(*RUN, f"distill.temperature_schedule={rule}", "distill.temperature_range=[1, 3]",
               "distill.training.num_train_epochs=4")  # fmt: skip
    [place] = run.distill()
    rows, every = logged(place), 2
    assert len(rows) == 48 and every == 48 // UPDATES
    expected = Temperature(rule, 1.0, 3.0)
    for first in range(0, 48, every):
        part = rows[first : first + every]
        seen = [row["temperature"] for row in part]
        assert seen == pytest.approx([expected.value] * every, rel=1e-4)
        mean = sum(row["loss"] for row in part) / every
        expected.update((first + every) / 48, mean)
    assert len({row["temperature"] for row in rows}) > 3


def test_a_run_that_was_stopped_goes_on_at_its_temperature(make, monkeypatch):
    options = [*RUN, "distill.temperature_schedule=gradient"]
    options += ["distill.training.num_train_epochs=5"]  # 60 steps, each temperature for 3
    [whole] = make(*options, output="whole").distill()
    # After a step in the midst of those that are heard together.
    distil_until_stopped(make(*options, output="stopped"), monkeypatch, looks=40)
    [again] = make(*options, output="stopped").distill()
    assert_same_bits(whole, again)
    seen = [[(row["loss"], row["temperature"]) for row in logged(p)] for p in (whole, again)]
    assert seen[0] == seen[1]


def test_the_second_of_two_stages_has_one_of_its_own(make):
    run = make("distill.method=tinybert_kd", "teacher.kind=mix", "distill.domains=[hiking]",
               "distill.temperature_schedule=cosine", "distill.schedule=two_stage",
               "distill.intermediate.num_train_epochs=1",
               "distill.training.per_device_train_batch_size=4")  # fmt: skip
    [place] = run.distill()
    seen = [row["temperature"] for row in logged(place) if "temperature" in row]
    assert seen == pytest.approx([6.0, 5.0, 3.0])
