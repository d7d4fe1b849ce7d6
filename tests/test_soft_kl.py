"""The softened-logit losses on every backend: against float64, at the edges, in memory."""

import math

import pytest
import torch
from oracle import BACKENDS, DEVICE, assert_sensitive, backend_dtypes, check_op

import metakd
from metakd import ops
from metakd.verify import Case, logit_case

LOSSES = {
    "soft_kl": {},
    "soft_reverse_kl": {},
    "soft_jsd": {"beta": 0.3},
}
FLOATS = (torch.float32,)

DEEP = pytest.mark.deep
every_loss = pytest.mark.parametrize("loss", LOSSES)
every_dtype = pytest.mark.parametrize(("backend", "dtype"), backend_dtypes("soft_kl", BACKENDS))
every_backend = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("soft_kl", BACKENDS, FLOATS)
)
every_kernel = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("soft_kl", dtypes=FLOATS)
)


@pytest.fixture(autouse=True)
def _poison():
    """Fills what ``torch.empty`` gives with NaN, so that nothing unwritten passes."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def case_of(loss: str, shape, **options) -> Case:
    return logit_case(loss, shape, **{**LOSSES[loss], **options})


def spoiled(case: Case, **changes) -> Case:
    """``case`` with some of its tensors replaced by function of the old."""
    tensors = {name: changes.get(name, lambda x: x)(x) for name, x in case.tensors.items()}
    fixed = {name: changes.get(name, lambda x: x)(x) for name, x in case.fixed.items()}
    return Case(case.op, tensors, case.learned, case.options, fixed, case.magnitude)


def assert_near(results: dict, wanted: dict) -> None:
    """Equal but for a few float32 roundings."""
    for name, value in wanted.items():
        size = float(value.abs().max())
        torch.testing.assert_close(results[name], value, rtol=2e-6, atol=1e-6 * size)


# The oracle itself


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 3), (16, 257)])
def test_the_check_can_fail(loss, dtype, shape):
    case = spoiled(case_of(loss, shape), mask=torch.ones_like)
    assert_sensitive(case, dtype)


# Against float64


@every_loss
@every_dtype
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("shape", [(300, 3), (9, 2500)])
def test_every_dtype(loss, backend, dtype, labels, shape):
    check_op(case_of(loss, shape, labels=labels), backend, dtype)


SIZES = {
    (1, 1): "one class: always 0",
    (7, 2): "the smallest task",
    (33, 5): "more rows than a tile",
    (5, 16): "one vector of the CPU",
    (5, 17): "and one more",
    (9, 24): "the most classes for which C++ puts rows side by side",
    (9, 25): "one more",
    (4, 255): "just under a block",
    (4, 1025): "one more than a power of two",
    (4, 2048): "the longest row that Triton holds in a tile",
    (4, 2049): "one element in a second block",
    (3, 4096): "whole blocks",
    (3, 4097): "and one element",
    (3, 5003): "a ragged tail",
    (2, 30522): "BERT's vocabulary: rows without 16-byte alignment in half precision",
}


@every_loss
@every_backend
@pytest.mark.parametrize("shape", SIZES)
def test_sizes(loss, backend, dtype, shape):
    check_op(case_of(loss, shape), backend, dtype)


@every_loss
@every_backend
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("scaled", [True, False])
def test_temperatures(loss, backend, dtype, temperature, scaled):
    for shape in ((16, 4), (4, 2500)):
        case = case_of(loss, shape, temperature=temperature, scale_by_temperature=scaled)
        check_op(case, backend, dtype)


@every_loss
@every_backend
@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=DEEP) for seed in (1, 2))])
def test_one_class_with_nearly_everything(loss, backend, dtype, temperature, seed):
    """There g is large and g - inner nearly nothing."""
    for shape in ((64, 3), (16, 300), (4, 2500)):
        case = case_of(loss, shape, temperature=temperature, labels=False, seed=seed)
        check_op(case, backend, dtype)


@every_loss
@every_backend
@pytest.mark.parametrize("spread", [0.01, 40.0])
def test_nearly_equal_and_far_apart(loss, backend, dtype, spread):
    for shape in ((16, 4), (4, 2500)):
        check_op(case_of(loss, shape, spread=spread, temperature=1.0), backend, dtype)


@every_backend
@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.5, 0.999, 1.0])
def test_mixtures(backend, dtype, beta):
    for shape in ((16, 4), (4, 2500)):
        check_op(case_of("soft_jsd", shape, beta=beta), backend, dtype)


@every_loss
@every_backend
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str
)
def test_mixed_dtypes(loss, backend, dtype, dtypes):
    """Student and teacher may differ: as both in float32, from the quantised values."""
    for shape in ((40, 3), (4, 2500)):
        case = case_of(loss, shape).moved(DEVICE)
        mixed = spoiled(case, student=lambda x: x.to(dtypes[0]), teacher=lambda x: x.to(dtypes[1]))
        results, wanted = mixed.results(backend), mixed.quantised(dtype).results(backend)
        torch.testing.assert_close(results["rows"], wanted["rows"], rtol=2e-6, atol=2e-6)
        gradient, exact = results["d student"], wanted["d student"].to(dtypes[0])
        assert gradient.dtype == dtypes[0]
        torch.testing.assert_close(gradient, exact, rtol=2 * torch.finfo(dtypes[0]).eps, atol=1e-6)


# Layouts


@every_loss
@every_backend
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 2500)])
def test_layouts(loss, backend, dtype, shape):
    """Offsets, gaps between rows, turned and expanded tensors: all as their contiguous copies."""
    case = case_of(loss, shape).moved(DEVICE).quantised(dtype)
    plain = case.results(backend)
    wide = torch.full((*shape[:-1], shape[-1] + 3), math.nan, dtype=dtype, device=DEVICE)

    def embedded(x):
        # columns 1.. of wider rows: an offset and a row stride
        room = wide.clone()
        room[..., 1 : shape[-1] + 1] = x
        return room[..., 1 : shape[-1] + 1]

    def turned(x):
        return x.mT.contiguous().mT

    for layout in (embedded, turned):
        # A kernel may cut rows where memory is aligned and so sum in another order.
        assert_near(spoiled(case, student=layout, teacher=layout).results(backend), plain)


@every_loss
@every_backend
def test_one_teacher_row_for_all(loss, backend, dtype):
    case = case_of(loss, (6, 50))
    case = spoiled(case, teacher=lambda x: x[:1].expand(6, 50))
    check_op(case, backend, dtype)


@every_loss
@every_backend
@pytest.mark.parametrize("classes", [5, 2100])
def test_padded_vocabularies(loss, backend, dtype, classes):
    """Classes beyond vocab_size count nothing, whatever they hold, and get no gradient."""
    case = case_of(loss, (6, classes)).moved(DEVICE).quantised(dtype)
    plain = case.results(backend)

    def padded(extra):
        def pad(x):
            return torch.cat([x, x.new_full((len(x), extra), math.nan)], 1)

        return pad

    options = {**case.options, "vocab_size": classes}
    wide = spoiled(case, student=padded(2), teacher=padded(9))
    wide = Case(wide.op, wide.tensors, wide.learned, options, wide.fixed)
    results = wide.results(backend)
    assert results["d student"][:, classes:].eq(0).all()
    results["d student"] = results["d student"][:, :classes]
    assert_near(results, plain)


# Edges


@every_loss
@every_backend
@pytest.mark.parametrize("classes", [6, 2100])
def test_masked_classes(loss, backend, dtype, classes):
    """-inf in both, and where the other side weighs nothing, is the exact limit."""
    case = case_of(loss, (5, classes), labels=False)

    def wall(x):
        x = x.clone()
        x[:, 1::3] = -math.inf
        return x

    check_op(spoiled(case, student=wall, teacher=wall), backend, dtype)
    weighing = "teacher" if loss == "soft_kl" else "student"
    if loss == "soft_jsd":
        check_op(spoiled(case, teacher=wall), backend, dtype)
    check_op(spoiled(case, **{weighing: wall}), backend, dtype)


@every_backend
@pytest.mark.parametrize("classes", [6, 2100])
def test_without_mass_at_the_students_maximum(backend, dtype, classes):
    case = case_of("soft_jsd", (5, classes), temperature=0.5, labels=False)
    top = case.tensors["student"].argmax(1, keepdim=True)
    check_op(spoiled(case, teacher=lambda x: x.scatter(1, top, -math.inf)), backend, dtype)


@every_loss
@every_backend
@pytest.mark.parametrize("classes", [6, 2100])
def test_equal_maxima(loss, backend, dtype, classes):
    def doubled(x):
        x = x.clone()
        x[:, 1::2] = x.amax(1, keepdim=True)
        return x

    case = case_of(loss, (5, classes), temperature=0.05, labels=False)
    check_op(spoiled(case, student=doubled), backend, dtype)


@every_loss
@every_backend
@pytest.mark.parametrize("classes", [6, 2100])
def test_nan_stays_in_its_row(loss, backend, dtype, classes):
    for side in ("student", "teacher"):
        for value in (math.nan, math.inf, -math.inf):
            case = case_of(loss, (5, classes), labels=False).moved(DEVICE).quantised(dtype)
            case = spoiled(case, mask=torch.ones_like)

            def poison(x, value=value):
                x = x.clone()
                x[2] = value if value == -math.inf else x[2]
                x[2, classes // 2] = value
                return x

            rows = spoiled(case, **{side: poison}).results(backend)["rows"]
            assert rows.isnan().tolist() == [False, False, True, False, False], (side, value)


@every_loss
@every_backend
@pytest.mark.parametrize("classes", [6, 2100])
def test_masked_rows_are_never_looked_at(loss, backend, dtype, classes):
    student = torch.randn(4, classes, device=DEVICE)
    teacher = torch.randn(4, classes, device=DEVICE)
    label = torch.tensor([1, 2, 3, 4], device=DEVICE)
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    results = []
    for value in (0.0, math.nan, math.inf):
        student[1] = teacher[1] = value
        label[1] = -100 if math.isnan(value) else 10**9
        label[3] = -100  # ignored by its label, not by the mask
        weight = torch.tensor([1.0, value, 2.0, 3.0], device=DEVICE)
        own = student.clone().requires_grad_()
        rows = getattr(metakd, loss)(
            own,
            teacher,
            label=label,
            mask=mask,
            weight=weight,
            reduction="none",
            backend=backend,
            **LOSSES[loss],
        )
        results.append((rows, *torch.autograd.grad(rows.sum(), own)))
        for result in results[-1]:
            assert result[[1, 3]].eq(0).all() and result.isfinite().all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@every_loss
@every_backend
def test_nothing_real(loss, backend, dtype):
    for shape, mask in (
        ((0, 5), None),
        ((3, 5), torch.zeros(3, dtype=torch.bool)),
        ((0, 2000), None),
    ):
        student = torch.randn(shape, device=DEVICE, requires_grad=True)
        mask = None if mask is None else mask.to(DEVICE)
        loss_value = getattr(metakd, loss)(
            student, torch.randn(shape, device=DEVICE), mask=mask, backend=backend, **LOSSES[loss]
        )
        assert loss_value.item() == 0
        (gradient,) = torch.autograd.grad(loss_value, student)
        assert gradient.shape == shape and gradient.eq(0).all()


@every_loss
@every_backend
def test_backward_twice_and_expanded_upstream(loss, backend, dtype):
    student = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    rows = getattr(metakd, loss)(
        student,
        torch.randn(5, 40, device=DEVICE),
        reduction="none",
        backend=backend,
        **LOSSES[loss],
    )
    first, again = (torch.autograd.grad(rows.sum(), student, retain_graph=True)[0] for _ in "12")
    (ones,) = torch.autograd.grad(rows, student, torch.ones_like(rows))
    assert torch.equal(first, again) and torch.equal(first, ones)


@every_loss
@every_kernel
@pytest.mark.parametrize("classes", [7, 2500])
def test_gradient_in_place_is_the_gradient(loss, backend, dtype, classes):
    """soft_kl_fwd_bwd_, the chunked head's kernel, against forward and backward."""
    case = case_of(loss, (6, classes)).moved(DEVICE)
    student, teacher = (x.to(dtype) for x in case.tensors.values())
    beta = {"soft_kl": 0.0, "soft_reverse_kl": 1.0}.get(loss, 0.3)
    label = case.fixed["label"].clamp(max=classes - 2)
    tail = (case.fixed["mask"], label, classes - 1, 2.0, 4.0, beta, 0.5)
    drows = torch.randn(6, device=DEVICE)
    rows, stats = ops.compiled(backend, "soft_kl_fwd")(student, teacher, *tail)
    wanted = ops.compiled(backend, "soft_kl_bwd")(drows, student, teacher, stats, *tail)
    buffer = student.clone()
    own = ops.compiled(backend, "soft_kl_fwd_bwd_")(buffer, teacher, drows, *tail)
    torch.testing.assert_close(own, rows)
    torch.testing.assert_close(buffer, wanted, rtol=1e-5, atol=1e-6)
    assert buffer[:, -1].eq(0).all()


