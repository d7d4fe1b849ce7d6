"""The objective: every term against a few plain lines, and lambda on every term and example."""

import math

import pytest
import torch
from torch.nn import functional as F

import metakd
from metakd.config import DistillConfig, TermWeights
from metakd.method.methods import build_terms
from metakd.method.objective import Distillation
from metakd.method.tasks import NO_LABEL, TASKS
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.method.terms import (
    AttentionTerm,
    DecoupledTerm,
    EmbeddingTerm,
    HardLabelTerm,
    HiddenTerm,
    PredictionTerm,
    RelationTerm,
    TransferTerm,
)
from metakd.models.taps import Features, Taps

STUDENT_LAYERS, TEACHER_LAYERS = 2, 4
MAP = (1, 3)
EVERYTHING = frozenset(
    {"embedding", "hidden", "query", "key", "value", "logits", "domain", "last_hidden"}
)
LAMBDA_WEIGHTED = {
    "embedding": EmbeddingTerm(),
    "hidden": HiddenTerm(layers=MAP),
    "attention": AttentionTerm(layers=MAP),
    "attention probabilities": AttentionTerm(layers=MAP, form="probabilities"),
    "attention kl": AttentionTerm(layers=MAP, form="kl"),
    "prediction": PredictionTerm(temperature=2.0),
    "transfer": TransferTerm(0.3),
}
every_weighted_term = pytest.mark.parametrize("name", LAMBDA_WEIGHTED)


class Scene:
    """A student, a wider and deeper meta-teacher, a batch, and what the teacher says of it."""

    def __init__(self, tiny_bert, batch, hidden=32):
        self.student = tiny_bert(layers=STUDENT_LAYERS, hidden=hidden)
        self.teacher = Teacher(tiny_bert(layers=TEACHER_LAYERS, hidden=48), "meta", ["a", "b", "c"])
        self.batch = batch
        frozen = FrozenTeacher([self.teacher], EVERYTHING - {"last_hidden"})
        self.taught = frozen(batch)
        frozen.remove()

    def distillation(self, terms, **options):
        options = {"teacher_hidden": 48, "num_domains": 3, "weigh_by_expertise": True} | options
        return Distillation(self.student, terms, **options)

    def seen(self):
        """The student's features, without its domain representation."""
        taps = Taps(self.student, EVERYTHING - {"logits", "domain"})
        features = taps(self.batch)
        taps.remove()
        return features

    def expertise(self, t=None):
        """lambda_i = (1 + t_i) / (exp((1 - p_T(y_i))^2) + 1)."""
        correct = self.taught.logits.softmax(-1)[range(4), self.batch["labels"]]
        return (1 + (self.batch["t"] if t is None else t)) / (torch.exp((1 - correct) ** 2) + 1)


@pytest.fixture
def scene(tiny_bert, make_batch):
    return Scene(tiny_bert, make_batch())


@pytest.fixture
def projection():
    return torch.randn(32, 48)


def by_example(batch, value):
    """``value(i, n)`` for every example i of n real tokens."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return torch.stack([value(i, n) for i, n in enumerate(lengths)])


def mse(a, b):
    return (a - b).square().mean()


# Terms


def test_embedding_term(scene, projection):
    seen, taught = scene.seen(), scene.taught
    rows = EmbeddingTerm().rows(seen, taught, scene.batch, projection)
    torch.testing.assert_close(
        rows,
        by_example(
            scene.batch,
            lambda i, n: mse(seen.embedding[i, :n] @ projection, taught.embedding[i, :n]),
        ),
    )


def test_hidden_term(scene, projection):
    seen, taught = scene.seen(), scene.taught
    rows = HiddenTerm(layers=MAP).rows(seen, taught, scene.batch, projection)

    def expected(i, n):
        pairs = zip(seen.hidden, (taught.hidden[1], taught.hidden[3]), strict=True)
        return sum(mse(own[i, :n] @ projection, theirs[i, :n]) for own, theirs in pairs)

    torch.testing.assert_close(rows, by_example(scene.batch, expected))


def scores(features, layer, i, n):
    """Q K^T / sqrt(d) of one example's real tokens [A, n, n]."""
    query, key = features.query[layer][i, :, :n], features.key[layer][i, :, :n]
    return query @ key.mT / math.sqrt(query.shape[-1])


