"""Puts the compiled kernels into the package where that is possible, installs without where not.

Compiling needs the headers of torch, hence ``pip install --no-build-isolation .`` with torch and
ninja installed, and a C++ compiler. Otherwise one line says why (pip shows it with ``-v``), and the
first call of a loss compiles them, see ``metakd/extension.py``. All other metadata is in
``pyproject.toml``.

Environment:
    METAKD_NO_EXT=1    compile nothing, and say nothing.
    METAKD_CUDA=0 | 1  leave the CUDA kernels out | compile them or fail. Unset: compile them where
                       there are a CUDA compiler and a torch with CUDA.
    MAX_JOBS, TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, CXXFLAGS: as for ``torch.utils.cpp_extension``.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = Path(__file__).resolve().parent / "metakd"
# By itself: of the package nothing may be imported before its dependencies are there.
_spec = importlib.util.spec_from_file_location("extension", PACKAGE / "extension.py")
extension = sys.modules["extension"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(extension)


def wanted() -> list[extension.Recipe]:
    """What is to be compiled, and how."""
    choice = os.environ.get("METAKD_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"METAKD_CUDA must be 0 or 1, got {choice!r}")
    if os.environ.get("METAKD_NO_EXT") == "1":
        return []
    found = []
    try:
        recipe = extension.Recipe.here("cpu")
        extension.ninja()
        found.append(recipe)
        if choice == "1" or (choice == "" and extension.torch_has_cuda()):
            found.append(extension.Recipe.here("cuda"))
    except extension.CannotBuild as error:
        if choice == "1":  # an explicit choice never degrades
            sys.exit(f"METAKD_CUDA=1: {error}")
        if not found:
            note(error)
    return found


def note(reason: object) -> None:
    print(f"metakd: installs without compiled kernels: {reason}", file=sys.stderr)


RECIPES = wanted()


class WithKernels(build_py):
    """Python files, the sources of the kernels and, where they can be, the kernels."""

    def run(self):
        super().run()
        place = PACKAGE if self.editable_mode else Path(self.build_lib, "metakd")
        if not self.editable_mode:
            shutil.copytree(extension.CSRC, place / "csrc", dirs_exist_ok=True)
        for recipe in RECIPES:
            try:
                extension.build(recipe, place)
            except extension.CannotBuild as error:
                if os.environ.get("METAKD_CUDA") == "1":
                    raise
                note(error)


class Wheel(bdist_wheel):
    """For every Python of a platform: the kernels know nothing of it."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2] if RECIPES else "any")


class Binary(Distribution):
    def has_ext_modules(self):
        return bool(RECIPES)


setup(distclass=Binary, cmdclass={"build_py": WithKernels, "bdist_wheel": Wheel})
