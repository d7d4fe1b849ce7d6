"""attention_kl, attention_prob_mse and relation_kl on every compiled backend."""

import math

import features
import pytest
import torch
from features import LAYOUTS, assert_near, padded, poison, states  # noqa: F401
from oracle import BACKENDS, DEVICE, assert_sensitive, backend_dtypes, check_op, where_parallel

import metakd
from metakd.verify import attention_case, relation_case

LOSSES = ("attention_kl", "attention_prob_mse")
every_loss = pytest.mark.parametrize("loss", LOSSES)
every_dtype = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("attention_kl", BACKENDS)
)
every_backend = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("attention_kl", BACKENDS, (torch.float32,))
)


def step(loss, student, teacher, backend, **options):
    return features.step(getattr(metakd, loss), student, teacher, backend=backend, **options)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_check_can_fail(loss, dtype):
    assert_sensitive(attention_case(loss, (4, 2, 20), (8, 12), masked=False), dtype)


def test_the_check_of_relations_can_fail():
    case = relation_case((4, 2, 20), 8, 4)
    case.fixed["mask"][:] = True
    assert_sensitive(case, torch.float32)


@every_loss
@every_dtype
def test_every_dtype(loss, backend, dtype):
    check_op(attention_case(loss, (2, 1, 40), layers=2), backend, dtype)


@every_dtype
def test_relations_in_every_dtype(backend, dtype):
    check_op(relation_case((1, 2, 40), 24, 3, layers=2), backend, dtype)


SIZES = {
    ((1, 1, 1), (1, 1)): "the smallest there is: every map is 1",
    ((2, 3, 7), (4, 4)): "shorter than any tile",
    ((1, 1, 63), (26, 64)): "just under a tile; TinyBERT's and BERT's heads",
    ((1, 1, 64), (16, 16)): "one tile",
    ((2, 1, 65), (64, 64)): "one token more",
    ((1, 1, 130), (32, 32)): "a third tile",
    ((1, 1, 70), (128, 128)): "the widest heads",
    ((1, 1, 40), (17, 3)): "no power of two, and the student's wider",
}


@every_loss
@every_backend
@pytest.mark.parametrize(("shape", "sizes"), SIZES)
def test_sizes(loss, backend, dtype, shape, sizes):
    check_op(attention_case(loss, shape, sizes), backend, dtype)


@every_loss
@every_backend
@pytest.mark.parametrize("options", [{"causal": True}, {"scale": 0.3}, {"mean_over": "all"}])
def test_options(loss, backend, dtype, options):
    check_op(attention_case(loss, (1, 1, 70), (8, 16), **options), backend, dtype)


@every_loss
@every_backend
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_flat_and_peaked_maps(loss, backend, dtype, scale):
    check_op(attention_case(loss, (2, 2, 20), (8, 8), scale=scale, masked=False), backend, dtype)


@every_loss
@every_backend
def test_nearly_equal(loss, backend, dtype):
    """Small losses come out as small numbers, not as differences of large ones."""
    case = attention_case(loss, (2, 2, 20), (8, 8), nearness=1e-3)
    check_op(case, backend, dtype)
    own, taught = (
        [(given["query 0" + side], given["key 0" + side])]
        for given, side in ((case.tensors, ""), (case.tensors, " of teacher"))
    )
    sides = [[tuple(x.float().to(DEVICE) for x in pair) for pair in side] for side in (own, taught)]
    exact = getattr(metakd, loss)(own, taught, backend="reference", reduction="none")
    rows = getattr(metakd, loss)(*sides, backend=backend, reduction="none")
    torch.testing.assert_close(rows.double().cpu(), exact, rtol=0.02, atol=1e-8)


@every_loss
@every_backend
def test_mixed_dtypes(loss, backend, dtype):
    student, teacher = states(2, 2, 20, 8, torch.bfloat16), states(2, 2, 20, 16, seed=1)
    found = step(loss, student, teacher, backend)
    wanted = step(loss, student, teacher, "reference")
    assert_near(found[:1], wanted[:1])
    for mine, own in zip(found[1:], student):
        assert mine.dtype == torch.bfloat16 and mine.stride() == own.stride()
    assert_near(found[1:], wanted[1:], rtol=1e-2, atol=1e-5)


@every_loss
@every_backend
def test_any_strides(loss, backend, dtype):
    student, teacher = states(3, 2, 9, 4), states(3, 2, 9, 5, seed=1)
    plain = step(loss, student, teacher, backend)
    for layout in LAYOUTS.values():
        sides = [tuple(map(layout, side)) for side in (student, teacher)]
        assert_near(step(loss, *sides, backend), plain)
    shared = tuple(x[:1].expand(3, -1, -1, -1) for x in teacher)
    whole = tuple(x.contiguous() for x in shared)
    assert_near(step(loss, student, shared, backend), step(loss, student, whole, backend))


