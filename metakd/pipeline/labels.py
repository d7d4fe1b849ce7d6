"""``metakd compare --labels``: a comparison for every number of labels that a domain could have.

Each student's domain is scarce in turn, the others keep all their labels: what a method makes of
few labels, and how many it is worth. Each setting is a run directory of its own in that of the
comparison, ``<domain>-<labels>`` or ``all``, so that its teachers have seen no more either.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from metakd.errors import ConfigError
from metakd.pipeline.compare import compare
from metakd.pipeline.context import Context
from metakd.pipeline.stages import Run
from metakd.pipeline.statistics import (
    Answers,
    accuracy_difference,
    label_efficiency,
)
from metakd.pipeline.table import (
    AVERAGE,
    TEACHER,
    Cell,
    answers_of,
    markdown_table,
    show,
    show_interval,
    summarise,
)

ALL_LABELS = "all"


def compare_labels(run: Run, gamma2: Sequence[float] = ()) -> dict:
    """Train every row of the comparison with each number of labels of ``compare.labels``, and write
    ``labels.{md,json,csv}``. A domain that has no more than a number is left out there.

    Args:
        run: directory and configuration, without ``data.labels``.
        gamma2: as for ``compare``.

    Returns:
        The content of ``labels.json``: for each number a summary and cells, and what each row is
        worth in labels of the first row without a teacher.

    Raises:
        ConfigError: one student serves all domains, so that none can be scarce.
    """
    if run.config.distill.one_student_for_all:
        raise ConfigError(
            "compare.labels: distill.one_student_for_all leaves no domain to be scarce",
            "leave out one of the two",
        )
    points = []
    asked = set(run.config.compare.labels or [ALL_LABELS])
    for wanted in sorted(asked, key=lambda number: (number == ALL_LABELS, number)):
        cells: list[Cell] = []
        counts: dict[str, int] = {}
        for setting, own in _settings(run, wanted):
            run.say(f"labels: {setting.folder.name}")
            found = [Cell(**cell) for cell in compare(setting, gamma2)["cells"]]
            cells += [cell for cell in found if cell.domain in own]
            counts |= own
        if cells:
            points.append(
                {
                    "asked": wanted,
                    "labels": counts,
                    "summary": summarise(cells),
                    "cells": [vars(cell) for cell in cells],
                }
            )
    if not points:
        raise ConfigError(
            f"compare.labels: no domain has more than {min(asked, key=str)} labels",
            "ask for fewer, or for all",
        )
    result = {
        "command": run.command,
        "split": "validation" if run.corpus.test is None else "test",
        "seeds": run.config.compare.seeds,
        "points": points,
        **against_base(points),
    }
    if run.world.is_main:
        _write(run.folder, result)
    return result


def _settings(run: Run, wanted: int | str) -> Iterator[tuple[Run, dict[str, int]]]:
    """The runs with so many labels, each with the labels of its students' domains."""
    size = {name: len(run.part(run.corpus.train, name)) for name in run.student_domains}
    if wanted == ALL_LABELS:
        yield _setting(run, ALL_LABELS, size, {}), size
        return
    for name, available in size.items():
        if wanted < available:
            own = {name: wanted}
            yield _setting(run, f"{name}-{wanted}", own, own), own


def _setting(run: Run, name: str, domains: dict[str, int], labels: dict[str, int]) -> Run:
    config = run.config.model_copy(
        update={
            "output_dir": str(run.folder / name),
            "data": run.config.data.model_copy(update={"labels": labels}),
            "distill": run.config.distill.model_copy(update={"domains": list(domains)}),
        }
    )
    shared = {field.name: getattr(run, field.name) for field in fields(Context)}
    return Run(**{**shared, "config": config})


def against_base(points: Sequence[dict]) -> dict:
    """Each row against the first one that has no teacher: the difference with as many labels, and
    how many times the labels that one needs to come as far."""
    cells = [[Cell(**cell) for cell in point["cells"]] for point in points]
    rows = list(dict.fromkeys(cell.row for own in cells for cell in own))
    base = next((row for row in rows if "-from-" not in row and not row.startswith(TEACHER)), None)
    found: list[dict] = []
    if base is not None:
        curve = [answers_of(own, base) for own in cells]
        for point, own, reached in zip(points, cells, curve):
            for row in rows:
                answers = answers_of(own, row)
                for name in [AVERAGE, *answers] if row != base else []:
                    part = answers if name == AVERAGE else {name: answers[name]}
                    entry = {"row": row, "domain": name, "labels": point["asked"]}
                    entry["difference"] = accuracy_difference(part, reached)
                    entry["efficiency"] = _efficiency(points, curve, part, point)
                    found.append(entry)
    return {"base": base, "against_base": found}


def _efficiency(
    points: Sequence[dict], curve: Sequence[Answers], answers: Answers, point: dict
) -> list[float | None] | None:
    """See ``label_efficiency``; JSON knows no infinity."""
    known = [
        (_mean_labels(at, answers), {name: side[name] for name in answers})
        for at, side in zip(points, curve)
        if answers.keys() <= side.keys()
    ]
    if not answers or not known:
        return None
    counts, curves = zip(*known, strict=True)
    found = label_efficiency(counts, curves, answers, _mean_labels(point, answers))
    return None if found is None else [x if math.isfinite(x) else None for x in found]


def _mean_labels(point: dict, domains: Iterable[str]) -> float:
    return statistics.fmean(point["labels"][name] for name in domains)


def _write(folder: Path, result: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (folder / "labels.md").write_text(as_markdown(result), encoding="utf-8")
    table = io.StringIO()
    columns = ["labels", "row", "domain", "seed", "accuracy"]
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for point in result["points"]:
        writer.writerows({**cell, "labels": point["asked"]} for cell in point["cells"])
    (folder / "labels.csv").write_text(table.getvalue(), encoding="utf-8")


def as_markdown(result: dict) -> str:
    """Accuracy for each number of labels, what it is more than the first row without a teacher
    reaches, and how many times the labels that one would need."""
    points = result["points"]
    header = ["", *(str(point["asked"]) for point in points)]
    rows = list(dict.fromkeys(row for point in points for row in point["summary"]))
    accuracy = [
        [row, *(show(point["summary"].get(row, {}).get(AVERAGE)) for point in points)]
        for row in rows
    ]
    parts = [
        f"Accuracy in percent on the {result['split']} split by the labels of the student's "
        "domain, the mean over domains, each scarce in turn; ± the sample standard deviation over "
        f"seeds {result['seeds']}.\n\n{markdown_table(header, accuracy)}"
    ]
    by_row = {
        (found["row"], found["labels"]): found
        for found in result["against_base"]
        if found["domain"] == AVERAGE
    }
    titles = {
        "difference": f"Points of accuracy more than {result['base']} (95 % of paired draws of "
        "seeds and test examples)",
        "efficiency": f"Times the labels that {result['base']} needs to reach as much (∞: all of "
        "them are too few)",
    }
    for name, title in titles.items():
        shown = [
            [
                row,
                *(
                    show_interval(by_row.get((row, point["asked"]), {}).get(name))
                    for point in points
                ),
            ]
            for row in rows
            if row != result["base"]
        ]
        if result["base"] is not None:
            parts.append(f"{title}:\n\n{markdown_table(header, shown)}")
    return "\n\n".join([*parts, f"Command: `{result['command']}`\n"])