FORMS = {
    "scores": mse,
    "probabilities": lambda s, t: mse(s.softmax(-1), t.softmax(-1)),
    "kl": lambda s, t: (
        F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True)
        .sum(-1)
        .mean()
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_attention_term(scene, form):
    seen, taught = scene.seen(), scene.taught
    rows = AttentionTerm(layers=MAP, form=form).rows(seen, taught, scene.batch, None)

    def expected(i, n):
        pairs = enumerate(MAP)
        return sum(FORMS[form](scores(seen, s, i, n), scores(taught, t, i, n)) for s, t in pairs)

    torch.testing.assert_close(rows, by_example(scene.batch, expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [4, 8])
def test_relation_term(scene, heads):
    seen, taught = scene.seen(), scene.taught
    rows = RelationTerm(heads=heads).rows(seen, taught, scene.batch, None)

    def relations(states, i, n):
        states = states[-1][i, :, :n].transpose(0, 1).reshape(n, heads, -1).transpose(0, 1)
        return states @ states.mT / math.sqrt(states.shape[-1])

    def expected(i, n):
        kinds = ((getattr(seen, k), getattr(taught, k)) for k in ("query", "key", "value"))
        return sum(FORMS["kl"](relations(s, i, n), relations(t, i, n)) for s, t in kinds)

    torch.testing.assert_close(rows, by_example(scene.batch, expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_prediction_term_trains_like_soft_cross_entropy(scene, temperature, scaled):
    seen, taught = scene.seen(), scene.taught
    term = PredictionTerm(temperature=temperature, scale_by_temperature=scaled)
    rows = term.rows(seen, taught, scene.batch, None)
    target = (taught.logits / temperature).softmax(-1)
    factor = temperature**2 if scaled else 1.0
    soft = -factor * (target * (seen.logits / temperature).log_softmax(-1)).sum(-1)
    entropy = -factor * (target * target.log()).sum(-1)
    torch.testing.assert_close(rows, soft - entropy, atol=1e-5, rtol=1e-4)
    (ours,) = torch.autograd.grad(rows.sum(), seen.logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(soft.sum(), seen.logits)
    torch.testing.assert_close(ours, theirs)


def test_transfer_term_follows_the_student_s_own_domain_layer(scene):
    distillation = scene.distillation([TransferTerm()], weigh_by_expertise=False)
    rows = distillation(scene.batch, scene.taught).rows
    hidden = scene.student.bert(
        **{k: scene.batch[k] for k in ("input_ids", "attention_mask")}
    ).last_hidden_state
    mean = by_example(scene.batch, lambda i, n: hidden[i, :n].mean(0))
    layer = distillation.domain_layer
    corrupted = mean + layer.embedding.weight[scene.batch["domain"]]
    h_d = torch.tanh(corrupted @ layer.dense.weight.T + layer.dense.bias)
    projected = h_d @ distillation.projections["domain"]
    torch.testing.assert_close(rows, (projected - scene.taught.domain).square().mean(-1))


def test_hard_label_term(scene):
    rows = HardLabelTerm().rows(scene.seen(), None, scene.batch, None)
    expected = -scene.seen().logits.log_softmax(-1)[range(4), scene.batch["labels"]]
    torch.testing.assert_close(rows, expected)


# Lambda


def gradient(rows, module):
    grads = torch.autograd.grad(rows.mean(), list(module.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


@every_weighted_term
def test_lambda_multiplies_each_example_of_each_term(scene, name):
    term = LAMBDA_WEIGHTED[name]
    weighted = scene.distillation([term])
    output = weighted(scene.batch, scene.taught)
    weighted.weigh_by_expertise = False
    plain = weighted(scene.batch, scene.taught).rows
    torch.testing.assert_close(output.rows, scene.expertise() * plain)
    torch.testing.assert_close(
        gradient(output.rows, weighted), gradient(scene.expertise() * plain, weighted)
    )
    assert output.terms["expertise"].item() == pytest.approx(scene.expertise().mean().item())
    histogram = output.terms["expertise_histogram"]
    expected = torch.histc(scene.expertise(), len(histogram), 0.0, 1.0) / len(scene.expertise())
    torch.testing.assert_close(histogram, expected)


@every_weighted_term
def test_permuting_t_changes_the_gradient_of_each_term(scene, name):
    distillation = scene.distillation([LAMBDA_WEIGHTED[name]])
    scene.batch["t"] = torch.tensor([0.0, 0.3, 0.6, 0.9])
    permuted = scene.batch | {"t": scene.batch["t"][[2, 3, 1, 0]]}
    one = gradient(distillation(scene.batch, scene.taught).rows, distillation)
    other = gradient(distillation(permuted, scene.taught).rows, distillation)
    assert (one - other).norm() > 1e-3 * one.norm() > 0


def test_hard_labels_stand_outside_lambda(scene):
    distillation = scene.distillation([HardLabelTerm(0.5)])
    rows = distillation(scene.batch, scene.taught).rows
    logits = scene.seen().logits
    expected = 0.5 * F.cross_entropy(logits, scene.batch["labels"], reduction="none")
    torch.testing.assert_close(rows, expected)
    permuted = scene.batch | {"t": scene.batch["t"].flip(0)}
    assert torch.equal(distillation(permuted, scene.taught).rows, rows)


def test_the_objective_is_the_sum_of_its_weighted_terms(scene):
    config = DistillConfig(
        method="meta",
        gamma2=0.3,
        temperature=2.0,
        terms=TermWeights(embedding=0.5, hidden=2.0, attention=0.7, prediction=1.5, hard_label=0.4),
    )
    depths = {"student_layers": STUDENT_LAYERS, "teacher_layers": TEACHER_LAYERS}
    distillation = scene.distillation(build_terms(config, **depths))
    output = distillation(scene.batch, scene.taught)
    seen = distillation._taps(scene.batch)
    seen.domain = distillation.domain_layer(
        by_example(scene.batch, lambda i, n: seen.last_hidden[i, :n].mean(0)),
        scene.batch["domain"],
    )
    w = distillation.projections

    def rows(term, name=None):
        return term.rows(seen, scene.taught, scene.batch, w[name] if name else None)

    inner = 0.5 * rows(EmbeddingTerm(), "embedding") + 2.0 * rows(HiddenTerm(layers=MAP), "hidden")
    inner = inner + 0.7 * rows(AttentionTerm(layers=MAP)) + 0.3 * rows(TransferTerm(), "domain")
    inner = inner + 1.5 * rows(PredictionTerm(temperature=2.0))
    hard = F.cross_entropy(seen.logits, scene.batch["labels"], reduction="none")
    torch.testing.assert_close(output.rows, scene.expertise() * inner + 0.4 * hard)
    parts = [v for k, v in output.terms.items() if k.endswith("_weighted")]
    assert sum(parts).item() == pytest.approx(output.rows.mean().item(), rel=1e-5)
    assert not any(value.requires_grad for value in output.terms.values())


ALL_TERMS = {
    **LAMBDA_WEIGHTED,
    "relation": RelationTerm(heads=4),
    "hard label": HardLabelTerm(),
}


@pytest.mark.parametrize("name", ALL_TERMS)
def test_an_example_does_not_feel_the_others(scene, name):
    distillation = scene.distillation([ALL_TERMS[name]])
    frozen = FrozenTeacher([scene.teacher], distillation.needs | {"logits"})
    rows = distillation(scene.batch, frozen(scene.batch)).rows
    assert rows.shape == (4,)
    changed = scene.batch | {"input_ids": scene.batch["input_ids"].clone()}
    changed["input_ids"][1] = changed["input_ids"][1].flip(0)
    changed["t"] = scene.batch["t"] + torch.tensor([0.0, 0.5, 0.0, 0.0])
    again = distillation(changed, frozen(changed)).rows
    others = [0, 2, 3]
    torch.testing.assert_close(again[others], rows[others])
    assert not torch.isclose(again[1], rows[1], rtol=1e-3)


# Needs


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, {"embedding", "hidden", "query", "key", "logits", "domain"}),
        ({"embedding": 0}, {"hidden", "query", "key", "logits", "domain"}),
        ({"hidden": 0}, {"embedding", "query", "key", "logits", "domain"}),
        ({"attention": 0}, {"embedding", "hidden", "logits", "domain"}),
        ({"prediction": 0}, {"embedding", "hidden", "query", "key", "domain"}),
        ({"gamma2": 0}, {"embedding", "hidden", "query", "key", "logits"}),
        ({"embedding": 0, "hidden": 0, "attention": 0, "gamma2": 0}, {"logits"}),
    ],
)
def test_a_weight_of_zero_switches_a_term_and_its_features_off(scene, changes, needs):
    changes = dict(changes)
    gamma2 = changes.pop("gamma2", 0.2)
    config = DistillConfig(method="meta", gamma2=gamma2, terms=TermWeights(**changes))
    terms = build_terms(config, student_layers=STUDENT_LAYERS, teacher_layers=TEACHER_LAYERS)
    distillation = scene.distillation(terms)
    assert distillation.needs == needs
    seen = vars(distillation._taps(scene.batch))
    collected = {k for k, v in seen.items() if isinstance(v, torch.Tensor) or v} - {
        "mask",
        "logits",
    }
    # h_d is computed from the last hidden state; one attention function sees the values as well.
    allowed = needs | ({"last_hidden"} if "domain" in needs else set())
    allowed |= {"value", "spans"} if "query" in needs else set()
    assert collected == allowed - {"logits", "domain"}
    assert hasattr(distillation, "domain_layer") == (gamma2 > 0)


def test_restrict_trains_one_stage_after_the_other(scene):
    config = DistillConfig(method="meta", schedule="two_stage")
    terms = build_terms(config, student_layers=STUDENT_LAYERS, teacher_layers=TEACHER_LAYERS)
    distillation = scene.distillation(terms)
    parameters = {name: id(p) for name, p in distillation.named_parameters()}

    distillation.restrict([term for term in terms if term.intermediate])
    assert distillation.needs == {"embedding", "hidden", "query", "key", "domain"}
    output = distillation(scene.batch, scene.taught)
    assert {"embedding", "hidden", "attention", "transfer"} < set(output.terms)
    assert "prediction" not in output.terms
    output.rows.mean().backward()
    assert scene.student.classifier.weight.grad is None

    distillation.zero_grad()
    distillation.restrict([term for term in terms if not term.intermediate])
    assert distillation.needs == {"logits"}
    assert scene.student.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in scene.student.modules())
    output = distillation(scene.batch, scene.taught)
    assert set(output.terms) >= {"prediction"}
    assert "hidden" not in output.terms
    output.rows.mean().backward()
    assert scene.student.classifier.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in distillation.projections.parameters())
    # The optimizer's parameters stay what they were.
    assert {name: id(p) for name, p in distillation.named_parameters()} == parameters


# Projections


@pytest.mark.parametrize("name", ["embedding", "hidden", "transfer"])
def test_different_widths_are_projected_and_the_projection_learns(scene, name):
    distillation = scene.distillation([LAMBDA_WEIGHTED[name]])
    (weight,) = distillation.projections.parameters()
    assert weight.shape == (32, 48)
    distillation(scene.batch, scene.taught).rows.mean().backward()
    assert weight.grad.abs().sum() > 0


def test_every_projected_term_has_its_own_projection(scene):
    distillation = scene.distillation(list(LAMBDA_WEIGHTED.values()))
    assert set(distillation.projections.keys()) == {"embedding", "hidden", "domain"}


def test_equal_widths_need_no_projection(tiny_bert, make_batch):
    scene = Scene(tiny_bert, make_batch(), hidden=48)
    distillation = scene.distillation(list(LAMBDA_WEIGHTED.values()))
    assert not list(distillation.projections.parameters())
    assert distillation(scene.batch, scene.taught).rows.isfinite().all()


def test_a_student_like_its_teacher_has_nothing_to_learn(scene):
    scene.student = scene.teacher.model
    terms = [EmbeddingTerm(), HiddenTerm(layers=range(4)), AttentionTerm(layers=range(4))]
    distillation = scene.distillation([*terms, PredictionTerm()])
    rows = distillation(scene.batch, scene.taught).rows
    torch.testing.assert_close(rows, torch.zeros(4), atol=1e-6, rtol=0)


# Methods


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("finetune", ["hard_label"]),
        ("logits_kd", ["prediction"]),
        ("mtn_kd", ["prediction"]),
        ("gated_kd", ["gated"]),
        ("tinybert_kd", ["embedding", "hidden", "attention", "prediction"]),
        ("minilmv2", ["relation", "prediction"]),
        ("meta", ["embedding", "hidden", "attention", "transfer", "prediction"]),
    ],
)
@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_methods_are_selections_of_the_same_terms(method, names, hard):
    config = DistillConfig(method=method, gamma2=0.3, terms=TermWeights(hard_label=hard))
    terms = build_terms(config, student_layers=2, teacher_layers=4)
    expected = names + (["hard_label"] if hard and method != "finetune" else [])
    assert [term.name for term in terms] == expected
    weights = {term.name: term.weight for term in terms}
    assert weights.get("transfer", 0.3) == 0.3
    assert weights.get("hard_label", hard) == (1.0 if method == "finetune" else hard)
    assert all(term.by_expertise != (term.name == "hard_label") for term in terms)


