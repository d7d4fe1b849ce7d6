"""What only a GPU shows: the CPU's values in float64, equal bits, no waiting for the host, graphs,
streams, memory."""

import pytest
import torch

from metakd import functional, ops
from metakd.method.objective import Distillation
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.method.terms import AttentionTerm, HiddenTerm, PredictionTerm

pytestmark = pytest.mark.gpu

B, A, L, D, C = 3, 4, 17, 8, 50  # batch, heads, length, head dimension, classes


def soft_kl(student, teacher):
    return functional.soft_kl(student[0], teacher[0], temperature=2.0)


def hidden_mse(student, teacher):
    return functional.hidden_mse(student[0], teacher[0])


def attention_score_mse(form):
    def loss(student, teacher):
        return functional.attention_score_mse(tuple(student), tuple(teacher), form=form)

    return loss


CASES = {
    "soft_kl": (soft_kl, (B, C)),
    "hidden_mse": (hidden_mse, (B, L, D)),
    "attention_score_mse, gram": (attention_score_mse("gram"), (B, A, L, D)),
    "attention_score_mse, tiled": (attention_score_mse("tiled"), (B, A, L, D)),
}


@pytest.mark.parametrize("loss, shape", CASES.values(), ids=CASES)
def test_gpu_equals_cpu(loss, shape):
    student, teacher = torch.randn(2, 2, *shape, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [x.to(device, copy=True).requires_grad_() for x in student]
        value = loss(inputs, teacher.to(device))
        gradients = torch.autograd.grad(value, inputs, allow_unused=True)
        results.append([value, *(g for g in gradients if g is not None)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu)


# Every feature loss on the backends of this machine, for what only a GPU shows

B16 = torch.bfloat16


def stack(backend):
    """All feature losses that ``backend`` has here, of one set of states: a step of them."""
    torch.manual_seed(0)
    query, key, query_t, key_t = (
        torch.randn(2, 130, 4, size, device="cuda", dtype=B16).transpose(1, 2)
        for size in (26, 26, 64, 64)
    )
    hidden, hidden_t = (torch.randn(2, 130, 312, device="cuda", dtype=B16) for _ in "st")
    own = [x.requires_grad_() for x in (query, key, hidden)]
    mask = torch.arange(130, device="cuda") < torch.tensor([[130], [77]], device="cuda")
    both = {"query_mask": mask, "key_mask": mask, "backend": backend}
    pairs = (query, key), (query_t, key_t)
    losses = {
        "hidden_mse": lambda: functional.hidden_mse(hidden, hidden_t, mask=mask, backend=backend),
        "attention_score_mse": lambda: sum(
            functional.attention_score_mse(*pairs, form=form, **both)
            for form in ("gram", "tiled", "auto")
        ),
        "attention_kl": lambda: functional.attention_kl(*pairs, **both),
        "attention_prob_mse": lambda: functional.attention_prob_mse(*pairs, causal=True, **both),
        "masked_mean": lambda: functional.masked_mean(hidden, mask, backend=backend).float().sum(),
    }
    chosen = [
        compute for op, compute in losses.items() if ops.why_not(op, backend, "cuda", B16) is None
    ]
    if not chosen:
        pytest.skip(ops.why_not("hidden_mse", backend, "cuda"))

    def step():
        loss = sum(compute() for compute in chosen)
        return loss.detach(), *torch.autograd.grad(loss, own)

    return step


every_backend = pytest.mark.parametrize("backend", ["cpp", "triton"])


@every_backend
def test_a_thousand_times_the_same_bits(backend):
    step = stack(backend)
    first = step()
    for _ in range(1000):
        assert all(torch.equal(mine, again) for mine, again in zip(step(), first))


@every_backend
def test_no_step_waits_for_the_host(backend):
    step = stack(backend)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_backend
def test_cuda_graphs_capture_it(backend):
    step = stack(backend)
    wanted = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    for mine, expected in zip(found, wanted, strict=True):
        assert torch.equal(mine, expected)


def test_memory_does_not_grow_with_the_square_of_length():
    query, key = (torch.randn(1, 2, 16384, 64, device="cuda", dtype=B16) for _ in "qk")
    own = query.requires_grad_(), key.requires_grad_()
    taught = tuple(torch.randn_like(x) for x in own)
    for loss in (functional.attention_kl, functional.attention_score_mse):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss(own, taught, backend="triton"), own)
        one_map = 2 * 16384**2 * 2
        assert torch.cuda.max_memory_allocated() - before < one_map / 8


def test_a_teacher_on_its_own_stream_teaches_the_same(tiny_bert, make_batch):
    batch = {name: x.cuda() for name, x in make_batch().items()}
    needs = frozenset({"query", "key", "hidden", "logits"})
    teacher = Teacher(tiny_bert(layers=4, hidden=48), "mix", ["a", "b", "c"]).cuda()
    terms = [HiddenTerm(layers=(1, 3)), AttentionTerm(layers=(1, 3)), PredictionTerm()]
    losses = []
    for own_stream in (False, True):
        torch.manual_seed(1)
        module = Distillation(tiny_bert().cuda(), terms, teacher_hidden=48, num_domains=3).cuda()
        with FrozenTeacher([teacher], needs, own_stream) as frozen:
            losses.append([module(batch, frozen(batch)).rows.detach() for _ in range(20)])
    for apart, together in zip(*losses):
        assert torch.equal(apart, together)
