"""Loads a server with everything at once and counts what comes back: ``python tests/soak.py
[STUDENT] --seconds 300 --out FILE`` (``make soak``).

Clients that ask properly and check each answer, hostile bodies, clients that stop half way, clients
that leave before the answer, and bursts of more than may wait, all for as long as it lasts. Every
request must get the status that is its due, every proper one the right answer or, under a burst,
503 or 504; the server's memory must stop growing, and it must end cleanly. The exit code is 1
otherwise.
STUDENT is a folder; without it a student with random weights is made.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from processes import unjoined
from test_deploy import TEXTS, random_student
from test_server import HOSTILE, SLOW, call, received

from metakd.deploy import Predictor

WAITING, SECONDS = 64, 3.0
LATER = (503, 504)  # what too much at once is answered


def resident(pid: int) -> float:
    """MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


class Soak:
    """What each kind of client met, by kind and outcome."""

    def __init__(self, port: int, wanted: list[dict], seconds: float):
        self.port, self.wanted = port, wanted
        self.end = time.monotonic() + seconds
        self.met: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []

    def until_the_end(self, kind: str, once) -> threading.Thread:
        def work() -> None:
            while time.monotonic() < self.end:
                try:
                    self.met[kind, once()] += 1
                except Exception as error:
                    self.met[kind, "failed"] += 1
                    self.wrong.append(f"{kind}: {type(error).__name__}: {error}")

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def proper(self) -> str:
        start = random.randrange(len(TEXTS))
        part = slice(start, start + random.randint(1, 8))
        status, said, _ = call(self.port, {"texts": TEXTS[part]})
        if status in LATER:
            time.sleep(0.2)
            return str(status)
        assert status == 200, said
        for given, wanted in zip(said["answers"], self.wanted[part], strict=True):
            assert given["prediction"] == wanted["prediction"]
            assert abs(given["score"] - wanted["score"]) < 1e-5
        return "200, right"

    def hostile(self) -> str:
        body, wanted = HOSTILE[random.choice(sorted(HOSTILE))]
        time.sleep(0.02)
        with suppress(ConnectionError):
            status, _, _ = call(self.port, body)
            if status in LATER:
                return str(status)
            # What is too much for the little server of the tests is not for this one.
            assert status in (wanted, 200, 400, 413), f"{status}, not {wanted}"
            return str(status)
        return "hung up on after 413"

    def slow(self) -> str:
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as client:
            client.sendall(SLOW[random.choice(["says nothing", "half a head", "half a body"])])
            said = client.recv(65536)
            assert b" 408 " in said or b" 503 " in said, said
            return said.split()[1].decode()

    def leaving(self) -> str:
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as client:
            body = json.dumps({"texts": TEXTS[:4]}).encode()
            head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            client.sendall(head + body[: random.randint(0, len(body))])
            time.sleep(random.random() * 0.05)
        return "left"

    def burst(self) -> str:
        """Forty times ten texts at once, where 64 may wait."""
        clients = []
        body = json.dumps({"texts": TEXTS[:10]}).encode()
        head = (
            b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        )
        for _ in range(40):
            client = socket.create_connection(("127.0.0.1", self.port), timeout=60)
            client.sendall(head % len(body) + body)
            clients.append(client)
        for client in clients:
            status = received(client).split()[1].decode()
            client.close()
            assert int(status) in (200, *LATER), status
            self.met["burst", status] += 1
        time.sleep(1.0)
        return "bursts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        student = options.student or random_student(Path(folder) / "student")
        wanted = [a.fields() for a in Predictor(student, engine="eager", threads=1)(TEXTS)]
        command = [sys.executable, "-m", "metakd", "serve", str(student), "--port", "0"]
        command += ["--engine", "eager", "--threads", "1"]
        command += ["--max-waiting", str(WAITING), "--max-seconds", str(SECONDS)]
        log = Path(folder) / "log"
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=unjoined()
        )
        port = int(re.search(r":(\d+)/", process.stdout.readline())[1])
        soak = Soak(port, wanted, options.seconds)
        kinds = [*[("proper", soak.proper)] * 8, *[("hostile", soak.hostile)] * 2]
        kinds += [*[("slow", soak.slow)] * 4, ("leaving", soak.leaving), ("burst", soak.burst)]
        threads = [soak.until_the_end(kind, once) for kind, once in kinds]
        memory = []
        while time.monotonic() < soak.end:
            time.sleep(options.seconds / 30)
            memory.append(resident(process.pid))
        for thread in threads:
            thread.join()
        after = call(port, {"texts": TEXTS})
        if [one["prediction"] for one in after[1]["answers"]] != [
            one["prediction"] for one in wanted
        ]:
            soak.wrong.append("after all that: other answers")
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        said = log.read_text()
    if "Traceback" in said:
        soak.wrong.append(f"the server said: {said[-2000:]}")
    # What is in flight makes peaks; what stays is the floor between them.
    floors = [min(memory[start : start + 10]) for start in (0, 10, 20)]
    if floors[2] - floors[1] > 10:
        soak.wrong.append(f"memory grew over the last third: {floors} MiB")
    lines = ["# Soak", "", __doc__.split("\n\n")[1].strip(), ""]
    lines += [
        f"{options.seconds:.0f} s; at most {WAITING} texts may wait, {SECONDS:g} s for a request "
        "to arrive and to be computed.",
        "",
        "| clients | met | times |",
        "|---|---|---:|",
    ]
    lines += [f"| {kind} | {what} | {count} |" for (kind, what), count in sorted(soak.met.items())]
    lines += [
        "",
        "Memory of the server in MiB, by thirtieths of the time: "
        + ", ".join(f"{m:.0f}" for m in memory),
        "",
        f"Failures: {len(soak.wrong)}",
    ]
    page = "\n".join([*lines, *soak.wrong[:20]]) + "\n"
    print(page)
    if options.out:
        options.out.write_text(page)
    sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    main()
