"""Compares int8 whose ranges of activations are fixed with int8 that finds them in each batch:
``python -m benchmarks.int8_ranges --fit FILE --data FILE MODEL...``.

Of each classifier both files are made from 200 texts of ``--fit`` and answer all texts of
``--data``, of a domain if ``MODEL`` ends with ``@domain``. Agreement is with PyTorch in fp32; a
label moves if the text alone is given another than in its batch. Latency is of one text of 128
tokens on one thread, the three files in turn. Prints a table.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.run import environment, heading, quantiles
from metakd.data.reading import Row, read_texts
from metakd.deploy import Predictor
from metakd.deploy.export import write_files
from metakd.pipeline.table import markdown_table

FITTED_TO, LENGTH = 200, 128
WAYS = ("dynamic", "static")


def texts_of(file: str, domain: str) -> list[Row]:
    return [row for row in read_texts(file, label="label") if domain in ("", row.domain)]


def compare(model: str, fit: str, data: str, seconds: float, folder: Path) -> list[list[str]]:
    """Two lines of the table."""
    place, _, domain = model.partition("@")
    rows = texts_of(data, domain)
    texts = [row.text for row in rows]
    few = [row.text for row in texts_of(fit, domain)[:FITTED_TO]]
    trained = Predictor(place, engine="eager", device="cpu")
    for way in WAYS:
        write_files(
            trained.engine.model,
            folder / way,
            int8=True,
            run=lambda smaller: trained.with_model(smaller).logits(few),
            batches=trained.batches(few) if way == "static" else None,
        )
        trained.tokenizer.save_pretrained(folder / way)
    wanted = trained.logits(texts).argmax(1)
    gold = np.array([trained.labels.index(str(row.label)) for row in rows])
    opened = {way: Predictor(folder / way, engine="onnx-int8", threads=1) for way in WAYS}
    opened["fp32"] = Predictor(folder / WAYS[0], engine="onnx", threads=1)
    batch = {name: np.ones((1, LENGTH), np.int64) for name in opened["fp32"].engine.inputs}
    timed = {name: partial(found.engine, batch) for name, found in opened.items()}
    medians = {name: times[0] for name, times in quantiles(timed, "cpu", seconds).items()}
    lines = []
    for way in WAYS:
        found = opened[way].logits(texts).argmax(1)
        alone = np.concatenate([opened[way].logits([text]) for text in texts]).argmax(1)
        shares = ((found == wanted), (found == gold), (wanted == gold))
        lines.append(
            [f"{'/'.join(Path(place).parts[-3:])} {domain}", way, str(len(texts))]
            + [f"{100 * share.mean():.1f}" for share in shares]
            + [str(int((alone != found).sum())), f"{medians['fp32'] / medians[way]:.2f}"]
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--fit", required=True, metavar="FILE")
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, for each model")
    given = parser.parse_args()
    header = ["model", "ranges", "texts", "agreement, %", "accuracy, %", "fp32's, %"]
    header += ["labels moved", "times as fast as fp32"]
    lines: list[list[str]] = []
    for model in given.models:
        with tempfile.TemporaryDirectory() as folder:
            lines += compare(model, given.fit, given.data, given.seconds, Path(folder))
    print(*heading(environment("cpu", 1)), sep="\n")
    print(f"\n{markdown_table(header, lines, numbers=6)}")


if __name__ == "__main__":
    main()
