"""Texts a second: ``python -m benchmarks.serving STUDENT --data FILE``.

Labels texts of FILE (``--texts`` of them at most, evenly) with ``metakd.deploy.Predictor``, on each
engine that can run the student here, and with a plain Hugging Face pipeline, one text at a time as
it comes and in batches. From text to label, tokenising included; the same number of threads for
all, in turn, so that a drift of the machine hits all alike. Engines that compute in fp32 must give
the pipeline's labels, or nothing is timed; of int8 the share of equal labels is reported. Writes
``results/<device>/serving.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from transformers import pipeline

from benchmarks.reports import table
from benchmarks.run import (
    described,
    environment,
    heading,
    quantiles,
    read_options,
    write_report,
)
from metakd.data.reading import read_texts
from metakd.deploy import Predictor
from metakd.deploy.engines import why_not
from metakd.deploy.formats import ENGINES
from metakd.errors import MetakdError
from metakd.models.sources import load_config

RIVAL_BATCHES = (1, 8)


def contenders(
    folder: Path, texts: list[str], limit: int, device: str, threads: int, absent: dict
) -> dict:
    """Name -> a function that returns the label of each text, the fastest engine's first."""
    found = {}
    place = {"device": device, "threads": threads, "max_length": limit}
    for engine in sorted(ENGINES, key=lambda name: name != "onnx"):
        if reason := why_not(engine, folder, device):
            absent[f"metakd Predictor, {engine}"] = reason
            continue
        predictor = Predictor(folder, engine=engine, **place)
        found[f"metakd Predictor, {engine}"] = lambda p=predictor: [a.label for a in p(texts)]
    classify = pipeline("text-classification", str(folder), device=device)
    for size in RIVAL_BATCHES:
        found[f"pipeline, batch {size}"] = lambda size=size: [
            answer["label"]
            for answer in classify(texts, batch_size=size, truncation=True, max_length=limit)
        ]
    return found


def check_same_labels(steps: dict, wanted: list[str]) -> dict[str, float]:
    """Share of the texts that each contender labels as the pipeline does.

    Raises:
        SystemExit: one that computes in fp32 gives other labels.
    """
    shares = {}
    for name, step in steps.items():
        same = [one == other for one, other in zip(step(), wanted, strict=True)]
        shares[name] = statistics.fmean(same)
        if not all(same) and "int8" not in name:
            raise SystemExit(f"{name}: labels {len(same) - sum(same)} texts otherwise")
    return shares


def measure(
    folder: Path, texts: list[str], limit: int, device: str, threads: int, seconds: float
) -> dict:
    absent: dict[str, str] = {}
    steps = contenders(folder, texts, limit, device, threads, absent)
    rival = f"pipeline, batch {RIVAL_BATCHES[0]}"
    shares = check_same_labels(steps, steps[rival]())
    tokenizer = Predictor(folder, engine="eager", device="cpu").tokenizer
    tokens = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    lengths = sorted(map(len, tokens))
    # Every step ends with labels on the host, so the wall clock tells on a GPU as well.
    times = quantiles(steps, "cpu", seconds)
    entries = {
        name: described(*found)
        | {
            "texts_per_s": len(texts) / (1e-3 * found[0]),
            "same_labels": shares[name],
            "times_pipeline": times[rival][0] / found[0],
        }
        for name, found in times.items()
    }
    return {
        "shape": f"{len(texts)} texts, {lengths[0]} to {lengths[-1]} tokens, "
        f"median {statistics.median(lengths):.0f}",
        "dtype": "float32",
        "absent": absent,
        "contenders": entries,
    }


def markdown(report: dict) -> str:
    lines = ["# Serving", "", *heading(report["environment"])]
    lines.append(f"{report['student']}, {report['layers']} x {report['hidden']}; text to label")
    for row in report["rows"]:
        cells = [
            (
                name,
                f"{entry['texts_per_s']:.0f}",
                f"{entry['median_ms']:.0f} ({entry['p20_ms']:.0f}-{entry['p80_ms']:.0f})",
                f"{entry['times_pipeline']:.2f}",
                f"{entry['same_labels']:.2%}",
            )
            for name, entry in row["contenders"].items()
        ]
        columns = ("texts/s", "ms for all (20-80 %)", "times the plain pipeline", "same labels")
        lines += ["", f"## {row['shape']}", "", table(("", *columns), cells, absent=row["absent"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path, help="folder of a student, exported to ONNX")
    parser.add_argument("--data", required=True, help="texts: CSV, TSV, JSONL or Parquet")
    parser.add_argument("--texts", type=int, default=1000, help="at most, evenly from the file")
    parser.add_argument("--max-length", type=int, nargs="+", default=[128, 512], help="tokens")
    options = read_options(parser, 120.0, "length")
    try:
        texts = [row.text for row in read_texts(options.data)]
        texts = texts[:: max(1, len(texts) // options.texts)][: options.texts]
        rows = [
            measure(options.student, texts, limit, options.device, options.threads, options.seconds)
            for limit in options.max_length
        ]
    except MetakdError as error:
        raise SystemExit(f"nothing is timed: {error}") from error
    shape = load_config(str(options.student))
    report = {
        "op": "serving",
        "student": "/".join(options.student.parts[-2:]),
        "layers": shape.num_hidden_layers,
        "hidden": shape.hidden_size,
        "environment": environment(options.device, options.threads),
        "rows": rows,
    }
    write_report("serving", report, markdown(report), options.device, options.out)


if __name__ == "__main__":
    main()
