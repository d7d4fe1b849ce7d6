"""The two models of a ``latency.json`` against each other: how many times as fast the student is.

Imports the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from metakd.deploy.formats import INT8_ENGINE

ROLES = ("teacher", "student")
LATENCY_AT = (1, 128)  # batch and length that the headline and the trade-off speak of


def ratios(latency: dict | None) -> list[dict]:
    """For each batch and length that both models were measured at: the fastest engine of each, and
    how many times faster the student is, engine by engine.

    Where no model has such a role, the first that was measured counts as the teacher and the last
    as the student.
    """
    rows = latency["rows"] if latency else []
    pair = compared_models(latency) if latency else None
    if pair is None:
        return []
    found = []
    for batch, length in sorted({(row["batch"], row["length"]) for row in rows}):
        teacher, student = (times(latency, name, batch, length) for name in pair)
        teachers, students = fastest(teacher), fastest(student)
        if teachers is None or students is None:
            continue
        found.append(
            {
                "batch": batch,
                "length": length,
                "teacher": teachers,
                "student": students,
                "ratio": teachers["p50_ms"] / students["p50_ms"],
                "engines": {e: teacher[e] / student[e] for e in teacher if e in student},
            }
        )
    return found


def model_of(latency: dict, role: str, shape: str) -> str | None:
    """Name of the model that stands for the teacher, or for students of a shape (``shape_of`` their
    row; that of the configuration has no name); None where none was measured."""
    wanted = (role, shape)
    models = latency["models"].items()
    known = [name for name, m in models if (m.get("role"), m.get("shape", "")) == wanted]
    if not known and not shape:  # as ``ratios`` has it
        known = [name for name, at in zip(compared_models(latency) or (), ROLES) if at == role]
    return known[0] if known else None


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


def compared_models(latency: dict) -> tuple[str, str] | None:
    """Names of the teacher and of the student among the models that were measured."""
    models = latency["models"]
    names = list(models)
    found = [
        next((name for name in names if models[name].get("role") == role), instead)
        for role, instead in zip(ROLES, (names[0], names[-1]))
    ]
    return None if found[0] == found[1] else (found[0], found[1])


def headline_ratio(ratios: Sequence[dict]) -> dict | None:
    """The entry at ``LATENCY_AT``, or what was measured nearest to it."""
    return min(
        ratios,
        key=lambda row: (
            abs(math.log(row["batch"] / LATENCY_AT[0])),
            abs(math.log(row["length"] / LATENCY_AT[1])),
        ),
        default=None,
    )
