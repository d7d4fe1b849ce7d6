"""The extension is optional: `setup.py` builds it, skips it, or degrades with one warning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def build(tmp_path, **env) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Runs ``build_ext`` into ``tmp_path``; gives the process and the names of what it built."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("METAKD_")}
    done = subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "build_ext"),
            *("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")),
        ],
        cwd=ROOT,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, [path.name for path in (tmp_path / "lib").rglob("_C*")]


def warnings(done: subprocess.CompletedProcess) -> list[str]:
    """Ours; setuptools may have its own to say."""
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if line.startswith("warning: metakd")]


def test_no_ext_skips_silently(tmp_path):
    done, built = build(tmp_path, METAKD_NO_EXT="1", CXX="/bin/false")
    assert done.returncode == 0
    assert built == []
    assert warnings(done) == []


@pytest.mark.parametrize(
    "env, reason",
    [
        ({"CXX": "/bin/false"}, "the C++ compiler does not run"),
        ({"CXX": "/no/such/compiler"}, "the C++ compiler does not run"),
        ({"CFLAGS": "-include /no/such/header.h"}, "compiling failed"),
    ],
)
def test_failing_compiler_degrades_with_one_warning(tmp_path, env, reason):
    done, built = build(tmp_path, **env)
    assert done.returncode == 0
    assert built == []
    assert [reason in line for line in warnings(done)] == [True]


def test_missing_torch_degrades_with_one_warning(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done, built = build(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert built == []
    assert ["no torch here" in line for line in warnings(done)] == [True]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch may build CUDA")
def test_explicit_cuda_never_degrades(tmp_path):
    done, built = build(tmp_path, METAKD_CUDA="1")
    assert done.returncode != 0
    assert "METAKD_CUDA=1: " in done.stderr
    assert built == []


def test_build_info():
    extension = pytest.importorskip("metakd._C", reason="metakd._C is not built")
    info = extension.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["cpp_standard"] >= 202002
    assert info["compiler"]
    assert info["cuda"] is None or torch.version.cuda


def test_what_is_no_python_is_installed_too(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    env = os.environ | {"METAKD_NO_EXT": "1"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=120)
    package = ROOT / "metakd"
    wanted = {path.relative_to(package) for path in package.rglob("*.jinja")}
    found = {path.relative_to(tmp_path / "metakd") for path in tmp_path.rglob("*.jinja")}
    assert wanted and found == wanted
