"""Schemas, fakes and gradients of the compiled operators, and that `torch.compile` takes the losses
whole."""

import itertools
import math

import pytest
import torch
from oracle import BACKENDS, DEVICE, backend_dtypes

import metakd
from metakd import ops, verify
from metakd.errors import UnsupportedError

DEEP = pytest.mark.deep
# One graph for all sizes needs more than one for each, whose sizes are constants.
static_or_dynamic = pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=DEEP)])
LOSSES = {"soft_kl": 0.0, "soft_reverse_kl": 1.0, "soft_jsd": 0.4}
every_backend = pytest.mark.parametrize(
    ("backend", "dtype"),
    backend_dtypes("soft_kl", dtypes=(torch.float32, torch.bfloat16)),
)


def soft_arguments(dtype, beta, labels, classes=6):
    student = torch.randn(4, classes + 1, dtype=dtype, device=DEVICE)
    teacher = torch.randn(4, classes + 2, dtype=dtype, device=DEVICE)
    mask = label = None
    if labels:
        mask = torch.tensor([True, False, True, True], device=DEVICE)
        label = torch.tensor([0, 1, 2, 3], device=DEVICE)
    return student, teacher, (mask, label, classes, 2.0, 4.0, beta, 0.5)


@every_backend
@pytest.mark.parametrize(
    ("beta", "labels"),
    [
        *((0.0, False), (1.0, True), (0.4, True)),
        *(pytest.param(*case, marks=DEEP) for case in [(0.0, True), (1.0, False), (0.4, False)]),
    ],
)
def test_opcheck(backend, dtype, beta, labels):
    student, teacher, tail = soft_arguments(dtype, beta, labels)
    forward = ops.compiled(backend, "soft_kl_fwd")
    torch.library.opcheck(forward, (student, teacher, *tail))
    torch.library.opcheck(forward, (student.clone().requires_grad_(), teacher, *tail))
    stats = forward(student, teacher, *tail)[1]
    drows = torch.randn(4, device=DEVICE)
    backward = ops.compiled(backend, "soft_kl_bwd")
    torch.library.opcheck(backward, (drows, student, teacher, stats, *tail))
    # It writes into its input, which has no gradient then.
    in_place = ops.compiled(backend, "soft_kl_fwd_bwd_")
    torch.library.opcheck(in_place, (student, teacher, drows, *tail))


@pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("soft_kl", BACKENDS, (torch.float32,))
)
@static_or_dynamic
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_whole(backend, dtype, dynamic, loss):
    """One graph, forward and backward; with dynamic sizes one graph for all of them."""
    torch._dynamo.reset()
    compute = getattr(metakd, loss)

    def step(student, teacher, label, weight):
        return compute(
            student, teacher, temperature=2.0, label=label, weight=weight, backend=backend
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, classes in ((8, 5), (9, 7), (11, 12))[: 3 if dynamic else 1]:
        student = torch.randn(rows, classes, device=DEVICE, requires_grad=True)
        teacher = torch.randn(rows, classes, device=DEVICE)
        label = torch.randint(classes, (rows,), device=DEVICE)
        label[0] = -100
        arguments = (teacher, label, torch.rand(rows, device=DEVICE))
        expected, value = step(student, *arguments), compiled(student, *arguments)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value, student), torch.autograd.grad(expected, student)
        )


def mixture_arguments(rows, teachers, classes, dtype=torch.float32):
    student = torch.randn(rows, classes, dtype=dtype, device=DEVICE)
    teacher = torch.randn(rows, teachers, classes, dtype=dtype, device=DEVICE)
    return student, teacher, torch.randn(rows, teachers, device=DEVICE).softmax(-1)


@pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("mixture_kl", dtypes=(torch.float32, torch.bfloat16))
)
def test_opcheck_of_mixtures(backend, dtype):
    student, teacher, shares = mixture_arguments(4, 3, 6, dtype)
    forward = ops.compiled(backend, "mixture_kl_fwd")
    backward = ops.compiled(backend, "mixture_kl_bwd")
    for mask in (None, torch.tensor([True, False, True, True], device=DEVICE)):
        tail = mask, 2.0, 4.0
        torch.library.opcheck(forward, (student, teacher, shares, *tail))
        stats = forward(student, teacher, shares, *tail)[1]
        drows = torch.randn(4, device=DEVICE)
        torch.library.opcheck(backward, (drows, student, teacher, shares, stats, *tail))
    learning = student.clone().requires_grad_(), teacher, shares.clone().requires_grad_()
    torch.library.opcheck(forward, (*learning, *tail))


@pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("mixture_kl", BACKENDS, (torch.float32,))
)
@static_or_dynamic
def test_compiles_mixtures_whole(backend, dtype, dynamic):
    torch._dynamo.reset()

    def step(student, teacher, shares):
        return metakd.mixture_kl(student, teacher, shares, temperature=2.0, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes in ((8, 3, 5), (9, 4, 7), (11, 5, 12))[: 3 if dynamic else 1]:
        student, teacher, shares = mixture_arguments(*sizes)
        learned = student.requires_grad_(), shares.requires_grad_()
        expected, value = (f(student, teacher, shares) for f in (step, compiled))
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value, learned), torch.autograd.grad(expected, learned)
        )


@every_backend
def test_compiles_a_head_whole(backend, dtype):
    torch._dynamo.reset()

    def step(hidden, head, teacher):
        return metakd.linear_soft_kl(hidden, head, teacher, chunk_bytes=128, backend=backend)

    hidden = torch.randn(20, 4, dtype=dtype, device=DEVICE, requires_grad=True)
    head = torch.randn(9, 4, dtype=dtype, device=DEVICE, requires_grad=True)
    teacher = torch.randn(20, 9, dtype=dtype, device=DEVICE)
    expected = step(hidden, head, teacher)
    value = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, head, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, (hidden, head)), torch.autograd.grad(expected, (hidden, head))
    )


# A graph from its cache knows nothing of fakes that have changed since.
@torch._inductor.config.patch(force_disable_caches=True)
@pytest.mark.parametrize(("backend", "dtype"), backend_dtypes("soft_kl", dtypes=(torch.float32,)))
def test_inductor_takes_it(backend, dtype):
    torch._dynamo.reset()

    def step(student, teacher):
        return metakd.soft_kl(2 * student, teacher, backend=backend).square()

    student = torch.randn(8, 5, dtype=dtype, device=DEVICE, requires_grad=True)
    teacher = torch.randn(8, 5, dtype=dtype, device=DEVICE)
    value = torch.compile(step, fullgraph=True)(student, teacher)
    expected = step(student, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, student), torch.autograd.grad(expected, student)
    )


# The feature losses


def _pairs(dtype, layers=2, learns=False, reach=(None, None)):
    """Queries and keys of student and teacher, masks, reach and scales."""
    lists = [
        [torch.randn(2, 2, 5, size, dtype=dtype, device=DEVICE) for _ in range(layers)]
        for size in (3, 3, 4, 4)
    ]
    for tensor in lists[0] + lists[1]:
        tensor.requires_grad_(learns)
    mask = torch.arange(5, device=DEVICE) < torch.tensor([[5], [3]], device=DEVICE)
    return *lists, mask, mask, *reach, 0.5, 0.4


feature_backends = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("attention_score_mse", dtypes=(torch.float32,))
)


@feature_backends
@pytest.mark.parametrize(
    ("guard", "reach"),
    [
        (1e-5, (None, None)),
        *(
            pytest.param(*case, marks=DEEP)
            for case in [(0.0, (None, None)), (math.inf, (None, 0)), (math.inf, (2, 1))]
        ),
    ],
)
def test_opcheck_of_scores(backend, dtype, guard, reach):
    forward = ops.compiled(backend, "attention_score_mse_fwd")
    for learns in (False, True):
        torch.library.opcheck(forward, (*_pairs(dtype, learns=learns, reach=reach), None, guard))
    pairs = _pairs(dtype, reach=reach)
    heads, gram, tiled = forward(*pairs, None, guard)
    torch.library.opcheck(forward, (*pairs, torch.rand_like(heads), guard))
    backward = ops.compiled(backend, "attention_score_mse_bwd")
    torch.library.opcheck(backward, (torch.randn_like(heads), *pairs, gram, tiled, guard))


