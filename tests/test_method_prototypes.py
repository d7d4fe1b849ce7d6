"""Prototypes and their scores: worked cases, rescaling, embedding, files."""

import math
import warnings

import pytest
import torch

from metakd.method.prototypes import FLAT_SCORES, Prototypes, describe_scores, embed
from metakd.models.taps import model_inputs

# Two domains x two classes in the plane, small enough for pencil and paper.
EMBEDDING = torch.tensor(
    [[1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [0.0, -2.0], [-1.0, 0.0], [-3.0, 0.0]]
)
DOMAIN = torch.tensor([0, 0, 1, 0, 1, 1])
LABEL = torch.tensor([0, 0, 0, 1, 1, 1])


def fit(embedding=EMBEDDING, domain=DOMAIN, label=LABEL, num_domains=2, **options):
    return Prototypes.fit(
        embedding, domain, label, num_domains=num_domains, num_classes=2, **options
    )


@pytest.fixture
def corpus():
    """60 examples of 3 domains x 2 classes around a common offset, as encoders give them."""
    domain, label = torch.arange(60) % 3, torch.arange(60) // 3 % 2
    centres = torch.randn(3, 2, 8)
    return centres[domain, label] + torch.randn(60, 8) + 5.0, domain, label


def test_prototypes_are_the_means_of_their_cells():
    fitted = fit()
    expected = [[[0.5, 0.5], [0.0, -2.0]], [[3.0, 4.0], [-2.0, 0.0]]]
    torch.testing.assert_close(fitted.vectors, torch.tensor(expected))
    assert fitted.counts.tolist() == [[2, 1], [1, 2]]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scores_worked_by_hand(alpha):
    zeta = 1 - alpha  # one other domain
    diagonal = 1 / math.sqrt(2)
    expected = [
        alpha * diagonal + zeta * 0.6,  # (1, 0) against (.5, .5) at home and (3, 4)
        alpha * diagonal + zeta * 0.8,
        alpha * 1.0 + zeta * 0.7 * math.sqrt(2),
        alpha * 1.0 + zeta * 0.0,  # a singleton is its own prototype
        alpha * 1.0 + zeta * 0.0,
        alpha * 1.0 + zeta * 0.0,
    ]
    scores = fit(alpha=alpha).score(EMBEDDING, DOMAIN, LABEL)
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_zeta_is_shared_by_the_other_domains_that_have_the_class():
    # Domain 2 knows class 0 only: an example of class 1 has one other domain left, one of class 0
    # two.
    embedding = torch.cat([EMBEDDING, torch.tensor([[0.0, 5.0]])])
    domain, label = torch.cat([DOMAIN, torch.tensor([2])]), torch.cat([LABEL, torch.tensor([0])])
    scores = fit(embedding, domain, label, num_domains=3, alpha=0.4).score(embedding, domain, label)
    assert scores[0].item() == pytest.approx(0.4 / math.sqrt(2) + 0.3 * 0.6 + 0.3 * 0.0)
    assert scores[3].item() == pytest.approx(0.4 * 1.0 + 0.6 * 0.0)
    assert scores[6].item() == pytest.approx(0.4 + 0.3 * (1 / math.sqrt(2)) + 0.3 * 0.8)


def test_an_example_of_a_domain_without_prototypes_scores_against_the_others():
    fitted = fit(num_domains=3, alpha=0.9)
    score = fitted.score(torch.tensor([[1.0, 0.0]]), torch.tensor([2]), torch.tensor([0]))
    assert score.item() == pytest.approx((1 / math.sqrt(2) + 0.6) / 2)


def test_center_subtracts_the_corpus_mean_from_both_sides(corpus):
    embedding, domain, label = corpus
    centered = fit(embedding, domain, label, 3, rescale="center")
    torch.testing.assert_close(centered.center, embedding.mean(0))
    shifted = embedding - embedding.mean(0)
    expected = fit(shifted, domain, label, 3).score(shifted, domain, label)
    scores = centered.score(embedding, domain, label)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    raw = fit(embedding, domain, label, 3).score(embedding, domain, label)
    assert scores.std() > 3 * raw.std()  # what it is for


def test_minmax_fills_the_unit_interval_in_the_same_order(corpus):
    embedding, domain, label = corpus
    raw = fit(embedding, domain, label, 3).score(embedding, domain, label)
    scores = fit(embedding, domain, label, 3, rescale="minmax").score(embedding, domain, label)
    torch.testing.assert_close(scores, (raw - raw.min()) / (raw.max() - raw.min()))
    assert (scores.min().item(), scores.max().item()) == (0.0, pytest.approx(1.0))


def test_zscore_puts_three_deviations_at_the_ends(corpus):
    embedding, domain, label = corpus
    raw = fit(embedding, domain, label, 3).score(embedding, domain, label)
    scores = fit(embedding, domain, label, 3, rescale="zscore").score(embedding, domain, label)
    z = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(scores, (0.5 + z / 6).clamp(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rescale", ["minmax", "zscore"])
def test_new_examples_stay_in_the_unit_interval(corpus, rescale):
    fitted = fit(*corpus, 3, rescale=rescale)
    strangers = torch.cat([-corpus[0][:1], 100 * fitted.vectors[0, :1]])
    scores = fitted.score(strangers, torch.tensor([0, 0]), torch.tensor([0, 0]))
    assert scores[0] == 0.0
    assert scores[1] <= 1.0


@pytest.mark.parametrize("rescale", ["none", "minmax", "zscore"])
def test_identical_examples_give_finite_scores(rescale):
    embedding = torch.ones(4, 3)
    domain, label = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    fitted = fit(embedding, domain, label, rescale=rescale)
    assert fitted.score(embedding, domain, label).isfinite().all()


# The description


def test_flat_scores_are_reported():
    flat = 0.98 + 0.1 * FLAT_SCORES * torch.randn(50)
    with pytest.warns(UserWarning, match=r"nearly constant \(standard deviation 0\.00"):
        describe_scores(flat)
    said = []
    describe_scores(torch.full((5,), 0.97), report=said.append)
    assert len(said) == 1


def test_spread_scores_are_described_in_silence():
    scores = torch.linspace(0, 1, 101)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        described = describe_scores(scores)
    assert described["mean"] == pytest.approx(0.5)
    assert (described["min"], described["max"]) == (0.0, 1.0)
    assert described["std"] == pytest.approx(scores.std(correction=0).item())
    assert sum(described["histogram"]["counts"]) == 101
    assert len(described["histogram"]["edges"]) == 11


# Embedding


def test_embed_is_the_masked_mean_of_the_last_hidden_state(tiny_bert, make_batch):
    model, batches = tiny_bert().bert, [make_batch(rows=3), make_batch(rows=2)]
    expected = []
    for batch in batches:
        hidden = model(**model_inputs(batch, model)).last_hidden_state.detach()
        for row, mask in zip(hidden, batch["attention_mask"].bool(), strict=True):
            expected.append(row[mask].mean(0))
    embedding = embed(model, batches)
    torch.testing.assert_close(embedding, torch.stack(expected))
    assert not embedding.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_embed_ignores_padding(tiny_bert, make_batch):
    model, batch = tiny_bert().bert, make_batch(rows=3)
    padded = {
        name: torch.nn.functional.pad(batch[name], (0, 4), value=value)
        for name, value in (("input_ids", 9), ("attention_mask", 0), ("token_type_ids", 1))
    }
    torch.testing.assert_close(embed(model, [padded]), embed(model, [batch]))


def test_embed_runs_in_eval_mode(tiny_bert, make_batch):
    model, batch = tiny_bert(hidden_dropout_prob=0.5).bert, make_batch()
    expected = embed(model, [batch])
    model.train()
    assert torch.equal(embed(model, [batch]), expected)
    assert not model.training


# Files


@pytest.mark.parametrize("rescale", ["none", "center", "minmax", "zscore"])
def test_saved_prototypes_score_alike(corpus, tmp_path, rescale):
    fitted = fit(*corpus, 3, alpha=0.7, rescale=rescale)
    fitted.save(tmp_path)
    loaded = Prototypes.load(tmp_path)
    assert torch.equal(loaded.score(*corpus), fitted.score(*corpus))
    assert (loaded.alpha, loaded.rescale) == (0.7, rescale)
    assert torch.equal(loaded.counts, fitted.counts)
