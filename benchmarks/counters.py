"""What limits each kernel of an operation, by Nsight Compute's counters.

``python -m benchmarks.counters --op soft_kl --shape "[8192, 30522]"`` runs one step of each of our
backends under ``ncu`` and prints for each kernel that it launched: time, throughput of memory and
arithmetic units as shares of their peak, what the L2 answered, registers, occupancy. Clocks are
left as they are. A profiled kernel begins with cold caches. Writes ``counters/<op>.md`` beside the
results.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from benchmarks.registry import ROWS, rows_of
from benchmarks.reports import table
from benchmarks.run import RESULTS, device_folder, environment, heading
from benchmarks.unattended import ROOT

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
# Names of ncu's "details" page, with its base units.
FIGURES = {
    "Duration": "ns",
    "DRAM Throughput": "%",
    "L2 Cache Throughput": "%",
    "Compute (SM) Throughput": "%",
    "L2 Hit Rate": "%",
    "Registers Per Thread": "",
    "Achieved Occupancy": "%",
}


def parse(printed: str) -> list[dict[str, str]]:
    """The kernels of ``ncu --csv --page details`` in the order of their launches: ``kernel`` and
    each of ``FIGURES`` that was measured.

    Raises:
        ValueError: no table is there; the message is what was printed instead.
    """
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    if not lines:
        raise ValueError(printed.strip() or "ncu printed nothing")
    kernels: dict[str, dict[str, str]] = {}
    for entry in csv.DictReader(lines):
        kernel = kernels.setdefault(entry["ID"], {"kernel": entry["Kernel Name"]})
        if entry["Metric Name"] in FIGURES:
            kernel[entry["Metric Name"]] = entry["Metric Value"]
    return list(kernels.values())


def markdown(kernels: list[dict[str, str]]) -> str:
    header = ("kernel", *(f"{name}, {unit}" if unit else name for name, unit in FIGURES.items()))
    rows = [(k["kernel"], *(k.get(name, "-") for name in FIGURES)) for k in kernels]
    return table(header, rows)


def profiled_step(op: str, shape: str, backend: str) -> None:
    """One step between the marks that ``ncu --profile-from-start off`` waits for."""
    import torch

    [row] = [row for row in rows_of(op, "cuda", shape) if row.shape == shape]
    step = row.build("cuda", rivals=False).contenders[backend]
    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _under_ncu(op: str, shape: str, backend: str) -> str:
    here = [sys.executable, "-m", "benchmarks.counters", "--op", op, "--shape", shape]
    sections = [word for name in SECTIONS for word in ("--section", name)]
    ncu = ["ncu", "--csv", "--page", "details", "--print-units", "base", *sections]
    # Settings of a card that may be shared are left as they are.
    ncu += ["--clock-control", "none", "--profile-from-start", "off"]
    done = subprocess.run(
        [*ncu, *here, "--step", backend], cwd=ROOT, capture_output=True, text=True
    )
    try:
        return markdown(parse(done.stdout))
    except ValueError as error:
        return f"Not measured: {str(error).splitlines()[-1]} {done.stderr.strip()[-300:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", required=True, choices=sorted({row.op for row in ROWS}))
    parser.add_argument("--shape", default="", help="only rows whose shape begins so")
    parser.add_argument("--step", help=argparse.SUPPRESS, metavar="BACKEND")
    parser.add_argument("--out", type=Path, help="results folder")
    options = parser.parse_args()
    if options.step:
        return profiled_step(options.op, options.shape, options.step)
    lines = [f"# Counters of {options.op}", "", *heading(environment("cuda", 0))]
    for row in rows_of(options.op, "cuda", options.shape):
        for backend in ("metakd cpp", "metakd triton"):
            lines += ["", f"## {row.shape}, {backend}", ""]
            lines.append(_under_ncu(options.op, row.shape, backend))
    page = "\n".join(lines) + "\n"
    folder = (options.out or RESULTS / device_folder("cuda")) / "counters"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{options.op}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