@every_loss
@every_backend
@pytest.mark.parametrize("padding", [1, 60])
def test_padding_changes_nothing(loss, backend, dtype, padding):
    student, teacher = states(2, 2, 30, 8), states(2, 2, 30, 16, seed=1)
    real = torch.ones(2, 30, dtype=torch.bool, device=DEVICE)
    real[1, 20:] = False
    before = step(loss, student, teacher, backend, query_mask=real, key_mask=real)
    longer = torch.nn.functional.pad(real, (0, padding))
    sides = [padded(side, padding, math.nan) for side in (student, teacher)]
    after = step(loss, *sides, backend, query_mask=longer, key_mask=longer)
    assert_near(after[:1], before[:1])
    for mine, expected in zip(after[1:], before[1:]):
        assert torch.equal(mine[:, :, 30:], torch.zeros_like(mine[:, :, 30:]))
        torch.testing.assert_close(mine[:, :, :30], expected, rtol=1e-5, atol=1e-8)


@every_loss
@every_backend
@pytest.mark.parametrize("causal", [False, True])
def test_query_and_key_masks_of_their_own(loss, backend, dtype, causal):
    """With causality, the first queries see no key at all."""
    student, teacher = states(2, 2, 12, 8), states(2, 2, 12, 16, seed=1)
    masks = {
        "query_mask": torch.arange(12, device=DEVICE).remainder(3).ne(0).expand(2, 12),
        "key_mask": (torch.arange(12, device=DEVICE) > 4).expand(2, 12),
    }
    for some in (masks, {"key_mask": masks["key_mask"]}, {"query_mask": masks["query_mask"]}):
        assert_near(
            step(loss, student, teacher, backend, causal=causal, **some),
            step(loss, student, teacher, "reference", causal=causal, **some),
        )


@every_loss
@every_backend
def test_nan_stays_in_its_head(loss, backend, dtype):
    student, teacher = states(3, 2, 9, 4), states(3, 2, 9, 5, seed=1)
    student[0][1, 0, 2, 3] = math.nan
    rows, *gradients = step(loss, student, teacher, backend)
    assert rows.isnan().tolist() == [False, True, False]
    for gradient in gradients:
        assert gradient.isnan().flatten(2).any(2).nonzero().tolist() == [[1, 0]]


@every_loss
@every_backend
@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4)])
def test_nothing(loss, backend, dtype, shape):
    rows, *gradients = step(loss, states(*shape), states(*shape), backend)
    assert rows.tolist() == [0.0] * shape[0]
    assert all(gradient.shape == torch.Size(shape) for gradient in gradients)


@every_loss
@every_backend
def test_an_example_of_padding(loss, backend, dtype):
    student, teacher = states(2, 2, 5, 4), states(2, 2, 5, 4, seed=1)
    mask = torch.tensor([[True] * 5, [False] * 5], device=DEVICE)
    rows, *gradients = step(loss, student, teacher, backend, query_mask=mask, key_mask=mask)
    assert rows[0] > 0 and rows[1] == 0
    assert all(torch.equal(x[1], torch.zeros_like(x[1])) for x in gradients)


@every_loss
@where_parallel("attention_kl")
def test_same_bits_every_time(loss, backend, dtype):
    student, teacher = states(1, 2, 70, 8), states(1, 2, 70, 16, seed=1)
    first = step(loss, student, teacher, backend)
    for _ in range(2):
        for mine, expected in zip(step(loss, student, teacher, backend), first):
            assert torch.equal(mine, expected)


@every_loss
@every_backend
def test_memory_does_not_grow_with_the_square_of_length(loss, backend, dtype):
    """What is kept for the backward: inputs and three numbers a query."""
    student, teacher = states(1, 1, 200, 4), states(1, 1, 200, 4, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        getattr(metakd, loss)(tuple(x.requires_grad_() for x in student), teacher, backend=backend)
    assert kept and max(kept) <= 200 * 4


@every_backend
def test_relations_are_added_over_states(backend, dtype):
    students = [features.learning(states(2, 2, 9, 6, seed=seed))[0] for seed in (0, 1, 2)]
    teachers = [states(2, 4, 9, 6, seed=seed)[0] for seed in (3, 4, 5)]
    options = {"relation_heads": 3, "backend": backend, "reduction": "none"}
    rows = metakd.relation_kl(students, teachers, **options)
    apart = [metakd.relation_kl(own, taught, **options) for own, taught in zip(students, teachers)]
    assert_near([rows.detach()], [sum(apart).detach()])
    assert_near(
        torch.autograd.grad(rows.sum(), students), torch.autograd.grad(sum(apart).sum(), students)
    )