def test_the_settings_reach_the_terms():
    config = DistillConfig(
        method="meta",
        temperature=4.0,
        scale_by_temperature=False,
        attention="kl",
        layer_map=[0, 2],
    )
    terms = {t.name: t for t in build_terms(config, student_layers=2, teacher_layers=4)}
    assert tuple(terms["hidden"].layers) == tuple(terms["attention"].layers) == (0, 2)
    assert terms["attention"].form == "kl"
    prediction = terms["prediction"]
    assert (prediction.temperature, prediction.scale_by_temperature) == (4.0, False)
    assert not prediction.divide_by_classes


def test_fine_tuning_needs_no_teacher(scene):
    terms = build_terms(DistillConfig(method="finetune"), student_layers=2, teacher_layers=2)
    distillation = Distillation(scene.student, terms)
    rows = distillation(scene.batch).rows
    expected = F.cross_entropy(scene.seen().logits, scene.batch["labels"], reduction="none")
    torch.testing.assert_close(rows, expected)


def test_without_expertise_no_t_is_needed(scene):
    config = DistillConfig(method="tinybert_kd")
    terms = build_terms(config, student_layers=STUDENT_LAYERS, teacher_layers=TEACHER_LAYERS)
    distillation = scene.distillation(terms, weigh_by_expertise=False)
    del scene.batch["t"]
    output = distillation(scene.batch, scene.taught)
    assert "expertise" not in output.terms
    for term in terms:
        weighted = output.terms[f"{term.name}_weighted"]
        assert torch.equal(weighted, output.terms[term.name])


