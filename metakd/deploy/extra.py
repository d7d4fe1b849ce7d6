"""Packages that the extra ``deploy`` installs: whether they are there, and what to do if not."""

from __future__ import annotations

from importlib import import_module

from metakd.errors import UnsupportedError, install

INSTALL = install("deploy")


def absent(*packages: str) -> str | None:
    """Which of these cannot be imported, and why; None if all can."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            return f"{package} is not installed ({error})"
    return None


def need(*packages: str) -> None:
    """See that all of these are there.

    Raises:
        UnsupportedError: one is not, with the remedy.
    """
    if reason := absent(*packages):
        raise UnsupportedError(reason, INSTALL)
