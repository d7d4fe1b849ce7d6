"""What is measured: one row per operation and shape, with what it must move and whom it meets.

A row builds its ``Contest`` on a device: contenders (each one step, forward and backward) that must
all give the same loss, the fewest bytes (or flops) the step needs, and the dtype. ``run.py`` times
them and writes results, ``test_registry.py`` gives the small ones to pytest-benchmark. Opponents
are written as their users write them; one that is not installed, refuses the device or does not fit
its memory is left out with its reason.

Legend: N rows, C classes, M teachers, H hidden size, B batch, A heads, L length, D head dimension.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch.nn import functional as F

import metakd
from metakd import ops, reference

Step = Callable[[], torch.Tensor]  # runs forward and backward, gives the loss
T = TypeVar("T")


@dataclass
class Contest:
    contenders: dict[str, Step]
    absent: dict[str, str] = field(default_factory=dict)  # contender -> why not
    tolerance: float = 1e-3  # relative difference of losses allowed
    rougher: dict[str, float] = field(default_factory=dict)  # contender -> what it is allowed


@dataclass(frozen=True)
class Row:
    op: str
    shape: str
    dtype: torch.dtype
    devices: tuple[str, ...]
    build: Callable[..., Contest]  # (device, rivals=True): compiling rivals takes seconds
    bytes: int = 0  # least to move, forward and backward
    flops: int = 0  # least to compute
    quick: bool = False  # small enough for pytest-benchmark in CI


def _step(loss: Callable[[], torch.Tensor], *learned: torch.Tensor) -> Step:
    def step():
        value = loss()
        torch.autograd.grad(value, learned)
        return value.detach()

    return step


OURS = {
    "cpp": "metakd cpp",
    "triton": "metakd triton",
    "eager": "metakd without its extension",
    "reference": "metakd reference",
}


def _ours(contest: Contest, op: str, device: str, dtype, make: Callable[[str], Step]) -> None:
    for backend, name in OURS.items():
        reason = ops.why_not(op, backend, device, dtype)
        if device == "cpu" and backend == "triton":
            reason = "Triton has no CPU backend (its interpreter is not for timing)"
        if reason is None:
            contest.contenders[name] = make(backend)
        else:
            contest.absent[name] = reason


def attempt(name: str, absent: dict[str, str], do: Callable[[], T]) -> T | None:
    """What ``do`` returns; None after noting among the absent why it failed. Out of memory is an
    answer like any other."""
    try:
        return do()
    except Exception as error:  # whatever a foreign library raises
        first = (str(error).splitlines() or [""])[0]
        absent[name] = f"{type(error).__name__}: {first[:160]}"
    # The error is gone by now, and with it the tensors that its frames held.
    give_memory_back()
    return None


def give_memory_back() -> None:
    """What nothing holds any more returns to the GPU, for who comes next."""
    if torch.cuda.is_available():
        gc.collect()
        with suppress(RuntimeError):  # after a kernel's fault nothing works; the next one says so
            torch.cuda.empty_cache()


def _try(contest: Contest, name: str, make: Callable[[], Step]) -> None:
    """Adds a contender that works here, or the reason why it does not."""

    def working() -> Step:
        step = make()
        step()
        return step

    if (step := attempt(name, contest.absent, working)) is not None:
        contest.contenders[name] = step


# Logits


def _soft_opponents(beta: float, temperature: float) -> dict[str, Callable]:
    """Losses ``(student, teacher) -> mean over rows, times T^2`` as people write them."""

    def kl_probabilities(student, teacher):
        target = F.softmax(teacher / temperature, -1)
        loss = F.kl_div(F.log_softmax(student / temperature, -1), target, reduction="batchmean")
        return loss * temperature**2

    def kl_log_targets(student, teacher):
        log_s = F.log_softmax(student / temperature, -1)
        log_t = F.log_softmax(teacher / temperature, -1)
        return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2

    def jsd(student, teacher):
        log_s = F.log_softmax(student / temperature, -1)
        log_t = F.log_softmax(teacher / temperature, -1)
        weights = torch.tensor([1 - beta, beta], device=student.device).log().to(log_s)
        log_m = torch.logsumexp(torch.stack([log_s + weights[0], log_t + weights[1]]), 0)
        p_m = F.kl_div(log_m, log_t, reduction="batchmean", log_target=True)
        q_m = F.kl_div(log_m, log_s, reduction="batchmean", log_target=True)
        return (beta * p_m + (1 - beta) * q_m) * temperature**2

    def reverse(student, teacher):
        return kl_log_targets(teacher, student)

    if beta == 0.0:
        return {
            "F.kl_div, probabilities": kl_probabilities,
            "F.kl_div, log targets": kl_log_targets,
        }
    return {"F.kl_div, log targets": reverse} if beta == 1.0 else {"eager": jsd}


def _liger_soft(beta: float, temperature: float):
    if beta == 0.0:
        from liger_kernel.transformers import LigerKLDIVLoss

        inner = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    else:
        from liger_kernel.transformers import LigerJSD

        inner = LigerJSD(beta=beta)

    def loss(student, teacher):
        log_s = F.log_softmax(student / temperature, -1, dtype=torch.float32)
        log_t = F.log_softmax(teacher / temperature, -1, dtype=torch.float32)
        return inner(log_s, log_t) * temperature**2

    return loss


def _soft_row(op: str, N: int, C: int, dtype, devices, *, beta=0.0, temperature=2.0, quick=False):
    def build(device: str, rivals: bool = True) -> Contest:
        student = (3 * torch.randn(N, C, device=device)).to(dtype).requires_grad_()
        teacher = (3 * torch.randn(N, C, device=device)).to(dtype)
        contest = Contest({}, tolerance=0.02)
        extra = {"beta": beta} if op == "soft_jsd" else {}

        def ours(backend):
            compute = getattr(metakd, op)
            return _step(
                lambda: compute(
                    student, teacher, temperature=temperature, backend=backend, **extra
                ),
                student,
            )

        _ours(contest, op, device, dtype, ours)
        if not rivals:
            return contest
        opponents = _soft_opponents(beta, temperature)
        for name, loss in opponents.items():
            _try(contest, name, lambda f=loss: _step(lambda: f(student, teacher), student))
        fastest = list(opponents.values())[-1]
        compiled = torch.compile(fastest, dynamic=False)
        _try(contest, "torch.compile", lambda: _step(lambda: compiled(student, teacher), student))

        def liger():
            loss = _liger_soft(beta, temperature)
            return _step(lambda: loss(student, teacher), student)

        _try(contest, "Liger", liger)
        return contest

    least = 5 * N * C * dtype.itemsize
    return Row(op, f"[{N}, {C}]", dtype, devices, build, bytes=least, quick=quick)


def _one_read_row(N: int, C: int, dtype, devices, *, temperature=2.0, quick=False) -> Row:
    """With the rows' weights known beforehand the gradient takes the place of the student's logits:
    what the chunked head runs."""

    def build(device: str, rivals: bool = True) -> Contest:
        student, teacher = ((3 * torch.randn(N, C, device=device)).to(dtype) for _ in "st")
        contest = Contest({}, tolerance=0.02)

        def ours(backend):
            if backend not in ops.NAMESPACES:
                own = student.clone().requires_grad_()
                return _step(
                    lambda: metakd.soft_kl(own, teacher, temperature=temperature, backend=backend),
                    own,
                )
            operator = ops.compiled(backend, "soft_kl_fwd_bwd_")
            # The first step, whose loss is compared, reads these logits; the ones after it what it
            # left there, which is as much work.
            logits, weights = student.clone(), torch.full((N,), 1 / N, device=device)
            settings = C, temperature, temperature**2, 0.0, 0.0
            return lambda: operator(logits, teacher, weights, None, None, *settings).mean()

        _ours(contest, "soft_kl", device, dtype, ours)
        if rivals:
            own = student.clone().requires_grad_()
            for name, loss in _soft_opponents(0.0, temperature).items():
                _try(contest, name, lambda f=loss: _step(lambda: f(own, teacher), own))
        return contest

    least = 3 * N * C * dtype.itemsize
    return Row("soft_kl_one_read", f"[{N}, {C}]", dtype, devices, build, bytes=least, quick=quick)


def _mixture_row(N: int, M: int, C: int, dtype, devices, *, temperature=2.0, quick=False) -> Row:
    """With gradients of the student and of the shares, as a gate is trained."""

    def build(device: str, rivals: bool = True) -> Contest:
        student = (3 * torch.randn(N, C, device=device)).to(dtype).requires_grad_()
        teachers = (3 * torch.randn(N, M, C, device=device)).to(dtype)
        shares = torch.randn(N, M, device=device).softmax(-1).requires_grad_()
        contest = Contest({}, tolerance=0.02)

        def step(loss: Callable) -> Step:
            return _step(lambda: loss(student, teachers, shares), student, shares)

        def ours(backend):
            options = {"temperature": temperature, "backend": backend}
            return step(lambda *given: metakd.mixture_kl(*given, **options))

        _ours(contest, "mixture_kl", device, dtype, ours)
        if not rivals:
            return contest

        def probabilities(student, teachers, shares):
            target = (shares[:, :, None] * F.softmax(teachers / temperature, -1)).sum(1)
            loss = F.kl_div(F.log_softmax(student / temperature, -1), target, reduction="batchmean")
            return loss * temperature**2

        _try(contest, "F.kl_div, probabilities", lambda: step(probabilities))
        for name, loss in {
            "torch.compile": probabilities,
            "torch.compile of the reference": lambda *given: reference.mixture_kl(
                *given, temperature
            ).mean(),
        }.items():
            compiled = torch.compile(loss, dynamic=False)
            _try(contest, name, lambda f=compiled: step(f))
        return contest

    least = (3 + 2 * M) * N * C * dtype.itemsize
    shape = f"[{N}, {M}, {C}]"
    return Row("mixture_kl", shape, dtype, devices, build, bytes=least, quick=quick)


# Heads of language models


def _head_row(N: int, H: int, C: int, dtype, devices, *, beta: float, quick=False):
    divergence = "kl" if beta == 0.0 else "jsd"

    def build(device: str, rivals: bool = True) -> Contest:
        def rand(*shape, scale=1.0):
            return (scale * torch.randn(shape, device=device)).to(dtype)

        hidden, hidden_t = rand(N, H).requires_grad_(), rand(N, H)
        head, head_t = rand(C, H, scale=H**-0.5).requires_grad_(), rand(C, H, scale=H**-0.5)
        labels = torch.zeros(N, dtype=torch.int64, device=device)
        contest = Contest({}, tolerance=0.02)

        def ours(backend):
            return _step(
                lambda: metakd.linear_soft_kl(
                    *(hidden, head, hidden_t, head_t),
                    divergence=divergence,
                    beta=beta,
                    backend=backend,
                ),
                *(hidden, head),
            )

        _ours(contest, "linear_soft_kl", device, dtype, ours)
        if not rivals:
            return contest
        whole = list(_soft_opponents(beta, 1.0).values())[-1]

        def eager():
            return whole((hidden @ head.mT).float(), (hidden_t @ head_t.mT).float())

        _try(contest, "eager, whole logits", lambda: _step(eager, hidden, head))
        compiled = torch.compile(eager, dynamic=False)
        _try(contest, "torch.compile, whole logits", lambda: _step(compiled, hidden, head))

        def liger():
            from liger_kernel.transformers import LigerFusedLinearJSD

            inner = LigerFusedLinearJSD(jsd_beta=beta)
            return _step(lambda: inner(hidden, head, hidden_t, head_t, None), hidden, head)

        _try(contest, "Liger fused-linear JSD", liger)

        def liger_kl():
            from liger_kernel.transformers import LigerFusedLinearKLDivLoss

            inner = LigerFusedLinearKLDivLoss()

            def loss():
                with torch.no_grad():  # it takes the teacher's probabilities
                    target = (hidden_t @ head_t.mT).softmax(-1)
                return inner(hidden, head, target)

            return _step(loss, hidden, head)

        if beta == 0.0:
            _try(contest, "Liger fused-linear KL", liger_kl)

        def liger_chunked():
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            inner = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
            return _step(lambda: inner(hidden, head, hidden_t, head_t, labels), hidden, head)

        _try(contest, "Liger chunked JSD", liger_chunked)
        # It computes in the logits' dtype: 3.7 % off on 8 rows of 128256 classes, uncompiled.
        contest.rougher["Liger chunked JSD"] = 0.05

        def trl():
            from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as Chunked

            return _step(
                lambda: Chunked.apply(hidden, head, None, hidden_t, head_t, None, beta)[0].mean(),
                *(hidden, head),
            )

        _try(contest, "TRL chunked divergence", trl)
        return contest

    shape = f"[{N}, {H}] x [{C}, {H}], {divergence}"
    return Row("linear_soft_kl", shape, dtype, devices, build, flops=8 * N * C * H, quick=quick)


# Attention


def _maps_loss(op: str, student, teacher, window: int | None = None) -> torch.Tensor:
    """As people write it, over whole maps."""
    scores = [((q @ k.mT) * q.shape[-1] ** -0.5).float() for q, k in (student, teacher)]
    part = 1.0  # of all pairs are counted
    if window is not None:
        place = torch.arange(scores[0].shape[-1], device=scores[0].device)
        hidden = (place[:, None] - place).abs() > window
        scores = [x.masked_fill(hidden, 0.0 if "score" in op else -1e9) for x in scores]
        part = 1.0 - hidden.float().mean()
    if op == "attention_score_mse":
        return F.mse_loss(*scores) / part
    if op == "attention_prob_mse":
        return F.mse_loss(*(x.softmax(-1) for x in scores)) / part
    logs = [x.log_softmax(-1) for x in scores]
    return F.kl_div(*logs, reduction="none", log_target=True).sum(-1).mean()


def _attention_row(
    op: str,
    B: int,
    A: int,
    L: int,
    D: int,
    D_t: int,
    dtype,
    devices,
    quick=False,
    eager=True,
    window: int | None = None,
) -> Row:
    """``eager``: whole maps fit the memory."""

    def build(device: str, rivals: bool = True) -> Contest:
        def pair(d):
            # Views of [B, L, A, D], as a model hands them out.
            return tuple(
                torch.randn(B, L, A, d, device=device).to(dtype).transpose(1, 2) for _ in "qk"
            )

        student, teacher = pair(D), pair(D_t)
        for tensor in student:
            tensor.requires_grad_()
        contest = Contest({}, tolerance=2e-2 if dtype == torch.bfloat16 else 1e-3)
        loss = getattr(metakd, op)
        _ours(
            contest,
            op,
            device,
            dtype,
            lambda backend: _step(
                lambda: loss(student, teacher, window=window, backend=backend), *student
            ),
        )
        if rivals and eager:
            _try(
                contest,
                "eager maps",
                lambda: _step(lambda: _maps_loss(op, student, teacher, window), *student),
            )
            compiled = torch.compile(_maps_loss, dynamic=False)
            _try(
                contest,
                "torch.compile maps",
                lambda: _step(lambda: compiled(op, student, teacher, window), *student),
            )
        return contest

    shape = f"[{B}, {A}, {L}, {D}/{D_t}]" + (f", window {window}" if window is not None else "")
    # Both sides are read forward and backward, the student's gradients are written.
    least = (3 * 2 * D + 2 * 2 * D_t) * B * A * L * dtype.itemsize
    return Row(op, shape, dtype, devices, build, bytes=least, quick=quick)


# Hidden states and instance weights


def _hidden_row(n: int, B: int, L: int, H: int, H_t: int, dtype, devices, quick=False) -> Row:
    def build(device: str, rivals: bool = True) -> Contest:
        student = [torch.randn(B, L, H, device=device).to(dtype) for _ in range(n)]
        teacher = [torch.randn(B, L, H_t, device=device).to(dtype) for _ in range(n)]
        learned = [x.requires_grad_() for x in student]
        projection = None
        if H_t != H:
            projection = (torch.randn(H, H_t, device=device) / H**0.5).to(dtype).requires_grad_()
            learned.append(projection)
        contest = Contest({})
        _ours(
            contest,
            "hidden_mse",
            device,
            dtype,
            lambda backend: _step(
                lambda: metakd.hidden_mse(student, teacher, projection=projection, backend=backend),
                *learned,
            ),
        )
        if not rivals:
            return contest

        def eager():
            seen = student if projection is None else [x @ projection for x in student]
            return sum(F.mse_loss(x.float(), y.float()) for x, y in zip(seen, teacher))

        _try(contest, "eager", lambda: _step(eager, *learned))
        compiled = torch.compile(eager, dynamic=False)
        _try(contest, "torch.compile", lambda: _step(compiled, *learned))
        if projection is not None:

            def residual():
                """The difference as the product's own epilogue."""
                pairs = [(x.flatten(0, 1), y.flatten(0, 1)) for x, y in zip(student, teacher)]
                gaps = [torch.addmm(y, x, projection, beta=-1.0) for x, y in pairs]
                return sum(gap.float().square().mean() for gap in gaps)

            _try(contest, "addmm with beta = -1", lambda: _step(residual, *learned))
        return contest

    widths = f"{H}" if H_t == H else f"{H} to {H_t}"
    shape = f"{n} x [{B}, {L}, {widths}]"
    least = n * B * L * (3 * H + 2 * H_t) * dtype.itemsize if H_t == H else 0
    flops = 0 if H_t == H else 6 * n * B * L * H * H_t
    return Row("hidden_mse", shape, dtype, devices, build, bytes=least, flops=flops, quick=quick)


