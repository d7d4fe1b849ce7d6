"""The attention losses against plain maps, hand-computed cases and each other."""

import math

import pytest
import torch
from losses import pair
from torch.nn import functional as F

import metakd
from metakd import reference

FORMS = ["gram", "tiled"]


def sides(heads_s=2, heads_t=2, length=7, sizes=(3, 5), batch=3, dtype=torch.float64):
    def rand(_, heads, __, size):
        return torch.randn(batch, heads, length, size, dtype=dtype)

    return pair(rand, heads_s, sizes[0]), pair(rand, heads_t, sizes[1])


def scores(side):
    query, key = side
    return query @ key.mT / math.sqrt(query.shape[-1])


def left_aligned(lengths, length):
    return torch.arange(length) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("form", FORMS)
def test_score_mse_by_hand(form):
    """One head, D = 1: scores [[2, 4], [6, 12]] against 0; with the second token padding only 2 is
    left."""
    student = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1), torch.tensor([2.0, 4.0]).view(1, 1, 2, 1)
    teacher = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)
    mask = torch.tensor([[1, 0]])
    assert metakd.attention_score_mse(student, teacher, form=form).item() == (4 + 16 + 36 + 144) / 4
    options = {"query_mask": mask, "key_mask": mask, "form": form}
    assert metakd.attention_score_mse(student, teacher, **options).item() == 4
    assert metakd.attention_score_mse(student, teacher, **options, mean_over="all").item() == 1
    assert metakd.attention_score_mse(student, teacher, scale=0.5, form=form).item() == 50 / 4


def test_causal_by_hand():
    student = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1), torch.tensor([2.0, 4.0]).view(1, 1, 2, 1)
    teacher = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)
    loss = metakd.attention_score_mse(student, teacher, causal=True)
    assert loss.item() == pytest.approx((4 + 36 + 144) / 3)
    with pytest.raises(ValueError, match=r"form .*'gram'"):
        metakd.attention_score_mse(student, teacher, causal=True, form="gram")
    # The first query sees one key on both sides; the second: softmax(6, 12) against (1/2, 1/2).
    p = torch.tensor([6.0, 12.0]).softmax(0)
    kl = (0.5 * (0.5 / p).log()).sum() / 2
    torch.testing.assert_close(metakd.attention_kl(student, teacher, causal=True), kl)
    gap = (p - 0.5).square().sum() / 3
    torch.testing.assert_close(metakd.attention_prob_mse(student, teacher, causal=True), gap)


@pytest.mark.parametrize("form", FORMS)
def test_score_mse_is_tinyberts(form):
    """Their rule: additive -10000 on padded keys, where(score <= -1e2, 0), plain mean."""
    student, teacher = sides()
    mask = left_aligned([7, 4, 1], 7)
    wall = -10000.0 * (~mask)[:, None, None, :]
    maps = [torch.where(s + wall <= -1e2, 0.0, s + wall) for s in map(scores, (student, teacher))]
    loss = metakd.attention_score_mse(student, teacher, key_mask=mask, mean_over="all", form=form)
    torch.testing.assert_close(loss, F.mse_loss(*maps))


@pytest.mark.parametrize("heads", [(2, 2), (2, 4)], ids=["head to head", "mean of heads"])
@pytest.mark.parametrize("masked", [False, True])
def test_gram_equals_tiles(heads, masked, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_TILE", 4)
    student, teacher = sides(*heads, length=10)
    masks = {}
    if masked:
        masks = {
            "query_mask": left_aligned([10, 6, 0], 10),
            "key_mask": left_aligned([9, 3, 0], 10),
        }
    results = []
    for form in FORMS:
        own = [tensor.clone().requires_grad_() for tensor in student]
        options = {"form": form, "reduction": "none", "backend": "reference"}
        rows = metakd.attention_score_mse(tuple(own), teacher, **options, **masks)
        weighted = (rows * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)).sum()
        results.append((rows, *torch.autograd.grad(weighted, own)))
    for gram, tiled in zip(*results):
        torch.testing.assert_close(gram, tiled)


