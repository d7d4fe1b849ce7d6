"""Draws reports: ``python -m benchmarks.plot FOLDER_OR_FILE...`` writes an SVG beside each JSON.

Medians are bars, one panel per row, with the interval as a whisker, metakd's own in colour; an axis
is logarithmic where one contender takes 20 times what another does. Latency is drawn against the
length, one panel per model and batch size. The same JSON always gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.reports import LATENCY, Figure, Report, ReportError, calls, load
from metakd.deploy.formats import TOKENISING

OURS, RIVAL, WHISKER = "#3b75af", "#b9bec6", "#33373d"
# Told apart without colour by their markers; from the palette of Okabe and Ito.
ENGINES = {
    "eager": ("#000000", "o"),
    "compile": ("#0072b2", "s"),
    "cudagraph": ("#009e73", "D"),
    "onnx": ("#d55e00", "^"),
    "onnx-int8": ("#cc79a7", "v"),
    TOKENISING: ("#8a9099", "x"),
}
LOG_RATIO = 20
INCH_PER_BAR, INCH_PER_TITLE = 0.28, 0.75  # so that bars are equally thick in every panel
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "metakd",  # names of elements, otherwise drawn at random
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
}


def _logarithmic(axis) -> None:
    """Ticks of a logarithmic axis: 1, 2, 5, 10, ... as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _drawing(width: float, height: float) -> Drawing:
    """An empty drawing, sizes in inches."""
    return Drawing(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08))


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def _whiskers(figures: list[Figure]) -> list[list[float]]:
    """[2, N]: from each centre to the ends of its interval."""
    reach = [
        (0.0, 0.0)
        if figure.low is None
        else (figure.centre - figure.low, figure.high - figure.centre)
        for figure in figures
    ]
    return [list(side) for side in zip(*reach)]


def _bars(axes: Axes, title: str, figures: dict[str, Figure], report: Report) -> None:
    names = list(figures)
    centres = [figures[name].centre for name in names]
    colours = [OURS if report.kind.is_ours(name) else RIVAL for name in names]
    log = max(centres) > LOG_RATIO * min(centres)
    left = 0.5 * min(figure.low for figure in figures.values()) if log else 0
    if log:
        axes.set_xscale("log")
        _logarithmic(axes.xaxis)
    widths = [centre - left for centre in centres]
    bars = axes.barh(
        names,
        widths,
        left=left,
        height=0.7,
        color=colours,
        xerr=_whiskers(list(figures.values())),
        error_kw={"ecolor": WHISKER, "elinewidth": 1, "capsize": 2},
    )
    for name, bar in zip(names, bars):
        bar.set_gid(f"bar: {title}: {name}")
        axes.annotate(
            _digits(figures[name].centre),
            (figures[name].high, name),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    high = max(figure.high for figure in figures.values())
    # Room for the number behind the longest whisker.
    axes.set_xlim(left, left * (high / left) ** 1.15 if log else 1.12 * high)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e6ea", linewidth=0.8)
    axes.set_title(f"{title}, logarithmic" if log else title)


def _bar_chart(report: Report) -> Drawing:
    heights = [INCH_PER_TITLE + INCH_PER_BAR * len(panel) for panel in report.panels.values()]
    drawing = _drawing(8, sum(heights) + 0.3)
    grid = drawing.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    for axes, (title, figures) in zip(grid[:, 0], report.panels.items()):
        _bars(axes, title, figures, report)
    better = "more is better" if report.kind.higher_is_better else "less is better"
    grid[-1, 0].set_xlabel(f"{report.kind.unit}, median and {report.kind.interval}; {better}")
    return drawing


def _latency_chart(report: Report) -> Drawing:
    rows = calls(report.data)
    models = list(dict.fromkeys(row[0] for row in rows if row[1] != TOKENISING))
    batches = sorted({row[2] for row in rows})
    lengths = sorted({row[3] for row in rows})
    drawing = _drawing(0.6 + 3.4 * len(models), 0.6 + 2.3 * len(batches))
    # One scale a line of panels: that is where models are compared.
    grid = drawing.subplots(len(batches), len(models), squeeze=False, sharex=True, sharey="row")
    for line, batch in enumerate(batches):
        for column, model in enumerate(models):
            axes = grid[line, column]
            for engine, (colour, marker) in ENGINES.items():
                # Tokens are made once for all models.
                figures = {
                    length: figure
                    for owner, own_engine, size, length, figure in rows
                    if (own_engine, size) == (engine, batch)
                    and (owner == model or engine == TOKENISING)
                }
                if not figures:
                    continue
                x = sorted(figures)
                p50 = [figures[length].centre for length in x]
                axes.errorbar(
                    *(x, p50, _whiskers([figures[length] for length in x])),
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=1.3,
                    capsize=2,
                    label=engine,
                    gid=f"line: {model}: {batch}: {engine}",
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            _logarithmic(axes.xaxis)
            axes.set_xticks(lengths)
            _logarithmic(axes.yaxis)
            axes.grid(color="#e4e6ea", linewidth=0.8)
            axes.set_title(f"{model}, batch {batch}")
        grid[line, 0].set_ylabel("p50, ms")
    for axes in grid[-1]:
        axes.set_xlabel("tokens")
    handles = {}
    for axes in grid.flat:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1]))
    order = [engine for engine in ENGINES if engine in handles]
    drawing.align_ylabels()
    drawing.legend(
        *([handles[engine] for engine in order], order),
        loc="outside lower center",
        ncols=len(order),
        frameon=False,
    )
    return drawing


def plot(path: Path) -> Path:
    """Draws the report in ``path`` and returns the SVG beside it.

    Raises:
        ReportError: ``path`` holds no report.
    """
    report = load(path)
    image = path.with_suffix(".svg")
    with matplotlib.rc_context(STYLE):
        drawing = (_latency_chart if report.kind is LATENCY else _bar_chart)(report)
        # Neither a date nor matplotlib's version: an unchanged report leaves the file as it is.
        drawing.savefig(image, metadata={"Date": None, "Creator": None})
    return image


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+", metavar="FOLDER_OR_FILE")
    broken = False
    for path in parser.parse_args(arguments).paths:
        for report in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                print(plot(report))
            except ReportError as error:
                print(error, file=sys.stderr)
                broken = True
    return 2 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
