"""mixture_kl on every backend: against float64, at the edges, in memory."""

import math

import pytest
import torch
from features import poison  # noqa: F401
from oracle import BACKENDS, DEVICE, assert_sensitive, backend_dtypes, check_op

import metakd
from metakd.verify import Case, mixture_case

every_dtype = pytest.mark.parametrize(("backend", "dtype"), backend_dtypes("mixture_kl", BACKENDS))
every_backend = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("mixture_kl", BACKENDS, (torch.float32,))
)
every_kernel = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("mixture_kl", dtypes=(torch.float32,))
)
# Rows side by side in C++, and one block of Triton's; one row at a time, in several blocks.
both_widths = pytest.mark.parametrize("classes", [6, 2100])


def spoiled(case: Case, **changes) -> Case:
    """``case`` with some of its tensors replaced by function of the old."""
    tensors = {name: changes.get(name, lambda x: x)(x) for name, x in case.tensors.items()}
    fixed = {name: changes.get(name, lambda x: x)(x) for name, x in case.fixed.items()}
    return Case(case.op, tensors, case.learned, case.options, fixed, case.magnitude)


def single(classes: int, dtype, rows: int = 5) -> Case:
    """Two teachers, all rows real, in one dtype."""
    case = spoiled(mixture_case((rows, 2, classes)), mask=torch.ones_like)
    return case.moved(DEVICE).quantised(dtype)


def assert_near(results: dict, wanted: dict) -> None:
    """Equal but for a few float32 roundings."""
    for name, value in wanted.items():
        size = float(value.abs().max())
        torch.testing.assert_close(results[name], value, rtol=2e-6, atol=1e-6 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 3, 3), (16, 2, 257)])
def test_the_check_can_fail(dtype, shape):
    assert_sensitive(spoiled(mixture_case(shape), mask=torch.ones_like), dtype)


# Against float64


@every_dtype
@pytest.mark.parametrize("shape", [(300, 3, 3), (9, 3, 2500)])
def test_every_dtype(backend, dtype, shape):
    check_op(mixture_case(shape), backend, dtype)


SIZES = {
    (1, 1, 1): "one class: always 0",
    (7, 2, 2): "the smallest task",
    (33, 3, 5): "more rows than a vector has lanes",
    (9, 4, 24): "the most classes for which C++ puts rows side by side",
    (9, 4, 25): "one more",
    (4, 3, 512): "a piece of a row in C++",
    (4, 3, 513): "and one class more",
    (4, 2, 1024): "a block of Triton's",
    (4, 2, 1025): "and one class more",
    (3, 1, 5003): "one teacher",
    (2, 17, 300): "more teachers than anybody has",
    (5, 33, 3): "in narrow rows, too",
    (2, 3, 30522): "BERT's vocabulary: rows without 16-byte alignment in half precision",
}


@every_backend
@pytest.mark.parametrize("shape", SIZES)
def test_sizes(backend, dtype, shape):
    check_op(mixture_case(shape), backend, dtype)


@every_backend
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("scaled", [True, False])
def test_temperatures(backend, dtype, temperature, scaled):
    for shape in ((16, 3, 4), (4, 3, 2500)):
        check_op(mixture_case(shape, temperature, scale_by_temperature=scaled), backend, dtype)


@every_backend
@pytest.mark.parametrize(("spread", "nearness"), [(0.01, 0.5), (40.0, 0.5), (3.0, 1e-4)])
def test_nearly_equal_and_far_apart(backend, dtype, spread, nearness):
    for shape in ((16, 3, 4), (4, 3, 2500)):
        check_op(mixture_case(shape, 1.0, spread, nearness), backend, dtype)


@every_backend
def test_mixed_dtypes(backend, dtype):
    """Each may have its own: as all in float32, from the quantised values."""
    dtypes = {"student": torch.bfloat16, "teacher": torch.float16, "shares": torch.float32}
    for shape in ((40, 3, 3), (4, 3, 2500)):
        case = mixture_case(shape).moved(DEVICE)
        mixed = spoiled(case, **{name: lambda x, to=to: x.to(to) for name, to in dtypes.items()})
        results, wanted = mixed.results(backend), mixed.quantised(dtype).results(backend)
        torch.testing.assert_close(results["rows"], wanted["rows"], rtol=2e-6, atol=2e-6)
        for name in ("student", "shares"):
            found, exact = results[f"d {name}"], wanted[f"d {name}"].to(dtypes[name])
            eps = torch.finfo(dtypes[name]).eps
            torch.testing.assert_close(found, exact, rtol=2 * eps, atol=1e-6)