# Other forms


@torch.no_grad()
@pytest.mark.parametrize("hidden", [32, 48])
def test_hidden_states_by_their_direction(tiny_bert, make_batch, hidden):
    """Of any length, projected where widths differ; padding does not count."""
    scene = Scene(tiny_bert, make_batch(), hidden=hidden)
    term = HiddenTerm(layers=MAP, form="cosine")
    projection = None if hidden == 48 else torch.randn(32, 48)
    seen, mask = scene.seen(), scene.batch["attention_mask"]
    found = term.rows(seen, scene.taught, scene.batch, projection)
    expected = torch.zeros(4)
    for own, layer in zip(seen.hidden, MAP, strict=True):
        own = own if projection is None else own @ projection
        taught = scene.taught.hidden[layer]
        for row, length in enumerate(mask.sum(1).tolist()):
            pairs = zip(own[row, :length], taught[row, :length])
            cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
            expected[row] += 1 - sum(cosines) / length
    torch.testing.assert_close(found, expected)


# Decoupled KD


def decoupled(student, teacher, labels, **options) -> torch.Tensor:
    seen, taught = (Features(mask=torch.ones(2, 1), logits=x) for x in (student, teacher))
    return DecoupledTerm(**options).rows(seen, taught, {"labels": labels}, None)


