"""Models that do not fit: each mismatch is refused naming both values, before anything trains."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import make_source
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    Data2VecTextConfig,
    DebertaV2Config,
    MPNetConfig,
    RobertaConfig,
    SqueezeBertConfig,
)

import metakd
from metakd.config import RunConfig, StudentConfig
from metakd.demo import train_tokenizer
from metakd.errors import CheckpointError, ConfigError
from metakd.method.fit import check_models
from metakd.method.teachers import Teacher
from metakd.models.sources import (
    check_positions,
    load_classifier,
    load_encoder,
    load_tokenizer,
    load_trained_classifier,
)
from metakd.models.student import build_student

LABELS = {"bad": 0, "good": 1}
WORDS = [f"word{i} other{i}" for i in range(40)]


def shape(**options) -> BertConfig:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(
        **{"vocab_size": 300, "intermediate_size": 16, "max_position_embeddings": 64}
        | small
        | options
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS, vocab_size=300)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """``saved("name", **config)``: a classifier with these labels and a tokenizer, on disk."""

    def save(name: str, vocabulary=tokenizer, kind=BertForSequenceClassification, **options) -> str:
        kind(shape(**options)).save_pretrained(tmp_path / name)
        if vocabulary is not None:
            vocabulary.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def change(folder: str, edit) -> str:
    """The folder after ``edit`` has changed its weights."""
    file = f"{folder}/model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def names(labels: dict[str, int]) -> dict:
    return {"label2id": labels, "id2label": {i: name for name, i in labels.items()}}


# Labels

FITTING = {
    "the same": {"bad": 0, "good": 1},
    "no names": {"LABEL_0": 0, "LABEL_1": 1},
    "other names, so another task whose head is trained anew": {"no": 0, "yes": 1},
    "another number of classes, so a fresh head": {"good": 0, "bad": 1, "none": 2},
}


@pytest.mark.parametrize("case", FITTING)
def test_labels_that_fit(saved, case):
    model = load_classifier(saved("m", **names(FITTING[case])), LABELS)
    assert model.config.label2id == LABELS and model.config.num_labels == 2


@pytest.mark.parametrize("labels", [{"good": 0, "bad": 1}, {"GOOD": 0, "Bad": 1}])
def test_the_same_labels_in_another_order_are_refused(saved, tokenizer, labels):
    folder = saved("m", **names(labels))
    for load in (
        lambda: load_classifier(folder, LABELS),
        lambda: build_student(
            StudentConfig(model=folder), source="", tokenizer=tokenizer, label2id=LABELS
        ),
    ):
        with pytest.raises(ValueError, match="wrong names to bad, good") as caught:
            load()
        assert str(labels) in str(caught.value) and str(LABELS) in str(caught.value)


def test_of_numbers_nobody_can_tell_which_name_is_which(saved):
    """GLUE's order of the classes of MNLI is not that of the heads that are published."""
    named = {"contradiction": 0, "entailment": 1, "neutral": 2}
    numbers = {"0": 0, "1": 1, "2": 2}
    with pytest.raises(ValueError, match="the data only numbers: nobody can tell which is which"):
        load_classifier(saved("named", **names(named)), numbers)
    for head in ({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, numbers):
        assert load_classifier(saved("unnamed", **names(head)), numbers).config.num_labels == 3
    load_classifier(saved("two", **names(LABELS)), numbers)  # a fresh head


def test_a_label_that_changed_its_place_among_new_ones_is_refused(saved):
    folder = saved("m", **names({"good": 0, "awful": 1}))
    with pytest.raises(ValueError, match="wrong names to good"):
        load_classifier(folder, LABELS)


def test_a_multi_task_head_asks_for_no_names(saved):
    folder = saved("m", **names({"good": 0, "bad": 1}))
    assert load_classifier(folder, LABELS, num_labels=6).config.num_labels == 6


# Weights

NOT_FINITE = {
    "NaN": (float("nan"), "nan"),
    "infinite": (float("inf"), "inf"),
    "minus infinite": (float("-inf"), "-inf"),
}


@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize("load", [load_encoder, lambda source: load_classifier(source, LABELS)])
def test_a_weight_that_is_not_finite_is_named(saved, case, load):
    value, shown = NOT_FINITE[case]

    def spoil(weights):
        weights["bert.encoder.layer.1.output.dense.weight"][3, 5] = value

    folder = change(saved("m"), spoil)
    expected = rf"1 of the 256 values of .*layer\.1\.output\.dense\.weight.*\(the first is {shown}"
    with pytest.raises(ValueError, match=expected):
        load(folder)


def test_a_missing_layer_is_not_made_up(saved):
    folder = change(saved("m"), lambda w: w.pop("bert.encoder.layer.0.attention.self.key.weight"))
    with pytest.raises(ValueError, match=r"1 weights do not fit .*self\.key\.weight \(missing\)"):
        load_classifier(folder, LABELS)


def test_embeddings_of_another_size_are_not_made_up(saved):
    folder = saved("m")
    with open(f"{folder}/config.json", "r+") as file:
        described = json.load(file) | {"vocab_size": 310}
        file.seek(0)
        json.dump(described, file)
        file.truncate()
    with pytest.raises(ValueError, match=r"word_embeddings\.weight \(\(300, 16\) for \(310, 16\)"):
        load_classifier(folder, LABELS)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM], ids=["encoder", "masked LM"])
