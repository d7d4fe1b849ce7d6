"""hidden_mse and masked_mean on every compiled backend."""

import math

import pytest
import torch
from features import assert_near, learning, poison  # noqa: F401
from oracle import BACKENDS, DEVICE, assert_sensitive, backend_dtypes, check_op, where_parallel

import metakd
from metakd.verify import hidden_case, mean_case

every_dtype = pytest.mark.parametrize(("backend", "dtype"), backend_dtypes("hidden_mse", BACKENDS))
every_backend = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("hidden_mse", BACKENDS, (torch.float32,))
)
every_mean_dtype = pytest.mark.parametrize(("backend", "dtype"), backend_dtypes("masked_mean"))
every_mean = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("masked_mean", dtypes=(torch.float32,))
)


def layers(count, *shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(count)]


def step(student, teacher, backend, **options):
    own = learning(student)
    rows = metakd.hidden_mse(own, teacher, reduction="none", backend=backend, **options)
    upstream = torch.linspace(-1, 2, len(rows), device=DEVICE, dtype=rows.dtype)
    return rows.detach(), *torch.autograd.grad(rows, own, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_check_can_fail(dtype):
    case = hidden_case((4, 6, 20))
    case.fixed["mask"][:] = True
    assert_sensitive(case, dtype)
    case = mean_case((4, 6, 20))
    case.fixed["mask"][:] = True
    assert_sensitive(case, dtype)


@every_dtype
@pytest.mark.parametrize("projected", [0, 40])
def test_every_dtype(backend, dtype, projected):
    check_op(hidden_case((3, 37, 72), 3, projected), backend, dtype)


SIZES = {
    (1, 1, 1): "the smallest there is",
    (2, 3, 7): "rows that are not aligned",
    (5, 1, 64): "one token",
    (3, 130, 16): "more tokens than a block",
    (2, 5, 1030): "wide rows with a ragged end",
    (40, 4, 312): "TinyBERT's width, many examples",
}


@every_backend
@pytest.mark.parametrize("shape", SIZES)
def test_sizes(backend, dtype, shape):
    check_op(hidden_case(shape, 2), backend, dtype)


@every_backend
@pytest.mark.parametrize("count", [1, 5, 17, 33])
def test_numbers_of_layers(backend, dtype, count):
    check_op(hidden_case((2, 3, 7), count), backend, dtype)


@every_backend
def test_mixed_dtypes(backend, dtype):
    student = layers(2, 3, 9, 24, dtype=torch.bfloat16)
    teacher = layers(2, 3, 9, 24, seed=1)
    found, wanted = (step(student, teacher, which) for which in (backend, "reference"))
    assert all(x.dtype == torch.bfloat16 for x in found[1:])
    assert_near(found[:1], wanted[:1])
    assert_near(found[1:], wanted[1:], rtol=1e-2)


@every_backend
def test_widths_that_differ_by_layer(backend, dtype):
    student = layers(2, 3, 9, 24) + layers(1, 3, 9, 10)
    teacher = layers(2, 3, 9, 24, seed=1) + layers(1, 3, 9, 10, seed=2)
    order = [0, 2, 1]
    sides = [[side[layer] for layer in order] for side in (student, teacher)]
    assert_near(step(*sides, backend), step(*sides, "reference"))


@every_backend
def test_any_strides(backend, dtype):
    student, teacher = layers(3, 4, 9, 24), layers(3, 4, 9, 24, seed=1)
    plain = step(student, teacher, backend)
    layouts = {
        "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "offset": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
        "last dimension apart": lambda x: x.mT.contiguous().mT,
    }
    for layout in layouts.values():
        assert_near(step([*map(layout, student)], [*map(layout, teacher)], backend), plain)
    mixed = [student[0], layouts["offset"](student[1]), layouts["batch inside"](student[2])]
    assert_near(step(mixed, teacher, backend), plain)


@every_backend
def test_masked_tokens_have_no_effect(backend, dtype):
    student, teacher = layers(2, 3, 9, 24), layers(2, 3, 9, 24, seed=1)
    mask = torch.arange(9, device=DEVICE) < torch.tensor([[9], [4], [0]], device=DEVICE)
    plain = step(student, teacher, backend, mask=mask)
    assert plain[0][2] == 0
    for side in (student, teacher):
        for x in side:
            x[~mask] = math.nan
    spoiled = step(student, teacher, backend, mask=mask)
    for mine, expected in zip(spoiled, plain):
        assert torch.equal(mine, expected)
    for gradient in spoiled[1:]:
        assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


@every_backend
def test_padding_changes_nothing(backend, dtype):
    student, teacher = layers(2, 3, 9, 24), layers(2, 3, 9, 24, seed=1)
    mask = torch.ones(3, 9, dtype=torch.bool, device=DEVICE)
    rows, *gradients = step(student, teacher, backend, mask=mask)
    longer = [
        [torch.nn.functional.pad(x, (0, 0, 0, 5)) for x in side] for side in (student, teacher)
    ]
    found, *others = step(*longer, backend, mask=torch.nn.functional.pad(mask, (0, 5)))
    assert_near([found], [rows], atol=0)
    assert_near([x[:, :9] for x in others], gradients, atol=0)


@every_backend
def test_nan_stays_in_its_example(backend, dtype):
    student, teacher = layers(2, 3, 9, 24), layers(2, 3, 9, 24, seed=1)
    teacher[1][1, 2, 3] = math.nan
    rows, *gradients = step(student, teacher, backend)
    assert rows.isnan().tolist() == [False, True, False]
    assert not gradients[0].isnan().any() and int(gradients[1].isnan().sum()) == 1


@every_backend
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)])
def test_nothing(backend, dtype, shape):
    rows, *gradients = step(layers(2, *shape), layers(2, *shape), backend)
    assert rows.tolist() == [0.0] * shape[0]
    assert all(gradient.shape == torch.Size(shape) for gradient in gradients)


