"""attention_score_mse on every compiled backend: against float64, forms, masks, the guard."""

import math

import features
import pytest
import torch
from features import LAYOUTS, assert_near, learning, padded, poison, states  # noqa: F401
from oracle import BACKENDS, DEVICE, assert_sensitive, backend_dtypes, check_op, where_parallel

import metakd
from metakd import ops
from metakd.functional.attention import GRAM_GUARD
from metakd.verify import attention_case

OP = "attention_score_mse"
FORMS = ("gram", "tiled")
every_form = pytest.mark.parametrize("form", FORMS)
every_dtype = pytest.mark.parametrize(("backend", "dtype"), backend_dtypes(OP, BACKENDS))
every_backend = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes(OP, BACKENDS, (torch.float32,))
)
every_kernel = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes(OP, dtypes=(torch.float32,))
)


def step(student, teacher, backend, **options):
    return features.step(metakd.attention_score_mse, student, teacher, backend=backend, **options)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_check_can_fail(form, dtype):
    assert_sensitive(attention_case(OP, (4, 2, 40), (8, 12), masked=False, form=form), dtype)


@every_form
@every_dtype
def test_every_dtype(form, backend, dtype):
    check_op(attention_case(OP, (2, 2, 40), layers=2, form=form), backend, dtype)


SIZES = {
    ((1, 1, 1), (1, 1)): "the smallest there is",
    ((2, 3, 7), (4, 4)): "shorter than any tile",
    ((1, 1, 63), (26, 64)): "just under a tile; TinyBERT's and BERT's heads",
    ((1, 1, 64), (16, 16)): "one tile",
    ((2, 1, 65), (64, 64)): "one token more",
    ((1, 1, 130), (32, 32)): "a third tile",
    ((1, 1, 70), (128, 128)): "the widest heads",
    ((1, 1, 40), (17, 3)): "no power of two, and the student's wider",
}


@every_form
@every_backend
@pytest.mark.parametrize(("shape", "sizes"), SIZES)
def test_sizes(form, backend, dtype, shape, sizes):
    check_op(attention_case(OP, shape, sizes, form=form), backend, dtype)


@every_backend
@pytest.mark.parametrize("options", [{"causal": True}, {"scale": 0.3}, {"mean_over": "all"}])
def test_options(backend, dtype, options):
    check_op(attention_case(OP, (2, 1, 70), (8, 16), **options), backend, dtype)


@every_form
@every_kernel
def test_mixed_dtypes(form, backend, dtype):
    student, teacher = states(2, 2, 20, 8, torch.bfloat16), states(2, 2, 20, 16, seed=1)
    found = step(student, teacher, backend, form=form)
    wanted = step(student, teacher, "reference", form=form)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0)
    for mine, expected, own in zip(found[1:], wanted[1:], student):
        assert mine.dtype == torch.bfloat16 and mine.stride() == own.stride()
        torch.testing.assert_close(mine, expected, rtol=1e-2, atol=1e-4)


@every_form
@every_backend
def test_any_strides(form, backend, dtype):
    """Contiguous, offset, expanded over the batch, and with another last dimension."""
    student, teacher = states(3, 2, 9, 4), states(3, 2, 9, 5, seed=1)
    plain = step(student, teacher, backend, form=form)
    for layout in LAYOUTS.values():
        sides = [tuple(map(layout, side)) for side in (student, teacher)]
        assert_near(step(*sides, backend, form=form), plain)
    shared = tuple(x[:1].expand(3, -1, -1, -1) for x in teacher)
    whole = tuple(x.contiguous() for x in shared)
    assert_near(step(student, shared, backend, form=form), step(student, whole, backend, form=form))


@every_form
@every_backend
@pytest.mark.parametrize("padding", [1, 60])
def test_padding_changes_nothing(form, backend, dtype, padding):
    """Whatever the padding holds: one example's rows and gradients stay, bit for bit where as many
    tiles are walked."""
    student, teacher = states(2, 2, 30, 8), states(2, 2, 30, 16, seed=1)
    real = torch.ones(2, 30, dtype=torch.bool, device=DEVICE)
    real[1, 20:] = False
    before = step(student, teacher, backend, form=form, query_mask=real, key_mask=real)

    longer = torch.nn.functional.pad(real, (0, padding))
    sides = [padded(side, padding, math.nan) for side in (student, teacher)]
    after = step(*sides, backend, form=form, query_mask=longer, key_mask=longer)
    torch.testing.assert_close(after[0], before[0], rtol=1e-6, atol=0)
    for mine, expected in zip(after[1:], before[1:]):
        assert torch.equal(mine[:, :, 30:], torch.zeros_like(mine[:, :, 30:]))
        torch.testing.assert_close(mine[:, :, :30], expected, rtol=1e-5, atol=1e-8)


