"""A file system that forgets what nobody synced: records what ``checkpoint.Disk`` is asked to do
and builds the states that a power failure may leave after any prefix of it.

A file's bytes are sure from the moment ``sync`` returned; before, they may be absent, zeroed or cut
at any length. An entry of a folder (a creation, a rename, a removal) is sure once that folder was
synced; before, any subset of a folder's waiting changes may have reached the disk, in their order,
each whole. Nothing else orders anything: syncing a file does not make its name sure, and syncing a
folder does not make the folder's own name sure.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from metakd.training.checkpoint import Disk


@dataclass(frozen=True)
class Change:
    """One thing done to the disk; paths are relative to the recorded folder."""

    kind: str  # folder, create, write, damage, sync, sync_folder, rename or remove
    path: str
    to: str = ""
    data: bytes = b""


class Recorder(Disk):
    """A disk that does what it is asked to and notes it.

    Args:
        base: the folder that holds everything; itself taken to be on the disk.
    """

    def __init__(self, base: Path):
        self.base = base
        self.changes: list[Change] = []

    def note(self, kind: str, path: Path, to: Path | None = None, data: bytes = b"") -> None:
        self.changes.append(Change(kind, self._name(path), self._name(to) if to else "", data))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.base))

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.note("folder", path)

    def create(self, path: Path) -> BinaryIO:
        file = super().create(path)
        self.note("create", path)
        return _RecordedFile(self, path, file)

    def sync(self, file: BinaryIO) -> None:
        self.note("sync", Path(file.name))

    def sync_folder(self, path: Path) -> None:
        self.note("sync_folder", path)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.note("rename", source, target)

    def remove(self, path: Path) -> None:
        inside = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
        for one in [*inside, path]:
            self.note("remove", one)
        super().remove(path)

    def damage(self, path: Path) -> None:
        """Not a request: the disk itself lost the first byte's lowest bit."""
        data = path.read_bytes()
        data = bytes([data[0] ^ 1]) + data[1:]
        path.write_bytes(data)
        self.note("damage", path, data=data)


class _RecordedFile:
    def __init__(self, recorder: Recorder, path: Path, file: BinaryIO):
        self.name = str(path)
        self._recorder, self._path, self._file = recorder, path, file

    def write(self, data) -> int:
        written = self._file.write(data)
        self._recorder.note("write", self._path, data=bytes(data[:written]))
        return written

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


def interleave(lanes: list[list[Change]], random_: random.Random) -> list[Change]:
    """What several processes did at the same time, as one sequence: each in its own order."""
    lanes, merged = [list(lane) for lane in lanes], []
    while lanes := [lane for lane in lanes if lane]:
        merged.append(random_.choice(lanes).pop(0))
    return merged


# ---- The model -----------------------------------------------------------------------------------


@dataclass(eq=False)
class _File:
    written: bytes = b""
    synced: bytes | None = None  # None: never


@dataclass(eq=False)
class _Folder:
    entries: dict[str, _File | _Folder] = field(default_factory=dict)  # what processes see
    on_disk: dict[str, _File | _Folder] = field(default_factory=dict)
    waiting: list[_EntryChange] = field(default_factory=list)


@dataclass(eq=False)
class _EntryChange:
    drop: str | None
    add: str | None
    node: _File | _Folder

    def apply(self, entries: dict) -> None:
        if self.drop is not None and entries.get(self.drop) is self.node:
            del entries[self.drop]
        if self.add is not None:
            entries[self.add] = self.node


State = dict[str, bytes | None]
"""What is on the disk: content by path, None for a folder."""


class Model:
    """The disk after a sequence of changes, and what a power failure would leave of it."""

    def __init__(self):
        self._root = _Folder()

    def do(self, change: Change) -> None:
        """Carry out one change."""
        folder, name = self._parent(change.path)
        node = folder.entries.get(name)
        match change.kind:
            case "folder" | "create":
                if node is None:
                    self._change(
                        folder, None, name, _Folder() if change.kind == "folder" else _File()
                    )
            case "write":
                node.written += change.data
            case "damage":
                node.written = node.synced = change.data
            case "sync":
                node.synced = node.written
            case "sync_folder":
                target = node if change.path != "." else self._root
                for waiting in target.waiting:
                    waiting.apply(target.on_disk)
                target.waiting.clear()
            case "rename":
                beside, to = self._parent(change.to)
                if beside is not folder:
                    raise ValueError(f"{change}: from one folder to another is not modelled")
                self._change(folder, name, to, node)
            case "remove":
                if node is not None:
                    self._change(folder, name, None, node)

    def _parent(self, path: str) -> tuple[_Folder, str]:
        folder = self._root
        *parents, name = Path(path).parts or ("",)
        for part in parents:
            folder = folder.entries[part]
        return folder, name

    def _change(self, folder: _Folder, drop: str | None, add: str | None, node) -> None:
        change = _EntryChange(drop, add, node)
        change.apply(folder.entries)
        folder.waiting.append(change)

    def crashes(self, random_: random.Random, samples: int) -> Iterator[State]:
        """States after a power failure now: nothing unsynced arrived, all of it did, and
        ``samples`` draws in between; some may be equal."""
        yield self._fallen(lambda: False, lambda file: file.synced or b"")
        yield self._fallen(lambda: True, lambda file: file.written)
        for _ in range(samples):
            share = random_.random()
            yield self._fallen(
                lambda share=share: random_.random() < share, lambda file: _torn(file, random_)
            )

    def _fallen(self, arrived, content) -> State:
        state: State = {}

        def walk(folder: _Folder, at: str) -> None:
            entries = dict(folder.on_disk)
            for change in folder.waiting:
                if arrived():
                    change.apply(entries)
            for name, node in entries.items():
                if isinstance(node, _Folder):
                    state[at + name] = None
                    walk(node, f"{at}{name}/")
                else:
                    state[at + name] = content(node)

        walk(self._root, "")
        return state


def _torn(file: _File, random_: random.Random) -> bytes:
    if file.synced == file.written:
        return file.written
    cut = random_.randrange(len(file.written) + 1)
    return random_.choice(
        [
            file.synced or b"",
            file.written,
            file.written[:cut],
            bytes(len(file.written)),
            file.written[:cut] + bytes(len(file.written) - cut),
        ]
    )


def materialise(state: State, base: Path) -> None:
    """Write a state into an empty folder."""
    for name, data in state.items():
        path = base / name
        if data is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.write_bytes(data)
