"""``compat: easytransfer``: one test per place where the released code departs from the paper."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional as F

from metakd.config import DistillConfig, TermWeights
from metakd.method.domains import false_domains
from metakd.method.methods import build_terms
from metakd.method.objective import Distillation
from metakd.method.prototypes import Prototypes
from metakd.method.recipe import EASYTRANSFER, PAPER, RECIPES
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.models.taps import Features, Taps, model_inputs, pool

K = 3
EVERYTHING = frozenset({"embedding", "hidden", "query", "key", "logits", "domain"})


class Scene:
    """A released-form teacher and student around one batch. The teacher has no dropout to draw."""

    def __init__(self, tiny_bert, make_batch, **config):
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.batch = make_batch(labels=3)
        self.student = tiny_bert(layers=2, labels=3)
        model = tiny_bert(layers=4, hidden=48, labels=3, **still)
        self.teacher = Teacher(model, "meta", ["a", "b", "c"], recipe=EASYTRANSFER)
        self.taught = FrozenTeacher([self.teacher], EVERYTHING)(self.batch)
        self.config = DistillConfig(method="meta", schedule="two_stage", **config)
        self.terms = build_terms(
            self.config, student_layers=2, teacher_layers=4, recipe=EASYTRANSFER
        )
        taps = Taps(self.student, EVERYTHING - {"logits", "domain"} | {"last_hidden"})
        self.seen = taps(self.batch)
        taps.remove()
        self.distillation = Distillation(
            self.student,
            self.terms,
            teacher_hidden=48,
            num_domains=K,
            weigh_by_expertise=True,
            recipe=EASYTRANSFER,
        )

    def run(self, *names):
        """The distillation's output with these terms alone."""
        self.distillation.restrict([term for term in self.terms if term.name in names])
        return self.distillation(self.batch, self.taught)

    def expertise(self):
        correct = self.taught.logits.softmax(-1)[range(4), self.batch["labels"]]
        return (1 + self.batch["t"]) / (torch.exp((1 - correct) ** 2) + 1)


@pytest.fixture
def scene(tiny_bert, make_batch):
    return Scene(tiny_bert, make_batch)


@pytest.fixture
def meta(tiny_bert, make_batch):
    """``meta(recipe)``: a meta-teacher that trains in that form."""

    def build(recipe):
        return Teacher(tiny_bert(), "meta", ["a", "b", "c"], gamma1=0.5, recipe=recipe).eval()

    return build


def corrupted(embedding, domain, layer):
    """(E + DomEmb[k]) W + b."""
    return (embedding + layer.embedding.weight[domain]) @ layer.dense.weight.T + layer.dense.bias


def test_the_names_of_the_configuration_mean_these_recipes():
    assert RECIPES == {"paper": PAPER, "easytransfer": EASYTRANSFER}
    # Each field is a difference; one that agrees would be a switch nobody turns.
    assert all(getattr(PAPER, f.name) != getattr(EASYTRANSFER, f.name) for f in fields(PAPER))


# Prototypes


@pytest.fixture
def corpus():
    domain, label = torch.arange(24) % K, torch.arange(24) % 2
    return torch.randn(24, 6) + 1.0, domain, label


def fit(corpus, **options):
    return Prototypes.fit(*corpus, num_domains=K, num_classes=2, recipe=EASYTRANSFER, **options)


def test_prototypes_are_per_domain(corpus):
    embedding, domain, _ = corpus
    expected = torch.stack([embedding[domain == k].mean(0) for k in range(K)])
    torch.testing.assert_close(fit(corpus).vectors, expected[:, None])


@pytest.mark.parametrize("asked", [0.5, 0.9])
def test_other_domains_count_by_the_cosine_to_the_mean_of_their_centroids(corpus, asked):
    embedding, domain, _ = corpus
    centroids = torch.stack([embedding[domain == k].mean(0) for k in range(K)])
    expected = []
    for example, k in zip(embedding, domain.tolist(), strict=True):
        others = torch.stack([centroids[j] for j in range(K) if j != k]).mean(0)
        own = F.cosine_similarity(example, centroids[k], dim=0)
        expected.append(0.5 * own + 0.5 * F.cosine_similarity(example, others, dim=0))
    scores = fit(corpus, alpha=asked).score(*corpus)  # the release fixed alpha at 0.5
    torch.testing.assert_close(scores, torch.stack(expected))