@every_form
@every_backend
def test_query_and_key_masks_of_their_own(form, backend, dtype):
    student, teacher = states(2, 2, 12, 8), states(2, 2, 12, 16, seed=1)
    masks = {
        "query_mask": torch.arange(12, device=DEVICE).remainder(3).ne(0).expand(2, 12),
        "key_mask": (torch.arange(12, device=DEVICE) < 7).expand(2, 12),
    }
    for some in (masks, {"key_mask": masks["key_mask"]}, {"query_mask": masks["query_mask"]}):
        assert_near(
            step(student, teacher, backend, form=form, **some),
            step(student, teacher, "reference", form=form, **some),
        )


@every_form
@every_backend
def test_nan_stays_in_its_head(form, backend, dtype):
    student, teacher = states(3, 2, 9, 4), states(3, 2, 9, 5, seed=1)
    student[0][1, 0, 2, 3] = math.nan
    rows, dquery, dkey = step(student, teacher, backend, form=form)
    assert rows.isnan().tolist() == [False, True, False]
    for gradient in (dquery, dkey):
        heads = gradient.isnan().flatten(2).any(2)
        assert heads.nonzero().tolist() == [[1, 0]]


@every_form
@every_backend
@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4)])
def test_nothing(form, backend, dtype, shape):
    rows, *gradients = step(states(*shape), states(*shape), backend, form=form)
    assert rows.tolist() == [0.0] * shape[0]
    assert all(gradient.shape == torch.Size(shape) for gradient in gradients)


@every_form
@every_backend
def test_an_example_of_padding(form, backend, dtype):
    student, teacher = states(2, 2, 5, 4), states(2, 2, 5, 4, seed=1)
    mask = torch.tensor([[True] * 5, [False] * 5], device=DEVICE)
    rows, *gradients = step(student, teacher, backend, form=form, query_mask=mask, key_mask=mask)
    assert rows[0] > 0 and rows[1] == 0
    assert all(torch.equal(x[1], torch.zeros_like(x[1])) for x in gradients)


@every_backend
def test_heads_that_differ_in_number(backend, dtype):
    student, teacher = states(2, 2, 9, 4), states(2, 3, 9, 4, seed=1)
    for form in FORMS:
        assert_near(
            step(student, teacher, backend, form=form),
            step(student, teacher, "reference", form=form),
        )


# What the Gram form loses, and what guards it


def forward(student, teacher, backend, guard, teacher_norm=None):
    operator = ops.compiled(backend, "attention_score_mse_fwd")
    scales = [side[0].shape[-1] ** -0.5 for side in (student, teacher)]
    lists = [[x] for side in (student, teacher) for x in side]
    return operator(*lists, None, None, None, None, *scales, teacher_norm, guard)


@every_kernel
def test_the_guard_chooses_head_by_head(backend, dtype):
    """A head that agrees to 0.01 % is computed from tiles, its neighbour is not."""
    teacher = states(2, 2, 40, 8)
    student = tuple(x.clone() for x in teacher)
    generator = torch.Generator().manual_seed(3)
    for x in student:
        noise = torch.randn(x.shape, generator=generator).to(DEVICE)
        x[:, 0] += 1e-4 * noise[:, 0]
        x[:, 1] += 0.5 * noise[:, 1]
    heads, gram, tiled = forward(student, teacher, backend, GRAM_GUARD)
    assert tiled.tolist() == [[[True, False], [True, False]]]
    assert gram.shape == (1, 2, 2, 2, 16, 8)
    maps = [(q.double() @ k.double().mT) * 8**-0.5 for q, k in (student, teacher)]
    exact = (maps[0] - maps[1]).square().sum((2, 3))
    torch.testing.assert_close(heads[0].double(), exact, rtol=1e-4, atol=0)
    never = forward(student, teacher, backend, 0.0)
    assert not never[2].any()
    always = forward(student, teacher, backend, math.inf)
    assert always[2].all() and always[1].shape == (1, 2, 2, 2, 0, 8)


@every_backend
def test_auto_is_exact_where_student_and_teacher_agree(backend, dtype):
    """The gradient of a student 0.1 % away is as good as the tiled one."""
    case = attention_case(OP, (1, 1, 257), (16, 16), nearness=1e-3, masked=False)
    for name in case.learned:
        case.tensors[name].copy_(
            case.tensors[f"{name} of teacher"] + 1e-3 * torch.randn_like(case.tensors[name])
        )
    check_op(case, backend, dtype)


