"""How long models take to answer, side by side: engine x batch x length.

Every model and engine runs in a process of its own, with the same number of threads, and waits
while another one is measured. They take turns, so that a drift of the machine hits all alike. Each
cell is timed until the median is known to 2 % with 95 % confidence, or the time for it is used up;
how many calls there were, and the confidence interval of the median, stand beside it. A percentile
is given where at least two calls were slower.

Sizes: B batch, L length in tokens; no padding is timed, every text is L tokens long.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binom
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForSequenceClassification
from transformers.utils.logging import disable_progress_bar

from metakd.deploy.engines import check_device, onnx_file, open_engine, why_not
from metakd.deploy.export import write_files
from metakd.deploy.formats import ENGINES, INT8_ENGINE, ONNX_FILES, ONNX_FOLDER, TOKENISING
from metakd.deploy.run_folder import find_stages
from metakd.deploy.sections import latency_section
from metakd.deploy.speedup import ratios
from metakd.environment import environment, installed
from metakd.errors import ConfigError, MetakdError, ParityError, UnsupportedError
from metakd.models.inputs import positions
from metakd.models.sources import (
    load_config,
    load_tokenizer,
    load_trained_classifier,
    unallocated,
)
from metakd.models.student import PRESETS as STUDENTS
from metakd.models.student import bert_shape
from metakd.pipeline.memory import count_parameters
from metakd.pipeline.published import check_files, check_folder
from metakd.pipeline.table import shape_of

BATCHES = (1, 8, 32, 128)
LENGTHS = (32, 128, 512)

PRESETS = {
    "bert-base": (12, 768, 12, 3072),
    "tinybert-4l-312": STUDENTS["tinybert-4l-312"],
}
"""Layers, width, heads, feed-forward width of models with random weights: the teacher and the
student of the paper (Devlin et al. 2019; Jiao et al. 2020)."""

_VOCABULARY = 30522  # of BERT-base, uncased

PERCENTILES = (50, 90, 95, 99)
_PRECISION = 0.02  # half the width of the median's 95 % interval, relative to it
_CALLS = 200  # what a 99th percentile needs
_FEWEST, _FEWEST_OF_LONG = 5, 2  # calls, however long they take
_LONG_S = 5.0  # of a call: it is not warmed up twice
_TURN_S = 0.2  # about how long one engine is timed before the next has its turn
_TOLERANCE = 1e-3  # of the largest logit, between engines that compute in fp32


@dataclass
class Model:
    """One model to measure.

    Args:
        name: as it is called in the results.
        folder: with its weights, and its tokenizer if it has one.
        source: where a person finds it: the folder, or a preset's name.
        role: teacher or student, where it is known.
        shape: of a student in a run that has several.
        exported: where its ONNX files are; None where they are in its own folder.
    """

    name: str
    folder: Path
    source: str
    role: str | None = None
    shape: str = ""
    exported: Path | None = None


def measure_latency(
    sources: Sequence[str],
    *,
    engines: Sequence[str] = ENGINES,
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
    device: str = "cpu",
    threads: int = 1,
    seconds: float = 5.0,
    tokenizer: str | None = None,
    command: str = "",
    say: Callable[[str], None] = print,
) -> dict:
    """Measure models side by side.

    Args:
        sources: folders of models, run folders (their teacher and a student of each shape), or
            names of ``PRESETS``.
        engines: of ``formats.ENGINES``.
        batches: sizes B.
        lengths: sizes L, tokens.
        device: cpu or cuda.
        threads: that each process computes with.
        seconds: for each cell of a model and engine, once it is warm.
        tokenizer: folder whose tokenizer is timed; None takes the first model's that has one.
        command: recorded.
        say: hears what happens.

    Returns:
        The content of ``latency.json``: environment, models, a row for each cell, the times of
        tokenising, and what could not be measured, with reasons.

    Raises:
        ConfigError: a source is neither a model nor a preset, or the device neither cpu nor cuda.
        CheckpointError: a model's files are not those that its run published.
        UnsupportedError: there is no CUDA device.
        ParityError: two engines do not compute the same.
    """
    check_device(device)
    known = environment(device, threads)
    absent: list[dict] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = _find_models(sources, scratch)
        for model in models:
            check_folder(model.folder)
        contenders = [(model, engine) for model in models for engine in engines]
        contenders += _tokenizing_model(models, tokenizer)
        for model in models:
            _export_where_missing(model, engines, scratch, say)
        workers = []
        for model, engine in contenders:
            worker = stack.enter_context(_Worker(model, engine, device, threads))
            if worker.problem is None:
                workers.append(worker)
            else:
                absent.append(_absence(worker, worker.problem))
        rows = []
        # Memory that a large batch took is not all given back: the small ones go first.
        for batch, length in sorted(product(batches, lengths), key=lambda cell: cell[0] * cell[1]):
            rows += _measure_cell(workers, batch, length, seconds, absent)
            say(f"batch {batch}, length {length}: measured")
        described = {model.name: _describe(model, workers) for model in models}
    return {
        "environment": known,
        "command": command,
        "models": described,
        "rows": [row for row in rows if row["engine"] != TOKENISING],
        "tokenising": [row for row in rows if row["engine"] == TOKENISING],
        "absent": absent,
    }


def write_latency(latency: dict, folder: Path) -> str:
    """Write ``latency.json`` and ``latency.md``.

    Args:
        latency: what ``measure_latency`` returned.
        folder: which is there.

    Returns:
        The content of ``latency.md``: all of it as a page of its own.

    Raises:
        ConfigError: a file cannot be written.
    """
    section = latency_section(latency, ratios(latency))
    known = latency["environment"]
    section.notes.append(f"{known['date']}, {installed(known)}. Command: `{latency['command']}`")
    page = "\n\n".join([f"# {section.title}", *section.markdown()]) + "\n"
    try:
        (folder / "latency.json").write_text(json.dumps(latency, indent=1) + "\n", "utf-8")
        (folder / "latency.md").write_text(page, "utf-8")
    except OSError as error:
        raise ConfigError(str(error), "make room, or give another --out") from error
    return page


# ---- What is measured ----------------------------------------------------------------------------


def _find_models(sources: Sequence[str], scratch: Path) -> list[Model]:
    models: list[Model] = []
    for source in sources:
        path = Path(source)
        if source in PRESETS and not path.exists():
            models.append(Model(source, _random_model(source, scratch), source))
        elif (path / "config.json").exists():
            models.append(Model(_name(path), path, source))
        elif found := _models_of_run(path):
            models += found
        else:
            raise ConfigError(
                f"{source}: is no folder of a model, no run with a student, and no preset",
                f"give a folder with config.json, a run folder, or {', '.join(PRESETS)}",
            )
    names = [model.name for model in models]
    for model in models:
        if names.count(model.name) > 1:
            model.name = model.source
    return models


def _name(folder: Path) -> str:
    """What the folder is called, also where the path to it is ``.``."""
    return os.path.basename(os.path.abspath(folder))


def _models_of_run(run: Path) -> list[Model]:
    """The teacher and a student of each shape: others differ in their weights alone."""
    found: dict[str, Model] = {}
    for stage in find_stages(run):
        check_files(stage.folder, stage.record, contents=False)
        if stage.kind != "start" and (stage.folder / "config.json").exists():
            shape = shape_of(stage.row)
            name = f"{stage.kind} as {shape}" if shape else stage.kind
            model = Model(name, stage.folder, str(stage.folder), stage.kind, shape)
            found.setdefault(name, model)
    return sorted(found.values(), key=lambda model: (model.role != "teacher", model.shape))


def _random_model(preset: str, scratch: Path) -> Path:
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_shape(PRESETS[preset], _VOCABULARY))
    folder = scratch / preset
    model.save_pretrained(folder)
    return folder


def _tokenizing_model(models: list[Model], tokenizer: str | None) -> list[tuple[Model, str]]:
    if tokenizer is not None:
        return [(Model(_name(Path(tokenizer)), Path(tokenizer), tokenizer), TOKENISING)]
    having = [model for model in models if (model.folder / "tokenizer_config.json").exists()]
    return [(model, TOKENISING) for model in having[:1]]


def _export_where_missing(model: Model, engines: Sequence[str], scratch: Path, say) -> None:
    """Make ONNX files that nobody keeps; if that fails, the engine says what is missing."""
    wanted = [name for name in engines if name in ONNX_FILES]
    if why_not("eager", model.folder, "cpu") or all(
        onnx_file(name, model.folder) for name in wanted
    ):
        return
    say(f"{model.name}: exporting to ONNX")
    model.exported = Path(tempfile.mkdtemp(dir=scratch)) / ONNX_FOLDER
    try:
        write_files(load_trained_classifier(model.folder), model.exported, int8=True)
    except UnsupportedError as error:
        say(f"{model.name}: {error.cause}")


def _describe(model: Model, workers: list[_Worker]) -> dict:
    shape = load_config(str(model.folder))
    own = {w.engine: w.bytes for w in workers if w.model is model and w.engine != TOKENISING}
    return {
        "source": model.source,
        "role": model.role,
        "shape": model.shape,
        "folder": None if model.source in PRESETS else str(model.folder),
        "parameters": count_parameters(shape),
        "layers": shape.num_hidden_layers,
        "hidden": shape.hidden_size,
        "bytes": own,
    }


@lru_cache
def flops_of_text(folder: Path, length: int) -> int:
    """Floating-point operations of one text of ``length`` tokens, matrix products alone, a
    multiplication and an addition being two."""
    # Eager attention is made of matrix products, which is what the counter of flops knows.
    model = unallocated(load_config(str(folder)), attn_implementation="eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.device("meta"), torch.no_grad():
        model(torch.ones(1, length, dtype=torch.long))
    return counter.get_total_flops()


# ---- Cells ---------------------------------------------------------------------------------------


def _measure_cell(
    workers: list[_Worker], batch: int, length: int, seconds: float, absent: list[dict]
) -> list[dict]:
    answers, times, peaks = {}, {}, {}

    def asked(worker: _Worker, method: str, *arguments):
        """The answer; None after noting why there is none, which takes the worker out."""
        try:
            return worker.ask(method, *arguments)
        except MetakdError as error:
            absent.append(_absence(worker, f"batch {batch}, length {length}: {error.cause}"))
            times.pop(worker, None)
            return None

    for worker in workers:
        if (answer := asked(worker, "open_cell", batch, length)) is not None:
            answers[worker], times[worker] = answer, []
    waiting = list(times)
    while waiting:
        for worker in waiting:
            if (more := asked(worker, "time", _TURN_S)) is not None:
                times[worker] += more
        waiting = [w for w in waiting if w in times and not _known(times[w], seconds)]
    for worker in list(times):
        peaks[worker] = asked(worker, "peak_memory")
    return [
        {
            "model": worker.model.name,
            "engine": worker.engine,
            "batch": batch,
            "length": length,
            **(row := describe_times(seen)),
            "sequences_per_s": batch / (1e-3 * row["p50_ms"]),
            "peak_memory_bytes": peaks[worker],
            **_compared(worker, answers, batch, length),
        }
        for worker, seen in times.items()
    ]


def _compared(worker: _Worker, answers: dict[_Worker, np.ndarray], batch: int, length: int) -> dict:
    """What was computed, and how far it is from what PyTorch computes."""
    if worker.engine == TOKENISING:
        return {}
    alike = [w for w in answers if w.model is worker.model and w.engine != INT8_ENGINE]
    wanted = min(alike, key=lambda w: w.engine != "eager", default=None)
    error = None if wanted is None else _error(answers[worker], answers[wanted], worker)
    flops = batch * flops_of_text(worker.model.folder, length)
    return {"flops": flops, "max_logit_error": error}


def _error(found: np.ndarray, wanted: np.ndarray, worker: _Worker) -> float:
    error = float(np.abs(found - wanted).max())
    if worker.engine != INT8_ENGINE and not error <= _TOLERANCE * np.abs(wanted).max():
        raise ParityError(
            f"{worker.model.name}: {worker.engine} computes logits that differ by {error:.1e}",
            "nothing was reported: what computes something else has no speed",
        )
    return error


def _known(times: list[float], seconds: float) -> bool:
    """Were there enough calls?"""
    spent = sum(times)
    if len(times) < _FEWEST:
        return len(times) >= _FEWEST_OF_LONG and spent > 4 * max(seconds, _TURN_S)
    if spent > seconds or len(times) < _CALLS:
        return spent > seconds
    low, high = median_interval(times)
    return high - low < 2 * _PRECISION * statistics.median(times)


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the median, from order statistics, whatever the distribution;
    None for fewer than six values, which cannot give one."""
    ordered = sorted(values)
    rank = int(binom.ppf(0.025, len(ordered), 0.5))
    return (ordered[rank - 1], ordered[-rank]) if rank else None


