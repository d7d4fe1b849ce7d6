"""Strict reading of labelled examples: all problems of all files in one pass, each with its place.

``tables`` reads files; here columns and cells are checked, and the splits against each other. What
has a problem is refused whole unless ``data.on_problem`` and ``data.overlap`` say to leave out the
rows concerned, and then it is counted which.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metakd.config import DataConfig
from metakd.config.places import closest, is_file_name, may_be_hub_id, meant
from metakd.data.labels import (
    NUMBER,
    READERS,
    Checked,
    Label,
    LabelReader,
    check_characters,
    check_name,
)
from metakd.data.soft_labels import SoftLabels, settle
from metakd.data.tables import LeftOut, Problems, Table, read_file, read_hub, show
from metakd.errors import DataError
from metakd.method.tasks import SINGLE_LABEL

PROBLEMS_SHOWN = 20
OVERLAP_ALLOWED = 0.01
"""Share of the rows of validation or test that may also be in train without being a problem."""

UNLABELLED = "unlabelled"
ONE_DOMAIN = "all"
"""Name of the domain where a corpus says nothing of domains."""

_MOST = 0.5
"""Share of rows with something wrong from which on it is the file that is meant otherwise."""

_SPLIT_NAMES = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing"},
    UNLABELLED: {UNLABELLED, "unlabeled"},
}
_TAUGHT, _SCORED = ("train", UNLABELLED), ("validation", "test")

LONGEST_DOMAIN = 200
"""Bytes of a domain's name; file systems allow 255, and stages are built beside their place."""


class Row(NamedTuple):
    """One example and its place. ``pair`` is None for single sentences; the other fields are None
    only where the row has a problem, hence never in what ``read_corpus`` returns."""

    file: str
    row: int
    text: str | None = None
    pair: str | None = None
    label: Label | None = None
    domain: str | None = None
    soft: dict[str, float] | list[float] | None = None  # of a teacher, by class or in their order

    @property
    def example(self) -> tuple[str | None, str | None, str | None]:
        """What makes two rows the same example."""
        return self.text, self.pair, self.domain


class RawCorpus(NamedTuple):
    """The checked rows of each split, domains and what models have outputs for in their final
    order, and what the policies of the ``data`` block left out."""

    splits: dict[str, list[Row]]
    domains: list[str]
    labels: list[str]
    left_out: list[LeftOut]