def test_a_fresh_head_and_pooler_are_legitimate(saved, kind):
    assert load_classifier(saved("m", kind=kind), LABELS).classifier.out_features == 2
    load_encoder(saved("m", kind=kind))


def test_damaged_files_are_named(saved, tmp_path):
    folder = saved("m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="its weights cannot be read"):
        load_encoder(folder)


# Teachers of our own runs


@pytest.fixture
def teacher(tmp_path, tokenizer):
    folder = tmp_path / "teacher"
    model = BertForSequenceClassification(shape(**names(LABELS)))
    Teacher(model, "meta", ["a", "b"]).save(folder, tokenizer)
    return folder


def rewrite(name, edit):
    def damage(folder):
        change_file = folder / name
        weights = load_file(change_file)
        edit(weights)
        save_file(weights, change_file, metadata={"format": "pt"})

    return damage


def describe(**changes):
    def damage(folder):
        file = folder / "metakd.json"
        described = {
            k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not None
        }
        file.write_text(json.dumps(described))

    return damage


# What is done to the folder, and what is said.
DAMAGED = {
    "no description": (lambda f: (f / "metakd.json").unlink(), "metakd.json is missing"),
    "cut description": (lambda f: (f / "metakd.json").write_text('{"kind"'), "is damaged"),
    "half a description": (describe(domains=None), "domains"),
    "another number of domains": (
        describe(domains=["a", "b", "c"]),
        r"embedding\.weight is \(2, 16\), .* \(3, 16\)",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-100]
        ),
        "cannot be read",
    ),
    "NaN": (
        rewrite("model.safetensors", lambda w: w["classifier.bias"].fill_(torch.nan)),
        r"2 of the 2 values of classifier\.bias are not finite",
    ),
    "no head": (
        rewrite("model.safetensors", lambda w: w.pop("classifier.weight")),
        r"classifier\.weight \(missing\)",
    ),
    "NaN in the domain layer": (
        rewrite("domain.safetensors", lambda w: w["domain_layer.dense.bias"].fill_(torch.nan)),
        r"16 of the 16 values of domain_layer\.dense\.bias",
    ),
    "cut domain parts": (
        lambda f: (f / "domain.safetensors").write_bytes(b"12345678"),
        "is damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_teacher_is_a_checkpoint_error(teacher, case):
    damage, message = DAMAGED[case]
    damage(teacher)
    with pytest.raises(CheckpointError, match=message) as caught:
        Teacher.load(teacher)
    assert caught.value.exit_code == 4 and str(teacher) in caught.value.cause
    assert "metakd teach" in caught.value.remedy and "\n" not in caught.value.cause


def test_an_undamaged_teacher_loads(teacher):
    assert Teacher.load(teacher).domains == ["a", "b"]


# Everything at once, before anything trains


def config(teacher: str, student: dict, **blocks) -> RunConfig:
    return RunConfig(
        output_dir="unused",
        data={"train": "unused", "max_length": 64},
        teacher={"model": teacher},
        student=student,
        **blocks,
    )


def refused(*arguments) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_models(*arguments)
    assert caught.value.exit_code == 2 and caught.value.remedy
    first, *rest = caught.value.cause.split("\n  ")
    return rest or [first]


@pytest.mark.parametrize(
    "student",
    [{"preset": "tiny-2l-128"}, {"layers": [1]}, {"model": "copy"}],
    ids=lambda student: next(iter(student)),
)
def test_models_that_fit(saved, tokenizer, student):
    source = saved("teacher")
    if "model" in student:  # of another width: projections make it comparable
        student = {"model": saved("student", hidden_size=32, **names(LABELS))}
    check_models(config(source, student), tokenizer, LABELS)


def test_every_mismatch_is_named_with_both_values(saved):
    mine = train_tokenizer(WORDS, vocab_size=300)
    source = saved("teacher", vocab_size=len(mine) - 1, **names({"good": 0, "bad": 1}))
    student = saved(
        "student",
        vocabulary=mine,
        max_position_embeddings=32,
        num_hidden_layers=3,
        **names({"good": 0, "bad": 1}),
    )
    found = refused(config(source, {"model": student}), mine, LABELS)
    expected = [
        ("teacher.model", f"knows {len(mine) - 1} tokens", f"tokenizer has {len(mine)}"),
        ("teacher.model", "'good': 0", "'good': 1"),
        ("student.model", "'good': 0", "'good': 1"),
        ("student.model", "takes 32 tokens", "max_length is 64"),
        ("distill", "student has 3 layers", "teacher only 2"),
    ]
    assert len(found) == len(expected)
    for line, (key, *parts) in zip(found, expected, strict=True):
        assert line.startswith(f"{key}: ") and all(part in line for part in parts)


def test_the_first_token_that_differs_is_named(saved, tokenizer, tmp_path):
    other = train_tokenizer(WORDS, vocab_size=300)
    vocabulary = json.loads(other.backend_tokenizer.to_str())
    words = vocabulary["model"]["vocab"]
    words["word1"], words["word2"] = words["word2"], words["word1"]
    other.backend_tokenizer.from_str(json.dumps(vocabulary))
    folder = saved("student", vocabulary=other)
    file = tmp_path / "student" / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["model"]["vocab"] = words
    file.write_text(json.dumps(stored))
    lines = refused(config(saved("teacher"), {"model": folder}), tokenizer, LABELS)
    numbers = tokenizer.get_vocab()
    swapped = f"'word1' is number {numbers['word2']} there and {numbers['word1']} here"
    for line, term in zip(lines, ("embedding", "hidden", "attention"), strict=True):
        assert line.startswith(f"distill: {term} compares token with token") and swapped in line
        assert f"of {len(tokenizer)} tokens, the teacher another of" in line
        assert f"set distill.terms.{term}: 0" in line


def test_weights_without_a_tokenizer_need_enough_embeddings(saved, tokenizer):
    folder = saved("student", vocabulary=None, vocab_size=7)
    (line,) = refused(config(saved("teacher"), {"model": folder}), tokenizer, LABELS)
    assert "knows 7 tokens" in line and f"has {len(tokenizer)}" in line


def test_layers_and_widths_against_the_teacher(saved, tokenizer):
    source = saved("teacher")
    (line,) = refused(config(source, {"layers": [0, 2]}), tokenizer, LABELS)
    assert "[0, 2] names a layer outside 0..1" in line
    relations = {"method": "minilmv2", "relation_heads": 12}
    student = {"model": saved("student", hidden_size=24)}
    (line,) = refused(config(source, student, distill=relations), tokenizer, LABELS)
    assert "student's width 24" in line and "teacher's 16" in line


def test_examples_longer_than_the_teacher_reads_are_refused(saved, tokenizer):
    source = saved("teacher", max_position_embeddings=32)
    for student in ({"preset": "tiny-2l-128"}, {"layers": [1]}):
        (line,) = refused(config(source, student), tokenizer, LABELS)
        assert line.startswith("teacher.model: ") and "takes 32 tokens, max_length is 64" in line


def test_a_method_without_a_term_is_refused(saved, tokenizer):
    nothing = {"method": "logits_kd", "terms": {"prediction": 0}}
    (line,) = refused(config(saved("teacher"), {"layers": [1]}, distill=nothing), tokenizer, LABELS)
    assert line == "distill: terms: every weight that logits_kd has is 0"


@pytest.mark.parametrize(
    ("kind", "taken"),
    [(BertConfig, 64), (RobertaConfig, 62), (MPNetConfig, 62), (Data2VecTextConfig, 62)],
)
def test_positions_that_begin_behind_the_padding(kind, taken):
    """As many tokens as it says run, and one more does not."""
    sizes = {"vocab_size": 99, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "max_position_embeddings": 64, "pad_token_id": 1}
    config = kind(**sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    model(torch.full((1, taken), 5))
    check_positions("model", config, taken)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, taken + 1), 5))
    with pytest.raises(ValueError, match=f"takes {taken} tokens, max_length is {taken + 1}"):
        check_positions("model", config, taken + 1)


