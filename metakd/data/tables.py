"""Files to tables: the rows of a CSV, TSV, JSONL, Parquet or plain text file or of a hub id, with
the place of everything that is wrong in them.

CSV, TSV and JSONL are parsed with the standard library and not with a data-frame reader, for two
reasons: each problem needs the exact ``file:row:column: reason``, and a text that reads ``NA`` or
``null`` must stay a text. Parquet files and hub ids go through ``datasets``. ``row`` is the 1-based
line an editor shows (for Parquet and hub ids the 1-based row), ``column`` the column's name; either
is ``-`` where it has no meaning.

Nothing is repaired. What is wrong with a row alone can leave out that row (``data.on_problem``);
everything else refuses the source whole. Imports ``metakd.config`` only (``datasets`` when a source
needs it).
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from metakd.config import DataConfig

_LINE_END = re.compile(rb"(?<=\n)|(?<=\r)(?!\n)")
_UTF8 = ("utf-8", "utf-8-sig")
STANDARD_INPUT = Path("-")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
INTEGER = re.compile(r"-?[0-9]{1,18}")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHER_DELIMITERS = {";": "';'", "\t": "tabs", ",": "','", "|": "'|'"}
_MOSTLY = 0.2
"""Share of NUL bytes above which a file is taken for UTF-16 without a byte order mark."""


class Problem(NamedTuple):
    """One thing wrong with the data, and where."""

    file: str
    row: int | None
    column: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row or '-'}:{self.column or '-'}: {self.reason}"


class LeftOut(NamedTuple):
    """How many rows of a file are not read, and why."""

    file: str
    reason: str
    rows: int

    def __str__(self) -> str:
        return f"{self.file}: {self.rows} row{'s' * (self.rows > 1)} left out: {self.reason}"


class Problems(list[Problem]):
    """All problems so far, ways out of them, and the rows that are left out instead.

    Args:
        drop: leave out rows that something is wrong with, rather than call it a problem.
    """

    def __init__(self, drop: bool = False):
        super().__init__()
        self.rows_lost = False  # a file, or a part of one, could not be read
        self.of_rows: set[tuple[str, int]] = set()  # with which alone something is wrong
        self.ways_out: dict[str, None] = {}  # in order, each once
        self.drop = drop
        self.split = ""  # being read: what it cannot use of a file another may
        self._dropped: dict[tuple[str, str, int], tuple[str, int]] = {}
        self._overlap: Counter[tuple[str, str]] = Counter()

    def add(self, file: str, row: int | None, column: str | None, reason: str) -> None:
        """Something that refuses the source."""
        self.append(Problem(file, row, column, reason))

    def lose_rows(self, file: str, row: int | None, reason: str) -> None:
        """The same, and nobody knows which rows there are."""
        self.add(file, row, None, reason)
        self.rows_lost = True

    def add_row(
        self,
        file: str,
        row: int,
        column: str | None,
        kind: str,
        reason: str = "",
        lines: int = 1,
    ) -> None:
        """Something wrong with a row alone.

        Args:
            file: where.
            row: its first line.
            column: of the cell.
            kind: what, in words that rows with the same trouble share.
            reason: of this row, by default the same.
            lines: that go with it.
        """
        if self.drop:
            self._dropped.setdefault((self.split, file, row), (kind, lines))
            return
        self.of_rows.add((file, row))
        self.add(file, row, column, reason or kind)

    def offer(self, way_out: str) -> None:
        """What to do about a problem, said once below all of them."""
        self.ways_out.setdefault(way_out)

    def drops(self, file: str, first: int, last: int | None = None) -> bool:
        """Is one of these lines left out?"""
        lines = range(first, (first if last is None else last) + 1)
        return bool(self._dropped) and any(
            (self.split, file, line) in self._dropped for line in lines
        )

    def drop_overlap(self, file: str, split: str) -> None:
        """A row is left out because a split has it, too."""
        self._overlap[file, f"also in {split}"] += 1

    @property
    def left_out(self) -> list[LeftOut]:
        """Rows that are not read, by file and reason."""
        found: Counter[tuple[str, str]] = Counter()
        once = {(file, row): reason for (_, file, row), reason in self._dropped.items()}
        for (file, _), (kind, lines) in once.items():
            found[file, kind] += lines
        return [LeftOut(*key, rows) for key, rows in (found + self._overlap).items()]


class Table(NamedTuple):
    """The rows of a file, as they are."""

    file: str
    columns: list[str]
    header: int | None  # the row that names the columns, if one does
    rows: list[tuple[int, dict[str, Any]]]


def read_file(
    path: Path, config: DataConfig, problems: Problems, plain: bool = False
) -> Table | None:
    """The rows of a file by its extension, None if it cannot be read.

    Args:
        path: of the file.
        config: says how a delimited one is written, and which column holds the labels.
        problems: receives what is wrong.
        plain: lines of text will do, from a ``.txt`` or the standard input.
    """
    reader = _READERS.get(path.suffix.lower())
    if plain and (path == STANDARD_INPUT or path.suffix.lower() == ".txt"):
        reader = _read_plain
    if reader is None:
        what = "a folder" if path.is_dir() else f"file extension {path.suffix!r} is not known"
        problems.lose_rows(str(path), None, f"{what}; expected {', '.join(_READERS)}")
        return None
    before = len(problems)
    try:
        table = reader(path, config, problems)
    except OSError as error:
        problems.lose_rows(str(path), None, f"cannot be read: {error.strerror or error}")
        return None
    if table is None or table.rows:
        return table
    if len(problems) == before:
        reason = "header only, no rows" if table.header else "no rows"
        if any(one.file == table.file for one in problems.left_out):
            reason = "no row is left"
        problems.add(table.file, table.header, None, reason)
    return None


def read_hub(name: str, split: str, problems: Problems) -> Table | None:
    """The rows of a split of a hub id, None if it cannot be read."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:  # its own, the network's and every parser's
        first = (str(error).splitlines() or ["no reason given"])[0]
        reason = f"no such file, and as a hub id: {type(error).__name__}: {first}"
        problems.lose_rows(name, None, reason)
        return None
    table = _from_dataset(f"{name}[{split}]", dataset)
    if not table.rows:
        problems.add(table.file, None, None, "no rows")
    return table


