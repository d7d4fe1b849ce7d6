"""Tables as the command line prints them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from metakd.pipeline.table import metric_of, name_of


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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return _number(None if share is None else 100 * share)