@pytest.mark.parametrize(
    "view", [{}, {"causal": True}, {"window": 3}, {"window": 0}, {"window": 2, "causal": True}]
)
@pytest.mark.parametrize("loss", ["attention_score_mse", "attention_kl", "attention_prob_mse"])
def test_tile_size_changes_nothing(loss, view, monkeypatch):
    student, teacher = sides(length=10)
    masks = {"query_mask": left_aligned([10, 6, 3], 10), "key_mask": left_aligned([10, 6, 3], 10)}
    own = [tensor.requires_grad_() for tensor in student]
    results = []
    for tile in (100, 4):
        monkeypatch.setattr(reference, "QUERY_TILE", tile)
        value = getattr(metakd, loss)(tuple(own), teacher, backend="reference", **view, **masks)
        results.append((value, *torch.autograd.grad(value, own)))
    for whole, tiled in zip(*results):
        torch.testing.assert_close(whole, tiled)


@pytest.mark.parametrize("loss", ["attention_score_mse", "attention_kl"])
def test_tiles_keep_no_whole_map(loss, monkeypatch):
    """All that is saved for the backward is smaller than one L x L map."""
    monkeypatch.setattr(reference, "QUERY_TILE", 8)
    student, teacher = sides(1, 1, length=64, batch=1)
    own = tuple(tensor.requires_grad_() for tensor in student)
    options = {"form": "tiled"} if loss == "attention_score_mse" else {}
    options["backend"] = "reference"
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = getattr(metakd, loss)(own, teacher, **options)
    assert value.requires_grad and 0 < sum(saved.values()) < 64 * 64


@pytest.mark.parametrize(
    ("length", "width", "expected"), [(255, 64, False), (256, 90, True), (512, 1080, False)]
)
def test_form_follows_the_length(length, width, expected):
    assert reference.prefers_gram(length, width) is expected


@pytest.mark.parametrize("heads", [(2, 2), (2, 3)], ids=["head to head", "mean of heads"])
def test_maps_against_plain_softmax(heads):
    student, teacher = sides(*heads)
    mask = left_aligned([7, 4, 2], 7)
    masks = {"query_mask": mask, "key_mask": mask}
    maps = [
        scores(side).masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1)
        for side in (student, teacher)
    ]
    raw = [scores(side) for side in (student, teacher)]
    if heads[0] != heads[1]:
        maps, raw = ([side.mean(1, keepdim=True) for side in kind] for kind in (maps, raw))
    real = (mask[:, None, :, None] & mask[:, None, None, :]).double()
    pairs, queries = real.sum((1, 2, 3)), mask.sum(1)
    count = maps[0].shape[1]
    kl = torch.where(real > 0, maps[1] * (maps[1].log() - maps[0].log()), 0.0).sum((1, 2, 3))
    expected = {
        "attention_score_mse": ((raw[0] - raw[1]) ** 2 * real).sum((1, 2, 3)) / (count * pairs),
        "attention_prob_mse": ((maps[0] - maps[1]) ** 2 * real).sum((1, 2, 3)) / (count * pairs),
        "attention_kl": kl / (count * queries),
    }
    for loss, rows in expected.items():
        torch.testing.assert_close(
            getattr(metakd, loss)(student, teacher, **masks, reduction="none"), rows
        )
    whole = metakd.attention_kl(student, teacher, **masks, mean_over="all", reduction="none")
    torch.testing.assert_close(whole, kl / (count * 7))


@pytest.mark.parametrize("loss", ["attention_kl", "attention_prob_mse"])
def test_queries_that_see_no_key_are_left_out(loss):
    """Left padding with a causal mask: the first queries see nothing but padding."""
    student, teacher = sides(length=5)
    keys = ~left_aligned([2, 2, 2], 5)
    own = tuple(tensor.requires_grad_() for tensor in student)
    value = getattr(metakd, loss)(own, teacher, key_mask=keys, causal=True)
    short = [tuple(tensor[:, :, 2:] for tensor in side) for side in (own, teacher)]
    torch.testing.assert_close(value, getattr(metakd, loss)(*short, causal=True))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, own))