def read_corpus(config: DataConfig) -> RawCorpus:
    """Reads and checks every split that the configuration names.

    A source is a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file (for texts without labels a
    ``.txt``, too, with a text a line), a hub id ``owner/name``, or a folder of such files (names
    starting with a dot are skipped): one per domain, the file's stem being the domain, whatever a
    domain column says; or one per split, named ``train``, ``validation`` (``valid``, ``val``,
    ``dev``), ``test``. If ``data.train`` is such a folder its validation and test files are taken,
    too, unless the configuration names others. Without ``data.domain`` all texts are of one domain.
    UTF-8 with or without a byte order mark (or ``data.encoding``) and any line ending are accepted;
    TSV follows the quoting rules of CSV unless ``data.quoting`` is ``none``. Labels are what
    ``data.labels`` reads; integers that are classes are kept as their decimal text.

    Labels and domains come from the training split; one of them that only validation or test has is
    a problem. A row of validation or test whose text, pair and domain are also in train leaks: up
    to 1 % of the rows of that split this gives a warning with the count, since large collections do
    contain some; above, each such row is a problem, unless ``data.overlap`` says otherwise.
    Unlabelled texts leak likewise: a student would learn what its teacher says of the very texts it
    is scored on. Their label column is not looked at. Duplicates inside a split are accepted; texts
    of several labels, and names that differ only in spelling, are counted in a warning.

    Args:
        config: the ``data`` block.

    Raises:
        DataError: naming the first 20 problems and how many each file has.
    """
    problems = Problems(drop=config.on_problem == "drop")
    splits = {}
    for split, source in _sources(config).items():
        unneeded = {"label"} if split == UNLABELLED else set()
        unneeded |= {"soft"} if split in _SCORED else set()
        problems.split = split
        splits[split] = _read_source(source, split, config, problems, unneeded)
        if split == "train":
            train_is_whole = not problems.rows_lost
    if config.overlap == "drop_train":
        for split in filter(splits.get, _SCORED):
            for source in filter(splits.get, _TAUGHT):
                splits[source] = _without(splits[source], splits[split], split, problems)
        if UNLABELLED in splits and not splits[UNLABELLED]:
            del splits[UNLABELLED]
        if not splits["train"] and not problems:
            reason = "no row is left: all are also in validation or test"
            problems.add(config.train, None, None, reason)
    train = splits["train"]
    domains = sorted({row.domain for row in train if row.domain is not None})
    reader = READERS[config.task](config)
    given = [row.label for row in train if row.label is not None]
    labels = reader.outputs(given)
    if config.soft_labels is not None:
        taught = [split for split in _TAUGHT if split in splits]
        labels = settle(splits, taught, labels, config, problems)
        train = splits["train"]
        given = [row.label for row in train if row.label is not None]
    if train:
        if reason := reader.lacking(given, labels):
            problems.add(config.train, None, reader.columns[0], reason)
        for name in config.withhold:
            if name not in domains:
                reason = f"withheld domain {_unknown(name, domains)}"
                problems.add(config.train, None, config.domain, reason)
        for split in list(splits)[1:]:
            if train_is_whole:  # else what train lacks says nothing
                _check_names_are_known(splits[split], domains, labels, reader, problems)
            if split in _SCORED:
                for source in filter(splits.get, _TAUGHT):
                    _check_overlap(splits, split, source, config, problems)
    if problems:
        raise _error(problems, rows=splits.values())
    _warn_of_spellings("domains", domains)
    _warn_of_spellings("labels", labels)
    _warn_of_conflicts(train)
    for doubt in reader.doubts(given, labels):
        warnings.warn(f"{config.train}: {doubt}", stacklevel=2)
    return RawCorpus(splits, domains, labels, problems.left_out)


def read_texts(
    file: str,
    *,
    text: str = "text",
    text_pair: str | None = None,
    label: str | list[str] | None = None,
    task: str = SINGLE_LABEL.name,
    label_separator: str = ",",
) -> list[Row]:
    """Reads and checks the texts of one file, as ``read_corpus`` does, to serve or to score.

    Args:
        file: ``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``, or ``.txt`` with a text a line; ``-``
            for such lines from the standard input.
        text: column of the texts.
        text_pair: column of the second texts, if there are any.
        label: column of the labels, or those of the classes; rows have none where the file has no
            such column, which goes for a column ``domain`` as well. None reads neither.
        task: what labels mean, of ``method.tasks.TASKS``.
        label_separator: between the labels of a cell, where there are several.

    Raises:
        DataError: as ``read_corpus``.
        ConfigError: several columns of labels, where the task has one.
    """
    problems = Problems()
    columns: dict[str, Any] = {} if label is None else {"label": label}
    columns |= {"task": task, "label_separator": label_separator}
    config = DataConfig.model_validate(
        {"train": file, "text": text, "text_pair": text_pair, **columns}
    )
    table = read_file(Path(file), config, problems, plain=True)
    rows = []
    if table is not None:
        present = set(table.columns if label is not None else ()) - {text, text_pair}
        named = {"label": config.label_columns, "domain": [str(config.domain)]}
        unneeded = {name for name, wanted in named.items() if not present.issuperset(wanted)}
        rows = _check_rows(table, config, None, problems, unneeded)
    if problems:
        raise _error(problems, "the file, or its path and the names of its columns")
    return rows


def read_plain_texts(files: Sequence[str], config: DataConfig) -> tuple[list[Row], list[LeftOut]]:
    """Reads and checks single texts that belong to no domain and have no label, and what
    ``data.on_problem`` leaves out of them.

    Args:
        files: each as of ``read_texts``.
        config: the ``data`` block: column of the texts, how files are written, what to do with a
            row that has a problem.

    Raises:
        DataError: as ``read_corpus``.
    """
    problems = Problems(drop=config.on_problem == "drop")
    alone = {"text_pair": None, "domain": None, "soft_labels": None}
    settings = config.model_copy(update=alone)
    rows = []
    for file in files:
        table = read_file(Path(file), settings, problems, plain=True)
        rows += _check_rows(table, settings, None, problems, {"label"}) if table else []
    if problems:
        raise _error(problems, "the files, their paths or data.text", rows=[rows])
    return rows, problems.left_out


