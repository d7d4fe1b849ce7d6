"""A headless Chromium to look at pages with, driven over its debugging pipe.

Nothing but the standard library: messages are JSON with a zero byte after each.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE = 60  # seconds for one answer, on busy cores


class Browser:
    """One tab.

    Args:
        profile: an empty folder that it may write to.
    """

    def __init__(self, profile: Path):
        executable = next(filter(None, map(shutil.which, _NAMES)), None)
        if executable is None:
            pytest.skip(f"no browser: none of {', '.join(_NAMES)}")
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        # Chromium reads descriptor 3 and writes 4: neither may be in use when they get there.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 64) for end in (commands, answers)]
        os.close(commands)
        os.close(answers)
        self._process = subprocess.Popen(
            [
                *(executable, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=(3, 4),
            preexec_fn=lambda: [os.dup2(end, number) for number, end in enumerate(ends, 3)],
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        self._numbers = itertools.count(1)
        self._received = b""
        self._session = None
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network"):
            self.call(f"{domain}.enable")

    def _next(self) -> dict:
        until = time.monotonic() + _PATIENCE
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._read], [], [], max(0, until - time.monotonic()))
            assert ready, f"the browser says nothing for {_PATIENCE} s"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser ended"
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        """The result of one command of the DevTools protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Load a page at a width in CSS pixels in a light or dark scheme, and wait for it."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str):
        """The JSON value of a JavaScript expression in the page; None where it has none."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def requests(self) -> list[str]:
        """What was asked for since ``open``."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def screenshot(self, path: Path) -> None:
        """What is in view, as PNG."""
        found = self.call("Page.captureScreenshot")
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """End the browser."""
        self.call("Browser.close")
        self._process.wait(_PATIENCE)
        os.close(self._read)
        os.close(self._write)
