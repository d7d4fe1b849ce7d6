"""The project's targets beside a folder of results: ``python -m benchmarks.targets FOLDER``.

Nearly all are ratios within one run. A target is met, missed or, where the folder has no such row
or rival, not measured. Numerics have tests, not targets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reports import ReportError, is_fallback, load, table

Contenders = dict[str, dict]  # name -> what run.py or step.py noted of it
Measure = Callable[[Contenders], float | None]

EAGER_LOOP = "eager output_attentions loop"


def _best(contenders: Contenders) -> dict:
    """Our fastest kernel, empty where none ran."""
    ours = [
        entry
        for name, entry in contenders.items()
        if name.startswith("metakd") and not is_fallback(name) and "meta-dist" not in name
    ]
    return min(ours, key=lambda entry: entry["median_ms"], default={})


def _ours(key: str) -> Measure:
    return lambda contenders: _best(contenders).get(key)


def _times(*rivals: str) -> Measure:
    """How many times as fast as the fastest of these rivals."""

    def measure(contenders: Contenders) -> float | None:
        own = _best(contenders).get("median_ms")
        found = [contenders[name]["median_ms"] for name in rivals if name in contenders]
        return min(found) / own if found and own is not None else None

    return measure


def _memory_of(rival: str) -> Measure:
    """Peak extra memory as a share of the rival's."""

    def measure(contenders: Contenders) -> float | None:
        own = _best(contenders).get("peak_extra_bytes")
        other = contenders.get(rival, {}).get("peak_extra_bytes")
        return own / other if own is not None and other else None

    return measure


@dataclass(frozen=True)
class Target:
    """A bound on one figure of the rows of a report.

    Args:
        name: as the project counts them.
        device: cpu or cuda.
        report: stem of the file.
        shape: what a row's shape and dtype begin with.
        what: the figure in words.
        measure: the figure; None where the row does not say.
        bound: the target.
        at_most: the figure may not be over the bound, in place of under it.
    """

    name: str
    device: str
    report: str
    shape: str
    what: str
    measure: Measure
    bound: float
    at_most: bool = False

    def verdict(self, figure: float | None) -> str:
        if figure is None:
            return "not measured"
        return (
            "met" if (figure <= self.bound if self.at_most else figure >= self.bound) else "MISSED"
        )


SHARE = _ours("share_of_limit")
VOCABULARIES = (30522, 50257, 128256, 151936)
MAPS = "attention_score_mse"

TARGETS = [
    *(
        Target("K1", "cuda", "soft_kl", f"[8192, {C}]", what, measure, bound)
        for C in VOCABULARIES
        for what, measure, bound in (
            ("share of the copy rate", SHARE, 0.85),
            ("times torch.compile", _times("torch.compile"), 1.8),
            ("times Liger", _times("Liger"), 2.5),
        )
    ),
    *(
        Target(
            "K2", "cuda", "soft_kl_one_read", f"[8192, {C}]", "share of the copy rate", SHARE, 0.85
        )
        for C in VOCABULARIES
    ),
    *(
        Target("K3", "cuda", "linear_soft_kl", "[8192, 4096]", *rest)
        for rest in (
            ("share of the matrix rate", SHARE, 0.60),
            ("times Liger chunked", _times("Liger chunked JSD"), 1.0),
            ("times TRL", _times("TRL chunked divergence"), 1.0),
            ("extra bytes", _ours("peak_extra_bytes"), 1e9, True),
        )
    ),
    Target("K4", "cuda", MAPS, "[32, 12, 512,", "times eager maps", _times("eager maps"), 5.0),
    Target(
        *("K4", "cuda", MAPS, "[32, 12, 512,"),
        *("times torch.compile", _times("torch.compile maps"), 3.0),
    ),
    Target("K4", "cuda", MAPS, "[32, 12, 4096,", "times eager maps", _times("eager maps"), 20.0),
    Target(
        *("K5", "cuda", "attention_kl", "[8, 12, 1024,"),
        *("times eager maps", _times("eager maps"), 5.0),
    ),
    Target("K6", "cuda", "hidden_mse", "5 x [32, 128,", "times eager", _times("eager"), 4.0),
    *(
        Target("K7", "cuda", "step", "paper", *rest)
        for rest in (
            ("step over one without a KD loss", _ours("of_no_kd"), 1.10, True),
            ("times the eager loop", _times(EAGER_LOOP), 3.0),
            ("memory of the eager loop's", _memory_of(EAGER_LOOP), 1 / 3, True),
        )
    ),
    Target(
        *("K8", "cpu", "soft_kl", "[256, 30522] float32"),
        *("times torch.compile", _times("torch.compile"), 2.0),
    ),
    Target(
        *("K8", "cpu", "soft_kl", "[256, 30522] float32"),
        *("times F.kl_div, probabilities", _times("F.kl_div, probabilities"), 15.0),
    ),
    Target(
        *("K8", "cpu", "soft_kl", "[8192, "),
        *("times the eager reference", _times("metakd reference"), 3.0),
    ),
    Target("K9", "cpu", MAPS, "[4, 12, 512,", "times eager maps", _times("eager maps"), 5.0),
    Target("K9", "cpu", MAPS, "[4, 12, 2048,", "times eager maps", _times("eager maps"), 15.0),
]


def _title(row: dict) -> str:
    return f"{row['shape']} {row['dtype']}"


def _rows(report: dict, target: Target) -> Iterator[dict]:
    for row in report["rows"]:
        if _title(row).startswith(target.shape):
            yield row


def _is_cpu(report: dict) -> bool:
    return report["environment"]["device"].startswith("CPU")


def verdicts(folder: Path) -> str:
    """The table of the targets that belong to the folder's device, and files that cannot be read;
    empty for a folder without reports of operations or steps."""
    reports, problems = {}, []
    for name in dict.fromkeys(target.report for target in TARGETS):
        path = folder / f"{name}.json"
        if path.exists():
            try:
                reports[name] = load(path).data
            except ReportError as error:
                problems.append(str(error))
    devices = {"cpu" if _is_cpu(report) else "cuda" for report in reports.values()}
    lines = []
    for target in TARGETS:
        if target.device not in devices:
            continue
        rows = list(_rows(reports[target.report], target)) if target.report in reports else []
        figures = [
            (f"{target.report} {_title(row)}", target.measure(row["contenders"])) for row in rows
        ] or [(f"{target.report} {target.shape}", None)]
        wanted = f"{'at most' if target.at_most else 'at least'} {target.bound:.3g}"
        lines += [
            (
                *(target.name, where, target.what, wanted),
                "-" if figure is None else f"{figure:.3g}",
                target.verdict(figure),
            )
            for where, figure in figures
        ]
    header = ("target", "row", "figure", "wanted", "measured", "")
    tables = [table(header, lines, left=3)] if lines else []
    return "\n".join([*tables, *problems])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a device's folder of results")
    options = parser.parse_args()
    found = verdicts(options.folder)
    if not found:
        sys.exit(f"{options.folder}: no report of an operation or a step")
    print(found)


if __name__ == "__main__":
    main()
