"""What large runs take, and how well that is predicted: ``python -m benchmarks.scale``.

``metakd.pipeline.plan`` applied to decoders of 8 and 70 billion parameters as teachers, on devices
of which only the published rates are known; nothing of it is run. Writes
``docs/results/scale.md``.

``--check`` is what can be run: the same plan with rates that are measured in a few steps, against
the steps of whole runs of a small teacher and student, of one process and of two that share this
machine, by ZeRO stage. Writes ``docs/results/scale-check.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import BertConfig, LlamaConfig

from benchmarks.reports import table
from benchmarks.run import environment, heading
from metakd.config import DataConfig
from metakd.data.corpus import load_corpus
from metakd.models.sources import load_tokenizer
from metakd.pipeline import plan
from metakd.pipeline.memory import estimate, quantity

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
# Llama 3.1 (arXiv 2407.21783, table 3); its smallest and its middle one.
TEACHERS = {
    name: LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    for name, layers, hidden, inner, heads in (
        ("8B", 32, 4096, 14336, 32),
        ("70B", 80, 8192, 28672, 64),
    )
}
STUDENT = BertConfig(vocab_size=30522)  # BERT-base
DEVICE, ROOM, PRECISION, PRICE = "h100", 80e9, "bf16", 3.0
COUNTS = (1, 8, 64, 1024)
TEXTS = (10**6, 10**7, 10**8, 10**9)
LENGTH, BATCH, STUDENT_BATCH, DOMAINS, CLASSES = 128, 32, 64, 4, 2
ASKED = 256  # texts that a teacher answers to at a time
MATCHED = 5  # layers whose hidden states a student would learn from


def memory(name: str, processes: int, zero: int) -> float:
    """Bytes of a process that trains this teacher, with gradient checkpointing."""
    shape = TEACHERS[name]
    return estimate(
        plan.Sizes.of(shape).parameters,
        zero=zero,
        offload=False,
        dtype=PRECISION,
        world_size=processes,
        batch=BATCH,
        length=LENGTH,
        layers=shape.num_hidden_layers,
        hidden=shape.hidden_size,
        heads=shape.num_attention_heads,
        checkpointing=True,
    ).device


def a_step(name: str, processes: int, zero: int) -> plan.Step:
    """A teacher's training step."""
    return plan.step(
        plan.Sizes.of(TEACHERS[name]),
        plan.Load(1, 1, BATCH * LENGTH, LENGTH),
        plan.published(DEVICE, PRECISION),
        processes=processes,
        zero=zero,
        itemsize=2,
        again=True,
    )


def steps_table() -> str:
    rows = []
    for name in TEACHERS:
        for processes in COUNTS:
            for zero in (0, 1, 2, 3) if processes > 1 else (0,):
                needed, found = memory(name, processes, zero), a_step(name, processes, zero)
                each = BATCH * LENGTH * processes / found.seconds
                rows.append(
                    [
                        *(name, str(processes), str(zero), quantity(needed)),
                        "yes" if needed < ROOM else "no",
                        quantity(found.sent),
                        *(f"{part:.2f}" for part in (found.compute, found.update)),
                        f"{found.exchange:.2f}",
                        f"{each:,.0f}",
                    ]
                )
    return table(
        [
            *("teacher", "GPUs", "ZeRO", "memory", "fits", "sent"),
            *("compute, s", "update, s", "exchange, s", "tokens/s"),
        ],
        rows,
    )


