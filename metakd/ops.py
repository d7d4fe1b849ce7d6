"""The contracts: which backend computes which operation, where, and why not; and the schemas,
shapes and gradients of the compiled operators.

Four backends. ``reference`` implements every operation in plain PyTorch, to be read and compared
with, and ``eager`` most of them, to be fast where nothing else runs. ``cpp`` are the libraries of
``metakd.extension``: C++ on the CPU, CUDA C++. ``triton`` is ``metakd.kernels``: on CUDA
devices, and on the CPU under Triton's interpreter.

One schema per compiled operator is stamped into one operator namespace per compiled backend:
``torch.ops.metakd.soft_kl_fwd`` is C++ (registered by a library when it is loaded),
``torch.ops.metakd_triton.soft_kl_fwd`` launches Triton (imported on the first call). A gradient is
computed by the backend that computed the value. So everything here can be traced, and the reference
tested, where nothing was built.

A new operator is a schema, a fake and a gradient below; a backend that gains an operation gets a
line in ``IMPLEMENTS``. Kernels are imported, and libraries compiled, at run time only.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import warnings
from itertools import islice

import torch
from torch import Tensor

from metakd import extension
from metakd.errors import UnsupportedError

OPS = (
    "soft_kl",
    "soft_reverse_kl",
    "soft_jsd",
    "linear_soft_kl",
    "mixture_kl",
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

# What each backend computes, and what of that it leaves out on a kind of device.
IMPLEMENTS: dict[str, frozenset[str]] = {
    "reference": frozenset(OPS),
    # Not what is computed once a batch or an epoch.
    "eager": frozenset(OPS)
    - {"masked_mean", "class_prototypes", "prototype_score", "domain_expertise"},
    "cpp": frozenset(OPS),
    "triton": frozenset(OPS),
}
ABSENT: dict[tuple[str, str], frozenset[str]] = {
    ("cpp", "cuda"): frozenset(
        {
            "mixture_kl",
            "masked_mean",
            "attention_kl",
            "attention_prob_mse",
            "relation_kl",
            "class_prototypes",
            "prototype_score",
            "domain_expertise",
        }
    ),
}

# What "auto" tries, best first. CPU: measured, benchmarks/results/cpu. CUDA: not measured yet;
# Triton first, because it needs no build.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "eager", "reference"),
    "cuda": ("triton", "cpp", "eager", "reference"),
}
ELSEWHERE = ("eager", "reference")

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "reference": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "eager": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cpp": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}

# The widest head that the attention kernels of a backend hold.
WIDEST_HEAD = {("triton", "cpu"): 128, ("triton", "cuda"): 128, ("cpp", "cuda"): 128}


def _missing() -> dict[tuple[str, str], str]:
    """Why a backend cannot run on a kind of device at all, found once, so that a traced function
    sees constants."""
    reasons = {
        ("cpp", kind): reason for kind in ("cpu", "cuda") if (reason := extension.load(kind))
    }
    if importlib.util.find_spec("triton") is None:
        for kind in ("cpu", "cuda"):
            reasons["triton", kind] = "triton is not installed"
    elif os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        reasons["triton", "cpu"] = (
            "triton runs on a CPU under its interpreter only (TRITON_INTERPRET=1 before the start)"
        )
    return reasons


_MISSING = _missing()
_compiled_for: set[str] = set()  # kinds of devices for which that was tried


def _compile_for(kind: str, loudly: bool) -> None:
    """Compile and load the C++ library for ``kind``, once a process, and not within a trace or the
    capture of a CUDA graph."""
    if torch.compiler.is_compiling() or kind in _compiled_for:
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    _compiled_for.add(kind)
    if os.environ.get("METAKD_JIT") == "0" or os.environ.get("METAKD_NO_EXT") == "1":
        return
    reason = extension.load(kind, compiling=True)
    if reason is None:
        del _MISSING["cpp", kind]
        return
    _MISSING["cpp", kind] = reason
    if loudly:
        warnings.warn(
            f"metakd's kernels are not compiled: {reason}. Its losses run on PyTorch's own "
            "operations, several times slower (METAKD_JIT=0 says that this is meant)",
            stacklevel=2,
        )


def why_not(
    op: str,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    head: int | None = None,
) -> str | None:
    """Why ``backend`` cannot compute ``op`` on ``device``, or None if it can.

    Args:
        op: name of the operation, one of ``OPS``.
        backend: ``reference``, ``eager``, ``cpp`` or ``triton``.
        device: where the tensors are.
        dtype: the widest floating dtype of the tensors; None asks about the device only.
        head: D of the wider side, where the operation has heads.

    Raises:
        ValueError: unknown ``op`` or ``backend``.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if backend not in IMPLEMENTS:
        raise ValueError(f"backend must be one of auto, {', '.join(IMPLEMENTS)}, got {backend!r}")
    kind = torch.device(device).type
    if op not in IMPLEMENTS[backend] or op in ABSENT.get((backend, kind), ()):
        return f"backend {backend!r} does not implement {op} in this version (device {kind})"
    if backend not in NAMESPACES:  # needs nothing but PyTorch
        return None
    if kind not in ("cpu", "cuda"):
        return f"backend {backend!r} has no kernels for device {kind}"
    if (backend, kind) in _MISSING:
        return f"backend {backend!r} cannot run {op} on {kind}: {_MISSING[backend, kind]}"
    if dtype is not None and dtype not in DTYPES[backend]:
        return f"backend {backend!r} does not compute {op} in {dtype}"
    widest = WIDEST_HEAD.get((backend, kind))
    if head is not None and widest is not None and head > widest:
        return (
            f"backend {backend!r} computes {op} of heads up to {widest} wide on {kind}, not {head}"
        )
    return None


