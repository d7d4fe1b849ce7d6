"""Checkpoints of a training run: written aside, hashed, published by one rename, verified before a
tensor moves.

Save: every rank writes its files into ``.tmp-<tag>-<nonce>/`` and hashes them on the way to the
disk; if all ranks succeeded, the first writes ``MANIFEST.json`` (size and SHA-256 of every file,
world size, position, ...) and renames the folder to its tag; otherwise nobody publishes and the old
tags stay. Only then do the pointer and the rotation follow. A folder without a dot in front of its
name is therefore always a whole checkpoint, whatever was killed in between. No step relies on an
earlier one that a power failure could still undo: what was created is synced with the folder that
holds it before the rename, and a tag is out of sight on the disk before its files go.

Load: the newest tag whose manifest and files verify, agreed by all ranks. ``safe_load`` is the only
reader of pickled files: it builds tensors, numbers and DeepSpeed's own scalars, and runs nothing.

DeepSpeed contributes its shards through ``HashedFiles``, which takes the place of its file writer:
a full disk on one rank becomes an answer in the agreement and not an exception between collectives.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from metakd.data.digests import Entry, check_content, check_size, is_entry
from metakd.errors import CheckpointError
from metakd.training.world import World

MANIFEST = "MANIFEST.json"
POINTER = "latest"
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ALLOWED = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
_READ_AT_ONCE = 1 << 20


# ---- Files ---------------------------------------------------------------------------------------


class Disk:
    """Every change that a checkpoint makes to the file system, so that a test can record them and
    replay a crash after each."""

    def make_folder(self, path: Path) -> None:
        """Create a folder in one that exists; it may exist itself."""
        path.mkdir(exist_ok=True)

    def create(self, path: Path) -> BinaryIO:
        """A new, empty, unbuffered file."""
        return path.open("xb", buffering=0)

    def sync(self, file: BinaryIO) -> None:
        """Wait until the file's content is on the disk."""
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Wait until the folder's entries are on the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename; a file replaces its target at once."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder and what is in it; what cannot be removed stays."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


class _Hashing(io.RawIOBase):
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO, beat: Callable[[], None]):
        self._file = file
        self._beat = beat
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += self._file.write(view[written:])
        self.digest.update(view)
        self.size += len(view)
        self._beat()
        return len(view)


class HashedFiles(CheckpointEngine):
    """This rank's files of one checkpoint: hashed while written, synced, and the first failure
    kept instead of raised, so that every rank goes on to the agreement.

    Args:
        folder: the unpublished folder they go to.
        disk: see ``Disk``.
        beat: called whenever a part has been written; a large file takes a while.
    """

    def __init__(self, folder: Path, disk: Disk, beat: Callable[[], None] = lambda: None):
        self.folder = folder
        self.disk = disk
        self._beat = beat
        self.entries: dict[str, Entry] = {}
        self.problem: str | None = None

    def write(self, name: str, produce: Callable[[BinaryIO], Any]) -> None:
        """Write one file by ``produce(file)``."""
        if self.problem is not None:
            return
        path = self.folder / name
        try:
            self._make_folder(path.parent)
            with self.disk.create(path) as raw:
                file = _Hashing(raw, self._beat)
                produce(file)
                self.disk.sync(raw)
            self.disk.sync_folder(path.parent)
            self.entries[name] = {"sha256": file.digest.hexdigest(), "size": file.size}
        except (OSError, RuntimeError) as error:  # torch's writer raises the second for the first
            cause = error.__cause__ or error.__context__ or error
            self.problem = f"{path}: {str(cause).splitlines()[0]}"

    def _make_folder(self, path: Path) -> None:
        if not path.is_dir():
            self._make_folder(path.parent)
            self.disk.make_folder(path)
            # Of several ranks the one that made it waits for the disk before the agreement.
            self.disk.sync_folder(path.parent)

    # DeepSpeed's side.

    def create(self, info) -> None:
        """Nothing to prepare."""

    def commit(self, info) -> None:
        """Nothing to do: ``Checkpoints.save`` publishes."""

    def makedirs(self, path, exist_ok=False) -> None:
        """Folders come with their files."""

    def save(self, state_dict, path: str) -> None:
        """Write one of DeepSpeed's files."""
        name = str(Path(path).relative_to(self.folder))
        self.write(name, lambda file: torch.save(state_dict, file))

    def load(self, path: str, map_location=None):
        """Read one of DeepSpeed's files."""
        return safe_load(Path(path), map_location)


