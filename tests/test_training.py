"""The loop and the stages: what must not depend on batches, ranks or restarts, and what a run
leaves behind."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
import yaml
from oracle import backend_dtypes
from processes import run_command, run_ranks
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import (
    assert_same_bits,
    distil_until_stopped,
    launched,
    losses,
    rows_of,
    write_config,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from metakd import demo
from metakd.config import CompareRow, Sharding, TrainingConfig, load_config
from metakd.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    StoppedError,
    UnsupportedError,
)
from metakd.method.teachers import StepOutput
from metakd.pipeline import compare as comparison
from metakd.pipeline.stages import Run
from metakd.training import engine
from metakd.training.checkpoint import Checkpoints, Tag
from metakd.training.engine import compute_dtype, fit
from metakd.training.log import Meter, RunLog
from metakd.training.saves import Saves
from metakd.training.scoring import logits_of
from metakd.training.world import World, join_world


class Regression(torch.nn.Module):
    """A module whose loss per example is quadratic: exact arithmetic shows what the loop does to
    gradients."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 1)

    def forward(self, batch):
        seen = torch.nn.functional.one_hot(batch["labels"] + 2 * batch["domain"], 8)
        seen = seen.to(self.linear.weight.dtype)
        rows = (self.linear(seen).squeeze(-1) - batch["index"].float() / 10).square()
        return StepOutput(rows, {})


def trained(run: Run, training: TrainingConfig, score=None, module=None) -> torch.nn.Module:
    torch.manual_seed(3)
    module = module or Regression()
    log = RunLog(None, [], run.console)
    fit(
        module,
        run.corpus.train,
        run.collate,
        config=run.config,
        training=training,
        sharding=Sharding(run.config.zero),
        world=run.world,
        log=log,
        title="test",
        seed=5,
        score=score,
    )
    return module


@pytest.mark.parametrize("batch, accumulation, zero", [(6, 2, 0), (4, 3, 1), (3, 4, 2)])
def test_accumulation_equals_the_big_batch(make, batch, accumulation, zero):
    whole = TrainingConfig(
        per_device_train_batch_size=12, num_train_epochs=2, learning_rate=0.1, warmup_steps=0
    )
    split = whole.model_copy(
        update={"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    )
    run = make(f"zero={zero}")
    torch.testing.assert_close(
        trained(run, split).linear.weight, trained(run, whole).linear.weight, rtol=1e-5, atol=1e-6
    )


def test_a_ragged_last_step_is_divided_by_its_own_size(make):
    # 48 examples in steps of 10: the last holds 8, in two micro-batches.
    whole = TrainingConfig(per_device_train_batch_size=10, num_train_epochs=1, learning_rate=0.1)
    split = whole.model_copy(
        update={"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
    )
    run = make()
    torch.testing.assert_close(
        trained(run, split).linear.weight, trained(run, whole).linear.weight, rtol=1e-5, atol=1e-6
    )


def test_nothing_of_a_run_stays_on_the_module(make):
    module = Regression()
    for _ in range(2):
        trained(make(), TrainingConfig(num_train_epochs=1), module=module)
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_logged_means_are_per_example():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0)}, 3)
    meter.add({"loss": torch.tensor(5.0)}, 1)
    assert meter.read(World()) == {"loss": 2.0}


def test_the_best_epoch_is_kept(make):
    module, seen, accuracies = Regression(), [], iter([0.5, 0.9, 0.7])

    def score():
        seen.append(module.linear.weight.detach().clone())
        return {"accuracy": next(accuracies)}

    trained(make(), TrainingConfig(num_train_epochs=3, learning_rate=0.1), score, module)
    assert torch.equal(module.linear.weight, seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_loss_that_is_not_finite_stops_the_run(make):
    module = Regression()
    module.linear.weight.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="not finite"):
        trained(make(), TrainingConfig(), module=module)


class Steep(Regression):
    """Losses that are finite, with a gradient that is not."""

    def forward(self, batch):
        return StepOutput((0 * super().forward(batch).rows).sqrt(), {})


@pytest.mark.parametrize("options", [[], ["zero=1"], ["zero=2"], ["bf16=true", "zero=1"]])
def test_a_gradient_that_is_not_finite_stops_the_run(make, options):
    with pytest.raises(DivergedError, match="gradient was not finite"):
        trained(make(*options), TrainingConfig(), module=Steep())