def select(
    op: str,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    head: int | None = None,
) -> str:
    """The backend that computes ``op`` on ``device``.

    Args:
        op: name of the operation, one of ``OPS``.
        backend: ``auto`` may choose; a name runs as asked or raises, it is never replaced silently.
        device: where the tensors are.
        dtype: the widest floating dtype of the tensors.
        head: D of the wider side, where the operation has heads.

    Raises:
        ValueError: unknown ``op`` or ``backend``.
        UnsupportedError: the named backend cannot compute ``op`` here; the message says why.
    """
    kind = torch.device(device).type
    # A GPU has Triton; CUDA C++, which takes minutes to compile, is for those who name it.
    if ("cpp", kind) in _MISSING and backend in ("cpp", *(["auto"] if kind == "cpu" else [])):
        _compile_for(kind, loudly=backend == "auto")
    if backend == "auto":
        order = AUTO_ORDER.get(kind, ELSEWHERE)
        return next(name for name in order if why_not(op, name, device, dtype, head) is None)
    reason = why_not(op, backend, device, dtype, head)
    if reason is not None:
        raise UnsupportedError(reason, "use backend='auto' or backend='reference'")
    return backend


# Compiled operators. Legend: N rows, C classes (student C_s and teacher C_t wide, the first
# vocab_size of both are used), n layer pairs, B batch, A heads, L length, D head size, W = D_s +
# D_t, H hidden size, K domains, M classes of the task.

NAMESPACES = {"cpp": "metakd", "triton": "metakd_triton"}

# Statistics that soft_kl_fwd leaves for soft_kl_bwd, one row of N each (float64 where an input is,
# else float32). Maxima are of the raw logits, hence exact; keeping them apart from the logarithms
# of the sums keeps log-probabilities as accurate as log_softmax does.
STATS = (
    "max_s",  # max_c s_c
    "lsum_s",  # log sum_c exp((s_c - max_s) / T)
    "max_t",
    "lsum_t",
    # sum_c q_c g_c, see metakd.kernels.soft_kl; 0 for the forward KL. g is counted from its value
    # at the student's maximum, so that where one class has nearly all of q, its g - inner is made
    # of small numbers and loses no digits.
    "inner",
    "lsum_1",  # log sum_c exp(s_c - max_s), for the cross-entropy; anything without a label
    # t_c - max_t at the student's maximum (of several, at one that the backend chooses), from which
    # the backward counts g too. Where t_c is -inf, a finite number instead. 0 for the forward KL
    # and where a backend does without.
    "shift",
)

# Statistics that mixture_kl_fwd leaves for mixture_kl_bwd: of the student, and then of each of M
# teachers. Maxima and logarithms as above.
STUDENT_STATS = ("max", "lsum")
# inner: sum_c p_c (log p_c of the mixture - log q_c), the loss's slope in the share, but for 1.
TEACHER_STATS = ("max", "lsum", "inner")

_SOFT_ARGS = (
    "Tensor? mask, Tensor? label, SymInt vocab_size, float temperature, float scale, float beta, "
    "float hard_weight"
)

