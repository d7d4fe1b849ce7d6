"""What the tests of the feature losses share: states as models hold them, one step, poison."""

import pytest
import torch
from oracle import DEVICE


@pytest.fixture(autouse=True)
def poison():
    """Fills what ``torch.empty`` gives with NaN, so that nothing unwritten passes."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def states(batch, heads, length, size, dtype=torch.float32, seed=0):
    """(query, key), views of [B, L, A, D] as models hold them."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, length, heads, size, generator=generator)
        .to(DEVICE, dtype)
        .transpose(1, 2)
        for _ in "qk"
    )


def learning(tensors):
    return tuple(x.detach().requires_grad_() for x in tensors)


def step(loss, student, teacher, **options):
    """Rows, and the gradients of the student's tensors for a fixed upstream gradient."""
    own = learning(student)
    rows = loss(own, teacher, reduction="none", **options)
    upstream = torch.linspace(-1, 2, len(rows), device=DEVICE, dtype=rows.dtype)
    return rows.detach(), *torch.autograd.grad(rows, own, upstream)


def assert_near(found, wanted, rtol=1e-5, atol=1e-6):
    for mine, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, expected, rtol=rtol, atol=atol)


def padded(tensors, padding, value):
    """More tokens, which hold ``value``."""
    return tuple(torch.nn.functional.pad(x, (0, 0, 0, padding), value=value) for x in tensors)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "offset": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "last dimension apart": lambda x: x.mT.contiguous().mT,
}
