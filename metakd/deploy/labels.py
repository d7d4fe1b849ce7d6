"""The part of a report that says what methods make of few labels: ``labels.json`` of ``metakd
compare --labels``."""

from __future__ import annotations

import statistics

from metakd.deploy import plots
from metakd.deploy.parts import Section, Table
from metakd.pipeline.table import (
    AVERAGE,
    TEACHER,
    label_tables,
    name_of,
    show,
    show_interval,
    title_of,
)


def gather(compared: dict) -> dict:
    """The facts: ``labels.json`` without its cells.

    Args:
        compared: ``labels.json``.
    """
    points = [
        {name: point[name] for name in ("asked", "labels", "summary")}
        for point in compared["points"]
    ]
    return {**compared, "points": points}


def section(labels: dict) -> Section:
    """The curve, and its numbers."""
    found = Section("labels", f"{title_of(labels)} by labels")
    curve = [
        (
            str(point["asked"]),
            statistics.fmean(point["labels"].values()),
            {row: scores[AVERAGE] for row, scores in point["summary"].items()},
        )
        for point in labels["points"]
    ]
    found.plots.append(plots.by_labels(curve, title_of(labels)))
    found.tables += [Table(*table) for table in label_tables(labels)]
    return found


def headline(labels: dict) -> str:
    """What is reached with the fewest labels, against fine-tuning on them."""
    point, base = labels["points"][0], labels["base"]
    scores = {row: summary[AVERAGE] for row, summary in point["summary"].items()}
    students = {row: score for row, score in scores.items() if not row.startswith(TEACHER)}
    row = max(students, key=lambda name: students[name]["mean"])
    text = (
        f"With {point['asked']} labels of its domain {row} reaches {show(students[row])} % "
        f"{name_of(labels)} ({labels['split']} split)"
    )
    if base is None or row == base:
        return f"{text}."
    text += f", {base} {show(students[base])} %"
    for found in labels["against_base"]:
        here = (found["row"], found["domain"], found["labels"]) == (row, AVERAGE, point["asked"])
        if here and found["efficiency"]:
            text += f"; {base} needs {show_interval(found['efficiency'])} times the labels for that"
    return f"{text}."