def whole(name: str, processes: int, texts: int) -> dict[str, float]:
    """Seconds of each stage: a teacher trained on every text once, at the lowest stage that fits,
    and one student of each domain that sees its own once, from logits that are kept."""
    zero = next((z for z in (0, 1, 2, 3) if memory(name, processes, z) < ROOM), None)
    if zero is None:
        return {}
    rates = plan.published(DEVICE, PRECISION)
    teacher, student = plan.Sizes.of(TEACHERS[name]), plan.Sizes.of(STUDENT)
    forward = plan.answering(
        teacher,
        texts * LENGTH,
        LENGTH,
        ASKED,
        rates,
        processes=processes,
        itemsize=2,
        sharded=zero == 3,
    )
    load = plan.Load(1, 1, STUDENT_BATCH * LENGTH, LENGTH)
    # As many processes a student as its steps fill, the students of the domains side by side.
    among = max(1, processes // DOMAINS)
    taught = plan.step(student, load, rates, processes=among, zero=0, itemsize=2)
    in_turn = DOMAINS if processes < DOMAINS else 1
    return {
        "prototypes": forward,
        "teacher": texts / (BATCH * processes) * a_step(name, processes, zero).seconds,
        "outputs": forward,
        "students": in_turn * texts / DOMAINS / (STUDENT_BATCH * among) * taught.seconds,
    }


def runs_table() -> str:
    rows = []
    for name in TEACHERS:
        for texts in TEXTS:
            for processes in COUNTS:
                if found := whole(name, processes, texts):
                    total = sum(found.values())
                    hours = processes * total / 3600
                    rows.append(
                        [
                            *(name, f"{texts:.0e}".replace("+0", ""), str(processes)),
                            *map(plan.span, found.values()),
                            plan.span(total),
                            f"{hours:,.0f}",
                            f"{hours * PRICE:,.0f}",
                        ]
                    )
    return table(
        [
            *("teacher", "texts", "GPUs", "prototypes", "teacher", "outputs kept", "students"),
            *("all", "GPU hours", f"at {PRICE:g} an hour"),
        ],
        rows,
    )


def kept_table() -> str:
    rows = []
    for texts in TEXTS:
        sizes = [texts * CLASSES * 2]
        sizes += [texts * LENGTH * MATCHED * s.hidden_size * 2 for s in TEACHERS.values()]
        # int32 tokens and their segments, and five int64 numbers a text, in every process.
        corpus = texts * (2 * 4 * LENGTH + 5 * 8)
        rows.append([f"{texts:.0e}".replace("+0", ""), *map(quantity, [*sizes, corpus])])
    return table(
        ["texts", "logits", *(f"hidden states of {n}" for n in TEACHERS), "corpus in memory"],
        rows,
    )


def predicted() -> str:
    return "\n".join(
        [
            "# Scale, predicted",
            "",
            "Nothing on this page was run. It is what `metakd/pipeline/plan.py` predicts from "
            f"published rates of {DEVICE} devices, of which {plan.REACHED:.0%} are taken to be "
            "reached, without any overlap of exchange and computation; "
            "[where it can be checked](scale-check.md). Command: `python -m benchmarks.scale`",
            "",
            f"Teachers are Llama 3.1's shapes as classifiers, in {PRECISION}, texts of {LENGTH} "
            f"tokens, batches of {BATCH} a device with gradient checkpointing.",
            "",
            "## A step of a teacher's training",
            "",
            f"Memory per process beside {quantity(ROOM)}; bytes that a process sends.",
            "",
            steps_table(),
            "",
            "## Whole runs",
            "",
            f"{DOMAINS} domains; the teacher sees every text once, each student (BERT-base, "
            f"batches of {STUDENT_BATCH}) those of its own once, side by side, from logits that "
            "are kept. At the lowest ZeRO stage that fits; runs that fit at none are left out. "
            f"{PRICE:g} an hour is a figure to put one's own in place of.",
            "",
            runs_table(),
            "",
            "## What is kept",
            "",
            f"Teacher outputs in {PRECISION}: logits of {CLASSES} classes, or the hidden states of "
            f"{MATCHED} layers; and the tokenised corpus, which every process holds.",
            "",
            kept_table(),
            "",
        ]
    )


# What can be checked


CASES = ((1, 0, "fp32"), (1, 0, "bf16"), (2, 0, "fp32"), (2, 2, "fp32"))
CASES += ((2, 3, "fp32"), (2, 0, "bf16"))
LABELLED, EPOCHS, STEPS = 400, 1, 60


def settings(encoder: Path, files: Path, out: Path, zero: int, precision: str) -> dict:
    training = {"learning_rate": 1e-4, "selection": "last"}
    names = ("train", "validation", "test", "unlabelled")
    return {
        "output_dir": str(out),
        "data": {name: str(files / f"{name}.jsonl") for name in names}
        | {"max_length": 64, "labels": dict.fromkeys(DOMAINS_CHECKED, LABELLED)},
        "teacher": {
            "model": str(encoder),
            "kind": "mix",
            "training": training | {"num_train_epochs": EPOCHS},
        },
        "student": {"layers": [0, 2, 5]},
        "distill": {
            "method": "logits_kd",
            "domains": ["news"],
            "cache_teacher": "all",
            "training": training | {"max_steps": STEPS, "num_train_epochs": 1000},
        },
        "zero": zero,
        "bf16": precision == "bf16",
        "logging_steps": 10,
        "save_steps": 1_000_000,
        "report_to": ["jsonl"],
    }


DOMAINS_CHECKED = ("electronics", "films", "news", "tweets")


def worker(config: Path, found: Path) -> None:
    """Plan, then run: one of the processes of a case."""
    from metakd.front import open_run
    from metakd.pipeline.probe import Probe
    from metakd.training.world import leave_world

    run = open_run(json.loads(config.read_text()))
    planned = [stage for stage in plan.stages(run, run.world.size, Probe(run)) if stage.each]
    students = run.distill()
    places = [*run.teach(), *students]
    if run.world.is_main:
        pairs = zip(planned, places, strict=True)
        rows = [[stage.title, stage.each, measured(place, run)] for stage, place in pairs]
        found.write_text(json.dumps(rows))
    leave_world()


def measured(place: Path, run) -> float:
    """Seconds of a step of a finished stage, the first ten left out: they load and allocate."""
    lines = [json.loads(line) for line in (place / "log.jsonl").open()]
    texts = run.config.teacher.training.per_device_train_batch_size * run.world.size
    rates = [line["samples_per_second"] for line in lines if line["split"] == "train"]
    return texts * statistics.fmean(1 / rate for rate in rates[1:])


def check(encoder: Path, files: Path, repeats: int) -> str:
    rows = []
    for processes, zero, precision in CASES:
        for _ in range(repeats):
            rows += one_case(encoder, files, processes, zero, precision)
            print(*rows[-2:], sep="\n", flush=True)
    facts, reading = environment("cpu", 2), reading_rate(encoder, files)
    errors = [abs(float(row[-1])) for row in rows]
    return "\n".join(
        [
            "# The plan against runs",
            "",
            *heading(facts),
            "",
            "Seconds of an optimizer step as `metakd doctor --plan` predicts it, from a few steps "
            "of models of one and four layers, and as whole runs took it: MiniLM (6 layers of 384) "
            "as teacher, three of its layers as a student, short texts, batches of 32 a process; "
            "two processes share the machine. Command: `python -m benchmarks.scale --check`",
            "",
            table(
                [
                    "processes",
                    "ZeRO",
                    "precision",
                    "what",
                    "predicted, s",
                    "measured, s",
                    "error, %",
                ],
                rows,
                left=4,
            ),
            "",
            f"Errors: {statistics.fmean(errors):.0f} % in the mean, {max(errors):.0f} % at most.",
            "",
            f"Reading and tokenising, by one process: {reading:,.0f} texts a second.",
            "",
        ]
    )


def reading_rate(encoder: Path, files: Path) -> float:
    """Texts a second that ``load_corpus`` reads, duplicates looked for, and tokenises."""
    config = DataConfig(
        train=str(files / "train.jsonl"), unlabelled=str(files / "unlabelled.jsonl"), max_length=64
    )
    tokenizer = load_tokenizer(str(encoder))
    with tempfile.TemporaryDirectory() as cache:
        begun = time.perf_counter()
        corpus = load_corpus(config, tokenizer, seed=0, cache=Path(cache), say=str)
        seconds = time.perf_counter() - begun
    return sum(len(s) for s in (corpus.train, corpus.validation, corpus.unlabelled)) / seconds


def one_case(encoder: Path, files: Path, processes: int, zero: int, precision: str) -> list:
    with tempfile.TemporaryDirectory() as folder:
        config, found = Path(folder, "run.json"), Path(folder, "found.json")
        config.write_text(
            json.dumps(settings(encoder, files, Path(folder, "run"), zero, precision))
        )
        own = ["-m", "benchmarks.scale", "--worker", str(config), str(found)]
        command = [sys.executable, *own]
        threads = (os.cpu_count() or 1) // processes or 1
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            command = [sys.executable, *launcher, str(processes), *own]
        quiet = {"HF_HUB_OFFLINE": "1", "METAKD_HISTORY": "off", "OMP_WAIT_POLICY": "PASSIVE"}
        env = os.environ | quiet | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        told = json.loads(found.read_text())
    return [
        [
            *(str(processes), str(zero), precision, title),
            *(f"{expected:.3f}", f"{took:.3f}", f"{100 * (expected / took - 1):.0f}"),
        ]
        for title, expected, took in told
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="against runs on this machine")
    parser.add_argument("--encoder", type=Path, default=Path("models/minilm"))
    parser.add_argument("--files", type=Path, default=Path("runs/study/corpus"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--worker", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    if options.check:
        page, name = check(options.encoder, options.files, options.repeats), "scale-check.md"
    else:
        page, name = predicted(), "scale.md"
    (RESULTS / name).write_text(page)
    print(page)


if __name__ == "__main__":
    main()