def test_a_domain_without_examples_is_no_part_of_the_mean(corpus):
    embedding, domain, label = corpus
    kept = domain != 2
    few = embedding[kept], domain[kept], label[kept]
    pair = Prototypes.fit(*few, num_domains=2, num_classes=2, recipe=EASYTRANSFER)
    torch.testing.assert_close(fit(few).score(*few), pair.score(*few))


def test_centering_applies_to_the_released_form_as_well(corpus):
    embedding, domain, label = corpus
    shifted = (embedding - embedding.mean(0), domain, label)
    expected = fit(shifted).score(*shifted)
    scores = fit(corpus, rescale="center").score(*corpus)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_saved_prototypes_score_alike(corpus, tmp_path):
    fitted = fit(corpus)
    fitted.save(tmp_path)
    loaded = Prototypes.load(tmp_path, EASYTRANSFER)
    assert torch.equal(loaded.score(*corpus), fitted.score(*corpus))


def test_pooling_is_the_mean_over_all_positions_but_the_first(tiny_bert, make_batch):
    model, batch = tiny_bert().bert, make_batch()
    hidden = model(**model_inputs(batch, model)).last_hidden_state
    features = Features(mask=batch["attention_mask"], last_hidden=hidden)
    expected = hidden[:, 1:].mean(1)  # padding and the closing token included
    torch.testing.assert_close(pool(features, EASYTRANSFER.pooling), expected)
    assert not torch.allclose(pool(features, PAPER.pooling), expected)


# The meta-teacher


def test_the_domain_loss_is_off(meta, make_batch):
    teacher, batch = meta(EASYTRANSFER), make_batch()
    output = teacher(batch)
    logits = teacher.model(**model_inputs(batch, teacher.model)).logits
    ce = F.cross_entropy(logits, batch["labels"], reduction="none")
    torch.testing.assert_close(output.rows, batch["t"] * ce)
    assert not teacher.kind.corrupts(teacher)
    assert "domain_loss" not in output.terms


def test_switched_on_the_domain_loss_is_weighted_by_t_as_well(meta, make_batch):
    teacher, batch = meta(replace(EASYTRANSFER, domain_loss=True)), make_batch()
    output = teacher(batch)
    ce = F.cross_entropy(
        teacher.model(**model_inputs(batch, teacher.model)).logits,
        batch["labels"],
        reduction="none",
    )
    mean = (
        teacher.model.bert(**model_inputs(batch, teacher.model.bert))
        .last_hidden_state[:, 1:]
        .mean(1)
    )
    # The head that is trained on false domains keeps its tanh.
    h_d = torch.tanh(corrupted(mean, batch["domain"], teacher.domain_layer))
    domain_logits = teacher.domain_classifier(h_d)
    l_da = F.cross_entropy(domain_logits, batch["false_domain"], reduction="none")
    torch.testing.assert_close(output.rows, batch["t"] * (ce + 0.5 * l_da))


def test_the_corrupted_label_is_a_permutation_that_may_hit_the_truth():
    true = torch.arange(40) % 4
    drawn = [
        false_domains(true, 4, seed=seed, always_false=EASYTRANSFER.false_label_always_false)
        for seed in range(5)
    ]
    for labels in drawn:
        assert torch.equal(labels.sort().values, true.sort().values)
    assert (torch.cat(drawn) == true.repeat(5)).any()


def test_the_teacher_keeps_its_dropout(tiny_bert, make_batch):
    batch = make_batch()
    for recipe in RECIPES.values():
        model = tiny_bert(hidden_dropout_prob=0.5)
        frozen = FrozenTeacher(
            [Teacher(model, "meta", ["a", "b", "c"], recipe=recipe)], frozenset({"logits"})
        )
        alike = torch.equal(frozen(batch).logits, frozen(batch).logits)
        assert alike == (recipe is PAPER)


