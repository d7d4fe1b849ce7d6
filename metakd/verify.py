"""Is a backend right? Every operation against float64, from the same quantised inputs.

The exact value is the reference's in float64. The yardstick is the reference's in the dtype under
test, because an error that eager PyTorch makes too is the dtype's and not the kernel's: each row
(and each row of a gradient) may be off by twice what eager is off, plus one rounding of the result
and a few of the operation's own magnitude. No tolerance is tuned by hand. ``metakd verify`` runs
``CASES``, and the tests many more, through the same ``check``. Imports torch, ``metakd.functional``
and ``metakd.ops``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from metakd import functional, ops

ACCUMULATED_ROUNDINGS = 4  # float32 roundings of the operation's magnitude that any order may add


WITHOUT_REDUCTION = ("masked_mean", "class_prototypes", "prototype_score", "domain_expertise")


@dataclass(frozen=True)
class Case:
    """One call of a loss.

    ``tensors`` holds floating tensors by name, which ``arrange`` makes the door's arguments of
    (None: they are), ``learned`` the names among them that get gradients, ``fixed`` arguments that
    are never quantised (masks, labels, weights), ``magnitude`` the size of the numbers that are
    summed to a row, and ``magnitude_d`` that of a gradient (None: the same).
    """

    op: str
    tensors: dict[str, Tensor]
    learned: tuple[str, ...]
    options: dict = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    magnitude: float = 1.0
    magnitude_d: float | None = None
    arrange: Callable[[dict[str, Tensor]], dict] | None = None

    def magnitude_of(self, result: str) -> float:
        if result == "rows" or self.magnitude_d is None:
            return self.magnitude
        return self.magnitude_d

    def quantised(self, dtype: torch.dtype) -> Case:
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    def moved(self, device: str) -> Case:
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        fixed = {name: tensor.to(device) for name, tensor in self.fixed.items()}
        return replace(self, tensors=tensors, fixed=fixed)

    def results(self, backend: str, seed: int = 0) -> dict[str, Tensor]:
        """Rows, and the gradient of each learned tensor for a random upstream gradient. Of an
        operation that returns several tensors the first is its rows."""
        tensors = {
            name: tensor.detach().requires_grad_(name in self.learned)
            for name, tensor in self.tensors.items()
        }
        options = {**self.options, "backend": backend}
        if self.op not in WITHOUT_REDUCTION:
            options["reduction"] = "none"
        arguments = tensors if self.arrange is None else self.arrange(tensors)
        rows = getattr(functional, self.op)(**arguments, **self.fixed, **options)
        rows = rows[0] if isinstance(rows, tuple) else rows
        if not self.learned:
            return {"rows": rows}
        generator = torch.Generator().manual_seed(seed)
        upstream = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        leaves = [tensors[name] for name in self.learned]
        gradients = torch.autograd.grad(rows, leaves, upstream.to(rows))
        named = {f"d {name}": gradient for name, gradient in zip(self.learned, gradients)}
        return {"rows": rows.detach(), **named}


@dataclass(frozen=True)
class Finding:
    """What ``check`` saw of one result: errors against float64 relative to the largest exact
    value, and the worst ratio of error to budget (at most 1 where all is well)."""

    result: str
    max_error: float
    mean_error: float
    eager_max_error: float
    eager_mean_error: float
    of_budget: float

    @property
    def passed(self) -> bool:
        return self.of_budget <= 1  # a NaN does not pass


def judge(name: str, actual: Tensor, eager: Tensor, exact: Tensor, magnitude: float) -> Finding:
    """Compares one result, row by row. Infinities and NaN must be where the exact value has them.

    Args:
        actual: [N, ...], of the backend.
        eager: [N, ...], of the reference in the dtype under test.
        exact: [N, ...], of the reference in float64.
        magnitude: size of the numbers that were summed.
    """
    if not len(exact):
        return Finding(name, 0.0, 0.0, 0.0, 0.0, 0.0 if actual.shape == exact.shape else math.inf)
    rounding = torch.finfo(actual.dtype).eps / 2
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    working = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
    exact = exact.double()
    # A finite number beyond the dtype's range is infinite in it.
    exact = (
        exact.to(actual.dtype).double().where(exact.abs() > torch.finfo(actual.dtype).max, exact)
    )
    real = exact.isfinite()
    if actual.shape != exact.shape or not _same_elsewhere(actual.double(), exact, real):
        return Finding(name, math.inf, math.inf, math.nan, math.nan, math.inf)

    def errors(value: Tensor) -> Tensor:
        return (value.double() - exact).where(real, 0.0).abs().reshape(len(exact), -1)

    exact_rows, own, others = (
        exact.where(real, 0.0).reshape(len(exact), -1).abs(),
        errors(actual),
        errors(eager),
    )
    others = others.nan_to_num(0.0, 0.0, 0.0)  # eager may overflow where the backend does not
    budget = (
        2 * (others.amax(1) + others.amax(1).mean())
        + exact_rows.amax(1) * rounding
        + ACCUMULATED_ROUNDINGS * working * (exact_rows.amax(1) + magnitude)
        + smallest
    )
    size = exact_rows.amax().clamp(min=torch.finfo(torch.float64).tiny)
    return Finding(
        name,
        max_error=float(own.amax() / size),
        mean_error=float(own.mean() / size),
        eager_max_error=float(others.amax() / size),
        eager_mean_error=float(others.mean() / size),
        of_budget=float((own.amax(1) / budget).amax()),
    )


def _same_elsewhere(actual: Tensor, exact: Tensor, real: Tensor) -> bool:
    alike = (actual == exact) | (actual.isnan() & exact.isnan())
    return bool((real & actual.isfinite() | ~real & alike).all())


def check(case: Case, backend: str, dtype: torch.dtype) -> list[Finding]:
    """Rows and gradients of ``backend`` in ``dtype`` against float64."""
    quantised = case.quantised(dtype)
    actual = quantised.results(backend)
    eager, exact = _eager_and_exact(quantised)
    if dtype == torch.float64:
        # Nothing more precise is at hand, and what is taken for exact has eager's own error: that
        # of float32 scaled down, with room for the 10 to 20 times by which it was seen to be larger
        # (logits [16, 30522] against 80-bit numbers; C++ was within twice the scaled error there).
        rough, fine = _eager_and_exact(case.quantised(torch.float32))
        scale = 32 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        eager = {name: exact[name] + scale * (rough[name] - fine[name]) for name in exact}
    return [
        judge(name, actual[name], eager[name], exact[name], case.magnitude_of(name))
        for name in exact
    ]


def _eager_and_exact(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return case.results("reference"), case.quantised(torch.float64).results("reference")


# What `metakd verify` runs


def logit_case(
    op: str,
    shape: tuple[int, ...],
    temperature: float = 2.0,
    spread: float = 3.0,
    labels: bool = True,
    seed: int = 0,
    **options,
) -> Case:
    """Logits of student and teacher that agree in part, with outliers: random uniform ones have
    nothing to get wrong."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    common = rand(*shape)
    student, teacher = (spread * (common + 0.5 * rand(*shape)) for _ in "st")
    place = torch.randint(shape[-1], shape[:-1], generator=generator)[..., None]
    student = student.scatter_add(-1, place, torch.full_like(student, 5 * spread))
    teacher = teacher.scatter_add(-1, place.flip(0), torch.full_like(teacher, 5 * spread))
    fixed = {"mask": torch.rand(shape[:-1], generator=generator) < 0.9}
    if labels:
        fixed["label"] = torch.randint(shape[-1], shape[:-1], generator=generator)
        options = {"hard_weight": 0.5, **options}
    scaled = options.get("scale_by_temperature", True)
    return Case(
        op,
        {"student": student, "teacher": teacher},
        ("student",),
        {"temperature": temperature, **options},
        fixed,
        magnitude=temperature**2 if scaled else 1.0,
    )


