"""The part of a report that says what methods make of few labels: ``labels.json`` of ``metakd
compare --labels``."""

from __future__ import annotations

import statistics

from metakd.deploy import plots
from metakd.deploy.parts import Section, Table
from metakd.pipeline.table import AVERAGE, TEACHER, show, show_interval


def gather(compared: dict) -> dict:
    """Accuracy of each row by the labels of the student's domain, the mean over domains, and what
    it is against the first row without a teacher.

    Args:
        compared: ``labels.json``.
    """
    points = [
        {
            "asked": str(point["asked"]),
            "labels": statistics.fmean(point["labels"].values()),
            "average": {
                row: scores[AVERAGE]
                for row, scores in point["summary"].items()
                if AVERAGE in scores
            },
        }
        for point in compared["points"]
    ]
    for point in points:
        of_base = [found for found in compared["against_base"] if found["domain"] == AVERAGE]
        point["against_base"] = {
            found["row"]: {name: found[name] for name in ("difference", "efficiency")}
            for found in of_base
            if str(found["labels"]) == point["asked"]
        }
    return {"points": points} | {name: compared[name] for name in ("split", "seeds", "base")}


def section(labels: dict) -> Section:
    """The curve, and its numbers."""
    found = Section("labels", "Accuracy by labels", plots=[plots.by_labels(labels)])
    points, base = labels["points"], labels["base"]
    header = ["", *(point["asked"] for point in points)]
    rows = list(dict.fromkeys(row for point in points for row in point["average"]))
    cells = [[row, *(show(point["average"].get(row)) for point in points)] for row in rows]
    found.tables.append(
        Table(
            f"Accuracy in percent on the {labels['split']} split by the labels of the student's "
            "domain, the mean over domains, each scarce in turn while the others keep theirs; ± "
            "the sample standard deviation over seeds.",
            header,
            cells,
        )
    )
    captions = {
        "difference": f"Points of accuracy more than {base}, and between what 95 of 100 paired "
        "draws of seeds and test examples lie.",
        "efficiency": f"Times the labels that {base} needs to reach as much; ∞: all of them are "
        "too few.",
    }
    for name, caption in captions.items() if base is not None else ():
        cells = [
            [row, *(show_interval(p["against_base"].get(row, {}).get(name)) for p in points)]
            for row in rows
            if row != base
        ]
        found.tables.append(Table(caption, header, cells))
    return found


def headline(labels: dict) -> str:
    """What is reached with the fewest labels, against fine-tuning on them."""
    point, base = labels["points"][0], labels["base"]
    students = {row: s for row, s in point["average"].items() if not row.startswith(TEACHER)}
    row = max(students, key=lambda name: students[name]["mean"])
    text = (
        f"With {point['asked']} labels of its domain {row} reaches {show(students[row])} % "
        f"accuracy ({labels['split']} split)"
    )
    if base is None or row == base:
        return f"{text}."
    text += f", {base} {show(students[base])} %"
    if efficiency := point["against_base"][row]["efficiency"]:
        text += f"; {base} needs {show_interval(efficiency)} times the labels for as much"
    return f"{text}."
