"""``metakd compare``: methods x domains x seeds, as one table with mean and standard deviation.

Every cell is a student stage, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from metakd.config import CompareRow
from metakd.errors import ConfigError
from metakd.method.methods import METHODS
from metakd.pipeline.lessons import Lesson
from metakd.pipeline.stages import Run
from metakd.pipeline.table import (
    ALL_DOMAINS,
    TEACHER,
    Cell,
    csv_table,
    markdown,
    markdown_table,
    summarise,
    term_values,
    terms_markdown,
    title_of,
)


def compare(run: Run, gamma2: Sequence[float] = ()) -> dict:
    """Train every row on every domain with every seed and write ``compare.{md,json,csv}``.

    Args:
        run: the run directory and configuration; ``config.compare`` holds rows and seeds.
        gamma2: replaces each row whose method has L_TKD by one row for each of these weights of it.

    Returns:
        The content of ``compare.json``.
    """
    config = run.config.compare
    teacher_seeds = config.seeds[: config.teacher_seeds]
    split = "validation" if run.corpus.test is None else "test"
    cells: list[Cell] = []
    places: dict[str, list[Path]] = {}
    seconds: dict[str, list[float]] = {}

    planned = list(_students(run, gamma2, teacher_seeds))
    run.foresee(lesson for lesson, _ in planned)
    for kind in dict.fromkeys(row.teacher for row in config.rows if row.teacher):
        for seed in teacher_seeds:
            scores = {}
            for place in run.teach(kind, seed):
                scores |= run.store.result(place)[split]
            members = run.config.teacher.ensemble
            row = TEACHER + kind + (f", first of {members}" if members > 1 else "")
            cells += Cell.all_of(row, run.corpus.domains, seed, scores)
    run.spread(planned)
    for lesson, options in planned:
        label, seed = options["label"], options["seed"]
        place, result = run.student(lesson, **options)
        places.setdefault(label, []).append(place)
        seconds.setdefault(label, []).append(run.seconds(place))
        scored = run.corpus.domains if lesson.domain == ALL_DOMAINS else [lesson.domain]
        cells += Cell.all_of(label, scored, seed, result[split])

    result = {
        "split": split,
        "metric": run.corpus.task.metric,
        "command": run.command,
        "seeds": config.seeds,
        "teacher_seeds": teacher_seeds,
        "summary": summarise(cells),
        "seconds": {row: statistics.fmean(each) for row, each in seconds.items()},
        "terms": {row: term_values(students) for row, students in places.items()},
        "students": {
            row: [str(place.relative_to(run.folder)) for place in students]
            for row, students in places.items()
        },
        "cells": [cell.as_json() for cell in cells],
    }
    if run.world.is_main:
        _write(run.folder, result)
    return result


def _students(
    run: Run, gamma2: Sequence[float], teacher_seeds: Sequence[int]
) -> Iterator[tuple[Lesson, dict]]:
    """Lesson of every student of the table, and the other arguments of ``Run.student``."""
    config, labels = run.config.compare, set()
    for row in _expand(config.rows, gamma2):
        student = row.student or run.config.student
        distill = row.taught(run.config.distill).towards(student)
        label = row.label
        if label in labels:
            raise ConfigError(f"compare.rows: two rows are called {label}", "leave one of them out")
        labels.add(label)
        for number, seed in enumerate(config.seeds):
            teacher_seed = teacher_seeds[number % len(teacher_seeds)]
            for domain in run.student_domains:
                lesson = Lesson(domain, student, distill, row.teacher, teacher_seed)
                if run.has_teacher(lesson):
                    yield lesson, {"seed": seed, "keep": config.keep_students, "label": label}


def _expand(rows: Sequence[CompareRow], gamma2: Sequence[float]) -> list[CompareRow]:
    expanded = []
    for row in rows:
        if gamma2 and "gamma2" in METHODS[row.method].keys:
            expanded += [row.model_copy(update={"gamma2": value}) for value in gamma2]
        else:
            expanded.append(row)
    return [row for number, row in enumerate(expanded) if row not in expanded[:number]]


def _write(folder: Path, result: dict) -> None:
    note = (
        f"{title_of(result)} in percent on the {result['split']} split; mean ± sample standard "
        f"deviation over student seeds {result['seeds']}, teacher seeds "
        f"{result['teacher_seeds']}.\n\n"
        f"Command: `{result['command']}`\n"
    )
    terms = (
        "Weighted value of each term (mean over the second half of training), and lambda "
        f"(`expertise`) with its standard deviation within a batch:\n\n{terms_markdown(result)}\n"
    )
    listed = markdown_table(
        ["", "seconds"], [[row, f"{mean:.0f}"] for row, mean in result["seconds"].items()], 1
    )
    times = f"Training of a student, mean over domains and seeds, its teachers there:\n\n{listed}\n"
    page = f"{markdown(result)}\n\n{note}\n{times}\n{terms}"
    (folder / "compare.md").write_text(page, encoding="utf-8")
    (folder / "compare.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    table = csv_table(["row", "domain", "seed", result["metric"]], result["cells"])
    (folder / "compare.csv").write_text(table, encoding="utf-8")
