"""Reads what the benchmarks wrote: one reader per kind of report, one shape for all that compare,
draw or sum up.

A report becomes panels, each a dictionary of figures (a centre with its interval) by contender.
Kinds: an operation of the registry (``benchmarks.run``), a distillation step (``benchmarks.step``),
throughput (``benchmarks.throughput``), latency (``metakd latency``) and pytest-benchmark's JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metakd.deploy.formats import INT8_ENGINE, TOKENISING
from metakd.pipeline.table import markdown_table


class ReportError(Exception):
    """A file that is no report, or reports that cannot be compared; says why in one line."""


@dataclass(frozen=True)
class Figure:
    """A measured value with the interval that it moved in.

    Args:
        centre: the median.
        low: end of the interval; None where too few calls gave none.
        high: the other end, or None.
        share_of_limit: of what the machine can do at most, where the benchmark knows.

    Raises:
        ValueError: they are not positive, finite and in order, so a damaged file is noticed.
    """

    centre: float
    low: float | None = None
    high: float | None = None
    share_of_limit: float | None = None

    def __post_init__(self):
        low, high = (self.centre if end is None else end for end in (self.low, self.high))
        if not 0 < low <= self.centre <= high < math.inf:
            raise ValueError(f"{self.centre} is not within {low} to {high}")


Panels = dict[str, dict[str, Figure]]  # title -> contender -> figure


@dataclass(frozen=True)
class Kind:
    """A kind of report.

    Args:
        name: for messages.
        interval: what a figure's interval is.
        panels: the reader.
        is_ours: whether a contender is what the benchmark is about; None for one that is neither
            that nor its rival.
        unit: of its figures.
        higher_is_better: of its figures.
    """

    name: str
    interval: str
    panels: Callable[[dict], Panels]
    is_ours: Callable[[str], bool | None]
    unit: str = "ms"
    higher_is_better: bool = False


@dataclass(frozen=True)
class Report:
    name: str  # of its file, without the suffix
    kind: Kind
    environment: dict
    panels: Panels
    data: dict  # the whole file


def _contests(report: dict) -> Panels:
    panels = {}
    for row in report["rows"]:
        title = f"{report.get('op', 'step')} {row['shape']} {row['dtype']}"
        panels[title] = {
            name: Figure(
                *(entry[key] for key in ("median_ms", "p20_ms", "p80_ms")),
                entry.get("share_of_limit"),
            )
            for name, entry in row["contenders"].items()
        }
    return panels


def _layouts(report: dict) -> Panels:
    panels = {}
    for row in report["rows"]:
        title = f"throughput, up to {row['max_length']} tokens, batch {row['batch']}"
        panels[f"{title}, {row['dtype']}"] = {
            name: Figure(entry["tokens_per_s"], *entry["tokens_per_s_quantiles"])
            for name, entry in row["layouts"].items()
        }
    return panels


def calls(report: dict) -> list[tuple[str, str, int, int, Figure]]:
    """Model, engine or ``TOKENISING``, batch, length and time of each row of a latency report."""
    tokenising = [row | {"engine": TOKENISING} for row in report["tokenising"]]
    return [
        (
            *(row[key] for key in ("model", "engine", "batch", "length")),
            Figure(row["p50_ms"], *(row["p50_ci95_ms"] or ())),
        )
        for row in (*report["rows"], *tokenising)
    ]


def _latencies(report: dict) -> Panels:
    panels: Panels = {}
    for model, engine, batch, length, figure in calls(report):
        panels.setdefault(f"{model}, batch {batch}, length {length}", {})[engine] = figure
    return panels


def _pytest(report: dict) -> Panels:
    found = {}
    for row in report["benchmarks"]:
        stats = row["stats"]
        found[row["name"]] = Figure(*(1e3 * stats[name] for name in ("median", "q1", "q3")))
    return {"pytest-benchmark": found}


def is_fallback(name: str) -> bool:
    """The oracle, or what computes where no kernel runs: neither a kernel nor anyone's
    alternative."""
    return "reference" in name or name == "metakd without its extension"


def _metakd(name: str) -> bool | None:
    return None if is_fallback(name) else name.startswith("metakd")


def _engine(name: str) -> bool | None:
    """Tokens are made before any engine runs, and int8 does not run the same model."""
    return None if name in (TOKENISING, INT8_ENGINE) else name != "eager"


REGISTRY = Kind("operation", "20-80 %", _contests, _metakd)
STEP = Kind("step", "20-80 %", _contests, _metakd)
THROUGHPUT = Kind(
    *("throughput", "20-80 %", _layouts, lambda name: name.startswith("packed")),
    unit="tokens/s",
    higher_is_better=True,
)
LATENCY = Kind("latency", "95 % of the median", _latencies, _engine)
PYTEST = Kind("pytest-benchmark", "quartiles", _pytest, lambda name: True)


def _kind(report: dict) -> Kind:
    if "benchmarks" in report:
        return PYTEST
    if "models" in report:
        return LATENCY
    if "op" in report:
        return REGISTRY
    if any("layouts" in row for row in report["rows"]):
        return THROUGHPUT
    return STEP


def _environment(report: dict) -> dict:
    if "machine_info" not in report:
        return report["environment"]
    machine = report["machine_info"]
    plain = {
        "device": machine["cpu"].get("brand_raw"),
        "versions": {"python": machine["python_version"]},
    }
    return machine.get("environment", plain)


def load(path: Path) -> Report:
    """The report in ``path``.

    Raises:
        ReportError: it cannot be read, is no report of a known kind, or holds no rows.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path}: no JSON: {error}") from error
    try:
        kind = _kind(data)
        report = Report(path.stem, kind, _environment(data), kind.panels(data), data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(
            f"{path}: not a benchmark's report: {type(error).__name__} {error}"
        ) from error
    if not any(report.panels.values()):
        raise ReportError(f"{path}: a report without rows")
    return report


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, absent: Mapping = {}
) -> str:
    """A Markdown table for people.

    Args:
        header: column names.
        rows: as many cells each.
        left: so many of the first columns are text, the others numbers.
        absent: what has no row, and why; told below.
    """
    lines = [markdown_table(header, rows, len(header) - left)]
    return "\n".join([*lines, *(f"\nNot here: {name} ({why})" for name, why in absent.items())])
