"""Packed batches give what padded ones give: features, losses per example and every gradient."""

import gc
import weakref

import pytest
import torch
from encoders import BUILDERS, HEADS, HIDDEN, LAYERS, SHAPE
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from metakd.config import DistillConfig, TermWeights
from metakd.errors import UnsupportedError
from metakd.method.methods import build_terms
from metakd.method.objective import Distillation
from metakd.method.recipe import EASYTRANSFER
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.method.terms import RelationTerm
from metakd.models.packing import Packing, real_tokens
from metakd.models.taps import Features, Taps

EVERYTHING = frozenset({"embedding", "hidden", "last_hidden", "query", "key", "value"})
DOMAINS = ["a", "b", "c"]


def _modernbert_with_a_window():
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    config = ModernBertConfig(**SHAPE, **special, local_attention=4)
    return ModernBertForSequenceClassification(config)


# Dropout would draw other numbers, not wrong ones.
STILL = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
ENCODERS = BUILDERS | {
    "modernbert, narrow window": _modernbert_with_a_window,  # its mask hides more than padding
    # Causal, rotary, and fewer key heads than query heads.
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_key_value_heads=2)),
}
every_encoder = pytest.mark.parametrize("name", ["bert", *ENCODERS])


@pytest.fixture
def build(tiny_bert):
    def named(name):
        model = tiny_bert(LAYERS, HIDDEN, HEADS, **STILL) if name == "bert" else ENCODERS[name]()
        return model.eval()

    return named


@pytest.fixture(params=["in turn", "at once"])
def way(request, monkeypatch):
    """Both ways of attention: a CPU's and an accelerator's."""
    if request.param == "at once":
        monkeypatch.setattr(Packing, "_attend_in_turn", Packing._attend_at_once)


@pytest.fixture
def batch(make_batch):
    made = make_batch()
    del made["token_type_ids"]  # not every architecture takes them
    return made


def assert_close(one, other, **options):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, **options)


def gradients(module):
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_same_gradients(one, other):
    assert one.keys() == other.keys()
    for name in one:
        scale = max(1.0, other[name].abs().max().item())
        assert_close(one[name] / scale, other[name] / scale, msg=lambda text, n=name: f"{n} {text}")


def states(features):
    yield "logits", features.logits
    yield "last hidden", features.last_hidden
    yield "embedding", features.embedding
    for name in ("hidden", "query", "key", "value"):
        for layer, tensor in enumerate(getattr(features, name)):
            yield f"{name} {layer}", tensor.transpose(1, 2) if name != "hidden" else tensor


def weighted_sum(features, mask):
    """A scalar that depends on every real token of every feature."""
    total = 0.0
    for number, (_, tensor) in enumerate(states(features)):
        real = tensor[mask.bool()] if tensor.shape[:2] == mask.shape else tensor
        total = total + (number + 1) * real.square().mean()
    return total


# Features


@every_encoder
def test_features_and_gradients_are_those_of_padded_layers(build, batch, name, way):
    model, mask = build(name), batch["attention_mask"]
    assert (mask == 0).any()
    seen, grads = {}, {}
    for packed in (False, True):
        taps = Taps(model, EVERYTHING, packed)
        features = taps(batch)
        seen[packed] = dict(states(features))
        weighted_sum(features, mask).backward()
        grads[packed] = gradients(model)
        taps.remove()
    assert seen[True].keys() == seen[False].keys()
    for kind, expected in seen[False].items():
        tensor = seen[True][kind]
        assert tensor.shape == expected.shape, kind
        at = mask.bool() if tensor.shape[:2] == mask.shape else slice(None)
        assert_close(tensor[at], expected[at], msg=lambda text, k=kind: f"{k}: {text}")
    assert_same_gradients(grads[True], grads[False])


