"""The two models of a ``latency.json`` against each other: how many times as fast the student is.

Imports the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from metakd.deploy.formats import INT8_ENGINE

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
    p50 = {
        (row["model"], row["engine"], row["batch"], row["length"]): row["p50_ms"] for row in rows
    }
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    found = []
    for batch, length in sorted({(row["batch"], row["length"]) for row in rows}):
        times = {
            role: {e: p50[key] for e in engines if (key := (name, e, batch, length)) in p50}
            for role, name in zip(("teacher", "student"), pair)
        }
        exact = {
            model: {engine: ms for engine, ms in own.items() if engine != INT8_ENGINE}
            for model, own in times.items()
        }
        if not all(exact.values()):
            continue
        fastest = {
            model: {"engine": (engine := min(own, key=own.get)), "p50_ms": own[engine]}
            for model, own in exact.items()
        }
        both = [engine for engine in times["teacher"] if engine in times["student"]]
        found.append(
            {
                "batch": batch,
                "length": length,
                **fastest,
                "ratio": fastest["teacher"]["p50_ms"] / fastest["student"]["p50_ms"],
                "engines": {e: times["teacher"][e] / times["student"][e] for e in both},
                "int8_ms": times["student"].get(INT8_ENGINE),
            }
        )
    return found


def compared_models(latency: dict) -> tuple[str, str] | None:
    """Names of the teacher and of the student among the models that were measured."""
    models = latency["models"]
    names = list(models)
    found = [
        next((name for name in names if models[name].get("role") == role), instead)
        for role, instead in (("teacher", names[0]), ("student", names[-1]))
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
