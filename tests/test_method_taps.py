"""Taps see what an eager run would show, and leave no trace: in the logits, the model or its
files."""

import math

import pytest
import torch
from encoders import BUILDERS, HEADS, HIDDEN, LAYERS, SHAPE
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from metakd.method.terms import layer_map
from metakd.models.taps import Features, Taps, encoder_layers, model_inputs, pool

EVERYTHING = {"embedding", "hidden", "last_hidden", "query", "key", "value"}


@pytest.fixture
def build(tiny_bert):
    def named(name):
        model = tiny_bert(LAYERS, HIDDEN, HEADS) if name == "bert" else BUILDERS[name]()
        return model.eval()

    return named


ARCHITECTURES = ["bert", *BUILDERS]
WITH_SEPARATE_PROJECTIONS = [name for name in ARCHITECTURES if name != "modernbert"]


def query_key_value(layer: nn.Module) -> list[nn.Linear]:
    attention = layer.attention
    if hasattr(attention, "q_lin"):
        return [attention.q_lin, attention.k_lin, attention.v_lin]
    return [getattr(attention.self, name) for name in ("query", "key", "value")]


@pytest.fixture
def batch(make_batch):
    made = make_batch()
    del made["token_type_ids"]  # not every architecture takes them
    return made


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_plain_sdpa_bit_for_bit(build, batch, name):
    model = build(name)
    plain = model(**model_inputs(batch, model)).logits
    assert torch.equal(Taps(model, EVERYTHING)(batch).logits, plain)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_has_no_say(build, batch, name):
    model = build(name)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    taps = Taps(model, EVERYTHING)
    clean = taps(batch).logits
    batch["input_ids"] = batch["input_ids"].masked_fill(padding, 7)
    torch.testing.assert_close(taps(batch).logits, clean)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_and_embedding_are_those_of_an_eager_run(build, batch, name):
    model = build(name)
    features = Taps(model, EVERYTHING)(batch)
    eager = build(name)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    seen = eager(**model_inputs(batch, eager), output_hidden_states=True)
    real = batch["attention_mask"].bool()
    assert len(features.hidden) == LAYERS

    def same(tapped, expected):
        torch.testing.assert_close(tapped[real], expected[real], atol=1e-4, rtol=1e-4)

    same(features.embedding, seen.hidden_states[0])
    # A model with a final norm reports its last hidden state after it, its last layer's output not.
    for tapped, expected in zip(features.hidden[:-1], seen.hidden_states[1:-1], strict=True):
        same(tapped, expected)
    same(features.last_hidden, seen.hidden_states[-1])
    if name != "modernbert":
        assert torch.equal(features.hidden[-1], features.last_hidden)
    torch.testing.assert_close(features.logits, seen.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_SEPARATE_PROJECTIONS)
def test_queries_keys_and_values_are_the_layers_own(build, batch, name):
    model = build(name)
    features = Taps(model, EVERYTHING)(batch)
    inputs = [features.embedding, *features.hidden[:-1]]
    for number, layer in enumerate(encoder_layers(model)):
        for kind, linear in zip(("query", "key", "value"), query_key_value(layer), strict=True):
            expected = linear(inputs[number]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            torch.testing.assert_close(getattr(features, kind)[number], expected)


@pytest.mark.parametrize("name", WITH_SEPARATE_PROJECTIONS)
def test_queries_and_keys_give_the_eager_attention_maps(build, batch, name):
    model = build(name)
    features = Taps(model, {"query", "key"})(batch)
    eager = build(name)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    maps = eager(**model_inputs(batch, eager), output_attentions=True).attentions
    hidden = batch["attention_mask"][:, None, None] == 0
    for query, key, expected in zip(features.query, features.key, maps, strict=True):
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        probabilities = scores.masked_fill(hidden, -math.inf).softmax(-1)
        torch.testing.assert_close(probabilities, expected, atol=1e-4, rtol=1e-4)


def test_fewer_key_heads_are_repeated_to_match_the_queries(batch):
    shape = {name: value for name, value in SHAPE.items() if name != "vocab_size"}
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, **shape)
    model = LlamaForSequenceClassification(config).eval()
    features = Taps(model, {"query", "value"})(batch)
    few = encoder_layers(model)[0].input_layernorm(model.model.embed_tokens(batch["input_ids"]))
    few = encoder_layers(model)[0].self_attn.v_proj(few).unflatten(-1, (2, -1)).transpose(1, 2)
    assert features.query[0].shape == features.key[0].shape
    torch.testing.assert_close(features.value[0], few[:, [0, 0, 1, 1]])


@pytest.mark.parametrize("need", sorted(EVERYTHING))
def test_only_what_was_asked_for_is_collected_and_nothing_is_length_by_length(build, batch, need):
    length = batch["input_ids"].shape[1]
    collected = vars(Taps(build("bert"), {need})(batch))
    held = {name for name in EVERYTHING if name in collected and not _is_empty(collected[name])}
    # One attention function sees queries, keys and values at once.
    assert held == ({"query", "key", "value"} if need in ("query", "key", "value") else {need})
    for value in collected.values():
        for tensor in value if isinstance(value, list) else [value]:
            assert not isinstance(tensor, Tensor) or tuple(tensor.shape).count(length) <= 1


