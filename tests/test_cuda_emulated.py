"""The CUDA kernels of soft_kl where there is no GPU: emulator/ compiles them as they are for a
device of the CPU and runs every thread, in an order that a seed chooses. Against the reference in
float64, within the budgets of ``metakd.verify``.

Legend: N rows, C classes, V classes that count.
"""

import ctypes
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import compile_cuda
import pytest
import torch
from oracle import SABOTAGES
from torch import Tensor

from metakd import ops
from metakd.functional import soft
from metakd.verify import Finding, judge, logit_case

FOLDER = Path(__file__).with_name("emulator")
BETAS = {"kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in the order of C++
KERNELS = ("narrow", "plain", "one_read")
BROKEN = ("nothing", "block_sync", "cluster_sync", "bytes_wait", "remote_bytes_wait")

every_loss = pytest.mark.parametrize("loss", BETAS)


# The library


class Call(ctypes.Structure):
    """Field by field the struct Call of emulator/soft_kl.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "dstudent", "rows", "stats")),
        *((name, ctypes.c_void_p) for name in ("given", "drows", "mask", "label")),
        *((name, ctypes.c_int64) for name in ("stride_s", "stride_t", "stride_d")),
        *((name, ctypes.c_int64) for name in ("drows_stride", "mask_stride", "label_stride", "n")),
        *((name, ctypes.c_double) for name in ("temperature", "scale", "beta", "hard_weight")),
        *((name, ctypes.c_int) for name in ("vocab", "width", "dtype_s", "dtype_t", "kernel")),
        *((name, ctypes.c_int) for name in ("ranks", "stages", "lag", "clusters", "broken")),
        ("seed", ctypes.c_uint64),
    ]


def cuda_headers() -> Path | None:
    """Where nvcc takes its headers from; it may be a script that calls another nvcc."""
    if compile_cuda.nvcc() is None:
        return None
    command = [compile_cuda.nvcc(), "--dryrun", "-x", "cu", FOLDER / "soft_kl.cpp"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    found = re.search(r'INCLUDES="-I([^"]+)"', said)
    return Path(found[1]) if found else None


def build(
    folder: Path, op: str = "soft_kl", request: type = Call, csrc: Path = compile_cuda.CSRC
) -> ctypes.CDLL:
    """Compiles the kernels of ``op`` in ``csrc`` for the emulated device; they take a
    ``request``."""
    headers = cuda_headers()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if headers is None or not (headers / "cuda_bf16.h").is_file():
        pytest.skip("no CUDA headers: no nvcc, or none beside it (set CUDA_HOME or PATH)")
    if compiler is None:
        pytest.skip("no C++ compiler (set CXX)")
    library = folder / f"{op}.so"
    command = [
        *(compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared"),
        "-U_FORTIFY_SOURCE",  # its longjmp takes a change of stacks for an error
        *(f"-I{path}" for path in (FOLDER, csrc / "include", headers)),
        *(FOLDER / f"{op}.cpp", "-o", library),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = ctypes.CDLL(str(library))
    entry = getattr(loaded, f"{op}_emulated")
    entry.argtypes = [ctypes.POINTER(request)]
    entry.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulator"))


# One call


@dataclass(frozen=True)
class Kernel:
    """Which kernel runs, and how the device behaves meanwhile. one_read: without ``ranks`` what the
    launcher's plan says."""

    name: str
    ranks: int = 0  # blocks of a cluster
    stages: int = 0  # rows in flight
    lag: bool = False  # the gradient of a row is computed beside the statistics of the next
    clusters: int = 1
    seed: int = 0
    broken: str = "nothing"

    def __str__(self) -> str:
        plan = f"-{self.ranks}x{self.stages}{'-lag' * self.lag}" if self.ranks else ""
        return self.name + plan


@dataclass(frozen=True)
class Inputs:
    student: Tensor  # [N, C_s], a view into a larger buffer
    teacher: Tensor  # [N, C_t]
    mask: Tensor | None  # [N]
    label: Tensor | None  # [N]
    drows: Tensor  # [N]
    settings: soft.Settings

    def cloned(self) -> "Inputs":
        """With a student, and all of its buffer, that may be overwritten."""
        return replace(self, student=placed_as(self.student, whole(self.student).clone()))


class DeviceError(Exception):
    """What went wrong on the emulated device."""


def whole(x: Tensor) -> Tensor:
    """All of the buffer that ``x`` is a view into."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def placed_as(x: Tensor, buffer: Tensor) -> Tensor:
    return buffer.as_strided(x.shape, x.stride(), x.storage_offset())


def outside(x: Tensor) -> Tensor:
    """The bytes of the buffer of ``x``, with 0 where ``x`` is."""
    buffer = whole(x).clone()
    placed_as(x, buffer).zero_()
    return buffer.view(torch.uint8)


def call(library, kernel: Kernel, inputs: Inputs, **written: Tensor) -> Call:
    """Launches; ``written``: rows, stats, dstudent, and ``given`` which is read."""
    student, teacher, settings = inputs.student, inputs.teacher, inputs.settings
    request = Call(
        student=student.data_ptr(),
        teacher=teacher.data_ptr(),
        stride_s=student.stride(0),
        stride_t=teacher.stride(0),
        n=len(student),
        temperature=settings.temperature,
        scale=settings.scale,
        beta=settings.beta,
        hard_weight=settings.hard_weight,
        vocab=settings.vocab_size,
        width=student.shape[1],
        dtype_s=DTYPES.index(student.dtype),
        dtype_t=DTYPES.index(teacher.dtype),
        kernel=KERNELS.index(kernel.name),
        ranks=kernel.ranks,
        stages=kernel.stages,
        lag=kernel.lag,
        clusters=kernel.clusters,
        broken=BROKEN.index(kernel.broken),
        seed=kernel.seed,
    )
    for name in ("mask", "label", "drows"):
        if (tensor := getattr(inputs, name)) is not None:
            setattr(request, name, tensor.data_ptr())
            setattr(request, f"{name}_stride", tensor.stride(0))
    for name, tensor in written.items():
        setattr(request, name, tensor.data_ptr())
    if "dstudent" in written:
        request.stride_d = written["dstudent"].stride(0)
    if error := library.soft_kl_emulated(request):
        raise DeviceError(error.decode())
    return request


def forward(library, kernel: Kernel, inputs: Inputs) -> tuple[Tensor, Tensor]:
    rows = torch.full((len(inputs.student),), math.nan, dtype=inputs.drows.dtype)
    stats = torch.full((len(ops.STATS), len(rows)), math.nan, dtype=rows.dtype)
    call(library, kernel, inputs, rows=rows, stats=stats)
    return rows, stats


def in_place(library, kernel: Kernel, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Rows and gradient of soft_kl_fwd_bwd_; nothing around the student may change."""
    own = inputs.cloned()
    rows = torch.full((len(own.student),), math.nan, dtype=own.drows.dtype)
    call(library, kernel, own, rows=rows, dstudent=own.student)
    assert torch.equal(outside(own.student), outside(inputs.student)), "a stray write"
    return rows, own.student


def results(library, kernel: Kernel, inputs: Inputs) -> dict[str, Tensor]:
    """All that a kernel computes."""
    rows, stats = forward(library, kernel, inputs)
    assert stats.isfinite().all()
    found = {"rows": rows}
    if kernel.name != "one_read":  # which has no backward
        found["d student"] = torch.full_like(
            inputs.student, math.nan, memory_format=torch.contiguous_format
        )
        call(library, kernel, inputs, given=stats, dstudent=found["d student"])
    found["rows in place"], found["d student in place"] = in_place(library, kernel, inputs)
    return found


def wanted(inputs: Inputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What the reference makes of it, in the inputs' own dtypes or in another."""
    student, teacher = (
        x if dtype is None else x.to(dtype) for x in (inputs.student, inputs.teacher)
    )
    leaf = student.detach().clone().requires_grad_()
    fixed = (inputs.mask, inputs.label, inputs.settings)
    rows = soft.rows("reference", leaf, teacher, *fixed)
    (gradient,) = torch.autograd.grad(rows, leaf, inputs.drows.to(rows))
    return {"rows": rows.detach(), "d student": gradient}


def findings(inputs: Inputs, found: dict[str, Tensor]) -> list[Finding]:
    eager, exact = wanted(inputs), wanted(inputs, DOUBLE)
    if inputs.drows.dtype == DOUBLE:
        # Nothing is more precise; float32's own error, scaled, with room for what was seen.
        rough = wanted(inputs, SINGLE)
        scale = 32 * torch.finfo(DOUBLE).eps / torch.finfo(SINGLE).eps
        eager = {name: exact[name] + scale * (rough[name] - exact[name]) for name in exact}
    size = inputs.settings.scale
    return [
        judge(name, value, *(x[name.removesuffix(" in place")] for x in (eager, exact)), size)
        for name, value in found.items()
    ]


def check(library, kernel: Kernel, inputs: Inputs) -> None:
    for finding in findings(inputs, results(library, kernel, inputs)):
        assert finding.passed, finding


# What it works on


def embedded(x: Tensor, width: int, stride: int, offset: int) -> Tensor:
    """``x`` [N, V] as the first columns of a view [N, width] into a buffer that holds NaN."""
    buffer = torch.full((offset + len(x) * stride + 16,), math.nan, dtype=x.dtype)
    view = buffer.as_strided((len(x), width), (stride, 1), offset)
    view[:, : x.shape[1]] = x
    return view


# Of student and teacher: columns beyond V, columns between rows, and columns before the first row.
LAYOUTS = {
    "tight": ((0, 0, 0), (0, 0, 0)),
    "odd": ((0, 3, 5), (0, 3, 5)),  # sides agree modulo 16 bytes
    "unlike": ((5, 0, 1), (0, 2, 3)),  # and here they do not
}


def inputs_of(
    loss: str,
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype] = (SINGLE, SINGLE),
    layout: str = "tight",
    temperature: float = 2.0,
    labels: bool = True,
    masked: bool = True,
    seed: int = 0,
) -> Inputs:
    case = logit_case("soft_kl", shape, temperature, seed=seed)
    mask, label = case.fixed["mask"], case.fixed["label"]
    logits = [x.to(dtype) for x, dtype in zip(case.tensors.values(), dtypes)]
    drows = torch.randn(len(mask), 2, generator=torch.Generator().manual_seed(seed))[:, 0]
    drows = drows.double() if DOUBLE in dtypes else drows
    if masked:
        mask[1::3] = False
        mask[0] = True
        label[~mask] = -(10**12)
        drows[~mask] = math.nan
        for x in logits:
            x[~mask] = math.nan
    views = [
        embedded(x, shape[1] + beyond, shape[1] + beyond + gap, offset)
        for x, (beyond, gap, offset) in zip(logits, LAYOUTS[layout])
    ]
    settings = soft.Settings(shape[1], temperature, temperature**2, BETAS[loss], 0.5 * labels)
    apart = torch.stack([label, -label], 1)[:, 0]  # with a stride of 2
    return Inputs(*views, mask if masked else None, apart if labels else None, drows, settings)


# Against float64


@every_loss
@pytest.mark.parametrize("classes", [1, 3, 40, 300, 1024])
def test_narrow(library, loss, classes):
    rows = 75 if classes < 32 else 6
    for dtypes in ((SINGLE, SINGLE), (HALF, HALF), (torch.float16, SINGLE)):
        for layout, labels in (("tight", False), ("unlike", True)):
            inputs = inputs_of(loss, (rows, classes), dtypes, layout, labels=labels)
            check(library, Kernel("narrow"), inputs)


@every_loss
@pytest.mark.parametrize(
    "dtypes",
    [
        (SINGLE,) * 2,
        (HALF,) * 2,
        (torch.float16,) * 2,
        (HALF, SINGLE),
        (DOUBLE,) * 2,
        (SINGLE, DOUBLE),
    ],
    ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
def test_plain(library, loss, dtypes):
    for classes, layout, temperature in (
        (1, "tight", 1.0),
        (1025, "unlike", 0.5),
        (2051, "odd", 8.0),
        (9000, "tight", 1.0),
    ):
        inputs = inputs_of(loss, (3, classes), dtypes, layout, temperature, classes != 9000)
        check(library, Kernel("plain"), inputs)


# Kernel, classes, layout, dtype
ONE_READ = [
    (Kernel("one_read", 1, 1), 9001, "odd", torch.float16),
    (Kernel("one_read", 1, 2, True, seed=1), 1500, "tight", HALF),
    (Kernel("one_read", 1, 3, True, seed=2), 4100, "unlike", SINGLE),
    (Kernel("one_read", 1, 4, True, 2, seed=3), 700, "odd", HALF),
    (Kernel("one_read", 2, 1, seed=4), 1500, "unlike", HALF),
    (Kernel("one_read", 2, 2, seed=5), 3003, "odd", SINGLE),
    (Kernel("one_read", 2, 2, True, 2, seed=6), 1999, "tight", torch.float16),
    (Kernel("one_read", 2, 3, True, seed=7), 2500, "odd", HALF),
    (Kernel("one_read", 2, 4, seed=8), 40, "tight", SINGLE),
    (Kernel("one_read", 8, 1, seed=9), 2222, "tight", HALF),
    (Kernel("one_read", 8, 3, True, seed=10), 4567, "odd", HALF),
    (Kernel("one_read", 8, 4, seed=11), 20, "unlike", SINGLE),
]


@every_loss
@pytest.mark.parametrize(("kernel", "classes", "layout", "dtype"), ONE_READ, ids=str)
def test_one_read(library, loss, kernel, classes, layout, dtype):
    rows = 7 if kernel.ranks < 8 else 4
    labels = kernel.seed % 2 == 0
    temperature = (1.0, 2.0, 8.0)[kernel.seed % 3]
    inputs = inputs_of(loss, (rows, classes), (dtype, dtype), layout, temperature, labels)
    check(library, kernel, inputs)


def test_sixteen_blocks(library):
    inputs = inputs_of("kl", (2, 5003), (HALF, HALF), "odd", masked=False)
    check(library, Kernel("one_read", 16, 1), inputs)


@pytest.mark.parametrize("loss", ["kl", "jsd"])
def test_planned(library, loss):
    """A vocabulary of BERT's size as the launcher lays it out, rows without 16-byte alignment."""
    inputs = inputs_of(loss, (4, 30522), (HALF, HALF), masked=False)
    rows = torch.empty(4)
    request = call(library, Kernel("one_read"), inputs.cloned(), rows=rows)
    assert request.ranks > 1 and request.stages > 1 and request.lag
    check(library, Kernel("one_read"), inputs)


@every_loss
@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 20.0])
@pytest.mark.parametrize(
    ("kernel", "shape", "labels"),
    [
        (Kernel("narrow"), (64, 4), False),
        *((Kernel("narrow"), (16, 300), labels) for labels in (False, True)),
        *((Kernel("plain"), (6, 3003), labels) for labels in (False, True)),
        *((Kernel("one_read", 2, 3, True), (6, 3003), labels) for labels in (False, True)),
    ],
    ids=str,
)
def test_temperatures(library, loss, temperature, kernel, shape, labels):
    """The lower, the more one class has of q: there g is large and g - inner nearly nothing."""
    for seed in range(4):
        options = {"temperature": temperature, "labels": labels, "seed": seed}
        check(library, kernel, inputs_of(loss, shape, **options))