@every_backend
def test_auto_takes_tiles_where_student_and_teacher_agree(backend, dtype):
    teacher = states(2, 2, 40, 8)
    student = tuple(x + 1e-4 * torch.randn_like(x) for x in teacher)
    tiled, auto, gram = (
        metakd.attention_score_mse(student, teacher, form=form, reduction="none", backend=backend)
        for form in ("tiled", "auto", "gram")
    )
    torch.testing.assert_close(auto, tiled, rtol=1e-6, atol=0)
    assert ((gram - tiled) / tiled).abs().max() > 1e-4


@every_kernel
def test_teacher_norm_saves_work_and_changes_nothing(backend, dtype):
    student, teacher = states(2, 2, 40, 8), states(2, 2, 40, 16, seed=1)
    mask = torch.arange(40, device=DEVICE) < torch.tensor([[40], [25]], device=DEVICE)
    masks = {"query_mask": mask, "key_mask": mask}
    norm = metakd.attention_score_norm(*teacher, **masks)
    plain = step(student, teacher, backend, form="gram", **masks)
    given = step(student, teacher, backend, form="gram", teacher_norm=norm, **masks)
    for mine, expected in zip(given, plain):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)
    # It is read: another norm gives another loss.
    other = step(student, teacher, backend, form="gram", teacher_norm=2 * norm, **masks)
    assert (other[0] > 1.2 * plain[0]).all()
    # And not of an example that a weight of zero leaves out.
    norm[1] = torch.nan
    weight = torch.tensor([1.0, 0.0], device=DEVICE)
    options = {"form": "gram", "backend": backend, "weight": weight, "reduction": "none", **masks}
    rows = metakd.attention_score_mse(student, teacher, teacher_norm=norm, **options)
    torch.testing.assert_close(rows, metakd.attention_score_mse(student, teacher, **options))


@every_form
@where_parallel("attention_score_mse")
def test_same_bits_every_time(form, backend, dtype):
    student, teacher = states(1, 2, 70, 8), states(1, 2, 70, 16, seed=1)
    first = step(student, teacher, backend, form=form)
    for _ in range(2):
        for mine, expected in zip(step(student, teacher, backend, form=form), first):
            assert torch.equal(mine, expected)


@every_form
@every_backend
def test_layers_are_added(form, backend, dtype):
    students = [states(2, 2, 9, 4, seed=seed) for seed in (0, 1, 2)]
    teachers = [states(2, 2, 9, 5, seed=seed) for seed in (3, 4, 5)]
    owns = [learning(pair) for pair in students]
    options = {"reduction": "none", "backend": backend, "form": form}
    rows = metakd.attention_score_mse(owns, teachers, **options)
    apart = [
        metakd.attention_score_mse(own, taught, **options)
        for own, taught in zip(students, teachers)
    ]
    torch.testing.assert_close(rows.detach(), sum(apart))
    gradients = torch.autograd.grad(rows.sum(), [x for pair in owns for x in pair])
    for layer, (own, taught) in enumerate(zip(students, teachers)):
        alone = learning(own)
        value = metakd.attention_score_mse(alone, taught, **options).sum()
        for mine, expected in zip(gradients[2 * layer :], torch.autograd.grad(value, alone)):
            torch.testing.assert_close(mine, expected)


def test_refusals_of_layers():
    student, teacher = states(2, 2, 9, 4), states(2, 2, 9, 5)
    with pytest.raises(ValueError, match=r"teacher must hold as many layers .*\(2\), got 1"):
        metakd.attention_score_mse([student, student], [teacher])
    with pytest.raises(ValueError, match="at least one layer"):
        metakd.attention_score_mse([], [])
    other = states(2, 2, 9, 6)
    with pytest.raises(ValueError, match=r"student query must have shape \[2, 2, 9, 4\]"):
        metakd.attention_score_mse([student, other], [teacher, teacher])
    with pytest.raises(ValueError, match=r"student key must be torch.float32 in all layers"):
        half = (student[0], student[1].to(torch.bfloat16))
        metakd.attention_score_mse([half], [teacher])
    with pytest.raises(ValueError, match=r"teacher_norm must have shape \[2, 2\]"):
        metakd.attention_score_mse(student, teacher, teacher_norm=torch.ones(3, 2, device=DEVICE))
