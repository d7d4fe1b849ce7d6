"""Everything that needs a GPU in one go: ``make gpu-check``.

Builds the extension with CUDA, runs the tests marked ``gpu`` and the kernels' tests on the device,
compute-sanitizer (memcheck, racecheck) over the kernels' small cases after it has found a planted
bug, ``metakd verify`` and the benchmarks. A step that fails does not stop the others; each leaves
its log in the output folder, and a short table comes last. The exit code is the number of failed
steps.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from benchmarks.suite import benchmarks, summary
from benchmarks.unattended import Task, conclude, run_all

PYTHON = sys.executable
KERNEL_TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "soft_kl",
        "linear_soft_kl",
        "attention_score_mse",
        "attention_map",
        "hidden_mse",
        "prototype_ops",
        "contracts",
    )
]
# The sanitizer makes a test a hundred times slower: the ragged sizes of each kernel are enough.
SANITIZED = {
    "tests/test_soft_kl.py": "test_sizes and (shape2 or shape4 or shape8 or shape13 or shape14)",
    "tests/test_attention_score_mse.py": "test_sizes or test_the_guard",
    "tests/test_attention_map.py": "test_sizes",
    "tests/test_hidden_mse.py": "test_sizes or test_mean_in",
    "tests/test_prototype_ops.py": "test_every_dtype",
}

PLANTED = "planted bug"


def steps(out: Path, quick: bool) -> dict[str, Task]:
    """The tasks by name."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = {
        "build": Task(
            [PYTHON, "setup.py", "build_ext", "--inplace"],
            {"METAKD_CUDA": "1", "MAX_JOBS": str(os.cpu_count())},
        ),
        "tests": Task([*pytest, *KERNEL_TESTS, f"--junitxml={out}/kernels.xml"]),
        "gpu tests": Task([*pytest, "-m", "gpu", f"--junitxml={out}/gpu.xml"]),
        "verify": Task([PYTHON, "-m", "metakd", "verify"]),
    }
    tasks, _ = benchmarks("cuda", out, tests=False)
    found |= {f"benchmark {name}": task for name, task in tasks.items()}
    if not quick:
        # So that every tensor has its own bounds.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        sanitizer = {
            tool: ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            for tool in ("memcheck", "racecheck")
        }
        planted = [*sanitizer["memcheck"], PYTHON, "-m", "benchmarks.planted_bug"]
        found[PLANTED] = Task(planted, uncached, expected=9)
        for tool, command in sanitizer.items():
            for path, chosen in SANITIZED.items():
                name = f"{tool} {Path(path).stem}"
                found[name] = Task([*command, *pytest, path, "-k", chosen], uncached)
    return found


def choose(found: dict[str, Task], only: str) -> dict[str, Task]:
    """The steps whose name holds ``only`` and those that they need: all need the build, and a
    sanitizer's silence means nothing before it has found the planted bug."""
    chosen = [name for name in found if only in name]
    needed = {"build"}
    if any(name.startswith("memcheck") for name in chosen):
        needed.add(PLANTED)
    return {name: task for name, task in found.items() if name in chosen or name in needed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="without compute-sanitizer")
    parser.add_argument("--only", default="", help="steps whose name holds this, and the build")
    options = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("gpu-check needs an NVIDIA GPU: none is here")
    out = options.out.resolve()
    done = run_all(choose(steps(out, options.quick), options.only), out)
    print(f"\n{summary(out)}\n")
    return conclude(done)


if __name__ == "__main__":
    sys.exit(main())
