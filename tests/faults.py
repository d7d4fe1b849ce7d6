"""Does every fault to a training run that docs/results/faults.md lists, and sees that it recovers.

``make faults`` (or ``python tests/faults.py [--only PART] [--quick] [--seed N] [--out FILE]``)
replays power failures on a file system that forgets, damages checkpoints, interrupts, kills and
stops runs of every ZeRO stage, and fills the disk. Each part ends with a count of failures; the
exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cells
import deepspeed
import torch
import yaml
from cells import ACCUMULATION, EXAMPLES, STEPS, STEPS_PER_EPOCH, Cell, Fault, Group
from crash_model import Change, Model, Recorder, interleave, materialise

from metakd.errors import CheckpointError, DivergedError
from metakd.training import engine
from metakd.training.checkpoint import (
    MANIFEST,
    POINTER,
    Checkpoints,
    HashedFiles,
    Tag,
    _manifest_digest,
    safe_load,
    verify,
)
from metakd.training.world import World, join_world

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 5


@dataclass
class Tally:
    """What a part did.

    Args:
        folder: to work in.
        seed: of everything that is drawn.
        quick: a subset that takes seconds?
    """

    folder: Path
    seed: int
    quick: bool
    cases: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def random(self) -> random.Random:
        return random.Random(self.seed)

    def case(self, kind: str, problem: str | None) -> None:
        """Count one case, and what was wrong with it."""
        self.cases[kind] += 1
        if problem:
            self.failures.append(f"{kind}: {problem}")
            if len(self.failures) <= SHOWN:
                print(f"  FAILED {self.failures[-1]}", flush=True)

    def place(self, name: str) -> Path:
        """A new folder."""
        path = self.folder / name
        path.mkdir(parents=True)
        return path


# ---- Power failures ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Act:
    """A save, or damage to a tag that is there; tags are named by their step."""

    step: int
    damage: bool = False


STORIES = {
    "several saves, the oldest go": (1, 2, [Act(2), Act(4), Act(6), Act(8)]),
    "three ranks": (3, 2, [Act(2), Act(4), Act(6)]),
    "one tag is kept": (3, 1, [Act(2), Act(4), Act(6)]),
    "the only tag is saved again": (3, 2, [Act(2), Act(2)]),
    "a tag is saved again beside an older one": (1, 2, [Act(2), Act(4), Act(4)]),
    "taken up from an older tag": (1, 3, [Act(2), Act(4), Act(6), Act(4), Act(6)]),
    "a damaged tag is saved again": (3, 2, [Act(2), Act(4), Act(4, damage=True), Act(4), Act(6)]),
}

Version = tuple[str, tuple[tuple[str, bytes], ...]]  # a tag's name, its files


@dataclass
class Story:
    """A recorded sequence of saves.

    ``allowed[n]`` holds what loading may find when the first n changes were asked for.
    """

    changes: list[Change] = field(default_factory=list)
    allowed: list[set[Version | None]] = field(default_factory=list)


def record(ranks: int, keep: int, acts: list[Act], base: Path, draw: random.Random) -> Story:
    """Carry out saves for real and note what they did to the disk."""
    disk = Recorder(base)
    saved = Checkpoints(base / "checkpoints", World(), keep, say=lambda text: None, disk=disk)
    story, answer, versions = Story(allowed=[{None}]), None, {}
    for act in acts:
        name = f"step{act.step}"
        if act.damage:
            disk.damage(saved.root / name / "rank-0.pt")
            older = [step for step in versions if step < act.step]
            answer = versions[max(older)]
            new = answer
        else:
            files = tuple(
                (f"{kind}-{rank}.pt", draw.randbytes(draw.randrange(60, 200)))
                for kind in ("rank", "weights")
                for rank in range(ranks)
            )
            saved.save(name, _writer(files, disk, draw), {"phase": 0, "step": act.step})
            new = (name, files)
            versions[act.step] = new
            for step in [step for step in versions if step > act.step]:
                del versions[step]  # given up
        during = {answer, new}
        story.allowed += [during] * (len(disk.changes) - len(story.allowed)) + [{new}]
        answer = new
    story.changes = disk.changes
    return story


def _writer(files, disk: Recorder, draw: random.Random) -> Callable[[HashedFiles], None]:
    """Writes the files of all ranks, as if at the same time."""

    def write(first: HashedFiles) -> None:
        lanes, begin = [], len(disk.changes)
        for rank in sorted({name[-4] for name, _ in files}):
            own = first if rank == "0" else HashedFiles(first.folder, disk)
            for name, data in files:
                if name[-4] == rank:
                    cut = len(data) // 2
                    own.write(name, lambda file, d=data, c=cut: (file.write(d[:c]), file.write(d[c:])))
            first.entries |= own.entries
            lanes.append(disk.changes[begin:])
            del disk.changes[begin:]
        # The others find the folder that the first has made, synced or not.
        made = max(i for i, change in enumerate(lanes[0]) if change.kind == "folder") + 1
        disk.changes += lanes[0][:made]
        lanes[0] = lanes[0][made:]
        disk.changes += interleave(lanes, draw)

    return write


def power_failures(tally: Tally) -> None:
    """Every prefix of recorded saves, on a disk that may forget what was not synced."""
    draw, seen = tally.random, set()
    for number, (name, (ranks, keep, acts)) in enumerate(STORIES.items()):
        story = record(ranks, keep, acts, tally.place(f"story{number}"), draw)
        model = Model()
        for length in range(len(story.changes) + 1):
            if length:
                model.do(story.changes[length - 1])
            if tally.quick and length % 5:
                continue
            for state in model.crashes(draw, samples=1 if tally.quick else 14):
                key = (number, length, tuple(sorted(state.items())))
                if hash(key) in seen:
                    continue
                seen.add(hash(key))
                with tempfile.TemporaryDirectory(dir=tally.folder) as base:
                    materialise(state, Path(base))
                    again = len(seen) % 8 == 0
                    problem = _found_wrongly(Path(base), story.allowed[length], again)
                tally.case(name, problem and f"after change {length}: {problem}")


def _found_wrongly(base: Path, allowed: set[Version | None], again: bool) -> str | None:
    saved = Checkpoints(base / "checkpoints", World(), say=lambda text: None)
    try:
        version = _version(saved)
    except CheckpointError as error:
        return error.cause
    if version not in allowed:
        return f"found {version and version[0]}, allowed {[v and v[0] for v in allowed]}"
    if again:
        later = {"phase": 0, "step": 100}
        saved.save("step100", lambda files: files.write("a", lambda f: f.write(b"x")), later)
        if _version(saved) != ("step100", (("a", b"x"),)):
            return "the next save is not found"
    return None


def _version(saved: Checkpoints) -> Version | None:
    tag = saved.find("auto")
    if tag is None:
        return None
    names = sorted(tag.facts["files"])
    return tag.folder.name, tuple((name, (tag.folder / name).read_bytes()) for name in names)


# ---- The command ---------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Tally], None]] = {
    "power": power_failures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="this part")
    parser.add_argument("--quick", action="store_true", help="some cases of each part")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    cells.warm()
    failed = 0
    for name in options.only or PARTS:
        since = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            tally = Tally(Path(folder), options.seed, options.quick)
            print(f"{name}: {PARTS[name].__doc__}", flush=True)
            PARTS[name](tally)
        seconds = time.monotonic() - since
        for kind, count in tally.cases.items():
            print(f"  {count:5} {kind}")
        print(f"{name}: {sum(tally.cases.values())} cases, {len(tally.failures)} failures, {seconds:.0f} s, seed {options.seed}", flush=True)
        failed += len(tally.failures)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
