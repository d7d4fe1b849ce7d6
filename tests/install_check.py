"""Installs metakd as users do, into fresh environments, and sees that its losses are compiled.

``make install-check`` makes ``dist/`` with ``make_wheels.py`` if no wheel is there, then for each
way of installing an environment of its own:

* plain: ``pip install .`` of the sdist; the first loss compiles, a second process loads
* no compiler: the same, where none is: one warning, PyTorch's operations, right numbers
* no build isolation: ``pip install --no-build-isolation``: compiled at installing
* wheel: with each ``--torch``; nothing is compiled

In each: README's loop, ``metakd verify``, and a loss beside ``F.kl_div``. torch is installed once a
version, beside the environments, which find it there.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"

# The first and the second process of a user: when they can compute, by what, and how fast.
PROBE = """
import json, sys, time, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    since = time.perf_counter()
    import metakd
    from metakd import extension, ops
    loaded = time.perf_counter() - since
    metakd.soft_kl(torch.randn(3, 5), torch.randn(3, 5))
    first = time.perf_counter() - since
student, teacher = torch.randn(256, 30522, requires_grad=True), torch.randn(256, 30522)
def ours():
    metakd.soft_kl(student, teacher, temperature=2.0).backward()
def theirs():
    own, told = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    (4 * torch.nn.functional.kl_div(own, told, log_target=True, reduction="batchmean")).backward()
took = {ours: [], theirs: []}
for _ in range(9):
    for call, seconds in took.items():
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
ours, theirs = (sorted(seconds)[4] for seconds in took.values())
print(json.dumps({
    "torch": torch.__version__, "loaded": loaded, "first": first, "ratio": theirs / ours,
    "cpp": ops.why_not("soft_kl", "cpp", "cpu") or extension.describe("cpu"),
    "warnings": [str(one.message) for one in caught if "metakd" in str(one.message)]}))
"""


def run(*command: object, **environment: str) -> str:
    """Standard output of a command that must succeed; what it says besides goes to ``errors``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("METAKD_", "PYTHON"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=tempfile.gettempdir(),  # not where the package is
        env=clean | environment,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:200]}\n{(done.stdout + done.stderr)[-4000:]}")
    run.errors = done.stderr
    return done.stdout


def environment(folder: Path, beside: Path | None = None) -> Path:
    """A fresh one; the Python in it also finds what is installed in ``beside``."""
    run(sys.executable, "-m", "venv", folder)
    if beside:
        (site,) = folder.glob("lib/python*/site-packages")
        (other,) = beside.glob("lib/python*/site-packages")
        (site / "beside.pth").write_text(f"{other}\n")
    return folder / "bin" / "python"


def readme_loop() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"## One loss in your own loop\n\n```python\n(.*?)```", text, re.DOTALL)[1]


def wheel() -> Path:
    """The wheel with the CPU's kernels alone."""
    return next(path for path in DIST.glob("*linux*x86_64.whl") if "+cu" not in path.name)


def check(name: str, python: Path, say, **settings: str) -> dict:
    """What a user of this environment finds."""

    with tempfile.TemporaryDirectory() as cache:
        settings |= {"XDG_CACHE_HOME": cache, "OMP_WAIT_POLICY": "PASSIVE"}
        first = json.loads(run(python, "-c", PROBE, **settings))
        first["compiled now"] = "compiling its kernels" in run.errors
        second = json.loads(run(python, "-c", PROBE, **settings))
        loss = float(run(python, "-c", readme_loop(), **settings).split()[-1])
        assert loss < 0.5, loss
        cli = python.with_name("metakd")
        verified = json.loads(run(cli, "verify", "--json", **settings))
        assert all(row["passed"] for row in verified), verified
    say(f"{name}: torch {first['torch']}")
    kernels = first["cpp"].replace(cache, "~/.cache").replace(str(python.parents[1]), "ENVIRONMENT")
    say(f"  kernels: {kernels}")
    now = (
        f"{first['first']:.0f} s, compiled then"
        if first["compiled now"]
        else f"{first['first']:.2f} s"
    )
    say(f"  first loss after {now}; in a second process {second['first']:.2f} s after import torch")
    for text in first["warnings"]:
        say(f"  warned: {text}")
    say(f"  README's loop ends at {loss:.0e}; metakd verify: {len(verified)} checks pass")
    ratio = second["ratio"]
    say(f"  soft_kl [256, 30522], forward and backward: {ratio:.1f} times as fast as F.kl_div")
    return first | {"second": second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write what is found here too")
    parser.add_argument("--torch", action="append", help="versions for the wheel, 2.13.0 if none")
    parser.add_argument(
        "--torch-at",
        type=Path,
        action="append",
        default=[],
        metavar="ENVIRONMENT",
        help="an environment that has a version of torch already",
    )
    options = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    commit = run("git", "-C", ROOT, "rev-parse", "--short", "HEAD").strip()
    say(
        f"python tests/install_check.py, commit {commit}, Python {sys.version.split()[0]}, "
        f"{os.cpu_count()} cores"
    )
    if not list(DIST.glob("*.tar.gz")) or not list(DIST.glob("*linux*.whl")):
        run(
            sys.executable, ROOT / "tests" / "make_wheels.py", *("--only", "sdist", "--only", "cpu")
        )
    (sdist,) = DIST.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bases = list(options.torch_at)
        for version in options.torch or ([] if bases else ["2.13.0"]):
            bases.append(folder / f"torch-{version}")
            python = environment(bases[-1])
            run(
                python, "-m", "pip", "install", "-q", f"torch=={version}", "setuptools>=77", "ninja"
            )
        own = bases[0]

        since = time.perf_counter()
        python = environment(folder / "plain", own)
        run(python, "-m", "pip", "install", "-q", sdist)
        say(f"pip install of the sdist, torch being there: {time.perf_counter() - since:.0f} s")
        found = check("plain", python, say)
        assert found["compiled now"] and not found["warnings"]
        assert not found["second"]["warnings"] and found["second"]["loaded"] < 1

        found = check("no compiler", python, say, CXX="/no/such/compiler")
        assert len(found["warnings"]) == 1 and not found["compiled now"]

        python = environment(folder / "isolated", own)
        # What a build asks for, which pip would otherwise have fetched; torch 2.11 takes no newer.
        run(python, "-m", "pip", "install", "-q", "setuptools>=77,<82", "ninja")
        run(python, "-m", "pip", "install", "-q", "--no-build-isolation", sdist)
        assert not check("no build isolation", python, say)["compiled now"]

        for number, base in enumerate(bases):
            python = environment(folder / f"wheel-{number}", base)
            run(python, "-m", "pip", "install", "-q", wheel())
            found = check("wheel", python, say)
            assert not found["compiled now"] and "installed" in found["cpp"]
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
