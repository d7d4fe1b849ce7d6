"""The GPU kernels compile for GPUs that are not here, within their registers. Triton's are compiled
in a process of their own, without the interpreter that conftest.py sets; the CUDA sources are
compiled in test_compile_cuda.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_triton import is_before_3_8, spilled


def compiled(*words: str) -> list[dict]:
    """The variants that ``compile_triton.py`` compiles, none of which may spill."""
    pytest.importorskip("triton")
    from triton import knobs

    for tool in ("ptxas", "ptxas_blackwell", "cuobjdump"):
        try:
            path = getattr(knobs.nvidia, tool).path
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"triton has no {tool} here ({error})")
        if not os.access(path, os.X_OK):
            pytest.skip(f"triton's {tool} does not run here ({path})")
    script = Path(__file__).with_name("compile_triton.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script, "--json", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.startswith("["), done.stderr[-3000:]
    variants = json.loads(done.stdout)
    assert spilled(variants) == []
    assert done.returncode == 0, done.stderr[-3000:]
    return variants


def test_triton_kernels_compile():
    """A few of them for one GPU: the interpreter takes what a compiler would not."""
    kernels = {row["variant"].split()[0] for row in compiled("--arch", "90", "--only", "bf16 kl")}
    assert kernels >= {"row_fwd", "row_bwd", "tile_fwd", "attention_map", "score_gradient"}


@pytest.mark.deep
def test_triton_kernels_fit_registers():
    kernels = {row["variant"].split()[0] for row in compiled()}
    shapes = {"row", "uneven", "tile"} | (set() if is_before_3_8() else {"cluster"})
    assert {name.split("_")[0] for name in kernels} >= shapes
    features = {"gram", "gram_bwd", "score_gradient", "attention_map", "hidden_mse", "masked_mean"}
    features |= {"mixture_kl", "mixture_kl_bwd"}
    assert kernels >= features | {"class_sums", "prototype_score", "domain_expertise"}