def test_relative_positions_have_no_end():
    shape = DebertaV2Config(max_position_embeddings=32, position_biased_input=False)
    check_positions("model", shape, 64)
    with pytest.raises(ValueError, match="takes 32 tokens"):
        check_positions("model", DebertaV2Config(max_position_embeddings=32), 64)


def test_models_that_are_not_there(tmp_path, tokenizer):
    nowhere = str(tmp_path / "nowhere")
    found = refused(config(nowhere, {"model": nowhere}), tokenizer, LABELS)
    assert [line.split(":")[0] for line in found] == ["teacher.model", "student.model"]


def configured(**changes):
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


WRONG = {
    "cut off": (written("config.json", '{"model_type": "bert", '), "config.json: is no JSON"),
    "empty": (written("config.json", "{}"), "config.json: names no model_type"),
    "a list": (written("config.json", "[]"), "config.json: names no model_type"),
    "unknown": (
        configured(model_type="berty"),
        r"model_type 'berty' is not known to transformers .*; did you mean 'bert'\?",
    ),
    "of pictures": (
        configured(model_type="vit"),
        "is a vit model, of which transformers has no classifier of texts",
    ),
    "a word for a number": (configured(hidden_size="wide"), "hidden_size.* expected int, got str"),
    "an activation of its own": (configured(hidden_act="swishy"), "KeyError: 'swishy'"),
    "heads": (configured(num_attention_heads=7), "is not a multiple of the number of attention"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"holds no weights \(model.safetensors\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_model_is_said_in_a_line(saved, case):
    """Whatever its libraries make of it, which may be any error of theirs."""
    edit, said = WRONG[case]
    folder = saved("model")
    edit(Path(folder))
    with pytest.raises((OSError, ValueError), match=said) as caught:
        load_classifier(folder, LABELS)
    assert str(caught.value).startswith(folder) and "\n" not in str(caught.value)


def test_a_tokenizer_that_is_no_json(saved):
    folder = saved("model")
    (Path(folder) / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="JSONDecodeError") as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(folder)


def test_a_damaged_student_is_a_checkpoint_error(saved, tmp_path):
    folder = saved("student", **names(LABELS))
    assert load_trained_classifier(folder).config.label2id == LABELS
    (tmp_path / "student" / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="student: is damaged: its weights cannot be read"):
        load_trained_classifier(folder)
    with pytest.raises(CheckpointError, match="nowhere: is damaged"):
        load_trained_classifier(tmp_path / "nowhere")


# Architectures

OTHERS = {
    "deberta-v2": (DebertaV2Config, {}),
    "mpnet": (MPNetConfig, {}),
    "squeezebert": (SqueezeBertConfig, {"embedding_size": 16}),
    "albert": (AlbertConfig, {"embedding_size": 16}),
}


@pytest.fixture
def other(tmp_path, tokenizer):
    """``other("mpnet")``: a classifier of an architecture without SDPA, or of another build."""

    def save(name: str) -> str:
        kind, options = OTHERS[name]
        sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0}
        model = AutoModelForSequenceClassification.from_config(kind(**sizes, **options))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize("name", OTHERS)
def test_an_encoder_is_loaded_with_the_attention_that_it_has(other, name):
    folder = other(name)
    for load in (lambda f: load_classifier(f, LABELS), load_encoder):
        model = load(folder)
        assert model.config._attn_implementation == ("sdpa" if name == "albert" else "eager")
        assert model(torch.ones(1, 4, dtype=torch.long)) is not None
    load_trained_classifier(Path(folder))


NOT_SHOWN = [
    ("deberta-v2", {"method": "logits_kd"}, []),
    ("deberta-v2", {"method": "meta", "terms": {"attention": 0}}, []),
    ("deberta-v2", {"method": "meta"}, ["attention"]),
    ("mpnet", {"method": "minilmv2", "relation_heads": 2}, ["relation"]),
    ("squeezebert", {"method": "meta"}, ["embedding", "hidden", "attention"]),
]


@pytest.mark.parametrize(("name", "distill", "hidden"), NOT_SHOWN)
def test_what_a_model_does_not_show_is_refused_with_the_key_to_set(
    other, tokenizer, name, distill, hidden
):
    def check():
        check_models(config(other(name), {"layers": [1]}, distill=distill), tokenizer, LABELS)

    if not hidden:
        return check()
    with pytest.raises(ConfigError) as caught:
        check()
    for term in hidden:
        key = "attention" if term == "relation" else term
        for model in ("student", "teacher.model"):
            assert f"{model}: {term}: model " in caught.value.cause
        assert f"set distill.terms.{key}: 0" in caught.value.cause


def test_layers_that_share_weights_cannot_be_copied(other, tokenizer):
    found = refused(config(other("albert"), {"layers": [1]}), tokenizer, LABELS)
    assert "has no list of its 2 layers: they share" in found[0] and found[0].startswith(
        "student: model Albert"
    )


def test_a_row_that_cannot_be_taught_is_refused_before_its_teacher_is_trained(tmp_path):
    """Rows of a comparison, too, whose methods the configuration does not name elsewhere."""
    make_source(tmp_path)
    words = load_tokenizer(str(tmp_path / "encoder"))
    sizes = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0}
    AutoModelForSequenceClassification.from_config(MPNetConfig(**sizes)).save_pretrained(
        tmp_path / "mpnet"
    )
    words.save_pretrained(tmp_path / "mpnet")
    settings = {
        "output_dir": str(tmp_path / "run"),
        "data": {"max_length": 24}
        | {n: str(tmp_path / "corpus" / f"{n}.jsonl") for n in ("train", "validation")},
        "teacher": {"model": str(tmp_path / "mpnet"), "kind": "mix"},
        "student": {"layers": [1]},
        "distill": {"method": "logits_kd", "domains": ["hiking"]},
        "compare": {"seeds": [1], "rows": [{"method": "tinybert_kd", "teacher": "mix"}]},
    }
    with pytest.raises(ConfigError, match=r"compare\.rows\.0: student: attention: model MPNet"):
        metakd.compare(settings)
    assert not (tmp_path / "run" / "teachers").exists()
    settings["compare"]["rows"] = [{"method": "logits_kd", "teacher": "mix"}]
    once = ["teacher.training.num_train_epochs=1", "distill.training.num_train_epochs=1"]
    assert "logits_kd-from-mix" in metakd.compare(settings, once).scores