def mixture_case(
    shape: tuple[int, ...],
    temperature: float = 2.0,
    spread: float = 3.0,
    nearness: float = 0.5,
    seed: int = 0,
    **options,
) -> Case:
    """Logits of a student and of teachers [..., M, C] that agree in part, with outliers, and shares
    of which some are 0.

    ``nearness`` is how far each is from what they have in common.
    """
    generator = torch.Generator().manual_seed(seed)
    *rows, teachers, classes = shape

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def outliers(logits: Tensor) -> Tensor:
        place = torch.randint(classes, logits.shape[:-1], generator=generator)[..., None]
        return logits.scatter_add(-1, place, torch.full_like(logits, 5 * spread))

    common = rand(*rows, classes)
    student = outliers(spread * (common + nearness * rand(*rows, classes)))
    teacher = spread * (common.unsqueeze(-2) + nearness * rand(*shape))
    shares = (2 * rand(*rows, teachers)).softmax(-1)
    if teachers > 1:
        shares[: len(shares) // 4, ..., 0] = 0.0
    return Case(
        "mixture_kl",
        {"student": student, "teacher": outliers(teacher), "shares": shares},
        ("student", "shares"),
        {"temperature": temperature, **options},
        {"mask": torch.rand(rows, generator=generator) < 0.9},
        magnitude=temperature**2 if options.get("scale_by_temperature", True) else 1.0,
    )


def head_case(divergence: str, rows: int, hidden: int, classes: int, **options) -> Case:
    generator = torch.Generator().manual_seed(rows)

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return Case(
        "linear_soft_kl",
        {
            "student": rand(rows, hidden),
            "head": rand(classes, hidden) / hidden**0.5,
            "bias": rand(classes),
            "teacher": 3 * rand(rows, classes),
        },
        ("student", "head", "bias"),
        # Three chunks or so in any dtype.
        {"divergence": divergence, "chunk_bytes": rows * classes, **options},
        {"mask": torch.rand(rows, generator=generator) < 0.9},
    )


def attention_case(
    op: str,
    shape: tuple[int, int, int],
    sizes: tuple[int, int] = (26, 64),
    layers: int = 1,
    nearness: float = 0.5,
    masked: bool = True,
    seed: int = 0,
    **options,
) -> Case:
    """Queries and keys [B, A, L, D] of models that agree in part, with padding and an outlier.

    ``nearness`` is how far the student is from the teacher where their head sizes agree.
    """
    generator = torch.Generator().manual_seed(seed)
    (batch, heads, length), (own, taught) = shape, sizes

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tensors = {}
    for layer in range(layers):
        for kind in ("query", "key"):
            # As models hold them: the heads of a token side by side.
            states = rand(batch, length, heads, taught)
            states[:, :1, :, 0] += 4  # a token that all others look at
            tensors[f"{kind} {layer} of teacher"] = states.transpose(1, 2)
            shared = torch.nn.functional.pad(states, (0, own - taught))  # cuts where own is smaller
            tensors[f"{kind} {layer}"] = (
                shared + nearness * rand(batch, length, heads, own)
            ).transpose(1, 2)

    def arrange(given: dict[str, Tensor]) -> dict:
        sides = [
            [
                (given[f"query {layer}{side}"], given[f"key {layer}{side}"])
                for layer in range(layers)
            ]
            for side in ("", " of teacher")
        ]
        return dict(zip(("student", "teacher"), sides))

    fixed = {}
    if masked:
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        lengths[:1] = length
        real = torch.arange(length) < lengths[:, None]
        fixed = {"query_mask": real, "key_mask": real}
    magnitude = float(layers)
    if op == "attention_prob_mse":  # rows of a map sum to 1 and are averaged over all pairs
        magnitude /= max(length, 1)
    if op == "attention_score_mse":  # the Gram form takes the difference of both sides' squares
        magnitude = 0.0
        for name in ("", " of teacher"):
            query, key = tensors[f"query 0{name}"], tensors[f"key 0{name}"]
            scores = (query @ key.mT) * query.shape[-1] ** -0.5
            magnitude += layers * float(scores.square().mean())
    learned = tuple(name for name in tensors if not name.endswith("teacher"))
    return Case(
        op,
        tensors,
        learned,
        options,
        fixed,
        magnitude,
        magnitude_d=2 * magnitude / max(heads * length, 1),
        arrange=arrange,
    )


def relation_case(
    shape: tuple[int, int, int], size: int, heads: int, layers: int = 1, seed: int = 0
) -> Case:
    """States [B, A, L, D], regrouped into ``heads`` relation heads."""
    given = attention_case("relation_kl", shape, (size, size), layers, 0.5, False, seed)
    tensors = {name: x for name, x in given.tensors.items() if name.startswith("query")}

    def arrange(tensors: dict[str, Tensor]) -> dict:
        own = [tensors[f"query {layer}"] for layer in range(layers)]
        return {
            "student": own,
            "teacher": [tensors[f"query {layer} of teacher"] for layer in range(layers)],
        }

    batch, _, length = shape
    mask = torch.arange(length) < torch.arange(length, length - batch, -1)[:, None].clamp(min=1)
    return Case(
        "relation_kl",
        tensors,
        tuple(name for name in tensors if not name.endswith("teacher")),
        {"relation_heads": heads},
        {"mask": mask},
        magnitude_d=1 / max(shape[1] * length, 1),
        arrange=arrange,
    )


def hidden_case(
    shape: tuple[int, int, int], layers: int = 2, projected: int = 0, seed: int = 0
) -> Case:
    """Layers [B, L, H]; ``projected``: the student's width, 0 for none."""
    generator = torch.Generator().manual_seed(seed)
    batch, length, width = shape

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tensors = {}
    for layer in range(layers):
        tensors[f"student {layer}"] = rand(batch, length, projected or width)
        tensors[f"teacher {layer}"] = rand(batch, length, width)
        tensors[f"teacher {layer}"][:, :1] *= 10
    learned = [f"student {layer}" for layer in range(layers)]
    if projected:
        tensors["projection"] = rand(projected, width) / projected**0.5
        learned.append("projection")

    def arrange(given: dict[str, Tensor]) -> dict:
        found = {
            side: [given[f"{side} {layer}"] for layer in range(layers)]
            for side in ("student", "teacher")
        }
        return found | ({"projection": given["projection"]} if projected else {})

    mask = torch.rand(batch, length, generator=generator) < 0.8
    return Case(
        "hidden_mse",
        tensors,
        tuple(learned),
        {},
        {"mask": mask},
        magnitude=2.0 * layers,
        magnitude_d=2 / max(length * width, 1),
        arrange=arrange,
    )


def mean_case(shape: tuple[int, int, int], seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    batch, length, _ = shape
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, length, generator=generator) < 0.7
    return Case("masked_mean", {"hidden": hidden}, ("hidden",), {}, {"mask": mask})


def weight_cases(
    rows: int, hidden: int, domains: int, classes: int, seed: int = 0
) -> dict[str, Case]:
    """Prototypes, scores and expertise of one corpus, by operation."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    common = rand(hidden)  # embeddings share a large component
    embedding = rand(rows, hidden) + common
    index = {
        name: torch.randint(size, (rows,), generator=generator)
        for name, size in (("domain", domains), ("label", classes))
    }
    counts = torch.randint(3, (domains, classes), generator=generator)  # some cells are empty
    prototypes = rand(domains, classes, hidden) + common
    logits = {"teacher_logits": 3 * rand(rows, classes), "t": rand(rows).tanh()}
    return {
        "class_prototypes": Case(
            "class_prototypes",
            {"embedding": embedding},
            (),
            {"num_domains": domains, "num_classes": classes},
            index,
        ),
        "prototype_score": Case(
            "prototype_score",
            {"embedding": embedding, "prototypes": prototypes, "center": common},
            (),
            {"alpha": 0.3},
            {**index, "counts": counts},
        ),
        "domain_expertise": Case("domain_expertise", logits, (), {}, {"label": index["label"]}),
    }


def _weight_case(op: str, rows: int, hidden: int, domains: int, classes: int) -> Case:
    return weight_cases(rows, hidden, domains, classes)[op]


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """(name, builder) of every case."""
    for op, options in (("soft_kl", {}), ("soft_reverse_kl", {}), ("soft_jsd", {"beta": 0.3})):
        for rows, classes in ((512, 3), (64, 1000), (16, 30522)):
            for temperature in (0.5, 4.0):

                def build(op=op, shape=(rows, classes), temperature=temperature, options=options):
                    return logit_case(op, shape, temperature, **options)

                yield f"{rows} x {classes}, T {temperature}", build
    for shape in ((512, 3, 3), (64, 2, 1000), (16, 5, 5000)):
        for temperature in (0.5, 4.0):
            name = " x ".join(map(str, shape))
            yield f"{name}, T {temperature}", partial(mixture_case, shape, temperature)
    for divergence in ("kl", "reverse_kl", "jsd"):
        yield f"{divergence}, 64 x 32 x 500", partial(head_case, divergence, 64, 32, 500)
    for length in (65, 300):
        for form in ("gram", "tiled"):
            yield (
                f"{form}, 2 x 3 x {length} x 26/64",
                partial(attention_case, "attention_score_mse", (2, 3, length), layers=2, form=form),
            )
        for op in ("attention_kl", "attention_prob_mse"):
            yield (
                f"2 x 3 x {length} x 26/64",
                partial(attention_case, op, (2, 3, length), layers=2),
            )
    for op in ("attention_score_mse", "attention_kl", "attention_prob_mse"):
        yield (
            "window 40, 2 x 3 x 150 x 26/64",
            partial(attention_case, op, (2, 3, 150), layers=2, window=40),
        )
    yield "2 x 4 x 65 x 24, 3 relation heads", lambda: relation_case((2, 4, 65), 24, 3, 3)
    yield "5 layers, 4 x 60 x 384", lambda: hidden_case((4, 60, 384), 5)
    yield "2 layers, 4 x 60 x 312 to 384", lambda: hidden_case((4, 60, 384), 2, 312)
    yield "8 x 60 x 384", lambda: mean_case((8, 60, 384))
    for op in ("class_prototypes", "prototype_score", "domain_expertise"):
        yield "200 x 384, 4 domains x 3 classes", partial(_weight_case, op, 200, 384, 4, 3)


def verify(
    devices: list[str], backends: tuple[str, ...] = ("eager", "cpp", "triton")
) -> list[dict]:
    """Runs every case on each backend but the reference, dtype and device that can run it.

    Returns:
        One dictionary per case and result: op, case, backend, device, dtype, and the fields of
        ``Finding`` with ``passed``. Of a case that could not be computed, ``result`` says why.
    """
    report = []
    for device in devices:
        ops.select("soft_kl", "auto", device)  # compiles the kernels, if nothing has yet
        for name, build in cases():
            case = build().moved(device)
            for backend in backends:
                for dtype in ops.DTYPES[backend]:
                    if ops.why_not(case.op, backend, device, dtype) is not None:
                        continue
                    head = {
                        "op": case.op,
                        "case": name,
                        "backend": backend,
                        "device": device,
                        "dtype": str(dtype).removeprefix("torch."),
                    }
                    for finding in _findings(case, backend, dtype):
                        report.append({**head, **vars(finding), "passed": finding.passed})
    return report


def _findings(case: Case, backend: str, dtype: torch.dtype) -> list[Finding]:
    """As ``check``; that nothing could be computed is a finding, and no reason to look no
    further."""
    try:
        return check(case, backend, dtype)
    except Exception as error:  # a compiler's, a driver's
        first = (str(error).splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first[:160]}"
        return [Finding(reason, math.inf, math.inf, math.nan, math.nan, math.inf)]