def describe_times(seconds: Sequence[float]) -> dict:
    """Percentiles of calls, in milliseconds, and how many calls there were."""
    milliseconds = sorted(1e3 * value for value in seconds)
    n = len(milliseconds)
    interval = median_interval(milliseconds)
    row = {"calls": n, "p50_ms": statistics.median(milliseconds)}
    row["p50_ci95_ms"] = None if interval is None else list(interval)
    for percent in PERCENTILES[1:]:
        slower = n * (100 - percent) / 100
        rank = math.ceil(n * percent / 100) - 1
        row[f"p{percent}_ms"] = milliseconds[rank] if slower >= 2 else None
    return row


def _absence(worker: _Worker, reason: str) -> dict:
    return {"model": worker.model.name, "engine": worker.engine, "reason": reason}


# ---- Processes -----------------------------------------------------------------------------------


class _Worker:
    """The process of one model and engine, seen from the one that asks.

    ``problem`` says why it cannot run; otherwise ``bytes`` is the size of its weights on disk.
    """

    def __init__(self, model: Model, engine: str, device: str, threads: int):
        self.model, self.engine = model, engine
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        folder = model.folder
        if model.exported is not None and engine in ONNX_FILES:
            folder = model.exported
        self._process = context.Process(
            target=_serve, args=(theirs, engine, folder, device, threads), daemon=True
        )
        # The command line lets OpenMP's threads sleep, for cores that are shared with others. Here
        # one process runs at a time, and spinning is what PyTorch does by itself.
        policy = os.environ.pop("OMP_WAIT_POLICY", None)
        self._process.start()
        if policy is not None:
            os.environ["OMP_WAIT_POLICY"] = policy
        theirs.close()
        self.problem, self.bytes = None, 0
        try:
            self.bytes = self._receive()
        except MetakdError as error:
            self.problem = error.cause

    def ask(self, method: str, *arguments):
        """Call a method of the process's bench, and wait for what it returns."""
        with suppress(OSError):  # it has ended, which the next line tells
            self._connection.send((method, arguments))
        return self._receive()

    def _receive(self):
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise UnsupportedError(
                f"the process of {self.engine} ended (exit code {self._process.exitcode}); "
                "out of memory?"
            ) from None
        if isinstance(answer, MetakdError):
            raise answer
        return answer

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_exception) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.kill()


