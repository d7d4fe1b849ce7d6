"""The two models of a ``latency.json`` against each other: how many times as fast the student is.

Imports the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from metakd.deploy.formats import INT8_ENGINE

LATENCY_AT = (1, 128)  # batch and length that the headline and the trade-off speak of


def ratios(latency: dict | None, shape: str = "") -> list[dict]:
    """For each batch and length that both models were measured at: the fastest engine of each, and
    how many times faster the student is, engine by engine.

    Args:
        latency: content of ``latency.json``; None for nothing.
        shape: of the students that are meant, see ``model_of``.
    """
    if not latency:
        return []
    pair = [model_of(latency, "teacher", ""), model_of(latency, "student", shape)]
    if None in pair or pair[0] == pair[1]:
        return []
    found = []
    for batch, length in sorted({(row["batch"], row["length"]) for row in latency["rows"]}):
        teacher, student = (times(latency, name, batch, length) for name in pair)
        teachers, students = fastest(teacher), fastest(student)
        if teachers is None or students is None:
            continue
        found.append(
            {
                "batch": batch,
                "length": length,
                "teacher": {"model": pair[0], **teachers},
                "student": {"model": pair[1], **students},
                "ratio": teachers["p50_ms"] / students["p50_ms"],
                "engines": {e: teacher[e] / student[e] for e in teacher if e in student},
            }
        )
    return found


def model_of(latency: dict, role: str, shape: str) -> str | None:
    """Name of the model that stands for the teacher, or for students of a shape (``shape_of`` their
    row; that of the configuration has no name); None where none was measured, or several.

    Where no model has the role, the first that was measured counts as the teacher and the last as
    the student, if it has no role.
    """
    models = latency["models"]
    own = [name for name, model in models.items() if model.get("role") == role]
    known = [name for name in own if models[name].get("shape", "") == shape]
    if models and not own and not shape:
        name = list(models)[0 if role == "teacher" else -1]
        known = [] if models[name].get("role") else [name]
    return known[0] if len(known) == 1 else None


def times(latency: dict, model: str | None, batch: int, length: int) -> dict[str, float]:
    """By engine the p50 of a model in ms; empty where it was not measured."""
    cell = (model, batch, length)
    return {
        row["engine"]: row["p50_ms"]
        for row in latency["rows"]
        if (row["model"], row["batch"], row["length"]) == cell
    }


def fastest(times: dict[str, float]) -> dict | None:
    """The fastest engine that computes with unrounded weights, and its p50."""
    exact = {engine: ms for engine, ms in times.items() if engine != INT8_ENGINE}
    engine = min(exact, key=lambda name: exact[name], default=None)
    return None if engine is None else {"engine": engine, "p50_ms": exact[engine]}


def nearest(measured: Sequence[dict]) -> dict | None:
    """The entry at ``LATENCY_AT``, or what was measured nearest to it."""
    return min(
        measured,
        key=lambda row: (
            abs(math.log(row["batch"] / LATENCY_AT[0])),
            abs(math.log(row["length"] / LATENCY_AT[1])),
        ),
        default=None,
    )
