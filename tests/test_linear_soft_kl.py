"""The chunked head: equal to whole logits, in bounded memory, for any reduction."""

from functools import partial

import pytest
import torch
from oracle import DEVICE, assert_sensitive, backend_dtypes, check_op
from torch._subclasses.fake_tensor import FakeTensorMode

import metakd
from metakd.errors import UnsupportedError
from metakd.functional import soft
from metakd.verify import head_case

DIVERGENCES = {
    "kl": ("soft_kl", {}),
    "reverse_kl": ("soft_reverse_kl", {}),
    "jsd": ("soft_jsd", {"beta": 0.3}),
}
BACKENDS = ("reference", "eager", "cpp", "triton")

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_backend = pytest.mark.parametrize(
    ("backend", "dtype"),
    backend_dtypes("linear_soft_kl", BACKENDS, (torch.float32,)),
)


def problem(dtype=torch.float64):
    """Hidden states [2, 5, 4] and [2, 5, 6], heads of 7 and 9 classes of which 6 count."""
    rand = lambda *shape: torch.randn(shape, dtype=dtype, device=DEVICE)  # noqa: E731
    learned = [rand(2, 5, 4), rand(7, 4), rand(7)]
    fixed = [rand(2, 5, 6), rand(9, 6), rand(9)]
    mask = torch.rand(2, 5, device=DEVICE) > 0.2
    label = torch.randint(6, (2, 5), device=DEVICE)
    label[0, 0] = -100
    return [x.requires_grad_() for x in learned], fixed, mask, label


@every_divergence
@pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("linear_soft_kl", BACKENDS, (torch.float32, torch.float64))
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_bytes", [1, 200, 1 << 20])
def test_equals_whole_logits(divergence, backend, dtype, reduction, chunk_bytes):
    (hidden, head, bias), (hidden_t, head_t, bias_t), mask, label = problem(dtype)
    loss, extra = DIVERGENCES[divergence]
    options = {
        "temperature": 2.0,
        "mask": mask,
        "label": label,
        "hard_weight": 0.7,
        "weight": torch.rand(2, 5, dtype=dtype, device=DEVICE),
        "vocab_size": 6,
        "reduction": reduction,
        **extra,
    }
    whole = getattr(metakd, loss)(
        hidden @ head.T + bias, hidden_t @ head_t.T + bias_t, backend="reference", **options
    )
    chunked = metakd.linear_soft_kl(
        *(hidden, head, hidden_t, head_t),
        bias=bias,
        teacher_bias=bias_t,
        divergence=divergence,
        chunk_bytes=chunk_bytes,
        backend=backend,
        **options,
    )
    torch.testing.assert_close(chunked, whole)
    upstream = torch.rand_like(whole)
    learned = (hidden, head, bias)
    for own, wanted in zip(
        torch.autograd.grad(chunked, learned, upstream, retain_graph=True),
        torch.autograd.grad(whole, learned, upstream),
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)
    again = torch.autograd.grad(chunked, learned, upstream)
    assert all(torch.isfinite(gradient).all() for gradient in again)


@every_divergence
@pytest.mark.parametrize(("backend", "dtype"), backend_dtypes("linear_soft_kl"))
def test_against_float64(divergence, backend, dtype):
    check_op(head_case(divergence, 40, 16, 300), backend, dtype)


@every_divergence
def test_the_check_can_fail(divergence):
    case = head_case(divergence, 40, 16, 300)
    case.fixed["mask"].fill_(True)
    assert_sensitive(case, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    learned, (hidden_t, head_t, bias_t), mask, _ = problem()

    def loss(hidden, head, bias):
        return metakd.linear_soft_kl(
            *(hidden, head, hidden_t, head_t),
            bias=bias,
            teacher_bias=bias_t,
            mask=mask,
            vocab_size=6,
            reduction=reduction,
            chunk_bytes=300,
        )

    assert torch.autograd.gradcheck(loss, learned)


def test_only_wanted_gradients_are_computed():
    (hidden, head, _), (hidden_t, head_t, _), *_ = problem()
    loss = metakd.linear_soft_kl(hidden.detach(), head, hidden_t, head_t, vocab_size=6)
    assert torch.autograd.grad(loss, head)[0].shape == head.shape
    with torch.no_grad():
        assert not metakd.linear_soft_kl(hidden, head, hidden_t, head_t, vocab_size=6).requires_grad


@every_backend
def test_teacher_logits_and_log_probabilities(backend, dtype):
    (hidden, head, _), _, mask, _ = problem(dtype)
    logits = torch.randn(2, 5, 7, device=DEVICE)
    options = {"mask": mask, "temperature": 1.5, "backend": backend}
    loss = metakd.linear_soft_kl(hidden, head, logits, **options)
    torch.testing.assert_close(
        loss, metakd.soft_kl(hidden @ head.T, logits, **{**options, "backend": "reference"})
    )
    torch.testing.assert_close(
        loss, metakd.linear_soft_kl(hidden, head, logits.log_softmax(-1), **options)
    )


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_tokens_may_hold_anything(backend, dtype, reduction):
    (hidden, head, bias), (hidden_t, head_t, _), mask, _ = problem(dtype)
    results = []
    for value in (0.0, float("nan")):
        own = hidden.detach().masked_fill(~mask[..., None], value).requires_grad_()
        other = hidden_t.masked_fill(~mask[..., None], value)
        weight = torch.ones(2, 5, device=DEVICE).masked_fill(~mask, value)
        loss = metakd.linear_soft_kl(
            *(own, head, other, head_t),
            bias=bias,
            mask=mask,
            weight=weight,
            vocab_size=6,
            reduction=reduction,
            chunk_bytes=200,
            backend=backend,
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), (own, head, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert results[0][1][~mask].eq(0).all()


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padded_classes_may_hold_anything(backend, dtype, reduction, value):
    """Heads padded beyond the vocabulary, by rows that nobody has set."""
    results = []
    for filling in (0.0, value):
        torch.manual_seed(0)
        (hidden, head, bias), (hidden_t, head_t, bias_t), mask, label = problem(dtype)
        for padded in (head, bias, head_t, bias_t):
            padded.data[6:] = filling
        loss = metakd.linear_soft_kl(
            *(hidden, head, hidden_t, head_t),
            bias=bias,
            teacher_bias=bias_t,
            mask=mask,
            label=label,
            vocab_size=6,
            reduction=reduction,
            chunk_bytes=200,
            backend=backend,
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), (hidden, head, bias))))
    for clean, spoilt in zip(*results):
        assert torch.equal(clean, spoilt)
    assert results[1][2][6:].eq(0).all() and results[1][3][6:].eq(0).all()


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_of_zero_leaves_tokens_out(backend, dtype, reduction):
    (hidden, head, bias), (hidden_t, head_t, _), mask, _ = problem(dtype)
    silent = torch.zeros(2, 5, dtype=torch.bool, device=DEVICE)
    silent[1, 2:4] = True
    results = []
    for value in (0.0, float("nan"), float("inf")):
        own = hidden.detach().masked_fill(silent[..., None], value).requires_grad_()
        loss = metakd.linear_soft_kl(
            *(own, head, hidden_t.masked_fill(silent[..., None], value), head_t),
            bias=bias,
            mask=mask,
            weight=torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
            .to(DEVICE)
            .masked_fill(silent, 0.0),
            vocab_size=6,
            reduction=reduction,
            chunk_bytes=200,
            backend=backend,
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), (own, head, bias))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert results[0][1][silent].eq(0).all() and all(x.isfinite().all() for x in results[0])


