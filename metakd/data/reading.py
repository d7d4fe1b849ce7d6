"""Strict reading of labelled examples: all problems of all files in one pass, each with its place.

CSV, TSV and JSONL are parsed with the standard library and not with a data-frame reader, for two
reasons: each problem needs the exact ``file:row:column: reason``, and a text that reads ``NA`` or
``null`` must stay a text. Parquet files and hub ids go through ``datasets``. ``row`` is the 1-based
line an editor shows (for Parquet and hub ids the 1-based row), ``column`` the column's name; either
is ``-`` where it has no meaning.

Nothing is repaired and nothing is dropped: a source with a problem is refused whole.
Imports ``metakd.config`` and ``metakd.errors`` only (``datasets`` when a source needs it).
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from metakd.config import DataConfig
from metakd.errors import DataError

PROBLEMS_SHOWN = 20
OVERLAP_ALLOWED = 0.01
"""Share of the rows of validation or test that may also be in train without being a problem."""

UNLABELLED = "unlabelled"

LONGEST_DOMAIN = 200
"""Bytes of a domain's name; file systems allow 255, and stages are built beside their place."""

_LINE_END = re.compile(rb"(?<=\n)|(?<=\r)(?!\n)")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*")


class Problem(NamedTuple):
    """One thing wrong with the data, and where."""

    file: str
    row: int | None
    column: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row or '-'}:{self.column or '-'}: {self.reason}"


class Row(NamedTuple):
    """One example and its place. ``pair`` is None for single sentences; the other fields are None
    only where the row has a problem, hence never in what ``read_corpus`` returns."""

    file: str
    row: int
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    domain: str | None = None

    @property
    def example(self) -> tuple[str | None, str | None, str | None]:
        """What makes two rows the same example."""
        return self.text, self.pair, self.domain


class _Problems(list[Problem]):
    """All problems so far; ``rows_lost`` once a file, or a part of one, could not be read."""

    rows_lost = False

    def add(self, file: str, row: int | None, column: str | None, reason: str) -> None:
        self.append(Problem(file, row, column, reason))

    def lose_rows(self, file: str, row: int | None, reason: str) -> None:
        self.add(file, row, None, reason)
        self.rows_lost = True


# A value that was checked and is what it should be, else None; and what is wrong with it.
Checked = tuple[str | None, str | None]


class RawCorpus(NamedTuple):
    """The checked rows of each configured split, and domains and labels in their final order."""

    splits: dict[str, list[Row]]
    domains: list[str]
    labels: list[str]


class _Table(NamedTuple):
    file: str
    columns: list[str]
    header: int | None  # the row that names the columns, if one does
    rows: list[tuple[int, dict[str, Any]]]


def read_corpus(config: DataConfig) -> RawCorpus:
    """Reads and checks every split that the configuration names.

    A source is a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file, a folder of such files (one
    per domain, the file's stem being the domain, whatever a domain column says; names starting with
    a dot are skipped) or a hub id ``owner/name``. UTF-8 with or without a byte order mark, and any
    line ending, are accepted; TSV follows the quoting rules of CSV. Labels are strings or integers;
    integers are kept as their decimal text.

    Labels and domains come from the training split; one of them that only validation or test has is
    a problem. A row of validation or test whose text, pair and domain are also in train leaks: up
    to 1 % of the rows of that split this gives a warning with the count, since large collections do
    contain some; above, each such row is a problem. Unlabelled texts leak likewise: a student would
    learn what its teacher says of the very texts it is scored on. Their label column is not looked
    at. Duplicates inside a split are accepted.

    Args:
        config: the ``data`` block.

    Raises:
        DataError: naming the first 20 problems and how many each file has.
    """
    problems = _Problems()
    train = _read_source(config.train, "train", config, problems)
    train_is_whole = not problems.rows_lost
    splits = {"train": train}
    for split in ("validation", "test", UNLABELLED):
        if (source := getattr(config, split)) is not None:
            unneeded = {"label"} if split == UNLABELLED else set()
            splits[split] = _read_source(source, split, config, problems, unneeded)
    domains = sorted({row.domain for row in train if row.domain is not None})
    labels = _ordered({row.label for row in train if row.label is not None})
    if train:
        if len(labels) == 1:
            reason = f"only one class, {labels[0]!r}: a classifier needs two"
            problems.add(config.train, None, config.label, reason)
        for name in config.withhold:
            if name not in domains:
                reason = f"withheld domain {_unknown(name, domains)}"
                problems.add(config.train, None, config.domain, reason)
        for split in list(splits)[1:]:
            if train_is_whole:  # else what train lacks says nothing
                _check_names_are_known(splits[split], domains, labels, config, problems)
            if split != UNLABELLED:
                for source in filter(splits.get, ("train", UNLABELLED)):
                    _check_overlap(splits, split, source, config, problems)
    if problems:
        raise _error(problems)
    return RawCorpus(splits, domains, labels)


