"""Broken corpora, made by combining damages with formats, and the exact place each must be told at.

A ``Case`` is the files of a corpus, the keys of the data block, and every line of the message:
``file:row:column: reason`` with the reason's beginning. ``{d}`` stands for the folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pyarrow
import pyarrow.parquet

COLUMNS = ["text", "label", "domain"]
ROWS = [
    {"text": f"sentence {i}", "label": ("bad", "good")[i % 2], "domain": ("pans", "tents")[i // 6]}
    for i in range(12)
]
SPOT = 8  # the row that is damaged: in the second domain, neither first nor last
SPLITS = {
    "train": ROWS,
    "validation": [row | {"text": f"held out {i}"} for i, row in enumerate(ROWS)],
    "test": [row | {"text": f"unseen {i}"} for i, row in enumerate(ROWS)],
}


@dataclass(frozen=True)
class Case:
    """One broken corpus."""

    files: dict[str, str | bytes | Callable]
    keys: dict = field(default_factory=dict)
    expected: tuple[str, ...] = ()


# Formats: how rows become files, and where row i of a split then stands.


def _delimited(mark: str) -> Callable[[list[dict]], str]:
    def write(rows: list[dict]) -> str:
        names = [name for name in COLUMNS if name in rows[0]]
        return "".join(
            mark.join(line) + "\n" for line in [names, *([r[n] for n in names] for r in rows)]
        )

    return write


def _jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _parquet(rows: list[dict]) -> Callable:
    table = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]})
    return lambda path: pyarrow.parquet.write_table(table, path)


@dataclass(frozen=True)
class Format:
    """A way to store a split: ``ending`` of its files, writer, first row's number, and whether it
    is a folder with one file per domain."""

    ending: str
    write: Callable
    first: int
    folder: bool = False

    @property
    def typed(self) -> bool:
        """Can a cell be something else than a text?"""
        return self.ending in ("jsonl", "parquet")

    def files(self, split: str, rows: list[dict]) -> dict:
        if not self.folder:
            return {f"{split}.{self.ending}": self.write(rows)}
        return {
            f"{split}/{name}.{self.ending}": self.write(
                [{k: v for k, v in r.items() if k != "domain"} for r in rows if r["domain"] == name]
            )
            for name in ("pans", "tents")
        }

    def source(self, split: str) -> str:
        return f"{{d}}/{split}" + ("" if self.folder else f".{self.ending}")

    def place(self, split: str, i: int) -> str:
        """``file:row`` of row i."""
        if not self.folder:
            return f"{split}.{self.ending}:{i + self.first}"
        return f"{split}/{ROWS[i]['domain']}.{self.ending}:{i % 6 + self.first}"


FORMATS = {
    "CSV": Format("csv", _delimited(","), 2),
    "TSV": Format("tsv", _delimited("\t"), 2),
    "JSONL": Format("jsonl", _jsonl, 1),
    "Parquet": Format("parquet", _parquet, 1),
    "folder of CSV": Format("csv", _delimited(","), 2, folder=True),
    "folder of TSV": Format("tsv", _delimited("\t"), 2, folder=True),
    "folder of JSONL": Format("jsonl", _jsonl, 1, folder=True),
    "folder of Parquet": Format("parquet", _parquet, 1, folder=True),
}
DELIMITED = {name: form for name, form in FORMATS.items() if not form.typed}


def corpus(form: Format, **changed: list[dict]) -> Case:
    """Train, validation and test in this format, some with other rows."""
    splits = SPLITS | changed
    files = {}
    for split, rows in splits.items():
        files |= form.files(split, rows)
    return Case(files, {split: form.source(split) for split in splits})


def with_cell(rows: list[dict], name: str, value) -> list[dict]:
    return [row | {name: value} if i == SPOT else row for i, row in enumerate(rows)]


# One cell that is wrong: column, value, what is said of it.
TEXT_CELLS = {
    "empty text": ("text", "", "empty text"),
    "white space as text": ("text", "   ", "empty text"),
    "no-break space as text": ("text", "\u00a0", "empty text"),
    "empty label": ("label", "", "missing label"),
    "label of white space": ("label", "  ", "missing label"),
    "white space after the label": ("label", "good ", "label 'good ' has white space around it"),
    "empty domain": ("domain", "", "missing domain"),
    "white space before the domain": ("domain", " pans", "domain ' pans' has white space"),
}
_NOT_TEXT = {
    "null": (None, "missing {}"),
    "NaN": (math.nan, "NaN is not a {}"),
    "infinity": (math.inf, "float inf is not a {}"),
    "a fraction": (1.5, "float 1.5 is not a {}"),
    "a truth value": (True, "bool True is not a {}"),
    "a list": (["good"], "list ['good'] is not a {}"),
    "an object": ({"a": 1}, "dict {{'a': 1}} is not a {}"),
}
JSON_CELLS = {
    f"{what} as {name}": (name, value, reason.format(name))
    for name in COLUMNS
    for what, (value, reason) in _NOT_TEXT.items()
} | {
    "an integer as text": ("text", 7, "int 7 is not a text"),
    "an integer among words": ("label", 3, "label 3 is int, in row 1 it is str"),
    "a NUL in the text": ("text", "a\0b", "NUL character at position 1"),
    "a NUL in the label": ("label", "go\0od", "NUL character at position 2"),
    "half a surrogate pair": ("text", "a\ud800", "half of a surrogate pair"),
}
# Names that only validation or test has.
STRANGERS = {
    "unknown label": ("label", "goood", "label not in train: 'goood' is unknown; did you mean"),
    "unknown domain": ("domain", "boats", "domain not in train: 'boats' is unknown"),
}


def _cells() -> Iterator[tuple[str, Case]]:
    for kind, form in FORMATS.items():
        for what, (name, value, reason) in TEXT_CELLS.items():
            if form.folder and name == "domain":  # there the file's name says it
                continue
            for split in SPLITS:
                case = corpus(form, **{split: with_cell(SPLITS[split], name, value)})
                where = f"{form.place(split, SPOT)}:{name}: {reason}"
                yield f"{kind}: {what} in {split}", replace(case, expected=(where,))
        if form.ending != "jsonl":
            continue
        for what, (name, value, reason) in JSON_CELLS.items():
            if form.folder and name == "domain":
                continue
            case = corpus(form, train=with_cell(ROWS, name, value))
            where = f"{form.place('train', SPOT)}:{name}: {reason}"
            yield f"{kind}: {what}", replace(case, expected=(where,))


def _strangers() -> Iterator[tuple[str, Case]]:
    for kind, form in FORMATS.items():
        for split in ("validation", "test"):
            for what, (name, value, reason) in STRANGERS.items():
                if form.folder and name == "domain":
                    continue
                case = corpus(form, **{split: with_cell(SPLITS[split], name, value)})
                where = f"{form.place(split, SPOT)}:{name}: {reason}"
                yield f"{kind}: {what} in {split}", replace(case, expected=(where,))
            shared = with_cell(SPLITS[split], "text", ROWS[SPOT]["text"])
            where = (
                f"{form.place(split, SPOT)}:text: the same example is in train, "
                f"{{d}}/{form.place('train', SPOT)}"
            )
            yield (
                f"{kind}: an example of train in {split}",
                replace(corpus(form, **{split: shared}), expected=(where,)),
            )
        same = [row | {"label": "good"} for row in ROWS]
        case = replace(corpus(form, train=same), keys={"train": form.source("train")})
        where = f"train{'' if form.folder else '.' + form.ending}:-:label: only one class, 'good'"
        yield f"{kind}: one class", replace(case, expected=(where,))


def _parquet_columns() -> Iterator[tuple[str, Case]]:
    """A Parquet column has one type, so that every row of it is wrong, or none."""
    columns = {
        "numbers as text": ("text", range(12), "int {} is not a text"),
        "fractions as label": ("label", [i + 0.5 for i in range(12)], "float {} is not a label"),
        "truth values as label": ("label", [i > 5 for i in range(12)], "bool {} is not a label"),
        "lists as text": ("text", [[i] for i in range(12)], "list {} is not a text"),
    }
    form = FORMATS["Parquet"]
    for what, (name, values, reason) in columns.items():
        rows = [row | {name: value} for row, value in zip(ROWS, values)]
        case = replace(corpus(form, train=rows), keys={"train": form.source("train")})
        lines = tuple(
            f"{form.place('train', i)}:{name}: {reason.format(value)}"
            for i, value in enumerate(values)
        )
        yield f"Parquet: {what}", replace(case, expected=lines)


# Damage to a line of a delimited file; `{mark}` is the delimiter. Reading goes on after each.
LINES = {
    "a field too few": ("short{mark}good\n", "-: 2 fields where the header has 3"),
    "a field too many": ("a{mark}b{mark}good{mark}pans\n", "-: 4 fields where the header has 3"),
    "one word": ("word\n", "-: 1 fields where the header has 3"),
    "a blank line": ("\n", "-: blank line"),
    "a quote never closed": ('"open{mark}good{mark}pans\n', "-: unclosed or misplaced quote"),
    "text after a quote": ('"a"b{mark}good{mark}pans\n', "-: unclosed or misplaced quote"),
    "a bad byte": (
        "caf\udce9{mark}good{mark}pans\n",
        "-: bad UTF-8, byte 0xe9 at byte offset {at}",
    ),
    "half a character": (
        "caf\udcc3{mark}good{mark}pans\n",
        "-: bad UTF-8, byte 0xc3 at byte offset {at}",
    ),
    "a NUL": ("a\0b{mark}good{mark}pans\n", "-: NUL byte at byte offset {at}"),
}
ENCODINGS = {
    "": lambda text: text,
    " after a byte order mark": lambda text: "\ufeff" + text,
    " in CRLF lines": lambda text: text.replace("\n", "\r\n"),
    " in CR lines": lambda text: text.replace("\n", "\r"),
    " in CRLF lines after a byte order mark": lambda text: "\ufeff" + text.replace("\n", "\r\n"),
}


def _lines() -> Iterator[tuple[str, Case]]:
    for kind in ("CSV", "TSV"):
        form = FORMATS[kind]
        mark = "," if kind == "CSV" else "\t"
        for what, (line, reason) in LINES.items():
            for how, encode in ENCODINGS.items():
                lines = form.write(ROWS).splitlines(keepends=True)
                lines.insert(SPOT + 1, line.replace("{mark}", mark))
                data = encode("".join(lines)).encode("utf-8", "surrogateescape")
                at = next(
                    (
                        data.index(byte)
                        for byte in (b"\xe9", b"\xc3\x2c", b"\xc3\t", b"\0")
                        if byte in data
                    ),
                    -1,
                )
                expected = f"{form.place('train', SPOT)}:{reason.format(at=at)}"
                name = f"train.{form.ending}"
                yield (
                    f"{kind}: {what}{how}",
                    Case({name: data}, {"train": form.source("train")}, (expected,)),
                )


JSON_LINES = {
    "not JSON": ('{"text": "a", "label": }', "-: invalid JSON: Expecting value at character 24"),
    "cut off": ('{"text": "a", "lab', "-: invalid JSON"),
    "two objects": ('{"text": "a"} {"text": "b"}', "-: invalid JSON: Extra data at character 15"),
    "single quotes": ("{'text': 'a'}", "-: invalid JSON"),
    "a list": ('["a", "good", "pans"]', "-: ['a', 'good', 'pans'] is not a JSON object"),
    "a word": ('"a"', "-: 'a' is not a JSON object"),
    "null": ("null", "-: None is not a JSON object"),
    "a blank line": ("", "-: blank line"),
    "white space": ("   ", "-: blank line"),
    "a key twice": (
        '{"label": "good", "label": "bad"}',
        "-: invalid JSON: key 'label' given twice",
    ),
    "nested too deeply": ("[" * 100_000, "-: invalid JSON"),
    "a number too long": ('{"text": ' + "9" * 5000 + "}", "-: invalid JSON"),
    "a bad byte": ('{"text": "caf\udce9"', "-: bad UTF-8, byte 0xe9 at byte offset"),
}


def _json_lines() -> Iterator[tuple[str, Case]]:
    for kind in ("JSONL", "folder of JSONL"):
        form = FORMATS[kind]
        for what, (line, reason) in JSON_LINES.items():
            files = form.files("train", ROWS)
            name = form.place("train", SPOT).rpartition(":")[0]
            lines = files[name].splitlines(keepends=True)
            lines.insert(SPOT % 6 if form.folder else SPOT, line + "\n")
            files[name] = "".join(lines).encode("utf-8", "surrogateescape")
            where = f"{form.place('train', SPOT)}:"
            expected = (where + reason,)
            if what == "a bad byte":
                expected += (where + "-: invalid JSON",)
            yield f"{kind}: {what}", Case(files, {"train": form.source("train")}, expected)


def _headers() -> Iterator[tuple[str, Case]]:
    for kind, form in FORMATS.items():
        for name in COLUMNS:
            if form.folder and name == "domain":
                continue
            renamed = [{f"{k}x" if k == name else k: v for k, v in row.items()} for row in ROWS]
            if form.folder:
                files = {
                    file: content
                    for file, content in (
                        (f"train/{d}.{form.ending}", _write_all(form, renamed, d))
                        for d in ("pans", "tents")
                    )
                }
            else:
                files = {f"train.{form.ending}": _write_all(form, renamed, None)}
            row = "-" if form.ending == "parquet" else "1"
            lines = tuple(
                f"{file}:{row}:{name}: missing column: {name!r} is unknown; did you mean '{name}x'?"
                for file in files
            )
            yield (
                f"{kind}: column {name} misspelt",
                Case(files, {"train": form.source("train")}, lines),
            )
    for kind, form in DELIMITED.items():
        if form.folder:
            continue
        mark = "," if kind == "CSV" else "\t"
        twice = form.write(ROWS).replace(f"label{mark}domain", f"label{mark}domain{mark}text", 1)
        twice = twice.replace("\n", f"{mark}x\n").replace(f"text{mark}x\n", "text\n", 1)
        where = f"train.{form.ending}:1:text: column name given 2 times"
        yield (
            f"{kind}: a column twice",
            Case({f"train.{form.ending}": twice}, {"train": form.source("train")}, (where,)),
        )


def _write_all(form: Format, rows: list[dict], domain: str | None):
    """Rows whose columns may have other names, of one domain or of all."""
    kept = [row for row, true in zip(rows, ROWS) if domain in (None, true["domain"])]
    if domain is not None:
        kept = [{k: v for k, v in row.items() if k != "domain"} for row in kept]
    if form.typed:
        return form.write(kept)
    mark = "," if form.ending == "csv" else "\t"
    lines = [list(kept[0]), *(list(row.values()) for row in kept)]
    return "".join(mark.join(line) + "\n" for line in lines)


def _whole_files() -> Iterator[tuple[str, Case]]:
    """Files with nothing in them, or nothing that can be read."""
    text = {
        "empty": (b"", "-:-: empty file"),
        "blank lines alone": (b"\n\n \n", "-:-: empty file"),
        "a byte order mark alone": (b"\xef\xbb\xbf", "-:-: empty file"),
        "UTF-16, little end first": ("text\n".encode("utf-16-le"), None),
        "UTF-16, big end first": ("text\n".encode("utf-16-be"), None),
    }
    for kind in ("CSV", "TSV", "JSONL"):
        form = FORMATS[kind]
        name = f"train.{form.ending}"
        for what, (content, reason) in text.items():
            if reason is None:
                mark = b"\xff\xfe" if "little" in what else b"\xfe\xff"
                content, reason = mark + content, "1:-: UTF-16 text at byte offset 0"
            yield (
                f"{kind}: {what}",
                Case({name: content}, {"train": form.source("train")}, (f"{name}:{reason}",)),
            )
        split = {f"test.{form.ending}": b""}
        yield (
            f"{kind}: an empty test split",
            replace(
                corpus(form),
                files=corpus(form).files | split,
                expected=(f"test.{form.ending}:-:-: empty file",),
            ),
        )
    for kind in ("CSV", "TSV"):
        form = FORMATS[kind]
        name = f"train.{form.ending}"
        header = form.write(ROWS).splitlines(keepends=True)[0]
        case = Case({name: header}, {"train": form.source("train")})
        where = f"{name}:1:-: header only, no rows"
        yield f"{kind}: a header alone", replace(case, expected=(where,))
    packed = {
        "empty": b"",
        "not Parquet": b"PAR1 nothing of the kind PAR1",
        "a text file": b"text,label,domain\n",
    }
    for what, content in packed.items():
        yield (
            f"Parquet: {what}",
            Case(
                {"train.parquet": content},
                {"train": "{d}/train.parquet"},
                ("train.parquet:-:-: unreadable Parquet",),
            ),
        )

    def cut(path) -> None:
        _parquet(ROWS)(path)
        path.write_bytes(path.read_bytes()[:-40])

    yield (
        "Parquet: cut off",
        Case(
            {"train.parquet": cut},
            {"train": "{d}/train.parquet"},
            ("train.parquet:-:-: unreadable Parquet",),
        ),
    )
    for kind, form in FORMATS.items():
        if not form.folder:
            continue
        good = form.files("train", ROWS)
        stray = {
            "a stray file": ("train/notes.txt", "-:-: file extension '.txt' is not known"),
            "a folder inside": ("train/more/x.csv", "-:-: a folder; expected"),
        }
        for what, (name, reason) in stray.items():
            shown = "train/more" if "more" in name else name
            yield (
                f"{kind}: {what}",
                Case(
                    good | {name: b"x"},
                    {"train": form.source("train")},
                    (f"{shown}:{reason}",),
                ),
            )


def _many() -> Iterator[tuple[str, Case]]:
    """More problems than are shown: all of them are counted."""
    for kind in ("CSV", "JSONL"):
        form = FORMATS[kind]
        rows = [row | {"text": ""} for row in ROWS]
        lines = tuple(
            f"{form.place(split, i)}:text: empty text" for split in SPLITS for i in range(len(rows))
        )
        case = corpus(form, **dict.fromkeys(SPLITS, rows))
        yield f"{kind}: every row of every split", replace(case, expected=lines)


GENERATORS = (
    _cells,
    _strangers,
    _parquet_columns,
    _lines,
    _json_lines,
    _headers,
    _whole_files,
    _many,
)
CASES: dict[str, Case] = {name: case for make in GENERATORS for name, case in make()}