@every_backend
def test_no_tokens(backend, dtype):
    head = torch.randn(7, 4, device=DEVICE, requires_grad=True)
    hidden = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    loss = metakd.linear_soft_kl(hidden, head, torch.zeros(0, 7, device=DEVICE), backend=backend)
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, (hidden, head))
    assert gradients[0].shape == (0, 4) and gradients[1].eq(0).all()


def test_chunks_respect_the_bound():
    own = soft.Head(torch.zeros(1000, 4, dtype=torch.bfloat16), torch.zeros(50, 4))
    teacher = soft.Head(torch.zeros(1000, 4), torch.zeros(60, 4))
    per_token = 50 * 2 + 60 * 4
    for bound in (1, 100 * per_token, 300 * per_token, 10**9):
        chunks = list(soft.chunks(own, teacher, bound))
        assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(1000))
        assert max(c.stop - c.start for c in chunks) <= max(bound // per_token, 1)


def test_heads_follow_the_hidden_states_dtype():
    """Under autocast hidden states are half precision and parameters are not."""
    (hidden, head, bias), (hidden_t, head_t, _), *_ = problem(torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = metakd.linear_soft_kl(
            hidden.bfloat16(), head, hidden_t.bfloat16(), head_t, bias=bias, vocab_size=6
        )
    whole = metakd.linear_soft_kl(hidden, head, hidden_t, head_t, bias=bias, vocab_size=6)
    torch.testing.assert_close(loss, whole, rtol=0.05, atol=0.0)
    assert [x.dtype for x in torch.autograd.grad(loss, (head, bias))] == [torch.float32] * 2


def test_the_heads_gradient_of_halves_is_traceable_on_a_gpu(monkeypatch):
    """By shapes alone, so that no GPU is needed: matrix products that sum in another dtype are of
    GPUs only."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        total = torch.zeros(7, 4, device="cuda")
        left, right = (torch.zeros(3, size, device="cuda", dtype=torch.bfloat16) for size in (7, 4))
        soft._add_product_(total, left.mT, right)
        assert total.shape == (7, 4) and total.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": torch.zeros(7, 3)}, r"head must have shape \[C, 4\]"),
        ({"teacher_head": torch.zeros(9, 3)}, r"teacher_head must have shape \[C, 6\]"),
        ({"teacher_bias": torch.zeros(8)}, r"teacher_bias must have shape \[9\]"),
        ({"teacher_head": None, "teacher_bias": torch.zeros(9)}, "needs a teacher_head"),
        ({"bias": torch.zeros(9)}, r"bias must have shape \[7\]"),
        ({"chunk_bytes": 0}, "chunk_bytes .*0"),
        ({"chunk_bytes": 1e9}, "chunk_bytes must be an integer of at least 1, got 1000000000.0"),
        ({"chunk_bytes": True}, "chunk_bytes must be an integer of at least 1, got True"),
        ({"divergence": "tv"}, "divergence .*'tv'"),
        ({"reduction": "average"}, "reduction .*'average'"),
        ({"vocab_size": None}, r"vocab_size is needed .*\(7, 9\)"),
        ({"teacher_head": torch.zeros(9, 6, requires_grad=True)}, "teacher_head requires grad"),
    ],
)
def test_refusals(changes, message):
    arguments = {
        "student": torch.zeros(2, 4),
        "head": torch.zeros(7, 4),
        "teacher": torch.zeros(2, 6),
        "teacher_head": torch.zeros(9, 6),
        "vocab_size": 6,
    }
    with pytest.raises(ValueError, match=message):
        metakd.linear_soft_kl(**{**arguments, **changes})


def test_an_unavailable_backend_is_refused():
    zeros = partial(torch.zeros, dtype=torch.float64, device=DEVICE)
    with pytest.raises(UnsupportedError, match="float64"):
        metakd.linear_soft_kl(zeros(2, 4), zeros(7, 4), zeros(2, 7), backend="triton")
