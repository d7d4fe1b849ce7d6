"""Teachers: false domains, the meta-teacher's loss, multi-task heads, the frozen teacher, files."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from metakd.errors import CheckpointError, UnsupportedError
from metakd.method.domains import domain_loss_floor, false_domains
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.models.taps import model_inputs

DOMAINS = ["books", "dvd", "kitchen"]


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


@pytest.fixture
def teacher(tiny_bert):
    """``teacher(kind)``: a teacher of that kind, in eval mode."""

    def build(kind="meta", labels=2, dropout=0.1, **options):
        outputs = labels * len(DOMAINS) if kind == "mtl" else labels
        model = tiny_bert(labels=outputs, hidden_dropout_prob=dropout)
        return Teacher(model, kind, DOMAINS, **options).eval()

    return build


def plain_logits(teacher, batch):
    return teacher.model(**model_inputs(batch, teacher.model)).logits


def plain_h_d(teacher, batch):
    """tanh((E + DomEmb[k]) W + b), line by line."""
    hidden = teacher.model.bert(**model_inputs(batch, teacher.model.bert)).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    layer = teacher.domain_layer
    corrupted = mean + layer.embedding.weight[batch["domain"]]
    return torch.tanh(corrupted @ layer.dense.weight.T + layer.dense.bias)


# False domains


@pytest.mark.parametrize("domains", [2, 3, 5])
def test_false_domains_are_never_true_and_uniform_over_the_others(domains):
    each = 3000
    true = torch.arange(domains).repeat_interleave(each)
    false = false_domains(true, domains, seed=3)
    assert not (false == true).any()
    assert false.min() >= 0 and false.max() < domains
    for domain in range(domains):
        counts = torch.bincount(false[true == domain], minlength=domains).double()
        expected = each / (domains - 1)
        others = counts[torch.arange(domains) != domain]
        assert (others - expected).abs().max() < 5 * math.sqrt(expected)


def test_false_domains_follow_their_seed():
    true = torch.arange(200) % 4
    assert torch.equal(false_domains(true, 4, seed=1), false_domains(true, 4, seed=1))
    assert not torch.equal(false_domains(true, 4, seed=1), false_domains(true, 4, seed=2))


def test_one_domain_has_no_false_one():
    with pytest.raises(ValueError, match="num_domains: 1; domain corruption needs at least 2"):
        false_domains(torch.zeros(3, dtype=torch.long), 1, seed=0)


def test_the_floor_of_the_domain_loss():
    assert domain_loss_floor(4) == (pytest.approx(math.log(4)), pytest.approx(math.log(3)))
    assert domain_loss_floor(1) == (0.0, 0.0)


def test_an_undecided_domain_head_loses_ln_k(teacher, make_batch):
    meta, batch = teacher(), make_batch()
    torch.nn.init.zeros_(meta.domain_classifier.weight)
    torch.nn.init.zeros_(meta.domain_classifier.bias)
    assert meta(batch).terms["domain_loss"].item() == pytest.approx(domain_loss_floor(3)[0])


# The loss


def test_h_d_is_the_equation(teacher, make_batch):
    meta, batch = teacher(), make_batch()
    torch.testing.assert_close(meta.features(batch).domain, plain_h_d(meta, batch))


@pytest.mark.parametrize("gamma1", [0.1, 0.5])
def test_t_weights_the_cross_entropy_and_gamma1_the_domain_loss(teacher, make_batch, gamma1):
    meta, batch = teacher(gamma1=gamma1), make_batch()
    ce = F.cross_entropy(plain_logits(meta, batch), batch["labels"], reduction="none")
    domain_logits = meta.domain_classifier(plain_h_d(meta, batch))
    l_da = -domain_logits.log_softmax(-1)[range(4), batch["false_domain"]]
    output = meta(batch)
    torch.testing.assert_close(output.rows, batch["t"] * ce + gamma1 * l_da)
    assert output.terms["ce"].item() == pytest.approx(ce.mean().item(), rel=1e-5)
    assert output.terms["ce_weighted"].item() == pytest.approx(
        (batch["t"] * ce).mean().item(), rel=1e-5
    )
    assert output.terms["domain_loss"].item() == pytest.approx(l_da.mean().item(), rel=1e-5)
    # t = 0 removes the classification loss alone.
    torch.testing.assert_close(meta(batch | {"t": torch.zeros(4)}).rows, gamma1 * l_da)


def test_a_negative_t_counts_as_zero(teacher, make_batch):
    meta, batch = teacher(), make_batch()
    scores = torch.tensor([-0.7, 0.0, 0.4, -0.1])
    rows = meta(batch | {"t": scores}).rows
    torch.testing.assert_close(rows, meta(batch | {"t": scores.clamp(min=0)}).rows)


def test_gamma1_of_zero_needs_no_false_domain(teacher, make_batch):
    meta, batch = teacher(gamma1=0.0), make_batch()
    del batch["false_domain"]
    output = meta(batch)
    assert not meta.kind.corrupts(meta)
    assert "domain_loss" not in output.terms


def test_both_losses_reach_the_encoder_and_the_domain_parts(teacher, make_batch):
    meta, batch = teacher(), make_batch()
    meta(batch | {"t": torch.zeros(4)}).rows.mean().backward()  # L_DA alone
    parts = [meta.domain_layer.embedding.weight, meta.domain_layer.dense.weight]
    parts += [meta.domain_classifier.weight, meta.model.bert.encoder.layer[0].output.dense.weight]
    assert all(part.grad.abs().sum() > 0 for part in parts)
    assert meta.model.classifier.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("kind", ["single", "mix", "mtl"])
def test_other_teachers_train_on_plain_cross_entropy(teacher, make_batch, kind):
    built, batch = teacher(kind), make_batch()
    for name in ("t", "false_domain"):
        del batch[name]
    output = built(batch)
    logits = built.features(batch).logits
    expected = F.cross_entropy(logits, batch["labels"], reduction="none")
    torch.testing.assert_close(output.rows, expected)
    assert set(output.terms) == {"ce"}
    kind = built.kind
    assert kind.columns(built, batch["domain"], seed=1, epoch=0) == kind.marks(built) == {}
    assert built.features(batch).domain is None


# Multi-task heads


def test_a_multi_task_teacher_answers_with_the_head_of_the_domain(teacher, make_batch):
    mtl, batch = teacher("mtl"), make_batch(rows=6)
    heads = plain_logits(mtl, batch).reshape(6, 3, 2)
    expected = torch.stack([heads[row, domain] for row, domain in enumerate(batch["domain"])])
    assert torch.equal(mtl.features(batch).logits, expected)


def test_a_withheld_domain_is_answered_by_the_mean_of_the_other_heads(teacher, make_batch):
    mtl, batch = teacher("mtl", withheld=["dvd"]), make_batch(rows=6)
    heads = plain_logits(mtl, batch).reshape(6, 3, 2)
    expected = heads[range(6), batch["domain"]]
    withheld = batch["domain"] == 1
    expected[withheld] = heads[withheld][:, [0, 2]].mean(1)
    torch.testing.assert_close(mtl.features(batch).logits, expected)


def test_an_example_trains_its_own_head_only(teacher, make_batch):
    mtl, batch = teacher("mtl"), make_batch()
    mtl(batch | {"domain": torch.full((4,), 2)}).rows.mean().backward()
    by_head = mtl.model.classifier.weight.grad.unflatten(0, (3, 2)).abs().sum((1, 2))
    assert by_head[:2].tolist() == [0.0, 0.0]
    assert by_head[2] > 0


# The frozen teacher


def test_a_frozen_teacher_is_deterministic_whatever_mode_it_was_left_in(teacher, make_batch):
    meta, batch = teacher(dropout=0.5), make_batch()
    expected = plain_logits(meta, batch), plain_h_d(meta, batch)
    meta.train()
    frozen = FrozenTeacher([meta], frozenset({"logits", "domain", "hidden", "query"}))
    once, again = frozen(batch), frozen(batch)
    assert not any(module.training for module in meta.modules())
    assert torch.equal(once.logits, again.logits)
    assert torch.equal(once.domain, again.domain)
    assert all(map(torch.equal, once.hidden + once.query, again.hidden + again.query))
    torch.testing.assert_close((once.logits, once.domain), expected)


def test_a_frozen_teacher_has_no_gradients(teacher, make_batch):
    frozen = FrozenTeacher([teacher()], frozenset({"logits", "domain", "embedding", "key"}))
    seen = frozen(make_batch())
    for tensor in (seen.logits, seen.domain, seen.embedding, *seen.key):
        assert not tensor.requires_grad
    assert not any(parameter.requires_grad for parameter in frozen.teachers[0].parameters())


def test_a_frozen_teacher_shows_only_what_is_needed_and_can_be_removed(teacher, make_batch):
    meta, batch = teacher(), make_batch()
    frozen = FrozenTeacher([meta], frozenset({"logits", "query"}))
    seen = frozen(batch)
    assert (seen.embedding, seen.hidden, seen.last_hidden, seen.domain) == (None, [], None, None)
    frozen.remove()
    assert meta.model.config._attn_implementation == "sdpa"
    assert meta.features(batch).domain is not None  # its own taps are still there


def test_an_ensemble_gives_the_mean_of_its_logits(teacher, make_batch):
    trio, batch = [teacher("single") for _ in range(3)], make_batch()
    expected = torch.stack([plain_logits(one, batch) for one in trio]).mean(0)
    torch.testing.assert_close(FrozenTeacher(trio, frozenset({"logits"}))(batch).logits, expected)


def test_an_ensemble_shows_what_its_first_does(teacher, make_batch):
    pair, batch = [teacher("mix"), teacher("mix")], make_batch(rows=3)
    needs = frozenset({"logits", "hidden"})
    both, first = (FrozenTeacher(some, needs)(batch) for some in (pair, pair[:1]))
    for own, alone in zip(both.hidden, first.hidden, strict=True):
        torch.testing.assert_close(own, alone)
    assert not torch.allclose(both.logits, first.logits)


def test_only_a_meta_teacher_has_a_domain_representation(teacher):
    with pytest.raises(ValueError, match=r"a mix teacher does not show .* use one of kind meta"):
        FrozenTeacher([teacher("mix")], frozenset({"logits", "domain"}))


# Files


@pytest.mark.parametrize("kind", ["meta", "mix", "mtl", "single"])
def test_a_saved_teacher_says_the_same(teacher, make_batch, tmp_path, kind):
    built, batch = teacher(kind, gamma1=0.35, withheld=["dvd"]), make_batch()
    built.save(tmp_path, NoTokenizer())
    loaded = Teacher.load(tmp_path).eval()
    kept = (loaded.kind.name, loaded.domains, loaded.gamma1, loaded.withheld)
    assert kept == (kind, DOMAINS, 0.35, ["dvd"])
    assert loaded.model.config._attn_implementation == "sdpa"
    ours, theirs = built.features(batch), loaded.features(batch)
    assert torch.equal(ours.logits, theirs.logits)
    if kind == "meta":
        assert torch.equal(ours.domain, theirs.domain)
        assert torch.equal(built(batch).rows, loaded(batch).rows)  # the domain classifier as well


def test_a_saved_teacher_is_a_plain_classifier_beside_its_domain_parts(teacher, tmp_path):
    teacher().save(tmp_path, NoTokenizer())
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_folder_without_teacher_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"metakd\.json is missing") as caught:
        Teacher.load(tmp_path)
    assert caught.value.exit_code == 4
    assert str(tmp_path) in caught.value.cause


@pytest.mark.parametrize("damage", ["no file", "a tensor less"])
def test_a_meta_teacher_without_its_domain_parts_is_refused(teacher, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    teacher().save(tmp_path, NoTokenizer())
    parts = tmp_path / "domain.safetensors"
    if damage == "no file":
        parts.unlink()
    else:
        tensors = load_file(parts)
        del tensors["domain_layer.dense.weight"]
        save_file(tensors, parts)
    with pytest.raises(CheckpointError, match=r"domain\.safetensors"):
        Teacher.load(tmp_path)


def test_the_description_is_readable(teacher, tmp_path):
    teacher("mtl").save(tmp_path, NoTokenizer())
    assert json.loads((tmp_path / "metakd.json").read_text())["domains"] == DOMAINS
    assert not (tmp_path / "domain.safetensors").exists()


def test_a_stream_of_its_own_needs_cuda(teacher):
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.raises(UnsupportedError, match="needs CUDA, the teacher is on cpu"):
        FrozenTeacher([teacher()], frozenset({"logits"}), own_stream=True)
