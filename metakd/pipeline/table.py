"""Tables of scores: cells, their means and spreads, and how they look in Markdown.

Imports no torch, so that reading a finished run does not wait for it.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict

from metakd.config.run import AS_SHAPE
from metakd.errors import CheckpointError
from metakd.method.tasks import METRICS, RIGHT, SINGLE_LABEL, by_domain

ALL_DOMAINS = "all"  # in place of a domain: the one student, or teacher, that serves them all
AVERAGE = "average"
TEACHER = "teacher: "  # what the rows of teachers begin with, before their kind


def shapeless(row: str) -> str:
    """The row without the shape of its students."""
    return row.partition(AS_SHAPE)[0]


def shape_of(row: str) -> str:
    """The shape of a row's students, if it has one of its own."""
    return row.partition(AS_SHAPE)[2]


@dataclass(frozen=True)
class Cell:
    """One score: the task's metric in percent of a row on a domain with one seed; ``right`` has a
    ``1`` or a ``0`` for each example, where that is known."""

    row: str
    domain: str
    seed: int
    score: float
    right: str = ""
    metric: str = SINGLE_LABEL.metric

    @classmethod
    def all_of(
        cls, row: str, domains: Iterable[str], seed: int, scores: Mapping[str, Any]
    ) -> list[Self]:
        """From what ``training.scoring.evaluate`` says; one for each of the domains that it
        knows."""
        known, metric = by_domain(scores), metric_of(scores)
        return [
            cls(row, name, seed, 100 * known[name], scores.get(f"{RIGHT}{name}", ""), metric)
            for name in domains
            if name in known
        ]

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """From what ``as_json`` gives."""
        metric = metric_of(values)
        rest = {name: value for name, value in values.items() if name != metric}
        return cls(**rest, score=values[metric], metric=metric)

    def as_json(self) -> dict[str, Any]:
        """Its score under the name of the metric."""
        return {
            "row": self.row,
            "domain": self.domain,
            "seed": self.seed,
            self.metric: self.score,
            "right": self.right,
        }


def metric_of(values: Mapping[str, Any]) -> str:
    """The metric that these are of: scores, the values of a cell."""
    return next((name for name in METRICS if name in values), SINGLE_LABEL.metric)


def name_of(result: Mapping[str, Any] | None) -> str:
    """What the metric of a comparison, or of scores, is called."""
    result = result or {}
    return METRICS[result.get("metric", metric_of(result))]


def title_of(result: Mapping[str, Any] | None) -> str:
    """The same at the beginning of a sentence."""
    name = name_of(result)
    return name[0].upper() + name[1:]


class Score(TypedDict):
    """One entry of a summary, in percent; ``std`` is None for a single seed."""

    mean: float
    std: float | None
    n: int


def summarise(cells: Sequence[Cell]) -> dict[str, dict[str, Score]]:
    """``{row: {domain or "average": {"mean", "std", "n"}}}``; the average's spread is over seeds,
    not domains."""
    summary: dict[str, dict[str, Score]] = {}
    for row in dict.fromkeys(cell.row for cell in cells):
        own = [cell for cell in cells if cell.row == row]
        of_domain = {
            d: [c.score for c in own if c.domain == d] for d in dict.fromkeys(c.domain for c in own)
        }
        by_seed = [
            statistics.fmean(c.score for c in own if c.seed == s)
            for s in dict.fromkeys(c.seed for c in own)
        ]
        summary[row] = {
            name: _spread(values) for name, values in {**of_domain, AVERAGE: by_seed}.items()
        }
    return summary


def answers_of(cells: Sequence[Cell], row: str) -> dict[str, dict[int, str]]:
    """``{domain: {seed: right}}`` of a row, for ``pipeline.statistics``; empty where a cell does
    not know."""
    own = [cell for cell in cells if cell.row == row]
    if not all(cell.right for cell in own):
        return {}
    return {
        name: {cell.seed: cell.right for cell in own if cell.domain == name}
        for name in dict.fromkeys(cell.domain for cell in own)
    }


def training_steps(log: Path) -> list[dict]:
    """The training steps of a stage's ``log.jsonl``; none where there is no log.

    Raises:
        CheckpointError: it is damaged, with the line.
    """
    steps = []
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            if row["split"] == "train":
                steps.append(row)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{log}:{number}: is no line of a log ({error})",
                "move the log away: its curves are left out then",
            ) from error
    return steps