MASKS = {
    "one token": [[1, 0, 0], [1, 1, 1]],
    "one example": [[1, 1, 0, 0]],  # padded to a multiple of 8, say
    "all of one token": [[1, 0], [1, 0]],
    "equal lengths, padded": [[1, 1, 0], [1, 1, 0], [1, 1, 0]],
    "padding on the left": [[0, 0, 1, 1], [1, 1, 1, 1]],
    "a hole": [[1, 0, 1, 1], [1, 1, 1, 0]],
    "as many tokens as the length": [[1, 1, 1, 0], [1, 0, 0, 0]],  # [1, T] looks like [B, L]
}


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("name", ["bert", "modernbert, narrow window"])
def test_every_shape_of_mask(build, name, shape, way):
    mask = torch.tensor(MASKS[shape])
    batch = {"input_ids": torch.randint(1, 50, mask.shape), "attention_mask": mask}
    model = build(name)
    padded, packed = (Taps(model, EVERYTHING, packed)(batch) for packed in (False, True))
    real = mask.bool()
    for one, other in zip(packed.hidden, padded.hidden, strict=True):
        assert_close(one[real], other[real])
    for one, other in zip(packed.query, padded.query, strict=True):
        assert_close(one.transpose(1, 2)[real], other.transpose(1, 2)[real])
    if real[:, 0].all():  # else the pooler reads padding
        assert_close(packed.logits, padded.logits)


def test_the_layers_see_real_tokens_only(build, batch):
    model, widths = build("bert"), []
    for layer in model.bert.encoder.layer:
        hook = lambda _module, args, _output: widths.append(args[0].shape)  # noqa: E731
        layer.intermediate.register_forward_hook(hook)
    Taps(model, set(), packed=True)(batch)
    assert widths == [(1, int(batch["attention_mask"].sum()), HIDDEN)] * LAYERS


def test_a_batch_without_padding_runs_as_it_is(build, batch):
    batch["attention_mask"][:] = 1
    assert Packing.of(batch) is None
    model = build("bert")
    plain = Taps(model, {"hidden"})(batch)
    packed = Taps(model, {"hidden"}, packed=True)(batch)
    assert torch.equal(packed.logits, plain.logits)
    assert isinstance(packed.hidden, list)


# real tokens of 4 x 25: none is padding, too few are, just enough, all but one
@pytest.mark.parametrize(("real", "packs"), [(100, False), (99, False), (98, True), (1, True)])
def test_next_to_no_padding_is_left_where_it_is(real, packs):
    mask = (torch.arange(100) < real).long().reshape(4, 25)
    assert (Packing.of({"attention_mask": mask}) is not None) == packs


def test_a_batch_of_padding_alone_runs_as_it_is(batch):
    batch["attention_mask"][:] = 0
    assert Packing.of(batch) is None


def test_an_example_without_any_token_has_no_effect(build, batch):
    batch["attention_mask"][1] = 0
    model = build("bert")
    packed = Taps(model, {"hidden"}, packed=True)(batch)
    assert packed.logits.isfinite().all()
    weighted = sum(states[1].sum() for states in packed.hidden)
    assert weighted == 0
    expected = Taps(model, {"hidden"})(batch)
    others = [0, 2, 3]
    assert_close(packed.logits[others], expected.logits[others])


def test_real_tokens_found_beforehand_serve_as_well(build, batch, monkeypatch):
    model = build("bert")
    taps = Taps(model, {"query"}, packed=True)
    expected = taps(batch)
    found = real_tokens(batch["attention_mask"])
    monkeypatch.setattr("metakd.models.packing.real_tokens", None)  # not to be asked again
    given = taps(batch | {"real_tokens": found})
    assert torch.equal(given.logits, expected.logits)
    assert torch.equal(given.query[-1], expected.query[-1])


