"""The compiled kernels are optional: `setup.py` puts them into the package, skips them, or installs
without and says why."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def build(tmp_path, **env) -> tuple[subprocess.CompletedProcess, set[str]]:
    """Runs ``build_py`` into ``tmp_path``; gives the process and what it put there."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("METAKD_")}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    package = tmp_path / "lib" / "metakd"
    return done, {str(path.relative_to(package)) for path in package.rglob("*.*")}


def libraries(built: set[str]) -> set[str]:
    return {name for name in built if name.startswith("libmetakd")}


def said(done: subprocess.CompletedProcess) -> list[str]:
    """Ours; setuptools may have its own to say."""
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if line.startswith("metakd: installs without")]


def test_no_ext_skips_silently(tmp_path):
    done, built = build(tmp_path, METAKD_NO_EXT="1", CXX="/bin/false")
    assert done.returncode == 0
    assert libraries(built) == set() and said(done) == []


@pytest.mark.parametrize(
    "compiler, reason",
    [("/bin/false", "compiling failed"), ("/no/such/compiler", "no C++ compiler")],
)
def test_a_failing_compiler_is_named_in_one_line(tmp_path, compiler, reason):
    done, built = build(tmp_path, CXX=compiler)
    assert done.returncode == 0
    assert libraries(built) == set()
    assert [reason in line for line in said(done)] == [True]


def test_without_torch_it_installs_and_says_so(tmp_path):
    # As in the environment that pip makes for building: the standard library and setuptools.
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '-q', 'build_py', "
    code += f"'--build-lib', {str(tmp_path)!r}]; exec(open('setup.py').read())"
    run = "import importlib.util as u; f = u.find_spec; "
    run += "u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a); __file__ = 'setup.py'; "
    done = subprocess.run(
        [sys.executable, "-c", run + code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert ["torch is not installed" in line for line in said(done)] == [True]


def test_explicit_cuda_never_degrades(tmp_path):
    done, built = build(tmp_path, METAKD_CUDA="1", CUDA_HOME="/nowhere")
    assert done.returncode != 0
    assert "METAKD_CUDA=1: no CUDA compiler" in done.stderr
    assert built == set()


def test_what_is_no_python_is_installed_too(tmp_path):
    done, built = build(tmp_path, METAKD_NO_EXT="1")
    assert done.returncode == 0
    package = ROOT / "metakd"
    wanted = {str(path.relative_to(package)) for path in package.rglob("*.jinja")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert len(wanted) > 20 and wanted <= built


@pytest.mark.parametrize(
    "system, ours", [("Linux", {"ninja", "triton"}), ("Darwin", set()), ("Windows", set())]
)
def test_what_the_bare_package_needs_elsewhere(system, ours):
    """Of what it needs, only Triton and ninja are made for Linux alone."""
    needed = set()
    for line in importlib.metadata.requires("metakd"):
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(
            {"platform_system": system, "extra": ""}
        ):
            needed.add(wanted.name)
    assert needed == {"torch", "pydantic", "pyyaml", "rich", "typer"} | ours
