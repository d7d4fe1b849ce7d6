"""Students behind HTTP: the right answer to each of many at once, a status to everybody else."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
from processes import unjoined
from test_deploy import TEXTS, student  # noqa: F401

from metakd import cli
from metakd.deploy import Predictor
from metakd.deploy.server import Limits, server, students_in
from metakd.errors import CheckpointError, ConfigError


@contextmanager
def serving(predictors: dict, **limits):
    """The port of a server on a thread of this process."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    running = server(predictors, Limits(**limits))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield SimpleNamespace(port=listening.getsockname()[1], running=running, thread=thread)
    finally:
        running.should_exit = True
        thread.join(60)
        listening.close()
        assert not thread.is_alive()


def call(port: int, body: object = None, path: str = "/predict") -> tuple[int, dict, dict]:
    """Status, JSON and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, raw)
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    if answer.headers["content-type"] == "application/json":
        said = json.loads(said)
    return answer.status, said, dict(answer.headers)


class Stub:
    """A student that answers with its texts, once it may."""

    def __init__(self):
        self.free = threading.Event()
        self.began = threading.Event()
        self.batches: list[list] = []

    def __call__(self, texts):
        self.batches.append(list(texts))
        self.began.set()
        assert self.free.wait(60)
        if "bad" in texts:
            raise RuntimeError("bad")
        return [SimpleNamespace(fields=lambda text=text: {"prediction": text}) for text in texts]


def test_many_at_once_get_the_answers_of_their_domain(student):  # noqa: F811
    whole = Predictor(student, engine="eager", threads=1)
    predictors = {"one": whole, "other": Predictor(student, engine="eager", max_length=4)}
    wanted = {
        name: [a.fields() for a in predictor(TEXTS)] for name, predictor in predictors.items()
    }
    assert wanted["one"] != wanted["other"]
    with serving(predictors) as served:

        def ask(number: int):
            name = ("one", "other")[number % 2]
            some = slice(number, number + 1 + number % 3)
            body = {"texts": TEXTS[some], "domain": name}
            return call(served.port, body)[:2], name, wanted[name][some]

        with ThreadPoolExecutor(16) as clients:
            found = list(clients.map(ask, range(len(TEXTS) - 3)))
        counted = call(served.port, path="/metrics")[1].decode()
    for (status, said), name, answers in found:
        assert status == 200 and said["domain"] == name
        for one, other in zip(said["answers"], answers, strict=True):
            assert one["prediction"] == other["prediction"]
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    assert f'metakd_requests_total{{status="200"}} {len(found)}.0' in counted
    batches = int(re.search(r"metakd_batch_texts_count (\d+)", counted)[1])
    assert 0 < batches < len(found), "who waited was answered together"


def test_pairs_and_single_texts_are_not_mixed():
    stub = Stub()
    with serving({"one": stub}) as served, ThreadPoolExecutor(8) as clients:
        first = clients.submit(call, served.port, {"texts": ["first"]})
        assert stub.began.wait(30)
        asked = [["a"], [["b", "c"]], ["d"], [["e", "f"]]]
        others = [clients.submit(call, served.port, {"texts": texts}) for texts in asked]
        _until(lambda: waiting(served.port) == len(others))
        stub.free.set()
        for one, texts in zip((first, *others), (["first"], *asked), strict=True):
            assert one.result()[1]["answers"] == [{"prediction": text} for text in texts]
    assert all(len({type(text) for text in batch}) == 1 for batch in stub.batches)


def waiting(port: int) -> float:
    text = call(port, path="/metrics")[1].decode()
    return float(re.search(r"^metakd_waiting_texts (\S+)", text, re.M)[1])


def _until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


HOSTILE = {
    "no JSON": (b"{", 400),
    "no UTF-8": (b'{"texts": ["\xff"]}', 400),
    "gzip": (b"\x1f\x8b\x08\x00", 400),
    "nested": (b"[" * 200_000, 400),
    "a number of 5,000 digits": (b'{"texts": ' + b"1" * 5000 + b"}", 400),
    "empty": (b"", 400),
    "a list": (["a"], 422),
    "no texts": ({}, 422),
    "null": ({"texts": None}, 422),
    "a text": ({"texts": "a"}, 422),
    "none": ({"texts": []}, 422),
    "numbers": ({"texts": [1, 2]}, 422),
    "half a surrogate": ({"texts": ["\ud800"]}, 422),
    "triples": ({"texts": [["a", "b", "c"]]}, 422),
    "nested texts": ({"texts": [[["a"], "b"]]}, 422),
    "mixed": ({"texts": ["a", ["b", "c"]]}, 422),
    "unknown key": ({"texts": ["a"], "text": "a"}, 422),
    "unknown key, half a surrogate": (b'{"\\ud800": 1}', 422),
    "unknown key, long": ({"x" * 100_000: 1}, 422),
    "unknown domain": ({"texts": ["a"], "domain": "x" * 1000}, 404),
    "domain of another kind": ({"texts": ["a"], "domain": ["one"]}, 422),
    "too many texts": ({"texts": ["a"] * 9}, 413),
    "too long": (b'{"texts": ["' + b"a" * 400_000 + b'"]}', 413),
    "far too long": (b"a" * 6_000_000, 413),
}


@pytest.fixture(scope="module")
def strict(student):  # noqa: F811
    """A server of one student that takes little."""
    predictor = Predictor(student, engine="eager", threads=1)
    with serving({"one": predictor}, body=300_000, texts=8, seconds=2) as served:
        yield served


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_answered(strict, name):
    body, wanted = HOSTILE[name]
    with suppress(ConnectionError):  # megabytes too many may meet a server that has hung up
        status, said, _ = call(strict.port, body)
        assert status == wanted
        assert said["error"] and said["remedy"] and len(str(said)) < 300
    assert call(strict.port, {"texts": ["still here"]})[0] == 200


@pytest.mark.parametrize(
    "request_line, status",
    [
        (b"GET /nothing HTTP/1.1", 404),
        (b"DELETE /predict HTTP/1.1", 405),
        (b"POST /health HTTP/1.1", 405),
        (b"nonsense", 400),
        (b"GET /" + b"a" * 50_000 + b" HTTP/1.1", 404),
    ],
)
def test_other_requests_are_answered(strict, request_line, status):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=30) as client:
        client.sendall(request_line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert received(client).startswith(b"HTTP/1.1 %d" % status)


def received(client: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    parts = []
    with suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


SLOW = {
    "says nothing": b"",
    "half a head": b"POST /predict HTTP/1.1\r\nHost: x\r\n",
    "half a body": b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
    "half a second request": b"GET /he",
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_clients_are_told_so(strict, name):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=30) as client:
        if "second" in name:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            first = b""
            while not first.endswith(b"}"):
                first += client.recv(65536)
        client.sendall(SLOW[name])
        start = time.monotonic()
        if name == "half a body":  # the connection itself is kept for the next request
            assert client.recv(65536).startswith(b"HTTP/1.1 408")
        else:
            assert b"HTTP/1.1 408" in received(client)
        assert time.monotonic() - start < 15
    assert call(strict.port, {"texts": ["still here"]})[0] == 200


def test_slow_clients_hold_up_nobody(strict):
    silent = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(50)]
    assert call(strict.port, {"texts": ["quick"]})[0] == 200
    for client in silent:
        client.close()


def test_more_than_may_wait_is_refused_and_the_rest_answered():
    stub = Stub()
    with serving({"one": stub}, waiting=4) as served, ThreadPoolExecutor(16) as clients:
        first = clients.submit(call, served.port, {"texts": ["first"]})
        assert stub.began.wait(30)
        kept = [clients.submit(call, served.port, {"texts": [f"kept {n}"]}) for n in range(4)]
        _until(lambda: waiting(served.port) == 4)
        status, said, headers = call(served.port, {"texts": ["one too many"]})
        assert status == 503 and said["error"] and headers["retry-after"] == "1"
        stub.free.set()
        assert [one.result()[0] for one in (first, *kept)] == [200] * 5
        assert call(served.port, {"texts": ["later"]})[0] == 200


def test_what_is_not_computed_in_time_is_given_up():
    stub = Stub()
    with serving({"one": stub}, seconds=0.5) as served, ThreadPoolExecutor(2) as clients:
        first = clients.submit(call, served.port, {"texts": ["first"]})
        assert stub.began.wait(30)
        second = clients.submit(call, served.port, {"texts": ["second"]})
        assert first.result()[0] == second.result()[0] == 504
        stub.free.set()
        assert call(served.port, {"texts": ["third"]})[0] == 200
    assert stub.batches == [["first"], ["third"]]


def test_who_would_wait_in_vain_is_told_at_once():
    """Or else what is computed under load is what nobody waits for any more."""

    class Slow(Stub):
        def __call__(self, texts):
            time.sleep(0.05 * len(texts))  # 20 texts a second
            return super().__call__(texts)

    slow = Slow()
    slow.free.set()
    with serving({"one": slow}, seconds=2, batch=4) as served, ThreadPoolExecutor(64) as clients:
        assert call(served.port, {"texts": ["first"]})[0] == 200
        asked = [clients.submit(call, served.port, {"texts": [str(n)]}) for n in range(64)]
        found = [one.result()[0] for one in asked]
    assert set(found) == {200, 503}
    assert found.count(200) >= 10


def test_a_failure_is_of_its_own_request_alone():
    stub = Stub()
    with serving({"one": stub}) as served, ThreadPoolExecutor(8) as clients:
        first = clients.submit(call, served.port, {"texts": ["first"]})
        assert stub.began.wait(30)
        texts = ["good", "bad", "fine"]
        others = [clients.submit(call, served.port, {"texts": [text]}) for text in texts]
        _until(lambda: waiting(served.port) == 3)
        stub.free.set()
        assert first.result()[0] == 200
        assert [one.result()[0] for one in others] == [200, 500, 200]
        counted = call(served.port, path="/metrics")[1].decode()
    assert 'metakd_requests_total{status="500"} 1.0' in counted


def test_what_has_begun_is_answered_before_it_stops():
    stub = Stub()
    with serving({"one": stub}) as served, ThreadPoolExecutor(1) as clients:
        asked = clients.submit(call, served.port, {"texts": ["a"]})
        assert stub.began.wait(30)
        served.running.should_exit = True
        time.sleep(0.3)
        stub.free.set()
        assert asked.result()[1]["answers"] == [{"prediction": "a"}]
        served.thread.join(30)
        with pytest.raises(ConnectionError):
            call(served.port, {"texts": ["b"]})


def test_the_command_serves_and_stops(student):  # noqa: F811
    command = [sys.executable, "-m", "metakd", "serve", str(student), "--port", "0"]
    command += ["--engine", "eager", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=unjoined())
    try:
        line = process.stdout.readline()
        port = int(re.fullmatch(r"student: http://127.0.0.1:(\d+)/predict\n", line)[1])
        assert call(port, path="/health")[1] == {"status": "ok", "domains": ["student"]}
        assert call(port, {"texts": TEXTS[:2]})[0] == 200
        with socket.create_server(("127.0.0.1", 0)) as taken:
            place = [str(student), "--port", str(taken.getsockname()[1])]
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
                patch.setattr(sys, "argv", ["metakd", "serve", *place, "--engine", "eager"])
                cli.main()
            assert end.value.code == 2
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (-signal.SIGTERM, 128 + signal.SIGTERM)


def test_students_have_the_names_of_their_domains(tmp_path):
    for name in ("run/students/row/books", "run/students/row/dvd", "other/kitchen"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "other/kitchen/onnx").mkdir()
    (tmp_path / "other/kitchen/onnx/config.json").write_text("{}")
    run, kitchen = tmp_path / "run", tmp_path / "other/kitchen"
    assert list(students_in([run])) == list(students_in([run / "students/row"])) == ["books", "dvd"]
    assert students_in([run, kitchen])["kitchen"] == kitchen
    assert students_in([kitchen / "onnx"]) == {"kitchen": kitchen / "onnx"}
    with pytest.raises(ConfigError, match="both called books"):
        students_in([run, run / "students/row/books"])
    with pytest.raises(CheckpointError, match="no such folder"):
        students_in([tmp_path / "nothing"])
    (run / "students/row 2").mkdir()
    with pytest.raises(ConfigError, match="several rows"):
        students_in([run])