def read_texts(
    file: str, *, text: str = "text", text_pair: str | None = None, label: str | None = None
) -> list[Row]:
    """Reads and checks the texts of one file, as ``read_corpus`` does, to serve or to score.

    Args:
        file: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.
        text: column of the texts.
        text_pair: column of the second texts, if there are any.
        label: column of the labels; rows have none where the file has no such column, which goes
            for a column ``domain`` as well. None reads neither.

    Raises:
        DataError: as ``read_corpus``.
    """
    problems = _Problems()
    columns = {} if label is None else {"label": label}
    config = DataConfig.model_validate(
        {"train": file, "text": text, "text_pair": text_pair, **columns}
    )
    table = _read_file(Path(file), problems)
    rows = []
    if table is not None:
        present = set(table.columns if columns else ()) - {text, text_pair}
        named = {"label": config.label, "domain": config.domain}
        unneeded = {name for name, column in named.items() if column not in present}
        rows = _check_rows(table, config, None, problems, unneeded)
    if problems:
        raise _error(problems, "the file, or its path and the names of its columns")
    return rows


def _ordered(labels: set[str]) -> list[str]:
    in_order = sorted(labels)
    are_integers = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels)
    return sorted(in_order, key=int) if are_integers else in_order


def _error(
    problems: _Problems, place: str = "the files, or the paths and column names in the `data` block"
) -> DataError:
    totals = Counter(problem.file for problem in problems)
    places = list(totals)
    ordered = sorted(problems, key=lambda p: (places.index(p.file), p.row or 0))
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)} in the data"
    if len(places) > 1:
        per_file = [f"{file} {total}" for file, total in totals.most_common(PROBLEMS_SHOWN)]
        per_file += ["..."] * (len(places) > PROBLEMS_SHOWN)
        count += f" ({', '.join(per_file)})"
    if len(problems) > PROBLEMS_SHOWN:
        count += f", the first {PROBLEMS_SHOWN}"
    shown = "\n".join(f"  {problem}" for problem in ordered[:PROBLEMS_SHOWN])
    return DataError(
        f"{count}:\n{shown}",
        f"Correct {place}; no row was skipped or changed.",
    )


