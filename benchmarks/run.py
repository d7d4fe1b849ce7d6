"""Times one operation against its opponents: ``python -m benchmarks.run --op soft_kl``.

First the operation's tests: a red test has no speed. Then every contender's loss is compared with
ours, then they are timed: on CUDA by ``triton.testing.do_bench`` (events, L2 flushed), on a CPU
in short turns, A B A B, with a fixed number of threads, so that a drift of the machine hits all
alike. Who runs out of memory, or fails in another way, is listed with the reason and costs nobody
else a figure; where it is one of our kernels, or a loss is another, the exit code is 1 in the end.
Reported are the median and the 20 and 80 % quantiles, the ratio to the first contender, peak extra
memory (CUDA) and the share of the machine's limit that was measured in the same run: a large copy
(bytes read plus bytes written) or a large matrix product. Losing rows stay. Writes
``results/<device>/<op>.json`` and prints the table, which it also writes beside it;
``benchmarks.plot`` draws it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.registry import ROWS, Contest, Row, attempt, give_memory_back, rows_of
from benchmarks.reports import is_fallback, table
from metakd.environment import environment as describe
from metakd.environment import installed

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
# Tests of an operation that has no file of its own name.
TESTS = {
    "soft_reverse_kl": ROOT / "tests" / "test_soft_kl.py",
    "soft_jsd": ROOT / "tests" / "test_soft_kl.py",
    "soft_kl_one_read": ROOT / "tests" / "test_soft_kl.py",
    "attention_kl": ROOT / "tests" / "test_attention_map.py",
    "attention_prob_mse": ROOT / "tests" / "test_attention_map.py",
    "masked_mean": ROOT / "tests" / "test_hidden_mse.py",
    "prototype_score": ROOT / "tests" / "test_prototype_ops.py",
}


def environment(device: str, threads: int) -> dict:
    """What a benchmark ran on, and of which commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    rivals = ("torch", "triton", "liger-kernel", "trl", "textbrewer")
    found = describe(device, threads, *rivals)
    return found | {"commit": commit.stdout.strip() or None}


def device_folder(device: str) -> str:
    """Name of the device's folder of results."""
    if device != "cuda":
        return device
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


TURN_S = 0.05


