"""What the command line prints: its console, and its tables."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from metakd.pipeline.table import metric_of, name_of

if TYPE_CHECKING:
    from metakd.pipeline.prior import Suggestion

# Names come from the data: no bracket or colon of theirs is an instruction.
console = Console(markup=False, emoji=False)


def tell(text: str) -> None:
    """One line, however long."""
    console.print(text, highlight=False, soft_wrap=True)


def command() -> str:
    """The command that this process is."""
    return shlex.join(["metakd", *sys.argv[1:]])


def exported(report: dict) -> Table:
    """What an ``export.json`` says of each file."""
    checked = report["checked"]
    table = Table(
        title=f"compared with PyTorch on {checked['examples']} texts ({checked['data']})",
        title_justify="left",
    )
    table.add_column("file")
    metric = metric_of(checked)
    for name in ("MiB", "largest logit error", "mean", "same label", name_of(checked)):
        table.add_column(name, justify="right")
    for name, parity in report["formats"].items():
        table.add_row(
            name,
            f"{parity['bytes'] / 2**20:.1f}",
            f"{parity['max_logit_error']:.1e}",
            f"{parity['mean_logit_error']:.1e}",
            f"{parity['label_agreement']:.2%}",
            _percent(parity[metric]),
        )
    table.add_row("PyTorch", "", "", "", "", _percent(checked[metric]))
    return table


def evaluated(scores: Mapping[str, Mapping[str, float]], domains: Sequence[str]) -> Table:
    """Scores of a run's teacher, if it has one, and students, the last row, by domain."""
    *teacher, student = scores.values()
    table = Table()
    table.add_column("domain")
    table.add_column("teacher", justify="right")
    table.add_column("student", justify="right")
    for domain in domains:
        taught = (found.get(domain) for found in (dict(*teacher), student))
        table.add_row(domain, *map(_number, taught))
    return table


def verified(report: list[dict]) -> Table:
    """One line per operation, backend, device, dtype and kind of result: the worst of its cases."""
    groups: dict[tuple, list[dict]] = {}
    for row in report:
        kind = "gradients" if row["result"].startswith("d ") else row["result"]
        key = (row["op"], row["backend"], row["device"], row["dtype"], kind)
        groups.setdefault(key, []).append(row)
    table = Table(
        title="error against float64, relative to the largest value (eager PyTorch's beside it)",
        title_justify="left",
    )
    for name in ("op", "backend", "device", "dtype", "of"):
        table.add_column(name)
    for name in ("max", "eager max", "mean", "eager mean", "of budget"):
        table.add_column(name, justify="right")
    table.add_column("")
    for key, rows in groups.items():
        worst = {
            name: max(row[name] for row in rows)
            for name in ("max_error", "eager_max_error", "mean_error", "eager_mean_error")
        }
        table.add_row(
            *key,
            *(f"{value:.1e}" for value in worst.values()),
            f"{100 * max(row['of_budget'] for row in rows):.0f} %",
            "pass" if all(row["passed"] for row in rows) else "FAIL",
        )
    return table


_SHOWN = 15  # rows of past runs


def neighbours(found: Suggestion) -> Table:
    """The past runs that are most like a configuration."""
    table = Table(title="the nearest of the past runs, by situation", title_justify="left")
    table.add_column("similarity", justify="right")
    for name in ("method", "not as here"):
        table.add_column(name, overflow="fold")
    for name in ("runs", "seconds", name_of({"metric": found.metric}), "gain"):
        table.add_column(name, justify="right")
    for one in found.evidence[:_SHOWN]:
        table.add_row(
            f"{one.similarity:.2f}",
            one.label,
            "\n".join(f"{key}: {_value(value)}" for key, value in one.changes.items()),
            str(one.runs),
            "-" if one.seconds is None else f"{one.seconds:.0f}",
            f"{one.score:.1f}",
            "-" if one.gain is None else f"{one.gain:+.1f}",
        )
    if (more := len(found.evidence) - _SHOWN) > 0:
        table.caption = f"and {more} more: --json"
    return table


def suggested(found: Suggestion) -> Table:
    """What a suggestion changes, or the defaults."""
    if found.choice is None:
        table = Table(title="the defaults", title_justify="left")
        rows = [(key, _value(value)) for key, value in found.settings.items()]
        columns = "key", "default"
    else:
        gain, runs = found.choice.gain, found.choice.runs
        table = Table(
            title=f"suggested: {gain:+.1f} points over what else was tried, in {runs} runs of "
            f"{found.choice.situations} situations",
            title_justify="left",
        )
        rows = [(key, *map(_value, both)) for key, both in found.changes.items()]
        columns = "key", "now", "suggested"
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table


def _value(value: object) -> str:
    """As a person would write it in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return _number(None if share is None else 100 * share)
