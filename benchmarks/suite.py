"""Every benchmark on the device that is here: ``make bench``.

Times each operation of the registry against its rivals, a distillation step, throughput and steps
with a cached teacher where corpus and encoder are (``$METAKD_DATA/reviews`` or
``../shared/data/reviews``, and ``models/minilm``), and the latency of a teacher and a student of
the paper's sizes; then draws every report and prints a summary and the targets. Needs nobody: a
task that fails does not stop the others, and the exit code is the number of failed ones. Everything
goes to one folder per device, logs to its ``logs/``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks.registry import ROWS
from benchmarks.reports import LATENCY, Report, ReportError, load, table
from benchmarks.run import RESULTS, device_folder
from benchmarks.targets import verdicts
from benchmarks.unattended import ROOT, Task, conclude, run_all

DURATION = (
    "By its budgets the whole suite takes about an hour on two CPU cores, half of it latency; "
    "--quick takes about five minutes, and its figures are too rough to keep: they go to "
    ".benchmarks/DEVICE."
)
ON_TEXTS = ("throughput", "cached_teacher")
LATENCY_MODELS = ("bert-base", "tinybert-4l-312")


def operations(device: str) -> list[str]:
    """The registry's operations that have a row for the device."""
    return list(dict.fromkeys(row.op for row in ROWS if device in row.devices))


def _seen_from_root(path: Path) -> str:
    """Reports record their commands, which should not tell where this copy of the project is."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def benchmarks(
    device: str, out: Path, *, quick: bool = False, tests: bool = True
) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks, and what cannot be measured here with the reason.

    Args:
        device: cpu or cuda.
        out: folder of results.
        quick: small rows and little time, on a CPU; a GPU has them all in little time anyway.
        tests: run an operation's tests before it is timed.
    """

    def task(module: str, *arguments: str, seconds: float | None = None) -> Task:
        budget = ["--seconds", str(seconds)] if quick else []
        return Task(
            [sys.executable, "-m", module, *arguments, *budget, "--out", _seen_from_root(out)]
        )

    options = ["--device", device]
    chosen = [] if tests and not quick else ["--no-tests"]
    if quick and device == "cpu":
        chosen.append("--quick")
    tasks = {
        op: task("benchmarks.run", "--op", op, *options, *chosen, seconds=1)
        for op in operations(device)
    }
    tasks["step"] = task("benchmarks.step", *options, seconds=1)
    data = Path(os.environ.get("METAKD_DATA", ROOT.parent / "shared" / "data")) / "reviews"
    encoder = ROOT / "models" / "minilm"
    missing = [
        path for path in (data / "train.jsonl", encoder / "config.json") if not path.exists()
    ]
    absent = {}
    if missing:
        absent = dict.fromkeys(ON_TEXTS, f"{missing[0]} does not exist")
    else:
        inputs = ["--data", str(data), "--encoder", _seen_from_root(encoder)]
        lengths = ["--max-length", "128"] if quick else []
        for name in ON_TEXTS:
            tasks[name] = task(f"benchmarks.{name}", *inputs, *options, *lengths, seconds=1)
    tokenizer = ["--tokenizer", _seen_from_root(encoder)] if encoder.exists() else []
    # Exporting and compiling the teacher alone takes two minutes.
    cells = ["--batch", "1", "--length", "32", "--length", "128"] if quick else []
    models = LATENCY_MODELS[1:] if quick else LATENCY_MODELS
    # A GPU answers a hundred times in a second.
    budget = [] if quick or device == "cpu" else ["--seconds", "1"]
    tasks["latency"] = task(
        "metakd", "latency", *models, *options, *tokenizer, *cells, *budget, seconds=0.5
    )
    return tasks, absent


def _lines(report: Report) -> list[tuple[str, ...]]:
    """A line for each of our contenders in each panel, against the best rival."""
    best = max if report.kind.higher_is_better else min
    lines = []
    for title, figures in report.panels.items():
        medians = {name: figure.centre for name, figure in figures.items()}
        ours = [name for name in figures if report.kind.is_ours(name)]
        rivals = [name for name in figures if report.kind.is_ours(name) is False]
        if report.kind is LATENCY and ours:  # engines are each other's rivals: the best one counts
            ours = [best(ours, key=medians.get)]
        rival = best(rivals, key=medians.get, default=None)
        for name in ours:
            share = figures[name].share_of_limit
            times = None if rival is None else medians[rival] / medians[name]
            if times is not None and report.kind.higher_is_better:
                times = 1 / times
            lines.append(
                (
                    title,
                    name,
                    rival or "-",
                    f"{medians[name]:.4g} {report.kind.unit}",
                    "-" if share is None else f"{share:.0%}",
                    "-" if times is None else f"{times:.2f}",
                )
            )
    return lines


def summary(out: Path) -> str:
    """What the folder's reports say: ours, its share of the limit, times as good as the best
    rival."""
    lines, problems = [], []
    for path in sorted(out.glob("*.json")):
        try:
            lines += _lines(load(path))
        except ReportError as error:
            problems.append(str(error))
    header = ("row", "ours", "best rival", "median", "of the limit", "times as good")
    return "\n".join([table(header, lines, left=3), *problems])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=DURATION)
    parser.add_argument("--quick", action="store_true", help="a look: small rows, little time")
    parser.add_argument("--only", default="", metavar="NAME", help="tasks whose name holds this")
    parser.add_argument("--out", type=Path, help="results folder")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = (ROOT / ".benchmarks" if options.quick else RESULTS) / device_folder(device)
    out = (options.out or folder).resolve()
    tasks, absent = benchmarks(device, out, quick=options.quick)
    chosen = {name: task for name, task in tasks.items() if options.only in name}
    for name, reason in absent.items():
        if options.only in name:
            print(f"{name}: not here: {reason}")
    if not chosen:
        parser.error(f"--only {options.only}: none of {', '.join(tasks)}")
    chosen["plots"] = Task([sys.executable, "-m", "benchmarks.plot", str(out)])
    done = run_all(chosen, out / "logs")
    print(f"\n{summary(out)}\n\n{verdicts(out)}\n")
    return conclude(done)


if __name__ == "__main__":
    sys.exit(main())