def _error(
    problems: Problems,
    place: str = "the files, or the paths and column names in the `data` block",
    rows: Iterable[list[Row]] = (),
) -> DataError:
    totals = Counter(problem.file for problem in problems)
    places = list(totals)
    in_order = sorted(problems, key=lambda p: (places.index(p.file), p.row or 0))
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)} in the data"
    if len(places) > 1:
        per_file = [f"{file} {total}" for file, total in totals.most_common(PROBLEMS_SHOWN)]
        per_file += ["..."] * (len(places) > PROBLEMS_SHOWN)
        count += f" ({', '.join(per_file)})"
    if len(problems) > PROBLEMS_SHOWN:
        count += f", the first {PROBLEMS_SHOWN}"
    shown = "\n".join(f"  {problem}" for problem in in_order[:PROBLEMS_SHOWN])
    ways = [f"Correct {place}; no row was skipped or changed."]
    known = {(row.file, row.row) for split in rows for row in split}
    wrong = problems.of_rows
    share = len(wrong) / len(known | wrong) if known else 1.0
    if wrong and share < _MOST:
        ways.append(
            f"{len(wrong)} of {len(known | wrong)} rows ({share:.2%}) have something wrong with "
            "them alone (none is accepted): data.on_problem: drop leaves them out, and says so"
        )
    return DataError(f"{count}:\n{shown}", "\n  ".join([*ways, *problems.ways_out]))


def _unknown(name: str, known: list[str]) -> str:
    listed = ", ".join(map(repr, known[:12])) + (", ..." if len(known) > 12 else "")
    return f"{name!r} is unknown{closest(name, known)} (there are: {listed or 'none'})"


