"""Times a distillation step with a live teacher and with a cached one: ``python -m
benchmarks.cached_teacher --data FOLDER --encoder FOLDER``.

A step is collating, with what the cache adds to a batch, the teacher's forward pass or none, the
student's forward and backward pass and the optimizer, on texts of ``FOLDER/train.jsonl`` grouped by
length; the student is every second layer of the encoder, as in ``benchmarks.throughput``. Both
teachers see the same batches, in turn, and must give the same loss. In training, batches are made
ahead by a thread; here they are not, so that reading the cache counts in full.

Files have just been written and are read from memory where it holds them; what a disk adds is bytes
an example over its rate. "Pays after" is the number of epochs in which the steps have saved what
making the cache took. Writes ``results/<device>/cached_teacher.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.reports import table
from benchmarks.run import described, environment, heading, inner_quantiles, write_report
from benchmarks.step import training
from benchmarks.throughput import Scene, check_same_loss, read_text_options, timed
from metakd.data.batches import StepSampler, collate
from metakd.pipeline.teacher_cache import KeptOutputs, bytes_of, signals_of
from metakd.training.world import World

METHODS = ("logits_kd", "meta")
LIVE, CACHED = "live teacher", "metakd, cached teacher"


def measure(
    scene: Scene, tokenizer, batch_size: int, steps: int, budget_s: float, folder: Path
) -> dict:
    """One row of the report: a method, its cache in ``folder``, and steps with and without."""
    train = scene.corpus.train
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    train = train.select(chosen[: steps * batch_size].sort().values)
    plan = StepSampler(train.lengths, step_size=batch_size, micro_batches=1, seed=0).epoch(0)
    module, frozen = scene.distillation(packed=False)
    shape = scene.teacher.model.config
    depth, is_meta = shape.num_hidden_layers, scene.method == "meta"
    signals = signals_of(scene.terms, is_meta, depth)
    pad = collate(tokenizer)

    kept = KeptOutputs(folder, scene.method, [], {}, train, depth, World(device=scene.device), str)
    making_s = timed(kept.make, signals, frozen, pad, 64)
    cached = kept.teacher(signals)
    examples = train.with_column("t", torch.rand(len(train)))

    def batch_of(rows: list[int], make) -> dict[str, Tensor]:
        batch = make([examples[row] for row in rows])
        return {name: value.to(scene.device) for name, value in batch.items()}

    teachers = {LIVE: (frozen, pad), CACHED: (cached, cached.collate(pad))}
    learn = training(module, lambda batch, teach: module(batch, teach(batch)).rows.mean())
    seconds = {name: [] for name in teachers}
    pairs = {name: (module, teach) for name, (teach, _) in teachers.items()}
    # A batch for the cached teacher serves the live one as well.
    check_same_loss(pairs, batch_of(plan[0][0], teachers[CACHED][1]), scene.dtype)
    for teach, make in teachers.values():
        learn(batch_of(plan[0][0], make), teach)  # warm
    end, done = time.perf_counter() + budget_s, 0
    for (rows,) in plan:
        if done >= 5 and time.perf_counter() > end:
            break
        done += 1
        for name, (teach, make) in teachers.items():
            seconds[name].append(timed(lambda r=rows, t=teach, m=make: learn(batch_of(r, m), t)))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    saved = (medians[LIVE] - medians[CACHED]) * len(plan)
    return {
        "shape": f"{scene.method}: batch {batch_size}, up to {max(train.lengths)} tokens",
        "dtype": str(scene.dtype).removeprefix("torch."),
        "examples": len(train),
        "mean_length": statistics.fmean(train.lengths),
        "steps": done,
        "load": os.getloadavg(),
        "making_s": making_s,
        "bytes": bytes_of(signals, train, shape, len(scene.corpus.label2id), scene.dtype.itemsize),
        "reading_s": statistics.median(
            timed(batch_of, rows, teachers[CACHED][1]) for (rows,) in plan[:done]
        ),
        "pays_after_epochs": making_s / saved if saved > 0 else None,
        "contenders": {
            name: described(*(1e3 * s for s in (medians[name], *inner_quantiles(values))))
            | {"seconds": values}
            for name, values in seconds.items()
        },
    }


def markdown(report: dict) -> str:
    lines = [
        "# A distillation step with a live and with a cached teacher",
        "",
        *heading(report["environment"]),
        f"Encoder of {report['layers'][0]} layers to {report['layers'][1]} of them, review texts "
        "grouped by length, dropout on",
    ]
    for row in report["rows"]:
        cached = row["contenders"][CACHED]["median_ms"]
        pays = row["pays_after_epochs"]
        cells = [
            (
                name,
                f"{entry['median_ms']:.0f}",
                f"{entry['p20_ms']:.0f}-{entry['p80_ms']:.0f}",
                f"{entry['median_ms'] / cached:.2f}",
            )
            for name, entry in row["contenders"].items()
        ]
        lines += [
            "",
            f"## {row['shape']} (mean {row['mean_length']:.0f}), {row['dtype']}",
            "",
            f"{row['steps']} steps of each, in turn; the machine's load at the end: "
            f"{row['load'][0]:.1f}. Kept: {row['bytes'] / row['examples']:,.0f} bytes an example. "
            f"Making took {1e3 * row['making_s'] / row['examples']:.1f} ms an example"
            + ("" if pays is None else f" and pays after {pays:.1f} epochs")
            + f". Collating from the cache is {1e3 * row['reading_s'] / cached:.1%} of a step.",
            "",
            table(("", "median ms", "20-80 %", "times cached"), cells),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="batches to draw texts for")
    texts = read_text_options(parser, 120.0, "method")
    options, device, corpus = texts.options, texts.device, texts.corpus(texts.options.max_length)
    report = {"environment": environment(device.type, options.threads), "rows": []}
    for method in METHODS:
        scene = Scene(corpus, options.encoder, device, texts.dtype, method)
        models = scene.teacher.model, scene.student
        report["layers"] = [model.config.num_hidden_layers for model in models]
        with tempfile.TemporaryDirectory() as folder:
            settings = options.batch, options.steps, options.seconds, Path(folder)
            row = measure(scene, texts.tokenizer, *settings)
        report["rows"].append(row)
    write_report("cached_teacher", report, markdown(report), device.type, options.out)


if __name__ == "__main__":
    main()