# Distillation


def test_the_transfer_term_compares_h_d_before_its_tanh(scene):
    batch, w = scene.batch, scene.distillation.projections["shared"]

    def h_d(last_hidden, layer):
        return corrupted(last_hidden[:, 1:].mean(1), batch["domain"], layer)

    with torch.no_grad():
        last = scene.teacher.model.bert(
            **model_inputs(batch, scene.teacher.model.bert)
        ).last_hidden_state
        theirs = h_d(last, scene.teacher.domain_layer)
    torch.testing.assert_close(scene.taught.domain, theirs)
    ours = h_d(scene.seen.last_hidden, scene.distillation.domain_layer) @ w
    expected = (ours - theirs).square().mean()
    assert scene.run("transfer").terms["transfer"].item() == pytest.approx(expected.item())


def test_one_projection_serves_every_term(scene):
    (w,) = scene.distillation.projections.values()
    assert w.shape == (32, 48)
    mask = scene.batch["attention_mask"].bool()

    def expected(own, theirs):
        errors = (own @ w - theirs).square().mean(-1) * mask
        return (errors.sum(1) / mask.sum(1)).mean().item()

    output = scene.run("embedding", "hidden")
    embedding = expected(scene.seen.embedding, scene.taught.embedding)
    assert output.terms["embedding"].item() == pytest.approx(embedding, rel=1e-5)
    pairs = zip(scene.seen.hidden, (scene.taught.hidden[1], scene.taught.hidden[3]), strict=True)
    hidden = sum(expected(own, theirs) for own, theirs in pairs)
    assert output.terms["hidden"].item() == pytest.approx(hidden, rel=1e-5)
    output.rows.mean().backward()
    assert w.grad.abs().sum() > 0


def test_attention_scores_of_masked_keys_are_zero_and_all_positions_count(scene):
    added = (1.0 - scene.batch["attention_mask"].float())[:, None, None] * -10000.0

    def scores(features, layer):
        query, key = features.query[layer], features.key[layer]
        raw = query @ key.mT / math.sqrt(query.shape[-1]) + added
        return torch.where(raw <= -1e2, torch.zeros_like(raw), raw)

    expected = sum(
        (scores(scene.seen, s) - scores(scene.taught, t)).square().mean((1, 2, 3))
        for s, t in enumerate((1, 3))
    )
    output = scene.run("attention")
    torch.testing.assert_close(output.rows, scene.expertise() * expected)


def test_lambda_is_on_the_first_stage_but_not_on_the_transfer_term(scene):
    # The release averages L_TKD over the batch before lambda, so that it weighs no example.
    rows = {}
    for term in scene.terms:
        weighted = scene.run(term.name).rows
        scene.distillation.weigh_by_expertise = False
        rows[term.name] = weighted, scene.run(term.name).rows
        scene.distillation.weigh_by_expertise = True
    for name in ("embedding", "hidden", "attention"):
        torch.testing.assert_close(rows[name][0], scene.expertise() * rows[name][1])
    for name in ("transfer", "prediction"):
        assert torch.equal(*rows[name])


def test_lambda_stays_on_the_prediction_where_there_is_no_second_stage():
    config = DistillConfig(method="meta", schedule="joint")
    terms = build_terms(config, student_layers=2, teacher_layers=4, recipe=EASYTRANSFER)
    assert {term.name: term.by_expertise for term in terms}["prediction"]


def test_the_prediction_has_no_temperature_and_is_divided_by_the_classes(tiny_bert, make_batch):
    scene = Scene(tiny_bert, make_batch, temperature=4.0, terms=TermWeights(hard_label=0.0))
    scene.run("prediction").rows.mean().backward()
    ours = scene.student.classifier.weight.grad.clone()
    scene.student.zero_grad()
    logits = scene.student(**model_inputs(scene.batch, scene.student)).logits
    target = scene.taught.logits.softmax(-1)
    (-target * logits.log_softmax(-1)).mean().backward()  # the mean over examples and 3 classes
    torch.testing.assert_close(ours, scene.student.classifier.weight.grad)