# Edges

EVERY_KERNEL = [
    (Kernel("narrow"), 6),
    (Kernel("plain"), 1030),
    (Kernel("one_read", 2, 3, True), 1030),
]
every_kernel = pytest.mark.parametrize(("kernel", "classes"), EVERY_KERNEL, ids=str)


@every_loss
@every_kernel
def test_masked_classes(library, loss, kernel, classes):
    """-inf in both, and where the other side weighs nothing, is the exact limit."""
    sides = {"kl": ("teacher",), "reverse_kl": ("student",), "jsd": ("student", "teacher")}[loss]
    for walled in (("student", "teacher"), *((side,) for side in sides)):
        inputs = inputs_of(loss, (4, classes), labels=False, masked=False)
        for side in walled:
            getattr(inputs, side)[:, 1::3] = -math.inf
        check(library, kernel, inputs)


@every_kernel
def test_without_mass_at_the_students_maximum(library, kernel, classes):
    inputs = inputs_of("jsd", (4, classes), temperature=0.5, labels=False, masked=False)
    inputs.teacher.scatter_(1, inputs.student.argmax(1, keepdim=True), -math.inf)
    check(library, kernel, inputs)


@every_loss
@every_kernel
def test_equal_maxima(library, loss, kernel, classes):
    inputs = inputs_of(loss, (4, classes), temperature=0.05, labels=False, masked=False)
    inputs.student[:, 1::2] = inputs.student.amax(1, keepdim=True)
    check(library, kernel, inputs)


