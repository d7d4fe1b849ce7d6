"""Students behind HTTP: ``metakd serve STUDENT|RUN``.

``POST /predict`` takes ``{"texts": [...], "domain": "books"}``, pairs as ``[["one", "other"],
...]``, and gives ``{"domain": "books", "answers": [...]}``, each as ``metakd predict`` prints it.
``domain`` may be left out where one student is served. ``GET /health`` names the domains, ``GET
/metrics`` counts for Prometheus. What arrives while a student computes is its next batch: nobody
waits for others to come, and the more wait, the larger the batches.

Every request is answered with a status, an error as ``{"error": ...}``, mostly with a ``remedy``:
400 is no JSON, 404 no such path or domain, 405 a wrong method, 408 a client that is too slow, 413
too long, 422 JSON that asks nothing answerable, 500 a failure here, 503 too much at once
(``Retry-After`` says when to come again), 504 not computed in time.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from metakd.config.places import meant
from metakd.deploy.predictor import Predictor, Text, check_texts
from metakd.errors import CheckpointError, ConfigError, DataError, listing

_SHOWN = 8
_SWALLOWED = 16  # times the limit of a body that is read for the sake of who then reads its 413


@dataclass(frozen=True)
class Limits:
    """What a server takes upon itself; above it, it refuses."""

    body: int = 1 << 20  # bytes of a request
    texts: int = 1024  # of a request
    waiting: int = 4096  # texts of one student that are not computed yet
    batch: int = 64  # texts that a student is given at once, if no request alone has more
    characters: int = 1 << 21  # likewise
    connections: int = 512
    seconds: float = 30.0  # for a request to arrive, and again for it to be computed


class _Overloaded(Exception):
    """More waits for a student than it may."""


@dataclass(eq=False)
class _Asked:
    """A request that waits."""

    texts: Sequence[Text]
    answer: asyncio.Future
    characters: int = 0

    def __post_init__(self):
        parts = ([one] if isinstance(one, str) else one for one in self.texts)
        self.characters = sum(len(part) for one in parts for part in one)

    def goes_with(self, other: _Asked) -> bool:
        """Are both of single texts, or of pairs?"""
        return isinstance(self.texts[0], str) == isinstance(other.texts[0], str)


class _Student:
    """A student and who waits for it. Its methods run on the server's loop, the student in
    ``pool``."""

    def __init__(self, predictor: Predictor, pool: ThreadPoolExecutor, limits: Limits):
        self._predictor, self._pool, self._limits = predictor, pool, limits
        self._waiting: deque[_Asked] = deque()
        self._arrived = asyncio.Event()
        self._rate = 0.0  # texts a second, lately; 0 before the first batch
        self.texts = 0  # that wait

    async def __call__(self, texts: Sequence[Text]) -> list[dict]:
        """The answer to each text.

        Raises:
            _Overloaded: too many wait already, or more than are computed in half the time there is:
                who waited to no purpose would have been in the way of others.
        """
        least = self._limits.seconds * self._rate / 2 or self._limits.waiting
        if self.texts and self.texts + len(texts) > min(least, self._limits.waiting):
            raise _Overloaded
        asked = _Asked(texts, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        self.texts += len(texts)
        self._arrived.set()
        try:
            return await asked.answer
        except asyncio.CancelledError:  # has given up
            if asked in self._waiting:
                self._waiting.remove(asked)
                self.texts -= len(texts)
            raise

    async def work(self, seen: Callable[[int], None]) -> None:
        """Answer whoever comes, for ever; ``seen`` is told the size of each batch."""
        while True:
            await self._arrived.wait()
            batch = self._next()
            if not self._waiting:
                self._arrived.clear()
            if batch:
                size, start = sum(len(one.texts) for one in batch), time.perf_counter()
                seen(size)
                await self._compute(batch)
                rate = size / (time.perf_counter() - start)
                self._rate = 0.7 * self._rate + 0.3 * rate if self._rate else rate

    def _next(self) -> list[_Asked]:
        """Whom to answer together."""
        batch: list[_Asked] = []
        room, characters = self._limits.batch, self._limits.characters
        while self._waiting:
            asked = self._waiting[0]
            fits = len(asked.texts) <= room and asked.characters <= characters
            if batch and not (fits and asked.goes_with(batch[0])):
                break
            batch.append(self._waiting.popleft())
            self.texts -= len(asked.texts)
            room -= len(asked.texts)
            characters -= asked.characters
        return batch

    async def _compute(self, batch: list[_Asked]) -> None:
        batch = [asked for asked in batch if not asked.answer.done()]
        together = [text for asked in batch for text in asked.texts]
        if not together:
            return
        try:
            run = asyncio.get_running_loop().run_in_executor
            found = iter(await run(self._pool, self._answers, together))
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].answer.done():
                    batch[0].answer.set_exception(error)
                return
            half = len(batch) // 2  # whose fault was it?
            await self._compute(batch[:half])
            await self._compute(batch[half:])
            return
        for asked in batch:
            answers = [next(found) for _ in asked.texts]
            if not asked.answer.done():
                asked.answer.set_result(answers)

    def _answers(self, texts: Sequence[Text]) -> list[dict]:
        return [answer.fields() for _, answer in zip(texts, self._predictor(texts), strict=True)]


class _Metrics:
    """What ``/metrics`` says."""

    def __init__(self):
        self.registry = CollectorRegistry()
        given = {"registry": self.registry}
        self.requests = Counter("metakd_requests", "Requests by status", ["status"], **given)
        self.texts = Counter("metakd_texts", "Texts labelled", ["domain"], **given)
        self.seconds = Histogram("metakd_request_seconds", "Time of an answered request", **given)
        sizes = tuple(float(1 << n) for n in range(11))
        self.batch = Histogram("metakd_batch_texts", "Texts of a batch", buckets=sizes, **given)
        self.waiting = Gauge("metakd_waiting_texts", "Texts not computed yet", **given)


def application(predictors: Mapping[str, Predictor], limits: Limits) -> _Counting:
    """An ASGI application that serves these students by the names that requests call a
    ``domain``."""
    metrics = _Metrics()
    students: dict[str, _Student] = {}
    at_work: list[asyncio.Task] = []

    @asynccontextmanager
    async def living(_: Starlette) -> AsyncIterator[None]:
        # One thread: a student uses every core, two side by side would only get in their way.
        pool = ThreadPoolExecutor(1)
        students.update({name: _Student(one, pool, limits) for name, one in predictors.items()})
        metrics.waiting.set_function(lambda: sum(one.texts for one in students.values()))
        for student in students.values():
            at_work.append(asyncio.create_task(student.work(metrics.batch.observe)))
        yield
        for task in at_work:
            task.cancel()
        pool.shutdown(wait=False, cancel_futures=True)

    async def predict(request: Request) -> Response:
        start = time.perf_counter()
        asked = _parsed(await _body(request, limits))
        name, texts = _question(asked, students, limits)
        try:
            async with asyncio.timeout(limits.seconds):
                answers = await students[name](texts)
        except _Overloaded:
            raise _refusal(503, "too many texts wait already", "come again") from None
        except TimeoutError:
            raise _refusal(504, "not computed in time", "send fewer texts at once") from None
        metrics.texts.labels(name).inc(len(texts))
        metrics.seconds.observe(time.perf_counter() - start)
        return JSONResponse({"domain": name, "answers": answers})

    async def health(_: Request) -> Response:
        well = not any(task.done() for task in at_work)
        said = {"status": "ok" if well else "a student has stopped", "domains": sorted(students)}
        return JSONResponse(said, 200 if well else 503)

    async def measured(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = error.detail if isinstance(error.detail, dict) else {"error": error.detail}
        return JSONResponse(said, error.status_code, error.headers)

    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"failed: {type(error).__name__}"}, 500)

    app = Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/health", health),
            Route("/metrics", measured),
        ],
        lifespan=living,
        exception_handlers={HTTPException: refused, Exception: failed},
    )
    return _Counting(app, metrics.requests)


class _Counting:
    """Counts answers by status, around all of the application: what answers 500 is its outermost
    part."""

    def __init__(self, app: Starlette, requests: Counter):
        self._app, self._requests = app, requests

    async def __call__(self, scope, receive, send) -> None:
        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                self._requests.labels(str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)


def _refusal(status: int, error: str, remedy: str) -> HTTPException:
    headers = {"Retry-After": "1"} if status == 503 else None
    return HTTPException(status, {"error": error, "remedy": remedy}, headers)


async def _body(request: Request, limits: Limits) -> bytes:
    """All of a request, read in time and no longer than it may be."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limits.body:
                    parts.append(part)
                elif size > _SWALLOWED * limits.body:
                    break
    except TimeoutError:
        late = f"no whole request within {limits.seconds:g} s"
        raise _refusal(408, late, "send it faster, or in parts") from None
    except ClientDisconnect:
        raise _refusal(400, "the client left", "stay until the answer") from None
    if size > limits.body:
        raise _refusal(413, f"a request of more than {limits.body} bytes", "send it in parts")
    return b"".join(parts)