def ordered(labels: set[str]) -> list[str]:
    """Labels in the order of their ids: integers by size, words by the alphabet."""
    in_order = sorted(labels)
    are_integers = all(map(INTEGER.fullmatch, labels))
    return sorted(in_order, key=int) if are_integers else in_order


def show(value: Any) -> str:
    """A value in a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_lines(path: Path, config: DataConfig, problems: Problems) -> list[str]:
    """The file's lines with their ends; bad bytes are reported and replaced, so parsing goes on."""
    file = str(path)
    data = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes()
    mark = _BYTE_ORDER_MARKS.get(data[:2])
    if config.encoding is not None and codecs.lookup(config.encoding).name not in _UTF8:
        lines = _decode_whole(file, data, config.encoding, problems)
    elif mark or data.count(b"\0") > _MOSTLY * len(data):
        reason = f"{mark or 'UTF-16'} text at byte offset 0; save the file as UTF-8"
        problems.lose_rows(file, 1, reason)
        _offer_encoding(path, "utf-16", problems)
        return []
    else:
        lines = _decode_lines(path, data, problems)
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines and not any(problem.file == file for problem in problems):
        problems.lose_rows(file, None, "empty file")
    return lines


def _decode_lines(path: Path, data: bytes, problems: Problems) -> list[str]:
    """UTF-8, with or without a byte order mark."""
    file, lines, bad = str(path), [], 0
    offset = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    for row, raw in enumerate(_LINE_END.split(data[offset:]), start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at = f"byte 0x{raw[error.start]:02x} at byte offset {offset + error.start}"
            problems.add_row(file, row, None, "bad UTF-8", f"bad UTF-8, {at}")
            line, bad = raw.decode("utf-8", errors="replace"), bad + 1
        if b"\0" in raw:
            reason = f"NUL byte at byte offset {offset + raw.index(0)}"
            problems.add_row(file, row, None, "NUL byte", reason)
            line = line.replace("\0", "\ufffd")
        lines.append(line)
        offset += len(raw)
    if bad:
        _offer_encoding(path, _likely_encoding(data), problems)
    return lines


def _decode_whole(file: str, data: bytes, encoding: str, problems: Problems) -> list[str]:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        at = f"byte 0x{data[error.start]:02x} at byte offset {error.start}"
        problems.lose_rows(file, data.count(b"\n", 0, error.start) + 1, f"bad {encoding}, {at}")
        return []
    lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text.removeprefix("\ufeff"))
    for row, line in enumerate(lines, start=1):
        if "\0" in line:
            reason = f"NUL character at position {line.index(chr(0))}"
            problems.add_row(file, row, None, "NUL character", reason)
    return [line.replace("\0", "\ufffd") for line in lines]


