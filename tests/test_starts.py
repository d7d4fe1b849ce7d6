"""Students that are pretrained before any task: what they begin as, how often it is made, what is
said of it."""

import json
import shutil
import signal

import pytest
import torch
from processes import run_command, run_ranks
from safetensors.torch import load_file
from tiny_runs import assert_same_bits, config_refusal, losses, rows_of, write_config
from transformers import AutoModel, AutoTokenizer

from metakd.config import StudentConfig
from metakd.deploy.facts import gather
from metakd.deploy.run_folder import read_run
from metakd.errors import CheckpointError, ConfigError, DataError, StoppedError
from metakd.models import student
from metakd.pipeline import students
from metakd.pipeline.compare import compare
from metakd.pipeline.labels import compare_labels
from metakd.pipeline.memory import memory_table
from metakd.training import engine

START = "starts/tiny-2l-128-s42"


def pretrained(**keys) -> str:
    """The student of an override, pretrained for two short epochs."""
    settings = {"num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    return f"student={json.dumps({'preset': 'tiny-2l-128', 'pretrain': settings | keys})}"


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def more(tmp_path):
    """A file of a text a line, one of which is a text of the test split."""

    def write(*texts: str) -> str:
        path = tmp_path / "more.txt"
        path.write_text("".join(f"{text}\n" for text in texts))
        return str(path)

    return write


def test_the_encoder_is_followed_and_what_is_left_is_a_plain_model(make, more):
    texts = [more("the boots were warm", "a dull book", "fast delivery")]
    run = make(pretrained(texts=texts, num_train_epochs=6), "data.labels={hiking: 4}")
    [place] = run.pretrain()
    assert place == run.folder / START
    seen = [row["loss"] for row in rows_of(place / "log.jsonl") if "loss" in row]
    assert sum(seen[-7:]) < 0.9 * sum(seen[:7])
    assert {"embedding", "hidden", "attention"} < rows_of(place / "log.jsonl")[0].keys()
    assert run.store.result(place) == {
        "preset": "tiny-2l-128",
        "encoder": "encoder",
        "files": ["more.txt"],
        "texts": {"train": 40, "unlabelled": 8, "texts": 3},
    }
    model, found = AutoModel.from_pretrained(place, output_loading_info=True)
    assert model.config.hidden_size == 128
    assert all(name.startswith("pooler") for name in found["missing_keys"])
    assert AutoTokenizer.from_pretrained(place).get_vocab() == run.tokenizer.get_vocab()
    assert make(f"student={{model: {place}}}").corpus, "it can be a student's model elsewhere"


def test_students_begin_with_these_weights_and_say_so(make, monkeypatch):
    begun = []

    def watched(module, *arguments, **options):
        begun.append({name: value.clone() for name, value in module.student.state_dict().items()})
        return engine.fit(module, *arguments, **options)

    monkeypatch.setattr(students, "fit", watched)
    options = [pretrained(), "distill.domains=[hiking,novels]", "distill.method=logits_kd"]
    run = make(*options)
    places = run.distill()
    assert [line for line in run.said if line == f"{START}: running"] == [f"{START}: running"]
    start = weights(run.folder / START)
    assert len(begun) == 2
    for own in begun:
        assert all(torch.equal(own[f"bert.{name}"], value) for name, value in start.items())
    card = (places[0] / "README.md").read_text()
    assert "pretrained against encoder, without labels, on 48 texts: 48 of train" in card
    assert not any("random weights" in line for line in run.said)
    facts = gather(read_run(run.folder))
    assert [start["texts"] for start in facts["starts"]] == [{"train": 48}]
    assert "start: tiny-2l-128" in [row["stage"] for row in facts["seconds"]]

    again = make(*options)
    again.distill()
    assert f"{START}: inputs unchanged, skipped" not in again.said, "nobody needs it any more"
    assert again.pretrain() == [run.folder / START]
    assert again.said[-1] == f"{START}: inputs unchanged, skipped"


def test_another_start_makes_other_students(make, more):
    def inputs(*changes, **keys) -> tuple[str, str]:
        run = make(pretrained(**keys), "distill.domains=[hiking]", *changes)
        run.corpus  # noqa: B018
        lesson = run.lesson_of("hiking")
        _, found, _ = run._student_stage(lesson, 42)
        return found["start"], run.store.digest(found)

    plain = inputs()
    assert inputs() == plain
    file = more("one text")
    with_texts = inputs(texts=[file])
    changed = [inputs("distill.terms.hidden=0.5"), inputs(learning_rate=2e-3), with_texts]
    more("another text")
    changed.append(inputs(texts=[file]))
    for digests in zip(*[plain, *changed]):  # of starts, and of the students
        assert len(set(digests)) == 5
    assert inputs("distill.temperature=2")[0] == plain[0]


def test_without_it_inputs_are_what_they_were(make):
    run = make("student={preset: tiny-2l-128}", "distill.domains=[hiking]")
    _, inputs, _ = run._student_stage(run.lesson_of("hiking"), 42)
    assert "start" not in inputs and "pretrain" not in inputs["student"]
    with pytest.raises(ConfigError, match=r"student\.pretrain: is not given"):
        run.pretrain()


@pytest.mark.parametrize("changes", [(), ("distill.balance=variance",)])
def test_a_stopped_start_ends_with_the_same_bits(make, monkeypatch, changes):
    [whole] = make(pretrained(), *changes, output="whole").pretrain()
    asked = iter([0] * 4 + [signal.SIGTERM])
    with monkeypatch.context() as patched:
        patched.setattr(engine.StopRequest, "poll", lambda self: next(asked))
        with pytest.raises(StoppedError):
            make(pretrained(), *changes, output="stopped").pretrain()
    run = make(pretrained(), *changes, output="stopped")
    [place] = run.pretrain()
    assert any("going on from checkpoint" in line for line in run.said)
    assert_same_bits(whole, place)


def test_rows_of_a_shape_share_one_start(make):
    shape = json.loads(pretrained().removeprefix("student="))
    rows = [
        {"method": "finetune", "student": shape},
        {"method": "pseudo_labels", "teacher": "mix", "student": shape, "max_steps": 1},
        {"method": "finetune", "student": {"preset": "tiny-2l-128"}},
    ]
    run = make(f"compare={json.dumps({'rows': rows, 'seeds': [1, 2]})}", "distill.domains=[hiking]")
    assert list(compare(run)["summary"]) == [
        "teacher: mix",
        "finetune-as-tiny-2l-128-pretrained",
        "pseudo_labels-from-mix-as-tiny-2l-128-pretrained",
        "finetune-as-tiny-2l-128",
    ]
    assert run.said.count(f"{START}: running") == 1
    assert [path.name for path in (run.folder / "starts").iterdir()] == ["tiny-2l-128-s42"]


def test_all_numbers_of_labels_share_one_start(make):
    compared = {"rows": [{"method": "finetune"}], "seeds": [1], "labels": [4, "all"]}
    run = make(
        pretrained(num_train_epochs=1),
        f"compare={json.dumps(compared)}",
        "distill.domains=[hiking]",
    )
    assert [point["asked"] for point in compare_labels(run)["points"]] == [4, "all"]
    assert [path.relative_to(run.folder) for path in run.folder.rglob("starts")] == [
        (run.folder / "starts").relative_to(run.folder)
    ]


def test_kept_outputs_of_the_encoder_teach_as_it_does(make, more):
    texts = {"texts": [more("the boots were warm", "a dull book")]}
    [place] = make(pretrained(**texts)).pretrain()
    live = losses(place)["."]
    run = make(pretrained(cache_teacher="all", **texts))
    assert run.pretrain() == [place]
    assert any("teacher outputs of 50 examples" in line for line in run.said)
    kept = torch.tensor(losses(place)["."])
    torch.testing.assert_close(kept, torch.tensor(live), rtol=2e-5, atol=1e-6)
    too_much = make(pretrained(cache_teacher="all"), "distill.cache_limit_gib=1e-6")
    with pytest.raises(ConfigError, match=r"distill\.cache_limit_gib is 1e-06"):
        too_much.pretrain()


def run_without_dropout(*words) -> None:
    """``run_command`` where presets have no dropout, which differs between processes."""
    whole, none = student._preset_shape, {"hidden_dropout_prob": 0.0}
    none |= {"attention_probs_dropout_prob": 0.0}
    student._preset_shape = lambda *given, **options: whole(*given, **options, **none)
    run_command(*words)


def test_two_processes_packed_and_sharded_pretrain_as_one(source, tmp_path):
    seen = []
    for count in (1, 2):
        path = write_config(source, tmp_path, f"by-{count}")
        batch = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 3 - count}
        words = [path, pretrained(num_train_epochs=1, **batch)]
        if count > 1:
            words += ["teacher.zero=3", "student.zero=2", "packed=true"]
        run_ranks(count, run_without_dropout, "pretrain", *words)
        seen.append(torch.tensor(losses(tmp_path / f"by-{count}" / START)["."]))
    torch.testing.assert_close(*seen, rtol=2e-5, atol=0)


