"""What comparing attributions costs a distillation step: ``python -m benchmarks.attribution``.

The shape of MiniLM (six layers of 384 teach three, ``small`` of ``benchmarks.step``), full-length
random tokens of two classes. A step is the teacher's part and the student's forward pass, backward
pass and optimizer; timed in turns on a CPU, in CPU time of one thread, which a busy machine
disturbs less than the clock. "Kept" is what a step holds for its backward pass, weights aside.
Prints the table of ``benchmarks/results/cpu/attribution.txt``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.run import environment, heading, inner_quantiles
from benchmarks.step import DOMAINS, SIZES, Scene, kept_for_backward, training
from metakd.config import DistillConfig, TermWeights
from metakd.method.methods import build_terms
from metakd.method.objective import Distillation
from metakd.method.teachers import FrozenTeacher, Teacher

ROUNDS = 7
SCENE = Scene("small", 8, 128, "cpu", torch.float32)
ROWS = {
    "predictions alone": {"terms": TermWeights(attribution=0)},
    "label, 1 step": {},
    "label, 3 steps": {"attribution_steps": 3},
    "2 classes, 1 step": {"attribution_views": "classes"},
}


def step_of(**options) -> tuple[Callable, Callable]:
    """A whole step, and the teacher's part of it."""
    model, student = SCENE.models("sdpa")
    wide, narrow, _ = SIZES[SCENE.size]
    config = DistillConfig(method="ad_kd", **options)
    terms = build_terms(config, student_layers=narrow.layers, teacher_layers=wide.layers)
    module = Distillation(student, terms, teacher_hidden=wide.hidden)
    needs = module.needs | {"logits"}
    teacher = FrozenTeacher([Teacher(model, "mix", DOMAINS)], needs, attribution=module.attribution)
    batch = SCENE.tokens()
    step = training(module, lambda: module(batch, teacher(batch)).rows.mean())
    return step, lambda: teacher(batch)


def main() -> None:
    torch.set_num_threads(1)
    print(*heading(environment("cpu", 1)), sep="\n")
    print(
        f"{SCENE.size}, batch {SCENE.batch}, length {SCENE.length}, float32, CPU time of one thread"
    )
    steps = {name: step_of(**options) for name, options in ROWS.items()}
    kept = {name: kept_for_backward(step) / 2**20 for name, (step, _) in steps.items()}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for name, parts in steps.items():
            for number, part in enumerate(parts):
                start = time.process_time()
                part()
                times.setdefault((name, number), []).append(1e3 * (time.process_time() - start))
    print(f"{'':20}{'ms':>7}{'20 %':>7}{'80 %':>7}{'ratio':>7}{'of teacher':>12}{'kept MiB':>10}")
    without = statistics.median(times[next(iter(ROWS)), 0])
    for name in ROWS:
        median = statistics.median(times[name, 0])
        low, high = inner_quantiles(times[name, 0])
        taught = statistics.median(times[name, 1])
        print(
            f"{name:20}{median:7.0f}{low:7.0f}{high:7.0f}{median / without:7.2f}{taught:12.0f}"
            f"{kept[name]:10.0f}"
        )


if __name__ == "__main__":
    main()
