"""Tensors kept between runs: verified before they are used, and never more than a shortcut.

One safetensors file per name, which holds the key of what it was made from and a SHA-256 over all
it says. A file that is damaged or could have been written by someone else is not used, and a folder
that cannot be written to costs a line and nothing else: callers make the tensors anew. Folders are
for their owner alone (0700), files too (0600). Files are written aside and renamed into place, so
that several writers at once are safe; the last one's file stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor


class TensorCache:
    """The cached tensors of one folder.

    Args:
        folder: made when something is first put into it.
        say: tells a person why a file was not used or not written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder = folder
        self.say = say

    def get(self, name: str, key: str) -> tuple[dict[str, Tensor], dict] | None:
        """What ``put`` was given under this name and key; None where it has to be made anew."""
        path = self._path(name)
        try:
            # A link could lead to a file of anyone's.
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    self.say(f"{path}: another user could have written it; made anew")
                    return None
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.say(f"{path}: {error.strerror}; made anew")
            return None
        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])["__metadata__"]
            if header["key"] != key:  # made from other inputs, which is nothing to talk about
                return None
            tensors = load(data)
            if header["sha256"] != _digest(key, header["described"], tensors):
                raise ValueError("its digest is another")
            return tensors, json.loads(header["described"])
        except (SafetensorError, ValueError, KeyError, TypeError):
            self.say(f"{path}: damaged; made anew")
            return None

    def put(self, name: str, key: str, tensors: dict[str, Tensor], described: dict) -> None:
        """Keep tensors, and beside them what JSON can hold, for callers that know ``key``."""
        text = json.dumps(described)
        header = {"key": key, "described": text, "sha256": _digest(key, text, tensors)}
        data = save(tensors, metadata=header)
        aside = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                self.say(f"{self.folder}: not a folder of this user's; nothing is cached")
                return
            self.folder.chmod(0o700)
            descriptor, aside = tempfile.mkstemp(dir=self.folder, prefix=".tmp-")  # mode 0600
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self._path(name))
        except OSError as error:
            self.say(f"{self.folder}: {error.strerror}; nothing is cached")
            if aside is not None:
                Path(aside).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _digest(key: str, described: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([key, described]).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
