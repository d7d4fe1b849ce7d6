"""How the work of attention losses grows under a sliding window: ``python -m benchmarks.windows``.

Forward and backward on a CPU at one window and lengths that double, in turns, in CPU time of one
thread, which a busy machine disturbs less than the clock. Printed are the median and the 20 and
80 % quantiles of each length, and of its ratios to the length before in the same round: 2 is
linear, 4 the square. The same without a window for comparison. Prints the table of
``benchmarks/results/cpu/windows.txt``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import metakd
from benchmarks.run import environment, heading, inner_quantiles
from metakd import ops

SHAPE, LENGTHS, WINDOW = (1, 12, 26, 64), (256, 512, 1024, 2048), 64  # B, A, D_s, D_t
ROUNDS = 15


def step_of(op: str, length: int, window: int | None, backend: str):
    batch, heads, *sizes = SHAPE
    student, teacher = (
        tuple(torch.randn(batch, length, heads, size).transpose(1, 2) for _ in "qk")
        for size in sizes
    )
    for tensor in student:
        tensor.requires_grad_()
    options = {"window": window, "backend": backend}
    if op == "attention_score_mse":
        options["form"] = "tiled"

    def step():
        torch.autograd.grad(getattr(metakd, op)(student, teacher, **options), student)

    return step


def rounds_of(steps: list) -> list[list[float]]:
    """Seconds of CPU time of each step, one list a round."""
    found = []
    for _ in range(ROUNDS):
        times = []
        for step in steps:
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
        found.append(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpp")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(*heading(environment("cpu", 1)), sep="\n")
    batch, heads, *sizes = SHAPE
    shape = f"[{batch}, {heads}, L, {sizes[0]}/{sizes[1]}]"
    print(
        f"{shape}, float32, backend {options.backend}, forward + backward, CPU time of one thread"
    )
    print(f"{'':32}{'L':>6}{'ms':>9}{'20 %':>9}{'80 %':>9}   ratio to the L before, 20 %, 80 %")
    for op in ("attention_score_mse", "attention_kl", "attention_prob_mse"):
        if (reason := ops.why_not(op, options.backend, "cpu", torch.float32)) is not None:
            raise SystemExit(reason)
        for window in (WINDOW, None):
            steps = [step_of(op, length, window, options.backend) for length in LENGTHS]
            for step in steps:
                step()  # warm
            rounds = rounds_of(steps)
            name = f"{op}, {'no window' if window is None else f'window {window}'}"
            for i, length in enumerate(LENGTHS):
                times = [1e3 * times[i] for times in rounds]
                low, high = inner_quantiles(times)
                line = (
                    f"{name:32}{length:>6}{statistics.median(times):>9.2f}{low:>9.2f}{high:>9.2f}"
                )
                if i:
                    ratios = [times[i] / times[i - 1] for times in rounds]
                    low, high = inner_quantiles(ratios)
                    line += f"{statistics.median(ratios):>9.2f}{low:>7.2f}{high:>7.2f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
