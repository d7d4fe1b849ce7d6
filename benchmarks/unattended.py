"""Runs named tasks one after another with nobody watching: each leaves a log, none stops the
others."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TAIL = 15  # lines of a failed task's log that are shown at once


@dataclass(frozen=True)
class Task:
    """A command to run in the repository's root.

    Args:
        command: program and arguments.
        environment: added to this process's own.
        expected: the exit code of a success.
    """

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    expected: int = 0


def run_all(tasks: dict[str, Task], logs: Path) -> list[tuple[str, str, float]]:
    """Run the tasks in order, each with its log in ``logs``.

    Returns:
        Name, "ok" or how it failed, and seconds of each.
    """
    logs.mkdir(parents=True, exist_ok=True)
    done = []
    for name, task in tasks.items():
        start = time.perf_counter()
        path = logs / f"{name.replace(' ', '-')}.log"
        with path.open("w") as log:
            try:
                code = subprocess.run(
                    task.command,
                    cwd=ROOT,
                    env=os.environ | task.environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                ).returncode
            except OSError as error:  # no such program: a failure like any other
                print(error, file=log)
                code = 127
        status = "ok" if code == task.expected else f"FAILED ({code})"
        done.append((name, status, time.perf_counter() - start))
        print(f"{name}: {status}, {done[-1][2]:.0f} s", flush=True)
        if status != "ok":
            print("\n".join(path.read_text(errors="replace").splitlines()[-TAIL:]), flush=True)
    return done


def conclude(done: list[tuple[str, str, float]]) -> int:
    """Print what became of each task; the number of failed ones."""
    for name, status, seconds in done:
        print(f"{name:32} {status:12} {seconds:6.0f} s")
    return sum(status != "ok" for _, status, _ in done)
