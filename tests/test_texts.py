"""What students learn from: unlabelled texts, few labels, texts of other domains; alone, cached,
stopped and taken up again, by two processes."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_command, run_ranks
from tiny_runs import (
    assert_goes_on_to_the_same_bits,
    losses,
    rows_of,
    write_config,
)

from metakd import demo
from metakd.config import DataConfig, DistillConfig, RunConfig, StudentConfig, load_config
from metakd.data import corpus as corpus_module
from metakd.data.corpus import Split, load_corpus
from metakd.errors import ConfigError, DataError
from metakd.functional import domain_expertise
from metakd.method.methods import METHODS
from metakd.method.objective import Distillation
from metakd.method.tasks import NO_LABEL
from metakd.method.terms import HardLabelTerm, PredictionTerm, PseudoLabelTerm
from metakd.models.taps import Features
from metakd.pipeline.compare import compare
from metakd.pipeline.lessons import Lesson, phases_of
from metakd.pipeline.texts import texts_of

DOMAINS = ["hiking", "kitchen", "novels", "software"]
EVERYTHING = "distill.transfer=[own,unlabelled,others,others_unlabelled]"


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def unlabelled(source, tmp_path) -> str:
    """A file of texts of two domains, each with a label that nobody is to read."""
    texts = demo.made_up_texts(20, seed=9)
    rows = [
        {"text": f"{text} {number}", "domain": DOMAINS[number % 2], "label": "no such class"}
        for number, text in enumerate(texts)
    ]
    return write(tmp_path / "unlabelled.jsonl", rows)


def identity(split: Split) -> list[tuple]:
    return sorted(
        zip(map(tuple, split.input_ids), split.domain.tolist(), split.index.tolist(), strict=True)
    )


# The corpus


def test_unlabelled_texts_are_read_without_their_labels(make, unlabelled):
    corpus = make(f"data.unlabelled={unlabelled}").corpus
    found = corpus.unlabelled
    assert len(found) == 20 and set(found.labels.tolist()) == {NO_LABEL}
    assert sorted(set(found.domain.tolist())) == [0, 1] and corpus.label2id.keys() == {
        "negative",
        "positive",
    }
    assert not set(found.index.tolist()) & set(corpus.train.index.tolist())


@pytest.mark.parametrize("held_out", [False, True])
def test_rows_beyond_the_labels_are_unlabelled_texts(make, unlabelled, held_out):
    splits = ["data.validation=null", "data.validation_fraction=0.25"] if held_out else []
    options = [f"data.unlabelled={unlabelled}", *splits]
    plain = make(*options).corpus
    corpus = make(*options, "data.labels={hiking: 4, novels: 0.5}").corpus
    sizes = [int((corpus.train.domain == number).sum()) for number in range(4)]
    whole = [int((plain.train.domain == number).sum()) for number in range(4)]
    assert sizes == [4, whole[1], round(whole[2] / 2), whole[3]]
    own = corpus.train.labels[corpus.train.domain == 0]
    assert sorted(own.tolist()) == [0, 0, 1, 1], "stratified"
    # Nothing is lost, nothing is there twice.
    parts = [corpus.train, corpus.unlabelled, plain.train, plain.unlabelled]
    parts = [identity(part) for part in parts]
    assert sorted(parts[0] + parts[1]) == sorted(parts[2] + parts[3])
    looked_at = [int((corpus.validation.domain == number).sum()) for number in range(4)]
    assert looked_at[0] <= 4 and looked_at[1] == int((plain.validation.domain == 1).sum())


def test_few_validation_labels_are_no_hidden_teacher(make):
    corpus = make("data.labels={hiking: 2}").corpus
    assert [int((corpus.validation.domain == number).sum()) for number in range(4)] == [2, 4, 4, 4]


def test_the_same_labels_are_kept_for_the_same_seed(make):
    kept = [
        make("data.labels={hiking: 4}", f"seed={seed}").corpus.train.index.tolist()
        for seed in (1, 1, 2)
    ]
    assert kept[0] == kept[1] != kept[2]


def test_more_labels_than_there_are_keep_all(make):
    corpus = make("data.labels={hiking: 100}").corpus
    assert corpus.unlabelled is None and len(corpus.train) == 48


def test_an_unknown_domain_has_no_labels(make):
    with pytest.raises(ConfigError, match=r"data\.labels: biking is not among hiking, kitchen"):
        make("data.labels={biking: 4}").corpus  # noqa: B018


def test_unlabelled_texts_of_the_test_split_leak(make, source, tmp_path):
    test = rows_of(source / "corpus" / "test.jsonl")
    rows = [{"text": row["text"], "domain": row["domain"]} for row in test[:3]]
    rows += [{"text": f"no. {number}", "domain": "hiking"} for number in range(30)]
    with pytest.raises(DataError) as raised:
        make(f"data.unlabelled={write(tmp_path / 'u.jsonl', rows)}").corpus  # noqa: B018
    assert raised.value.cause.count("the same example is in unlabelled") == 3
    assert "test.jsonl:1:text" in raised.value.cause


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "good", "domain": "biking"}, "domain not in train"),
        ({"text": " ", "domain": "hiking"}, "empty text"),
        ({"text": "good", "domain": "../hiking"}, "cannot name a folder"),
        ({"text": "good"}, "missing domain"),
    ],
)
def test_unlabelled_texts_are_checked(make, tmp_path, row, reason):
    rows = [{"text": "fine", "domain": "hiking"}, row]
    with pytest.raises(DataError, match=reason):
        make(f"data.unlabelled={write(tmp_path / 'u.jsonl', rows)}").corpus  # noqa: B018


def test_a_cached_corpus_is_the_same(source, tmp_path, unlabelled):
    from metakd.models.sources import load_tokenizer

    data = DataConfig(train=str(source / "corpus" / "train.jsonl"), unlabelled=unlabelled)
    tokenizer = load_tokenizer(str(source / "encoder"))
    seen = [load_corpus(data, tokenizer, cache=tmp_path / "cache") for _ in range(2)]
    assert (tmp_path / "cache" / "corpus.safetensors").is_file()
    assert identity(seen[0].unlabelled) == identity(seen[1].unlabelled)
    assert set(seen[1].unlabelled.labels.tolist()) == {NO_LABEL}


# Which texts, and how they weigh


def shares(split: Split) -> dict[tuple[int, bool], int]:
    """Numbers of texts by domain, with and without a label."""
    found: dict[tuple[int, bool], int] = {}
    for domain, label in zip(split.domain.tolist(), split.labels.tolist()):
        found[domain, label != NO_LABEL] = found.get((domain, label != NO_LABEL), 0) + 1
    return found


@pytest.mark.parametrize(
    ("transfer", "expected"),
    [
        ("own", {(0, True): 4}),
        ("unlabelled", {(0, True): 4, (0, False): 18}),
        ("all", {(0, True): 4, (1, True): 12, (2, True): 12, (3, True): 12}),
        (
            "all+unlabelled",
            {(0, True): 4, (0, False): 18, (1, True): 12, (2, True): 12, (3, True): 12},
        ),
        (["unlabelled", "others_unlabelled"], {(0, False): 18, (1, False): 10}),
    ],
)
def test_sources_of_texts(make, unlabelled, transfer, expected):
    corpus = make(f"data.unlabelled={unlabelled}", "data.labels={hiking: 4}").corpus
    distill = DistillConfig(method="logits_kd", transfer=transfer)
    lesson = Lesson("hiking", StudentConfig(layers=[0]), distill, "mix", 1)
    assert shares(texts_of(corpus, "hiking", lesson.texts, distill)) == expected


def test_one_student_for_all_has_no_other_domains(make):
    corpus = make("data.labels={hiking: 4}").corpus
    distill = DistillConfig(method="logits_kd", transfer=["own", "others", "others_unlabelled"])
    assert len(texts_of(corpus, "all", ("own", "others", "others_unlabelled"), distill)) == 40


def test_methods_that_need_labels_leave_texts_without_them_alone():
    learns = {name: METHODS[name].learns_from("all+unlabelled") for name in METHODS}
    assert learns["finetune"] == ("own",)
    assert learns["finetune_all"] == learns["finetune_all_then_own"] == ("own", "others")
    assert learns["meta"] == learns["pseudo_labels"] == ("own", "unlabelled", "others")


def test_finetuning_goes_on_with_its_own():
    distill = DistillConfig(method="finetune_all_then_own")
    phases = phases_of(distill, [HardLabelTerm()])
    assert [phase.texts for phase in phases] == [("own", "others"), ("own",)]


def test_weights_and_scores_of_sources(make, unlabelled):
    corpus = make(f"data.unlabelled={unlabelled}").corpus
    weights = {"own": 2.0, "unlabelled": 0.5}
    distill = DistillConfig(transfer="all+unlabelled", transfer_weights=weights)
    distill = distill.model_copy(update={"transfer_by_score": True})
    scores = {"t": torch.rand(48), "unlabelled": torch.rand(20, 2)}
    names = ("own", "unlabelled", "others")
    found = texts_of(corpus, "hiking", names, distill, scores)
    hiking = found.domain == 0
    known = found.labels != NO_LABEL
    assert found.columns["weight"][hiking & known].unique().tolist() == [2.0]
    assert found.columns["weight"][hiking & ~known].unique().tolist() == [0.5]
    assert found.columns["weight"][~hiking].unique().tolist() == [1.0]
    torch.testing.assert_close(found.columns["foreign"], ~hiking)
    # Of a labelled text one score, whatever the class; of the others one for each.
    for row, index in enumerate(found.index.tolist()):
        wanted = scores["unlabelled"][index - 48] if index >= 48 else scores["t"][index].expand(2)
        torch.testing.assert_close(found.columns["t"][row], wanted)


# The objective


@pytest.fixture
def scene(tiny_bert, make_batch):
    """A batch whose second and fourth labels are not known, and what a teacher says of it."""
    batch = make_batch()
    batch["labels"][[1, 3]] = NO_LABEL
    batch["t"] = torch.rand(4, 2)
    logits = torch.randn(4, 2)
    return tiny_bert(), batch, Features(mask=batch["attention_mask"], logits=logits)


def test_a_text_without_label_has_no_hard_label_loss(scene):
    student, batch, taught = scene
    rows = Distillation(student, [HardLabelTerm()])(batch, taught).rows
    assert (rows[[1, 3]] == 0).all() and (rows[[0, 2]] > 0).all()


def test_a_pseudo_label_is_the_teachers_choice(scene):
    student, batch, taught = scene
    rows = Distillation(student, [PseudoLabelTerm()])(batch, taught).rows
    labels = batch["labels"].clone()
    labels[[1, 3]] = taught.logits.argmax(-1)[[1, 3]]
    wanted = Distillation(student, [HardLabelTerm()])(batch | {"labels": labels}).rows
    torch.testing.assert_close(rows, wanted)


def test_lambda_takes_the_predicted_class_where_there_is_no_label(scene):
    student, batch, taught = scene
    rows = Distillation(student, [PredictionTerm()], weigh_by_expertise=True)(batch, taught).rows
    plain = Distillation(student, [PredictionTerm()])(batch, taught).rows
    labels = torch.where(batch["labels"] < 0, taught.logits.argmax(-1), batch["labels"])
    t = batch["t"][range(4), labels]
    torch.testing.assert_close(rows, domain_expertise(taught.logits, labels, t) * plain)


def test_texts_are_weighted_by_source_and_foreign_ones_by_score(scene):
    student, batch, taught = scene
    plain = Distillation(student, [PredictionTerm()])(batch, taught).rows
    batch["weight"] = torch.tensor([1.0, 2.0, 0.5, 1.0])
    batch["foreign"] = torch.tensor([False, False, True, True])
    rows = Distillation(student, [PredictionTerm()])(batch, taught).rows
    labels = torch.where(batch["labels"] < 0, taught.logits.argmax(-1), batch["labels"])
    t = batch["t"][range(4), labels]
    factor = batch["weight"] * torch.where(batch["foreign"], t, torch.ones(4))
    torch.testing.assert_close(rows, factor * plain)


# Runs


@pytest.mark.parametrize("transfer", ["nothing", "all+unlabelled"])
def test_without_such_texts_they_are_refused_before_anything_is_read(source, tmp_path, transfer):
    path = write_config(source, tmp_path, "run")
    overrides = [f"distill.transfer={transfer}"]
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    said = "needs data.unlabelled, or data.labels" if transfer != "nothing" else "must be 'own'"
    assert said in raised.value.cause


def test_what_an_earlier_version_finished_stays_finished(source, tmp_path):
    """Keys that have come since are no inputs while nobody has set them."""
    config = load_config(write_config(source, tmp_path, "run"))
    later = {"transfer", "transfer_weights", "transfer_by_score"}
    assert not later & config.distill.inputs().keys()
    assert not {"unlabelled", "labels"} & config.data.inputs().keys()
    changed = load_config(
        write_config(source, tmp_path, "run"), ["data.labels={a: 1}", "distill.transfer=all"]
    )
    assert changed.data.inputs()["labels"] == {"a": 1}
    assert changed.distill.inputs()["transfer"] == "all"
    assert isinstance(config, RunConfig) and "max_length" in config.data.inputs()


SCARCE = ["data.labels={hiking: 4}", "distill.domains=[hiking]", EVERYTHING]


@pytest.mark.parametrize(
    ("method", "packed"),
    [("meta", True), ("tinybert_kd", False), ("pseudo_labels", False), ("minilmv2", False)],
)
def test_students_learn_from_all_texts(make, unlabelled, method, packed):
    options = [f"data.unlabelled={unlabelled}", f"distill.method={method}", f"packed={packed}"]
    options += ["distill.relation_heads=4", "distill.transfer_by_score=true"]
    run = make(*SCARCE, *options)
    [place] = run.distill()
    result = run.store.result(place)
    assert result["origin"]["examples"] == 48 + 20  # all labelled, demoted and unlabelled texts
    assert 0 <= result["test"]["accuracy"] <= 1
    assert all(0 < row["loss"] < 1e3 for row in rows_of(place / "log.jsonl") if "loss" in row)


def test_kept_outputs_teach_as_a_live_teacher_does(make, unlabelled):
    options = [*SCARCE, f"data.unlabelled={unlabelled}", "distill.terms.hard_label=1"]
    [place] = make(*options).distill()
    live = losses(place)
    run = make(*options, "distill.cache_teacher=all")
    assert run.distill() == [place]
    assert any("teacher outputs of 68 examples" in line for line in run.said)
    for stage, values in losses(place).items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(live[stage]), rtol=2e-5, atol=1e-7
        )


def test_a_stopped_student_ends_with_the_same_bits(make, unlabelled, monkeypatch):
    options = [*SCARCE, f"data.unlabelled={unlabelled}", "distill.training.num_train_epochs=2"]
    options += ["distill.training.per_device_train_batch_size=8"]
    assert_goes_on_to_the_same_bits(make, monkeypatch, options)


def test_two_processes_equal_one(source, tmp_path, unlabelled):
    options = [*SCARCE, f"data.unlabelled={unlabelled}", "distill.transfer_weights.unlabelled=0.5"]
    seen = []
    for processes in (1, 2):
        path = write_config(source, tmp_path, f"by-{processes}")
        size, accumulated = 8 // processes, 3 - processes
        batch = [
            f"{key}.training.per_device_train_batch_size={size // accumulated}"
            for key in ("teacher", "distill")
        ]
        batch += [
            f"{key}.training.gradient_accumulation_steps={accumulated}"
            for key in ("teacher", "distill")
        ]
        run_ranks(processes, run_command, "distill", path, *options, *batch)
        seen.append(losses(tmp_path / f"by-{processes}"))
    assert seen[0].keys() == seen[1].keys()
    for stage, values in seen[1].items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(seen[0][stage]), rtol=0, atol=1e-5
        )


def test_baselines_of_a_scarce_domain_are_compared(make):
    rows = "[{method: finetune}, {method: finetune_all}, {method: finetune_all_then_own}, "
    rows += "{method: pseudo_labels, teacher: mix, transfer: unlabelled}, "
    rows += "{method: logits_kd, teacher: mix}, {method: logits_kd, teacher: mix, transfer: all}]"
    scarce = ["data.labels={hiking: 4}", "distill.domains=[hiking]"]
    run = make(*scarce, f"compare={{seeds: [1], rows: {rows}}}")
    summary = compare(run)["summary"]
    assert list(summary) == [
        "teacher: mix",
        "finetune",
        "finetune_all",
        "finetune_all_then_own",
        "pseudo_labels-from-mix-on-unlabelled",
        "logits_kd-from-mix",
        "logits_kd-from-mix-on-all",
    ]
    logs = {
        row: rows_of(run.folder / "students" / f"{row}-s1" / "hiking" / "log.jsonl")
        for row in summary
        if not row.startswith("teacher")
    }
    steps = {row: max(line["step"] for line in log) for row, log in logs.items()}
    assert steps["finetune"] == steps["logits_kd-from-mix"] == 1
    assert steps["finetune_all"] == steps["logits_kd-from-mix-on-all"] == 2


@pytest.mark.parametrize("transfer", ["[unlabelled]", "[others_unlabelled]"])
def test_texts_that_are_not_there_are_asked_for_in_vain(make, transfer):
    run = make("data.labels={hiking: 12}", f"distill.transfer={transfer}")
    with pytest.raises(DataError, match=r"domain hiking: distill\.transfer: there are no texts of"):
        run.distill(["hiking"])


def test_a_list_of_sources_is_a_row_of_its_own(make):
    rows = [
        {"method": "logits_kd", "teacher": "mix", "transfer": transfer}
        for transfer in ("unlabelled", ["unlabelled"], ["own", "others_unlabelled"])
    ]
    run = make(f"compare.rows={json.dumps(rows)}", "compare.seeds=[1]",
               "data.labels={hiking: 4, novels: 4}", "distill.domains=[hiking]")  # fmt: skip
    assert [row for row in compare(run)["summary"] if "-on-" in row] == [
        "logits_kd-from-mix-on-unlabelled",
        "logits_kd-from-mix-on-unlabelled-alone",
        "logits_kd-from-mix-on-own+others_unlabelled",
    ]


def test_a_method_with_its_own_texts_takes_no_others(source, tmp_path):
    rows = json.dumps([{"method": "finetune", "transfer": "all"}])
    with pytest.raises(ConfigError, match="finetune has its own texts, and no transfer"):
        load_config(write_config(source, tmp_path, "run"), [f"compare.rows={rows}"])


def test_no_more_labels_are_kept_than_asked_for():
    """Each class keeps one, and the rare ones do not add to the number."""
    labels = torch.tensor([0] * 300 + [1] * 97 + [2, 3, 4])
    ids = corpus_module.Tokens(torch.zeros(len(labels)), torch.ones_like(labels))
    split = corpus_module.Split(ids, labels, torch.zeros_like(labels), torch.arange(len(labels)))
    for wanted in (5, 8, 32, 100):
        kept = corpus_module._stratified(split, wanted, seed=1)
        assert len(kept) == wanted and set(labels[kept].tolist()) == {0, 1, 2, 3, 4}
