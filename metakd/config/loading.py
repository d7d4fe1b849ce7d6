"""Reading a configuration: a YAML file and overrides, or a dictionary, checked as a whole.

Every problem is reported at once, as ``file: key.path: reason (got VALUE)`` with a did-you-mean.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import ValidationError

from metakd.config.blocks import Block
from metakd.config.checks import Stage, check_contradictions
from metakd.config.deepspeed import check_deepspeed
from metakd.config.run import RunConfig
from metakd.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

KeyPath = tuple[str | int, ...]  # keys and list positions, from the top of the file down to a value


def load_config(
    source: str | PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    last: Stage = "students",
) -> RunConfig:
    """Read a configuration, apply overrides, and check everything at once.

    Relative paths inside it (data, models, ``output_dir``) start at the current directory.

    Args:
        source: a YAML file, in which aliases, explicit tags and duplicate keys are refused; or what
            one would hold, as a dictionary.
        overrides: ``key.sub=value`` each, the value in YAML; applied in order, over the source.
        last: the last stage that it is for, see ``check_contradictions``.

    Raises:
        ConfigError: its cause lists every problem as ``file: key.path: reason (got VALUE)``, with
            ``command line`` in place of the file where the value came from an override, and
            ``configuration`` where the source is a dictionary.
    """
    if isinstance(source, Mapping):
        path, raw = "configuration", _plain(source)
    else:
        path = fspath(source)
        raw = _read_mapping(path)
    raw, where, broken = _apply_overrides(raw, path, overrides)
    problems: dict[KeyPath, str] = {}
    raw = _check_tree(_with_deepspeed(raw, problems), RunConfig, (), problems)
    config, known = _validate(raw, problems), -1
    while config is None and len(problems) > known:  # with the wrong keys left out, is more wrong?
        known = len(problems)
        config = _validate(_without(raw, problems), problems)
    lines = broken + [f"{where(key)}{_dotted(key, ': ')}{text}" for key, text in problems.items()]
    if config is not None:
        # A wrong key stands at its default by now and must not be said to contradict another.
        wrong = {_dotted(key) for key in problems}
        for text in check_contradictions(config, last):
            if wrong.isdisjoint(re.findall(r"[\w.]+", text)):
                lines.append(f"{path}: {text}")
        if not lines:
            return config
    cause = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems:", *lines])
    raise ConfigError(cause, f"Correct {path} or the command line; nothing was run.")


class _Loader(yaml.SafeLoader):
    """YAML without what only an attack or a mistake needs: aliases, tags, duplicate keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not supported, write the value out",
                problem_mark=self.peek_event().start_mark,
            )
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"tags are not supported (got {event.tag})", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a date such as 2024-13-45
            raise yaml.MarkedYAMLError(
                problem=f"a value cannot be read: {error}", problem_mark=node.start_mark
            ) from None

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be one word", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    """One YAML document.

    Raises:
        ValueError: with the place as ``line:column: `` first.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ValueError(
            f"{line}:{column}: character #x{error.character:04x} is not allowed"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(filter(None, [error.context, error.problem]))
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise ValueError(f"{line}:{column}: {reason}") from None
    except RecursionError:
        raise ValueError("1:1: nested too deeply") from None


def _plain(value: Any) -> Any:
    """A copy as YAML would give it: plain containers, paths as texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    return fspath(value) if isinstance(value, PathLike) else value


def _read_mapping(path: str) -> dict:
    """The file as a dict; raises ``ConfigError`` where there is no mapping to check."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "Give the path of a YAML file.") from None
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise ConfigError(
            f"{path}:{line}:{column}: byte 0x{data[error.start]:02x} is not UTF-8",
            "Save the file as UTF-8.",
        ) from None
    try:
        raw = _parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}:{error}", "Correct the YAML there.") from None
    if raw is None:
        raise ConfigError(f"{path}: is empty", "Give at least output_dir, data, teacher, student.")
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: must hold keys with values (got {_shown(raw)})",
            "Write it as `key: value` lines.",
        )
    return raw


def _with_deepspeed(raw: dict, problems: dict[KeyPath, str]) -> dict:
    """The tree with the content of the JSON file that ``deepspeed`` names in its place, checked."""
    given = raw.get("deepspeed")
    if isinstance(given, str) and given.strip():
        try:
            with open(given, encoding="utf-8") as file:
                given = json.load(file)
        except OSError as error:
            problems[("deepspeed",)] = f"{error.strerror} (got {_shown(given)})"
        except ValueError as error:  # not UTF-8, or not JSON
            problems[("deepspeed",)] = f"is no JSON file: {error} (got {_shown(given)})"
        else:
            if not isinstance(given, dict):
                problems[("deepspeed",)] = f"must hold keys with values (got {_shown(given)})"
    if not isinstance(given, dict):
        return raw
    for line in check_deepspeed(given):
        key, _, reason = line.partition(": ")
        problems[("deepspeed", *key.split("."))] = reason
    return {**raw, "deepspeed": given}


def _apply_overrides(raw: dict, path: str, overrides: Sequence[str]):
    """The tree with overrides applied, a function that names a key's source, broken overrides."""
    broken, given = [], []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals or not all(keys):
            broken.append(f"command line: {override!r} is not key=value or block.key=value")
            continue
        try:
            value = _parse_yaml(text)
        except ValueError as error:
            broken.append(f"command line: {dotted}: {error} (got {text!r})")
            continue
        block = raw
        for depth, key in enumerate(keys[:-1], 1):
            block = block.setdefault(key, {})
            if not isinstance(block, dict):
                above = _dotted(keys[:depth])
                broken.append(f"command line: {dotted}: {above} holds no keys in {path}")
                break
        else:
            block[keys[-1]] = value
            given.append(keys)

    def where(key: KeyPath) -> str:
        overridden = any(key[: len(keys)] == keys for keys in given)
        return "command line: " if overridden else f"{path}: "

    return raw, where, broken


