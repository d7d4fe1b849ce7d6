"""Paths and hub ids, told apart before a hub is asked for what is a mistyped path."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")
_BARE_ID = re.compile(r"[A-Za-z0-9_][\w.-]*")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*")


def may_be_hub_id(source: str, bare: bool = False) -> bool:
    """Can this be ``owner/name``, and not a wrong path? A parent folder that exists says it is one.

    Args:
        source: what is neither a file nor a folder.
        bare: a name without an owner will do, as of the oldest models.
    """
    if bare and _BARE_ID.fullmatch(source):
        return True
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).parent.is_dir()


def is_file_name(source: str) -> bool:
    """Does it end as the names of files do?"""
    return bool(_FILE_SUFFIX.fullmatch(Path(source).suffix))


def meant(path: Path) -> str:
    """A question after what is there and called nearly so; empty where nothing is."""
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    return closest(path.name, (entry.name for entry in there))


def closest(name: str, known: Iterable[str]) -> str:
    """The same question after a name that is known."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