def _sources(config: DataConfig) -> dict[str, str]:
    """Where each split is; a folder with a file per split gives several."""
    splits = ("train", *_SCORED, UNLABELLED)
    found = {name: source for name in splits if (source := getattr(config, name)) is not None}
    files = _files_by_split(Path(config.train))
    if UNLABELLED in files and UNLABELLED not in found:
        file = files[UNLABELLED][0]
        warnings.warn(f"{file} is not read: set data.unlabelled: {config.train}", stacklevel=3)
    for split in _SCORED:
        if split in files:
            found.setdefault(split, config.train)
    return {name: found[name] for name in splits if name in found}


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder that are named as splits are."""
    found: dict[str, list[Path]] = {}
    for path in _files_in(folder) if folder.is_dir() else ():
        for split, names in _SPLIT_NAMES.items():
            if path.stem.lower() in names:
                found.setdefault(split, []).append(path)
    return found


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _read_source(
    source: str,
    split: str,
    config: DataConfig,
    problems: Problems,
    unneeded: Collection[str] = (),
) -> list[Row]:
    path = Path(source)
    by_split = _files_by_split(path)
    if by_split:
        return _read_split_of(path, by_split, split, config, problems, unneeded)
    if path.is_dir():
        return _read_folder(path, config, problems, unneeded)
    if path.exists():
        table = read_file(path, config, problems, "label" in unneeded)
    elif may_be_hub_id(source) and not is_file_name(source):
        table = read_hub(source, split, problems)
    else:
        reason = f"no such file or folder, nor a hub id owner/name{meant(path)}"
        problems.lose_rows(source, None, reason)
        return []
    return _check_rows(table, config, None, problems, unneeded) if table else []


def _read_split_of(
    folder: Path,
    by_split: dict[str, list[Path]],
    split: str,
    config: DataConfig,
    problems: Problems,
    unneeded: Collection[str],
) -> list[Row]:
    """The file of a split, in a folder with nothing but a file for each."""
    others = set(_files_in(folder)) - {path for paths in by_split.values() for path in paths}
    own = by_split.get(split, [])
    if others or len(own) != 1:
        listed = ", ".join(path.name for path in _files_in(folder))
        question = "are these domains, or splits?" if others else f"which one is {split}?"
        problems.lose_rows(str(folder), None, f"{listed}: {question}")
        problems.offer(
            "a folder holds one file per domain or one per split (train, validation, test): name "
            "the files in data.train, data.validation and data.test, or rename the domain"
        )
        return []
    table = read_file(own[0], config, problems, "label" in unneeded)
    return _check_rows(table, config, None, problems, unneeded) if table else []


def _read_folder(
    folder: Path, config: DataConfig, problems: Problems, unneeded: Collection[str]
) -> list[Row]:
    rows: list[Row] = []
    tables: dict[str, Table] = {}
    files = _files_in(folder)
    if not files:
        problems.lose_rows(str(folder), None, "empty folder: one file per domain is expected")
    for path in files:
        if path.stem in tables:
            reason = f"domain {path.stem!r} is also in {tables[path.stem].file}"
            problems.add(str(path), None, None, reason)
        table = read_file(path, config, problems, "label" in unneeded)
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
        domain = None if config.domain is None else path.stem
        rows += _check_rows(table, config, domain, problems, unneeded)
    return rows


def _check_rows(
    table: Table,
    config: DataConfig,
    domain: str | None,
    problems: Problems,
    unneeded: Collection[str] = (),
) -> list[Row]:
    """Checks columns and cells, except for a label or domain that is not needed; ``domain`` is
    given where the file's name says it."""
    has_soft = config.soft_labels is not None and "soft" not in unneeded
    softly = SoftLabels(config) if has_soft else None
    reader = READERS[config.task](config)
    are_there = set(reader.columns) <= set(table.columns)
    if softly and not are_there and "label" not in config.model_fields_set:
        unneeded = {*unneeded, "label"}
    checks: list[tuple[str, str, Callable[[Any], Checked]]] = [("text", config.text, _check_text)]
    if config.text_pair is not None:
        checks.append(("pair", config.text_pair, _check_text))
    if domain is None:
        if config.domain is None:
            domain = ONE_DOMAIN
        else:
            checks.append(("domain", config.domain, _check_domain))
    checks = [check for check in checks if check[0] not in unneeded]
    label_columns = [] if "label" in unneeded else reader.columns
    columns = [(name, column) for name, column, _ in checks]
    columns[1:1] = [("label", column) for column in label_columns]
    columns += [("soft", column) for column in (softly.columns if softly else ())]
    for name, column in columns:
        if column not in table.columns:
            reason = f"missing column: {_unknown(column, table.columns)}"
            problems.add(table.file, table.header, column, reason)
            if name == "domain":
                problems.offer("if all texts are of one domain, set data.domain: null")
        elif (times := table.columns.count(column)) > 1:
            problems.add(table.file, table.header, column, f"column name given {times} times")
    checks = [(name, column, check) for name, column, check in checks if column in table.columns]
    if domain is not None and (wrong := _check_domain(domain)[1]):
        problems.add(table.file, None, None, wrong)
    rows, kept = [], []

    def note(name: str, column: str, wrong: str | None) -> None:
        if wrong:
            is_gap = wrong.startswith(("empty", "missing"))
            kind = wrong if is_gap else f"{name} that cannot be used"
            problems.add_row(table.file, row, column, kind, wrong)

    for row, values in table.rows:
        fields: dict[str, Any] = {} if domain is None else {"domain": domain}
        for name, column, check in checks:
            fields[name], wrong = check(values.get(column))
            note(name, column, wrong)
        if label_columns and are_there:
            fields["label"], column, wrong = reader.check(values, problems)
            note("label", column, wrong)
        if softly and set(softly.columns) <= set(table.columns):
            fields["soft"], column, wrong = softly.check(values)
            if wrong:
                problems.add_row(table.file, row, column, "soft labels that cannot be used", wrong)
        if not problems.drops(table.file, row):
            rows.append(Row(table.file, row, **fields))
            kept.append((row, values))
    if table.rows and not rows:
        problems.add(table.file, table.header, None, "no row is left")
    if label_columns:
        reader.check_table(table._replace(rows=kept), problems)
    return rows


