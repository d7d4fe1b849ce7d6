"""Small inputs for every loss that returns rows, in one table, for the behaviours all of them
share.

A case builds ``(student, teacher, options)`` from a source of random tensors; ``masks`` names its
mask arguments, of shape [B, L] (``tokens``) or [N].
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import metakd
from metakd import ops

ROWS, LENGTH = 3, 6


@dataclass(frozen=True)
class Case:
    loss: str
    build: Callable  # (rand) -> student, teacher, options
    masks: tuple[str, ...] = ("mask",)
    tokens: bool = True
    backend: str = "reference"
    dtype: torch.dtype = torch.float64

    @property
    def op(self):
        """What computes it: a sigmoid is a softmax of two."""
        return "soft_kl" if self.loss == "sigmoid_kl" else self.loss

    @property
    def compares_maps(self):
        return self.loss.startswith(("attention", "relation"))

    def inputs(self, *, rows=ROWS, length=LENGTH, dtype=None, seed=0):
        dtype = dtype or self.dtype
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape):
            sizes = [{"B": rows, "L": length}.get(size, size) for size in shape]
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

        return self.build(rand)

    def mask(self, value=True, *, rows=ROWS, length=LENGTH):
        return torch.full((rows, length) if self.tokens else (rows,), value, dtype=torch.bool)

    def run(self, student, teacher, options, mask=None, **extra):
        masks = {} if mask is None else dict.fromkeys(self.masks, mask)
        extra = {"backend": self.backend, **extra}
        return getattr(metakd, self.loss)(student, teacher, **options, **masks, **extra)


def leaves(student) -> list[torch.Tensor]:
    return [student] if isinstance(student, torch.Tensor) else list(student)


def like(student, tensors):
    """``tensors`` in the structure of ``student``."""
    return tensors[0] if isinstance(student, torch.Tensor) else type(student)(tensors)


def with_grad(student):
    return like(student, [tensor.detach().clone().requires_grad_() for tensor in leaves(student)])


def logits(loss, **options):
    return Case(
        loss,
        lambda rand: (2 * rand("B", 5), 2 * rand("B", 5), options),
        tokens=False,
    )


def mixed(rand):
    options = {"shares": rand("B", 3).softmax(-1), "temperature": 2.0}
    return 2 * rand("B", 5), 2 * rand("B", 3, 5), options


def pair(rand, heads, size):
    return rand("B", heads, "L", size), rand("B", heads, "L", size)


def attention(loss, heads_s=2, heads_t=2, **options):
    masks = ("query_mask", "key_mask")
    return Case(loss, lambda rand: (pair(rand, heads_s, 3), pair(rand, heads_t, 4), options), masks)


def hidden(rand):
    return [rand("B", "L", 3) for _ in "ab"], [rand("B", "L", 3) for _ in "ab"], {}


def projected(rand):
    options = {"projection": [rand(3, 4), rand(3, 4)], "bias": rand(4)}
    return [rand("B", "L", 3) for _ in "ab"], [rand("B", "L", 4) for _ in "ab"], options


CASES = {
    "soft_kl": logits("soft_kl", temperature=2.0),
    "soft_kl unscaled": logits("soft_kl", temperature=0.5, scale_by_temperature=False),
    "soft_reverse_kl": logits("soft_reverse_kl", temperature=3.0),
    "soft_jsd": logits("soft_jsd", beta=0.3, temperature=2.0),
    "soft_jsd 0": logits("soft_jsd", beta=0.0),
    "sigmoid_kl": logits("sigmoid_kl", temperature=2.0),
    "mixture_kl": Case("mixture_kl", mixed, tokens=False),
    "hidden_mse": Case("hidden_mse", hidden),
    "hidden_mse projected": Case("hidden_mse", projected),
    "hidden_mse pooled": Case(
        "hidden_mse",
        lambda rand: (rand("B", 3), rand("B", 4), {"projection": rand(3, 4)}),
        tokens=False,
    ),
    "score gram": attention("attention_score_mse", form="gram"),
    "score tiled": attention("attention_score_mse", form="tiled"),
    "score causal": attention("attention_score_mse", causal=True),
    "score window": attention("attention_score_mse", window=1),
    "score heads": attention("attention_score_mse", heads_t=3),
    "score all": attention("attention_score_mse", mean_over="all"),
    "kl": attention("attention_kl"),
    "kl causal": attention("attention_kl", causal=True, scale=0.7),
    "kl window": attention("attention_kl", window=2, causal=True),
    "kl heads": attention("attention_kl", heads_s=3),
    "prob": attention("attention_prob_mse"),
    "prob window": attention("attention_prob_mse", window=1),
    "prob heads": attention("attention_prob_mse", heads_s=1, mean_over="all"),
    "relation": Case(
        "relation_kl",
        lambda rand: (rand("B", 2, "L", 3), rand("B", 4, "L", 3), {"relation_heads": 3}),
    ),
}
# The same again on the backends that know doubles, C++ where it is built.
CASES |= {
    f"{name} {backend}": replace(case, backend=backend)
    for backend in ("eager", "cpp")
    for name, case in CASES.items()
    if ops.why_not(case.op, backend, "cpu", torch.float64) is None
    and (backend == "eager" or name not in ("kl heads", "prob heads"))  # no kernel has mean maps
}
# One of each loss on Triton, whose interpreter is slow and which knows no doubles.
TRITON_CASES = {
    f"{case.loss} triton": replace(case, backend="triton", dtype=torch.float32)
    for name, case in reversed(CASES.items())
    if ops.why_not(case.op, "triton", "cpu", torch.float32) is None and "heads" not in name
}
