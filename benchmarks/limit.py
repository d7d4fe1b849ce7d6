"""How near a training step comes to what the machine allows: ``python -m benchmarks.limit``.

The limit is the matrix products of forward and backward pass at the rate of a large square one, and
the bytes that gradient norm and AdamW have to move at the rate of a large copy; both are measured
in the same process. Beside it stand a step of ``metakd``'s loop, DeepSpeed's engine and all that a
run does between two steps, and one of a plain loop: the same model under ``torch.autocast``,
``clip_grad_norm_`` and a fused AdamW. The two take turns, step by step.

Models have the shape of MiniLM, six layers of 384 as a teacher and three as a student, with their
dropout, on random tokens of one length. Writes ``results/<device>/limit.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig

from benchmarks.reports import table
from benchmarks.run import copy_rate, environment, heading, matmul_rate, read_options, write_report
from metakd.config import RunConfig, Sharding, TrainingConfig
from metakd.data.batches import Batch
from metakd.data.corpus import Split, Tokens
from metakd.method.teachers import Teacher
from metakd.pipeline.plan import Sizes
from metakd.training import dropout
from metakd.training.engine import fit, seed_everything
from metakd.training.log import RunLog
from metakd.training.world import join_world

DEPTHS = {"teacher": 6, "student": 3}
SHAPES = ((16, 24), (16, 96), (16, 128), (32, 24), (32, 96), (32, 128))
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM = 3
# Of each weight: the gradient read for its norm; gradient, weight and two moments read, the last
# three written. In half precision the gradient has 2 bytes, and the weight is written twice.
MOVED = {"fp32": 4 + 4 * 4 + 3 * 4, "bf16": 2 + 2 + 3 * 4 + 3 * 4 + 2}


def model_of(depth: int) -> nn.Module:
    torch.manual_seed(0)
    shape = BertConfig(
        num_hidden_layers=depth,
        hidden_size=384,
        intermediate_size=1536,
        num_attention_heads=12,
        attn_implementation="sdpa",
    )
    return AutoModelForSequenceClassification.from_config(shape)


def plain_loop(depth: int, batch: Batch, precision: str):
    """A step as people write it."""
    model = model_of(depth).train()
    device = batch["input_ids"].device
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(what: str, texts: int, length: int, precision: str, steps: int, rates: dict) -> dict:
    """One row."""
    depth, world = DEPTHS[what], join_world()
    count = texts * (steps + WARM)
    ids = torch.randint(1000, 30000, (count * length,), dtype=torch.int32)
    zeros = torch.zeros(count, dtype=torch.long)
    tokens = Tokens(ids, torch.full((count,), length))
    split = Split(tokens, zeros, zeros, torch.arange(count))

    def collate(examples: list[dict]) -> Batch:
        rows = torch.tensor([example["input_ids"] for example in examples])
        rest = {
            name: torch.stack([e[name] for e in examples]) for name in ("labels", "domain", "index")
        }
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows), **rest}

    batch = {k: v.to(world.device) for k, v in collate([split[i] for i in range(texts)]).items()}
    plain = plain_loop(depth, batch, precision)
    ours_s: list[float] = []
    plain_s: list[float] = []
    mark = 0.0

    def now() -> float:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def settle() -> None:
        nonlocal mark
        ours_s.append(now() - mark)
        begun = now()
        with patch.object(dropout, "WORTH", math.inf):  # masks as PyTorch draws them
            plain()
        mark = now()
        plain_s.append(mark - begun)

    config = RunConfig.model_validate(
        {
            "output_dir": "x",
            "data": {"train": "x.jsonl"},
            "teacher": {"model": "x"},
            "student": {"layers": [0]},
            "bf16": precision == "bf16",
            "logging_steps": 50,
        }
    )
    training = TrainingConfig(
        per_device_train_batch_size=texts, num_train_epochs=1, learning_rate=1e-5
    )
    seed_everything(0)
    teacher = Teacher(model_of(depth), "mix", ["all"])
    with (
        tempfile.TemporaryDirectory() as folder,
        RunLog(Path(folder), ["jsonl"], Console(quiet=True)) as log,
    ):
        mark = now()
        fit(
            teacher,
            split,
            collate,
            config=config,
            training=training,
            sharding=Sharding(0, False),
            world=world,
            log=log,
            title="limit",
            seed=0,
            settle=settle,
        )
    sizes = Sizes.of(model_of(depth).config)
    products = 3 * sizes.operations(texts * length, length) / rates[precision]
    moved = sizes.parameters * MOVED[precision] / rates["copy"]
    return {
        "model": what,
        "texts": texts,
        "tokens": length,
        "precision": precision,
        "products_ms": 1e3 * products,
        "moved_ms": 1e3 * moved,
        "ours_ms": 1e3 * statistics.median(ours_s[WARM:]),
        "plain_ms": 1e3 * statistics.median(plain_s[WARM:]),
        # Of neighbours, so that what slows the machine down for a while slows both.
        "times_plain": statistics.median(a / b for a, b in zip(ours_s[WARM:], plain_s[WARM:])),
    }


def page(report: dict) -> str:
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in report["rates"].items())
    rows = []
    for row in report["rows"]:
        limit = row["products_ms"] + row["moved_ms"]
        rows.append(
            [
                *(row["model"], f"{row['texts']} x {row['tokens']}", row["precision"]),
                *(f"{row[name]:.1f}" for name in ("products_ms", "moved_ms")),
                *(f"{row['ours_ms']:.1f}", f"{row['ours_ms'] / limit:.2f}"),
                *(f"{row['plain_ms']:.1f}", f"{row['plain_ms'] / limit:.2f}"),
                f"{row['times_plain']:.2f}",
            ]
        )
    lines = [
        "# A training step and its limit",
        "",
        *heading(report["environment"]),
        f"Limits measured in the same run, Gflop/s and GB/s: {rates}. Milliseconds are medians of "
        f"{report['steps']} steps. Command: `{report['command']}`",
        "",
        table(
            [
                *("model", "texts x tokens", "precision", "products, ms", "moved, ms"),
                *("metakd, ms", "times the limit", "plain loop, ms", "times the limit"),
                "metakd / plain",
            ],
            rows,
            left=3,
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--only", nargs="*", help="rows of these models, shapes or precisions")
    options = read_options(parser, 1.0, "rate")
    wanted = [
        (what, texts, length, precision)
        for what, precision, (texts, length) in product(DEPTHS, PRECISIONS, SHAPES)
        if set(options.only or ()) <= {what, precision, f"{texts}x{length}"}
    ]
    rates = {
        name: matmul_rate(options.device, PRECISIONS[name], options.seconds)
        for name in dict.fromkeys(precision for *_, precision in wanted)
    }
    rates["copy"] = copy_rate(options.device, options.seconds)
    rows = []
    for row in wanted:
        rows.append(measure(*row, options.steps, rates))
        print(rows[-1], flush=True)
    report = {
        "environment": environment(options.device, options.threads),
        "command": " ".join(["python -m benchmarks.limit", *sys.argv[1:]]),
        "rates": rates,
        "steps": options.steps,
        "rows": rows,
    }
    write_report("limit", report, page(report), options.device, options.out)


if __name__ == "__main__":
    main()