def _mean_row(B: int, L: int, H: int, dtype, devices, quick=False) -> Row:
    def build(device: str, rivals: bool = True) -> Contest:
        hidden = torch.randn(B, L, H, device=device).to(dtype).requires_grad_()
        lengths = torch.randint(L // 2, L, (B, 1), device=device)
        mask = torch.arange(L, device=device) < lengths
        contest = Contest({})
        _ours(
            contest,
            "masked_mean",
            device,
            dtype,
            lambda backend: _step(
                lambda: metakd.masked_mean(hidden, mask, backend=backend).float().sum(), hidden
            ),
        )
        if not rivals:
            return contest

        def eager():
            weight = mask[:, :, None].to(dtype)
            return ((hidden * weight).sum(1) / weight.sum(1)).float().sum()

        _try(contest, "eager", lambda: _step(eager, hidden))
        contest.tolerance = 0.2 if dtype == torch.bfloat16 else 1e-2  # a sum around 0
        return contest

    least = 2 * B * L * H * dtype.itemsize
    return Row("masked_mean", f"[{B}, {L}, {H}]", dtype, devices, build, bytes=least, quick=quick)


def _weights_row(N: int, H: int, K: int, M: int, dtype, devices, quick=False) -> Row:
    """Prototypes, scores and expertise of a corpus: one loss so that they can be compared."""

    def build(device: str, rivals: bool = True) -> Contest:
        embedding = (torch.randn(N, H, device=device) + 1).to(dtype)
        domain = torch.randint(K, (N,), device=device)
        label = torch.randint(M, (N,), device=device)
        logits = torch.randn(N, M, device=device)
        contest = Contest({})

        def weights(backend):
            def step():
                prototypes, counts = metakd.class_prototypes(
                    embedding, domain, label, num_domains=K, num_classes=M, backend=backend
                )
                t = metakd.prototype_score(
                    embedding, prototypes, counts, domain, label, backend=backend
                )
                return metakd.domain_expertise(logits, label, t, backend=backend).sum()

            return step

        _ours(contest, "prototype_score", device, dtype, weights)
        return contest

    shape = f"[{N}, {H}], {K} domains x {M} classes"
    least = 2 * N * H * dtype.itemsize
    return Row("prototype_score", shape, dtype, devices, build, bytes=least, quick=quick)


FP32, BF16, CPU, CUDA = torch.float32, torch.bfloat16, ("cpu",), ("cuda",)

ROWS = [
    # The method's own regime, a BERT vocabulary, and for each operation what CI can afford.
    *(_soft_row("soft_kl", 8192, C, FP32, (*CPU, *CUDA), quick=C == 2) for C in (2, 3, 5)),
    _soft_row("soft_kl", 256, 1024, FP32, CPU, quick=True),
    _soft_row("soft_kl", 256, 30522, FP32, CPU),
    _soft_row("soft_kl", 256, 30522, BF16, CPU),
    *(_soft_row("soft_kl", 8192, C, BF16, CUDA) for C in (30522, 50257, 128256, 151936)),
    _soft_row("soft_kl", 4096, 128256, FP32, CUDA),
    _one_read_row(256, 1024, FP32, CPU, quick=True),
    *(_one_read_row(8192, C, BF16, CUDA) for C in (2048, 30522, 50257, 128256, 151936)),
    _soft_row("soft_reverse_kl", 256, 30522, FP32, CPU, beta=1.0, quick=True),
    _soft_row("soft_jsd", 256, 30522, FP32, CPU, beta=0.5, quick=True),
    *(_soft_row("soft_jsd", 8192, C, BF16, CUDA, beta=0.5) for C in (30522, 128256)),
    _mixture_row(32, 3, 2, FP32, CPU),
    *(_mixture_row(8192, 3, C, FP32, (*CPU, *CUDA)) for C in (2, 5)),
    _mixture_row(256, 3, 1024, FP32, CPU, quick=True),
    *(_mixture_row(256, 3, 30522, dtype, CPU) for dtype in (FP32, BF16)),
    _mixture_row(8192, 3, 30522, BF16, CUDA),
    _head_row(128, 384, 8192, FP32, CPU, beta=0.0, quick=True),
    _head_row(512, 384, 30522, FP32, CPU, beta=0.0),
    _head_row(512, 384, 30522, FP32, CPU, beta=0.5),
    _head_row(8192, 4096, 128256, BF16, CUDA, beta=0.0),
    _head_row(8192, 4096, 128256, BF16, CUDA, beta=0.5),
    *(
        _attention_row("attention_score_mse", 4, 12, L, 26, 64, FP32, CPU, quick=L == 128)
        for L in (64, 128, 256, 512, 2048)
    ),
    *(
        _attention_row("attention_score_mse", 32, 12, L, 26, 64, BF16, CUDA)
        for L in (128, 512, 4096)
    ),
    *(
        _attention_row(op, 4, 12, L, 26, 64, FP32, CPU, quick=L == 128)
        for op in ("attention_kl", "attention_prob_mse")
        for L in (128, 512)
    ),
    *(
        _attention_row(op, 8, 12, 1024, 26, 64, BF16, CUDA)
        for op in ("attention_kl", "attention_prob_mse")
    ),
    _attention_row("attention_kl", 1, 12, 16384, 26, 64, BF16, CUDA, eager=False),
    *(
        _attention_row(op, *shape, window=64)
        for op in ("attention_score_mse", "attention_kl", "attention_prob_mse")
        for shape in ((2, 12, 1024, 26, 64, FP32, CPU), (8, 12, 4096, 26, 64, BF16, CUDA))
    ),
    _hidden_row(5, 8, 128, 384, 384, FP32, CPU, quick=True),
    _hidden_row(5, 8, 128, 312, 768, FP32, CPU),
    _hidden_row(5, 32, 128, 768, 768, BF16, CUDA),
    _hidden_row(5, 32, 128, 312, 768, BF16, CUDA),
    _mean_row(32, 128, 384, FP32, CPU, quick=True),
    _mean_row(256, 512, 768, BF16, CUDA),
    _weights_row(6480, 384, 4, 2, FP32, CPU, quick=True),
    _weights_row(400000, 768, 5, 3, FP32, CUDA),
]


def rows_of(op: str, device: str, shape: str = "") -> list[Row]:
    """The rows of an operation on a device whose shape begins so."""
    return [
        row
        for row in ROWS
        if row.op == op and device in row.devices and row.shape.startswith(shape)
    ]
