"""The compiled kernels: where their libraries are, and how they are compiled once.

A library per kind of device, ``libmetakd_cpu.so`` (C++) and ``libmetakd_cuda.so`` (CUDA C++),
registers operators when it is loaded. Both are written against LibTorch's stable ABI: a build
serves every torch from ``OLDEST_TORCH`` on and knows nothing of Python. ``setup.py`` and wheels put
them into the package. Where there is none, the first call of a loss compiles it with ninja, into
``metakd/kernels`` under ``$XDG_CACHE_HOME`` or ``~/.cache``, by a name that stands for sources,
flags, torch, compiler and GPU architectures. ``METAKD_JIT=0`` forbids that; ``METAKD_JIT=nowait``
makes a process go on without when another is compiling.

Beside each library a JSON file says what it was made of. What it says must hold: a library of
other sources is not taken, a damaged one neither, nor one that another user could have written.
``setup.py`` loads this file by itself, so at its top level it imports the standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# Beside the package in a checkout, within it where it is installed.
CSRC = next((path for path in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if path.is_dir()), None)
SUFFIX = {"cpu": ".cpp", "cuda": ".cu"}
OLDEST_TORCH = (2, 11)
ARCHITECTURES = ("80", "90a", "100")  # of a CUDA library that no GPU here decides for

_PATIENCE = 600.0  # seconds, while another process compiles
_TORCH, _STAND_INS = "torch-lib", "stand-ins"  # of torch, and of what it lacks, beside a build


class CannotBuild(Exception):
    """Why the kernels cannot be compiled, or not be kept, here; one line."""


@dataclass(frozen=True)
class Library:
    """A library that is there: its file, what its JSON file says, and whether it is the package's
    own or was compiled on this machine."""

    path: Path
    about: dict
    origin: str

    def __str__(self) -> str:
        for_gpus = f", CUDA {self.about['cuda']} for" if "cuda" in self.about else ""
        made = f"{self.about['compiler']}, headers of torch {self.about['torch']}{for_gpus}"
        made = " ".join([made, *self.about.get("architectures", [])])
        return f"{self.origin}: {self.path} ({made})"


_loaded: dict[str, Library] = {}


def load(kind: str, compiling: bool = False) -> str | None:
    """Load the library for ``cpu`` or ``cuda`` into this process, if that is not done.

    Args:
        kind: ``cpu`` or ``cuda``.
        compiling: compile it if there is none.

    Returns:
        Why it cannot be loaded, in one line; None where it is loaded.
    """
    import torch

    if kind in _loaded:
        return None
    if os.environ.get("METAKD_NO_EXT") == "1":
        return "METAKD_NO_EXT=1 is set"
    if kind == "cuda" and not torch_has_cuda():
        return "this torch is built without CUDA"
    found, why = find(kind)
    if found is None and compiling:
        try:
            found = compile_once(kind)
        except CannotBuild as error:
            return str(error)
    if found is None:
        return why
    try:
        torch.ops.load_library(found.path)
    except OSError as error:
        return f"{found.path} does not load ({str(error).splitlines()[0]})"
    _loaded[kind] = found
    return None


def describe(kind: str) -> str:
    """The library for ``cpu`` or ``cuda`` in this process, or why there is none and what to do."""
    reason = load(kind)
    if reason is None:
        return str(_loaded[kind])
    if kind == "cuda" and not torch_has_cuda():
        return reason
    try:
        Recipe.here(kind)
        ninja()
    except CannotBuild as error:
        return f"{reason}; it cannot be compiled here: {error}"
    if kind == "cuda":
        return f"{reason}; `metakd build --cuda` compiles it"
    return f"{reason}; `metakd build` compiles it, as the first call of a loss does"


def name_of(kind: str) -> str:
    """File name of the library for ``cpu`` or ``cuda``."""
    return f"libmetakd_{kind}.so"


def sources_digest() -> str | None:
    """Of everything that is compiled; None where the sources are not installed."""
    if CSRC is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(CSRC.rglob("*.*")):
        digest.update(f"{path.relative_to(CSRC)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


# Looking for a library


def find(kind: str) -> tuple[Library | None, str]:
    """The library for ``kind``, or None and why there is none, in one line."""
    digest = sources_digest()
    found, why = _read(PACKAGE / name_of(kind), digest, "installed")
    if found is not None or digest is None:
        return found, why
    try:
        place = _cache(Recipe.here(kind))
    except CannotBuild as error:
        return None, f"{why}, and {error}"
    if not place.is_dir():
        return None, why
    return _read(place / name_of(kind), digest, "compiled here")


def _read(path: Path, digest: str | None, origin: str) -> tuple[Library | None, str]:
    if not path.is_file():
        return None, f"{path.name} is not compiled"
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        sound = about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{path} has no record of what it is ({error})"
    if not sound:
        return None, f"{path} is damaged"
    if digest not in (None, about["sources"]):
        return None, f"{path} was compiled of other sources"
    return Library(path, about, origin), ""


# Compiling


@dataclass(frozen=True)
class Recipe:
    """How a library is compiled on this machine.

    Args:
        kind: ``cpu`` or ``cuda``.
        compiler: of C++, as a command; the CUDA compiler takes it too.
        driver: that compiles the sources and links them.
        flags: of the driver, for a source.
        link: what else the linker is told.
        torch: folder of the package, and its version.
        absent: libraries of torch that are linked to and are not here: a stand-in takes their
            place, so that a library can be made on another machine than it is for.
        identity: of the compilers: changes when they do.
        sources: see ``sources_digest``.
    """

    kind: str
    compiler: tuple[str, ...]
    driver: tuple[str, ...]
    flags: tuple[str, ...]
    link: tuple[str, ...]
    torch: tuple[Path, str]
    identity: str
    sources: str
    absent: tuple[str, ...] = ()

    @staticmethod
    def here(kind: str, architectures: Sequence[str] = ()) -> Recipe:
        """What this machine has to compile with.

        Args:
            kind: ``cpu`` or ``cuda``.
            architectures: of GPUs (``90a``); those of ``TORCH_CUDA_ARCH_LIST`` or of the GPUs here
                unless given.

        Raises:
            CannotBuild: something is missing.
        """
        sources = sources_digest()
        if CSRC is None or sources is None:
            raise CannotBuild("the sources of the kernels are not installed")
        if not sys.platform.startswith("linux"):
            raise CannotBuild("the kernels are compiled on Linux only")
        torch = _torch()
        compiler = tuple(shlex.split(os.environ.get("CXX", "c++")))
        tools = [_tool(compiler[0], "no C++ compiler", "CXX")]
        target = OLDEST_TORCH[0] << 56 | OLDEST_TORCH[1] << 48
        flags = [
            *("-std=c++20", "-O3", "-DNDEBUG", f"-DTORCH_TARGET_VERSION={target:#x}ULL"),
            *(f"-I{path}" for path in (CSRC / "include", torch[0] / "include")),
        ]
        # No -march: cpu/ chooses instructions as it runs. The same file wherever it is compiled.
        plain = ["-fPIC", "-fvisibility=hidden"]
        plain += [f"-ffile-prefix-map={path}=." for path in (CSRC, torch[0])]
        link = ["-shared", f"-L{_STAND_INS}", f"-L{_TORCH}", "-ltorch_cpu"]
        driver, absent = compiler, ()
        if kind == "cpu":
            flags += plain + shlex.split(os.environ.get("CXXFLAGS", ""))
            link += ["-Wl,--build-id=none"]
        else:
            nvcc = _nvcc()
            tools.append(nvcc)
            driver = (str(nvcc),)
            flags += ["-DUSE_CUDA", f"-ccbin={compiler[0]}", "--threads=0"]
            # Otherwise names of what is local to a file hold the number of a process: by the first
            # on the device, by the second, whose files have names of their own, on the host.
            flags += ["--expt-relaxed-constexpr", "-frandom-seed=metakd", "--keep"]
            flags += [f"-Xcompiler={','.join(plain)}", *_for(architectures or _architectures())]
            link += ["-Xlinker=--build-id=none", "-Xlinker=--no-as-needed", "-ltorch_cuda"]
            link += [f"-ccbin={compiler[0]}", "-cudart=static"]
            if not (torch[0] / "lib" / "libtorch_cuda.so").exists():
                absent = ("libtorch_cuda.so",)
        identity = [str(path.resolve()) for path in tools]
        identity += [f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in tools]
        made_with = " ".join(identity)
        how = tuple(flags), tuple(link), torch, made_with, sources, absent
        return Recipe(kind, compiler, driver, *how)

    def build_file(self) -> str:
        """For ninja, which runs it in a folder with what is linked to and nothing else."""
        assert CSRC is not None
        rules = {
            "compile": [*self.driver, *self.flags, "-c", "$in"],
            "link": [*self.driver, "$in", *self.link],
        }
        lines = []
        for rule, command in rules.items():
            words = " ".join(x if x == "$in" else shlex.quote(_escaped(x)) for x in command)
            lines += [f"rule {rule}", f"  command = {words} -o $out", ""]
        objects = []
        for source in sorted((CSRC / self.kind).glob(f"*{SUFFIX[self.kind]}")):
            objects.append(f"{source.stem}.o")
            lines.append(f"build {objects[-1]}: compile {_escaped(source, spaces=True)}")
        lines.append(f"build {name_of(self.kind)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def build(recipe: Recipe, folder: Path, log: Path | None = None) -> Library:
    """Compile a library into ``folder``, with all cores or ``MAX_JOBS`` of them.

    Args:
        recipe: which, and how.
        folder: where the library and its JSON file are put once both are whole.
        log: where what the compilers say is kept if they fail; the console unless given.

    Raises:
        CannotBuild: something is missing, or compiling fails; the message names the log.
    """
    command, name = ninja(), name_of(recipe.kind)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as scratch:
        work = Path(scratch)
        # By names that are the same everywhere: nvcc writes them into what it links.
        (work / _TORCH).symlink_to(recipe.torch[0] / "lib")
        stand_ins = work / _STAND_INS
        stand_ins.mkdir()
        (stand_ins / "empty.cpp").touch()
        for one in recipe.absent:
            empty = [*recipe.compiler, "-shared", f"-Wl,-soname,{one}", "empty.cpp", "-o", one]
            subprocess.run(empty, cwd=stand_ins, check=True)
        (work / "build.ninja").write_text(recipe.build_file())
        jobs = os.environ.get("MAX_JOBS")
        done = subprocess.run(
            [*command, *(["-j", jobs] if jobs else []), name],
            cwd=work,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            where = "the console"
            if log is None:
                print(done.stdout, file=sys.stderr)
            else:
                where = str(log)
                with suppress(OSError):
                    log.write_text(done.stdout)
            raise CannotBuild(f"compiling failed, see {where}")
        made = work / name
        about = {
            "sources": recipe.sources,
            "sha256": hashlib.sha256(made.read_bytes()).hexdigest(),
            "compiler": _version([*recipe.compiler, "--version"]),
            "torch": recipe.torch[1],
        }
        if recipe.kind == "cuda":
            about["cuda"] = _version([*recipe.driver, "--version"]).rpartition("release ")[2]
            about["architectures"] = [x.rpartition("=")[2] for x in recipe.flags if "gencode" in x]
        made.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
        # The library last: what is found has its record.
        for path in (made.with_suffix(".json"), made):
            os.replace(path, folder / path.name)
    return Library(folder / name, about, "compiled here")


def compile_once(kind: str, say=lambda text: print(text, file=sys.stderr, flush=True)) -> Library:
    """The library for ``kind`` from the user's cache, compiled first if it is not there: by one
    process at a time, the others wait for it.

    Args:
        kind: ``cpu`` or ``cuda``.
        say: told in one line what takes long.

    Raises:
        CannotBuild: it is not there and cannot be made.
    """
    recipe = Recipe.here(kind)
    ninja()
    place = _cache(recipe)
    with _turn(place, say):
        for left in place.glob(".building-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        found, why = _read(place / name_of(kind), recipe.sources, "compiled here")
        if found is not None:
            return found
        if (place / name_of(kind)).exists():
            say(f"metakd: {why}; it is compiled again")
        say(
            f"metakd: compiling its {'CUDA ' if kind == 'cuda' else ''}kernels once, about a "
            "minute (METAKD_JIT=0 does without)"
        )
        try:
            return build(recipe, place, log=place / "log.txt")
        except (OSError, subprocess.SubprocessError) as error:  # a full disk, say
            raise CannotBuild(f"{place} cannot be written to ({error})") from None


@contextmanager
def _turn(place: Path, say) -> Iterator[None]:
    """This process alone works on ``place``; the lock dies with its owner."""
    import fcntl

    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (place / "lock").open("w")
    except OSError as error:
        raise CannotBuild(
            f"{place} cannot be written to ({error}): set XDG_CACHE_HOME to a folder that can"
        ) from None
    with lock:
        until, told = time.monotonic() + _PATIENCE, False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if os.environ.get("METAKD_JIT") == "nowait":
                    raise CannotBuild("another process is compiling them") from None
                if time.monotonic() > until:
                    raise CannotBuild(
                        f"another process has been compiling them for {_PATIENCE / 60:.0f} minutes"
                    ) from None
                if not told:
                    say("metakd: waiting for another process that compiles its kernels")
                told = True
                time.sleep(0.1)
            except OSError as error:  # a file system without locks
                raise CannotBuild(f"{place} has no locks ({error})") from None
        yield


def user_cache() -> Path:
    """What metakd keeps for this user between runs.

    Raises:
        RuntimeError: nobody knows where this user is at home.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification has relative ones ignored.
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "metakd"