@pytest.mark.parametrize("heads", [1, 3, 7])
def test_masked_queries_are_exactly_zero_under_mean_maps(heads):
    """Means of uniform maps are uniform only up to rounding: masked queries are cut, not summed."""
    student, teacher = sides(heads, 2)
    nobody = torch.zeros(3, 7, dtype=torch.bool)
    for loss in (reference.attention_kl, reference.attention_prob_mse):
        assert loss(student, teacher, query_mask=nobody).eq(0).all()


def test_example_without_keys_is_a_masked_row():
    student, teacher = sides()
    keys = left_aligned([0, 4, 7], 7)
    options = {"query_mask": torch.ones_like(keys), "key_mask": keys}
    rows = metakd.attention_kl(student, teacher, **options, reduction="none")
    assert rows[0] == 0
    torch.testing.assert_close(metakd.attention_kl(student, teacher, **options), rows[1:].mean())


def test_relation_kl_regroups_heads():
    """R relation heads over heads laid side by side: the first takes the first A * D / R
    features."""
    student, teacher = torch.randn(2, 2, 5, 3), torch.randn(2, 3, 5, 4)
    maps = []
    for states in (student, teacher):
        flat = torch.cat(list(states.unbind(1)), -1)
        maps.append(
            [(part @ part.mT / math.sqrt(part.shape[-1])).softmax(-1) for part in flat.chunk(3, -1)]
        )
    terms = [(t * (t / s).log()).sum(-1).mean(-1) for s, t in zip(*maps)]
    rows = metakd.relation_kl(student, teacher, relation_heads=3, reduction="none")
    torch.testing.assert_close(rows, torch.stack(terms).mean(0))


@pytest.mark.parametrize("form", FORMS)
def test_equal_sides_give_zero(form):
    student, _ = sides()
    assert metakd.attention_score_mse(student, student, form=form).abs() < 1e-12
    assert metakd.attention_kl(student, student) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((2, 2, 7, 3), (2, 2, 6, 3), {}, r"teacher query .*\[2, A_t, 7, D_t\].*\[2, 2, 6, 3\]"),
        ((2, 2, 7, 3), (3, 2, 7, 3), {}, "teacher query"),
        ((2, 2, 7, 0), (2, 2, 7, 3), {}, r"student query .*\[2, 2, 7, 0\]"),
        ((2, 7, 3), (2, 2, 7, 3), {}, r"student query .*\[2, 7, 3\]"),
        ((2, 2, 7, 3), (2, 2, 7, 3), {"scale": -1.0}, r"scale .* -1\.0"),
        ((2, 2, 7, 3), (2, 2, 7, 3), {"mean_over": "some"}, "mean_over .*'some'"),
        ((2, 2, 7, 3), (2, 2, 7, 3), {"form": "flash"}, "form .*'flash'"),
    ],
)
def test_refusals(student, teacher, options, message):
    student, teacher = ((torch.zeros(shape), torch.zeros(shape)) for shape in (student, teacher))
    with pytest.raises(ValueError, match=message):
        metakd.attention_score_mse(student, teacher, **options)


def test_refusals_of_structure():
    states = torch.zeros(2, 2, 7, 3)
    with pytest.raises(ValueError, match=r"student must be a pair \(query, key\)"):
        metakd.attention_kl(states, (states, states))
    with pytest.raises(ValueError, match=r"student key .*\[2, 2, 7, 3\].*\[2, 2, 6, 3\]"):
        metakd.attention_kl((states, states[:, :, 1:]), (states, states))
    with pytest.raises(ValueError, match=r"relation_heads .* 6, got 4"):
        metakd.relation_kl(states, states, relation_heads=4)
    with pytest.raises(ValueError, match=r"relation_heads .* 0"):
        metakd.relation_kl(states, states, relation_heads=0)