def test_groups_of_processes_begin_alike(source, tmp_path):
    path = write_config(source, tmp_path, "run")
    rows = [{"method": "finetune"}]
    compared = {"rows": rows, "seeds": [1, 2], "labels": [4]}
    options = [f"compare={json.dumps(compared)}", "distill.domains=[hiking]"]
    options += ["distill.processes_per_student=1", pretrained(num_train_epochs=1)]
    run_ranks(2, run_command, "compare", path, *options)
    start = tmp_path / "run-labels" / START / "stage.json"
    written = start.stat().st_mtime_ns
    for folder in tmp_path.rglob("students"):  # and again from the start that is there
        shutil.rmtree(folder)
    run_ranks(2, run_command, "compare", path, *options)
    assert start.stat().st_mtime_ns == written


# What is refused


@pytest.mark.parametrize("source", [{"layers": [0]}, {"model": "m"}])
def test_only_a_preset_is_pretrained(source):
    cause = config_refusal({"student": source | {"pretrain": {}}}).cause
    assert "pretrain: only a preset begins with random weights" in cause


def test_pretrained_embeddings_may_be_frozen():
    frozen = StudentConfig(preset="tiny-2l-128", freeze_embeddings=True, pretrain={})
    assert frozen.shape == "tiny-2l-128-frozen-pretrained"
    trained = frozen.model_copy(update={"freeze_embeddings": False})
    assert frozen.start_inputs() == trained.start_inputs()