def _cache(recipe: Recipe) -> Path:
    """Where the library of this recipe is kept.

    Raises:
        CannotBuild: there is no such place, or somebody else could have written there.
    """
    made_of = [recipe.sources, recipe.flags, recipe.link, recipe.identity, recipe.torch[1]]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:20]
    try:
        root = user_cache() / "kernels"
        place = root / f"{recipe.kind}-{key}"
        for folder in (root.parent, root, place):
            with suppress(FileNotFoundError, NotADirectoryError):
                found = folder.stat()
                if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise CannotBuild(
                        f"{folder} belongs to, or is open to, other users: make it yours alone, or "
                        "set XDG_CACHE_HOME to a folder that is"
                    )
    except (OSError, RuntimeError) as error:
        raise CannotBuild(
            f"there is no cache to look into ({error}): set XDG_CACHE_HOME to a folder of yours"
        ) from None
    return place


def _torch() -> tuple[Path, str]:
    folder = _torch_folder()
    if folder is None:
        raise CannotBuild("torch is not installed")
    if not (folder / "include" / "torch" / "csrc" / "stable" / "ops.h").is_file():
        raise CannotBuild(f"the torch in {folder} is without the headers of the stable ABI")
    return folder, _torch_says("__version__") or "unknown"


def _torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def _torch_says(name: str) -> str | None:
    """A text of ``torch/version.py``, without the seconds that importing torch takes."""
    if (folder := _torch_folder()) is None:
        return None
    said = (folder / "version.py").read_text()
    found = re.search(rf"^{name}\b[^=\n]*= *['\"]([^'\"]*)['\"]", said, re.MULTILINE)
    return found and found[1]