def _is_empty(value) -> bool:
    return value is None or (isinstance(value, list) and not value)


def test_several_taps_on_one_model_record_their_own_only(build, batch):
    model = build("bert")
    first, second = Taps(model, {"hidden", "query"}), Taps(model, {"hidden", "embedding"})
    one, other = first(batch), second(batch)
    model(**model_inputs(batch, model))  # nobody asked
    assert (len(one.hidden), len(one.query), one.embedding) == (LAYERS, LAYERS, None)
    assert (len(other.hidden), len(other.query)) == (LAYERS, 0)
    assert other.embedding is not None
    assert torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_taps_may_be_removed_in_any_order(build, batch, order):
    model = build("bert")
    plain = model(**model_inputs(batch, model)).logits
    pair = Taps(model, {"query", "hidden"}), Taps(model, {"key", "last_hidden"})
    pair[order[0]].remove()
    left = pair[order[1]](batch)
    assert len(left.query) == LAYERS
    assert torch.equal(left.logits, plain)
    pair[order[1]].remove()
    assert model.config._attn_implementation == "sdpa"


def test_remove_restores_the_model_and_may_be_repeated(build, batch):
    model = build("bert")
    plain = model(**model_inputs(batch, model)).logits
    taps = Taps(model, EVERYTHING)
    taps(batch)
    taps.remove()
    taps.remove()
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(**model_inputs(batch, model)).logits, plain)


def test_removed_taps_give_an_eager_model_its_attention_back(build, batch):
    model = build("bert")
    model.set_attn_implementation("eager")
    Taps(model, {"query"}).remove()
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("tapped", [True, False])
def test_saved_models_carry_no_trace(build, batch, tmp_path, tapped):
    model = build("bert")
    taps = Taps(model, EVERYTHING)
    logits = taps(batch).logits
    if not tapped:
        taps.remove()
    model.save_pretrained(tmp_path)
    assert "metakd" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(**model_inputs(batch, loaded)).logits, logits)


def test_a_checkpointed_layer_is_recorded_once_and_differentiated_right(build, batch):
    model = build("bert")

    def gradients():
        model.zero_grad()
        features = Taps(model, EVERYTHING)(batch)
        states = [*features.hidden, *features.query, *features.key, features.embedding]
        sum(state.square().mean() for state in states).backward()
        assert len(features.hidden) == len(features.query) == LAYERS
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.train()  # transformers checkpoints in training only
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    recomputed = gradients()
    assert recomputed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_layers_that_share_weights_cannot_be_tapped():
    shape = SHAPE | {"embedding_size": 16}
    model = AlbertForSequenceClassification(AlbertConfig(**shape))
    with pytest.raises(
        ValueError, match="AlbertForSequenceClassification has no list of its 3 layers"
    ):
        Taps(model, {"hidden", "query"})
    assert model.config._attn_implementation == "sdpa"


def test_models_without_the_attention_interface_are_refused():
    model = DebertaV2ForSequenceClassification(
        DebertaV2Config(**SHAPE | {"attn_implementation": "eager"})
    )
    with pytest.raises(ValueError, match="DebertaV2ForSequenceClassification does not use transf"):
        Taps(model, {"query"})
    assert model.config._attn_implementation == "eager"


# Layer maps


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, [2, 5, 8, 11]),  # the paper's 3rd, 6th, 9th and 12th
        ("uniform", 3, 6, [1, 3, 5]),
        ("uniform", 4, 6, [0, 2, 3, 5]),
        ("uniform", 5, 5, [0, 1, 2, 3, 4]),
        ("last", 4, 12, [8, 9, 10, 11]),
        ("last", 2, 2, [0, 1]),
        ([0, 3, 3], 3, 4, [0, 3, 3]),
        ((5, 0), 2, 6, [5, 0]),
    ],
)
def test_layer_map(rule, student, teacher, expected):
    assert layer_map(rule, student, teacher) == expected


def test_uniform_maps_rise_strictly_and_end_at_the_top():
    for teacher in range(1, 25):
        for student in range(1, teacher + 1):
            mapped = layer_map("uniform", student, teacher)
            assert mapped == sorted(set(mapped))
            assert len(mapped) == student
            assert mapped[0] >= 0
            assert mapped[-1] == teacher - 1


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "message"),
    [
        ([1, 2], 3, 12, "2 entries for a student of 3 layers"),
        ([1, 12], 2, 12, r"\[1, 12\] names a layer outside 0..11"),
        ([-1, 2], 2, 12, "outside 0..11"),
        ("uniform", 7, 6, "student has 7 layers, teacher only 6"),
        ("last", 7, 6, "student has 7 layers, teacher only 6"),
        ("first", 2, 6, "'first' is neither uniform, last nor a list"),
    ],
)
def test_layer_map_errors(rule, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        layer_map(rule, student, teacher)


# Pooling


def test_masked_mean_pooling_is_the_mean_over_real_tokens():
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    pooled = pool(Features(mask=mask, last_hidden=hidden), "masked_mean")
    torch.testing.assert_close(pooled, expected)