def test_a_signal_while_the_end_is_judged_is_obeyed_and_nothing_is_lost(make, tmp_path):
    run, training = make(), TrainingConfig(num_train_epochs=2, learning_rate=0.1)
    judged = []

    def finish(*signals):
        torch.manual_seed(3)
        module, accuracies = Regression(), iter([0.9, 0.5])
        checkpoints = Checkpoints(tmp_path / "checkpoints", run.world, say=lambda text: None)

        def conclude():
            for number in signals:
                os.kill(os.getpid(), number)
            logits_of(
                lambda batch: torch.zeros(len(batch["labels"]), 2),
                run.corpus.validation,
                run.collate,
                num_classes=2,
                batch_size=4,
                world=run.world,
            )
            judged.append(module.linear.weight.detach().clone())

        best = fit(
            module,
            run.corpus.train,
            run.collate,
            config=run.config,
            training=training,
            sharding=Sharding(),
            world=run.world,
            log=RunLog(None, [], run.console),
            title="test",
            seed=5,
            score=lambda: {"accuracy": next(accuracies)},
            conclude=conclude,
            saves=Saves(checkpoints, checkpoints.find("auto")),
        )
        return best, module.linear.weight.detach()

    with pytest.raises(StoppedError) as stopped:
        finish(signal.SIGTERM)
    assert stopped.value.exit_code == 143 and judged == []
    best, weights = finish()
    assert best == {"accuracy": 0.9, "epoch": 1}
    shutil.rmtree(tmp_path / "checkpoints")
    assert torch.equal(finish()[1], weights) and torch.equal(judged[0], judged[1])


def test_after_a_reshard_a_later_phase_keeps_its_own_step(make, tmp_path):
    # Two processes were stopped in the first phase, in steps of 32; one goes on.
    facts = {"phase": 0, "processes": 2, "world_size": 2, "step_size": 32, "micro_batches": 2}
    run, seen, module = make(), [], Regression()
    module.register_forward_pre_hook(lambda _, given: seen.append(len(given[0]["labels"])))
    fit(
        module,
        run.corpus.train,
        run.collate,
        config=run.config,
        training=TrainingConfig(per_device_train_batch_size=4, num_train_epochs=1),
        sharding=Sharding(),
        world=run.world,
        log=RunLog(None, [], run.console),
        title="test",
        seed=5,
        saves=Saves(Checkpoints(tmp_path, run.world), Tag(tmp_path, facts), reshard=True, phase=1),
    )
    assert seen == [4] * 12  # six steps of two micro-batches, as on two processes


def test_more_processes_than_a_step_has_examples_are_refused(tmp_path):
    facts = {"phase": 0, "processes": 1, "world_size": 1, "step_size": 3, "micro_batches": 1}
    saves = Saves(None, Tag(tmp_path, facts), reshard=True)
    shares = engine._share_out(TrainingConfig(), World(size=2), saves)
    assert shares == (1, 3, 1)
    with pytest.raises(CheckpointError, match="3 examples are too small for 4 processes"):
        engine._share_out(TrainingConfig(), World(size=4), saves)


def test_max_steps_ends_within_an_epoch(make):
    module = trained(
        make(), TrainingConfig(max_steps=1, per_device_train_batch_size=4, learning_rate=1e-30)
    )
    torch.manual_seed(3)
    torch.testing.assert_close(module.linear.weight, Regression().linear.weight)


def test_weight_decay_spares_biases_and_norms():
    from metakd.training.schedule import parameter_groups, warmup

    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    decayed, spared = parameter_groups(module, 0.01)
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.01
    assert len(spared["params"]) == 3 and spared["weight_decay"] == 0.0
    assert warmup(TrainingConfig(warmup_steps=0.1), 50) == 5
    assert warmup(TrainingConfig(warmup_steps=7), 50) == 7