def _parsed(body: bytes) -> dict:
    try:
        asked = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise _refusal(400, f"the request is no JSON: {reason}", "send JSON in UTF-8") from None
    if not isinstance(asked, dict):
        wanted = 'send {"texts": ["..."]}'
        raise _refusal(422, f"the request is {_kind(asked)}, not an object", wanted)
    return asked


def _question(
    asked: dict, students: Mapping[str, object], limits: Limits
) -> tuple[str, Sequence[Text]]:
    """Whom a request asks, and of which texts."""
    unknown = sorted(asked.keys() - {"texts", "domain"})
    if unknown:
        named = listing([repr(key[:60]) for key in unknown], _SHOWN)
        raise _refusal(422, f"unknown: {named}", "keys are texts and domain")
    texts, name = asked.get("texts"), asked.get("domain")
    there_are = f"there are {listing(sorted(students), _SHOWN)}"
    if name is None:
        if len(students) > 1:
            raise _refusal(422, "domain is missing", there_are)
        (name,) = students
    elif not isinstance(name, str):
        raise _refusal(422, f"domain is {_kind(name)}, not a string", there_are)
    elif name not in students:
        raise _refusal(404, f"there is no domain {name[:60]!r}", there_are)
    if not isinstance(texts, list) or not texts:
        what = "an empty list" if texts == [] else _kind(texts)
        raise _refusal(422, f"texts is {what}", 'send "texts": ["..."]')
    if len(texts) > limits.texts:
        raise _refusal(413, f"{len(texts)} texts, at most {limits.texts}", "send them in parts")
    found = [tuple(text) if isinstance(text, list) else text for text in texts]
    try:
        check_texts(found)
    except DataError as error:
        raise _refusal(422, error.cause, error.remedy) from error
    return name, found