def _check_text(value: Any) -> Checked:
    if value is None:
        return None, "missing text"
    if isinstance(value, float) and math.isnan(value):
        return None, "NaN is not a text"
    if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        return None, (
            f"list {show(value)} is not a text: give whole texts (labels of words, token "
            "classification, are not supported)"
        )
    if not isinstance(value, str):
        return None, f"{type(value).__name__} {show(value)} is not a text"
    if not value.strip():
        return None, "empty text"
    return check_characters(value)


def _check_domain(value: Any) -> Checked:
    """A domain's name, which is also that of its student's folder: it must not lead elsewhere."""
    name, reason = check_name("domain", value)
    if name is not None and (
        name.startswith(".")
        or re.search(r"[/\\\x00-\x1f\x7f]", name)
        or len(name.encode()) > LONGEST_DOMAIN
    ):
        return None, f"domain {show(name)} cannot name a folder"
    return name, reason


def _check_names_are_known(
    rows: list[Row],
    domains: list[str],
    labels: list[str],
    reader: LabelReader,
    problems: Problems,
) -> None:
    for row in rows:
        for name in reader.task.classes_of(row.label) if labels and row.label is not None else ():
            if name not in labels:
                reason = f"label not in train: {_unknown(name, labels)}"
                problems.add(row.file, row.row, reader.columns[0], reason)
        if domains and row.domain is not None and row.domain not in domains:
            reason = f"domain not in train: {_unknown(row.domain, domains)}"
            problems.add(row.file, row.row, reader.config.domain, reason)


def _without(taught: list[Row], scored: list[Row], split: str, problems: Problems) -> list[Row]:
    """The rows that a split does not have."""
    theirs = {row.example for row in scored if row.text is not None}
    for row in taught:
        if row.example in theirs:
            problems.drop_overlap(row.file, split)
    return [row for row in taught if row.example not in theirs]


def _check_overlap(
    splits: dict[str, list[Row]],
    split: str,
    source: str,
    config: DataConfig,
    problems: Problems,
) -> None:
    rows = splits[split]
    first = {row.example: row for row in reversed(splits[source]) if row.text is not None}
    shared = [(row, first[row.example]) for row in rows if row.example in first]
    if not shared:
        return
    row, twin = shared[0]
    count = f"{len(shared)} of {len(rows)} rows of {split} are also in {source}"
    if config.overlap == "allow" or len(shared) <= OVERLAP_ALLOWED * len(rows):
        places = f"{row.file}:{row.row} and {twin.file}:{twin.row}"
        warnings.warn(f"{count}, the first at {places}", stacklevel=4)
        return
    for row, twin in shared:
        reason = f"the same example is in {source}, {twin.file}:{twin.row}"
        problems.add(row.file, row.row, config.text, reason)
    problems.offer(
        f"{count}, {len(shared) / len(rows):.1%}, and {OVERLAP_ALLOWED:.0%} are accepted: "
        "data.overlap: drop_train leaves them out of what is learned from, allow keeps them there "
        "(scores then say less)"
    )


def _warn_of_spellings(what: str, names: list[str]) -> None:
    """Names that differ in case, space or the format of a number, and may be meant as one."""
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    alike: dict[str, list[str]] = {}
    for name in names:
        plain = f"{float(name):g}" if name in numbers else re.sub(r"\s+", "", name.casefold())
        alike.setdefault(plain, []).append(name)
    groups = [", ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    if numbers and len(numbers) < len(names):
        groups.append("numbers among words: " + ", ".join(map(repr, numbers)))
    if groups:
        warnings.warn(
            f"{what} that may be meant as the same count as different ones: {'; '.join(groups)}",
            stacklevel=3,
        )


def _warn_of_conflicts(rows: list[Row]) -> None:
    """The same example with several labels."""
    labels: dict[tuple, dict[Label | None, Row]] = {}
    for row in rows:
        labels.setdefault(row.example, {}).setdefault(row.label, row)
    several = [list(found.values()) for found in labels.values() if len(found) > 1]
    if several:
        first, second, *_ = several[0]
        one = len(several) == 1
        who = "1 text of train has" if one else f"{len(several)} texts of train have"
        warnings.warn(
            f"{who} more than one label, the first at {first.file}:{first.row} and "
            f"{second.file}:{second.row}",
            stacklevel=3,
        )
