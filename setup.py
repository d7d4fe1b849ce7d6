"""Builds the extension ``metakd._C`` where that is possible, and pure Python where it is not.

It needs torch in the build environment (``pip install --no-build-isolation .``) and a C++ compiler.
Without them, or when compiling fails, the package installs without it and one warning says why (pip
shows the output of a build only with ``-v``). All other metadata is in ``pyproject.toml``.

Environment:
    METAKD_NO_EXT=1    do not build the extension, and say nothing.
    METAKD_CUDA=0 | 1  leave ``csrc/cuda`` out | build it or fail. Unset: build it where there are a
                       CUDA toolkit and a torch with CUDA.
    DEBUG=1            ``-O0 -g`` in place of ``-O3``.
    MAX_JOBS, TORCH_CUDA_ARCH_LIST, CXX, CFLAGS: as in ``torch.utils.cpp_extension``.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension

    BuildExtension, why_no_torch = cpp_extension.BuildExtension, ""
except (ImportError, OSError) as error:  # missing, or installed but broken
    from setuptools.command.build_ext import build_ext as BuildExtension

    cpp_extension, why_no_torch = None, f"torch is missing in the build environment ({error})"

# setuptools wants source paths relative to where it runs.
CSRC = Path(os.path.relpath(Path(__file__).resolve().parent / "csrc"))


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path) for path in (CSRC / folder).glob(f"*{suffix}"))


def why_no_cuda() -> str:
    """The reason why ``csrc/cuda`` cannot be compiled here; empty when it can."""
    if not sources("cuda", ".cu"):
        return "csrc/cuda holds no .cu file"
    if why_no_torch:
        return why_no_torch
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "no CUDA toolkit found (set CUDA_HOME)"
    return ""


def extension() -> Extension:
    choice = os.environ.get("METAKD_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"METAKD_CUDA must be 0 or 1, got {choice!r}")
    if choice == "1" and why_no_cuda():
        sys.exit(f"METAKD_CUDA=1: {why_no_cuda()}")
    with_cuda = choice != "0" and not why_no_cuda()

    # Said here, because the standard that torch would add differs by its version.
    flags = ["-std=c++20", *(["-O0", "-g"] if os.environ.get("DEBUG") == "1" else ["-O3"])]
    # at::parallel_for stays serial without it. No -march: csrc/cpu chooses instructions as it runs.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    kind = Extension if cpp_extension is None else cpp_extension.CppExtension
    files = sources(".", ".cpp") + sources("cpu", ".cpp")
    macros = []
    if with_cuda:
        kind = cpp_extension.CUDAExtension
        files += sources("cuda", ".cu")
        macros.append(("METAKD_WITH_CUDA", None))
    return kind(
        "metakd._C",
        files,
        include_dirs=[str((CSRC / "include").resolve())],
        define_macros=macros,
        depends=sorted(str(path) for path in (CSRC / "include").glob("*")),
        extra_compile_args={"cxx": flags + openmp, "nvcc": flags} if cpp_extension else flags,
        extra_link_args=openmp,
    )


class BuildOrDegrade(BuildExtension):
    """``build_ext`` that warns and leaves pure Python when the extension cannot be built."""

    def run(self):
        reason = why_no_torch or self.why_no_compiler()
        if not reason:
            try:
                return super().run()
            except Exception as error:
                if os.environ.get("METAKD_CUDA") == "1":  # an explicit choice never degrades
                    raise
                reason = f"compiling failed ({str(error).splitlines()[0]})"
        self.extensions = []  # nothing to copy or to list as installed
        print(f"warning: metakd installs without its C++ extension: {reason}", file=sys.stderr)

    @staticmethod
    def why_no_compiler() -> str:
        compiler = cpp_extension.get_cxx_compiler()
        try:
            subprocess.run([compiler, "--version"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"the C++ compiler does not run ({error})"
        return ""


if os.environ.get("METAKD_NO_EXT") == "1":
    setup()
else:
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildOrDegrade})