@every_loss
@every_backend
def test_same_bits_again(loss, backend, dtype):
    case = case_of(loss, (40, 5000) if DEVICE == "cuda" else (4, 300)).moved(DEVICE)
    case = case.quantised(dtype)
    first = case.results(backend)
    for _ in range(1000 if DEVICE == "cuda" else 2):
        assert all(torch.equal(value, case.results(backend)[name]) for name, value in first.items())


@pytest.mark.gpu
@every_loss
@every_dtype
def test_rows_beyond_two_to_the_31(loss, backend, dtype):
    """The last row of a matrix of more than 2^31 elements."""
    if dtype.itemsize > 2:
        pytest.skip("needs three such matrices at once")
    classes = 131072
    count = 2**31 // classes + 2
    student = torch.zeros(count, classes, dtype=dtype, device=DEVICE)
    teacher = torch.zeros(count, classes, dtype=dtype, device=DEVICE)
    last = logit_case(loss, (2, classes), labels=False).tensors
    student[-2:], teacher[-2:] = (x.to(DEVICE, dtype) for x in last.values())
    mask = torch.zeros(count, dtype=torch.bool, device=DEVICE)
    mask[-2:] = True
    student.requires_grad_()
    compute = getattr(metakd, loss)
    rows = compute(student, teacher, mask=mask, reduction="none", backend=backend, **LOSSES[loss])
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    small = student.detach()[-2:].clone().requires_grad_()
    wanted = compute(small, teacher[-2:], reduction="none", backend=backend, **LOSSES[loss])
    assert torch.equal(rows[-2:], wanted)
    assert torch.equal(gradient[-2:], torch.autograd.grad(wanted.sum(), small)[0])
    assert gradient[:-2].abs().amax(1).eq(0).all()