@every_kernel
def test_infinite_divergence(library, kernel, classes):
    for loss, side in (("kl", "student"), ("reverse_kl", "teacher")):
        inputs = inputs_of(loss, (3, classes), masked=False)
        getattr(inputs, side)[1, classes // 2] = -math.inf
        rows, _ = forward(library, kernel, inputs)
        assert rows.isinf().tolist() == [False, True, False] and rows[1] > 0


@every_loss
@every_kernel
def test_nan_stays_in_its_row(library, loss, kernel, classes):
    clean = inputs_of(loss, (5, classes), masked=False)
    expected = in_place(library, kernel, clean)
    others = [0, 1, 3, 4]

    def spoil(inputs, what):
        if what == "label":
            inputs.label[2] = classes
        elif what == "no mass":
            inputs.teacher[2] = -math.inf
        else:
            getattr(inputs, what)[2, classes // 2] = math.nan

    for what in ("student", "teacher", "no mass", "label"):
        inputs = inputs_of(loss, (5, classes), masked=False)
        inputs = replace(inputs, drows=clean.drows)
        spoil(inputs, what)
        rows, gradient = in_place(library, kernel, inputs)
        assert rows[2].isnan() and gradient[2].isnan().any(), what
        for one, other in zip((rows, gradient), expected):
            assert torch.equal(one[others], other[others]), what


@every_kernel
def test_expanded_arguments(library, kernel, classes):
    inputs = inputs_of("kl", (4, classes), masked=False)
    ones = torch.ones(1)
    inputs = replace(
        inputs,
        mask=ones.bool().expand(4),
        label=ones.long().expand(4),
        drows=ones.expand(4),
        teacher=inputs.teacher[:1].expand(4, classes),
    )
    check(library, kernel, inputs)


# The order of threads


@every_loss
@pytest.mark.parametrize(
    "kernel", [Kernel("plain"), Kernel("one_read", 2, 3, True), Kernel("one_read", 4, 2)], ids=str
)
def test_any_order_gives_the_same_bits(library, loss, kernel):
    inputs = inputs_of(loss, (5, 2500), (HALF, HALF), "odd", masked=False)
    first = in_place(library, kernel, inputs)
    for seed in range(1, 7):
        again = in_place(library, replace(kernel, seed=seed), inputs)
        for one, other in zip(first, again):
            assert torch.equal(one, other), seed


# The check itself


@every_loss
@pytest.mark.parametrize("broken", BROKEN[1:])
def test_a_broken_barrier_is_seen(library, loss, broken):
    inputs = inputs_of(loss, (5, 1500), masked=False)
    kernel = Kernel("one_read", 2, 2, broken=broken)
    try:
        found = results(library, kernel, inputs)
    except (DeviceError, AssertionError):
        return
    assert not all(finding.passed for finding in findings(inputs, found))


@every_loss
def test_wrong_results_are_seen(library, loss):
    inputs = inputs_of(loss, (4, 1500), (HALF, HALF), masked=False)
    found = results(library, Kernel("plain"), inputs)
    for sabotage, spoil in SABOTAGES.items():
        for finding in findings(inputs, {name: spoil(value) for name, value in found.items()}):
            assert not finding.passed, f"{sabotage} went unseen: {finding}"
