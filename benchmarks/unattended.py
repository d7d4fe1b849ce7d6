"""Runs named tasks with nobody watching: each leaves a log, none stops the others.

Where time is lent rather than owned, ``seconds`` bounds the whole: a task that is still running
then is stopped, and those that have not begun are named.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
TAIL = 15  # lines of a failed task's log that are shown at once
GRACE_S = 5.0  # between asking a task to stop and making it


@dataclass(frozen=True)
class Task:
    """A command to run in the repository's root.

    Args:
        command: program and arguments.
        environment: added to this process's own.
        expected: the exit code of a success.
        alone: nothing else may run at the same time, as where time is measured or later tasks need
            what this one makes.
    """

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    expected: int = 0
    alone: bool = True


Done = tuple[str, str, float]  # name; "ok" or what became of it; seconds


def _stop(process: subprocess.Popen) -> None:
    """End a task with all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


class _Runner:
    """What the tasks of one call have in common."""

    def __init__(self, logs: Path, seconds: float):
        self._logs = logs
        self._end = time.monotonic() + seconds
        self._running: set[subprocess.Popen] = set()

    def stop(self) -> None:
        for process in list(self._running):
            _stop(process)

    def run(self, item: tuple[str, Task]) -> Done:
        name, task = item
        start = time.monotonic()
        if start >= self._end:
            return name, "no time", 0.0
        path = self._logs / f"{name.replace(' ', '-')}.log"
        with path.open("w") as log:
            try:
                code = self._exit_code(task, log, self._end - start)
            except OSError as error:  # no such program: a failure like any other
                print(error, file=log)
                code = 127
        late = code is None
        status = "ok" if code == task.expected else "stopped" if late else f"FAILED ({code})"
        seconds = time.monotonic() - start
        told = [f"{name}: {status}, {seconds:.0f} s"]
        if status != "ok":
            told += path.read_text(errors="replace").splitlines()[-TAIL:]
        print("\n".join(told), flush=True)
        return name, status, seconds

    def _exit_code(self, task: Task, log: IO[str], seconds: float) -> int | None:
        """None of a task that had to be stopped."""
        process = subprocess.Popen(
            task.command,
            cwd=ROOT,
            env=os.environ | task.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # so that it can be stopped with all that it starts
        )
        self._running.add(process)
        try:
            return process.wait(None if math.isinf(seconds) else seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            return None
        finally:
            self._running.discard(process)


def run_all(
    tasks: dict[str, Task], logs: Path, *, seconds: float = math.inf, workers: int = 1
) -> list[Done]:
    """Run the tasks in order, each with its log in ``logs``.

    Args:
        tasks: by name.
        logs: made if it does not exist.
        seconds: for all of them together.
        workers: how many neighbours that need not be alone run at once.

    Returns:
        Name, "ok" or what became of it, and seconds of each, in the order of ``tasks``.
    """
    logs.mkdir(parents=True, exist_ok=True)
    runner = _Runner(logs, seconds)
    done: list[Done] = []
    # Like Ctrl-C it does not reach the tasks by itself, and would leave them running.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        for alone, neighbours in groupby(tasks.items(), key=lambda item: item[1].alone):
            with ThreadPoolExecutor(1 if alone else workers) as pool:
                try:
                    done += pool.map(runner.run, neighbours)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    runner.stop()
                    raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return done


def conclude(done: list[Done]) -> int:
    """Print what became of each task; the number of those that are not ok."""
    for name, status, seconds in done:
        print(f"{name:32} {status:12} {seconds:6.0f} s")
    return sum(status != "ok" for _, status, _ in done)
