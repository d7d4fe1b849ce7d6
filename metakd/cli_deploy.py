"""The commands for what is trained: export, predict, serve, latency, report. ``cli`` has the
others, and takes these up."""

from __future__ import annotations

import codecs
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from metakd import front, printed
from metakd.errors import ConfigError, DataError
from metakd.printed import console, tell

app = typer.Typer()

StudentFolder = Annotated[
    str, typer.Argument(metavar="STUDENT", help="folder of a student, a teacher, or an export")
]
TextColumn = Annotated[str, typer.Option(help="column of the texts")]
PairColumn = Annotated[str | None, typer.Option(help="column of the second texts, for pairs")]
Threads = Annotated[int | None, typer.Option(min=1, help="on a CPU; every core by default")]

EngineName = Annotated[str, typer.Option(help="eager, compile, cudagraph, onnx, onnx-int8")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda")]


@app.command()
def export(
    student: StudentFolder,
    to: Annotated[str, typer.Option(metavar="onnx", help="format")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="write a quantised model, too")] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="write a half-precision model, too (for GPUs)")
    ] = False,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="static|dynamic",
            help="of int8, rounded in ranges fixed to FILE, or in each batch's (without FILE)",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="texts to compare on: CSV, TSV, JSONL or Parquet"),
    ] = None,
    domain: Annotated[str | None, typer.Option(help="of FILE, only the texts of this one")] = None,
    text: TextColumn = "text",
    text_pair: PairColumn = None,
    label: Annotated[
        list[str],
        typer.Option(help="column of the labels, if there is one; repeated, those of the classes"),
    ] = ["label"],  # noqa: B006
    label_separator: Annotated[str, typer.Option(help="between the labels of a cell")] = ",",
    out: Annotated[str | None, typer.Option(help="by default STUDENT/onnx")] = None,
):
    """Export a student to ONNX; files that do not answer as PyTorch does are refused."""
    from metakd.data.reading import read_texts
    from metakd.demo import made_up_texts
    from metakd.deploy import export_onnx, task_at

    if to != "onnx":
        raise ConfigError(f"--to: {to!r} is not known", "the only format is onnx")
    front.quiet_transformers()
    texts, labels, described = made_up_texts(400), None, "made-up English reviews"
    if data is not None:
        columns = label if len(label) > 1 else label[0]
        rows = read_texts(
            data,
            text=text,
            text_pair=text_pair,
            label=columns,
            task=task_at(student).name,
            label_separator=label_separator,
        )
        rows = [row for row in rows if domain in (None, row.domain)]
        if not rows:
            raise DataError(f"{data}: there are no texts of domain {domain}", "correct --domain")
        texts, described = _texts(rows), data if domain is None else f"{data}, {domain}"
        labels = None if rows[0].label is None else [row.label for row in rows]
    report = export_onnx(
        student,
        texts,
        labels=labels,
        data=described,
        int8=int8,
        fp16=fp16,
        out=out,
        command=printed.command(),
        made_up=data is None,
        activations=activations,
    )
    _show_export(report, out or f"{student}/onnx")


def _texts(rows: list) -> list:
    return [row.text if row.pair is None else (row.text, row.pair) for row in rows]


def _show_export(report: dict, place: str) -> None:
    console.print(printed.exported(report))
    for remark in report["checked"]["remarks"]:
        tell(f"warning: {remark}")
    tell(f"written to {place}")


