"""What past students on this machine came to: one SQLite file, a row for each that was trained.

A row holds numbers, and the names of methods, kinds and settings: no text, no path, no name of a
domain, a class or a model. The file is ``$METAKD_HISTORY`` (``off``: there is none), or
``metakd/runs.sqlite`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, for its owner alone. A training run
never fails for it. Imports the standard library and no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metakd import __version__
from metakd.errors import CheckpointError
from metakd.extension import user_cache

VARIABLE = "METAKD_HISTORY"
SCHEMA = 1  # of the table, and of what the features are: ``PRAGMA user_version`` of the file

_PATIENCE = 5.0  # seconds, while another run writes its row
# A student that is trained again takes the place of its former row.
_TABLE = """
CREATE TABLE students (
    key BLOB PRIMARY KEY, metric TEXT, features TEXT, settings TEXT, seeds TEXT,
    validation REAL, test REAL, teacher REAL, seconds REAL, version TEXT, finished INTEGER
)
"""


@dataclass(frozen=True)
class PastRun:
    """A student that was trained.

    Args:
        metric: that its scores are of.
        features: what it was trained in: corpus, teacher, student.
        settings: how it was trained, by the dotted keys of the configuration.
        seeds: its own, and that of its teacher.
        validation: its score on the validation split.
        test: and on the test split, if there is one.
        teacher: the teacher's on the validation split, if it is known.
        seconds: that it took.
    """

    metric: str
    features: dict[str, float]
    settings: dict[str, Any]
    seeds: Sequence[int | None]
    validation: float
    test: float | None = None
    teacher: float | None = None
    seconds: float | None = None


def history_file() -> Path | None:
    """Where the history is; None where none is to be kept."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() in ("off", "no", "false", "0"):
        return None
    try:
        if given:
            return Path(given).expanduser()
        return user_cache() / "runs.sqlite"
    except RuntimeError:  # nobody knows where this user is at home
        return None


class History:
    """The file of past runs.

    Args:
        path: see ``history_file``.
        say: told what a person should know, each line once.
    """

    def __init__(self, path: Path | None, say: Callable[[str], None] = lambda text: None):
        self.path = path
        self._say = say
        self._said: set[str] = set()

    def add(self, run: PastRun) -> None:
        """Write a row. What stands in the way is said, and never raised."""
        if self.path is None:
            return
        try:
            is_new = self._create()
            with self._opened() as table:
                table.execute("BEGIN IMMEDIATE")
                if not self._is_ours(table):
                    table.execute(_TABLE)
                    table.execute(f"PRAGMA user_version = {SCHEMA}")
                known = run.metric, *map(_written, (run.features, run.settings, run.seeds))
                key = hashlib.sha256("\n".join(known).encode()).digest()
                came = run.validation, run.test, run.teacher, run.seconds
                row = key, *known, *came, __version__, int(time.time())
                marks = ", ".join("?" * len(row))
                table.execute(f"INSERT OR REPLACE INTO students VALUES ({marks})", row)
                table.execute("COMMIT")
        except (OSError, sqlite3.Error, ValueError) as error:
            self._once(f"warning: {self.path}: this run is not remembered: {error}")
            return
        if is_new:
            self._once(
                f"scores and settings of runs are remembered in {self.path} for `metakd suggest`; "
                f"{VARIABLE}=off switches that off"
            )

    def read(self) -> list[PastRun]:
        """All rows that have a score; none where there is no file.

        Raises:
            CheckpointError: the file cannot be read, is damaged, or is of another version.
        """
        if self.path is None or not self.path.exists():
            return []
        columns = "metric, features, settings, seeds, validation, test, teacher, seconds"
        try:
            with self._opened() as table:
                if not self._is_ours(table):
                    return []
                query = f"SELECT {columns} FROM students WHERE validation IS NOT NULL"
                rows = table.execute(query).fetchall()
            return [
                PastRun(metric, *map(json.loads, (features, settings, seeds)), *scores)
                for metric, features, settings, seeds, *scores in rows
            ]
        except (OSError, sqlite3.Error, ValueError) as error:
            raise CheckpointError(f"{self.path}: {error}", _REMEDY) from error

    def _create(self) -> bool:
        """An empty file for its owner alone, where there is none."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        return True

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        # No write-ahead log: homes lie on network file systems, where it does not work.
        place = f"{self.path.absolute().as_uri()}?mode=rw"
        table = sqlite3.connect(place, uri=True, timeout=_PATIENCE, isolation_level=None)
        try:
            yield table
        finally:
            table.close()

    def _is_ours(self, table: sqlite3.Connection) -> bool:
        """False of an empty file.

        Raises:
            ValueError: another version, or another program, has written it.
        """
        (version,) = table.execute("PRAGMA user_version").fetchone()
        (tables,) = table.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version != SCHEMA and (version or tables):
            raise ValueError(f"has schema {version}, this version of metakd writes {SCHEMA}")
        return version == SCHEMA

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)


_REMEDY = f"move it away, or name another file: {VARIABLE}=FILE"


def _written(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
