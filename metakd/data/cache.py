"""Tensors kept between runs: verified before they are used, and never more than a shortcut.

One safetensors file per name, which holds the key of what it was made from and a SHA-256 over all
it says. A file that is damaged or could have been written by someone else is not used, and a folder
that cannot be written to costs a line and nothing else: callers make the tensors anew. Folders are
for their owner alone (0700), files too (0600). Files are written aside and renamed into place, so
that several writers at once are safe; the last one's file stays. What is larger than memory is
written in parts (``Draft``) and read where it lies (``get(..., mapped=True)``).
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorCache:
    """The cached tensors of one folder.

    Args:
        folder: made when something is first put into it.
        say: tells a person why a file was not used or not written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder = folder
        self.say = say

    def get(
        self, name: str, key: str, mapped: bool = False
    ) -> tuple[dict[str, Tensor], dict] | None:
        """What ``put`` or a ``Draft`` was given under this name and key; None where it has to be
        made anew.

        Args:
            name: of the file, without its suffix.
            key: of what it was made from.
            mapped: leave floating-point tensors in the file, memory-mapped, not to be written to.
                All of it is read once for its digest all the same.
        """
        path = self._path(name)
        try:
            # A link could lead to a file of anyone's.
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    self.say(f"{path}: another user could have written it; made anew")
                    return None
                data = _mapped(file) if mapped else file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.say(f"{path}: {error.strerror}; made anew")
            return None
        try:
            length = int.from_bytes(data[:8], "little")
            fields = json.loads(data[8 : 8 + length])
            header = fields["__metadata__"]
            if header["key"] != key:  # made from other inputs, which is nothing to talk about
                return None
            tensors = _views(data, fields, 8 + length) if mapped else load(data)
            if header["sha256"] != _digest(key, header["described"], tensors):
                raise ValueError("its digest is another")
            return tensors, json.loads(header["described"])
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError):
            self.say(f"{path}: damaged; made anew")
            return None

    def put(self, name: str, key: str, tensors: dict[str, Tensor], described: dict) -> None:
        """Keep tensors, and beside them what JSON can hold, for callers that know ``key``."""
        text = json.dumps(described)
        header = {"key": key, "described": text, "sha256": _digest(key, text, tensors)}
        data = save(tensors, metadata=header)
        aside = None
        try:
            private_folder(self.folder)
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

    def draft(self, name: str, key: str, dtype: torch.dtype, shape: Sequence[int]) -> Draft:
        """A tensor that is to be written in parts; ``get`` will find it as ``Draft.TENSOR``."""
        return Draft(self._path(name), key, dtype, shape)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class Draft:
    """One large tensor on its way into a cache: written in parts, by one process or by several on
    one file system, and out of sight until it is published.

    One process calls ``reserve`` before anyone writes, and ``publish`` after everyone has closed.
    Unlike ``TensorCache.put`` nothing fails silently: methods raise ``OSError``.

    Args:
        path: where it will be.
        key: of what it is made from.
        dtype: floating point.
        shape: [rows, ...].
    """

    TENSOR = "values"

    def __init__(self, path: Path, key: str, dtype: torch.dtype, shape: Sequence[int]):
        self._path = path
        # One name for good: what a killed process has left is replaced, and does not pile up.
        self._aside = path.with_name(f".tmp-{path.name}")
        self._key = key
        self._row_bytes = prod(shape[1:]) * dtype.itemsize
        self.nbytes = shape[0] * self._row_bytes
        self._field = {
            "dtype": next(name for name, kind in _DTYPES.items() if kind == dtype),
            "shape": list(shape),
            "data_offsets": [0, self.nbytes],
        }
        self._start = len(self._header("0" * 64))
        self._file: int | None = None

    def _header(self, sha256: str) -> bytes:
        metadata = {"key": self._key, "described": "{}", "sha256": sha256}
        text = json.dumps({"__metadata__": metadata, self.TENSOR: self._field}).encode()
        text += b" " * (-len(text) % 8)  # values start where any dtype may
        return len(text).to_bytes(8, "little") + text

    def reserve(self) -> None:
        """Room on the disk for all of it, so that a full one shows at once."""
        private_folder(self._path.parent)
        self._aside.unlink(missing_ok=True)
        file = os.open(self._aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            os.posix_fallocate(file, 0, self._start + self.nbytes)
        finally:
            os.close(file)

    def write(self, first: int, rows: Tensor) -> None:
        """Rows [n, ...] on the CPU, to stand from row ``first`` on."""
        if self._file is None:
            self._file = os.open(self._aside, os.O_WRONLY | os.O_NOFOLLOW)
        data = memoryview(rows.contiguous().flatten().view(torch.uint8).numpy())
        place = self._start + first * self._row_bytes
        while len(data):
            written = os.pwrite(self._file, data, place)
            data, place = data[written:], place + written

    def close(self) -> None:
        """All that this process wrote is on the disk."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def publish(self) -> None:
        """Hash it, and put it in its place."""
        with self._aside.open("r+b") as file:
            fields = {self.TENSOR: self._field}
            values = _views(_mapped(file), fields, self._start)
            file.write(self._header(_digest(self._key, "{}", values)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._aside, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Remove what was not published."""
        with suppress(OSError):
            self.close()
        with suppress(OSError):
            self._aside.unlink()


def private_folder(folder: Path) -> None:
    """Make a folder that is for its owner alone, or see that it is one.

    Raises:
        OSError: it cannot be made, or belongs to another user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "not a folder of this user's", str(folder))
    folder.chmod(0o700)


def _mapped(file: BinaryIO) -> mmap.mmap | bytes:
    size = os.fstat(file.fileno()).st_size
    return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""


def _views(data: mmap.mmap | bytes, fields: dict, start: int) -> dict[str, Tensor]:
    """The tensors of a safetensors file where they lie: ``fields`` of its header, and the offset
    behind it."""
    found, last = {}, 0
    for name, field in fields.items():
        if name == "__metadata__":
            continue
        begin, end = field["data_offsets"]
        last = max(last, end)
        dtype = _DTYPES[field["dtype"]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they cannot be written to, which nobody does
            flat = torch.frombuffer(
                data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin
            )
        found[name] = flat.view(field["shape"])
    if start + last != len(data):
        raise ValueError("its tensors do not fill it")
    return found


def _digest(key: str, described: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([key, described]).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