def _serve(connection, engine: str, folder: Path, device: str, threads: int) -> None:
    """What a worker's process does: open, then answer until nobody asks."""
    disable_progress_bar()
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read when a tokenizer is first used
    bench: _Bench | None = None
    with suppress(EOFError, OSError):
        method, arguments = "", ()
        while True:
            try:
                if bench is None:
                    bench = _open_bench(engine, folder, device, threads)
                    answer = bench.bytes
                else:
                    answer = getattr(bench, method)(*arguments)
            except MetakdError as error:
                answer = error
            except Exception as error:  # whatever a library does to an engine, the others go on
                first = (str(error).splitlines() or [""])[0]
                answer = UnsupportedError(f"{type(error).__name__}: {first}")
            connection.send(answer)
            method, arguments = connection.recv()


def _open_bench(engine: str, folder: Path, device: str, threads: int) -> _Bench:
    if engine == TOKENISING:
        return _TokenizerBench(folder)
    return _EngineBench(engine, folder, device, threads)


class _Bench:
    """Times one callable, which ``open_cell`` of a subclass prepares."""

    bytes = 0
    _call: Callable

    def time(self, turn_s: float) -> list[float]:
        """Seconds of each of the calls of about ``turn_s`` seconds; at least one."""
        times: list[float] = []
        if self._warm_s < turn_s:  # another engine has had the caches since
            self._call()
        while not times or sum(times) < turn_s:
            start = time.perf_counter()
            self._call()
            times.append(time.perf_counter() - start)
        return times

    def _warm_up(self):
        """An answer. The first call may compile, and one that takes long says no less for that."""
        for _ in range(2):
            start = time.perf_counter()
            answer = self._call()
            self._warm_s = time.perf_counter() - start
            if self._warm_s > _LONG_S:
                break
        return answer


