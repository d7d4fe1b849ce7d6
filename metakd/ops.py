"""The contracts: which backend computes which operation, where, and why not; and the schemas,
shapes and gradients of the compiled operators.

Three backends. ``reference`` (eager PyTorch) implements every operation. ``cpp`` is the extension
``metakd._C``: C++ on the CPU and, where it was built with CUDA, CUDA C++. ``triton`` is
``metakd.kernels``: on CUDA devices, and on the CPU under Triton's interpreter.

One schema per compiled operator is stamped into one operator namespace per compiled backend:
``torch.ops.metakd.soft_kl_fwd`` is C++ (registered by the extension when it is imported),
``torch.ops.metakd_triton.soft_kl_fwd`` launches Triton (imported on the first call). A gradient is
computed by the backend that computed the value. So everything here can be traced, and the reference
tested, where nothing was built.

A new operator is a schema, a fake and a gradient below; a backend that gains an operation gets a
line in ``IMPLEMENTS``. Imports torch and ``metakd.errors``; kernels are imported at run time only.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch
from torch import Tensor

from metakd.errors import UnsupportedError

OPS = (
    "soft_kl",
    "soft_reverse_kl",
    "soft_jsd",
    "linear_soft_kl",
    "hidden_mse",
    "masked_mean",
    "attention_score_mse",
    "attention_kl",
    "attention_prob_mse",
    "relation_kl",
    "class_prototypes",
    "prototype_score",
    "domain_expertise",
)

_SOFT = frozenset({"soft_kl", "soft_reverse_kl", "soft_jsd", "linear_soft_kl"})

IMPLEMENTS: dict[str, frozenset[str]] = {
    "reference": frozenset(OPS),
    "cpp": _SOFT,
    "triton": _SOFT,
}

# What "auto" tries, best first; any other device takes the reference. CPU: measured, C++ wins every
# row of benchmarks/results/cpu. CUDA: not measured yet; Triton first, because it needs no build.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "reference"),
    "cuda": ("triton", "cpp", "reference"),
}

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "reference": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cpp": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def _missing() -> dict[tuple[str, str], str]:
    """Why a backend cannot run on a kind of device at all, found once, so that a traced function
    sees constants."""
    reasons = {}
    try:
        from metakd import _C
    except ImportError as error:
        for kind in ("cpu", "cuda"):
            reasons["cpp", kind] = (
                f"the extension metakd._C is not built or does not load ({error})"
            )
    else:
        if _C.build_info()["cuda"] is None:
            reasons["cpp", "cuda"] = "the extension metakd._C was built without CUDA"
    if importlib.util.find_spec("triton") is None:
        for kind in ("cpu", "cuda"):
            reasons["triton", kind] = "triton is not installed"
    elif os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        reasons["triton", "cpu"] = (
            "triton runs on a CPU under its interpreter only (TRITON_INTERPRET=1 before the start)"
        )
    return reasons


_MISSING = _missing()


def why_not(
    op: str, backend: str, device: torch.device | str, dtype: torch.dtype | None = None
) -> str | None:
    """Why ``backend`` cannot compute ``op`` on ``device``, or None if it can.

    Args:
        op: name of the operation, one of ``OPS``.
        backend: ``reference``, ``cpp`` or ``triton``.
        device: where the tensors are.
        dtype: the widest floating dtype of the tensors; None asks about the device only.

    Raises:
        ValueError: unknown ``op`` or ``backend``.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if backend not in IMPLEMENTS:
        raise ValueError(f"backend must be one of auto, {', '.join(IMPLEMENTS)}, got {backend!r}")
    kind = torch.device(device).type
    if op not in IMPLEMENTS[backend]:
        return f"backend {backend!r} does not implement {op} in this version (device {kind})"
    if backend == "reference":
        return None
    if kind not in ("cpu", "cuda"):
        return f"backend {backend!r} has no kernels for device {kind}"
    if (backend, kind) in _MISSING:
        return f"backend {backend!r} cannot run {op} on {kind}: {_MISSING[backend, kind]}"
    if dtype is not None and dtype not in DTYPES[backend]:
        return f"backend {backend!r} does not compute {op} in {dtype}"
    return None


def select(
    op: str, backend: str, device: torch.device | str, dtype: torch.dtype | None = None
) -> str:
    """The backend that computes ``op`` on ``device``.

    Args:
        op: name of the operation, one of ``OPS``.
        backend: ``auto`` may choose; a name runs as asked or raises, it is never replaced silently.
        device: where the tensors are.
        dtype: the widest floating dtype of the tensors.

    Raises:
        ValueError: unknown ``op`` or ``backend``.
        UnsupportedError: the named backend cannot compute ``op`` here; the message says why.
    """
    if backend == "auto":
        order = AUTO_ORDER.get(torch.device(device).type, ("reference",))
        return next(name for name in order if why_not(op, name, device, dtype) is None)
    reason = why_not(op, backend, device, dtype)
    if reason is not None:
        raise UnsupportedError(reason, "use backend='auto' or backend='reference'")
    return backend


