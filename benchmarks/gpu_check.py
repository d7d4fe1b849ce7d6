"""Everything that needs a GPU in one go: ``make gpu-check``.

Builds the extension with CUDA, runs the kernels' tests on the device and those marked ``gpu``,
``metakd verify``, compute-sanitizer (memcheck, racecheck) over the kernels' small cases after each
tool has found a bug planted for it, and the benchmarks. A step that fails does not stop the others;
each leaves its log in the output folder, and short tables come last: what was measured, the
targets, and what became of each step. The exit code is the number of steps that are not ok.

On a machine that is lent by the minute: ``--seconds`` ends the whole in time, ``--list`` names the
steps, and ``--only A --only B`` takes those whose names hold A or B, with what they need.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from benchmarks.suite import benchmarks, summary
from benchmarks.targets import verdicts
from benchmarks.unattended import Task, conclude, run_all

PYTHON = sys.executable
KERNEL_TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "soft_kl",
        "linear_soft_kl",
        "mixture_kl",
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
    "tests/test_mixture_kl.py": "test_sizes",
    "tests/test_attention_score_mse.py": "test_sizes or test_the_guard",
    "tests/test_attention_map.py": "test_sizes",
    "tests/test_hidden_mse.py": "test_sizes or test_mean_in",
    "tests/test_prototype_ops.py": "test_every_dtype",
}
# Processes side by side where no time is measured: most of theirs goes to compilers.
WORKERS = max(1, (os.cpu_count() or 1) // 2)


def steps(out: Path, *, sanitize: bool = True) -> dict[str, Task]:
    """The tasks by name."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    spread = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    found = {
        "build": Task(
            [PYTHON, "-m", "metakd", "build", "--cuda"], {"MAX_JOBS": str(os.cpu_count())}
        ),
        "kernel tests": Task(
            [*pytest, *spread, "-m", "not gpu", *KERNEL_TESTS, f"--junitxml={out}/kernels.xml"]
        ),
        # One process: rows beyond 2^31 elements take most of the memory.
        "gpu tests": Task([*pytest, "-m", "gpu", f"--junitxml={out}/gpu.xml"]),
        "verify": Task([PYTHON, "-m", "metakd", "verify"]),
    }
    if sanitize:
        found |= _sanitizer(out, pytest)
    tasks, _ = benchmarks("cuda", out, tests=False)
    return found | {f"benchmark {name}": task for name, task in tasks.items()}


def _sanitizer(out: Path, pytest: list[str]) -> dict[str, Task]:
    race = str(out / "planted-race")
    # So that every tensor has its own bounds.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tools = {
        tool: ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        for tool in ("memcheck", "racecheck")
    }
    found = {
        "race program": Task(["nvcc", "-arch=native", "-o", race, "benchmarks/planted_race.cu"]),
        "planted for memcheck": Task(
            [*tools["memcheck"], PYTHON, "-m", "benchmarks.planted_overrun"],
            uncached,
            expected=9,
            alone=False,
        ),
        "planted for racecheck": Task([*tools["racecheck"], race], expected=9, alone=False),
    }
    for tool, command in tools.items():
        for path, chosen in SANITIZED.items():
            found[f"{tool} {Path(path).stem}"] = Task(
                [*command, *pytest, path, "-k", chosen], uncached, alone=False
            )
    return found


def choose(found: dict[str, Task], only: list[str]) -> dict[str, Task]:
    """The steps whose name holds one of ``only`` (all, if it is empty) and those that they need:
    all need the build, and a sanitizer's silence means nothing before it has found its planted
    bug."""
    chosen = {name for name in found if not only or any(part in name for part in only)}
    needed = {"build"}
    for tool in ("memcheck", "racecheck"):
        if any(name.startswith(tool) for name in chosen):
            needed.add(f"planted for {tool}")
    if "planted for racecheck" in chosen | needed:
        needed.add("race program")
    return {name: task for name, task in found.items() if name in chosen | needed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="for all steps together"
    )
    parser.add_argument("--quick", action="store_true", help="without compute-sanitizer")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="name the steps and do nothing")
    options = parser.parse_args()
    out = options.out.resolve()
    found = steps(out, sanitize=not options.quick)
    for part in options.only:
        if not any(part in name for name in found):
            parser.error(f"--only {part}: none of {', '.join(found)}")
    chosen = choose(found, options.only)
    if options.list:
        print("\n".join(chosen))
        return 0
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("gpu-check needs an NVIDIA GPU: none is here")
    done = run_all(chosen, out / "logs", seconds=options.seconds, workers=WORKERS)
    print(f"\n{summary(out)}\n\n{verdicts(out)}\n")
    return conclude(done)


if __name__ == "__main__":
    sys.exit(main())
