"""Finished stages on disk: each is a folder with the digest of its inputs.

It is built aside and renamed into place, so that a folder of the run directory either holds a
finished stage or does not exist; a stage whose inputs have not changed is not built again. What an
interrupted build left aside, its checkpoints above all, is taken up if the inputs are the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from metakd.errors import CheckpointError
from metakd.training.checkpoint import Checkpoints
from metakd.training.engine import Saves
from metakd.training.world import World

CHECKPOINTS = "checkpoints"
_INPUTS = "inputs.txt"


def content_digest(sources: Iterable[str | None]) -> str:
    """SHA-256 over the content of files and folders; a hub id names no file and adds nothing."""
    digest = hashlib.sha256()
    for path in map(Path, filter(None, sources)):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@dataclass
class StageStore:
    """The stages of one run directory.

    Args:
        folder: the run directory.
        world: from ``engine.join_world``; the first rank writes, all ranks get the result.
        common: inputs that every stage shares, as JSON values.
        command: recorded with every stage.
        say: tells a person what happens.
        may_build: False makes a stage that is missing or out of date an error.
        resume: ``auto`` goes on from the newest valid checkpoint of an interrupted build, a tag
            from that one (the first stage that is built; the others go on as with ``auto``),
            ``never`` starts every build afresh.
        reshard: see ``engine.Saves``.
        keep: checkpoints that stay on the disk while a stage is built.
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
    _finished: dict[Path, dict] = field(default_factory=dict, repr=False)
    _digests: dict[Path, str] = field(default_factory=dict, repr=False)

    def result(self, place: Path) -> dict:
        """The result of a stage that this process has asked for."""
        return self._finished[place]

    def forget(self) -> None:
        """Look everything up again: processes that meet must have asked for the same stages."""
        self._finished.clear()
        self._digests.clear()

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
                from where that was asked for.
        """
        described = json.dumps({**self.common, **inputs}, sort_keys=True)
        digest = hashlib.sha256(described.encode()).hexdigest()
        if self._digests.get(place) != digest:
            self._finished[place] = self._look_up_or_build(place, digest, build, keep)
            self._digests[place] = digest
        return self._finished[place]

    def _look_up_or_build(self, place, digest, build, keep) -> dict:
        name = str(place.relative_to(self.folder))
        record = place / "stage.json"
        stored = json.loads(record.read_text()) if self.world.is_main and record.exists() else {}
        stored = self.world.agree(stored)
        if stored.get("inputs") == digest and (stored["kept"] or not keep):
            self.say(f"{name}: inputs unchanged, skipped")
            return stored["result"]
        if not self.may_build:
            state = "was built from other inputs" if stored else "is missing"
            raise CheckpointError(f"{place}: {state}", "build it first: metakd run")
        self.say(f"{name}: running")
        building = place.with_name(f".tmp-{place.name}")
        if self.world.is_main:
            self._prepare(building, digest)
        self.world.barrier()
        saves = self._open_saves(building, digest)
        since = time.perf_counter()
        result = self.world.agree(build(building, saves))
        if self.world.is_main:
            shutil.rmtree(building / CHECKPOINTS, ignore_errors=True)
            (building / _INPUTS).unlink()
            if not keep:
                for file in building.iterdir():
                    if file.is_file() and file.name != "log.jsonl":
                        file.unlink()
            done = {
                "inputs": digest,
                "kept": keep,
                "command": self.command,
                "seconds": round(time.perf_counter() - since, 1),
                "world_size": self.world.size,
                "result": result,
            }
            (building / "stage.json").write_text(json.dumps(done, indent=1))
            shutil.rmtree(place, ignore_errors=True)
            building.rename(place)
        self.world.barrier()
        return result

    def _prepare(self, building: Path, digest: str) -> None:
        """An empty folder to build in, or the one that was left by a build from the same inputs."""
        started = building / _INPUTS
        if self.resume != "never" and started.is_file() and started.read_text() == digest:
            return
        if building.exists():
            self.say(f"{building}: what was left there is of other inputs, or not wanted; removed")
            shutil.rmtree(building)
        building.mkdir(parents=True)
        started.write_text(digest)

    def _open_saves(self, building: Path, digest: str) -> Saves:
        checkpoints = Checkpoints(
            building / CHECKPOINTS, self.world, self.keep, lambda text: self.say(text)
        )
        start = None
        if self.resume != "never":
            start = checkpoints.find(self.resume)
            self.resume = "auto"
        if start is not None:
            self.say(f"going on from checkpoint {start.folder.name}")
        elif self.world.is_main:
            # Without a checkpoint the build starts afresh: its log must, too.
            for left in building.iterdir():
                if left.name not in (_INPUTS, CHECKPOINTS):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        self.world.barrier()
        return Saves(checkpoints, start, digest, self.reshard)