def _unknown(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(map(repr, known[:12])) + (", ..." if len(known) > 12 else "")
    return f"{name!r} is unknown{hint} (there are: {listed or 'none'})"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_source(
    source: str,
    split: str,
    config: DataConfig,
    problems: _Problems,
    unneeded: Collection[str] = (),
) -> list[Row]:
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, config, problems, unneeded)
    if path.exists():
        table = _read_file(path, problems)
    elif _is_hub_id(source):
        table = _read_hub(source, split, problems)
    else:
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = get_close_matches(path.name, near, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        problems.lose_rows(source, None, f"no such file or folder, nor a hub id owner/name{hint}")
        return []
    return _check_rows(table, config, None, problems, unneeded) if table else []


def _is_hub_id(source: str) -> bool:
    """``owner/name``; an extension or an existing parent folder means a wrong path."""
    path = Path(source)
    looks_like_file = _FILE_SUFFIX.fullmatch(path.suffix) or path.parent.is_dir()
    return bool(_HUB_ID.fullmatch(source)) and not looks_like_file


def _read_folder(
    folder: Path, config: DataConfig, problems: _Problems, unneeded: Collection[str]
) -> list[Row]:
    rows: list[Row] = []
    tables: dict[str, _Table] = {}
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not files:
        problems.lose_rows(str(folder), None, "empty folder: one file per domain is expected")
    for path in files:
        if path.stem in tables:
            reason = f"domain {path.stem!r} is also in {tables[path.stem].file}"
            problems.add(str(path), None, None, reason)
        table = _read_file(path, problems)
        if table is None:
            continue
        first = next(iter(tables.values()), table)
        if set(table.columns) != set(first.columns):
            reason = (
                f"columns {', '.join(table.columns)} differ from "
                f"{', '.join(first.columns)} in {first.file}"
            )
            problems.add(table.file, table.header, None, reason)
        tables[path.stem] = table
        rows += _check_rows(table, config, path.stem, problems, unneeded)
    return rows


def _read_file(path: Path, problems: _Problems) -> _Table | None:
    readers = {
        ".csv": lambda path, problems: _read_csv(path, ",", problems),
        ".tsv": lambda path, problems: _read_csv(path, "\t", problems),
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        what = "a folder" if path.is_dir() else f"file extension {path.suffix!r} is not known"
        problems.lose_rows(str(path), None, f"{what}; expected {', '.join(readers)}")
        return None
    try:
        table = reader(path, problems)
    except OSError as error:
        problems.lose_rows(str(path), None, f"cannot be read: {error.strerror or error}")
        return None
    if table is not None and not table.rows and not any(p.file == table.file for p in problems):
        reason = "header only, no rows" if table.header else "no rows"
        problems.add(table.file, table.header, None, reason)
    return table


def _read_lines(path: Path, problems: _Problems) -> list[str]:
    """The file's lines with their ends; bad bytes are reported and replaced, so parsing goes on."""
    file, data = str(path), path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        problems.lose_rows(file, 1, "UTF-16 text at byte offset 0; save the file as UTF-8")
        return []
    offset = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    lines = []
    for row, raw in enumerate(_LINE_END.split(data[offset:]), start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at = f"byte 0x{raw[error.start]:02x} at byte offset {offset + error.start}"
            reason = f"bad UTF-8, {at}"
            problems.add(file, row, None, reason)
            line = raw.decode("utf-8", errors="replace")
        if b"\0" in raw:
            reason = f"NUL byte at byte offset {offset + raw.index(0)}"
            problems.add(file, row, None, reason)
            line = line.replace("\0", "\ufffd")
        lines.append(line)
        offset += len(raw)
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        problems.lose_rows(file, None, "empty file")
    return lines


def _read_csv(path: Path, delimiter: str, problems: _Problems) -> _Table | None:
    file, lines = str(path), _read_lines(path, problems)
    if not lines:
        return None
    header: list[str] | None = None
    rows = []
    previous_limit = csv.field_size_limit(sys.maxsize)  # long documents are legitimate
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        while True:
            row = reader.line_num + 1  # where the record starts: quoted fields may span lines
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                reason = f"unclosed or misplaced quote ({error}); lines after it not checked"
                problems.lose_rows(file, row, reason)
                break
            if header is None:
                header = fields
                for name, count in Counter(header).items():
                    if count > 1:
                        problems.add(file, row, name, f"column name given {count} times")
            elif not fields:
                problems.add(file, row, None, "blank line")
            elif len(fields) != len(header):
                reason = f"{len(fields)} fields where the header has {len(header)}"
                problems.add(file, row, None, reason)
            else:
                rows.append((row, dict(zip(header, fields, strict=True))))
    finally:
        csv.field_size_limit(previous_limit)
    return _Table(file, header, 1, rows) if header is not None else None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} given twice")
    return values


def _read_jsonl(path: Path, problems: _Problems) -> _Table | None:
    file, lines = str(path), _read_lines(path, problems)
    rows, columns = [], {}
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            problems.add(file, row, None, "blank line")
            continue
        try:
            values = json.loads(line, object_pairs_hook=_object_without_duplicates)
        except json.JSONDecodeError as error:
            problems.add(file, row, None, f"invalid JSON: {error.msg} at character {error.colno}")
            continue
        except (ValueError, RecursionError) as error:
            problems.add(file, row, None, f"invalid JSON: {error}")
            continue
        if not isinstance(values, dict):
            problems.add(file, row, None, f"{_show(values)} is not a JSON object")
            continue
        columns.update(dict.fromkeys(values))
        rows.append((row, values))
    return _Table(file, list(columns), 1, rows) if rows else None


def _read_parquet(path: Path, problems: _Problems) -> _Table | None:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        # The table is read directly: Dataset.from_parquet would copy it into a cache on disk first.
        return _from_dataset(str(path), Dataset(pyarrow.parquet.read_table(path)))
    except (pyarrow.ArrowException, ValueError) as error:
        problems.lose_rows(str(path), None, f"unreadable Parquet: {str(error).splitlines()[0]}")
        return None


def _read_hub(name: str, split: str, problems: _Problems) -> _Table | None:
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


def _from_dataset(file: str, dataset) -> _Table:
    from datasets import ClassLabel

    values = dataset.to_dict()
    for name, feature in dataset.features.items():
        # An id that has a name is kept by its name; -1 means unlabelled.
        if isinstance(feature, ClassLabel):
            values[name] = [
                None if i is None or i < 0 else feature.int2str(i) for i in values[name]
            ]
    rows = [dict(zip(values, row)) for row in zip(*values.values())]
    return _Table(file, list(values), None, list(enumerate(rows, start=1)))


def _check_rows(
    table: _Table,
    config: DataConfig,
    domain: str | None,
    problems: _Problems,
    unneeded: Collection[str] = (),
) -> list[Row]:
    """Checks columns and cells, except for a label or domain that is not needed; ``domain`` is
    given where the file's name says it."""
    checks: list[tuple[str, str, Callable[[Any], Checked]]] = [
        ("text", config.text, _check_text),
        ("label", config.label, partial(_check_name, "label")),
    ]
    if config.text_pair is not None:
        checks.append(("pair", config.text_pair, _check_text))
    if domain is None:
        checks.append(("domain", config.domain, _check_domain))
    checks = [check for check in checks if check[0] not in unneeded]
    for _, column, _ in checks:
        if column not in table.columns:
            reason = f"missing column: {_unknown(column, table.columns)}"
            problems.add(table.file, table.header, column, reason)
    checks = [(name, column, check) for name, column, check in checks if column in table.columns]
    if domain is not None and (wrong := _check_domain(domain)[1]):
        problems.add(table.file, None, None, wrong)
    rows = []
    for row, values in table.rows:
        fields: dict[str, str | None] = {} if domain is None else {"domain": domain}
        for name, column, check in checks:
            fields[name], wrong = check(values.get(column))
            if wrong:
                problems.add(table.file, row, column, wrong)
        rows.append(Row(table.file, row, **fields))
    if "label" not in unneeded:
        _check_label_types(table, config.label, problems)
    return rows


def _check_label_types(table: _Table, column: str, problems: _Problems) -> None:
    first_type, first_row = None, None
    for row, values in table.rows:
        kind = type(values.get(column))
        if kind not in (str, int):
            continue
        if first_type is None:
            first_type, first_row = kind, row
        elif kind is not first_type:
            reason = (
                f"label {_show(values[column])} is {kind.__name__}, "
                f"in row {first_row} it is {first_type.__name__}"
            )
            problems.add(table.file, row, column, reason)


def _check_text(value: Any) -> Checked:
    if value is None:
        return None, "missing text"
    if isinstance(value, float) and math.isnan(value):
        return None, "NaN is not a text"
    if not isinstance(value, str):
        return None, f"{type(value).__name__} {_show(value)} is not a text"
    if not value.strip():
        return None, "empty text"
    return _check_characters(value)


def _check_name(what: str, value: Any) -> Checked:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None, f"missing {what}"
    if isinstance(value, float) and math.isnan(value):
        return None, f"NaN is not a {what}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), None
    if not isinstance(value, str):
        found = f"{type(value).__name__} {_show(value)}"
        return None, f"{found} is not a {what}: give a string or an integer"
    if value != value.strip():
        return None, f"{what} {_show(value)} has white space around it"
    return _check_characters(value)


def _check_domain(value: Any) -> Checked:
    """A domain's name, which is also that of its student's folder: it must not lead elsewhere."""
    name, reason = _check_name("domain", value)
    if name is not None and (
        name.startswith(".")
        or re.search(r"[/\\\x00-\x1f\x7f]", name)
        or len(name.encode()) > LONGEST_DOMAIN
    ):
        return None, f"domain {_show(name)} cannot name a folder"
    return name, reason


def _check_characters(value: str) -> Checked:
    """What an escape in JSON or a Parquet file can smuggle past the check of the bytes."""
    if "\0" in value:
        return None, f"NUL character at position {value.index(chr(0))}"
    if re.search("[\ud800-\udfff]", value):
        return None, "half of a surrogate pair, which is no character"
    return value, None


def _check_names_are_known(
    rows: list[Row],
    domains: list[str],
    labels: list[str],
    config: DataConfig,
    problems: _Problems,
) -> None:
    for row in rows:
        if labels and row.label is not None and row.label not in labels:
            reason = f"label not in train: {_unknown(row.label, labels)}"
            problems.add(row.file, row.row, config.label, reason)
        if domains and row.domain is not None and row.domain not in domains:
            reason = f"domain not in train: {_unknown(row.domain, domains)}"
            problems.add(row.file, row.row, config.domain, reason)


def _check_overlap(
    splits: dict[str, list[Row]],
    split: str,
    source: str,
    config: DataConfig,
    problems: _Problems,
) -> None:
    rows = splits[split]
    first = {row.example: row for row in reversed(splits[source]) if row.text is not None}
    shared = [(row, first[row.example]) for row in rows if row.example in first]
    if len(shared) > OVERLAP_ALLOWED * len(rows):
        for row, twin in shared:
            reason = f"the same example is in {source}, {twin.file}:{twin.row}"
            problems.add(row.file, row.row, config.text, reason)
    elif shared:
        row, twin = shared[0]
        warnings.warn(
            f"{len(shared)} of {len(rows)} rows of {split} are also in {source}, "
            f"the first at {row.file}:{row.row} and {twin.file}:{twin.row}",
            stacklevel=4,
        )