def interleaved(contenders: dict, budget_s: float, most: int = 60) -> dict[str, list[float]]:
    """Seconds a step, contenders in turn, for about ``budget_s`` seconds (5 rounds at least).

    A turn is as many steps as fit ``TURN_S``, so that a step of microseconds is timed as a training
    loop would find it and not with the caches that another contender left."""
    steps = {}
    for name, step in contenders.items():
        step()  # warm: caches, lazily compiled code
        start = time.perf_counter()
        step()
        steps[name] = max(1, round(TURN_S / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + budget_s
    for round_ in range(most):
        if round_ >= 5 and time.perf_counter() > end:
            break
        for name, step in contenders.items():
            start = time.perf_counter()
            for _ in range(steps[name]):
                step()
            times[name].append((time.perf_counter() - start) / steps[name])
    return times


def of_each(contenders: dict, absent: dict[str, str], do: Callable[..., T]) -> dict[str, T]:
    """``do(step)`` of each contender but those that fail, which go among the absent with the
    reason."""
    found = {name: attempt(name, absent, partial(do, step)) for name, step in contenders.items()}
    return {name: value for name, value in found.items() if name not in absent}


LEAST_RUNS = 10  # behind a median on a GPU


def quantiles_on_gpu(step: Callable) -> tuple[float, ...]:
    """Median, 20 % and 80 % quantile in milliseconds."""
    from triton.testing import do_bench

    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    # Its usual 100 ms would be a single run of a step that takes as long.
    lasting = max(100.0, LEAST_RUNS * 1e3 * (time.perf_counter() - start))
    return tuple(do_bench(step, rep=lasting, quantiles=[0.5, 0.2, 0.8]))


def quantiles(
    contenders: dict, device: str, budget_s: float, absent: dict[str, str] | None = None
) -> dict[str, tuple[float, ...]]:
    """Median, 20 % and 80 % quantile in milliseconds of each contender.

    Args:
        contenders: steps by name.
        device: cpu or cuda.
        budget_s: seconds for all of them, on a CPU.
        absent: takes those that fail on a GPU, with the reason; None raises instead.
    """
    if device == "cuda":
        if absent is not None:
            return of_each(contenders, absent, quantiles_on_gpu)
        return {name: quantiles_on_gpu(step) for name, step in contenders.items()}
    return {
        name: tuple(1e3 * x for x in (statistics.median(seconds), *inner_quantiles(seconds)))
        for name, seconds in interleaved(contenders, budget_s).items()
    }


def inner_quantiles(values: Sequence[float]) -> tuple[float, float]:
    """The 20 and the 80 % quantile."""
    cuts = statistics.quantiles(values, n=10)
    return cuts[1], cuts[7]


def described(median: float, low: float, high: float) -> dict[str, float]:
    """A contender's ``quantiles`` as its report keeps them."""
    return {"median_ms": median, "p20_ms": low, "p80_ms": high}


def copy_rate(device: str, budget_s: float = 1.0) -> float:
    """Bytes read plus bytes written per second of a large copy."""
    source = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    times = quantiles({"copy": lambda: target.copy_(source)}, device, budget_s)
    return 2 * source.nbytes / (1e-3 * times["copy"][0])


def large_product(device: str, dtype: torch.dtype) -> tuple[Callable, int]:
    """A large square matrix product, and its flops."""
    size = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    return lambda: left @ right, 2 * size**3


def matmul_rate(device: str, dtype: torch.dtype, budget_s: float = 1.0) -> float:
    """Flops per second of a large square matrix product."""
    product, flops = large_product(device, dtype)
    times = quantiles({"product": product}, device, budget_s)
    return flops / (1e-3 * times["product"][0])


def peak_memory(step) -> int:
    """Bytes that one step needs beyond what is there before it."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def same_losses(
    losses: dict[str, float],
    first: str,
    tolerance: float,
    absent: dict[str, str],
    rougher: dict[str, float] | None = None,
) -> list[str]:
    """Names of those whose loss is not ``first``'s, within the tolerance or their ``rougher`` own:
    they go among the absent, because what computes something else has no speed."""
    others = []
    for name, loss in losses.items():
        allowed = (rougher or {}).get(name, tolerance) * abs(losses[first])
        if not abs(loss - losses[first]) <= allowed:  # a NaN is another
            absent[name] = f"gives the loss {loss}, {first} {losses[first]}"
            others.append(name)
    return others


def measure(
    row: Row, device: str, budget_s: float, rates: dict, problems: list[str] | None = None
) -> dict:
    """One row of the report.

    Args:
        row: of the registry.
        device: cpu or cuda.
        budget_s: seconds for it, on a CPU.
        rates: the limits measured so far, to which it may add.
        problems: takes what must not pass in silence: a loss that is another, a kernel of ours that
            fails.
    """
    problems = [] if problems is None else problems
    contest: Contest = row.build(device)
    entered, absent = contest.contenders, contest.absent
    losses = of_each(entered, absent, lambda step: step().double().item())
    first = next(iter(losses), None)
    wrong = (
        []
        if first is None
        else same_losses(losses, first, contest.tolerance, absent, contest.rougher)
    )
    compared = {name: step for name, step in entered.items() if name not in absent}
    times = quantiles(compared, device, budget_s, absent)
    timed = {name: entered[name] for name in times}
    peaks = of_each(timed, {}, peak_memory) if device == "cuda" else {}
    # What is written over whole maps may be too large; a kernel of ours never is.
    wrong += [n for n in entered if n.startswith("metakd") and not is_fallback(n) and n in absent]
    problems += [f"{row.op} {row.shape}: {name}: {absent[name]}" for name in dict.fromkeys(wrong)]
    ours = next(iter(times.values()), (math.nan,))[0]
    limit = None
    if row.bytes:
        limit = row.bytes / rates["copy"]
    elif row.flops:
        key = f"matmul {row.dtype}"
        rates.setdefault(key, matmul_rate(device, row.dtype))
        limit = row.flops / rates[key]
    result = {
        "op": row.op,
        "shape": row.shape,
        "dtype": str(row.dtype).removeprefix("torch."),
        "least_bytes": row.bytes,
        "least_flops": row.flops,
        "loss": losses.get(first),
        "absent": absent,
        "contenders": {},
    }
    for name, found in times.items():
        entry = described(*found) | {"times_ours": found[0] / ours}
        if limit is not None:
            entry["share_of_limit"] = 1e3 * limit / found[0]
        if name in peaks:
            entry["peak_extra_bytes"] = peaks[name]
        result["contenders"][name] = entry
    return result


def heading(environment: dict) -> list[str]:
    """What ran where, in two lines."""
    if "threads" in environment:
        machine = f"{environment['threads']} threads"
    else:
        machine = f"driver {environment['driver']}"
    return [
        f"{environment['device']}; {installed(environment)}",
        f"{environment['date']}, commit {environment['commit']}, {machine}",
    ]


def markdown(report: dict) -> str:
    """The report as tables for people."""
    lines = [
        f"# {report['op']}",
        "",
        *heading(report["environment"]),
        "Limits measured in the same run: "
        + ", ".join(
            f"{name.replace('torch.', '')} {rate / 1e9:.0f} G{'B' if name == 'copy' else 'flop'}/s"
            for name, rate in report["rates"].items()
        ),
    ]
    for row in report["rows"]:
        cells = []
        for name, entry in row["contenders"].items():
            share, memory = entry.get("share_of_limit"), entry.get("peak_extra_bytes")
            cells.append(
                (
                    name,
                    f"{entry['median_ms']:.3f}",
                    f"{entry['p20_ms']:.3f}-{entry['p80_ms']:.3f}",
                    f"{entry['times_ours']:.2f}",
                    "-" if share is None else f"{share:.0%}",
                    "-" if memory is None else f"{memory / 2**20:.0f}",
                )
            )
        header = ("", "median ms", "20-80 %", "times ours", "of the limit", "extra MiB")
        title = f"## {row['shape']}, {row['dtype']}, forward and backward"
        lines += ["", title, "", table(header, cells, absent=row["absent"])]
    return "\n".join(lines) + "\n"


def write_report(name: str, report: dict, page: str, device: str, out: Path | None) -> None:
    """Write ``<name>.json`` and ``<name>.md`` to ``out``, or to the device's folder among the
    results, and print the page."""
    folder = out or RESULTS / device_folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(page)
    print(page)


def read_options(parser: argparse.ArgumentParser, seconds: float, per: str) -> argparse.Namespace:
    """The command line, with what every benchmark is asked; sets the threads.

    Args:
        parser: knows what this one alone is asked.
        seconds: budget by default.
        per: what has such a budget.
    """
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"per {per}")
    parser.add_argument("--out", type=Path, help="results folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", required=True, choices=sorted({row.op for row in ROWS}))
    parser.add_argument("--quick", action="store_true", help="only rows that CI can afford")
    parser.add_argument("--shape", default="", help="only rows whose shape begins so")
    parser.add_argument("--no-tests", action="store_true", help="they have just passed")
    options = read_options(parser, 20.0, "row, on a CPU")
    tests = TESTS.get(options.op, ROOT / "tests" / f"test_{options.op}.py")
    checks = [sys.executable, "-m", "pytest", "-q", str(tests)]
    if not options.no_tests and subprocess.run(checks, cwd=ROOT).returncode:
        raise SystemExit(f"{tests.name} is red: nothing is timed")
    device = options.device
    report = {
        "op": options.op,
        "environment": environment(device, options.threads),
        "rates": {"copy": copy_rate(device)},
        "rows": [],
    }
    problems: list[str] = []
    failed: dict[str, str] = {}
    for row in rows_of(options.op, device, options.shape):
        if row.quick or not options.quick:
            arguments = row, device, options.seconds, report["rates"], problems
            measured = attempt(f"{row.op} {row.shape}", failed, partial(measure, *arguments))
            report["rows"] += [] if measured is None else [measured]
            # Dynamo keeps eight compiled forms of one function and then runs it uncompiled.
            torch.compiler.reset()
            give_memory_back()
    write_report(options.op, report, markdown(report), device, options.out)
    problems += [f"{name}: {reason}" for name, reason in failed.items()]
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