def test_fp16_where_there_is_none_says_so(make, monkeypatch):
    import deepspeed

    run = make("fp16=true")
    monkeypatch.setattr(deepspeed.get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(UnsupportedError, match="fp16"):
        compute_dtype(run.config, torch.device("cpu"))


@pytest.mark.parametrize("precision", ["bf16=true", "fp16=true"])
def test_half_precision_follows_fp32_at_every_zero_stage(make, precision, world):
    # From 2^16 on fp16 leaves out its first steps, of which the teacher has two.
    scaled = 'deepspeed={"fp16": {"initial_scale_power": 8}}'
    options = ["distill.domains=[hiking]", "distill.training.num_train_epochs=5", scaled]
    half = make(precision, *options)
    try:
        compute_dtype(half.config, world.device)
    except UnsupportedError as error:
        pytest.skip(error.cause)
    [place] = make(*options).distill()
    exact = torch.tensor(
        [row["loss"] for row in rows_of(place / "log.jsonl") if row["split"] == "train"]
    )
    assert exact[-1] < exact[0]
    for zero in (0, 1, 2):
        [place] = make(precision, f"zero={zero}", *options).distill()
        assert all(
            v.dtype == torch.float32 for v in load_file(place / "model.safetensors").values()
        )
        losses = [row["loss"] for row in rows_of(place / "log.jsonl") if row["split"] == "train"]
        # The loss moves by a third in these five steps; an update a quarter too short shows.
        torch.testing.assert_close(torch.tensor(losses), exact, rtol=0.03, atol=0)


def test_auto_values_of_a_deepspeed_configuration_are_ours(make, tmp_path):
    file = tmp_path / "deepspeed.json"
    blocks = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"},
        },
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    file.write_text(json.dumps(blocks))
    seen = []
    for number, extra in enumerate([["zero=1"], [f"deepspeed={file}"]]):
        run = make("distill.domains=[hiking]", *extra, output=f"run{number}")
        run.distill()
        seen.append(losses(run.folder))
    assert seen[0] == seen[1] and len(seen[0]) == 2


def test_a_run_leaves_plain_students(make):
    run = make()
    scores = run.evaluate()
    assert set(scores["students"]) == {"hiking", "kitchen", "novels", "software"}
    for domain, scored in [*scores["students"].items(), ("novels", scores["teacher"])]:
        (right, taken), (missed, right_too) = scored[f"confusion/{domain}"]
        share = (right + right_too) / (right + taken + missed + right_too)
        assert scored[f"accuracy/{domain}"] == pytest.approx(share)
    [place] = run.distill(["novels"])
    assert place == run.folder / "students" / "meta-from-meta-s42" / "novels"
    student = AutoModelForSequenceClassification.from_pretrained(place)
    assert student.config.num_hidden_layers == 1
    assert student.config.label2id == {"negative": 0, "positive": 1}
    assert not [
        name
        for name in load_file(place / "model.safetensors")
        if not name.startswith(("bert.", "classifier."))
    ]
    tokens = AutoTokenizer.from_pretrained(place)("a fine book", return_tensors="pt")
    assert student(**tokens).logits.shape == (1, 2)
    card = (place / "README.md").read_text()
    assert "metakd test" in card and "novels" in card and "| test |" in card
    assert "train.jsonl, 12 examples" in card and "not stated by encoder" in card
    logged = rows_of(place / "log.jsonl")
    assert {"embedding", "hidden_weighted", "transfer", "expertise", "samples_per_second"} <= set(
        logged[0]
    )
    # Only the student's own domain is scored during its training.
    kept = [
        name
        for row in logged
        if row["split"] == "validation"
        for name in row
        if name.startswith("accuracy/")
    ]
    assert set(kept) == {"accuracy/novels"}


def test_stages_are_skipped_until_their_inputs_change(make):
    domains = "distill.domains=[hiking]"

    def built(*overrides):
        run = make(domains, *overrides)
        run.distill()
        return {
            p.parent: json.loads(p.read_text())["inputs"] for p in run.folder.rglob("stage.json")
        }

    def times(places):
        return {place: (place / "stage.json").stat().st_mtime_ns for place in places}

    first = built()
    stamps = times(first)
    assert len(first) == 3  # prototypes, teacher, one student
    assert times(built()) == stamps
    changed = times(built("distill.gamma2=0.5"))
    assert [place.name for place in changed if changed[place] != stamps[place]] == ["hiking"]
    changed = times(built("distill.gamma2=0.5", "prototypes.alpha=0.9"))
    assert all(changed[place] != stamps[place] for place in stamps)