@every_backend
@both_widths
def test_shares_are_free_numbers(backend, dtype, classes):
    """Of any sum, which their gradient takes for granted."""
    case = mixture_case((9, 3, classes))
    check_op(spoiled(case, shares=lambda x: 3 * x), backend, dtype)
    check_op(spoiled(case, shares=torch.zeros_like), backend, dtype)


@every_backend
@both_widths
def test_one_teacher_is_soft_kl(backend, dtype, classes):
    case = spoiled(mixture_case((9, 1, classes)), shares=torch.ones_like)
    case = case.moved(DEVICE).quantised(dtype)
    tensors = {"student": case.tensors["student"], "teacher": case.tensors["teacher"][:, 0]}
    alone = Case("soft_kl", tensors, ("student",), case.options, case.fixed)
    results, wanted = case.results(backend), alone.results(backend)
    assert_near({name: results[name] for name in wanted}, wanted)


@every_backend
@both_widths
def test_agreement_but_for_a_constant_is_exactly_nothing(backend, dtype, classes):
    """With one teacher, and with one who is listened to."""
    # Multiples of 1/8, which an added constant does not round.
    student = (torch.randn(5, classes) * 16).round().to(DEVICE) / 8
    other = torch.randn(5, classes, device=DEVICE)
    for teachers, shares in (([student + 4], [1.0]), ([other, student + 4], [0.0, 1.0])):
        rows = metakd.mixture_kl(
            student,
            torch.stack(teachers, 1),
            torch.tensor([shares], device=DEVICE).expand(5, -1),
            reduction="none",
            backend=backend,
        )
        assert rows.eq(0).all()


# Layouts


@every_backend
@pytest.mark.parametrize("shape", [(3, 5, 2, 7), (2, 3, 2, 2100)])
def test_layouts(backend, dtype, shape):
    """Offsets, gaps between rows, turned tensors: all as their contiguous copies."""
    case = mixture_case(shape).moved(DEVICE).quantised(dtype)
    plain = case.results(backend)

    def embedded(x):
        # columns 1.. of wider rows: an offset and a row stride
        return torch.nn.functional.pad(x, (1, 2), value=math.nan)[..., 1:-2]

    layouts = {
        "embedded": embedded,
        "turned": lambda x: x.mT.contiguous().mT,
        "teachers outside": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    }
    for layout in layouts.values():
        spread = spoiled(case, student=layout, teacher=layout, shares=layout)
        assert_near(spread.results(backend), plain)


@every_backend
@both_widths
def test_what_all_rows_share(backend, dtype, classes):
    """Expanded teachers and shares, as where a text has many classes of its own."""
    case = mixture_case((6, 3, classes))
    case = spoiled(
        case,
        teacher=lambda x: x[:1].expand(6, 3, classes),
        shares=lambda x: x[-1:].expand(6, 3),
    )
    check_op(case, backend, dtype)


# Edges


@every_backend
@both_widths
def test_classes_without_mass(backend, dtype, classes):
    """-inf of all, of every teacher, and of one: the exact limit."""

    def wall(x):
        x = x.clone()
        x[..., 1::3] = -math.inf
        return x

    def partly(x):
        x = x.clone()
        x[:, 0, 1::3] = x[:, 1, ::3] = -math.inf
        return x

    case = mixture_case((5, 3, classes))
    check_op(spoiled(case, student=wall, teacher=wall), backend, dtype)
    check_op(spoiled(case, teacher=wall), backend, dtype)
    check_op(spoiled(case, teacher=partly), backend, dtype)


@every_backend
@both_widths
def test_who_is_not_heard(backend, dtype, classes):
    """A share of 0 is no part: neither its mass where the student has none, nor its gradient."""
    case = single(classes, dtype)
    own, told, shares = (x.clone() for x in case.tensors.values())
    own[:, 1] = told[:, 1, 1] = -math.inf
    shares[:] = torch.tensor([0.0, 1.0])
    case = spoiled(case, student=lambda _: own, teacher=lambda _: told, shares=lambda _: shares)
    results = case.results(backend)
    assert all(value.isfinite().all() for value in results.values())
    assert results["d shares"][:, 0].eq(0).all() and results["d shares"][:, 1].ne(0).all()
    check_op(case, backend, dtype)
    shares[:, 0] = 1e-6  # who has mass where the student has none
    assert case.results(backend)["rows"].eq(math.inf).all()


