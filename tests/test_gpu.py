"""On a GPU the losses give what they give on the CPU, values and gradients, in float64."""

import pytest
import torch

from metakd import functional

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
