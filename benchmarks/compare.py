"""Shows what got slower: ``python -m benchmarks.compare BEFORE.json AFTER.json``.

Both are reports of one kind (see ``benchmarks.reports``), or folders whose files of the same name
are compared. A figure changed when the intervals of the two (20-80 % quantiles, quartiles, or the
95 % confidence interval of a median) do not overlap and the change exceeds the threshold: the one
leaves out what a noisy run explains, the other what nobody would feel. A figure of too few calls
has no interval, so nothing is said of it. Every row is printed, losing
ones first. Exit code: 0 nothing got slower, 1 something did, 2 files that cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reports import Figure, Kind, Report, ReportError, load, table
from metakd.environment import flat

VERDICTS = (  # as printed
    "slower",
    "only before",
    "faster",
    "only after",
    "too few calls",
    "within noise",
)


@dataclass(frozen=True)
class Change:
    """A row of a comparison; ``before`` or ``after`` is None where the other alone has it."""

    row: str
    before: Figure | None
    after: Figure | None
    verdict: str

    @property
    def ratio(self) -> float | None:
        """After over before."""
        if self.before is None or self.after is None:
            return None
        return self.after.centre / self.before.centre


def judge(before: Figure, after: Figure, threshold: float, higher_is_better: bool) -> str:
    """The verdict on a figure that both reports have."""
    if before.low is None or after.low is None:
        return "too few calls"
    ratio = after.centre / before.centre
    overlap = before.low <= after.high and after.low <= before.high
    if overlap or max(ratio, 1 / ratio) <= 1 + threshold:
        return "within noise"
    return "faster" if (ratio > 1) == higher_is_better else "slower"


def compare(before: Report, after: Report, threshold: float) -> list[Change]:
    """Every row of either report with its verdict, slower ones first and the worst of them on top.

    Raises:
        ReportError: the reports are of different kinds or have no row in common.
    """
    if before.kind is not after.kind:
        kinds = f"{before.kind.name} before, {after.kind.name} after"
        raise ReportError(f"{after.name}: reports of different kinds: {kinds}")
    old, new = (
        {
            f"{title}: {name}": figure
            for title, figures in report.panels.items()
            for name, figure in figures.items()
        }
        for report in (before, after)
    )
    if not old.keys() & new.keys():
        raise ReportError(f"{after.name}: the reports have no row in common")
    changes = []
    for row in old | new:
        if row not in new:
            verdict = "only before"
        elif row not in old:
            verdict = "only after"
        else:
            verdict = judge(old[row], new[row], threshold, after.kind.higher_is_better)
        changes.append(Change(row, old.get(row), new.get(row), verdict))

    def rank(change: Change) -> tuple:
        ratio = change.ratio or 1
        return VERDICTS.index(change.verdict), -max(ratio, 1 / ratio)

    return sorted(changes, key=rank)


def differences(before: dict, after: dict) -> list[str]:
    """What differs between two environments, as far as both say; dates and commits should."""
    old, new = flat(before), flat(after)
    shared = [name for name in old if name in new and name not in ("date", "commit")]
    return [f"{name}: {old[name]}, then {new[name]}" for name in shared if old[name] != new[name]]


def page(changes: list[Change], kind: Kind) -> str:
    """The comparison as a Markdown table."""

    def cell(figure: Figure | None) -> str:
        if figure is None:
            return "-"
        if figure.low is None:
            return f"{figure.centre:.4g}"
        return f"{figure.centre:.4g} ({figure.low:.4g}-{figure.high:.4g})"

    rows = [
        (
            change.row,
            change.verdict,
            cell(change.before),
            cell(change.after),
            "-" if change.ratio is None else f"{change.ratio:.2f}",
        )
        for change in changes
    ]
    columns = (f"{when}, {kind.unit} ({kind.interval})" for when in ("before", "after"))
    return table(("row", "verdict", *columns, "after / before"), rows, left=2)


def pairs(before: Path, after: Path) -> list[tuple[Path, Path]]:
    """The files to compare; says which of two folders' files have no counterpart.

    Raises:
        ReportError: a file against a folder, or folders without a name in common.
    """
    if before.is_dir() != after.is_dir():
        raise ReportError(f"{before} and {after}: a file and a folder")
    if not before.is_dir():
        return [(before, after)]
    old, new = ({path.name for path in folder.glob("*.json")} for folder in (before, after))
    if not old & new:
        raise ReportError(f"{before} and {after}: no JSON file of the same name in both")
    for folder, names in ((before, old - new), (after, new - old)):
        if names:
            print(f"only in {folder}: {', '.join(sorted(names))}")
    return [(before / name, after / name) for name in sorted(old & new)]


def show(before: Path, after: Path, threshold: float) -> bool:
    """Prints the comparison of two files; whether anything got slower."""
    old, new = load(before), load(after)
    changes = compare(old, new, threshold)
    commits = [report.environment.get("commit") for report in (old, new)]
    print(f"\n## {new.name}" + (f", commit {' to '.join(commits)}" if all(commits) else "") + "\n")
    for difference in differences(old.environment, new.environment):
        print(f"warning: measured differently: {difference}", file=sys.stderr)
    print(page(changes, new.kind))
    return any(change.verdict == "slower" for change in changes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="report, or folder of reports")
    parser.add_argument("after", type=Path, help="likewise, of the same kind")
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="smallest change that counts (default 0.05)"
    )
    options = parser.parse_args(arguments)
    slower = broken = False
    try:
        todo = pairs(options.before, options.after)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    for before, after in todo:
        try:
            slower |= show(before, after, options.threshold)
        except ReportError as error:
            print(error, file=sys.stderr)
            broken = True
    return 2 if broken else int(slower)


if __name__ == "__main__":
    sys.exit(main())
