"""Does every fault to a training run that docs/results/faults.md lists, and sees that it recovers.

``make faults`` (or ``python tests/faults.py [--only PART] [--quick] [--seed N] [--out FILE]``)
replays power failures on a file system that forgets, damages checkpoints and finished stages,
interrupts, kills and stops runs of every ZeRO stage, and fills the disk. Each part ends with a
count of failures; the exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import hashlib
import io
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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cells
import deepspeed
import safetensors.torch
import torch
import transformers
import yaml
from cells import ACCUMULATION, EXAMPLES, STEPS, STEPS_PER_EPOCH, Cell, Fault, Group
from crash_model import Change, Model, Recorder, interleave, materialise

from metakd import demo
from metakd.errors import CheckpointError, DivergedError
from metakd.pipeline import store
from metakd.pipeline.published import RECORD, check_folder
from metakd.training.checkpoint import (
    MANIFEST,
    POINTER,
    Checkpoints,
    HashedFiles,
    _manifest_digest,
    safe_load,
    verify,
)
from metakd.training.world import World

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
    base.mkdir()
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
                    own.write(
                        name, lambda file, d=data, c=cut: (file.write(d[:c]), file.write(d[c:]))
                    )
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
    draw, samples = tally.random, 1 if tally.quick else 18
    for number, (name, (ranks, keep, acts)) in enumerate(STORIES.items()):
        place = tally.place(f"story{number}")
        story = record(ranks, keep, acts, place / "recorded", draw)
        for length, problem in replay(story, place, draw, samples, every=5 if tally.quick else 1):
            tally.case(name, problem and f"after change {length}: {problem}")


def replay(
    story: Story, place: Path, draw: random.Random, samples: int, every: int = 1
) -> Iterator[tuple[int, str | None]]:
    """What is wrong with loading from each different state that a power failure may leave.

    Args:
        story: what was done to the disk.
        place: folder to work in.
        draw: picks states.
        samples: states after each change, beside the two extremes.
        every: of so many prefixes only one.
    """
    model, seen = Model(), set()
    for length in range(len(story.changes) + 1):
        if length:
            model.do(story.changes[length - 1])
        if length % every:
            continue
        for state in model.crashes(draw, samples):
            key = hash((length, tuple(sorted(state.items()))))
            if key in seen:
                continue
            seen.add(key)
            with tempfile.TemporaryDirectory(dir=place) as base:
                materialise(state, Path(base))
                yield length, _found_wrongly(Path(base), story.allowed[length], len(seen) % 8 == 0)


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


# ---- Damage --------------------------------------------------------------------------------------


def sources(tally: Tally) -> list[Path]:
    """Checkpoints that DeepSpeed wrote: of each run, those of steps 4 and 6."""
    kinds = [Cell(zero) for zero in range(4)] + [Cell(2, ranks=2), Cell(3, ranks=2)]
    roots = []
    for cell in kinds[4:5] if tally.quick else kinds:
        folder = tally.place(f"source-{cell.name}")
        at = ACCUMULATION * 6 + 1  # the first micro-batch of step 7
        cells.run(cell, folder, Fault(0, "forward", at)).wait(grace=2)
        roots.append(cells.checkpoints(folder).root)
    return roots


@dataclass(frozen=True)
class Damage:
    """What is done to a copy of a checkpoint folder.

    Args:
        kind: for the table.
        apply: does it to the folder.
        hurt: tags that must not be used any more.
        pointer: is it the pointer that is damaged?
    """

    kind: str
    apply: Callable[[Path], object]
    hurt: tuple[str, ...] = ()
    pointer: bool = False


def flip(path: Path, draw: random.Random) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    """Keep the first bytes."""
    os.truncate(path, length)


def swap(one: Path, other: Path) -> None:
    """Exchange two files or folders."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def refilled(path: Path, data: bytes = b"") -> None:
    """Replace whatever is there by a file."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.write_bytes(data)


def linked(path: Path, outside: Path) -> None:
    """Replace a file or folder by a link to the same outside of the checkpoints."""
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def replaced_by_folder(path: Path) -> None:
    """Put a folder where a file was."""
    path.unlink(missing_ok=True)
    path.mkdir()


def signed(folder: Path, **changes) -> None:
    """Rewrite a manifest so that it matches itself and the files, as one could who means harm."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    for name in manifest["files"] if isinstance(manifest.get("files"), dict) else ():
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    manifest["sha256"] = _manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def damages(root: Path, tally: Tally, outside: Path) -> list[Damage]:
    """Every damage to one folder of two tags."""
    draw, share = tally.random, 0.06 if tally.quick else 1.0
    older, newer = (root / f"phase0-step{step:08d}" for step in (4, 6))
    names = sorted(path.name for path in newer.iterdir() if path.name != MANIFEST)
    found: list[Damage] = []

    def add(kind: str, apply, *hurt: Path, pointer: bool = False) -> None:
        found.append(Damage(kind, apply, tuple(tag.name for tag in hurt), pointer))

    for _ in range(round(60 * share)):
        tag, name = draw.choice([older, newer, newer]), draw.choice([*names, MANIFEST])
        length = draw.randrange((tag / name).stat().st_size)
        add("truncated", lambda r, p=f"{tag.name}/{name}", n=length: cut(r / p, n), tag)
    for _ in range(round(60 * share)):
        path = newer / draw.choice(names)
        add("one bit, in a file", lambda r, p=path: flip(r / p.relative_to(root), draw), newer)
    for _ in range(round(40 * share)):
        path = draw.choice([older, newer]) / MANIFEST
        add(
            "one bit, in a manifest",
            lambda r, p=path: flip(r / p.relative_to(root), draw),
            path.parent,
        )

    for tag in (older, newer):
        for name in [*names, MANIFEST]:
            path = f"{tag.name}/{name}"
            add("missing", lambda r, p=path: (r / p).unlink(), tag)
            add("emptied", lambda r, p=path: refilled(r / p), tag)
            add("a folder in its place", lambda r, p=path: replaced_by_folder(r / p), tag)
            add("a link in its place", lambda r, p=path: linked(r / p, outside), tag)
            add("longer", lambda r, p=path: (r / p).open("ab").write(b"}"), tag)
        add("missing", lambda r, t=tag.name: shutil.rmtree(r / t), tag)
        add("a link in its place", lambda r, t=tag.name: linked(r / t, outside), tag)
        for extra in ("x.pt", "deep/x.pt", "x"):
            add("an extra file", lambda r, t=tag.name, e=extra: _extra(r / t / e), tag)
        add("an extra link", lambda r, t=tag.name: (r / t / "x").symlink_to("rank-00000.pt"), tag)
        other = (newer if tag is older else older).name
        add(
            "the manifest of another tag",
            lambda r, t=tag.name, o=other: shutil.copy(r / o / MANIFEST, r / t / MANIFEST),
            tag,
        )
        add("a copy of another tag", lambda r, t=tag.name, o=other: _copied(r / o, r / t), tag)
        for content in (b"", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", b"1e999"):
            add(
                "another manifest",
                lambda r, t=tag.name, c=content: refilled(r / t / MANIFEST, c),
                tag,
            )
        for wrong in ({"step": "6"}, {"files": []}, {"files": {}}, {"tag": 3}, {"phase": None}):
            add("another manifest", lambda r, t=tag.name, w=wrong: signed(r / t, **w), tag)
        for name in names:
            for kind, data in payloads(outside / "ran").items():
                path = f"{tag.name}/{name}"
                add(f"pickle ({kind})", lambda r, p=path, d=data: refilled(r / p, d), tag)
    for name in names:
        if (older / name).read_bytes() != (newer / name).read_bytes():  # the best weights may be
            add(
                "swapped between tags",
                lambda r, n=name: swap(r / older.name / n, r / newer.name / n),
                older,
                newer,
            )
        for other in names[: names.index(name)]:
            for tag in (older, newer):
                if (tag / name).read_bytes() != (tag / other).read_bytes():
                    add(
                        "swapped in a tag",
                        lambda r, t=tag.name, n=name, o=other: swap(r / t / n, r / t / o),
                        tag,
                    )
    add("tags swapped", lambda r: swap(r / older.name, r / newer.name), older, newer)
    # Bytes that are no name, names that are no tag or another, things that are no file.
    for content in (b"", b"\0", b"\xff" * 9, b"../outside", older.name.encode(), b"x" * 5000):
        add("pointer", lambda r, c=content: refilled(r / POINTER, c), pointer=True)
    add("pointer", lambda r: (r / POINTER).unlink(), pointer=True)
    add("pointer", lambda r: replaced_by_folder(r / POINTER), pointer=True)
    if tally.quick:
        found = draw.sample(found, min(len(found), 90))
    return found


def _extra(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")


def _copied(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def payloads(marker: Path) -> dict[str, bytes]:
    """Files that would create ``marker`` if anyone unpickled them, by format."""
    harm = {"module": {"weight": torch.zeros(2), "harm": Payload(marker)}}
    made = {"plain": pickle.dumps(Payload(marker)), "nested": pickle.dumps(harm, 2)}
    for kind, zipped in {"torch": True, "torch, old": False}.items():
        file = io.BytesIO()
        torch.save(harm, file, _use_new_zipfile_serialization=zipped)
        made[kind] = file.getvalue()
    return made


def corruption(tally: Tally) -> None:
    """Damage to whole checkpoints of DeepSpeed's: never used, always said, nothing run."""
    outside, load = tally.place("outside"), torch.load
    for root in sources(tally):
        for damage in damages(root, tally, outside):
            shutil.rmtree(outside)
            outside.mkdir()
            copy = tally.folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(root, copy)
            damage.apply(copy)
            try:
                # Whatever is wrong must be known before any file is read as tensors.
                torch.load = None
                problem = _wrongly_taken(copy, damage)
            finally:
                torch.load = load
            if (outside / "ran").exists():
                problem = "the payload ran"
            tally.case(damage.kind.split(" (")[0], problem and f"{root}, {damage}: {problem}")
        _harm(root, tally, outside / "ran")
    _bad_tags(sources(replace(tally, quick=True, folder=tally.place("tags")))[0], tally)


def _wrongly_taken(root: Path, damage: Damage) -> str | None:
    told: list[str] = []
    saved = Checkpoints(root, World(), say=told.append)
    names = [f"phase0-step{step:08d}" for step in (4, 6)]
    for name in names:
        try:
            saved.find(name)
            if name in damage.hurt:
                return f"{name} was accepted"
        except CheckpointError as error:
            if name not in damage.hurt:
                return f"{name} was refused: {error}"
    whole = [name for name in names if name not in damage.hurt]
    told.clear()
    try:
        tag = saved.find("auto")
        if tag is None or tag.folder.name != whole[-1]:
            return f"auto found {tag and tag.folder.name}"
    except CheckpointError as error:
        return f"auto refused all: {error}" if whole else None
    names_newest = any(damage.hurt[-1] in line for line in told) if damage.hurt else True
    if names[-1] in damage.hurt and not (names_newest and told):
        return "the damaged newest was passed over in silence"
    if damage.pointer and not any(POINTER in line for line in told):
        return "a damaged pointer was passed over in silence"
    return None


def _harm(root: Path, tally: Tally, marker: Path) -> None:
    """Payloads under a manifest that matches them: verification cannot tell, reading must."""
    newest = "phase0-step00000006"
    for path in sorted((root / newest).glob("*.pt")):
        for kind, data in payloads(marker).items():
            copy = tally.folder / "harm"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(root, copy)
            (copy / newest / path.name).write_bytes(data)
            signed(copy / newest)
            problem = None
            tag = Checkpoints(copy, World(), say=lambda text: None).find(newest)
            try:
                safe_load(tag.folder / path.name)
                problem = "was read"
            except CheckpointError:
                pass
            if marker.exists():
                problem = "ran"
            tally.case("pickle under its own manifest", problem and f"{path}, {kind}: {problem}")


def _bad_tags(root: Path, tally: Tally) -> None:
    before = sorted(root.parent.rglob("*"))
    # Out of the folder, hidden, no name at all, too long, letters that are not ASCII, line ends.
    for tag in (
        *("../x", "..", ".", "/etc", "a/b", "a/../b", "..\\x", "~", ".tmp-x", ".hidden", "-x", ""),
        *("a\0b", "\0", "x" * 129, "x" * 100_000, "schritt-é", "step４", "a b", "a\n", "a:b", "*"),
    ):
        saved = Checkpoints(root, World(), say=lambda text: None)
        asked = {
            "found": lambda s=saved, t=tag: s.find(t),
            "saved": lambda s=saved, t=tag: s.save(t, lambda files: None, {"phase": 0, "step": 1}),
        }
        for what, ask in asked.items():
            problem = f"{tag[:20]!r} was {what}"
            try:
                ask()
            except CheckpointError:
                problem = None
            if sorted(root.parent.rglob("*")) != before:
                problem = f"{tag[:20]!r} changed files"
            tally.case("bad tag", problem)


# ---- Interruptions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """Where a run is killed, and from where it then goes on.

    Args:
        save_steps: steps between its checkpoints.
        step: in which it is killed.
        micro: 0-based micro-batch of the step.
        start: step it goes on after.
    """

    save_steps: int
    step: int
    micro: int
    start: int


POSITIONS = {
    "epoch start": Position(3, 4, 0, 3),
    "mid-epoch": Position(2, 5, 0, 4),
    "mid-accumulation": Position(2, 6, 1, 4),
    "after a skipped step": Position(5, 6, 0, 5),
}


def resume(tally: Tally) -> None:
    """Interrupted and resumed runs equal uninterrupted ones bit for bit."""
    draw = tally.random
    matrix = [
        Cell(zero, ranks, bf16) for zero in range(4) for ranks in (1, 2) for bf16 in (False, True)
    ]
    for cell in [Cell(1, 2)] if tally.quick else matrix:
        folder = tally.place(cell.name)
        reference = _reference(cell, folder / "whole", tally)
        if reference is None:
            continue
        for name, position in list(POSITIONS.items())[:: 2 if tally.quick else 1]:
            place = folder / name.replace(" ", "-")
            fault = Fault(
                draw.randrange(cell.ranks),
                "forward",
                (position.step - 1) * ACCUMULATION + position.micro + 1,
            )
            broken = replace(cell, save_steps=position.save_steps)
            cells.run(broken, place, fault).wait(grace=2)
            group = cells.run(broken, place)
            codes = group.wait()
            problem = _differs(group, codes, place, reference, cell)
            start = cells.attempts(place, 0)[-1].start
            if problem is None and start != position.start:
                problem = f"went on after step {start}, not {position.start}"
            tally.case(name, problem and f"{cell.name}: {problem}")


def _reference(cell: Cell, folder: Path, tally: Tally) -> dict | None:
    """The outcome of a run that nothing happens to."""
    group = cells.run(cell, folder)
    codes = group.wait()
    if any(codes):
        tally.case("uninterrupted", f"{cell.name}: exit codes {codes}\n{group.said()[-1500:]}")
        return None
    reference = cells.outcome(folder)
    problem = _counts_wrongly(folder, cell)
    skipped = [
        {"step": cells.POISONED_STEP, "split": "skipped", "examples": [cells.poisoned_row()]}
    ]
    if problem is None and reference["skipped"] != skipped:
        problem = f"skipped {reference['skipped']}, not {skipped}"
    tally.case("uninterrupted, one batch NaN", problem and f"{cell.name}: {problem}")
    return reference


def _differs(
    group: Group, codes: list[int], folder: Path, reference: dict, cell: Cell
) -> str | None:
    """What is wrong with a run that was taken up again, and is through."""
    if any(codes):
        return f"exit codes {codes}, hung {group.hung}\n{group.said()[-1500:]}"
    outcome = cells.outcome(folder)
    other = [name for name in reference if outcome[name] != reference[name]]
    if other:
        return f"{', '.join(other)} differ from the uninterrupted run"
    return _counts_wrongly(folder, cell)


def _counts_wrongly(folder: Path, cell: Cell) -> str | None:
    """Which examples an epoch saw not once, counting of each attempt what the next built on."""
    seen = Counter()
    for rank in range(cell.ranks):
        tries = cells.attempts(folder, rank)
        ends = [later.start for later in tries[1:]] + [STEPS]
        for n, (one, _) in enumerate(zip(tries, ends)):
            # An attempt counts as far as no later one starts before it.
            for step, rows in one.batches:
                if step <= min(ends[n:]):
                    seen.update(((step - 1) // STEPS_PER_EPOCH, row) for row in rows)
    wanted = {(epoch, row) for epoch in range(cells.EPOCHS) for row in range(EXAMPLES)}
    wrong = sorted(key for key in wanted | seen.keys() if seen[key] != 1)
    return f"(epoch, example) not seen once: {wrong[:6]}" if wrong else None


def kills(tally: Tally) -> None:
    """SIGKILL of a random rank, half of them inside a save, until each run is through."""
    draw = tally.random
    wanted, per_run = (3, 3) if tally.quick else (200, 8)
    kinds = [
        Cell(zero, ranks, bf16=bool((zero + ranks) % 2)) for ranks in (1, 2) for zero in range(4)
    ]
    if tally.quick:
        kinds = [Cell(0, 2)]
    references = {}
    done = alone = 0
    while done < wanted:
        for cell in kinds:
            if done >= wanted:
                break
            if cell not in references:
                since = time.monotonic()
                whole = tally.folder / f"whole-{cell.name}"
                references[cell] = (
                    _reference(cell, whole, tally),
                    [cells.attempts(whole, rank)[0].changes for rank in range(cell.ranks)],
                    time.monotonic() - since,
                )
            reference, changes, seconds = references[cell]
            folder = tally.place(f"run{done}-{cell.name}")
            furthest = killed = known = 0
            while True:
                fault, after = None, None
                if killed < per_run:
                    rank = draw.randrange(cell.ranks)
                    kind = draw.choice(["change", "change", "forward", "time"])
                    if kind == "time":
                        after = draw.uniform(0.0, seconds)
                    elif kind == "forward":
                        fault = Fault(rank, kind, draw.randint(1, 3 * ACCUMULATION))
                    else:  # two of the six saves
                        fault = Fault(rank, kind, draw.randint(1, changes[rank] // 3))
                group = cells.run(cell, folder, fault)
                if after is not None:
                    time.sleep(after)
                    group.kill(rank)
                codes = group.wait(grace=3.0)
                # A process that was killed early has left no trace of where it started.
                starts = [one.start for one in cells.attempts(folder, 0)][known:]
                known += len(starts)
                problem = None
                if group.hung:
                    problem = f"ranks {group.hung} hung"
                elif starts and starts[-1] < furthest - cell.save_steps:
                    problem = f"went on after step {starts[-1]}, had finished {furthest}"
                if -signal.SIGKILL not in codes:
                    problem = problem or _differs(group, codes, folder, reference, cell)
                    tally.case("run through to the end", problem and f"{cell.name}: {problem}")
                    break
                done += 1
                killed += 1
                alone += len(codes) == 2 and codes.count(-signal.SIGKILL) == 1
                tally.case(f"killed by {kind}", problem and f"{cell.name}: {problem}")
                for rank in range(cell.ranks):
                    for one in cells.attempts(folder, rank):
                        furthest = max(furthest, one.finished)
            shutil.rmtree(folder)
    print(
        f"  {alone} surviving ranks ended by themselves within 3 s; the others were killed",
        flush=True,
    )


# ---- Full disks, hangs, requests to stop, NaN ----------------------------------------------------


def fill_disk(cell: Cell, folder: Path, victim: int, lasting: bool, every: int) -> None:
    """One rank of a run that at its first save saves again and again, while a change of the
    victim's disk fails: the first, the second, ..."""
    report: list[str | None] = []

    class FullDisk(Checkpoints):
        def save(self, tag: str, write, facts: dict) -> Path:
            published = super().save(tag, write, facts)
            if not report:
                self.fill(write, facts)
            return published

        def fill(self, write, facts: dict) -> None:
            number, step, reached = 1, 1000, True

            def save() -> None:
                Checkpoints.save(self, f"step{step}", write, facts | {"step": step})

            save()
            while reached:
                step += 1
                self.disk.count, self.disk.lasting = 0, lasting
                if self.world.rank == victim:
                    self.disk.fault = Fault(victim, "change", number, signal=0)
                since, raised = time.monotonic(), ""
                try:
                    save()
                except CheckpointError as error:
                    raised = error.cause
                seconds, count = time.monotonic() - since, self.disk.count
                self.disk.fault = None
                told = self.world.gather((raised, seconds, count))
                reached = told[victim][2] >= number
                problem = self.wrong(told, step)
                report.append(self.world.agree(problem and f"change {number}: {problem}"))
                step += 1
                save()  # with room again
                number += every

        def wrong(self, told: list[tuple[str, float, int]], step: int) -> str | None:
            if len({bool(raised) for raised, *_ in told}) > 1:
                return f"ranks disagree: {told}"
            if max(seconds for _, seconds, _ in told) > 10:
                return f"took more than 10 s: {told}"
            if not self.world.is_main:
                return None
            tags = Checkpoints(self.root, World(), say=lambda text: None).tags()
            for tag in tags:
                verify(tag)
            steps = sorted(tag.facts["step"] for tag in tags)
            saved = step if not told[0][0] else step - 1
            return None if saved in steps else f"step {saved} is not among {steps}: {told}"

    store.Checkpoints = FullDisk
    cells.train(cell, folder)
    (folder / "report.json").write_text(json.dumps(report))


def full_disk(tally: Tally) -> None:
    """Each change of the disk in a save fails once, or all do from there on, on one rank of two."""
    for zero in (2,) if tally.quick else range(4):
        for victim in (0, 1):
            lasting = (zero + victim) % 2 == 0
            cell = Cell(zero, 2, save_steps=4)
            folder = tally.place(f"full-{zero}-{victim}")
            every = 7 if tally.quick else 1
            job = partial(fill_disk, cell, folder, victim, lasting, every)
            group = Group(2, lambda rank, job=job: job(), folder)
            codes = group.wait(600)
            where, report = f"{cell.name}, rank {victim}", folder / "report.json"
            if any(codes) or not report.exists():
                tally.case("disk full", f"{where}: {codes}\n{group.said()[-1500:]}")
                continue
            for problem in json.loads(report.read_text()):
                tally.case("disk full", problem and f"{where}, {problem}")


def hangs(tally: Tally) -> None:
    """One of two ranks stands still; the other names it and its step, and ends."""
    for zero in (0,) if tally.quick else (0, 2, 3):
        for victim in (1,) if tally.quick else (0, 1):
            # A stop in the first second comes before anything was heard of the rank.
            # A stop in the first second comes before anything was heard of the rank, and the first
            # steps are given ten times as long.
            for pause, seen in ((0.2, "step "), (0.0, "the start"))[: 1 if zero else 2]:
                cell = Cell(zero, 2, step_timeout=5.0, pause=pause)
                folder = tally.place(f"hang-{zero}-{victim}-{pause}")
                number = ACCUMULATION * 5 + 1 if pause else 1
                group = cells.run(cell, folder, Fault(victim, "forward", number, signal.SIGSTOP))
                while not _stopped(group.pids[victim]) and not group.ended:
                    time.sleep(0.05)
                since = time.monotonic()
                while 1 - victim not in group.ended and time.monotonic() - since < 60:
                    time.sleep(0.1)
                seconds = time.monotonic() - since
                group.kill(victim)
                code = group.wait(10)[1 - victim]
                said, problem = group.said(), None
                if code != 6 or f"rank {victim} " not in said or f"last seen at {seen}" not in said:
                    problem = f"exit code {code} after {seconds:.0f} s\n{said[-1500:]}"
                where = f"{cell.name}, rank {victim}, {seen}"
                tally.case("a rank hangs", problem and f"{where}: {problem}")


def _stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def stops(tally: Tally) -> None:
    """SIGTERM to one rank: all save the last finished step and end; the run goes on as if not."""
    for zero in (1,) if tally.quick else range(4):
        cell = Cell(zero, 2, save_steps=50)
        folder = tally.place(f"stop-{zero}")
        reference = _reference(cell, folder / "whole", tally)
        # In an epoch's last step but one, in the run's last, and within and at the end of others.
        for victim, step in ((1, 2), (0, STEPS), (0, 4), (1, 6))[: 2 if tally.quick else 4]:
            place = folder / f"{victim}-{step}"
            fault = Fault(victim, "forward", ACCUMULATION * (step - 1) + 2, signal.SIGTERM)
            group = cells.run(cell, place, fault)
            codes = group.wait(60 if tally.quick else 25)  # the quick cases run beside others
            problem = None
            if codes != [143, 143]:
                problem = f"exit codes {codes}, hung {group.hung}\n{group.said()[-1500:]}"
            else:
                group = cells.run(cell, place)
                problem = _differs(group, group.wait(), place, reference, cell)
                start = cells.attempts(place, 0)[-1].start
                if problem is None and start < step:
                    problem = f"went on after step {start}, had finished {step}"
            tally.case("SIGTERM to a rank", problem and f"{cell.name}, rank {victim}: {problem}")


def nans(tally: Tally) -> None:
    """Losses that are never finite end the run, and nothing that is not finite is saved."""
    for zero in (0,) if tally.quick else range(4):
        cell = Cell(zero, 2, bf16=bool(zero % 2), poison="all", save_steps=2)
        folder = tally.place(f"nan-{zero}")
        group = cells.run(cell, folder)
        codes, problem = group.wait(60), None
        said = group.said()
        if codes != [DivergedError.exit_code] * 2 or "10 steps in a row" not in said:
            problem = f"exit codes {codes}\n{said[-1500:]}"
        saved = cells.checkpoints(folder)
        for tag in saved.tags():
            if not _finite(cells.contents(tag.folder)):
                problem = f"{tag.folder.name} holds values that are not finite"
        tally.case("endless NaN", problem and f"{cell.name}: {problem}")


def _finite(value) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        # The mean loss since the last line of the log is what it is.
        return all(_finite(one) for key, one in value.items() if key != "meter")
    return all(map(_finite, value)) if isinstance(value, (list, tuple)) else True


# ---- Finished stages ----------------------------------------------------------------------------


def stages(tally: Tally) -> None:
    """Damage to the files of a finished stage: named before anything is read as a model."""
    finished, draw = tally.folder / "run" / "teacher", tally.random
    kept = store.StageStore(tally.folder / "run", World(), {}, "faults", lambda text: None)
    kept.get(finished, {}, lambda folder, saves: _write_model(folder, draw))
    names = sorted(json.loads((finished / RECORD).read_text())["files"])
    found: list[tuple[str, str, Callable[[Path], object]]] = []
    for _ in range(20 if tally.quick else 1000):
        name = draw.choice(names)
        size = (finished / name).stat().st_size
        found.append(("one bit", name, lambda path: flip(path, draw)))
        length = draw.randrange(1, size)
        found.append(("truncated", name, lambda path, n=length: cut(path, n)))
    for name in names:
        found.append(("missing", name, Path.unlink))
        found.append(("emptied", name, refilled))
        found.append(("a folder in its place", name, replaced_by_folder))
        found.append(("longer", name, lambda path: path.open("ab").write(b"}")))
        for other in names[: names.index(name)]:
            there = lambda path, o=other: swap(path, path.with_name(o))  # noqa: E731
            found.append(("two swapped", name, there))
    for kind, name, damage in found:
        copy = tally.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(finished, copy)
        check_folder(copy)
        damage(copy / name)
        named = [copy / name] if kind != "two swapped" else [copy / one for one in names]
        try:
            check_folder(copy)
            problem = "was accepted"
        except CheckpointError as error:
            whose = any(error.cause.startswith(f"{path}: ") for path in named)
            problem = None if whose and error.remedy else f"not named: {error}"
        tally.case(kind, problem and f"{name}: {problem}")


def _write_model(folder: Path, draw: random.Random) -> dict:
    """What ``save_pretrained`` leaves, as far as names and kinds of content go."""
    for name, size in {"model.safetensors": 4000, "domain.safetensors": 300}.items():
        safetensors.torch.save_file({"w": torch.tensor(list(draw.randbytes(size)))}, folder / name)
    for name in ("config.json", "metakd.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({name: draw.random()}))
    return {}


# ---- Launchers -----------------------------------------------------------------------------------

LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"],
    "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--module"],
}


def launchers(tally: Tally) -> None:
    """SIGTERM to a launcher of ``metakd run``; the same command then finishes the run."""
    demo.write_corpus(tally.folder / "corpus", train=12, validation=4, test=6)
    rows = (tally.folder / "corpus" / "train.jsonl").read_text().splitlines()
    demo.scratch_encoder(
        tally.folder / "encoder",
        [json.loads(row)["text"] for row in rows],
        hidden_size=32,
        layers=2,
        heads=2,
        vocab_size=300,
        mlm_steps=0,
    )
    reference = None
    for launcher in ["torchrun"] if tally.quick else LAUNCHERS:
        if reference is None:
            config = _config(tally.folder, "whole")
            code, _ = _launch(launcher, config)
            reference = _losses(tally.folder / "whole")
            problem = f"exit code {code}\n{config.with_suffix('.txt').read_text()[-1500:]}"
            tally.case("uninterrupted", problem if code else None)
        config = _config(tally.folder, launcher)
        code, seconds = _launch(launcher, config, stop=tally.folder / launcher)
        problem = None
        if code == 0 or seconds > 25:
            problem = f"exit code {code} after {seconds:.0f} s"
        elif not list((tally.folder / launcher).rglob("checkpoints/*/MANIFEST.json")):
            problem = "nothing was saved"
        elif _launch(launcher, config)[0]:
            problem = "the same command does not finish it"
        elif _losses(tally.folder / launcher) != reference:
            problem = "losses differ from the uninterrupted run"
        tally.case(f"SIGTERM to {launcher}", problem)


def _config(folder: Path, output: str) -> Path:
    corpus = {
        name: str(folder / "corpus" / f"{name}.jsonl") for name in ("train", "validation", "test")
    }
    training = {"num_train_epochs": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    settings = {
        "output_dir": str(folder / output),
        "data": {"max_length": 24, **corpus},
        "teacher": {"model": str(folder / "encoder"), "training": training},
        "student": {"layers": [1]},
        "distill": {"domains": ["hiking"], "training": {**training}},
        "zero": 2,
        "report_to": ["jsonl"],
        "logging_steps": 1,
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _launch(launcher: str, config: Path, stop: Path | None = None) -> tuple[int, float]:
    """Exit code of a run, and the seconds until all its processes were gone after SIGTERM, which
    comes when its teacher has made three steps, or after its start."""
    command = [*LAUNCHERS[launcher], "metakd", "run", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with config.with_suffix(".txt").open("a") as out:
        running = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    since = time.monotonic()
    while stop is not None and running.poll() is None:
        if any(len(log.read_text().splitlines()) > 3 for log in stop.rglob("log.jsonl")):
            # DeepSpeed's front process passes nothing on: the whole group is told, as a scheduler
            # of jobs does.
            tell = os.kill if launcher == "torchrun" else os.killpg
            tell(running.pid, signal.SIGTERM)
            since = time.monotonic()
            break
        time.sleep(0.05)
    code = running.wait(280)
    with suppress(ProcessLookupError):
        while time.monotonic() - since < 280:
            os.killpg(running.pid, 0)
            time.sleep(0.1)
    return code, time.monotonic() - since


def _losses(folder: Path) -> dict[str, list]:
    return {
        str(log.relative_to(folder)): [
            {k: v for k, v in json.loads(line).items() if not k.endswith("_per_second")}
            for line in log.read_text().splitlines()
        ]
        for log in sorted(folder.rglob("log.jsonl"))
    }


# ---- The command ---------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Tally], None]] = {
    "power": power_failures,
    "corruption": corruption,
    "stages": stages,
    "resume": resume,
    "kills": kills,
    "disk": full_disk,
    "hangs": hangs,
    "stops": stops,
    "launchers": launchers,
    "nans": nans,
}

PAGE = """# Faults

What `make faults` (`python tests/faults.py --out docs/results/faults.md`) did to training runs and
their checkpoints, and how often they did not come through as they must. Two CPU cores, gloo, no
GPU; {versions}.
Each row is of the last run of its part (`--only`), at the commit it names.

| part | cases | failures | seconds | seed | commit | what |
|---|---:|---:|---:|---:|---|---|
"""


def commit() -> str:
    """Of the tree that is tried, as far as git knows."""
    asked = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--exclude",
        "*",
    ]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "-"


def write_page(path: Path, rows: dict[str, str]) -> None:
    """Put the rows of the parts that were run into the page, and keep those of the others."""
    kept = path.read_text().splitlines() if path.exists() else []
    rows = {row.split(" | ")[0][2:]: row for row in kept if row.split(" | ")[0][2:] in PARTS} | rows
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"DeepSpeed {deepspeed.__version__}, transformers {transformers.__version__}"
    )
    page = PAGE.format(versions=versions)
    path.write_text(page + "".join(rows[name] + "\n" for name in PARTS if name in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="this part")
    parser.add_argument("--quick", action="store_true", help="some cases of each part")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="page that receives a row per part")
    options = parser.parse_args()
    cells.warm()
    failed = 0
    for name in options.only or PARTS:
        since = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            tally = Tally(Path(folder), options.seed, options.quick)
            print(f"{name}: {PARTS[name].__doc__}", flush=True)
            PARTS[name](tally)
        seconds, count = time.monotonic() - since, sum(tally.cases.values())
        for kind, number in tally.cases.items():
            print(f"  {number:5} {kind}")
        failures = len(tally.failures)
        print(f"{name}: {count} cases, {failures} failures, {seconds:.0f} s, seed {options.seed}")
        sys.stdout.flush()
        if options.out:
            what = "; ".join(f"{number} {kind}" for kind, number in tally.cases.items())
            cells_ = (name, count, failures, f"{seconds:.0f}", options.seed, commit(), what)
            write_page(options.out, {name: f"| {' | '.join(map(str, cells_))} |"})
        failed += failures
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