def test_another_student_keeps_its_teacher(make, source, tmp_path):
    shutil.copytree(source / "small", tmp_path / "small")

    def built(model):
        run = make("distill.domains=[hiking]", f"student={{model: {model}}}")
        run.distill()
        return {p.parent.name: p.stat().st_mtime_ns for p in run.folder.rglob("stage.json")}

    first = built(tmp_path / "small")
    second = built(source / "encoder")
    assert [name for name in first if first[name] != second[name]] == ["hiking"]
    third = built(tmp_path / "small")
    card = tmp_path / "small" / "README.md"
    card.write_text("changed")
    fourth = built(tmp_path / "small")
    assert [name for name in third if third[name] != fourth[name]] == ["hiking"]


def test_the_second_of_two_stages_has_curves_of_its_own(make):
    run = make(
        "distill.schedule=two_stage",
        "distill.intermediate.num_train_epochs=1",
        "distill.domains=[hiking]",
        "report_to=[tensorboard]",
    )
    [place] = run.distill()
    held = {path.parent.name for path in place.rglob("events.out.tfevents*")}
    assert held == {"tensorboard", "stage-2"}


@pytest.mark.parametrize("kind", ["single", "mix", "mtl", "meta"])
def test_every_teacher_kind_teaches(make, kind):
    run = make("distill.method=tinybert_kd", f"teacher.kind={kind}", "distill.domains=[kitchen]")
    places = run.teach()
    assert len(places) == (4 if kind == "single" else 1)
    assert "test" in run.store.result(places[0])
    [student] = run.distill()
    assert student.parent.name == f"tinybert_kd-from-{kind}-s42"


def test_a_withheld_domain_is_kept_from_the_teacher(make):
    run = make("data.withhold=[novels]", "distill.domains=[novels]", "distill.terms.hard_label=0.5")
    run.distill()
    [teacher] = run.teach()
    kept = [
        name
        for row in rows_of(teacher / "log.jsonl")
        for name in row
        if name.startswith("accuracy/")
    ]
    assert set(kept) == {"accuracy/hiking", "accuracy/kitchen", "accuracy/software"}
    # Chance among the domains that it knows.
    assert run.store.result(teacher)["domain_loss_ln_k"] == pytest.approx(math.log(3))
    counts = load_file(run.folder / "prototypes" / "prototypes.safetensors")["counts"]
    assert counts[run.corpus.domains.index("novels")].sum() == 0


@pytest.mark.parametrize(
    "options",
    [
        ["distill.schedule=two_stage", "distill.intermediate.num_train_epochs=1"],
        [
            "distill.schedule=two_stage",
            "distill.intermediate.num_train_epochs=1",
            "compat=easytransfer",
        ],
        ["distill.one_student_for_all=true"],
        ["student={preset: tiny-2l-128}", "distill.layer_map=last"],
        ["distill.attention=kl", "prototypes.rescale=center"],
    ],
)
def test_variants_of_distillation_run(make, options):
    run = (
        make("distill.domains=[hiking]", *options)
        if "for_all" not in options[0]
        else make(*options)
    )
    [place] = run.distill()
    assert (place / "model.safetensors").exists()
    assert place.name == ("all" if "for_all" in options[0] else "hiking")


def test_compare_fills_the_table(make):
    run = make(
        "compare.seeds=[1,2]",
        "compare.teacher_seeds=1",
        "distill.domains=[hiking]",
        "distill.relation_heads=2",
    )
    result = comparison.compare(run, gamma2=[0.0, 0.5])
    rows = list(result["summary"])
    assert rows[:4] == ["teacher: mix", "teacher: single", "teacher: mtl", "teacher: meta"]
    assert {
        "finetune",
        "logits_kd-from-mix",
        "mtn_kd-from-single",
        "meta-from-meta-gamma2-0.5",
    } <= set(rows)
    assert result["summary"]["finetune"]["average"]["n"] == 2
    assert result["summary"]["teacher: mix"]["hiking"]["std"] is None
    table = (run.folder / "compare.md").read_text()
    assert "| finetune |" in table and "±" in table and "metakd test" in table
    assert set(result["terms"]["finetune"]) == {"hard_label"}
    assert {"transfer", "expertise", "expertise_std"} <= set(
        result["terms"]["meta-from-meta-gamma2-0.5"]
    )
    assert "| expertise_std |" in table
    assert len((run.folder / "compare.csv").read_text().splitlines()) == len(result["cells"]) + 1
    assert not list((run.folder / "students").rglob("model.safetensors"))