def _kind(value: object) -> str:
    """In JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


class _Impatient(H11Protocol):
    """Who has begun a connection, or a request on it, finishes its head in time or gets a 408.
    uvicorn has a limit for the time between requests only."""

    patience = Limits.seconds
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(self.patience, self._hang_up)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _hang_up(self) -> None:
        if not self.transport.is_closing():
            head = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            self.transport.write(head)
            self.transport.close()


def server(predictors: Mapping[str, Predictor], limits: Limits) -> uvicorn.Server:
    """What runs ``application`` on a socket, until it is told to stop or ``should_exit`` is set."""
    patient = type("_Patient", (_Impatient,), {"patience": limits.seconds})
    config = uvicorn.Config(
        application(predictors, limits),
        http=patient,
        loop="asyncio",
        ws="none",
        log_level="warning",
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=int(2 * limits.seconds) + 1,
        server_header=False,
    )
    return uvicorn.Server(config)


def students_in(places: Sequence[str | Path]) -> dict[str, Path]:
    """Name -> folder of each student that these places hold: folders of students or of their
    exports, of a row's students, or of a run with one row.

    Raises:
        CheckpointError: there is none.
        ConfigError: a run has students of several rows, or two have one name.
    """
    found: dict[str, Path] = {}
    for place in map(Path, places):
        for folder in _folders(place):
            whole = folder.resolve()
            name = whole.parent.name if whole.name == "onnx" else whole.name
            if name in found:
                both = f"{found[name]} and {folder} are both called {name}"
                raise ConfigError(both, "serve one of them")
            found[name] = folder
    return found


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        remedy = "give the folder of a student or of a run"
        raise CheckpointError(f"{place}: there is no such folder{meant(place)}", remedy)
    rows = sorted(path for path in (place / "students").glob("*") if path.is_dir())
    if len(rows) > 1:
        listed = listing([str(row) for row in rows], _SHOWN)
        raise ConfigError(f"{place}: has students of several rows", f"give one of {listed}")
    if (place / "config.json").is_file():
        return [place]
    inside = sorted((rows[0] if rows else place).glob("*/config.json"))
    return [path.parent for path in inside] or [place]


def serve(
    places: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: str = "auto",
    device: str | None = None,
    threads: int | None = None,
    limits: Limits | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the students in ``places`` until SIGTERM or SIGINT; what has begun is answered first.

    Args:
        places: see ``students_in``.
        host: address to listen on; the default is reached from this machine only. There is neither
            authentication nor encryption: beyond the machine, put a proxy before it.
        port: 0 takes a free one.
        engine, device, threads: as of ``Predictor``.
        limits: None takes the defaults.
        say: is told where the server listens.

    Raises:
        ConfigError: the address cannot be had, or see ``students_in``.
        CheckpointError, UnsupportedError: see ``Predictor``.
    """
    limits = limits or Limits()
    predictors = {
        name: Predictor(folder, engine=engine, device=device, threads=threads)
        for name, folder in students_in(places).items()
    }
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=limits.connections)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{host}:{port}: {reason}", "give another --host or --port") from error
    place = f"[{host}]" if ":" in host else host
    say(f"{', '.join(predictors)}: http://{place}:{listening.getsockname()[1]}/predict")
    with listening:
        server(predictors, limits).run(sockets=[listening])