# n layers of queries and keys [B, A, L, D]; one dtype, shape and device per side. Masks: bool [B,
# L], True = real (None: all). before, after: a query sees keys at most so many positions before and
# after its own (None: all); causal is after = 0.
_ATTENTION_ARGS = (
    "Tensor[] query_s, Tensor[] key_s, Tensor[] query_t, Tensor[] key_t, Tensor? query_mask, "
    "Tensor? key_mask, int? before, int? after, float scale_s, float scale_t"
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
    # M teachers: student [N, C], teacher [N, M, C], shares [N, M]. rows = scale * KL(sum_m shares_m
    # softmax(teacher_m / T) || softmax(student / T)); mask as above. -> rows [N], stats
    # [len(STUDENT_STATS) + M len(TEACHER_STATS), N]
    "mixture_kl_fwd": "(Tensor student, Tensor teacher, Tensor shares, Tensor? mask, "
    "float temperature, float scale) -> (Tensor, Tensor)",
    # drows [N] -> dstudent [N, C], dshares [N, M], in the dtypes of what they belong to
    "mixture_kl_bwd": "(Tensor drows, Tensor student, Tensor teacher, Tensor shares, Tensor stats, "
    "Tensor? mask, float temperature, float scale) -> (Tensor, Tensor)",
    # -> heads [n, B, A]: sum over real queries and keys of the squared difference of scaled
    # scores. Gram form: gram [n, B, A, 2, W, D_s] holds X^T X and Y^T Y, the student's columns, of
    # X = [scale_s Q_s | -scale_t Q_t] and Y = [K_s | K_t] with masked rows 0. A head whose value is
    # below guard * (|S_s|^2 + |S_t|^2) is computed from tiles of scores instead: tiled, bool [n, B,
    # A]. guard = inf: all of them, and W = 0 in gram; before and after need that. norm_t [n, B,
    # A]: |S_t|^2 where it is known, which saves the Gram form the teacher's own products.
    "attention_score_mse_fwd": f"({_ATTENTION_ARGS}, Tensor? norm_t, float guard)"
    " -> (Tensor, Tensor, Tensor)",
    # dheads [n, B, A] -> dquery_s of n layers, then dkey_s of n layers
    "attention_score_mse_bwd": f"(Tensor dheads, {_ATTENTION_ARGS}, Tensor gram, Tensor tiled, "
    "float guard) -> Tensor[]",
    # -> heads [n, B, A]: sum over real queries that see a key of KL(P_t || P_s), or with squared
    # of sum_j (P_s - P_t)^2; stats [n, B, A, 3, L]: log of the sum of exponentials of either side,
    # counted from a point of each backend's own choice, and with squared inner = sum_j P_s (P_s -
    # P_t): only its own backward reads them. same: the keys are the queries (relations).
    "attention_map_fwd": f"({_ATTENTION_ARGS}, bool squared, bool same) -> (Tensor, Tensor)",
    # dheads [n, B, A] -> dquery_s of n layers, then dkey_s of n layers; with same n sums of the two
    "attention_map_bwd": f"(Tensor dheads, {_ATTENTION_ARGS}, Tensor stats, bool squared, "
    "bool same) -> Tensor[]",
    # n layers [B, L, H], mask bool [B, L] -> rows [n, B]: mean over real tokens and features
    "hidden_mse_fwd": "(Tensor[] student, Tensor[] teacher, Tensor? mask) -> Tensor",
    "hidden_mse_bwd": "(Tensor drows, Tensor[] student, Tensor[] teacher, Tensor? mask)"
    " -> Tensor[]",
    # [B, L, H], bool [B, L] -> [B, H] in the dtype of hidden
    "masked_mean_fwd": "(Tensor hidden, Tensor mask) -> Tensor",
    "masked_mean_bwd": "(Tensor dmean, Tensor mask) -> Tensor",
    # Weights of instances: constants to a loss, hence without gradient.
    "class_prototypes": "(Tensor embedding, Tensor domain, Tensor label, int num_domains, "
    "int num_classes) -> (Tensor, Tensor)",
    "prototype_score": "(Tensor embedding, Tensor prototypes, Tensor counts, Tensor domain, "
    "Tensor label, float alpha, Tensor? center) -> Tensor",
    "domain_expertise": "(Tensor teacher_logits, Tensor label, Tensor t) -> Tensor",
}

# Where the Triton launcher of an operator lives, if not in the module of its own name.
_MODULES = {
    "masked_mean": "prototypes",
    "class_prototypes": "prototypes",
    "prototype_score": "prototypes",
    "domain_expertise": "prototypes",
}