def test_compare_leaves_out_single_teachers_of_withheld_domains(make):
    run = make(
        "data.withhold=[novels]",
        "compare.seeds=[1]",
        "distill.domains=[hiking,novels]",
        "compare.rows=[{method: tinybert_kd, teacher: single}]",
    )
    summary = comparison.compare(run)["summary"]["tinybert_kd-from-single"]
    assert set(summary) == {"hiking", "average"}


def test_a_swept_weight_stands_in_one_row():
    rows = [CompareRow(method="meta", teacher="meta"), CompareRow(method="finetune")]
    rows.append(rows[0].model_copy(update={"gamma2": 0.5}))
    expanded = comparison._expand(rows, [0.0, 0.5, 0.5])
    assert [(row.method, row.gamma2) for row in expanded] == [
        ("meta", 0.0),
        ("meta", 0.5),
        ("finetune", None),
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (["distill.domains=[shoes]"], "shoes"),
        (["data.withhold=[hiking,kitchen,novels,software]"], "every domain"),
        (["student={layers: [2]}"], "layers"),
        (["distill.layer_map=[5]"], "layer_map"),
        (["distill.method=minilmv2", "distill.relation_heads=5"], "relation_heads"),
        (["student={model: nowhere}"], "student"),
        (
            [
                "distill.method=tinybert_kd",
                "teacher.kind=single",
                "data.withhold=[hiking]",
                "distill.domains=[hiking]",
            ],
            "single teacher of hiking",
        ),
    ],
)
def test_settings_that_do_not_fit_are_configuration_errors(make, options, message):
    with pytest.raises(ConfigError, match=message):
        make(*options).distill()


def test_terms_over_tokens_are_refused_where_students_read_others(make, tmp_path):
    other = demo.scratch_encoder(
        tmp_path / "other",
        ["entirely different words"] * 3,
        hidden_size=16,
        layers=1,
        heads=2,
        vocab_size=60,
        mlm_steps=0,
    )
    with pytest.raises(ConfigError, match=r"hidden compares token with token, but .* vocabulary"):
        make(f"student={{model: {other}}}").distill()


@pytest.mark.parametrize(
    "rename, message",
    [
        ({"novels": "tv/novels"}, "cannot name a folder"),
        ({"novels": "all"}, "cannot name a folder"),
    ],
)
def test_domains_that_cannot_be_folders_are_refused(make, source, tmp_path, rename, message):
    renamed = {}
    for split in ("train", "validation", "test"):
        rows = rows_of(source / "corpus" / f"{split}.jsonl")
        rows = [row | {"domain": rename.get(row["domain"], row["domain"])} for row in rows]
        renamed[split] = tmp_path / f"{split}.jsonl"
        renamed[split].write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=message):
        make(*(f"data.{split}={path}" for split, path in renamed.items())).prototypes()


def test_a_domain_without_test_examples_is_refused(make, source, tmp_path):
    rows = [r for r in rows_of(source / "corpus" / "test.jsonl") if r["domain"] != "novels"]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="'novels' has no test examples"):
        make(f"data.test={tmp_path / 'some.jsonl'}").prototypes()


def test_minilmv2_relations_distil(make):
    run = make("distill.method=minilmv2", "distill.relation_heads=4", "distill.domains=[hiking]")
    [place] = run.distill()
    assert "relation" in rows_of(place / "log.jsonl")[0]


def test_summary_spreads_over_seeds():
    cells = [
        comparison.Cell("a", d, s, v)
        for d, s, v in [("x", 1, 80), ("x", 2, 84), ("y", 1, 90), ("y", 2, 90)]
    ]
    summary = comparison.summarise(cells)["a"]
    assert summary["x"]["mean"] == 82 and summary["x"]["std"] == pytest.approx(8**0.5)
    assert summary["average"] == {"mean": 86, "std": pytest.approx(2**0.5), "n": 2}