def test_misspelt_keys_are_told_where_they_are_known():
    misspelt = {"preset": "tiny-2l-128", "pretrain": {"txets": ["more.txt"]}}
    cause = config_refusal({"student": misspelt}).cause
    assert "student.pretrain.txets: unknown key, did you mean texts?" in cause


def test_its_memory_is_estimated(make):
    table = memory_table(make(pretrained()).config, 1)
    assert "pretraining of tiny-2l-128" in table


def test_a_preset_has_one_start():
    rows = [{"method": "finetune", "student": {"preset": "tiny-2l-128", "pretrain": {}}}]
    changes = {
        "student": {"preset": "tiny-2l-128", "pretrain": {"max_steps": 7}},
        "compare.rows": rows,
    }
    cause = config_refusal(changes).cause
    assert "compare.rows.0.student.pretrain: one start serves all students of tiny-2l-128" in cause


def test_there_is_no_best_epoch_to_choose():
    chosen = {"preset": "tiny-2l-128", "pretrain": {"selection": "best"}}
    cause = config_refusal({"student": chosen}).cause
    assert "student.pretrain.selection: must be 'last' or 'average'" in cause


def test_what_is_wrong_with_texts_is_said_before_a_teacher_is_trained(make, more, tmp_path):
    run = make(pretrained(texts=[str(tmp_path / "mor.txt")]))
    more("a text")
    with pytest.raises(ConfigError, match=r"no such file; did you mean 'more.txt'\?"):
        run.distill()
    run = make(pretrained(texts=[more("a text", "", "another")]))
    with pytest.raises(DataError, match=r"more\.txt:2:text: empty text"):
        run.distill()
    assert not (run.folder / "teachers").exists()
    run = make(pretrained(texts=[more("a text", "", "another")]), "data.on_problem=drop")
    run.pretrain()
    assert any("more.txt" in line and "empty" in line for line in run.said)


def test_texts_that_students_are_scored_on_are_told(make, more, source):
    text = rows_of(source / "corpus" / "test.jsonl")[0]["text"]
    run = make(pretrained(texts=[more("a text", text)]))
    run.pretrain()
    assert any("1 of 2 are texts of validation or test" in line for line in run.said)


def test_what_the_encoder_does_not_show_is_refused_before_anything_is_trained(make, monkeypatch):
    from metakd.method import fit

    monkeypatch.setattr(fit, "why_not_shown", lambda shape, needs: "hides it")
    said = "embedding: hides it; set distill.terms.embedding: 0, or leave out student.pretrain"
    with pytest.raises(ConfigError, match=said):
        make(pretrained(), "distill.method=logits_kd").pretrain()
    weightless = [f"distill.terms.{name}=0" for name in ("embedding", "hidden", "attention")]
    with pytest.raises(ConfigError, match=r"every weight that student\.pretrain has is 0"):
        make(pretrained(), "distill.method=logits_kd", *weightless).pretrain()


def test_a_damaged_start_is_named(make):
    options = [pretrained(), "distill.domains=[hiking]", "distill.method=finetune"]
    [place] = make(*options).pretrain()
    (place / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=rf"{START}/model\.safetensors: has 7 bytes"):
        make(*options).distill()