# Arguments of the door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": torch.tensor([0, 5])}, r"label must lie in 0\.\.2, got 5"),
        ({"label": torch.tensor([0, -1])}, r"label must lie in 0\.\.2, got -1"),
        ({"label": torch.tensor([0.0, 1.0])}, "label must be int64"),
        ({"label": torch.tensor([0, 1]), "hard_weight": -1.0}, r"hard_weight .*-1\.0"),
        ({"vocab_size": 4}, r"vocab_size must be an integer in 1\.\.3, got 4"),
        ({"vocab_size": 0}, r"vocab_size must be an integer in 1\.\.3, got 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        metakd.soft_kl(torch.zeros(2, 3), torch.zeros(2, 3), **options)
    with pytest.raises(ValueError, match=r"vocab_size is needed .*\(3, 4\)"):
        metakd.soft_kl(torch.zeros(2, 3), torch.zeros(2, 4))


def test_hard_labels_are_pytorchs_cross_entropy():
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    label = torch.tensor([0, 4, -1, 2, 1, -1])
    options = {"label": label, "ignore_index": -1, "temperature": 3.0}
    soft = metakd.soft_kl(student, teacher, hard_weight=0.0, **options)
    both = metakd.soft_kl(student, teacher, hard_weight=0.7, **options)
    hard = torch.nn.functional.cross_entropy(student, label, ignore_index=-1)
    torch.testing.assert_close(both, soft + 0.7 * hard)
    kept = label != -1
    torch.testing.assert_close(soft, metakd.soft_kl(student[kept], teacher[kept], temperature=3.0))


def test_double_backward_is_refused():
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    if ops.why_not("soft_kl", "cpp", "cpu") is not None:
        pytest.skip(ops.why_not("soft_kl", "cpp", "cpu"))
    loss = metakd.soft_kl(student, torch.randn(3, 4, dtype=torch.float64), backend="cpp")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.sum().backward()