@where_parallel("hidden_mse")
def test_same_bits_every_time(backend, dtype):
    student, teacher = layers(3, 2, 40, 33), layers(3, 2, 40, 33, seed=1)
    first = step(student, teacher, backend)
    for _ in range(2):
        for mine, expected in zip(step(student, teacher, backend), first):
            assert torch.equal(mine, expected)


# The mean over tokens


@every_mean_dtype
@pytest.mark.parametrize("shape", [(3, 37, 72), (1, 1, 1), (2, 300, 7), (40, 4, 312)])
def test_mean_in_every_dtype(backend, dtype, shape):
    check_op(mean_case(shape), backend, dtype)


@every_mean
def test_mean_of_real_tokens(backend, dtype):
    (hidden,) = layers(1, 3, 9, 24)
    mask = torch.arange(9, device=DEVICE) < torch.tensor([[9], [4], [0]], device=DEVICE)
    hidden[~mask] = math.nan
    own = hidden.requires_grad_()
    mean = metakd.masked_mean(own, mask, backend=backend)
    assert_near([mean[0].detach(), mean[1].detach()], [own[0].mean(0), own[1, :4].mean(0)])
    assert torch.equal(mean[2], torch.zeros_like(mean[2]))
    (gradient,) = torch.autograd.grad(mean.sum(), own)  # an expanded upstream gradient
    expected = mask[..., None] / mask.sum(1).clamp(min=1)[:, None, None]
    assert_near([gradient], [expected.expand_as(gradient).to(gradient)])


@every_mean
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)])
def test_mean_of_nothing(backend, dtype, shape):
    (hidden,) = layers(1, *shape)
    mask = torch.ones(shape[:2], dtype=torch.bool, device=DEVICE)
    own = hidden.requires_grad_()
    mean = metakd.masked_mean(own, mask, backend=backend)
    assert torch.equal(mean, torch.zeros(shape[0], 4, device=DEVICE))
    assert torch.autograd.grad(mean.sum(), own)[0].shape == torch.Size(shape)