def _likely_encoding(data: bytes) -> str:
    """What text that is not UTF-8 mostly is: Windows' code page, else the one that takes all
    bytes."""
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252"


def _offer_encoding(path: Path, encoding: str, problems: Problems) -> None:
    better = shlex.quote(f"{path.with_suffix('')}.utf8{path.suffix}")
    name = {"latin-1": "ISO-8859-1"}.get(encoding, encoding.upper())
    problems.offer(
        f"{path.name} looks like {encoding}: set data.encoding: {encoding}, or convert it with "
        f"iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > {better}"
    )


def _read_delimited(path: Path, config: DataConfig, problems: Problems) -> Table | None:
    file, lines = str(path), _read_lines(path, config, problems)
    if not lines:
        return None
    delimiter = config.delimiter or _DELIMITERS[path.suffix.lower()]
    if config.quoting == "none":
        records = _split_lines(lines, delimiter)
    else:
        records = _parse(file, lines, delimiter, problems)
    first, _, header = next(records, (1, 1, []))
    if not header or problems.drops(file, 1):
        problems.lose_rows(file, first, "no names of columns: the first line must hold them")
        return None
    _offer_delimiter(lines[0], delimiter, config, problems)
    rows, spanning = [], []
    for row, last, fields in records:
        if not fields:
            problems.add_row(file, row, None, "blank line")
        elif len(fields) != len(header):
            reason = f"{len(fields)} fields where the header has {len(header)}"
            problems.add_row(file, row, None, "wrong number of fields", reason)
        elif not problems.drops(file, row, last):
            if any(delimiter in field and re.search(r"[\r\n]", field) for field in fields):
                spanning.append((row, last))
            rows.append((row, dict(zip(header, fields, strict=True))))
    table = Table(file, header, first, rows)
    if "quoting" in config.model_fields_set:  # the user has said that quotes are quotes
        return table
    swallowed = set(_find_swallowed(table, lines, spanning, delimiter, config, problems))
    return table._replace(rows=[row for row in rows if row[0] not in swallowed])


def _split_lines(lines: list[str], delimiter: str):
    """Records of a file in which a quote is a character like others."""
    for row, line in enumerate(lines, start=1):
        text = line.rstrip("\r\n")
        yield row, row, text.split(delimiter) if text else []


def _parse(file: str, lines: list[str], delimiter: str, problems: Problems):
    """Records by the rules of CSV. After a quote that breaks them reading goes on with the next
    line, if that looks like a row, else behind the place."""
    start, width = 0, 0
    previous_limit = csv.field_size_limit(sys.maxsize)  # long documents are legitimate
    try:
        while start < len(lines):
            left = (lines[place] for place in range(start, len(lines)))
            reader = csv.reader(left, delimiter=delimiter, strict=True)
            row = start + 1
            try:
                for fields in reader:
                    width = width or len(fields)
                    yield row, start + reader.line_num, fields
                    row = start + reader.line_num + 1  # quoted fields may span lines
                return
            except csv.Error as error:
                kind = "unclosed or misplaced quote"
                problems.offer(_NO_QUOTING)
                if row == 1:
                    problems.lose_rows(file, row, f"{kind} ({error})")
                    return
                broken_at = start + reader.line_num
                start = row
                follows = lines[row].rstrip("\r\n").split(delimiter) if row < len(lines) else []
                if "unexpected end" not in str(error) and (width < 2 or len(follows) != width):
                    start = broken_at
                problems.add_row(file, row, None, kind, f"{kind} ({error})", lines=start - row + 1)
                problems.rows_lost |= not problems.drop
    finally:
        csv.field_size_limit(previous_limit)


_NO_QUOTING = "where a quote is a character like others, set data.quoting: none"