def test_layers_read_one_by_one_from_the_end_or_as_a_slice(build, batch):
    features = Taps(build("bert"), {"hidden"}, packed=True)(batch)
    assert len(features.hidden) == LAYERS
    assert torch.equal(features.hidden[-1], list(features.hidden)[LAYERS - 1])
    assert [x.shape for x in features.hidden[:-1]] == [features.hidden[0].shape] * (LAYERS - 1)
    padding = batch["attention_mask"] == 0
    assert (features.hidden[0][padding] == 0).all()
    with pytest.raises(IndexError):
        features.hidden[LAYERS]


def test_packed_and_padded_taps_live_on_one_model(build, batch):
    model = build("bert")
    plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    padded, packed = Taps(model, {"hidden"}), Taps(model, {"hidden"}, packed=True)
    assert packed(batch).packing is not None
    assert padded(batch).packing is None
    assert torch.equal(padded(batch).logits, plain)
    packed.remove()
    padded.remove()
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# Gradients, second order included


def test_pack_and_unpack_are_inverse_and_differentiate_twice(make_batch):
    mask = make_batch()["attention_mask"]
    packing = Packing(real_tokens(mask), mask)
    padded = torch.randn(*mask.shape, 3, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(1, len(packing.index), 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(packing.pack(packing.unpack(packed)), packed)
    assert torch.equal(packing.unpack(packing.pack(padded)), padded * mask[:, :, None])
    for function, value in ((packing.pack, padded), (packing.unpack, packed)):
        cubed = lambda x, f=function: f(x) ** 3  # noqa: E731
        torch.autograd.gradcheck(cubed, value)
        torch.autograd.gradgradcheck(cubed, value)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert"])
def test_checkpointed_layers_are_recomputed_packed(build, batch, name, reentrant, way):
    if reentrant and "__call__" in vars(GradientCheckpointingLayer):
        pytest.skip("this transformers checkpoints a layer with its hooks: see run()")
    model = build(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def run(packed):
        model.zero_grad()
        # A reentrant checkpoint gives no gradient to what is read inside it.
        taps = Taps(model, {"hidden"}, packed)
        features = taps(batch)
        real = batch["attention_mask"].bool()
        total = sum(states[real].square().mean() for states in features.hidden)
        (total + features.logits.square().sum()).backward()
        taps.remove()
        return gradients(model)

    expected = run(packed=False)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    assert_same_gradients(run(packed=True), expected)


def test_what_recomputes_a_layer_keeps_no_step_alive(build, batch):
    """A loss that leaves part of the graph unvisited, as one that reads a layer's queries alone."""
    model = build("bert").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    taps = Taps(model, {"query"}, packed=True)
    features = taps(batch)
    features.query[-1].square().sum().backward()
    gone = weakref.ref(features)
    del features
    gc.collect()
    assert gone() is None
    taps.remove()


# The method


def _terms(method, **options):
    config = DistillConfig(method=method, terms=TermWeights(hard_label=0.5), **options)
    return build_terms(config, student_layers=LAYERS - 1, teacher_layers=LAYERS)


METHODS = {
    "meta": (lambda: _terms("meta"), "meta"),
    "probabilities": (lambda: _terms("meta", attention="probabilities"), "meta"),
    "kl": (lambda: _terms("meta", attention="kl"), "meta"),
    "tinybert_kd": (lambda: _terms("tinybert_kd"), "mix"),
    "minilmv2": (lambda: [RelationTerm(heads=8), *_terms("logits_kd")], "mix"),
    "logits_kd": (lambda: _terms("logits_kd"), "mtl"),
    "finetune": (lambda: _terms("finetune"), None),
    "ad_kd": (lambda: _terms("ad_kd", attribution_steps=2), "mix"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_distillation_step_per_example(tiny_bert, make_batch, method, way):
    make_terms, kind = METHODS[method]
    batch, terms = make_batch(rows=6), make_terms()
    student = tiny_bert(layers=LAYERS - 1, **STILL)
    module = Distillation(
        student,
        terms,
        teacher_hidden=48,
        num_domains=len(DOMAINS),
        weigh_by_expertise=method == "meta",
    )
    outputs = 2 * len(DOMAINS) if kind == "mtl" else 2
    model = tiny_bert(layers=LAYERS, hidden=48, labels=outputs, **STILL)
    teacher = Teacher(model, kind or "mix", DOMAINS)
    parts, grads = {}, {}
    for packed in (False, True):
        module.packed = packed
        module.restrict(terms)
        asked = {"packed": packed, "attribution": module.attribution}
        with FrozenTeacher([teacher], module.needs | {"logits"}, **asked) as frozen:
            parts[packed] = module(batch, frozen(batch) if kind else None)
        parts[packed].rows.sum().backward()
        grads[packed] = gradients(module)
    assert_close(parts[True].rows, parts[False].rows)
    for name, value in parts[False].terms.items():
        assert_close(parts[True].terms[name], value)
    assert_same_gradients(grads[True], grads[False])


@pytest.mark.parametrize("kind", ["mix", "mtl", "meta"])
def test_a_teachers_step_per_example(tiny_bert, make_batch, kind, way):
    batch = make_batch(rows=6)
    model = tiny_bert(labels=6 if kind == "mtl" else 2, **STILL)
    padded, packed = (Teacher(model, kind, DOMAINS, packed=packed) for packed in (False, True))
    packed.load_state_dict(padded.state_dict())
    rows = {}
    for teacher in (padded, packed):
        output = teacher(batch)
        output.rows.sum().backward()
        rows[teacher] = output.rows, gradients(teacher)
    assert_close(rows[packed][0], rows[padded][0])
    assert_same_gradients(rows[packed][1], rows[padded][1])
    assert_close(packed.logits(batch), padded.logits(batch))


def test_dropout_still_drops(tiny_bert, make_batch):
    batch = make_batch()
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5).train()
    taps = Taps(model, set(), packed=True)
    assert not torch.equal(taps(batch).logits, taps(batch).logits)


def test_bfloat16_stays_within_its_own_rounding(build, batch):
    model = build("bert")
    exact = Taps(model, set())(batch).logits
    half = build("bert")
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    padded, packed = (Taps(half, set(), packed)(batch).logits for packed in (False, True))
    allowed = 2 * (padded - exact).abs().max() + 2**-7 * exact.abs().max()
    assert (packed - exact).abs().max() <= allowed


def test_features_on_another_stream_hand_over_what_is_behind_them(make_batch):
    mask = make_batch()["attention_mask"]
    features = Features(mask=mask, packing=Packing(real_tokens(mask), mask))
    packed = torch.randn(1, int(mask.sum()), 2)
    features.hidden.append(packed)
    assert [id(tensor) for tensor in features.hidden.held()] == [
        id(packed),
        id(features.packing.index),
    ]


# What is refused


def test_recipes_that_count_padding_are_refused(tiny_bert):
    with pytest.raises(UnsupportedError, match="averages over padding"):
        Distillation(tiny_bert(), [], recipe=EASYTRANSFER, packed=True)
    with pytest.raises(UnsupportedError, match="averages over padding"):
        Teacher(tiny_bert(), "meta", DOMAINS, recipe=EASYTRANSFER, packed=True)
    teacher = Teacher(tiny_bert(), "meta", DOMAINS, recipe=EASYTRANSFER)
    with pytest.raises(UnsupportedError, match="averages over padding"):
        FrozenTeacher([teacher], frozenset({"logits"}), packed=True)


def test_layers_that_cannot_be_told_are_refused(build):
    model = build("bert")
    layer = model.bert.encoder.layer[1]
    layer.forward = lambda hidden_states, attention_mask=None: hidden_states
    with pytest.raises(ValueError, match="cannot run packed: its layers take no keywords"):
        Taps(model, set(), packed=True)
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_share_weights_are_refused():
    model = AlbertForSequenceClassification(AlbertConfig(**SHAPE | {"embedding_size": 16}))
    with pytest.raises(ValueError, match="has no list of its 3 layers"):
        Taps(model, set(), packed=True)
