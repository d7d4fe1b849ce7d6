"""Schemas, fakes and gradients of the compiled operators, and that `torch.compile` takes the losses
whole."""

import pytest
import torch
from oracle import COMPILED, DEVICE, backend_dtypes

import metakd
from metakd import ops
from metakd.errors import UnsupportedError

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
@pytest.mark.parametrize("beta", LOSSES.values())
@pytest.mark.parametrize("labels", [False, True])
def test_opcheck(backend, dtype, beta, labels):
    student, teacher, tail = soft_arguments(dtype, beta, labels)
    forward = ops.compiled(backend, "soft_kl_fwd").default
    torch.library.opcheck(forward, (student, teacher, *tail))
    torch.library.opcheck(forward, (student.clone().requires_grad_(), teacher, *tail))
    stats = forward(student, teacher, *tail)[1]
    drows = torch.randn(4, device=DEVICE)
    backward = ops.compiled(backend, "soft_kl_bwd").default
    torch.library.opcheck(backward, (drows, student, teacher, stats, *tail))
    # It writes into its input, which has no gradient then.
    in_place = ops.compiled(backend, "soft_kl_fwd_bwd_").default
    torch.library.opcheck(in_place, (student, teacher, drows, *tail))


@pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("soft_kl", ("reference", *COMPILED), (torch.float32,))
)
@pytest.mark.parametrize("dynamic", [False, True])
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


@every_backend
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


def test_every_backend_says_why_not():
    for op in ops.OPS:
        for backend in ops.IMPLEMENTS:
            for kind in ("cpu", "cuda", "meta"):
                reason = ops.why_not(op, backend, kind)
                if backend == "reference":
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
    assert ops.select("soft_kl", "auto", "meta") == "reference"
    assert ops.select("hidden_mse", "auto", "cpu") == "reference"
