"""Students that are of no use, told from what was noted of their answers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metakd.method.tasks import CONFUSION, COUNTS

_BETTER_THAN_CHANCE = 0.1  # recall of the classes on average, above that of guessing


def doubt(scores: Mapping[str, Any]) -> str:
    """Why a model's answers say nothing; empty where they do, or only one class was asked for.

    It gives one class always, or is not better than who does; gives no text any of its classes;
    gives numbers that are no closer than their mean.

    Args:
        scores: as ``evaluate`` returns them.
    """
    confusions = [value for name, value in scores.items() if name.startswith(CONFUSION)]
    counts = [value for name, value in scores.items() if name.startswith(COUNTS)]
    if confusions:
        return _of_one_class(confusions)
    if counts:
        given = sum(right + wrong for classes in counts for right, wrong, _ in classes)
        wanted = sum(right + missed for classes in counts for right, _, missed in classes)
        return "" if given or not wanted else "gives no text any of its classes"
    if scores.get("r2", 1.0) <= 0.0:
        return f"is no closer to the numbers than their mean is (R² {scores['r2']:.2f})"
    return ""


def _of_one_class(confusions: Sequence[Sequence[Sequence[int]]]) -> str:
    true = [sum(map(sum, rows)) for rows in zip(*confusions)]
    given = [sum(column) for column in zip(*(row for rows in confusions for row in rows))]
    total, most = sum(true), max(true)
    hits = [sum(rows[number][number] for rows in confusions) for number in range(len(true))]
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


def one_label(labels: Sequence[Any]) -> str:
    """The same of answers without true ones."""
    if len(labels) < 20 or len(set(map(repr, labels))) > 1:
        return ""
    return f"the model gives all {len(labels)} texts the same label, {labels[0]!r}"
