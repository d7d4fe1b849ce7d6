"""Dropout's masks on a CPU, drawn as PyTorch draws them, several times as fast.

On many processors PyTorch draws a mask number by number, which can be a fifth of a training step
and more. Within ``quick_masks`` the compiled library draws them, from the same
generator in the same order: the numbers are the same to the bit, so it is no setting.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from metakd import extension

WORTH = 2048
"""Numbers from which on the way through Python costs less than is gained."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SCHEMA = "(Tensor(a!) mask, Tensor(b!) state, float p) -> ()"

torch.library.define("metakd::bernoulli_", SCHEMA)


@contextmanager
def quick_masks(device: torch.device) -> Iterator[None]:
    """Within it, ``bernoulli_`` on a CPU, which dropout of every kind calls, is the library's.

    Args:
        device: of what is trained; elsewhere than on a CPU nothing changes, nor without the
            compiled library, nor where PyTorch's own masks are others.
    """
    if device.type != "cpu" or not _is_same():
        yield
        return
    own = torch.library.get_kernel("aten::bernoulli_.float", "CPU")

    def draw(keys, mask: Tensor, p: float = 0.5, *, generator=None) -> Tensor:
        if generator is not None or mask.numel() < WORTH or not _can_fill(mask):
            return own.call_boxed(keys, mask, p, generator=generator)
        state = torch.get_rng_state()
        torch.ops.metakd.bernoulli_(mask, state, p)
        torch.set_rng_state(state)
        return mask

    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it replaces PyTorch's
            library.impl("bernoulli_.float", draw, "CPU", with_keyset=True, allow_override=True)
        yield
    finally:
        library._destroy()


def _can_fill(mask: Tensor) -> bool:
    return mask.dtype in DTYPES and mask.is_contiguous()


@cache
def _is_same() -> bool:
    """Does the library draw what this PyTorch draws on this processor?"""
    if extension.load("cpu"):
        return False
    before = torch.get_rng_state()
    expected = torch.empty(2 * WORTH).bernoulli_(0.9)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    state, mask = before.clone(), torch.empty_like(expected)
    torch.ops.metakd.bernoulli_(mask, state, 0.9)
    return mask.equal(expected) and state.equal(after)
