"""Labels as files hold them, by the kind of task (``method.tasks``): one reader each.

Labels of one class are strings or integers. Several of a text are a list, or in a CSV a list
written as JSON or with ``data.label_separator`` between the names; or a column of 0 and 1 for each
class. Numbers are numbers.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from metakd.config import DataConfig
from metakd.data.tables import Problems, Table, ordered, show
from metakd.errors import ConfigError
from metakd.method.tasks import TASKS

MOST_FRACTIONS = 4
"""Different numbers with a part behind the point that may still be names of classes."""

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SIDE_BY_SIDE = re.compile(r"""['"]\s+['"]""")
_LARGEST = 3.4e38  # that float32 holds

_SEVERAL = "where texts have several labels, or none, set data.task: multi_label"
_NUMBERS = "where labels are numbers to predict, set data.task: regression"

Label = str | tuple[str, ...] | float

# A value that was checked and is what it should be, else None; and what is wrong with it.
Checked = tuple[Any, str | None]


def check_name(what: str, value: Any) -> Checked:
    """The name of a class or a domain."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None, f"missing {what}"
    if isinstance(value, float) and math.isnan(value):
        return None, f"NaN is not a {what}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), None
    if not isinstance(value, str):
        found = f"{type(value).__name__} {show(value)}"
        return None, f"{found} is not a {what}: give a string or an integer"
    if value != value.strip():
        return None, f"{what} {show(value)} has white space around it"
    return check_characters(value)


def check_characters(value: str) -> Checked:
    """What an escape in JSON or a Parquet file can smuggle past the check of the bytes."""
    if "\0" in value:
        return None, f"NUL character at position {value.index(chr(0))}"
    if re.search("[\ud800-\udfff]", value):
        return None, "half of a surrogate pair, which is no character"
    return value, None


class LabelReader:
    """How the labels of a kind of task are read.

    Args:
        config: the ``data`` block.

    Raises:
        ConfigError: it names several columns, and labels are in one.
    """

    def __init__(self, config: DataConfig):
        self.config = config
        self.columns = config.label_columns
        self.task = TASKS[config.task]
        if len(self.columns) > 1 and not self.task.takes_columns:
            raise ConfigError(
                f"data.label: {len(self.columns)} columns, and {self.task.line}",
                "name one, or set data.task: multi_label",
            )

    def check(self, values: dict[str, Any], problems: Problems) -> tuple[Label | None, str, str]:
        """The label of a row; the column and what is wrong, empty where nothing is."""
        [column] = self.columns
        label, wrong = self.parse(values.get(column), problems)
        return label, column, wrong or ""

    def parse(self, value: Any, problems: Problems) -> Checked:
        """A label from a cell."""
        raise NotImplementedError

    def check_table(self, table: Table, problems: Problems) -> None:
        """What only all rows of a table show."""

    def outputs(self, labels: Iterable[Label]) -> list[str]:
        """What models have an output for, in order, where train has these labels."""
        return ordered({name for label in labels for name in self.task.classes_of(label)})

    def lacking(self, labels: Sequence[Label], outputs: list[str]) -> str:
        """Why nothing can be learned from these labels; empty where it can."""
        raise NotImplementedError

    def doubts(self, labels: Sequence[Label], outputs: list[str]) -> list[str]:
        """What is doubtful about them, a line each."""
        return []


class ClassReader(LabelReader):
    """A class."""

    def parse(self, value, problems):
        label, wrong = check_name("label", value)
        if wrong and isinstance(value, list):
            problems.offer(_SEVERAL)
        if wrong and isinstance(value, float) and math.isfinite(value):
            problems.offer(_NUMBERS)
        return label, wrong

    def check_table(self, table, problems):
        [column] = self.columns
        _check_types(table, column, problems)
        _check_values(table, column, problems)

    def lacking(self, labels, outputs):
        if len(outputs) == 1:
            return f"only one class, {outputs[0]!r}: a classifier needs two"
        return ""


class ListReader(LabelReader):
    """Any number of classes."""

    def check(self, values, problems):
        if len(self.columns) == 1:
            return super().check(values, problems)
        found = []
        for column in self.columns:
            value = values.get(column)
            value = value.strip() if isinstance(value, str) else value
            if value is None or value == "":
                return None, column, "missing label"
            number = value if isinstance(value, (bool, int, float)) else _number(str(value))
            if number not in (0, 1):
                return None, column, f"{show(value)} is neither 0 nor 1"
            if number:
                found.append(column)
        return tuple(found), self.columns[0], ""

    def parse(self, value, problems):
        if value is None:
            return None, "missing label"
        if isinstance(value, str):
            given, value = value, self._split(value)
            if value is None:
                return None, f"{show(given)} is no list that can be read: write it as JSON"
        if isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, list):
            return None, f"{type(value).__name__} {show(value)} is not a list of labels"
        names = []
        for one in value:
            name, wrong = check_name("label", one)
            if wrong:
                return None, wrong
            names.append(name)
        return tuple(sorted(set(names))), None

    def _split(self, text: str) -> list | None:
        """What a cell of a CSV holds: a list of JSON, or of Python as pandas writes it, or names
        between separators; None where it is a list that cannot be read."""
        text = text.strip()
        if not (text.startswith("[") and text.endswith("]")):
            names = text.split(self.config.label_separator)
            return [name.strip() for name in names if name.strip()]
        for read in (json.loads, ast.literal_eval):
            # Python would join words side by side, as NumPy prints them.
            if read is json.loads or not _SIDE_BY_SIDE.search(text):
                with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                    return read(text)
        return None

    def outputs(self, labels):
        return self.columns if len(self.columns) > 1 else super().outputs(labels)

    def lacking(self, labels, outputs):
        if not outputs:
            return "no text has a label"
        if "O" in outputs and any(name.startswith("B-") for name in outputs):
            return (
                f"labels such as {', '.join(outputs[:3])} are of words (token classification): "
                "whole texts are classified here"
            )
        return ""

    def doubts(self, labels, outputs):
        times = Counter(name for label in labels for name in label)
        common = [name for name in outputs if times[name] in (0, len(labels))]
        return [f"all texts of train, or none, have label {', '.join(common)}"] if common else []


class NumberReader(LabelReader):
    """A number."""

    def parse(self, value, problems):
        if value is None or (isinstance(value, str) and not value.strip()):
            return None, "missing label"
        number = value
        if isinstance(value, str):
            number = _number(value.strip())
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return None, f"{show(value)} is not a number"
        if not abs(number) <= _LARGEST:
            return None, f"{show(value)} is not a finite number"
        return float(number), None

    def outputs(self, labels):
        return list(self.columns)

    def lacking(self, labels, outputs):
        if len(set(labels)) == 1:
            return f"only one number, {labels[0]:g}: there is nothing to predict"
        return ""

    def doubts(self, labels, outputs):
        mean = math.fsum(labels) / len(labels)
        spread = math.sqrt(math.fsum((label - mean) ** 2 for label in labels) / len(labels))
        if max(abs(mean), spread) <= 10:
            return []
        return [
            f"labels have mean {mean:.4g} and standard deviation {spread:.4g}: a model begins near "
            "0 and takes steps of its learning rate, so scale them to about 0 to 1"
        ]


def _number(text: str) -> float | None:
    return float(text) if NUMBER.fullmatch(text) else None


READERS: dict[str, type[LabelReader]] = {
    "single_label": ClassReader,
    "multi_label": ListReader,
    "regression": NumberReader,
}
"""The reader of each kind of task."""


def _check_values(table: Table, column: str, problems: Problems) -> None:
    """Numbers to predict and lists are no classes, in files that can only write them as texts
    either. A few numbers or names with commas may be names of classes."""
    given = [(row, values.get(column)) for row, values in table.rows]
    words = [(row, value) for row, value in given if isinstance(value, str) and value.strip()]
    different = {value for _, value in words}
    numbers = {value for value in different if NUMBER.fullmatch(value)}
    fractions = {value for value in numbers if float(value) % 1}
    if len(fractions) > MOST_FRACTIONS and numbers == different:
        for row, value in words:
            if value in fractions:
                reason = f"float {value} is not a label: give a string or an integer"
                problems.add(table.file, row, column, reason)
        problems.offer(_NUMBERS)
    lists = {value: [part.strip() for part in value.split(",")] for value in different}
    names = {part for parts in lists.values() for part in parts}
    several = sorted(value for value, parts in lists.items() if len(parts) > 1)
    alone = names & different
    orders = {tuple(sorted(lists[value])) for value in several}
    if (
        several
        and len(names) < len(different)
        and (2 * len(alone) >= len(names) or len(orders) < len(several))
    ):
        reason = (
            f"labels are lists of {len(names)} names in {len(different)} combinations, such as "
            f"{show(several[0])}: give each text one label"
        )
        problems.add(table.file, words[0][0], column, reason)
        problems.offer(_SEVERAL)


def _check_types(table: Table, column: str, problems: Problems) -> None:
    first_type, first_row = None, None
    for row, values in table.rows:
        kind = type(values.get(column))
        if kind not in (str, int):
            continue
        if first_type is None:
            first_type, first_row = kind, row
        elif kind is not first_type:
            reason = (
                f"label {show(values[column])} is {kind.__name__}, "
                f"in row {first_row} it is {first_type.__name__}"
            )
            problems.add(table.file, row, column, reason)
