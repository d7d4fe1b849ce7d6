"""The CUDA sources compile for GPUs that are not here, within their registers."""

import compile_cuda
import pytest

SOURCES = sorted(compile_cuda.CSRC.glob("cuda/*.cu"))


each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)


@pytest.fixture(autouse=True)
def _nvcc():
    if reason := compile_cuda.why_not():
        pytest.skip(reason)


@each_source
def test_cuda_source_is_sound(source):
    """As far as PTX for one GPU, half a minute less each than all of it."""
    compile_cuda.compile_file(source, ("90a",), whole=False)


@pytest.mark.deep
@each_source
def test_cuda_source_compiles_without_spills(source):
    rows = compile_cuda.compile_file(source)
    architectures = {f"sm_{arch}" for arch in compile_cuda.ARCHITECTURES}
    kernels = {row["kernel"] for row in rows}
    assert kernels
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (kernel, arch) for kernel in kernels for arch in architectures
    }
    assert compile_cuda.spilled(rows) == []


def test_spills_are_seen():
    said = """ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90a'
ptxas info    : Function properties for _Z1fPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes smem
"""
    (row,) = compile_cuda.kernels(said)
    assert row == {
        "kernel": row["kernel"],
        "arch": "sm_90a",
        "registers": 32,
        "stack": 8,
        "stores": 4,
        "loads": 12,
        "shared": 64,
    }
    assert compile_cuda.spilled([row]) == [row]