def test_two_sentence_students(source, tmp_path, world, shared_data):
    """A student of a pair task, on real MNLI rows."""
    lines = (shared_data("mnli") / "train.jsonl").read_text().splitlines()
    chosen = [
        line
        for g in ("fiction", "travel")
        for line in [r for r in lines if f'"genre": "{g}"' in r][:40]
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(chosen))
    path = write_config(source, tmp_path, "pairs")
    settings = yaml.safe_load(path.read_text())
    settings["data"] = {
        "train": str(tmp_path / "pairs.jsonl"),
        "text": "premise",
        "text_pair": "hypothesis",
        "domain": "genre",
        "max_length": 48,
    }
    path.write_text(yaml.safe_dump(settings))
    run = Run(load_config(str(path)), world, Console(quiet=True))
    assert {1} <= set(run.corpus.train[0]["token_type_ids"])
    scores = run.evaluate()
    assert set(scores["students"]) == {"fiction", "travel"} and scores["split"] == "validation"
    student = AutoModelForSequenceClassification.from_pretrained(run.distill()[0])
    assert set(student.config.label2id) == {"entailment", "neutral", "contradiction"}


@pytest.fixture(scope="module")
def one_process(source, tmp_path_factory):
    """The losses of a plain process that accumulates two micro-batches, to hold two processes
    against."""
    folder = tmp_path_factory.mktemp("plain")
    options = [
        "teacher.training.gradient_accumulation_steps=2",
        "distill.training.gradient_accumulation_steps=2",
        "teacher.training.per_device_train_batch_size=5",
        "distill.training.per_device_train_batch_size=5",
    ]
    path = write_config(source, folder, "run")
    run_ranks(1, run_command, "distill", path, "distill.domains=[hiking]", *options)
    return losses(folder / "run")


# Other stages of ZeRO are held against replicated processes in test_sharding.py. What torchrun
# starts is what the tests fork, less the half minute.
@pytest.mark.parametrize(
    "launcher, zero",
    [("deepspeed", 2), ("forked", 0), pytest.param("torchrun", 0, marks=pytest.mark.deep)],
)
def test_two_processes_equal_one(source, tmp_path, one_process, launcher, zero):
    options = [
        "teacher.training.per_device_train_batch_size=5",
        "distill.training.per_device_train_batch_size=5",
    ]
    words = [write_config(source, tmp_path, "run"), *options, f"zero={zero}"]
    if launcher == "forked":
        run_ranks(2, run_command, "distill", *words, "distill.domains=[hiking]")
    else:
        launched(launcher, *words)
    seen = losses(tmp_path / "run")
    assert seen.keys() == one_process.keys()
    for stage, values in seen.items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(one_process[stage]), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("processes", "stage", "options"),
    [
        (3, "run", ["distill.domains=[hiking,novels]"]),  # a group has nothing to do
        (
            2,
            "compare",
            [
                "compare.rows=[{method: finetune}, {method: meta, teacher: meta}]",
                "compare.seeds=[1,2]",
                "compare.teacher_seeds=1",
                "distill.domains=[hiking]",
                "distill.cache_teacher=all",  # one cache, which two groups would make at once
            ],
        ),
    ],
)
def test_students_side_by_side_equal_one_after_another(source, tmp_path, processes, stage, options):
    alone = write_config(source, tmp_path, "alone")
    run_ranks(1, run_command, "distill" if stage == "run" else stage, alone, *options)
    together = write_config(source, tmp_path, "together")
    # The teacher is given, as two processes train another one in steps of twice as many.
    shutil.copytree(tmp_path / "alone", tmp_path / "together")
    shutil.rmtree(tmp_path / "together" / "students")
    in_groups = [*options, "distill.processes_per_student=1"]
    run_ranks(processes, run_command, stage, together, *in_groups)
    expected = losses(tmp_path / "alone")
    assert (
        len(expected) == (3 if stage == "run" else 5) and losses(tmp_path / "together") == expected
    )
    if stage == "compare":
        tables = [tmp_path / run / "compare.csv" for run in ("alone", "together")]
        assert tables[0].read_text() == tables[1].read_text()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    backend_dtypes("attention_score_mse", ("cpp", "triton"), (torch.float32,)),
)
def test_compiled_losses_train_like_the_reference(source, tmp_path, make, backend, dtype):
    """Every logged loss of 60 steps of meta-distillation agrees to 1e-4."""
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("60 steps take minutes in Triton's interpreter")
    seen = {}
    for which in ("reference", backend):
        run = make(
            f"distill.backend={which}",
            "distill.one_student_for_all=true",
            "distill.training.num_train_epochs=5",
            "distill.training.per_device_train_batch_size=4",
            output=which,
        )
        (place,) = run.distill()
        rows = rows_of(place / "log.jsonl")
        seen[which] = torch.tensor([row["loss"] for row in rows if row["split"] == "train"])
    assert len(seen["reference"]) == 60
    torch.testing.assert_close(seen[backend], seen["reference"], rtol=1e-4, atol=0)


