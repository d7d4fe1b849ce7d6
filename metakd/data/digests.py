"""Size and SHA-256 of files: noted as they are written, compared before they are relied on; and
the key of what something was made from.

Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO, TypedDict

from metakd.errors import CheckpointError


class Entry(TypedDict):
    """What is noted of a file."""

    sha256: str
    size: int  # bytes


def entry_of(file: BinaryIO) -> Entry:
    """The entry of an open file, which is read from its start to its end."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "size": file.tell()}


def is_entry(value) -> bool:
    """Has a value that was read from JSON the form of an ``Entry``?"""
    return (
        isinstance(value, dict)
        and isinstance(value.get("size"), int)
        and isinstance(value.get("sha256"), str)
    )


def check_size(path: Path, entry: Entry) -> None:
    """See that a file is there and of its size, without reading it.

    Raises:
        CheckpointError: it is not.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    if (size := path.stat().st_size) != entry["size"]:
        raise CheckpointError(f"{path}: has {size} bytes, was written with {entry['size']}")


def check_content(path: Path, entry: Entry) -> None:
    """Read a file and compare its digest.

    Raises:
        CheckpointError: it is another.
    """
    with path.open("rb") as file:
        if entry_of(file)["sha256"] != entry["sha256"]:
            raise CheckpointError(f"{path}: was changed after it was written")


def content_key(*parts: str | bytes | Path) -> str:
    """SHA-256 over texts and the content of files and folders, hidden files left out.

    Every part is preceded by its kind and length, so that no two lists of parts read alike.
    """
    digest = hashlib.sha256()

    def add(data: bytes) -> None:
        digest.update(len(data).to_bytes(8, "little") + data)

    for part in parts:
        if not isinstance(part, Path):
            add(part.encode() if isinstance(part, str) else part)
            continue
        files = sorted(part.rglob("[!.]*")) if part.is_dir() else [part]
        for file in filter(Path.is_file, files):
            add(str(file.relative_to(part)).encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
