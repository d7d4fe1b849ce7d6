"""Times of the eager reference losses, forward and backward: `make bench`.

Sizes are a small batch of BERT-like inputs; on a CPU they say which form is cheaper here, nothing
about a GPU. Legend: N rows, C classes, B batch, A heads, L length, D head dimension.
"""

import pytest
import torch

from metakd import functional

B, A, D = 4, 12, 32


@pytest.fixture(autouse=True)
def _setup():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def time_step(benchmark, inputs, loss):
    benchmark(lambda: torch.autograd.grad(loss(), inputs))


@pytest.mark.parametrize("N, C", [(256, 2), (256, 1024), (128, 30522)])
def test_soft_kl(benchmark, N, C):
    student = torch.randn(N, C, requires_grad=True)
    teacher = torch.randn(N, C)
    time_step(benchmark, student, lambda: functional.soft_kl(student, teacher, temperature=2.0))


@pytest.mark.parametrize("L", [64, 256])
@pytest.mark.parametrize("form", ["gram", "tiled"])
def test_attention_score_mse(benchmark, form, L):
    student = [torch.randn(B, A, L, D, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(B, A, L, D) for _ in range(2)]
    time_step(
        benchmark, student, lambda: functional.attention_score_mse(student, teacher, form=form)
    )
