"""Finished stages on disk: each is a folder with the digests of its inputs and of its files.

It is built aside and renamed into place, so that a folder of the run directory either holds a
finished stage or does not exist; a stage whose inputs have not changed is not built again. What an
interrupted build left aside, its checkpoints above all, is taken up if the inputs are the same.
The checkpoints go last of all, when the finished stage is in its place and on the disk.

A stage that is skipped must still have its files, in the sizes they were published with; before
they are read their contents are compared as well (``checked``).
"""

from __future__ import annotations

import hashlib
import json
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from metakd.data.digests import Entry, entry_of
from metakd.errors import CheckpointError
from metakd.pipeline.published import (
    INPUTS,
    LOG,
    RECORD,
    check_files,
    check_folder,
    is_recorded,
    read_record,
)
from metakd.training.checkpoint import Checkpoints, Disk, HashedFiles
from metakd.training.saves import Saves
from metakd.training.world import World

CHECKPOINTS = "checkpoints"
_ALWAYS_KEPT = (LOG, INPUTS)
_OF_WHO_ASKED = ("_finished", "_took", "_asked", "_whole")


@dataclass
class StageStore:
    """The stages of one run directory.

    Args:
        folder: the run directory.
        world: from ``join_world``; the first rank writes, all ranks get the result.
        common: inputs that every stage shares, as JSON values.
        command: recorded with every stage.
        say: tells a person what happens.
        may_build: False makes a stage that is missing or out of date an error.
        resume: ``auto`` goes on from the newest valid checkpoint of an interrupted build, a tag
            from that one (the first stage that is built; the others go on as with ``auto``),
            ``never`` starts every build afresh.
        reshard: see ``engine.Saves``.
        keep: checkpoints that stay on the disk while a stage is built.
        disk: see ``checkpoint.Disk``.
        look_ahead: called on every rank before a stage is built, with what its record is to keep.
    """

    folder: Path
    world: World
    common: dict
    command: str
    say: Callable[[str], None]
    may_build: bool = True
    resume: str = "auto"
    reshard: bool = False
    keep: int = 2
    disk: Disk = field(default_factory=Disk)
    look_ahead: Callable[[], dict] = dict
    _finished: dict[Path, dict] = field(default_factory=dict, repr=False)
    _took: dict[Path, float] = field(default_factory=dict, repr=False)
    _asked: dict[Path, tuple[str, bool]] = field(default_factory=dict, repr=False)
    _whole: set[Path] = field(default_factory=set, repr=False)

    def result(self, place: Path) -> dict:
        """The result of a stage that this process has asked for."""
        return self._finished[place]

    def seconds(self, place: Path) -> float:
        """That its building took, whenever that was, from its last start on."""
        return self._took[place]

    def forget(self) -> None:
        """Look everything up again: processes that meet must have asked for the same stages."""
        for name in _OF_WHO_ASKED:
            getattr(self, name).clear()

    def afresh(self, say: Callable[[str], None]) -> StageStore:
        """The same, that nobody has asked for anything, builds nothing, and tells someone else."""
        nothing = {name: type(getattr(self, name))() for name in _OF_WHO_ASKED}
        return replace(self, say=say, may_build=False, **nothing)

    def asked(self) -> dict[Path, str]:
        """Stages that this process has asked for, and the digests of their inputs."""
        return {place: digest for place, (digest, _) in self._asked.items()}

    def get(
        self, place: Path, inputs: dict, build: Callable[[Path, Saves], dict], keep: bool = True
    ) -> dict:
        """Build ``place`` unless it was built from these very inputs, and return its result.

        Args:
            place: folder of the stage, under the run directory.
            inputs: everything that decides the result, as JSON values.
            build: writes into the folder it is given and returns the result, going on from the
                checkpoints it is given; called on every rank.
            keep: keep the files ``build`` wrote; False leaves the result and the log alone.

        Raises:
            CheckpointError: it would have to be built and may not, or there is nothing to go on
                from where that was asked for; or its files, which are to be kept, are not all there
                in the sizes they were published with.
        """
        digest = self.digest(inputs)
        # What was asked for without its files may have none.
        if self._asked.get(place) not in ((digest, keep), (digest, True)):
            self._finished[place] = self._look_up_or_build(place, digest, build, keep)
            self._asked[place] = digest, keep
        return self._finished[place]

    def has(self, place: Path, inputs: dict, keep: bool = True) -> bool:
        """Would ``get`` find what it is asked for?"""
        return _serves(self._stored(place), self.digest(inputs), keep)

    def checked(self, place: Path) -> Path:
        """``place``, a finished stage whose files are about to be read, after their contents were
        compared with what was published: once, as a teacher may be asked for by many students.

        Called on every rank; the first one reads.

        Raises:
            CheckpointError: a file is missing or was changed; on every rank.
        """
        if place not in self._whole:
            self._on_first(lambda: check_folder(place))
            self._whole.add(place)
        return place

    def digest(self, inputs: dict) -> str:
        """Of all that decides the result of a stage with these inputs."""
        described = json.dumps({**self.common, **inputs}, sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def _stored(self, place: Path) -> dict:
        needed = "inputs", "kept", "seconds", "result"
        return self.world.agree(self.world.on_first(lambda: read_record(place, *needed)))

    def _look_up_or_build(self, place, digest, build, keep) -> dict:
        name = str(place.relative_to(self.folder))
        stored = self._stored(place)
        if _serves(stored, digest, keep):
            if keep:
                self._on_first(lambda: check_files(place, stored, contents=False))
            self._on_first(lambda: self._tidy(place))
            self.say(f"{name}: inputs unchanged, skipped")
            self._took[place] = stored["seconds"]
            return stored["result"]
        if not self.may_build:
            state = "was built from other inputs" if stored else "is missing"
            raise CheckpointError(f"{place}: {state}", "build it first: metakd run")
        noted = self.look_ahead()
        self.say(f"{name}: running")
        building = place.with_name(f".tmp-{place.name}")
        self._on_first(lambda: self._prepare(building, digest))
        saves = self._open_saves(building, digest)
        since = time.perf_counter()
        result = self.world.agree(build(building, saves))
        self._took[place] = round(time.perf_counter() - since, 1)
        done = {
            "inputs": digest,
            "kept": keep,
            "command": self.command,
            "seconds": self._took[place],
            "world_size": self.world.size,
            **noted,
            "result": result,
        }
        self._on_first(lambda: self._publish(building, place, done))
        self._whole.add(place)  # read for its digests a moment ago
        return result

    def _on_first(self, change: Callable[[], None]) -> None:
        """Change files on the first rank and wait for it; its failure is every rank's error."""

        def guarded() -> None:
            try:
                change()
            except OSError as error:
                remedy = "make room, or give back the rights, then give the same command again"
                raise CheckpointError(str(error), remedy) from error

        self.world.on_first(guarded)

    def _publish(self, building: Path, place: Path, done: dict) -> None:
        checkpoints = building / CHECKPOINTS
        files = [
            file
            for file in building.rglob("*")
            if file.is_file() and checkpoints not in file.parents
        ]
        entries: dict[str, Entry] = {}
        for file in files:
            if not done["kept"] and file.parent == building and file.name not in _ALWAYS_KEPT:
                self.disk.remove(file)
            else:
                with file.open("rb") as written:
                    name = file.relative_to(building)
                    if is_recorded(name):
                        entries[name.as_posix()] = entry_of(written)
                    self.disk.sync(written)
        self.disk.remove(building / RECORD)
        self._write(building, RECORD, json.dumps({**done, "files": entries}, indent=1))
        # safetensors writes for its owner alone; whoever may read the record may read the rest.
        mode = stat.S_IMODE((building / RECORD).stat().st_mode)
        for file in filter(Path.exists, files):
            file.chmod(mode)
        # Until the rename this is an unfinished build, which goes on from its last checkpoint.
        if place.exists():
            self.disk.remove(_replaced(place))
            self.disk.rename(place, _replaced(place))
        self.disk.rename(building, place)
        self.disk.sync_folder(place.parent)
        self._tidy(place)

    def _tidy(self, place: Path) -> None:
        """Remove what served the building of a finished stage, and what it took the place of."""
        for left in (place / CHECKPOINTS, place / INPUTS, _replaced(place)):
            self.disk.remove(left)

    def _write(self, folder: Path, name: str, text: str) -> None:
        """A small file that is on the disk, with its folder, when this returns."""
        files = HashedFiles(folder, self.disk)
        files.write(name, lambda file: file.write(text.encode()))
        if files.problem is not None:
            raise CheckpointError(files.problem, "make room, then give the same command again")

    def _prepare(self, building: Path, digest: str) -> None:
        """An empty folder to build in, or the one that was left by a build from the same inputs."""
        started = building / INPUTS
        if self.resume != "never" and started.is_file() and started.read_text() == digest:
            return
        if building.exists():
            if self.resume not in ("auto", "never"):
                raise CheckpointError(
                    f"{building}: was begun with other inputs, so that there is no {self.resume} "
                    "to go on from",
                    "give the configuration that it was begun with, or --resume never",
                )
            self.say(f"{building}: what was left there is of other inputs, or not wanted; removed")
            self.disk.remove(building)
        # Synced: a power failure must not leave checkpoints whose inputs nobody knows.
        self._write(building, INPUTS, digest)

    def _open_saves(self, building: Path, digest: str) -> Saves:
        checkpoints = Checkpoints(
            building / CHECKPOINTS, self.world, self.keep, lambda text: self.say(text), self.disk
        )
        start = None
        if self.resume != "never":
            start = checkpoints.find(self.resume)
            self.resume = "auto"
        if start is not None:
            self.say(f"going on from checkpoint {start.folder.name}")
        else:
            self._on_first(lambda: self._clear(building))
        return Saves(checkpoints, start, digest, self.reshard)

    def _clear(self, building: Path) -> None:
        """Without a checkpoint the build starts afresh: its log must, too."""
        for left in building.iterdir():
            if left.name not in (INPUTS, CHECKPOINTS):
                self.disk.remove(left)


def _serves(stored: dict, digest: str, keep: bool) -> bool:
    return stored.get("inputs") == digest and (stored["kept"] or not keep)


def _replaced(place: Path) -> Path:
    """Where a finished stage goes when another takes its place."""
    return place.with_name(f".gone-{place.name}")
