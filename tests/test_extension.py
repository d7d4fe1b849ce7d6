"""The compiled kernels are compiled once, by one process, and only a sound library is loaded. What
is compiled here is a line of C++ in place of the kernels."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from metakd import extension
from metakd.extension import CannotBuild

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="compiled on Linux only"
)

# What a process that compiles runs: {before} with ``extension`` at hand, then the compiling.
SCRIPT = """
import os, sys
from pathlib import Path
from metakd import extension
extension.CSRC, extension.PACKAGE = Path({csrc!r}), Path("/nowhere")
extension._torch = lambda: (Path({torch!r}), "2.99.0")
{before}
try:
    print(extension.compile_once("cpu").path)
except extension.CannotBuild as error:
    print("cannot:", error)
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Sources of a library, and a cache for it; the compiler notes its calls in ``calls``."""
    for folder in ("csrc/cpu", "csrc/include", "torch/include", "torch/lib"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "csrc/cpu/one.cpp").write_text('extern "C" int one() { return 1; }\n')
    compiler = tmp_path / "c++"
    # There is no libtorch_cpu in this torch to link to.
    compiler.write_text(
        f"#!/bin/sh\necho call >> {tmp_path}/calls\n"
        'for word; do shift; [ "$word" = -ltorch_cpu ] || set -- "$@" "$word"; done\n'
        'exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("METAKD_JIT", "1")
    monkeypatch.setattr(extension, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(extension, "PACKAGE", tmp_path / "nowhere")
    monkeypatch.setattr(extension, "_torch", lambda: (tmp_path / "torch", "2.99.0"))
    return tmp_path


def start(place: Path, before: str = "") -> subprocess.Popen:
    code = SCRIPT.format(csrc=str(place / "csrc"), torch=str(place / "torch"), before=before)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def heard() -> tuple[list[str], extension.Library]:
    said: list[str] = []
    return said, extension.compile_once("cpu", say=said.append)


def test_it_is_compiled_once_and_found_again(place):
    assert extension.find("cpu")[1] == "libmetakd_cpu.so is not compiled"
    said, library = heard()
    assert len(said) == 1 and "once" in said[0] and library.origin == "compiled here"
    calls = (place / "calls").read_text()
    again, same = heard()
    assert again == [] and same == library == extension.find("cpu")[0]
    assert (place / "calls").read_text() == calls
    assert os.stat(library.path.parent).st_mode & 0o077 == 0


def test_two_processes_at_once_compile_once(place):
    slow = "run = extension.subprocess.run\n"
    slow += (
        "extension.subprocess.run = lambda *a, **k: (extension.time.sleep(0.2), run(*a, **k))[1]"
    )
    both = [start(place, slow) for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in both]
    assert len({out for out, _ in ended}) == 1 and ended[0][0].strip().endswith(".so")
    assert "".join(err for _, err in ended).count("compiling its kernels") == 1
    assert (place / "calls").read_text().count("call") == 3  # compiled, linked, asked its version


# Each step of the work at which a process may be killed, told apart by these calls.
STEPS = """
import builtins, json, shutil, tempfile
left = {step}
def counted(owner, name):
    real = getattr(owner, name)
    def call(*args, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return real(*args, **options)
    setattr(owner, name, call)
import fcntl
counted(fcntl, "flock")
counted(os, "replace")
counted(tempfile, "mkdtemp")
counted(extension.subprocess, "run")
counted(extension.hashlib, "sha256")
counted(Path, "write_text")
counted(shutil, "rmtree")
"""


def test_a_killed_builder_hangs_nobody(place):
    killed = 0
    for step in range(1, 40):
        process = start(place, STEPS.format(step=step))
        out, _ = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -9
        killed += 1
        since = time.monotonic()
        _, library = heard()
        assert time.monotonic() - since < 30
        left = {path.name for path in library.path.parent.iterdir()}
        assert left <= {"libmetakd_cpu.so", "libmetakd_cpu.json", "lock", "log.txt"}
        library.path.unlink()
    assert out.strip().endswith(".so") and killed >= 10


def test_a_damaged_library_is_named_and_compiled_again(place):
    _, library = heard()
    for harm in (lambda x: x[:-1], lambda x: x[:-1] + bytes([x[-1] ^ 1])):
        library.path.write_bytes(harm(library.path.read_bytes()))
        assert extension.find("cpu") == (None, f"{library.path} is damaged")
        said, again = heard()
        assert str(library.path) in said[0] and again == library
    library.path.with_suffix(".json").write_text("[]")
    assert "no record" in extension.find("cpu")[1]
    assert heard()[1] == library


def test_what_was_made_of_something_else_is_not_taken(place, monkeypatch):
    places = {heard()[1].path}
    monkeypatch.setattr(extension, "_torch", lambda: (place / "torch", "2.99.1"))
    assert extension.find("cpu")[0] is None
    places.add(heard()[1].path)
    monkeypatch.setenv("CXXFLAGS", "-O0")
    places.add(heard()[1].path)
    os.utime(place / "c++", ns=(0, 0))  # another compiler of the same name
    places.add(heard()[1].path)
    (place / "csrc/cpu/one.cpp").write_text('extern "C" int one() { return 2; }\n')
    places.add(heard()[1].path)
    assert len(places) == 5


def test_an_installed_library_of_other_sources_is_not_taken(place, monkeypatch):
    monkeypatch.setattr(extension, "PACKAGE", place / "package")
    built = extension.build(extension.Recipe.here("cpu"), place / "package")
    assert extension.find("cpu")[0].path == built.path
    (place / "csrc/include/new.h").touch()
    assert extension.find("cpu") == (None, f"{built.path} was compiled of other sources")
    assert heard()[1].path.is_relative_to(place / "cache")


def test_nothing_of_other_users_is_loaded(place, monkeypatch):
    _, library = heard()
    library.path.parent.chmod(0o770)
    found, why = extension.find("cpu")
    assert found is None and "other users" in why and "XDG_CACHE_HOME" in why
    library.path.parent.chmod(0o700)
    assert extension.find("cpu")[0] == library
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(CannotBuild, match="other users"):
        heard()


def test_a_cache_that_cannot_be_written_to(place, monkeypatch):
    (place / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    with pytest.raises(CannotBuild, match="XDG_CACHE_HOME"):
        heard()


def test_a_home_that_nobody_may_see_or_knows_is_no_reason_to_fail(place, monkeypatch):
    def closed(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    recipe = extension.Recipe.here("cpu")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", closed)
        with pytest.raises(CannotBuild, match=r"no cache .*Permission denied.*XDG_CACHE_HOME"):
            extension._cache(recipe)
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    found, why = extension.find("cpu")
    assert found is None and "no home" in why


def test_a_full_disk(place):
    # The file that a full disk cuts short is the compiler's, or our own.
    for before in ("resource.RLIMIT_FSIZE, (64, 64)", "resource.RLIMIT_FSIZE, (600, 600)"):
        process = start(place, f"import resource; resource.setrlimit({before})")
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and out.startswith("cannot:"), out
        assert extension.find("cpu")[0] is None
    assert heard()[1] == extension.find("cpu")[0]


def test_what_is_missing_is_named(place, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(CannotBuild, match=r"no C\+\+ compiler .*CXX"):
        heard()
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(CannotBuild, match=r"compiling failed, see .*log\.txt"):
        heard()
    monkeypatch.setattr(extension, "CSRC", None)
    with pytest.raises(CannotBuild, match="sources"):
        heard()


def test_a_process_that_may_not_wait(place, monkeypatch):
    with extension._turn(extension._cache(extension.Recipe.here("cpu")), print):
        monkeypatch.setenv("METAKD_JIT", "nowait")
        with pytest.raises(CannotBuild, match="another process"):
            heard()
        monkeypatch.setenv("METAKD_JIT", "1")
        monkeypatch.setattr(extension, "_PATIENCE", 0.2)
        with pytest.raises(CannotBuild, match="another process has been"):
            heard()


# The first call of a loss, in a process of its own; what it loads is no library of operators, so
# these are about when, and what is said.
FIRST_CALL = """
import json, os, sys, warnings
from pathlib import Path
from metakd import extension
extension.PACKAGE = Path("/nowhere")
asked = []
def compile_once(kind, **options):
    asked.append(kind)
    raise extension.CannotBuild("no C++ compiler")
extension.compile_once = compile_once
os.environ["XDG_CACHE_HOME"] = "/nowhere"
import torch, metakd
from metakd import functional, ops
found = {"import": len(asked)}
student, teacher = torch.randn(3, 5), torch.randn(3, 5)
loss = lambda s, t: metakd.soft_kl(s, t, temperature=2.0)
may = "METAKD_JIT" not in os.environ and "METAKD_NO_EXT" not in os.environ
traced = torch.compile(loss, backend="eager", fullgraph=True) if may else loss
value = traced(student, teacher)
found["trace"] = len(asked)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torch.testing.assert_close(loss(student, teacher), value)
    metakd.hidden_mse([torch.randn(2, 3, 4)], [torch.randn(2, 3, 4)])
found["calls"] = asked[found["trace"]:]
found["warnings"] = [str(w.message) for w in caught]
try:
    metakd.soft_kl(student, teacher, backend="cpp")
except metakd.errors.UnsupportedError as error:
    found["named"] = str(error)
expected = torch.nn.functional.kl_div(
    (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
torch.testing.assert_close(value, 4 * expected)
print(json.dumps(found))
"""


@pytest.mark.parametrize("forbidden", [{}, {"METAKD_JIT": "0"}, {"METAKD_NO_EXT": "1"}])
def test_the_first_call_compiles_and_nothing_else(forbidden):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("METAKD_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL],
        env=clean | forbidden,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["import"] == found["trace"] == 0
    assert found["calls"] == ([] if forbidden else ["cpu"])
    assert [("no C++ compiler" in text, "METAKD_JIT=0" in text) for text in found["warnings"]] == (
        [] if forbidden else [(True, True)]
    )
    reason = "no C++ compiler"
    if forbidden:
        reason = "METAKD_NO_EXT" if "METAKD_NO_EXT" in forbidden else "not compiled"
    assert reason in found["named"]


def test_what_is_loaded_says_of_what_it_was_made():
    if reason := extension.load("cpu"):
        pytest.skip(reason)
    said = extension.describe("cpu")
    assert "libmetakd_cpu.so" in said and f"headers of torch {torch.__version__}" in said