def compiled(backend: str, operator: str):
    """The operator of ``SCHEMAS`` as ``backend`` implements it."""
    return getattr(getattr(torch.ops, NAMESPACES[backend]), operator).default


def _accumulator(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _fake_soft_kl_fwd(student, teacher, *_):
    dtype, rows = _accumulator(student, teacher), student.shape[0]
    return student.new_empty(rows, dtype=dtype), student.new_empty(len(STATS), rows, dtype=dtype)


def _fake_soft_kl_bwd(drows, student, *_):
    return student.new_empty(student.shape)


def _fake_soft_kl_fwd_bwd_(student, teacher, *_):
    return student.new_empty(student.shape[0], dtype=_accumulator(student, teacher))


def _fake_mixture_kl_fwd(student, teacher, shares, *_):
    dtype, rows = _accumulator(student, teacher, shares), student.shape[0]
    stats = len(STUDENT_STATS) + len(TEACHER_STATS) * teacher.shape[1]
    return student.new_empty(rows, dtype=dtype), student.new_empty(stats, rows, dtype=dtype)


def _fake_mixture_kl_bwd(drows, student, teacher, shares, *_):
    return student.new_empty(student.shape), shares.new_empty(shares.shape)


def _per_head(query_s: Tensor, others: list[Tensor], layers: int, *shape, dtype=None) -> Tensor:
    """[n, B, A, *shape], in the dtype of results unless told."""
    return query_s.new_empty(
        layers, *query_s.shape[:2], *shape, dtype=dtype or _accumulator(query_s, *others)
    )


def _fake_attention_score_mse_fwd(query_s, key_s, query_t, key_t, *rest):
    guard, layers = rest[-1], len(query_s)
    own, other = query_s[0], query_t[0]
    width = 0 if guard == math.inf else own.shape[3] + other.shape[3]
    return (
        _per_head(own, query_t, layers),
        _per_head(own, query_t, layers, 2, width, own.shape[3]),
        _per_head(own, query_t, layers, dtype=torch.bool),
    )


def _fake_attention_score_mse_bwd(dheads, query_s, key_s, *_):
    return [torch.empty_like(x) for x in (*query_s, *key_s)]


def _fake_attention_map_fwd(query_s, key_s, query_t, *_):
    own, layers = query_s[0], len(query_s)
    return (
        _per_head(own, query_t, layers),
        _per_head(own, query_t, layers, 3, own.shape[2]),
    )


def _fake_attention_map_bwd(dheads, query_s, key_s, *rest):
    same = rest[-1]
    return [torch.empty_like(x) for x in (query_s if same else (*query_s, *key_s))]


def _fake_hidden_mse_fwd(student, teacher, mask):
    own = student[0]
    return own.new_empty(len(student), own.shape[0], dtype=_accumulator(own, teacher[0]))


def _fake_hidden_mse_bwd(drows, student, *_):
    return [torch.empty_like(x) for x in student]


def _fake_masked_mean_fwd(hidden, mask):
    return hidden.new_empty(hidden.shape[0], hidden.shape[2])


def _fake_masked_mean_bwd(dmean, mask):
    return dmean.new_empty(*mask.shape, dmean.shape[1])


def _fake_class_prototypes(embedding, domain, label, num_domains, num_classes):
    cells = num_domains, num_classes
    return (
        embedding.new_empty(*cells, embedding.shape[1], dtype=_accumulator(embedding)),
        embedding.new_empty(cells, dtype=torch.int64),
    )


def _fake_prototype_score(embedding, prototypes, counts, domain, label, alpha, center):
    given = (embedding, prototypes) if center is None else (embedding, prototypes, center)
    return embedding.new_empty(embedding.shape[0], dtype=_accumulator(*given))


def _fake_domain_expertise(teacher_logits, label, t):
    return t.new_empty(t.shape, dtype=_accumulator(teacher_logits, t))


# Gradients: of each forward operator which of its inputs have one, what its backward is given after
# the gradient of its first output, and how that makes a gradient each: flat, of a list of inputs
# one after the other. Other outputs are statistics: nothing depends on them.


def _keep_attention_score_mse(inputs, outputs):
    *pairs, _norm_t, guard = inputs
    return (*pairs, *outputs[1:], guard)


def _keep_attention_map(inputs, outputs):
    *pairs, squared, same = inputs
    return (*pairs, outputs[1], squared, same)


def _attention_gradients(found, kept):
    # Where the keys are the queries, there is one list: the sum of both gradients.
    return found + [None] * (2 * len(kept[0]) - len(found))


_GRADIENTS = {
    "soft_kl": (
        (0,),
        lambda inputs, outputs: (*inputs[:2], outputs[1], *inputs[2:]),
        lambda dstudent, kept: (dstudent,),
    ),
    "mixture_kl": (
        (0, 2),
        lambda inputs, outputs: (*inputs[:3], outputs[1], *inputs[3:]),
        lambda found, kept: found,
    ),
    "attention_score_mse": ((0, 1), _keep_attention_score_mse, _attention_gradients),
    "attention_map": ((0, 1), _keep_attention_map, _attention_gradients),
    "hidden_mse": ((0,), lambda inputs, outputs: inputs, lambda found, kept: found),
    "masked_mean": ((0,), lambda inputs, outputs: inputs[1:], lambda dhidden, kept: (dhidden,)),
}


def _once(*_):
    raise RuntimeError(
        "compiled losses are differentiable once; for a second derivative use backend='reference'"
    )


def _save(ctx, kept: tuple) -> None:
    """Keep tensors, lists of tensors and anything else for ``_saved``."""
    tensors, ctx.others = [], []  # -1: a tensor, n: a list of n tensors, (x,): something else
    for x in kept:
        if isinstance(x, Tensor):
            tensors.append(x)
            ctx.others.append(-1)
        elif isinstance(x, list):
            tensors += x
            ctx.others.append(len(x))
        else:
            ctx.others.append((x,))
    ctx.save_for_backward(*tensors)


def _saved(ctx) -> list:
    tensors = iter(ctx.saved_tensors)
    return [
        x[0] if isinstance(x, tuple) else next(tensors) if x < 0 else list(islice(tensors, x))
        for x in ctx.others
    ]


def _differentiate(library: torch.library.Library, op: str) -> None:
    """Give ``op`` its gradient as ``torch.library.register_autograd`` would, without its general
    treatment of arguments, which took longer than all the rest of a loss of a few rows."""
    differentiable, keep, gradients = _GRADIENTS[op]
    operators = getattr(torch.ops, library.ns)
    forward_of, backward_of = (
        getattr(operators, f"{op}_{name}").default for name in ("fwd", "bwd")
    )

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, below, inputs, *_):
            with torch._C._AutoDispatchBelowAutograd():
                outputs = forward_of.redispatch(below, *inputs)
            # Otherwise each backward would fill zeros for the gradient of the statistics.
            ctx.set_materialize_grads(False)
            _save(ctx, keep(inputs, outputs))
            return outputs

        @staticmethod
        def backward(ctx, dvalue, *_):
            count = len(ctx.needs_input_grad)
            if dvalue is None:  # nothing depends on the value
                return (None,) * count
            kept = _saved(ctx)
            if torch.is_grad_enabled():  # for a second derivative, which `_once` refuses
                found = backward_of(dvalue, *kept)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    found = backward_of(dvalue, *kept)
            return None, None, *gradients(found, kept)

    def autograd(keyset, *inputs):
        below = keyset & torch._C._after_autograd_keyset
        given = []
        for i in differentiable:
            given += inputs[i] if isinstance(inputs[i], list) else [inputs[i]]
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            return Loss.apply(below, inputs, *given)
        with torch._C._AutoDispatchBelowAutograd():
            return forward_of.redispatch(below, *inputs)

    library.impl(f"{op}_fwd", autograd, "Autograd", with_keyset=True)
    # Without this a second derivative would silently be zero.
    torch.library.register_autograd(f"{library.ns}::{op}_bwd", _once, lib=library)


def _launcher(operator: str):
    """The Triton launcher of ``operator``, imported when it is first called."""
    stem = re.sub("_(fwd|bwd|fwd_bwd_)$", "", operator)
    module = f"metakd.kernels.{_MODULES.get(stem, stem)}"

    def launch(*args):
        return getattr(importlib.import_module(module), operator)(*args)

    return launch


_LIBRARIES = {name: torch.library.Library(name, "FRAGMENT") for name in NAMESPACES.values()}


def _define() -> None:
    for namespace in NAMESPACES.values():
        for operator, schema in SCHEMAS.items():
            name = f"{namespace}::{operator}"
            torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
            torch.library.register_fake(name, globals()[f"_fake_{operator}"])
        for op in _GRADIENTS:
            _differentiate(_LIBRARIES[namespace], op)
    for operator in SCHEMAS:
        name = f"{NAMESPACES['triton']}::{operator}"
        torch.library.impl(name, ("cpu", "cuda"), _launcher(operator))


_define()
