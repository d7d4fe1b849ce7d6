"""The study: what students are worth with few labels, and which parts of the method help.

``python -m benchmarks.study train`` trains what is missing of ``study_plan``, for hours if it is
let; stopped and started again it goes on where it was, and several may run side by side on other
domains. ``python -m benchmarks.study latency`` times students of each shape, which wants a quiet
machine. ``python -m benchmarks.study report`` writes ``docs/results/study`` from what is there, and
says what is missing. Each group of results is one comparison with one seed; its cells are kept in
``cells.json`` there, so that a machine without the run directories goes on all the same.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.study_plan import (
    ALL,
    KEPT,
    PARTS,
    ROOT,
    SHAPE,
    SHAPES,
    SHORT_SIZES,
    Group,
    Results,
    groups,
    joined,
)

SHARED = ROOT.parent / "shared" / "data"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process of the study is at work on this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _rated(runs: Path) -> Path:
    from metakd import demo

    files = runs / "corpus"
    with _alone(files):
        if not all((files / f"{name}.jsonl").is_file() for name in SHORT_SIZES):
            demo.rated_corpus(files, **SHORT_SIZES)
    return files


def train(group: Group, runs: Path, encoder: Path) -> dict:
    """Train the rows of a group and give their cells."""
    import metakd
    from metakd.environment import versions

    files = SHARED / PARTS[group.part].files if PARTS[group.part].files else _rated(runs)
    names = {"train": "train", "test": "test", "unlabelled": "unlabelled", "dev": "validation"}
    names |= {"validation": "validation"}
    folder = group.folder(runs)
    config = joined(
        group.settings(),
        {
            "output_dir": str(folder),
            "teacher": {"model": str(encoder)},
            "data": {
                key: str(files / f"{name}.jsonl")
                for name, key in names.items()
                if (files / f"{name}.jsonl").is_file()
            },
        },
    )
    since = time.perf_counter()
    with _alone(folder):
        result = metakd.compare(config, command=f"python -m benchmarks.study train  # {group.key}")
        shutil.rmtree(folder / ".cache" / "teachers", ignore_errors=True)
    cells = [
        {**cell, "right": f"{len(cell['right'])}:{int('1' + cell['right'], 2):x}"}
        for cell in result.details["cells"]
        if cell["domain"] == group.domain
    ]
    domain = PARTS[group.part].columns.get("domain", "domain")
    rows = map(json.loads, (files / "train.jsonl").read_text(encoding="utf-8").splitlines())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "digest": group.digest,
        "commit": commit,
        "versions": versions("torch", "transformers", "deepspeed"),
        "seconds": round(time.perf_counter() - since),
        "labels": sum(row[domain] == group.domain for row in rows)
        if group.labels == ALL
        else group.labels,
        "cells": cells,
        "each": {row: round(mean) for row, mean in result.details["seconds"].items()},
    }


def measure(encoder: Path) -> None:
    """Time the teacher and a student of each shape, weights as they come; writes ``latency.*``."""
    from metakd.config import StudentConfig
    from metakd.config.run import AS_SHAPE
    from metakd.deploy.latency import measure_latency, write_latency
    from metakd.models.sources import load_classifier, load_tokenizer
    from metakd.models.student import build_student

    labels = {"negative": 0, "positive": 1}
    tokenizer = load_tokenizer(str(encoder))
    models = {("teacher", ""): load_classifier(str(encoder), labels)}
    for number, shape in enumerate((SHAPE, *(shape for shape, *_ in SHAPES))):
        config = StudentConfig(**shape)
        models["student", config.shape if number else ""] = build_student(
            config, source=str(encoder), tokenizer=tokenizer, label2id=labels
        )
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for (role, shape), model in models.items():
            folder = Path(scratch) / (role + (AS_SHAPE + shape if shape else ""))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[folder.name] = {"role": role, "shape": shape, "folder": None}
        found = measure_latency(
            [str(Path(scratch) / name) for name in folders],
            engines=("onnx", "onnx-int8"),
            batches=(1,),
            lengths=(128,),
            threads=len(os.sched_getaffinity(0)),
            command="python -m benchmarks.study latency",
        )
    for name, about in folders.items():
        found["models"][name] |= about | {"source": name}
    write_latency(found, KEPT.parent)


def main() -> None:
    """Train, measure or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["corpus", "train", "latency", "report", "list"])
    parser.add_argument("--part", choices=PARTS, action="append", help="only these")
    parser.add_argument("--block", action="append", help="only these")
    parser.add_argument("--domain", action="append", help="only these")
    parser.add_argument("--labels", action="append", help="only these, a number or all")
    parser.add_argument("--seed", type=int, action="append", help="only these")
    parser.add_argument("--hours", type=float, default=1000.0, help="begin no group after these")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--encoder", type=Path, default=ROOT / "models" / "minilm")
    options = parser.parse_args()
    if options.action == "corpus":
        _rated(options.runs)
        return
    if options.action == "latency":
        measure(options.encoder)
        return
    results, since = Results(options.runs), time.perf_counter()
    wanted = [
        group
        for group in groups()
        if group.part in (options.part or [group.part])
        and group.block.name in (options.block or [group.block.name])
        and group.domain in (options.domain or [group.domain])
        and group.seed in (options.seed or [group.seed])
        and str(group.labels) in (options.labels or [str(group.labels)])
    ]
    if options.action == "report":
        from benchmarks.study_report import write

        results.keep()
        write(results)
        return
    for group in wanted:
        found = results.of(group)
        if options.action == "list":
            print(f"{'done   ' if found else 'missing'} {group.key}")
        elif not found and time.perf_counter() - since < 3600 * options.hours:
            print(f"{group.key}", flush=True)
            results.add(group, train(group, options.runs, options.encoder))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