@feature_backends
@pytest.mark.parametrize(
    ("squared", "same"),
    [
        (True, False),
        *(
            pytest.param(*case, marks=DEEP)
            for case in [(False, True), (False, False), (True, True)]
        ),
    ],
)
def test_opcheck_of_maps(backend, dtype, squared, same):
    forward = ops.compiled(backend, "attention_map_fwd")
    for learns in (False, True):
        pairs = _pairs(dtype, learns=learns, reach=(None, None) if same else (2, 1))
        if same:
            pairs = pairs[0], pairs[0], pairs[2], pairs[2], *pairs[4:]
        torch.library.opcheck(forward, (*pairs, squared, same))
    pairs = [[x.detach() for x in part] if isinstance(part, list) else part for part in pairs]
    heads, stats = forward(*pairs, squared, same)
    backward = ops.compiled(backend, "attention_map_bwd")
    torch.library.opcheck(backward, (torch.randn_like(heads), *pairs, stats, squared, same))


@feature_backends
def test_opcheck_of_states(backend, dtype):
    forward = ops.compiled(backend, "hidden_mse_fwd")
    mask = torch.arange(5, device=DEVICE) < torch.tensor([[5], [3]], device=DEVICE)
    student, teacher = (
        [torch.randn(2, 5, 6, dtype=dtype, device=DEVICE) for _ in "ab"] for _ in "st"
    )
    for real in (None, mask):
        torch.library.opcheck(forward, (student, teacher, real))
        rows = forward(student, teacher, real)
        backward = ops.compiled(backend, "hidden_mse_bwd")
        torch.library.opcheck(backward, (torch.randn_like(rows), student, teacher, real))
    learning = [x.clone().requires_grad_() for x in student]
    torch.library.opcheck(forward, (learning, teacher, mask))


@pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("masked_mean", dtypes=(torch.float32,))
)
def test_opcheck_of_means_and_weights(backend, dtype):
    mask = torch.arange(5, device=DEVICE) < torch.tensor([[5], [3]], device=DEVICE)
    hidden = torch.randn(2, 5, 6, dtype=dtype, device=DEVICE)
    forward = ops.compiled(backend, "masked_mean_fwd")
    for learns in (False, True):
        torch.library.opcheck(forward, (hidden.clone().requires_grad_(learns), mask))
    backward = ops.compiled(backend, "masked_mean_bwd")
    torch.library.opcheck(backward, (torch.randn(2, 6, device=DEVICE), mask))
    embedding, index = hidden.flatten(0, 1), torch.arange(10, device=DEVICE) % 2
    prototypes = ops.compiled(backend, "class_prototypes")
    torch.library.opcheck(prototypes, (embedding, index, index, 2, 3))
    score = ops.compiled(backend, "prototype_score")
    found = prototypes(embedding, index, index, 2, 3)
    for center in (None, embedding[0].clone()):
        torch.library.opcheck(score, (embedding, *found, index, index, 0.3, center))
    t = score(embedding, *found, index, index, 0.3, None)
    torch.library.opcheck(ops.compiled(backend, "domain_expertise"), (embedding, index, t))


def _stacks():
    """Open sizes are traced through any backend alike, and cost a minute where it is not fused."""
    backends = backend_dtypes("relation_kl", BACKENDS, (torch.float32,))
    for given, dynamic in itertools.product(backends, [False, True]):
        backend = given.values[0]
        quick = dynamic == (backend == "cpp") and backend in ops.NAMESPACES
        yield pytest.param(backend, dynamic, marks=[*given.marks, *([] if quick else [DEEP])])


