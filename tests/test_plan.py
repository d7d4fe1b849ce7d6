"""What a run is predicted to take: operations against those that torch counts, what is sent worked
out by hand, the stages of tiny runs."""

import json
import math

import pytest
import torch
from rich.console import Console
from tiny_runs import make_source, write_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AlbertConfig, BertConfig, LlamaConfig

from metakd.config import TrainingConfig, load_config
from metakd.errors import ConfigError, UnsupportedError
from metakd.models.sources import small
from metakd.pipeline import plan, probe
from metakd.pipeline.memory import count_parameters
from metakd.pipeline.stages import Run
from metakd.training.world import World, join_world

BERT = {"vocab_size": 100, "intermediate_size": 64, "max_position_embeddings": 64}
SHAPES = {
    "bert": BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **BERT),
    "grouped queries": LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    ),
}
RATES = plan.Rates(operations=1e6, update=1e-6, start=0.25, link=1e5, network=1e4, a_host=2)
LOAD = plan.Load(steps=10, micro_batches=2, tokens=64, length=16)


@pytest.mark.parametrize("name", SHAPES)
def test_operations_are_those_that_torch_counts(name):
    """But for what is not in layers: pooler and head are less than a hundredth here."""
    model = small(SHAPES[name])
    model.set_attn_implementation("eager")  # what is fused on a CPU is not counted
    shape, texts, length = model.config, 8, 32
    ids = torch.zeros(texts, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    found = plan.Sizes.of(shape).operations(texts * length, length)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.04)


def test_sizes_of_a_model():
    shape = SHAPES["bert"]
    sizes = plan.Sizes.of(shape)
    layer = 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 4 * 32
    assert sizes == (count_parameters(shape), 100 * 32, 3 * layer, 3 * 32)
    shared = plan.Sizes.of(AlbertConfig(hidden_size=32, num_attention_heads=4, **BERT))
    assert shared.matrices == shared.parameters - shared.words


def one(**options) -> plan.Step:
    settings = {"processes": 4, "zero": 0, "itemsize": 2} | options
    return plan.step(plan.Sizes(1000, 400, 500, 8), LOAD, RATES, **settings)


def test_seconds_of_a_step():
    forward = 64 * (2 * 500 + 4 * 8 * 16)
    step = one()
    assert step.compute == pytest.approx(2 * 3 * forward / 1e6)
    assert one(again=True).compute == pytest.approx(2 * 4 * forward / 1e6)
    asked = one(teacher=plan.Sizes(9000, 0, 1000, 0))
    assert asked.compute - step.compute == pytest.approx(2 * 64 * 2 * 1000 / 1e6)
    assert step.update == pytest.approx(1e-3) and one(held=400).update == pytest.approx(6e-4)
    assert one(zero=1).update == pytest.approx(1e-3 / 4)
    assert step.start == 0.5
    assert step.exchange == step.sent / 1e4  # four do not share a host
    assert one(processes=2).exchange == one(processes=2).sent / 1e5
    assert step.seconds == sum(step[:4])


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, 2 * 1000),
        ({"held": 400}, 2 * 600),
        ({"zero": 1}, 2 * 1000),
        ({"zero": 2}, (2 + 1) * 1000),  # of two micro-batches
        ({"zero": 3}, 2 * 3 * 1000),
        ({"zero": 3, "held": 400}, 2 * (2 * 1000 + 600)),
        ({"teacher": plan.Sizes(9000, 0, 1, 0)}, 2 * 1000),
        ({"teacher": plan.Sizes(9000, 0, 1, 0), "teacher_sharded": True}, 2 * 1000 + 2 * 9000),
    ],
)
def test_bytes_that_a_process_sends(options, weights):
    assert one(**options).sent == pytest.approx(2 * weights * 3 / 4)
    assert one(**options, processes=1).sent == 0


def test_a_teacher_in_shards_gathers_them_for_each_batch():
    def seconds(**options) -> float:
        settings = {"processes": 2, "itemsize": 2, "sharded": False} | options
        return plan.answering(plan.Sizes(1000, 0, 500, 0), 1600, 16, 10, RATES, **settings)

    assert seconds() == pytest.approx((1600 * 1000 / 1e6 + 10 * 0.25) / 2)
    gathered = 10 * (1000 * 2 / 2) / 1e5 / 2
    assert seconds(sharded=True) - seconds() == pytest.approx(gathered)


def test_load_counts_padding_and_steps():
    training = TrainingConfig(
        per_device_train_batch_size=2, num_train_epochs=3, group_by_length=False
    )
    load = plan.Load.of([3, 3, 3, 3, 9, 9, 9, 9], training, 1, packed=False)
    assert load.steps == 12 and load.micro_batches == 1 and 12 <= load.tokens <= 18
    packed = plan.Load.of([3, 3, 3, 3, 9, 9, 9, 9], training, 1, packed=True)
    assert packed.tokens == 12
    alike = training.model_copy(update={"max_steps": 5, "gradient_accumulation_steps": 2})
    assert plan.Load.of([7] * 8, alike, 2, packed=False) == (3, 2, 14, 7)


def test_published_rates():
    rates = plan.published("h100", "bf16")
    assert rates.operations == plan.published("h100", "fp32").operations * 2
    assert rates.between(8) > rates.between(16) == rates.network
    assert plan.checked_device(None) is None
    with pytest.raises(ConfigError, match="nothing is known of 'h999'"):
        plan.checked_device("h999")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    make_source(folder)
    return folder


