"""``metakd compare``: methods x domains x seeds, as one table with mean and standard deviation.

Every cell is a student stage, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metakd.config import CompareRow
from metakd.training.stages import ALL_DOMAINS, Run, method_label

AVERAGE = "average"


@dataclass(frozen=True)
class Cell:
    """One score: accuracy in percent of a row on a domain with one seed."""

    row: str
    domain: str
    seed: int
    accuracy: float


def compare(run: Run, gamma2: Sequence[float] = ()) -> dict:
    """Train every row on every domain with every seed and write ``compare.{md,json,csv}``.

    Args:
        run: the run directory and configuration; ``config.compare`` holds rows and seeds.
        gamma2: replaces each meta-distillation row by one row for each of these weights of L_TKD.

    Returns:
        The content of ``compare.json``.
    """
    config = run.config.compare
    teacher_seeds = config.seeds[: config.teacher_seeds]
    split = "validation" if run.corpus.test is None else "test"
    cells: list[Cell] = []
    places: dict[str, list[Path]] = {}

    for kind in dict.fromkeys(row.teacher for row in config.rows if row.teacher):
        for seed in teacher_seeds:
            scores = {}
            for place in run.teach(kind, seed):
                scores |= run.store.result(place)[split]
            cells += [
                Cell(f"teacher: {kind}", domain, seed, 100 * scores[f"accuracy/{domain}"])
                for domain in run.corpus.domains
                if f"accuracy/{domain}" in scores
            ]
    for row in _expand(config.rows, gamma2):
        distill = run.config.distill.model_copy(
            update={"method": row.method}
            | ({"gamma2": row.gamma2} if row.gamma2 is not None else {})
        )
        label = method_label(distill, row.teacher) + (
            f"-gamma2-{row.gamma2:g}" if row.gamma2 is not None else ""
        )
        for number, seed in enumerate(config.seeds):
            teacher_seed = teacher_seeds[number % len(teacher_seeds)]
            for domain in run.student_domains:
                if not run.has_teacher(row.teacher, row.method, domain):
                    continue
                place, result = run.student(
                    domain,
                    distill,
                    row.teacher,
                    seed,
                    teacher_seed,
                    keep=config.keep_students,
                    label=label,
                )
                places.setdefault(label, []).append(place)
                scored = run.corpus.domains if domain == ALL_DOMAINS else [domain]
                cells += [
                    Cell(label, name, seed, 100 * result[split][f"accuracy/{name}"])
                    for name in scored
                ]

    result = {
        "split": split,
        "command": run.command,
        "seeds": config.seeds,
        "teacher_seeds": teacher_seeds,
        "summary": summarise(cells),
        "terms": {row: term_values(students) for row, students in places.items()},
        "cells": [vars(cell) for cell in cells],
    }
    if run.world.is_main:
        _write(run.folder, result)
    return result


def _expand(rows: Sequence[CompareRow], gamma2: Sequence[float]) -> list[CompareRow]:
    expanded = []
    for row in rows:
        if row.method == "meta" and gamma2:
            expanded += [
                CompareRow(method="meta", teacher="meta", gamma2=value) for value in gamma2
            ]
        else:
            expanded.append(row)
    return list(dict.fromkeys(expanded))


def summarise(cells: Sequence[Cell]) -> dict[str, dict[str, dict[str, float]]]:
    """``{row: {domain or "average": {"mean", "std", "n"}}}``; the average's spread is over seeds,
    not domains."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for row in dict.fromkeys(cell.row for cell in cells):
        own = [cell for cell in cells if cell.row == row]
        by_domain = {
            d: [c.accuracy for c in own if c.domain == d]
            for d in dict.fromkeys(c.domain for c in own)
        }
        by_seed = [
            statistics.fmean(c.accuracy for c in own if c.seed == s)
            for s in dict.fromkeys(c.seed for c in own)
        ]
        summary[row] = {
            name: _spread(values) for name, values in {**by_domain, AVERAGE: by_seed}.items()
        }
    return summary


def term_values(students: Sequence[Path]) -> dict[str, float]:
    """Mean weighted value of each term over the second half of training, and of lambda and its
    standard deviation within a batch, from the students' ``log.jsonl``; empty where none is."""
    seen: dict[str, list[float]] = {}
    for log in filter(Path.exists, (place / "log.jsonl" for place in students)):
        logged = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        steps = [row for row in logged if row["split"] == "train"]
        for row in steps[len(steps) // 2 :]:
            for name, value in row.items():
                if name.endswith("_weighted") or name in ("expertise", "expertise_std"):
                    seen.setdefault(name.removesuffix("_weighted"), []).append(value)
    return {name: statistics.fmean(values) for name, values in seen.items()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    # One seed says nothing about spread; None keeps it from reading as "no spread".
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values)}


def markdown(result: dict) -> str:
    """The table as Markdown: accuracy in percent, mean ± sample standard deviation over seeds."""
    summary = result["summary"]
    domains = list(
        dict.fromkeys(name for row in summary.values() for name in row if name != AVERAGE)
    )
    lines = ["| | " + " | ".join([*domains, AVERAGE]) + " |", "|---" * (len(domains) + 2) + "|"]
    for row, scores in summary.items():
        shown = [_show(scores.get(name)) for name in [*domains, AVERAGE]]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def terms_markdown(result: dict) -> str:
    """What each term contributed to the loss, as Markdown."""
    names = list(dict.fromkeys(name for row in result["terms"].values() for name in row))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, values in result["terms"].items():
        shown = [f"{values[name]:.3g}" if name in values else "-" for name in names]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _show(score: dict[str, float] | None) -> str:
    if score is None:
        return "-"
    return f"{score['mean']:.1f}" + (f" ± {score['std']:.1f}" if score["std"] is not None else "")


def _write(folder: Path, result: dict) -> None:
    note = (
        f"Accuracy in percent on the {result['split']} split; mean ± sample standard deviation "
        f"over student seeds {result['seeds']}, teacher seeds {result['teacher_seeds']}.\n\n"
        f"Command: `{result['command']}`\n"
    )
    terms = (
        "Weighted value of each term (mean over the second half of training), and lambda "
        f"(`expertise`) with its standard deviation within a batch:\n\n{terms_markdown(result)}\n"
    )
    page = f"{markdown(result)}\n\n{note}\n{terms}"
    (folder / "compare.md").write_text(page, encoding="utf-8")
    (folder / "compare.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    table = io.StringIO()
    writer = csv.DictWriter(table, ["row", "domain", "seed", "accuracy"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["cells"])
    (folder / "compare.csv").write_text(table.getvalue(), encoding="utf-8")
