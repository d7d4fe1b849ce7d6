"""Searches better block shapes for the Triton kernels: ``python -m benchmarks.tune --op soft_kl``.

Each kernel module keeps its blocks, warps, stages and register bounds in functions named
``*_shape``. For each row of the registry this times the step as it is, then with every shape that
differs in one number, keeps the fastest if it gains, and begins again from there. The kernels stay
as they are: the tables that it prints, and writes to ``tune/`` beside the results, say what to put
into the functions. A shape that does not compile, or gives another loss, says so. Whether a faster
one is right the tests decide, and whether it spills elsewhere ``tests/compile_triton.py``.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import metakd.kernels
from benchmarks.registry import ROWS, Step, attempt, give_memory_back, rows_of
from benchmarks.reports import table
from benchmarks.run import (
    RESULTS,
    device_folder,
    environment,
    heading,
    quantiles_on_gpu,
    write_report,
)

GAIN = 1.02  # less is noise
STAGES = (1, 2, 3, 4)
REGISTERS = (None, 64, 80, 96, 128, 168)
WARPS = (1, 2, 4, 8, 16)
# What a shape's other numbers depend on, or what must hold the whole of something.
GIVEN = {"BLOCK", "PER", "TEACHERS", "WIDTH_S", "WIDTH_T"}

Shape = dict[str, int | None]
Call = tuple[str, tuple]  # function, arguments


@dataclass
class Tables:
    """The shape functions of all kernel modules, while they can be overruled.

    Args:
        changes: by call, what replaces numbers of its shape; None removes one.
        asked: the shape that each call of them got.
    """

    changes: dict[Call, Shape] = field(default_factory=dict)
    asked: dict[Call, Shape] = field(default_factory=dict)

    def overrule(self, function: types.FunctionType) -> Callable:
        def shape(*arguments):
            call = f"{function.__module__}.{function.__name__}", arguments
            changed = function(*arguments) | self.changes.get(call, {})
            self.asked[call] = {name: n for name, n in changed.items() if n is not None}
            return self.asked[call]

        return shape


@contextmanager
def overruled() -> Iterator[Tables]:
    """Let ``Tables`` stand before the shape functions of ``metakd.kernels``."""
    tables = Tables()
    found = [
        (module, name, function)
        for info in pkgutil.iter_modules(metakd.kernels.__path__, "metakd.kernels.")
        for module in [importlib.import_module(info.name)]
        for name, function in vars(module).items()
        if name.endswith("_shape") and isinstance(function, types.FunctionType)
    ]
    for module, name, function in found:
        setattr(module, name, tables.overrule(function))
    try:
        yield tables
    finally:
        for module, name, function in found:
            setattr(module, name, function)


def moves(shape: Shape) -> Iterator[Shape]:
    """Changes of one number each."""
    choices = {"num_warps": WARPS, "num_stages": STAGES, "maxnreg": REGISTERS}
    for name in dict.fromkeys((*shape, "num_stages", "maxnreg")):
        now = shape.get(name)
        if name in choices:
            others = choices[name]
        elif name in GIVEN or type(now) is not int:
            continue
        else:
            others = (now // 2, 2 * now)
        yield from ({name: other} for other in others if other not in (now, 0))


def search(step: Step, timer: Callable[[Step], float], rounds: int = 2) -> list[dict]:
    """Better shapes for the calls that ``step`` makes.

    Args:
        step: gives its loss.
        timer: the time of a step in milliseconds.
        rounds: most changes kept for one call.

    Returns:
        For each call: ``function``, ``arguments``, ``shape`` as it is, ``ms``, and ``tried``: a
        list of ``change`` from that shape, ``ms`` or why not, fastest first.
    """
    found = []
    with overruled() as tables:
        step()  # one that works in place gives another loss the first time
        loss = step().double().item()
        calls = dict(tables.asked)
        before = timer(step)
        for call, shape in calls.items():
            tried, kept, best = [], {}, before
            for _ in range(rounds):
                tries = [
                    _try(step, timer, tables, call, kept | move, loss)
                    for move in moves(shape | kept)
                ]
                tried += tries
                fastest = min(tries, key=lambda one: one["ms"] or float("inf"), default=None)
                if fastest is None or not fastest["ms"] or fastest["ms"] * GAIN > best:
                    break
                kept, best = fastest["change"], fastest["ms"]
            tables.changes.pop(call, None)
            tried.sort(key=lambda one: one["ms"] or float("inf"))
            name, arguments = call
            found.append(
                {
                    "function": name.removeprefix("metakd.kernels."),
                    "arguments": list(arguments),
                    "shape": shape,
                    "ms": before,
                    "tried": tried,
                }
            )
    return found


def _try(step, timer, tables: Tables, call: Call, change: Shape, loss: float) -> dict:
    tables.changes[call] = change
    why: dict[str, str] = {}

    def timed() -> float:
        value = step().double().item()
        if not abs(value - loss) <= 1e-2 * abs(loss):
            raise ValueError(f"the loss is {value}, not {loss}")
        return timer(step)

    return {"change": change, "ms": attempt("it", why, timed), "why": why.get("it")}


def markdown(report: dict) -> str:
    lines = [f"# Shapes of {report['op']}", "", *heading(report["environment"])]
    for row in report["rows"]:
        for call in row["calls"]:
            name = f"{call['function']}({', '.join(map(str, call['arguments']))})"
            lines += [
                "",
                f"## {row['shape']}, {row['dtype']}: {name}",
                "",
                f"`{call['shape']}`",
                "",
            ]
            tried = [
                (
                    f"`{one['change']}`",
                    one["why"] if one["ms"] is None else f"{one['ms']:.4f}",
                    "-" if one["ms"] is None else f"{call['ms'] / one['ms']:.3f}",
                )
                for one in call["tried"]
            ]
            as_it_is = ("as it is", f"{call['ms']:.4f}", "1.000")
            lines.append(table(("change", "ms", "times as fast"), [as_it_is, *tried]))
    return "\n".join(lines) + "\n"


def main() -> None:
    ops = {row.op for row in ROWS if "cuda" in row.devices}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", required=True, choices=sorted(ops))
    parser.add_argument("--shape", default="", help="only rows whose shape begins so")
    parser.add_argument("--rounds", type=int, default=2, help="most changes of one shape")
    parser.add_argument("--out", type=Path, help="results folder")
    options = parser.parse_args()
    folder = (options.out or RESULTS / device_folder("cuda")) / "tune"
    report = {"op": options.op, "environment": environment("cuda", 0), "rows": []}
    for row in rows_of(options.op, "cuda", options.shape):
        step = row.build("cuda", rivals=False).contenders["metakd triton"]
        calls = search(step, lambda step: quantiles_on_gpu(step)[0], options.rounds)
        dtype = str(row.dtype).removeprefix("torch.")
        report["rows"].append({"shape": row.shape, "dtype": dtype, "calls": calls})
        give_memory_back()
        # After each row: time may run out.
        write_report(options.op, report, markdown(report), "cuda", folder)


if __name__ == "__main__":
    main()