# Compiled operators. Legend: N rows, C classes (student C_s and teacher C_t wide, the first
# vocab_size of both are used).

NAMESPACES = {"cpp": "metakd", "triton": "metakd_triton"}

# Statistics that soft_kl_fwd leaves for soft_kl_bwd, one row of N each (float64 where an input is,
# else float32). Maxima are of the raw logits, hence exact; keeping them apart from the logarithms
# of the sums keeps log-probabilities as accurate as log_softmax does.
STATS = (
    "max_s",  # max_c s_c
    "lsum_s",  # log sum_c exp((s_c - max_s) / T)
    "max_t",
    "lsum_t",
    # sum_c q_c g_c, see metakd.kernels.soft_kl; 0 for the forward KL. g is counted from a point of
    # each backend's own choice, so that g - inner loses no digits: only its own backward reads it.
    "inner",
    "lsum_1",  # log sum_c exp(s_c - max_s), for the cross-entropy; anything without a label
)

_SOFT_ARGS = (
    "Tensor? mask, Tensor? label, SymInt vocab_size, float temperature, float scale, float beta, "
    "float hard_weight"
)

# mask: bool [N], True = real (None: all). label: int64 [N] (None: no cross-entropy). beta: 0 is the
# forward KL, 1 the reverse, between them Jensen-Shannon. rows = scale * divergence(student / T,
# teacher / T) + hard_weight * cross_entropy(student, label). Masked rows are 0 and their label is
# not looked at. Columns are contiguous (stride 1), rows have any stride.
SCHEMAS = {
    # -> rows [N], stats [len(STATS), N]
    "soft_kl_fwd": f"(Tensor student, Tensor teacher, {_SOFT_ARGS}) -> (Tensor, Tensor)",
    # drows [N] -> dstudent [N, C_s] in the student's dtype, 0 beyond vocab_size and in masked rows
    "soft_kl_bwd": "(Tensor drows, Tensor student, Tensor teacher, Tensor stats, "
    f"{_SOFT_ARGS}) -> Tensor",
    # Row weights known beforehand: student's logits are replaced by drows * d rows / d student,
    # rows [N] are returned.
    "soft_kl_fwd_bwd_": f"(Tensor(a!) student, Tensor teacher, Tensor drows, {_SOFT_ARGS})"
    " -> Tensor",
}


def compiled(backend: str, operator: str):
    """The operator of ``SCHEMAS`` as ``backend`` implements it."""
    return getattr(getattr(torch.ops, NAMESPACES[backend]), operator)


def _accumulator(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _fake_soft_kl_fwd(student, teacher, *_):
    dtype, rows = _accumulator(student, teacher), student.shape[0]
    return student.new_empty(rows, dtype=dtype), student.new_empty(len(STATS), rows, dtype=dtype)


def _fake_soft_kl_bwd(drows, student, *_):
    return student.new_empty(student.shape)


def _fake_soft_kl_fwd_bwd_(student, teacher, *_):
    return student.new_empty(student.shape[0], dtype=_accumulator(student, teacher))


def _once(*_):
    raise RuntimeError(
        "compiled losses are differentiable once; for a second derivative use backend='reference'"
    )


def _differentiate_soft_kl(namespace: str) -> None:
    def setup_context(ctx, inputs, output):
        student, teacher, mask, label, *ctx.settings = inputs
        # Otherwise each backward would fill zeros for the gradient of the statistics.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, output[1], mask, label)

    def backward(ctx, drows, _):
        dstudent = None
        if drows is not None:  # None: nothing depends on the rows
            student, teacher, stats, mask, label = ctx.saved_tensors
            operator = getattr(torch.ops, namespace).soft_kl_bwd
            dstudent = operator(drows, student, teacher, stats, mask, label, *ctx.settings)
        return dstudent, *[None] * (3 + len(ctx.settings))

    torch.library.register_autograd(
        f"{namespace}::soft_kl_fwd", backward, setup_context=setup_context
    )
    # Without this a second derivative would silently be zero.
    torch.library.register_autograd(f"{namespace}::soft_kl_bwd", _once)


def _launcher(module: str, operator: str):
    """The Triton launcher of ``operator``, imported when it is first called."""

    def launch(*args):
        return getattr(importlib.import_module(f"metakd.kernels.{module}"), operator)(*args)

    return launch


def _define() -> None:
    for namespace in NAMESPACES.values():
        for operator, schema in SCHEMAS.items():
            name = f"{namespace}::{operator}"
            torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
            torch.library.register_fake(name, globals()[f"_fake_{operator}"])
        _differentiate_soft_kl(namespace)
    for operator in SCHEMAS:
        name = f"{NAMESPACES['triton']}::{operator}"
        torch.library.impl(name, ("cpu", "cuda"), _launcher("soft_kl", operator))


_define()