def _tool(name: str, missing: str, variable: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise CannotBuild(f"{missing} ({name} is not on the PATH; {variable} names another)")
    return Path(found)


def _nvcc() -> Path:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    if found is None:
        raise CannotBuild("no CUDA compiler (nvcc is not on the PATH; set CUDA_HOME)")
    return Path(found)


def torch_has_cuda() -> bool:
    """Whether the installed torch computes on CUDA devices."""
    return _torch_says("cuda") is not None


def ninja() -> list[str]:
    """The command.

    Raises:
        CannotBuild: there is none.
    """
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    if found := shutil.which("ninja"):
        return [found]
    raise CannotBuild("ninja is not installed (pip install ninja)")


def _architectures() -> list[str]:
    """Of the GPUs that a CUDA library here is for."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split():
        return [name.replace(".", "").removesuffix("+PTX") for name in listed]
    import torch

    here = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    # Clusters and bulk copies are of the architecture-specific set of Hopper.
    names = [f"{major}{minor}{'a' if major == 9 else ''}" for major, minor in sorted(here)]
    return names or list(ARCHITECTURES)


def _for(architectures: Sequence[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    newest = max((name for name in architectures if name.isdigit()), default="", key=int)
    # Newer GPUs compile the last one's intermediate code when they load it.
    return flags + [f"-gencode=arch=compute_{newest},code=compute_{newest}"] * bool(newest)


def _version(command: list[str]) -> str:
    said = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return next((line for line in said if "release" in line), said[0] if said else "unknown")


def _escaped(word: object, spaces: bool = False) -> str:
    """As ninja wants it."""
    text = str(word).replace("$", "$$")
    return text.replace(" ", "$ ").replace(":", "$:") if spaces else text


if __name__ == "__main__":  # `metakd build`, before anything but torch and ninja is installed
    try:
        print(compile_once("cpu"))
    except CannotBuild as error:
        print(f"metakd: its kernels are not compiled: {error}", file=sys.stderr)