def test_world_agrees_alone():
    assert World().agree({"a": 1}) == {"a": 1}


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(UnsupportedError, match=r"process 1 of this host, .* there are 1"):
        join_world()


# Which weights are kept


def test_selection_says_which_weights_are_kept(make, monkeypatch):
    """The best of an epoch, the last, or the mean over the last quarter of the steps."""
    kept, steps = {}, {}
    for selection in ("best", "last", "average"):
        seen = []
        whole_weights = engine.whole_weights

        def recording(module, world, seen=seen, whole_weights=whole_weights):
            weights = whole_weights(module, world)
            seen.append({name: value.clone() for name, value in weights.items()})
            return weights

        with monkeypatch.context() as patched:
            patched.setattr(engine, "whole_weights", recording)
            run = make(
                f"distill.training.selection={selection}",
                "distill.method=finetune",
                "distill.domains=[hiking]",
                "distill.training.num_train_epochs=8",
                "distill.training.per_device_train_batch_size=3",
                output=selection,
            )
            [place] = run.distill()
        kept[selection] = load_file(place / "model.safetensors")
        steps[selection] = seen
        logged = [r for r in rows_of(place / "log.jsonl") if r["split"] == "validation"]
        assert len(logged) == {"best": 8}.get(selection, 1), "what nothing is chosen from"
    assert not steps["last"] and len(steps["average"]) == 8  # of 32 steps the last 8
    name = "classifier.weight"
    mean = torch.stack([weights[f"student.{name}"] for weights in steps["average"]]).mean(0)
    torch.testing.assert_close(kept["average"][name], mean)
    torch.testing.assert_close(
        kept["last"][name], steps["average"][-1][f"student.{name}"], rtol=0, atol=0
    )
    assert not torch.equal(kept["average"][name], kept["last"][name])


def test_a_mean_that_was_interrupted_ends_with_the_same_bits(make, monkeypatch):
    options = ["distill.training.selection=average", "distill.method=finetune"]
    options += ["distill.domains=[hiking]", "distill.training.num_train_epochs=4"]
    options += ["distill.training.per_device_train_batch_size=1"]
    [whole] = make(*options, output="whole").distill()
    # Of 48 steps, between two of the mean.
    distil_until_stopped(make(*options, output="stopped"), monkeypatch, looks=41)
    [again] = make(*options, output="stopped").distill()
    assert_same_bits(whole, again)
    scores = [json.loads((place / "stage.json").read_text())["result"] for place in (whole, again)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("selection", ["best", "last", "average"])
def test_a_run_that_was_stopped_while_it_concluded_goes_on(make, monkeypatch, selection):
    options = [f"distill.training.selection={selection}", "distill.method=finetune"]
    options += ["distill.domains=[hiking]"]
    [whole] = make(*options, output="whole").distill()
    judge = engine._Loop.judge

    def stopped_at_the_end(self, score):
        if score.__name__ == "conclude":
            self.keeper.stop(signal.SIGTERM, self.title)
        return judge(self, score)

    with monkeypatch.context() as patched:
        patched.setattr(engine._Loop, "judge", stopped_at_the_end)
        with pytest.raises(StoppedError):
            make(*options, output="stopped").distill()
    [again] = make(*options, output="stopped").distill()
    scores = [json.loads((place / "stage.json").read_text())["result"] for place in (whole, again)]
    assert scores[0] == scores[1]