class _EngineBench(_Bench):
    def __init__(self, engine: str, folder: Path, device: str, threads: int):
        self._engine = open_engine(engine, folder, device=device, threads=threads)
        self._device, self._torch = device, engine not in ONNX_FILES
        weights = onnx_file(engine, folder) if engine in ONNX_FILES else None
        pattern = f"{weights.name}*" if weights else "*.safetensors"
        place = weights.parent if weights else folder
        self.bytes = sum(file.stat().st_size for file in place.glob(pattern))
        shape = load_config(str(folder))
        self._vocabulary = shape.vocab_size
        self._positions = positions(shape) or math.inf

    def open_cell(self, batch: int, length: int) -> np.ndarray:
        """Logits of the batch that is timed from now on, the same for every engine."""
        if length > self._positions:
            raise UnsupportedError(f"the model has {self._positions} positions")
        size = (batch, length)
        ids = np.random.default_rng(0).integers(0, self._vocabulary, size)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        inputs["token_type_ids"] = np.zeros_like(ids)
        self._call = lambda: self._engine(inputs)
        _forget_peak(self._device)
        return self._warm_up()

    def peak_memory(self) -> int | None:
        """Bytes: of the whole process on a CPU, the libraries that it has loaded included; on a GPU
        what PyTorch has allocated, None for others."""
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated() if self._torch else None
        try:
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.partition("VmHWM:")[2].split()[0])
        except (OSError, IndexError):
            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # then it is the highest so far, and cells grow
        Path("/proc/self/clear_refs").write_text("5")


class _TokenizerBench(_Bench):
    def peak_memory(self) -> None:
        """Not of interest beside a model's."""

    def __init__(self, folder: Path):
        self._tokenizer = load_tokenizer(str(folder))

    def open_cell(self, batch: int, length: int) -> np.ndarray:
        """Token ids of texts that fill ``length`` tokens, made of the tokenizer's own words."""
        draw = np.random.default_rng(0).integers
        size = len(self._tokenizer)
        special = set(self._tokenizer.all_special_ids)
        texts = []
        for _ in range(batch):
            ids = [int(number) for number in draw(0, size, length) if number not in special]
            texts.append(self._tokenizer.decode(ids))
        self._call = lambda: self._tokenizer(
            texts, padding=True, truncation=True, max_length=length, return_tensors="np"
        )
        return self._warm_up()["input_ids"]