@pytest.mark.parametrize(("backend", "dynamic"), list(_stacks()))
def test_the_stack_compiles_whole(backend, dynamic):
    """All feature losses in one graph, forward and backward."""
    torch._dynamo.reset()

    def step(hidden, query, key, hidden_t, query_t, key_t, projection, mask):
        options = {"reduction": "none", "backend": backend}
        both = {"query_mask": mask, "key_mask": mask, **options}
        pairs = [(query, key), (key, query)], [(query_t, key_t), (key_t, query_t)]
        rows = metakd.hidden_mse(
            [hidden, 2 * hidden], [hidden_t, hidden_t], projection=projection, mask=mask, **options
        )
        rows = rows + metakd.attention_score_mse(*pairs, form="gram", **both)
        rows = rows + metakd.attention_score_mse(*pairs, causal=True, **both)
        rows = rows + metakd.attention_kl(*pairs, **both)
        rows = rows + metakd.attention_prob_mse(*pairs, window=2, **both)
        rows = rows + metakd.relation_kl(query, query_t, relation_heads=2, mask=mask, **options)
        if ops.why_not("masked_mean", backend, DEVICE) is None:
            rows = rows + metakd.masked_mean(hidden, mask, backend=backend).square().sum(1)
        return rows.mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, length in ((2, 5), (3, 7), (4, 9))[: 3 if dynamic else 1]:
        sizes = [(batch, length, 4), *[(batch, 2, length, 4)] * 2]
        own = [torch.randn(size, device=DEVICE, requires_grad=True) for size in sizes]
        taught = [torch.randn(size, device=DEVICE) for size in sizes]
        projection = torch.randn(4, 4, device=DEVICE, requires_grad=True)
        mask = (
            torch.arange(length, device=DEVICE) < torch.arange(1, batch + 1, device=DEVICE)[:, None]
        )
        arguments = (*own, *taught, projection, mask)
        expected, value = step(*arguments), compiled(*arguments)
        torch.testing.assert_close(value, expected)
        leaves = [*own, projection]
        for mine, wanted in zip(
            torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)
        ):
            torch.testing.assert_close(mine, wanted)


@feature_backends
def test_second_derivatives_are_refused(backend, dtype):
    student, teacher = (torch.randn(2, 5, 6, device=DEVICE) for _ in "st")
    loss = metakd.hidden_mse(student.requires_grad_(), teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_every_backend_says_why_not():
    for op in ops.OPS:
        for backend in ops.IMPLEMENTS:
            for kind in ("cpu", "cuda", "meta"):
                reason = ops.why_not(op, backend, kind)
                if backend == "reference" or (op in ops.IMPLEMENTS["eager"] and backend == "eager"):
                    assert reason is None
                elif reason is not None:
                    assert repr(backend) in reason and kind in reason
                    with pytest.raises(UnsupportedError) as caught:
                        ops.select(op, backend, kind)
                    assert caught.value.cause == reason
    assert ops.why_not("soft_kl", "triton", "cpu", torch.float64) is not None


def test_auto_takes_what_can_run():
    for kind in ("cpu", "cuda", "meta"):
        for dtype in (torch.float32, torch.float64):
            for op in ops.OPS:
                chosen = ops.select(op, "auto", kind, dtype)
                assert ops.why_not(op, chosen, kind, dtype) is None
    assert ops.select("soft_kl", "auto", "meta") == "eager"


def test_a_kernel_that_fails_is_a_finding_and_the_check_goes_on(monkeypatch):
    """The one look at a GPU must not end at the first kernel that does not launch."""
    answers = iter(
        [RuntimeError("out of resource: shared memory\nin a kernel"), NotImplementedError()]
    )

    def check(case, backend, dtype):
        if error := next(answers, None):
            raise error
        return [verify.Finding("rows", 0.0, 0.0, 0.0, 0.0, 0.0)]

    monkeypatch.setattr(verify, "check", check)
    monkeypatch.setattr(ops, "why_not", lambda *_: None)
    case = verify.mean_case((1, 2, 3))
    monkeypatch.setattr(verify, "cases", lambda: [("one", lambda: case), ("two", lambda: case)])
    report = verify.verify(["cpu"], ("cpp",))
    assert [row["passed"] for row in report] == [False, False] + [True] * (len(report) - 2)
    assert report[0]["result"] == "RuntimeError: out of resource: shared memory"
    assert report[1]["result"] == "NotImplementedError: "
    assert len(report) == 2 * len(ops.DTYPES["cpp"])