def safe_load(path: Path, map_location="cpu") -> Any:
    """Read a file that ``torch.save`` wrote, without running anything in it.

    Raises:
        CheckpointError: it cannot be read, or holds more than tensors, plain values and DeepSpeed's
            loss scalers.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise CheckpointError(
            f"{path}: {str(error).splitlines()[0]}", "remove this checkpoint; an older one is used"
        ) from error


def checked_tag(tag: str) -> str:
    """``tag`` itself.

    Raises:
        CheckpointError: it is not a plain name, so it might lead out of the folder.
    """
    if not _TAG.fullmatch(tag):
        raise CheckpointError(
            f"tag {tag!r} is not a name of letters, digits, dot, dash and underscore",
            "name a folder under checkpoints, or auto",
        )
    return tag


# ---- Tags ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tag:
    """A published checkpoint: its folder and what its manifest says."""

    folder: Path
    facts: dict

    @property
    def order(self) -> tuple[int, int]:
        """Later is larger: phase of the stage, optimizer step."""
        return self.facts["phase"], self.facts["step"]


@dataclass
class Checkpoints:
    """The checkpoints of one stage.

    Args:
        root: folder that holds the tags; all hosts must share it.
        world: the processes that train together.
        keep: published tags that stay, the newest ones (``save_total_limit``).
        say: tells a person, called on the first rank.
        disk: see ``Disk``.
    """

    root: Path
    world: World
    keep: int = 2
    say: Callable[[str], None] = print
    disk: Disk = field(default_factory=Disk)

    def save(self, tag: str, write: Callable[[HashedFiles], None], facts: dict) -> Path:
        """Publish a checkpoint, or leave everything as it was.

        Args:
            tag: its name.
            write: writes this rank's files; called on every rank, must not raise on a single one.
            facts: for the manifest, the same on every rank; ``phase`` and ``step`` order the tags.

        Raises:
            CheckpointError: some rank could not write; raised on every rank.
        """
        target = self.root / checked_tag(tag)
        nonce = self.world.agree(secrets.token_hex(4))
        folder = self.root / f".tmp-{tag}-{nonce}"
        progress = self.world.progress
        files = HashedFiles(folder, self.disk, lambda: progress.beat(f"checkpoint {tag}"))
        write(files)
        told = self.world.gather((files.entries, files.problem))
        problem = next((f"rank {r}: {text}" for r, (_, text) in enumerate(told) if text), None)
        if problem is None and self.world.is_main:
            entries = {name: entry for own, _ in told for name, entry in own.items()}
            problem = self._publish(folder, target, entries, facts)
        problem = self.world.agree(problem)
        if problem is not None:
            if self.world.is_main:
                self.disk.remove(folder)
            raise CheckpointError(
                f"checkpoint {tag} was not written: {problem}",
                "older checkpoints are intact; make room, then go on with --resume auto",
            )
        return target

    def _publish(self, folder: Path, target: Path, entries: dict, facts: dict) -> str | None:
        absent = [name for name in entries if not (folder / name).exists()]
        if absent:
            return f"{folder / absent[0]}: written by another host, which does not share this disk"
        manifest = {
            **facts,
            "tag": target.name,
            "world_size": self.world.size,
            "files": entries,
        }
        manifest["sha256"] = _manifest_digest(manifest)
        last = HashedFiles(folder, self.disk)
        last.write(MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        if last.problem is not None:
            return last.problem
        aside = self.root / f".tmp-{target.name}-{secrets.token_hex(4)}"
        try:
            if target.exists():  # the same step again, after a fall back to an older tag
                self.disk.rename(target, aside)
            self.disk.rename(folder, target)
            self.disk.sync_folder(self.root)
        except OSError as error:
            if not target.exists():
                with suppress(OSError):
                    self.disk.rename(aside, target)
            return f"{target}: {error.strerror}"
        try:
            self._point_at(target.name)
            self._rotate(Tag(target, manifest))
        except OSError as error:  # the checkpoint stands, that is what was asked for
            self.say(f"warning: {self.root}: could not be tidied up: {error.strerror}")
        return None

    def _point_at(self, tag: str) -> None:
        """Name the newest tag in a file: a convenience for people, loading looks at the tags."""
        pointer = HashedFiles(self.root, self.disk)
        aside = f".tmp-{POINTER}-{secrets.token_hex(4)}"
        pointer.write(aside, lambda file: file.write(tag.encode()))
        if pointer.problem is not None:
            self.say(f"warning: {pointer.problem}")
            return
        self.disk.rename(self.root / aside, self.root / POINTER)
        self.disk.sync_folder(self.root)

    def _rotate(self, newest: Tag) -> None:
        tags = sorted(self.tags(), key=lambda tag: tag.order)
        # What claims to be later is left from a run that was taken up again before it.
        given_up = [tag for tag in tags if tag.order > newest.order]
        kept = [tag for tag in tags if tag.order <= newest.order]
        for tag in given_up + kept[: -self.keep]:
            self.disk.rename(tag.folder, self.root / f".gone-{secrets.token_hex(4)}")
        # Half a removed folder must not pass for a damaged checkpoint, nor come back as one.
        self.disk.sync_folder(self.root)
        for left in self.root.iterdir():
            if left.name.startswith((".tmp-", ".gone-")):
                self.disk.remove(left)

    def _finish_renames(self) -> None:
        """Publish what was whole already when its process was killed before the last rename; while
        a tag is replaced, nothing else may be there."""
        for folder in sorted(self.root.glob(".tmp-*")):
            with suppress(CheckpointError, OSError):
                tag = _open(folder, hidden=True)
                target = self.root / checked_tag(tag.facts["tag"])
                if not os.path.lexists(target):
                    verify(tag)
                    self.disk.rename(folder, target)
                    self.disk.sync_folder(self.root)

    def tags(self) -> list[Tag]:
        """Published tags with a readable manifest, in no order; their files are not checked."""
        found = []
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            if _TAG.fullmatch(folder.name):
                with suppress(CheckpointError):
                    found.append(_open(folder))
        return found

    def is_empty(self) -> bool:
        """Is there nothing that was ever published here?"""
        return not self.root.is_dir() or not any(
            not path.name.startswith(".") for path in self.root.iterdir()
        )

    def find(self, resume: str) -> Tag | None:
        """The checkpoint to go on from, the same on every rank; None to start afresh.

        Args:
            resume: ``auto`` for the newest that verifies, or a tag, which never falls back to
                another.

        Raises:
            CheckpointError: the tag is absent or damaged; or ``auto`` and there are checkpoints of
                which none verifies.
        """
        if resume != "auto":
            checked_tag(resume)
        self.world.on_first(self._finish_renames)
        if resume != "auto":
            folder = self.root / resume
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: no such checkpoint", self._known())
            return self._verified(_open(folder))
        names = [] if self.is_empty() else sorted(p.name for p in self.root.iterdir())
        # The first rank lists, so that all try the same tags in the same order.
        listed = self.world.agree(
            [tag.folder.name for tag in sorted(self.tags(), key=lambda t: t.order, reverse=True)]
        )
        damaged = self.world.agree(
            [n for n in names if _TAG.fullmatch(n) and n != POINTER and n not in listed]
        )
        for name in damaged:
            self._tell(f"warning: checkpoint {name} has no valid manifest and is not used")
        for name in listed:
            try:
                tag = self._verified(_open(self.root / name))
            except CheckpointError as error:
                self._tell(f"warning: checkpoint {name} is damaged and not used: {error.cause}")
                continue
            self._check_pointer(name)
            return tag
        if self.world.agree(not names):
            return None
        raise CheckpointError(
            f"{self.root}: none of the checkpoints is whole",
            "restore one, or start afresh with --resume never",
        )

    def _verified(self, tag: Tag) -> Tag:
        """The tag, after all its files were read and found unchanged; ranks share the work."""
        problem = None
        try:
            verify(tag, share=(self.world.rank, self.world.size))
        except CheckpointError as error:
            problem = error.cause
        except OSError as error:
            problem = f"{tag.folder}: cannot be read ({error})"
        told = [text for text in self.world.gather(problem) if text]
        if told:
            raise CheckpointError(told[0], self._known())
        return tag

    def _check_pointer(self, newest: str) -> None:
        pointer = self.root / POINTER
        named = pointer.read_bytes().decode(errors="replace") if pointer.is_file() else "nothing"
        if named != newest:
            self._tell(f"warning: {pointer} names {named!r}; going on from {newest}, the newest")

    def _known(self) -> str:
        names = [t.folder.name for t in sorted(self.tags(), key=lambda t: t.order)]
        return f"there are: {', '.join(names)}" if names else "start with --resume never"

    def _tell(self, text: str) -> None:
        if self.world.is_main:
            self.say(text)


def _manifest_digest(manifest: dict) -> str:
    told = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _open(folder: Path, hidden: bool = False) -> Tag:
    """A checkpoint by its manifest; its files are not checked.

    Args:
        folder: of the checkpoint.
        hidden: is it one that does not bear the name of its tag (yet)?

    Raises:
        CheckpointError: there is no manifest, or not the one that was written here.
    """
    path = folder / MANIFEST
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: is missing, or no plain file")
    try:
        manifest = json.loads(path.read_bytes())
        whole = (
            manifest["sha256"] == _manifest_digest(manifest)
            and isinstance(manifest["tag"], str)
            and all(isinstance(manifest[name], int) for name in ("phase", "step"))
            and all(map(is_entry, manifest["files"].values()))
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not whole:
        raise CheckpointError(f"{path}: was changed after it was written")
    if not hidden and manifest["tag"] != folder.name:
        raise CheckpointError(f"{path}: is the manifest of {manifest['tag']}")
    return Tag(folder, manifest)


def verify(tag: Tag, share: tuple[int, int] = (0, 1)) -> None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        tag: the checkpoint.
        share: rank and world size; each rank reads its share of the files.

    Raises:
        CheckpointError: a file is missing, extra, of another size or of other content.
    """
    wanted = tag.facts["files"]
    present = {
        str(path.relative_to(tag.folder)): path
        for path in tag.folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    for name in sorted(wanted.keys() | present.keys() - {MANIFEST}):
        path = tag.folder / name
        if name not in present:
            raise CheckpointError(f"{path}: is missing")
        if name not in wanted or path.is_symlink():
            raise CheckpointError(f"{path}: does not belong to the checkpoint")
        check_size(path, wanted[name])
    rank, size = share
    for name in sorted(wanted)[rank::size]:
        check_content(tag.folder / name, wanted[name])


# ---- Random numbers ------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict:
    """The state of every random generator of this process, as tensors and plain numbers."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, torch.tensor(numbers, dtype=torch.int64), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict, device: torch.device) -> None:
    """Put back what ``random_state`` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