def test_decoupled_kd_by_hand():
    """Two texts of three classes; the second has no label, and its teacher chooses class 2."""
    student = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]])
    teacher = torch.tensor([[0.0, 1.0, 0.5], [0.5, 0.0, 3.0]])
    found = decoupled(
        student, teacher, torch.tensor([0, NO_LABEL]), non_target=3.0, temperature=2.0
    )
    for row, target in enumerate((0, 2)):
        own, taught = (logits[row].div(2).softmax(0) for logits in (student, teacher))
        others = [n for n in range(3) if n != target]
        binary = [torch.stack([p[target], p[others].sum()]) for p in (own, taught)]
        within = [p[others] / p[others].sum() for p in (own, taught)]
        kl = [(q * (q / p).log()).sum() for p, q in (binary, within)]
        torch.testing.assert_close(found[row], 4 * (kl[0] + 3 * kl[1]))
        # Weighted by what the teacher leaves the others, their sum is the plain KL.
        plain = (taught * (taught / own).log()).sum()
        torch.testing.assert_close(plain, kl[0] + (1 - taught[target]) * kl[1])


def test_decoupled_kd_of_two_classes_is_the_plain_kl():
    student, teacher = torch.randn(2, 2, 2).unbind()
    found = decoupled(student, teacher, torch.tensor([0, 1]), temperature=3.0)
    wanted = metakd.soft_kl(student, teacher, temperature=3.0, reduction="none")
    torch.testing.assert_close(found, wanted)


def test_decoupled_kd_wants_one_class_a_text():
    config = DistillConfig(method="decoupled_kd")
    with pytest.raises(ValueError, match="a text must have one class"):
        build_terms(config, student_layers=2, teacher_layers=2, task=TASKS["multi_label"])
