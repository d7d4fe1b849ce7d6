"""Compiles ``csrc/cuda/*.cu`` for GPUs that need not be here and shows what each kernel costs.

``python tests/compile_cuda.py`` prints a table (kernel, architecture, registers, stack and spills
in bytes, static shared memory); ``--json`` prints it as JSON. The exit code is 1 if a kernel in
float32 or half precision spills. Needs nvcc and any torch: a torch without CUDA lacks one generated
header of c10/cuda, which is made here.

One nvcc call per file, because the architectures share its host pass.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from metakd import extension

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ("80", "90a", "100")

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def why_not() -> str | None:
    """Why this cannot run here, or None."""
    if nvcc() is None:
        return "no nvcc (set CUDA_HOME or PATH)"
    listed = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True)
    if listed.returncode:
        return f"nvcc does not run ({listed.stderr.strip()})"
    # Variants of an architecture (90a) are not listed.
    missing = {f"sm_{arch.rstrip('a')}" for arch in ARCHITECTURES} - set(listed.stdout.split())
    return f"this nvcc does not know {', '.join(sorted(missing))}" if missing else None


def compile_file(source: Path, architectures=ARCHITECTURES, whole: bool = True) -> list[dict]:
    """Compiles a file as ``metakd build`` would; one entry per kernel and architecture.

    Args:
        source: the file.
        architectures: GPUs to compile for.
        whole: False stops before registers are assigned, which takes longest, and tells nothing of
            the kernels.

    Raises:
        RuntimeError: it does not compile; the message is what nvcc said.
    """
    recipe = extension.Recipe.here("cuda", architectures)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(nvcc(), "-Xptxas", "-v", "-c" if whole else "-ptx", source),
            *(flag for flag in recipe.flags if "gencode" not in flag),
            *(
                f"-gencode=arch=compute_{arch},code={'sm' if whole else 'compute'}_{arch}"
                for arch in architectures
            ),
            *("-o", Path(folder, "object.o")),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return kernels(done.stderr)


def kernels(report: str) -> list[dict]:
    """What ``ptxas -v`` says of each kernel."""
    rows = []
    for found in KERNEL.finditer(report):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        numbers = {name: int(found[name]) for name in ("registers", "stack", "stores", "loads")}
        rows.append(
            {"kernel": found["name"], "arch": found["arch"]}
            | numbers
            | {"shared": int(shared[1]) if shared else 0}
        )
    for row, name in zip(rows, readable([row["kernel"] for row in rows])):
        row["kernel"] = name
    return rows


def readable(names: list[str]) -> list[str]:
    """Kernels by template name; mangled where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    kinds = ("forward", "reverse", "mixture")  # the enumerators of Kind
    plain = re.sub(r"metakd::(\w+::)?|^void ", "", done.stdout, flags=re.MULTILINE)
    plain = re.sub(r"\(Kind\)(\d)", lambda digit: kinds[int(digit[1])], plain)
    return [name.split("(")[0] for name in plain.splitlines()]


def spilled(rows: list[dict]) -> list[dict]:
    """Kernels that spill, but for those in double precision, which are there to be right."""
    doubles = re.compile(r"\bdouble\b|AnyEd|wardId")  # readable | mangled
    return [
        row for row in rows if row["stores"] + row["loads"] and not doubles.search(row["kernel"])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--arch", nargs="*", default=ARCHITECTURES, help="as in sm_80: 80")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    rows = []
    for source in sorted(CSRC.glob("cuda/*.cu")):
        try:
            rows += compile_file(source, options.arch)
        except RuntimeError as error:
            sys.exit(f"{source} does not compile:\n{error}")
    rows.sort(key=lambda row: (row["kernel"], row["arch"]))
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{'kernel':48} {'arch':8} registers  stack  spill stores/loads  shared")
        for row in rows:
            print(
                f"{row['kernel']:48} {row['arch']:8} {row['registers']:9} {row['stack']:6} "
                f"{row['stores']:13}/{row['loads']:<5} {row['shared']:7}"
            )
    return int(bool(spilled(rows)))


if __name__ == "__main__":
    sys.exit(main())