@every_backend
@both_widths
def test_hardly_anybody_is_heard(backend, dtype, classes):
    """Shares far below what a float32 can add to 1, alone where nobody else has mass."""
    case = mixture_case((5, 2, classes))

    def apart(x):
        x = x.clone()
        x[:, 0, ::2] = x[:, 1, 1::2] = -math.inf
        return x

    for share in (1e-12, 1e-30):
        tiny = torch.tensor([[share, 1.0]], dtype=torch.float64).expand(5, 2)
        check_op(spoiled(case, teacher=apart, shares=lambda _, x=tiny: x), backend, dtype)


@every_backend
@both_widths
def test_nan_stays_in_its_row(backend, dtype, classes):
    """Of whom nobody listens to, too."""
    heard = [False, False, True, False, False]

    def rows_with(at, side, value, **changes):
        def spoil(x):
            x = x.clone()
            x[2] = value if value == -math.inf else x[2]
            x[at] = value
            return x

        case = spoiled(single(classes, dtype), **changes)
        return spoiled(case, **{side: spoil}).results(backend)["rows"].isnan().tolist()

    for value in (math.nan, math.inf, -math.inf):
        assert rows_with((2, classes // 2), "student", value) == heard, value
        assert rows_with((2, 1, classes // 2), "teacher", value) == heard, value
    first = {"shares": lambda x: torch.tensor([[1.0, 0.0]]).to(x).expand(5, 2)}
    assert rows_with((2, 1, classes // 2), "teacher", math.nan, **first) == heard
    for value in (math.nan, -0.5):
        assert rows_with((2, 1), "shares", value) == heard, value


@every_backend
@both_widths
def test_masked_rows_are_never_looked_at(backend, dtype, classes):
    case = single(classes, dtype, rows=4)
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    results = []
    for value in (0.0, math.nan, math.inf, -math.inf):
        given = {name: x.clone() for name, x in case.tensors.items()}
        for x in given.values():
            x[1] = value
        own, shares = (given[name].requires_grad_() for name in ("student", "shares"))
        weight = torch.tensor([1.0, value, 0.0, 3.0], device=DEVICE)
        rows = metakd.mixture_kl(
            own, given["teacher"], shares, mask=mask, weight=weight, reduction="none",
            backend=backend,
        )  # fmt: skip
        results.append((rows, *torch.autograd.grad(rows.sum(), (own, shares))))
        for result in results[-1]:
            assert result[[1, 2]].eq(0).all() and result.isfinite().all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@every_backend
def test_nothing_real(backend, dtype):
    for rows, classes, mask in ((0, 5, None), (3, 5, [False] * 3), (0, 2000, None)):
        student = torch.randn(rows, classes, device=DEVICE, requires_grad=True)
        shares = torch.full((rows, 2), 0.5, device=DEVICE, requires_grad=True)
        told = torch.randn(rows, 2, classes, device=DEVICE)
        mask = None if mask is None else torch.tensor(mask, device=DEVICE)
        loss = metakd.mixture_kl(student, told, shares, mask=mask, backend=backend)
        assert loss.item() == 0
        for x, gradient in zip((student, shares), torch.autograd.grad(loss, (student, shares))):
            assert gradient.shape == x.shape and gradient.eq(0).all()


@every_backend
def test_backward_twice_and_expanded_upstream(backend, dtype):
    case = single(40, dtype)
    own, told, shares = (x.requires_grad_(name != "teacher") for name, x in case.tensors.items())
    rows = metakd.mixture_kl(own, told, shares, reduction="none", backend=backend)
    first, again = (torch.autograd.grad(rows.sum(), (own, shares), retain_graph=True) for _ in "12")
    ones = torch.autograd.grad(rows, (own, shares), torch.ones_like(rows))
    for one, two, three in zip(first, again, ones):
        assert torch.equal(one, two) and torch.equal(one, three)


@every_backend
@both_widths
def test_same_bits_again(backend, dtype, classes):
    case = mixture_case((40, 3, classes) if DEVICE == "cuda" else (4, 3, classes))
    case = case.moved(DEVICE).quantised(dtype)
    first = case.results(backend)
    for _ in range(1000 if DEVICE == "cuda" else 2):
        assert all(torch.equal(value, case.results(backend)[name]) for name, value in first.items())


@every_kernel
def test_nothing_of_the_classes_is_kept(backend, dtype):
    """For the backward: what was given, and two numbers of a row and three of each teacher."""
    case = single(2100, dtype)
    own, told, shares = (x.requires_grad_(name != "teacher") for name, x in case.tensors.items())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        metakd.mixture_kl(own, told, shares, reduction="none", backend=backend)
    given = {x.data_ptr() for x in (own, told, shares)}
    new = [x.numel() for x in kept if x.data_ptr() not in given]
    assert new == [(2 + 3 * 2) * len(own)]