# ---- Checking ------------------------------------------------------------------------------------


def _check_tree(value: Any, annotation: Any, path: KeyPath, problems: dict[KeyPath, str]) -> Any:
    """Reports what pydantic lets pass or reports poorly, and returns the tree with typos mended.

    A misspelt key goes on under the name it was most likely meant for, so that its value is checked
    and the right key is not reported as missing too.
    """
    block = _block_in(annotation)
    if isinstance(value, list):
        return [_check_tree(v, annotation, (*path, i), problems) for i, v in enumerate(value)]
    if isinstance(value, dict) and block:
        fields = block.model_fields
        mended = {}
        for key, item in value.items():
            name, text = key, str(key)
            if key not in fields:
                free = [field for field in fields if field not in value]
                close = difflib.get_close_matches(text, free, n=1)
                elsewhere = _KEYS.get(text) or ([] if close else _close_elsewhere(text))
                means = " or ".join(close + elsewhere)
                hint = f"did you mean {means}?" if means else f"known here: {', '.join(fields)}"
                problems[(*path, text)] = f"unknown key, {hint} (got {_shown(item)})"
                if elsewhere or not close:
                    continue
                name = close[0]
            mended[name] = _check_tree(item, fields[name].annotation, (*path, name), problems)
        return mended
    if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
        problems[path] = f"must not be true or false, quote the word if it is one (got {value})"
    elif isinstance(value, float) and not math.isfinite(value):
        problems[path] = f"must be a finite number (got {value})"
    elif isinstance(value, str) and re.fullmatch(r"\s*[+-]?(inf|infinity|nan)\s*", value, re.I):
        problems[path] = f"must be a finite number (got {value!r})"  # float() reads these words
    elif isinstance(value, str) and not value.strip():
        problems[path] = "must not be blank"
    return value


def _block_in(annotation: Any) -> type[Block] | None:
    """The block that an annotation holds: itself, or the items of a list of blocks."""
    if args := get_args(annotation):
        return next(filter(None, map(_block_in, args)), None)
    is_block = isinstance(annotation, type) and issubclass(annotation, Block)
    return annotation if is_block else None


def _all_keys(block: type[Block], prefix: str = "") -> dict[str, list[str]]:
    """Every key of a block and of the blocks in it -> its dotted places."""
    places: dict[str, list[str]] = {}
    for name, field in block.model_fields.items():
        places.setdefault(name, []).append(prefix + name)
        inner = _block_in(field.annotation)
        if inner is field.annotation and inner is not None:  # items of a list have no dotted name
            for key, found in _all_keys(inner, f"{prefix}{name}.").items():
                places.setdefault(key, []).extend(found)
    return places


_KEYS = _all_keys(RunConfig)
_MISSING = "required key is missing"


def _close_elsewhere(key: str) -> list[str]:
    return [place for near in difflib.get_close_matches(key, _KEYS, n=1) for place in _KEYS[near]]


def _validate(raw: dict, problems: dict[KeyPath, str]) -> RunConfig | None:
    """The configuration, or None after adding pydantic's findings to ``problems``."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    reasons: dict[KeyPath, list[str]] = {}
    for item in errors:
        reasons.setdefault(_place(raw, item), []).append(_reason(item))
    for path, texts in reasons.items():
        # Of a union (`layer_map`: a word or a list), what fits best is the branch that got deepest.
        if any(deeper[: len(path)] == path and deeper != path for deeper in reasons):
            continue
        value = _at(raw, path)
        text = " or ".join(texts)
        if text != _MISSING and not isinstance(value, dict):
            text += f" (got {_shown(value)})"
        problems.setdefault(path, text)
    return None


def _place(raw: dict, item: ErrorDetails) -> KeyPath:
    """Where in the file an error is: pydantic's location without the branches of a union."""
    path: KeyPath = ()
    for key in item["loc"]:
        if key in raw if isinstance(raw, dict) else isinstance(key, int):
            raw, path = raw[key], (*path, key)
    return (*path, item["loc"][-1]) if item["type"] == "missing" else path


def _reason(item: ErrorDetails) -> str:
    if item["type"] == "missing":
        return _MISSING
    if item["type"] == "model_type":
        return "must hold keys with values"
    return item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def _without(raw: dict, problems: Iterable[KeyPath]) -> dict:
    """The tree without the values in question, and with stand-ins for what has no default."""
    kept = copy.deepcopy(raw)
    for path in problems:
        if not path:  # the one rule between top-level keys: bf16 excludes fp16
            kept.pop("fp16")
            continue
        # A list goes as a whole, and so does the student, whose keys depend on one another.
        keys = tuple(takewhile(lambda key: isinstance(key, str), path))
        keys = keys[:1] if keys[0] == "student" else keys
        block = _at(kept, keys[:-1])
        if isinstance(block, dict):
            block.pop(keys[-1], None)
    kept = {"output_dir": "?", "data": {}, "teacher": {}, "student": {"model": "?"}} | kept
    kept["data"] = {"train": "?"} | kept["data"]
    kept["teacher"] = {"model": "?"} | kept["teacher"]
    return kept


def _at(tree: Any, path: KeyPath) -> Any:
    """The value at a path; None where the path ends early."""
    for key in path:
        if isinstance(tree, dict):
            tree = tree.get(key)
        else:
            tree = tree[key] if isinstance(tree, list) and isinstance(key, int) else None
    return tree


def _dotted(path: KeyPath, end: str = "") -> str:
    return ".".join(map(str, path)) + end if path else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
