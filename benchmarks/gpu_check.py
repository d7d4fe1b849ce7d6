"""Everything that needs a GPU in one go: ``make gpu-check``.

Builds the extension with CUDA, runs the tests marked ``gpu`` and the kernels' tests on the device,
compute-sanitizer (memcheck, racecheck) over the kernels' small cases after it has found a planted
bug, ``metakd verify`` and the benchmarks. A step that fails does not stop the others; each leaves
its log in the output folder, and a short table comes last. The exit code is the number of failed
steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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
BENCHMARKS = [
    "soft_kl",
    "soft_jsd",
    "linear_soft_kl",
    "attention_score_mse",
    "attention_kl",
    "attention_prob_mse",
    "hidden_mse",
    "masked_mean",
    "prototype_score",
]

# The sanitizer makes a test a hundred times slower: the ragged sizes of each kernel are enough.
SANITIZED = {
    "tests/test_soft_kl.py": "test_sizes and (shape2 or shape4 or shape8 or shape13 or shape14)",
    "tests/test_attention_score_mse.py": "test_sizes or test_the_guard",
    "tests/test_attention_map.py": "test_sizes",
    "tests/test_hidden_mse.py": "test_sizes or test_mean_in",
    "tests/test_prototype_ops.py": "test_every_dtype",
}

# Writes one element behind an allocation: a sanitizer that does not see this sees nothing.
PLANTED = """
import torch, triton, triton.language as tl

@triton.jit
def kernel(out):
    tl.store(out + tl.arange(0, 1024) * 1048576, 1.0)

kernel[(1,)](torch.empty(16, device="cuda"))
torch.cuda.synchronize()
"""


def steps(out: Path, quick: bool) -> dict[str, tuple[list[str], dict]]:
    """name -> (command, additional environment)."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = {
        "build": (
            [PYTHON, "setup.py", "build_ext", "--inplace"],
            {"METAKD_CUDA": "1", "MAX_JOBS": str(os.cpu_count())},
        ),
        "tests": ([*pytest, *KERNEL_TESTS, f"--junitxml={out}/kernels.xml"], {}),
        "gpu tests": ([*pytest, "-m", "gpu", f"--junitxml={out}/gpu.xml"], {}),
        "verify": ([PYTHON, "-m", "metakd", "verify"], {}),
    }
    for op in BENCHMARKS:
        found[f"benchmark {op}"] = (
            [PYTHON, "-m", "benchmarks.run", "--op", op, "--no-tests", "--out", str(out)],
            {},
        )
    found["benchmark step"] = ([PYTHON, "-m", "benchmarks.step", "--out", str(out)], {})
    if not quick:
        uncached = {
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
        }  # so that every tensor has its own bounds
        for tool in ("memcheck", "racecheck"):
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            for path, chosen in SANITIZED.items():
                name = f"{tool} {Path(path).stem}"
                found[name] = ([*command, *pytest, path, "-k", chosen], uncached)
    return found


def planted_bug_is_found(log: Path) -> bool:
    script = log.with_suffix(".py")
    script.write_text(PLANTED)
    with log.open("w") as stream:
        done = subprocess.run(
            ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", PYTHON, script],
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    return done.returncode == 9


def summary(out: Path) -> list[str]:
    """One line per benchmark row: ours, its share of the limit, and the best opponent."""
    lines = []
    for op in BENCHMARKS:
        path = out / f"{op}.json"
        if not path.is_file():
            continue
        for row in json.loads(path.read_text())["rows"]:
            named = row["contenders"]
            ours = [name for name in named if name.startswith("metakd ")]
            others = [name for name in named if name not in ours]
            ours.remove("metakd reference")
            for name in ours if others else []:
                best = min(others, key=lambda other: named[other]["median_ms"])
                ratio = named[best]["median_ms"] / named[name]["median_ms"]
                share = named[name].get("share_of_limit", 0)
                lines.append(
                    f"{op} {row['shape']} {row['dtype']}: {name} {named[name]['median_ms']:.3f} "
                    f"ms, {share:.0%} of the limit, {ratio:.2f}x of {best}"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="without compute-sanitizer")
    parser.add_argument("--only", default="", help="steps whose name holds this, and the build")
    options = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("gpu-check needs an NVIDIA GPU: none is here")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    table = []
    todo = steps(out, options.quick)
    for name, (command, extra) in todo.items():
        if options.only not in name and name != "build":
            continue
        if name.startswith("memcheck") and not any(row[0] == "planted bug" for row in table):
            found = planted_bug_is_found(out / "planted.log")
            table.append(("planted bug", "found" if found else "NOT FOUND", 0.0))
        start = time.perf_counter()
        with (out / f"{name.replace(' ', '-')}.log").open("w") as log:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | extra, stdout=log, stderr=subprocess.STDOUT
            )
        seconds = time.perf_counter() - start
        table.append(
            (name, "ok" if done.returncode == 0 else f"FAILED ({done.returncode})", seconds)
        )
        print(f"{table[-1][0]}: {table[-1][1]}, {seconds:.0f} s", flush=True)
        if done.returncode:
            log_text = Path(log.name).read_text(errors="replace")
            print("\n".join(log_text.splitlines()[-15:]), flush=True)
    print(*summary(out), sep="\n")
    for name, status, seconds in table:
        print(f"{name:24} {status:12} {seconds:6.0f} s")
    sys.exit(sum(status not in ("ok", "found") for _, status, _ in table))


if __name__ == "__main__":
    main()
