"""Students: presets, copied layers, and what is (not) saved with them."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from metakd.config import DistillConfig, StudentConfig, TermWeights
from metakd.method.methods import build_terms
from metakd.method.objective import Distillation
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.models.student import PRESETS, build_student, keep_layers, load_classifier
from metakd.models.taps import encoder_layers, model_inputs

LABELS = {"negative": 0, "neutral": 1, "positive": 2}


class Vocabulary:
    """As much of a tokenizer as a preset asks for."""

    pad_token_id = 3

    def __init__(self, size=50):
        self.size = size

    def __len__(self):
        return self.size


def preset(name, size=50):
    config = StudentConfig(preset=name)
    return build_student(config, source="unused", tokenizer=Vocabulary(size), label2id=LABELS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_shape_in_their_name(name):
    student = preset(name)
    layers, hidden = (int(part.rstrip("l")) for part in name.split("-")[1:])
    config = student.config
    assert (config.num_hidden_layers, config.hidden_size) == (layers, hidden)
    assert (config.vocab_size, config.pad_token_id) == (50, 3)
    assert config.label2id == LABELS
    assert config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    assert config._attn_implementation == "sdpa"
    assert student.classifier.out_features == 3


def test_tinybert_has_the_paper_s_size():
    student = preset("tinybert-4l-312", size=30522)
    assert (student.config.num_attention_heads, student.config.intermediate_size) == (12, 1200)
    # Embeddings 9,683,856, four layers of 1,142,184, pooler 97,656: "14.5 M" in the papers.
    assert sum(p.numel() for p in student.bert.parameters()) == 14_350_248


# Layers of the teacher


def _distilbert():
    shape = {"vocab_size": 50, "n_layers": 4, "dim": 32, "n_heads": 4, "hidden_dim": 48}
    config = DistilBertConfig(**shape, max_position_embeddings=16, attn_implementation="sdpa")
    return DistilBertForSequenceClassification(config).eval()


@pytest.mark.parametrize("layers", [[1, 3], [3, 0, 2], [0, 1, 2, 3], [1, 1, 3]])
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_kept_layers_carry_the_weights_of_their_origin(tiny_bert, name, layers):
    source = tiny_bert(layers=4) if name == "bert" else _distilbert()
    before = {key: value.clone() for key, value in source.state_dict().items()}
    student = keep_layers(source, layers)
    assert student.config.num_hidden_layers == len(encoder_layers(student)) == len(layers)
    for new, old in zip(encoder_layers(student), layers, strict=True):
        origin = encoder_layers(source)[old].state_dict()
        assert all(torch.equal(value, origin[key]) for key, value in new.state_dict().items())
    stack = next(key for key, m in student.named_modules() if m is encoder_layers(student))
    for key, value in student.state_dict().items():
        if not key.startswith(stack):  # embeddings, pooler, classifier
            assert torch.equal(value, before[key])
    # A copy: training the student leaves its origin alone.
    torch.nn.init.zeros_(next(encoder_layers(student).parameters()))
    assert source.config.num_hidden_layers == 4
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())


def test_a_student_of_all_layers_is_the_teacher(tiny_bert, make_batch):
    source, batch = tiny_bert(layers=3), make_batch()
    student = keep_layers(source, [0, 1, 2]).eval()
    expected = source(**model_inputs(batch, source)).logits
    assert torch.equal(student(**model_inputs(batch, student)).logits, expected)
    assert student.config._attn_implementation == "sdpa"


def test_layers_are_copied_from_a_directory(tiny_bert, tmp_path):
    source = tiny_bert(layers=4)
    source.save_pretrained(tmp_path)
    student = build_student(
        StudentConfig(layers=[0, 2]), source=str(tmp_path), tokenizer=Vocabulary(), label2id=LABELS
    )
    expected = source.bert.encoder.layer[2].output.dense.weight
    assert torch.equal(student.bert.encoder.layer[1].output.dense.weight, expected)
    assert student.classifier.out_features == 3  # the source has two classes: the head is fresh
    assert student.config.label2id == LABELS


def test_a_layer_the_source_lacks_is_named(tiny_bert):
    with pytest.raises(ValueError, match=r"student\.layers: \[1, 4\] names a layer outside 0\.\.3"):
        keep_layers(tiny_bert(layers=4), [1, 4])


def test_a_student_from_a_directory_keeps_head_and_weights(tiny_bert, make_batch, tmp_path):
    source, batch = tiny_bert(labels=3), make_batch()
    source.save_pretrained(tmp_path)
    student = build_student(
        StudentConfig(model=str(tmp_path)), source="", tokenizer=Vocabulary(), label2id=LABELS
    ).eval()
    expected = source(**model_inputs(batch, source)).logits
    assert torch.equal(student(**model_inputs(batch, student)).logits, expected)


def test_positions_have_room_for_the_longest_example(tiny_bert, tmp_path):
    labels = {"negative": 0, "positive": 1}
    tiny_bert().save_pretrained(tmp_path)
    shared = {"source": "", "tokenizer": Vocabulary(), "label2id": labels}
    with pytest.raises(ValueError, match="max_length is 600"):
        build_student(StudentConfig(model=str(tmp_path)), **shared, max_length=600)
    preset = build_student(StudentConfig(preset="tiny-2l-128"), **shared, max_length=600)
    assert preset.config.max_position_embeddings == 600


def test_a_multi_task_head_has_no_label_names(tiny_bert, tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), LABELS, num_labels=12)
    assert model.classifier.out_features == model.config.num_labels == 12
    assert model.dtype == torch.float32


# What is saved


def distil(student, teacher, batch, domains=3):
    """One step with every term; returns the distillation."""
    config = DistillConfig(method="meta", terms=TermWeights(hard_label=1.0))
    layers = student.config.num_hidden_layers, teacher.model.config.num_hidden_layers
    terms = build_terms(config, student_layers=layers[0], teacher_layers=layers[1])
    distillation = Distillation(
        student,
        terms,
        teacher_hidden=teacher.model.config.hidden_size,
        num_domains=domains,
        weigh_by_expertise=True,
    )
    rows = distillation(batch, FrozenTeacher([teacher], distillation.needs)(batch)).rows
    rows.mean().backward()
    torch.optim.SGD(distillation.parameters(), lr=0.01).step()
    return distillation


@pytest.mark.parametrize("pairs", [False, True], ids=["single sentences", "pairs"])
def test_a_saved_student_is_a_plain_classifier(tiny_bert, make_batch, tmp_path, pairs):
    batch = make_batch()
    if pairs:  # the second half of each example is its second sentence
        batch["token_type_ids"][:, 3:] = 1
        batch["token_type_ids"] *= batch["attention_mask"]
    student = tiny_bert(layers=2, hidden=32)
    teacher = Teacher(tiny_bert(layers=4, hidden=48), "meta", ["a", "b", "c"])
    distillation = distil(student, teacher, batch)
    assert distillation.projections and distillation.domain_layer  # there is something to leave out
    trained = distillation.detach().eval()
    assert trained is student
    trained.save_pretrained(tmp_path)

    keys = set(load_file(tmp_path / "model.safetensors"))
    assert keys == set(tiny_bert(layers=2, hidden=32).state_dict())
    assert "metakd" not in (tmp_path / "config.json").read_text()
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = trained(**model_inputs(batch, trained)).logits
    assert torch.equal(loaded.eval()(**model_inputs(batch, loaded)).logits, expected)
    if pairs:
        alone = batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])}
        assert not torch.allclose(loaded(**model_inputs(alone, loaded)).logits, expected)
