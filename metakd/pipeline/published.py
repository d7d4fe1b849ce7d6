"""What a finished stage has published: ``stage.json`` says size and SHA-256 of each file that
something is computed from, and whoever is about to rely on the stage compares.

Not among them is what people and programs may add to or write anew: logs, the card, exports. Stages
of metakd 0.1 say nothing of their files, and nothing is compared. Imports neither torch nor
DeepSpeed.
"""

from __future__ import annotations

import json
from pathlib import Path

from metakd.data.digests import check_content, check_size, is_entry
from metakd.errors import CheckpointError

RECORD = "stage.json"
LOG = "log.jsonl"
INPUTS = "inputs.txt"  # there while it is built
_FREE = {RECORD, LOG, INPUTS, "README.md", "tensorboard"}


def is_recorded(name: Path) -> bool:
    """Is this file, by its path within the stage's folder, one whose digest is recorded?"""
    hidden = any(part.startswith(".") for part in name.parts)
    return not hidden and name.parts[0] not in _FREE


def read_record(folder: Path, *needed: str) -> dict:
    """The record of the stage in this folder; empty where there is none.

    Args:
        folder: of the stage, or of anything.
        needed: what the record must say.

    Raises:
        CheckpointError: it cannot be read, or does not say that.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not set(needed) <= record.keys():
            raise ValueError("it is not complete")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    return record


def check_folder(folder: Path, *, contents: bool = True, weights: bool = True) -> None:
    """``check_files`` of a folder by the record in it; one without a record passes."""
    check_files(folder, read_record(folder), contents=contents, weights=weights)


def check_files(folder: Path, record: dict, *, contents: bool = True, weights: bool = True) -> None:
    """Compare a stage's files with what its record says of them; others beside them are nobody's
    business.

    Args:
        folder: of the stage.
        record: see ``read_record``.
        contents: read every file for its digest; False looks at sizes alone.
        weights: False leaves out the tensors, for who does not read them.

    Raises:
        CheckpointError: a file is missing, of another size or of other content, or cannot be read.
    """
    files = record.get("files", {})
    if not isinstance(files, dict) or not all(map(is_entry, files.values())):
        raise _damaged(folder / RECORD, "it has no size and digest of each file")
    paths = {folder / name: entry for name, entry in sorted(files.items())}
    if not weights:
        paths = {p: entry for p, entry in paths.items() if p.suffix != ".safetensors"}
    try:
        # Sizes first: what is missing or cut off shows before gigabytes are read.
        for check in (check_size, check_content) if contents else (check_size,):
            for path, entry in paths.items():
                check(path, entry)
    except (CheckpointError, OSError) as error:
        cause = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error.cause
        raise CheckpointError(
            cause,
            f"bring back the file, or move {folder} away and give the command again that built it "
            f"({RECORD} names it); a model that was changed on purpose belongs in a folder of its "
            f"own, without {RECORD}",
        ) from error


def _damaged(record: Path, why: str) -> CheckpointError:
    remedy = f"move {record.parent} away and build it again"
    return CheckpointError(f"{record}: is damaged: {why}", remedy)
