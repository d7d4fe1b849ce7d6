"""Requests a second over HTTP: ``python -m benchmarks.load STUDENT --data FILE``.

``metakd serve`` on each exact engine that can run the student here, and a plain Hugging Face
pipeline, one text a call, behind the same library (Starlette on uvicorn), each in a process of its
own, in turn. Each client holds a connection and asks one text of FILE after the other; clients and
server share the machine. All must give the pipeline's labels, or nothing is timed. Writes
``results/<device>/load.md``.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.reports import table
from benchmarks.run import RESULTS, ROOT, device_folder, environment, heading, read_options
from metakd.data.reading import read_texts
from metakd.deploy.engines import why_not

ENGINES = ("onnx", "eager")
PIPELINE = "pipeline behind the same library"


def serve_pipeline(folder: Path, device: str) -> None:
    """The plain pipeline over HTTP, as people write it."""
    import socket

    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from transformers import pipeline

    classify = pipeline("text-classification", str(folder), device=device)

    async def predict(request):
        asked = await request.json()
        found = await run_in_threadpool(classify, asked["texts"], truncation=True)
        answers = [{"prediction": one["label"], "score": one["score"]} for one in found]
        return JSONResponse({"answers": answers})

    app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/predict", flush=True)
    config = uvicorn.Config(app, http="h11", loop="asyncio", log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])


@contextmanager
def started(*command: str) -> Iterator[int]:
    """The port of a server that says where it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        said = process.stdout.readline()
        found = re.search(r":(\d+)/predict", said)
        if found is None:
            raise SystemExit(f"{' '.join(command)}: does not serve: {said}")
        yield int(found[1])
    finally:
        process.terminate()
        process.wait(60)


def ask(connection: http.client.HTTPConnection, text: str) -> dict:
    """The answer to one text.

    Raises:
        SystemExit: there is none.
    """
    connection.request("POST", "/predict", json.dumps({"texts": [text]}))
    answer = connection.getresponse()
    said = answer.read()
    if answer.status != 200:
        raise SystemExit(f"status {answer.status}: {said[:200]!r}")
    return json.loads(said)["answers"][0]


def load(port: int, texts: list[str], clients: int, seconds: float) -> tuple[list[float], float]:
    """Milliseconds of each request, and requests a second."""
    times: list[float] = []
    failed: list[BaseException] = []
    following = itertools.cycle(texts)
    lock = threading.Lock()
    end = time.perf_counter() + seconds

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            while (start := time.perf_counter()) < end:
                with lock:
                    text = next(following)
                ask(connection, text)
                times.append(1e3 * (time.perf_counter() - start))
        except (OSError, SystemExit) as error:  # a thread would keep it to itself
            failed.append(error)
        connection.close()

    begun = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return times, len(times) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path, help="folder of a student, exported to ONNX")
    parser.add_argument("--data", help="texts: CSV, TSV, JSONL or Parquet")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--texts", type=int, default=300, help="at most, evenly from the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve-pipeline", action="store_true", help=argparse.SUPPRESS)
    options = read_options(parser, 5.0, "contender, number of clients and round")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.serve_pipeline:
        serve_pipeline(options.student, options.device)
        return
    texts = [row.text for row in read_texts(options.data)]
    texts = texts[:: max(1, len(texts) // options.texts)][: options.texts]
    commands = {
        f"metakd serve, {engine}": (
            *("metakd", "serve", str(options.student), "--port", "0", "--engine", engine),
            *("--device", options.device, "--threads", str(options.threads)),
        )
        for engine in ENGINES
        if why_not(engine, options.student, options.device) is None
    }
    commands[PIPELINE] = ("benchmarks.load", str(options.student), "--serve-pipeline")
    labels: dict[str, list[str]] = {}
    found: dict[tuple[int, str], list[tuple[list[float], float]]] = {}
    for _ in range(options.rounds):
        for name, command in commands.items():
            with started(*command) as port:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
                labels[name] = [ask(connection, text)["prediction"] for text in texts]
                connection.close()
                for clients in options.clients:
                    result = load(port, texts, clients, options.seconds)
                    found.setdefault((clients, name), []).append(result)
    if wrong := [name for name, given in labels.items() if given != labels[PIPELINE]]:
        raise SystemExit(f"other labels than the pipeline's: {', '.join(wrong)}")
    cells = []
    for (clients, name), results in sorted(found.items(), key=lambda item: item[0][0]):
        times = sorted(time for part, _ in results for time in part)
        rates = [rate for _, rate in results]
        rival = statistics.median(rate for _, rate in found[clients, PIPELINE])
        cells.append(
            (
                name,
                str(clients),
                f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})",
                f"{statistics.median(rates) / rival:.2f}",
                f"{statistics.median(times):.1f}",
                f"{times[int(0.99 * len(times))]:.1f}",
            )
        )
    columns = ("", "clients", "requests/s (range)", "times the pipeline", "p50 ms", "p99 ms")
    lines = ["# Load", "", *heading(environment(options.device, options.threads))]
    lines += [
        f"{len(texts)} texts, one a request; {options.rounds} rounds of {options.seconds:g} s; "
        "the same labels from all",
        "",
        table(columns, cells),
    ]
    page = "\n".join(lines) + "\n"
    folder = options.out or RESULTS / device_folder(options.device)
    (folder / "load.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