def _offer_delimiter(header: str, delimiter: str, config: DataConfig, problems: Problems) -> None:
    """A first line in which another delimiter would find the columns."""
    wanted = {config.text, *config.label_columns}
    if wanted <= set(header.strip().split(delimiter)):
        return
    for mark, said in _OTHER_DELIMITERS.items():
        names = {name.strip('"') for name in header.strip().split(mark)}
        if mark != delimiter and wanted <= names:
            value = json.dumps(mark)
            problems.offer(f"are the columns separated by {said}? set data.delimiter: {value}")


def _find_swallowed(
    table: Table,
    lines: list[str],
    spanning: list[tuple[int, int]],
    delimiter: str,
    config: DataConfig,
    problems: Problems,
):
    """First lines of the records that look like several rows between two stray quotes: their first
    line and their last would be a row each, with a label that other lines have. (Prose has a space
    after a comma, and rows have none.)"""
    column = config.label_columns[0]
    if not spanning or column not in table.columns:
        return
    at, width = table.columns.index(column), len(table.columns)

    def label(line: str) -> str | None:
        fields = line.rstrip("\r\n").split(delimiter)
        if len(fields) != width or any(field[:1].isspace() for field in fields):
            return None
        return fields[at].strip('"')

    known = Counter(map(label, lines))
    for row, last in spanning:
        ends = [label(lines[row - 1]), label(lines[last - 1])]
        if None not in ends and all(known[name] > 1 for name in ends):
            kind = "a quote swallows line ends"
            reason = f"{kind}: lines {row} to {last} would be one row"
            problems.add_row(table.file, row, None, kind, reason, lines=last - row + 1)
            problems.offer(f"{_NO_QUOTING}; where they are one row, data.quoting: csv")
            yield row


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} given twice")
    return values


def _read_jsonl(path: Path, config: DataConfig, problems: Problems) -> Table | None:
    file, lines = str(path), _read_lines(path, config, problems)
    rows, columns = [], {}
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            problems.add_row(file, row, None, "blank line")
            continue
        try:
            values = json.loads(line, object_pairs_hook=_object_without_duplicates)
        except json.JSONDecodeError as error:
            reason = f"invalid JSON: {error.msg} at character {error.colno}"
            problems.add_row(file, row, None, "invalid JSON", reason)
            continue
        except (ValueError, RecursionError) as error:
            problems.add_row(file, row, None, "invalid JSON", f"invalid JSON: {error}")
            continue
        if not isinstance(values, dict):
            reason = f"{show(values)} is not a JSON object"
            problems.add_row(file, row, None, "not a JSON object", reason)
            continue
        columns.update(dict.fromkeys(values))
        if not problems.drops(file, row):
            rows.append((row, values))
    return Table(file, list(columns), 1, rows) if lines else None


def _read_plain(path: Path, config: DataConfig, problems: Problems) -> Table | None:
    """A text a line."""
    file, lines = str(path), _read_lines(path, config, problems)
    rows = [
        (row, {config.text: line.rstrip("\r\n")})
        for row, line in enumerate(lines, start=1)
        if not problems.drops(file, row)
    ]
    return Table(file, [config.text], None, rows) if lines else None


def _read_parquet(path: Path, config: DataConfig, problems: Problems) -> Table | None:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        # The table is read directly: Dataset.from_parquet would copy it into a cache on disk first.
        return _from_dataset(str(path), Dataset(pyarrow.parquet.read_table(path)))
    except (pyarrow.ArrowException, ValueError) as error:
        problems.lose_rows(str(path), None, f"unreadable Parquet: {str(error).splitlines()[0]}")
        return None


def _name_of(number: int | None, feature) -> str | None:
    return None if number is None or number < 0 else feature.int2str(number)


def _from_dataset(file: str, dataset) -> Table:
    from datasets import ClassLabel

    values = dataset.to_dict()
    for name, feature in dataset.features.items():
        # An id that has a name is kept by its name; -1 means unlabelled.
        if isinstance(feature, ClassLabel):
            values[name] = [_name_of(i, feature) for i in values[name]]
        several = getattr(feature, "feature", None)
        if isinstance(several, ClassLabel):
            values[name] = [
                None if ids is None else [_name_of(i, several) for i in ids] for ids in values[name]
            ]
    rows = [dict(zip(values, row)) for row in zip(*values.values())]
    return Table(file, list(values), None, list(enumerate(rows, start=1)))


_READERS: dict[str, Callable[[Path, DataConfig, Problems], Table | None]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
