"""Students that are of no use, told from their confusion of classes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_CONFUSION = "confusion/"
_BETTER_THAN_CHANCE = 0.1  # recall of the classes on average, above that of guessing


def doubt(scores: Mapping[str, Any]) -> str:
    """Why a classifier's answers say nothing: it gives one class always, or is not better than who
    does; empty where neither holds, or only one class was asked for.

    Args:
        scores: as ``evaluate`` returns them, with how many examples of each class (row) were given
            each (column), by domain.
    """
    counts = [value for name, value in scores.items() if name.startswith(_CONFUSION)]
    if not counts:
        return ""
    true = [sum(map(sum, rows)) for rows in zip(*counts)]
    given = [sum(column) for column in zip(*(row for rows in counts for row in rows))]
    total, most = sum(true), max(true)
    hits = [sum(rows[number][number] for rows in counts) for number in range(len(true))]
    right, present = sum(hits), [number for number, many in enumerate(true) if many]
    if len(present) < 2:
        return ""
    if max(given) == total:
        return f"gives all {total} examples the same class, the right one of {right / total:.1%}"
    # Where classes are rare, more of them found may well cost some of the frequent ones.
    recall = sum(hits[number] / true[number] for number in present) / len(present)
    if right > most or recall > 1 / len(present) + _BETTER_THAN_CHANCE:
        return ""
    return (
        f"is right in {right / total:.1%}, and always the same class would be in {most / total:.1%}"
    )


def one_label(labels: Sequence[str]) -> str:
    """The same of answers without true classes."""
    if len(labels) < 20 or len(set(labels)) > 1:
        return ""
    return f"the model gives all {len(labels)} texts the same label, {labels[0]!r}"