def term_values(students: Sequence[Path]) -> dict[str, float]:
    """Mean weighted value of each term over the second half of training, and of lambda and its
    standard deviation within a batch, from the students' ``log.jsonl``; empty where none is."""
    seen: dict[str, list[float]] = {}
    for place in students:
        steps = training_steps(place / "log.jsonl")
        for row in steps[len(steps) // 2 :]:
            for name, value in row.items():
                if name.endswith("_weighted") or name in ("expertise", "expertise_std"):
                    seen.setdefault(name.removesuffix("_weighted"), []).append(value)
    return {name: statistics.fmean(values) for name, values in seen.items()}


def _spread(values: Sequence[float]) -> Score:
    # One seed says nothing about spread; None keeps it from reading as "no spread".
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values)}


def markdown(result: dict) -> str:
    """The table as Markdown: scores in percent, mean ± sample standard deviation over seeds."""
    summary = result["summary"]
    domains = list(
        dict.fromkeys(name for row in summary.values() for name in row if name != AVERAGE)
    )
    columns = [*domains, AVERAGE]
    rows = [[row, *(show(scores.get(c)) for c in columns)] for row, scores in summary.items()]
    return markdown_table(["", *columns], rows)


def terms_markdown(result: dict) -> str:
    """What each term contributed to the loss, as Markdown."""
    names = list(dict.fromkeys(name for row in result["terms"].values() for name in row))
    rows = [
        [row, *(f"{values[name]:.3g}" if name in values else "-" for name in names)]
        for row, values in result["terms"].items()
    ]
    return markdown_table(["", *names], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A table whose cells stay cells, whatever their text.

    Args:
        header: column names.
        rows: as many cells each.
        numbers: so many of the last columns are aligned to the right.
    """
    rules = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    lines = [_line(header), "|" + "|".join(rules) + "|", *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {_cell(cell)} |" if cell else " |" for cell in cells)


def _cell(text: str) -> str:
    return plain(text).replace("|", "\\|")


def plain(text: str) -> str:
    """One line of Markdown without HTML: names come from the data."""
    return " ".join(text.split()).replace("<", "&lt;")


def show(score: Score | None) -> str:
    """Mean ± standard deviation of one entry of a summary, in its own unit."""
    if score is None:
        return "-"
    return f"{score['mean']:.1f}" + (f" ± {score['std']:.1f}" if score["std"] is not None else "")


def show_interval(found: Sequence[float | None] | None, digits: int = 1) -> str:
    """A value between its bounds; a bound that is None is infinite."""
    if found is None:
        return "-"
    value, low, high = ("∞" if x is None else f"{x:.{digits}f}" for x in found)
    return f"{value} ({low} to {high})"


def csv_table(columns: Sequence[str], rows: Iterable[Mapping]) -> str:
    """These columns of the rows as CSV."""
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def label_tables(compared: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """Captions, headers and rows of a comparison by labels: scores, what they are more than those
    of the first row without a teacher, and how many times the labels that one would need.

    Args:
        compared: ``labels.json``.
    """
    points, base = compared["points"], compared["base"]
    domains = max(len(point["labels"]) for point in points)
    header = [""]
    for point in points:
        some = "" if len(point["labels"]) == domains else f" ({len(point['labels'])} domains)"
        header.append(f"{point['asked']}{some}")
    rows = list(dict.fromkeys(row for point in points for row in point["summary"]))
    cells = [
        [row, *(show(point["summary"].get(row, {}).get(AVERAGE)) for point in points)]
        for row in rows
    ]
    about = (
        f"{title_of(compared)} in percent on the {compared['split']} split by the labels of the "
        "student's domain, the mean over domains, each scarce in turn while the others keep "
        f"theirs; ± the sample standard deviation over seeds {compared['seeds']}, each of which "
        "draws other labels."
    )
    tables = [(about, header, cells)]
    found = {
        (entry["row"], entry["labels"]): entry
        for entry in compared["against_base"]
        if entry["domain"] == AVERAGE
    }
    captions = {
        "difference": f"Points of {name_of(compared)} more than {base}, and between what 95 of 100 "
        "paired draws of seeds and test examples lie.",
        "efficiency": f"Times the labels that {base} needs to reach as much, and between what 95 "
        "of 100 draws lie: 0 is less than it reaches with the fewest, ∞ more than with all.",
    }
    for name, caption in captions.items():
        if not any(entry[name] for entry in found.values()):  # no base, or no curve of it
            continue
        cells = [
            [row, *(show_interval(found.get((row, p["asked"]), {}).get(name)) for p in points)]
            for row in rows
            if row != base
        ]
        tables.append((caption, header, cells))
    return tables