@app.command()
def predict(
    student: StudentFolder,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...")] = None,
    input: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="texts: CSV, TSV, JSONL, Parquet, a .txt or - of lines"),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSONL; the terminal by default")
    ] = None,
    text: TextColumn = "text",
    text_pair: PairColumn = None,
    engine: EngineName = "auto",
    device: Device = None,
    threads: Threads = None,
):
    """Label texts: a JSON line each, with the label and its probability, or the number."""
    from metakd.data.reading import Row, read_texts
    from metakd.deploy import Predictor

    if bool(texts) == bool(input):
        raise ConfigError("give either TEXT or --input FILE", "as in: metakd predict STUDENT TEXT")
    if output and not Path(output).parent.is_dir():
        raise ConfigError(f"{output}: there is no such folder", "give another --output")
    front.quiet_transformers()
    rows = [Row("", number, text=given) for number, given in enumerate(texts or [])]
    if empty := [str(row.row + 1) for row in rows if not (row.text or "").strip()]:
        raise DataError(f"TEXT {', '.join(empty)}: empty text", "leave it out")
    if input:
        rows = read_texts(input, text=text, text_pair=text_pair)
    predictor = Predictor(student, engine=engine, device=device, threads=threads)
    found = predictor(_texts(rows))
    answers = []
    for row, answer in zip(rows, found, strict=True):
        given = {"text": row.text} | ({} if row.pair is None else {"text_pair": row.pair})
        answers.append(given | answer.fields())
    _write_lines(answers, output)


def _write_lines(values: list[dict], output: str | None) -> None:
    encoding = "utf-8" if output else sys.stdout.encoding or "utf-8"
    escaped = codecs.lookup(encoding).name != "utf-8"
    lines = [json.dumps(value, ensure_ascii=escaped) for value in values]
    try:
        with open(output, "w", encoding="utf-8") if output else nullcontext(sys.stdout) as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError) and output is None:
            # Whoever read has enough. What is left in the buffer must not be tried again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        place = output or "the standard output"
        raise ConfigError(f"{place}: {error.strerror}", "give another --output") from error


@app.command()
def serve(
    places: Annotated[
        list[str], typer.Argument(metavar="STUDENT|RUN...", help="students, exports, or a run")
    ],
    host: Annotated[str, typer.Option(help="the default is reached from this machine only")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    engine: EngineName = "auto",
    device: Device = None,
    threads: Threads = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="texts of a student that may wait; more are answered 503")
    ] = 4096,
    max_seconds: Annotated[
        float, typer.Option(min=0.1, help="for a request to arrive, and again to be computed")
    ] = 30.0,
):
    """Answer over HTTP: POST /predict {"texts": ["..."], "domain": "..."}; /health, /metrics."""
    from metakd.deploy.server import Limits
    from metakd.deploy.server import serve as run

    front.quiet_transformers()
    run(
        places,
        host=host,
        port=port,
        engine=engine,
        device=device,
        threads=threads,
        limits=Limits(waiting=max_waiting, seconds=max_seconds),
        say=lambda line: print(line, flush=True),
    )


@app.command()
def latency(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="folders, runs, bert-base, tinybert-...")
    ],
    engine: Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="texts at once")] = None,
    length: Annotated[list[int] | None, typer.Option(min=4, help="tokens of a text")] = None,
    device: Device = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="for each cell of an engine")] = 5.0,
    tokenizer: Annotated[str | None, typer.Option(help="folder, for models that have none")] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="by default the run, or this folder")
    ] = None,
):
    """Time models side by side: engines x batch x length; writes latency.json and latency.md."""
    import torch

    from metakd.deploy.formats import ENGINES
    from metakd.deploy.latency import BATCHES, LENGTHS, measure_latency, write_latency

    unknown = set(engine or []) - set(ENGINES)
    if unknown:
        raise ConfigError(
            f"--engine: {', '.join(sorted(unknown))} unknown", f"there are {', '.join(ENGINES)}"
        )
    runs = [model for model in models if (Path(model) / "students").is_dir()]
    place = Path(out or (runs[0] if runs else "."))
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}", "give another --out") from error
    front.quiet_transformers()
    result = measure_latency(
        models,
        engines=engine or ENGINES,
        batches=sorted(batch or BATCHES),
        lengths=sorted(length or LENGTHS),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        threads=threads or torch.get_num_threads(),
        seconds=seconds,
        tokenizer=tokenizer,
        command=printed.command(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(write_latency(result, place))
    print(f"written to {place}/latency.json and .md")


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder that a run has written")],
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="where to write; RUN by default")
    ] = None,
):
    """Write all that is known of a run as one HTML page, as Markdown and as JSON."""
    from metakd.deploy.report import write_report

    for path in write_report(Path(run), Path(out) if out else None, printed.command()):
        tell(f"written: {path}")