@pytest.fixture
def planned(source, tmp_path):
    """The stages of a tiny run with these overrides, by title."""

    def stages(*overrides: str, processes: int = 1) -> dict[str, plan.Stage]:
        path = write_config(source, tmp_path, "run")
        run = Run(load_config(str(path), list(overrides)), World())
        found = plan.stages(run, processes, lambda *_: RATES)
        assert all(stage.seconds > 0 and math.isfinite(stage.seconds) for stage in found)
        return {stage.title: stage for stage in found}

    return stages


def test_stages_of_a_run(planned):
    found = planned()
    titles = ["prototypes", "teacher meta", "teacher meta, scored", "4 students"]
    assert list(found) == titles
    assert found["teacher meta"].told.startswith("2 steps of ")  # 48 texts, batches of 32
    assert "steps of" in found["4 students"].told and found["4 students"].each > 0
    cached = planned("distill.cache_teacher=all")
    assert list(cached) == [*titles[:3], "teacher outputs, kept", titles[3]]
    assert cached["4 students"].seconds < found["4 students"].seconds
    assert "sent" in planned(processes=2)["teacher meta"].told


def test_stages_follow_the_method(planned):
    assert list(planned("distill.method=finetune")) == ["4 students"]
    single = planned("teacher.kind=single", "distill.method=tinybert_kd")
    assert list(single) == ["teacher single", "teacher single, scored", "4 students"]
    assert single["teacher single"].told.startswith("4 steps")
    more = planned("teacher.ensemble=2", "distill.method=logits_kd", "teacher.kind=mix")
    alone = planned("distill.method=logits_kd", "teacher.kind=mix")
    assert more["teacher mix"].seconds == pytest.approx(2 * alone["teacher mix"].seconds)
    chain = planned("distill.chain=[{layers: [0, 1]}]", "distill.method=logits_kd")
    assert "8 students" in chain


def test_students_side_by_side(planned):
    together = planned(processes=2)["4 students"]
    apart = planned("distill.processes_per_student=1", processes=2)
    [title] = [name for name in apart if "students" in name]
    assert title == "4 students, 2 side by side"
    assert "sent" in together.told and "sent" not in apart[title].told


def test_a_plan_told():
    stages = [plan.Stage("teacher", 1800.0, "10 steps"), plan.Stage("students", 1800.0)]
    table = plan.as_table(stages, 8, price=2.5)
    assert table["teacher"] == "30.0 min: 10 steps" and table["students"] == "30.0 min"
    assert table["all"] == "60.0 min, 8 device hours, at 2.5 an hour 20.00"
    shown = [plan.span(seconds) for seconds in (0.0123, 45.2, 600, 7200, 1e6)]
    assert shown == ["0.012 s", "45 s", "10.0 min", "2.0 h", "11.6 days"]


def test_rates_of_this_machine(source, tmp_path):
    """Three trainings of a few steps; what they come to is for ``benchmarks.scale`` to judge."""
    path = write_config(source, tmp_path, "run")
    run = Run(load_config(str(path)), join_world(), Console(quiet=True))
    measure = probe.Probe(run)
    shape, load = run.outputs.taught, plan.Load(1, 1, 8 * 12, 12)
    rates = measure(shape, load, run.config.sharding(run.config.teacher))
    assert rates.operations > 0 and rates.update > 0 and rates.start >= 0
    assert rates.link == math.inf
    assert measure(shape, load, run.config.sharding(run.config.teacher)) is rates
    assert [one.name for one in (tmp_path / "run").iterdir()] == [".cache"]  # of the corpus
    sharding = run.config.sharding(run.config.teacher)
    with pytest.raises(UnsupportedError, match="cannot be measured here"):
        measure._some_layers(LlamaConfig(hidden_size=2**17), 8, 128, sharding)


def test_plan_on_the_command_line(source, tmp_path, call):
    path = write_config(source, tmp_path, "run")
    words = ("doctor", path, "--plan", "--on", "h100", "--processes", "1,8", "--price", "3")
    code, out, _ = call(*words, "--json")
    report = json.loads(out[out.index("{") :])
    assert code == 0
    assert report["memory per process of 8, estimated"]["counted for"] == "8 processes, fp32"
    for count in (1, 8):
        table = report[f"plan for {count}, predicted from published rates of h100"]
        assert "at 3 an hour" in table["all"] and "steps of" in table["teacher meta"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plan"], "--plan: there is nothing to plan"),
        (["CONFIG", "--plan", "--on", "h999"], "nothing is known of 'h999'"),
        (["CONFIG", "--plan", "--processes", "8"], "1 processes are started"),
        (["CONFIG", "--on", "h100"], "--on: it is for a plan"),
        (["--price", "3"], "--price: it is for a plan"),
        (["CONFIG", "--processes", "1,x"], "'1,x' is no list of numbers"),
        (["CONFIG", "--processes", "0"], "'0' is no list of numbers"),
    ],
)
def test_plans_that_are_refused(words, said, source, tmp_path, call):
    path = str(write_config(source, tmp_path, "run"))
    code, _, err = call("doctor", *(path if word == "CONFIG" else word for word in words))
    assert code == 2 and said in err and "remedy:" in err
