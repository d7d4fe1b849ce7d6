"""``metakd compare --labels``: a comparison for every number of labels that a domain could have.

Each student's domain is scarce in turn, the others keep all their labels: what a method makes of
few labels, and how many it is worth. Each setting is a run directory of its own in that of the
comparison, ``<domain>-<labels>-s<seed>`` or ``all``, so that its teachers have seen no more either,
and each seed draws other labels.
"""

from __future__ import annotations

import json
import math
import shutil
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
    csv_table,
    label_tables,
    markdown_table,
    shapeless,
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
        ConfigError: one student serves all domains, so that none can be scarce; no domain has more
            labels than asked for; or a tag is to be gone on from, which only one directory has.
    """
    if run.config.distill.one_student_for_all:
        raise ConfigError(
            "compare.labels: distill.one_student_for_all leaves no domain to be scarce",
            "leave out one of the two",
        )
    if run.resume not in ("auto", "never"):
        raise ConfigError(
            f"--resume {run.resume}: a comparison by labels has several run directories",
            "leave it out: each goes on from its newest checkpoint",
        )
    points = []
    asked = set(run.config.compare.labels or [ALL_LABELS])
    in_order = sorted(asked, key=lambda number: (number == ALL_LABELS, number))
    for wanted in in_order:
        cells: list[Cell] = []
        counts: dict[str, int] = {}
        for setting, own in _settings(run, wanted):
            run.say(f"labels: {setting.folder.name}")
            found = [Cell.read(cell) for cell in compare(setting, gamma2)["cells"]]
            cells += [cell for cell in found if cell.domain in own]
            counts |= {name: len(setting.part(setting.corpus.train, name)) for name in own}
            run.move_to(setting.world)  # another where groups of processes have trained
            if run.world.is_main:  # ``cache_limit_gib`` is for all of them
                shutil.rmtree(setting.cache_root / "teachers", ignore_errors=True)
        if cells:
            points.append(point(wanted, counts, cells))
    if not points:
        raise ConfigError(
            f"compare.labels: no domain has more than {in_order[0]} labels",
            "ask for fewer, or for all",
        )
    result = {
        "command": run.command,
        "split": "validation" if run.corpus.test is None else "test",
        "metric": run.corpus.task.metric,
        "seeds": run.config.compare.seeds,
        "points": points,
        **run.world.agree(run.world.on_first(lambda: against_base(points))),
    }
    if run.world.is_main:
        _write(run.folder, result)
    return result


def point(asked: int | str, labels: dict[str, int], cells: Sequence[Cell]) -> dict:
    """One point of the curve: how many labels were asked for, how many each domain had, and what
    came of it."""
    return {
        "asked": asked,
        "labels": labels,
        "summary": summarise(cells),
        "cells": [cell.as_json() for cell in cells],
    }


def _settings(run: Run, wanted: int | str) -> Iterator[tuple[Run, list[str]]]:
    """The runs with so many labels, each with its students' domains."""
    if wanted == ALL_LABELS:
        yield _setting(run, ALL_LABELS, run.student_domains, {}), run.student_domains
        return
    for name in run.student_domains:
        if wanted < len(run.part(run.corpus.train, name)):
            for number, seed in enumerate(run.config.compare.seeds):
                drawn = {
                    "seed": run.config.seed + number,
                    "compare": run.config.compare.model_copy(update={"seeds": [seed]}),
                }
                place = f"{name}-{wanted}-s{seed}"
                yield _setting(run, place, [name], {name: wanted}, **drawn), [name]


def _setting(
    run: Run, name: str, domains: list[str], labels: dict[str, int | str], **changes
) -> Run:
    config = run.config.model_copy(
        update={
            "output_dir": str(run.folder / name),
            "data": run.config.data.model_copy(update={"labels": labels}),
            "distill": run.config.distill.model_copy(update={"domains": domains}),
            **changes,
        }
    )
    shared = {field.name: getattr(run, field.name) for field in fields(Context)}
    # What students begin as depends on no label: one is made for all settings.
    return Run(**{**shared, "config": config}, starts_of=run)


def against_base(points: Sequence[dict]) -> dict:
    """Each row against the first one that has no teacher: the difference with as many labels, and
    how many times the labels that one needs to come as far."""
    cells = [[Cell.read(cell) for cell in point["cells"]] for point in points]
    rows = list(dict.fromkeys(cell.row for own in cells for cell in own))
    alone = [row for row in rows if not row.startswith(TEACHER) and "-from-" not in shapeless(row)]
    base = min(alone, key=lambda row: shapeless(row) != row, default=None)
    found: list[dict] = []
    if base is not None:
        curve = [answers_of(own, base) for own in cells]
        for point, own, reached in zip(points, cells, curve):
            for row in rows:
                answers = answers_of(own, row)
                for name in [AVERAGE, *answers] if row != base and answers else []:
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
    if not answers or len(known) < 2:  # one point is no curve
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
    rows = [
        {**cell, "labels": point["asked"]} for point in result["points"] for cell in point["cells"]
    ]
    table = csv_table(["labels", "row", "domain", "seed", result["metric"]], rows)
    (folder / "labels.csv").write_text(table, encoding="utf-8")


def as_markdown(result: dict) -> str:
    """The tables of ``table.label_tables``, and the command."""
    tables = [
        f"{caption}\n\n{markdown_table(header, rows)}"
        for caption, header, rows in label_tables(result)
    ]
    return "\n\n".join([*tables, f"Command: `{result['command']}`\n"])
