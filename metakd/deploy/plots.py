"""Plots of a report as SVG that goes into the page itself.

matplotlib draws in sentinel colours, which become CSS variables of the page, so that a plot follows
its light or dark theme. Text stays text in the page's font. Each plot is narrow enough for a phone;
the page puts several beside each other where there is room.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from metakd.deploy.extra import need

INK, FAINT = "ink", "faint"
SERIES = tuple(f"series-{number}" for number in range(1, 8))
# Told apart without colour as well.
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)), (0, (3, 1)), (0, (9, 3)), "-.")
_MARKERS = "os^DvPX"

# Any colours that nothing else uses: matplotlib writes them as they are.
_SENTINELS = {name: f"#0a0b{number:02x}" for number, name in enumerate((INK, FAINT, *SERIES))}
_SIZE = (420, 290)  # of a plot, in the units of its own coordinates: CSS pixels at full size
_FONT = 12
_POINTS_PER_INCH = 72
_OWN_FONT = re.compile(r"font: (?:(\d+|bold) )?([\d.]+)px [^;]*")
_LABEL_ROOM = 0.2  # share of the width that labels of curves take


def _pyplot():
    need("matplotlib")
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot


def _style() -> dict:
    ink, faint = _SENTINELS[INK], _SENTINELS[FAINT]
    return {
        "svg.fonttype": "none",
        "text.parse_math": False,  # a domain may be called $x$
        "font.size": _FONT,
        "axes.titlesize": _FONT,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": _FONT,
        "xtick.labelsize": _FONT - 1,
        "ytick.labelsize": _FONT - 1,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "axes.edgecolor": faint,
        "xtick.color": faint,
        "ytick.color": faint,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": faint,
        "grid.alpha": 0.35,
        "grid.linewidth": 0.6,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }


class _Plot:
    """A figure with one set of axes; on leaving, ``svg`` is its text."""

    def __init__(self, name: str, title: str, x: str, y: str):
        self.name, self.title, self.x, self.y = name, title, x, y
        self.svg = ""

    def __enter__(self):
        pyplot = _pyplot()
        self._context = pyplot.rc_context(_style() | {"svg.hashsalt": self.name})
        self._context.__enter__()
        size = [pixels / _POINTS_PER_INCH for pixels in _SIZE]
        self.figure, self.axes = pyplot.subplots(figsize=size, layout="constrained")
        self.axes.set_title(self.title)
        self.axes.set_xlabel(self.x)
        self.axes.set_ylabel(self.y)
        self.axes.locator_params(axis="x", nbins=7)  # as many labels as fit beside each other
        return self

    def __exit__(self, kind, *_rest) -> None:
        pyplot = _pyplot()
        written = io.StringIO()
        if kind is None:
            self.figure.savefig(written, format="svg", metadata={"Date": None})
            label = f"{self.title}: {self.y} against {self.x}"
            self.svg = _inline(written.getvalue(), self.name, label)
        pyplot.close(self.figure)
        self._context.__exit__(None, None, None)


def _inline(text: str, name: str, label: str) -> str:
    """matplotlib's file as an element of a page: themed, with a label, its names its own."""
    root = ElementTree.fromstring(text)
    variables = {colour: f"var(--{key})" for key, colour in _SENTINELS.items()}
    for parent in list(root.iter()):
        for child in list(parent):
            # Provenance, and rules that would hold for the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if "id" in attributes:
            attributes["id"] = f"{name}-{attributes['id']}"
        if "href" in attributes:
            attributes["href"] = f"#{name}-{attributes['href'].removeprefix('#')}"
        if "clip-path" in attributes:
            attributes["clip-path"] = attributes["clip-path"].replace("(#", f"(#{name}-")
        if "style" in attributes:
            style = _OWN_FONT.sub(r"font-weight: \1; font-size: \2px", attributes["style"])
            style = style.replace("font-weight: ;", "")
            for colour, variable in variables.items():
                style = style.replace(colour, variable)
            attributes["style"] = style
        element.attrib.clear()
        element.attrib.update(attributes)
    for unwanted in ("width", "height", "version"):
        del root.attrib[unwanted]
    root.attrib |= {"role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def tradeoff(facts: dict, metric: str) -> str:
    """Scores against latency, the Pareto front joined by a line."""
    points = facts["points"]
    at = f"batch {facts['batch']}, {facts['length']} tokens"
    with _Plot(
        "tradeoff", f"{metric} against latency", f"p50 latency, ms ({at})", f"{metric}, %"
    ) as plot:
        front = sorted((point["p50_ms"], point["score"]) for point in points if point["front"])
        plot.axes.plot(*zip(*front), color=_SENTINELS[FAINT], linestyle=_DASHES[1], zorder=1)
        for number, point in enumerate(points):
            colour = _SENTINELS[SERIES[number % len(SERIES)]]
            plot.axes.plot(
                point["p50_ms"],
                point["score"],
                _MARKERS[number % len(_MARKERS)],
                color=colour,
                markerfacecolor=colour if point["front"] else "none",
                markersize=8,
                label=point["name"],
            )
        plot.axes.margins(x=0.12, y=0.15)
        plot.figure.legend(
            loc="outside lower left", frameon=False, ncols=2, handletextpad=0.2, columnspacing=1
        )
    return plot.svg


def by_labels(points: Sequence[tuple[str, float, dict[str, dict]]], metric: str) -> str:
    """Score of each row against the labels of the student's domain, with its spread over seeds.

    Args:
        points: of each its name, its labels, and the score of each row.
        metric: what the scores are called.
    """
    rows = list(dict.fromkeys(row for *_, scores in points for row in scores))
    with _Plot(
        "labels", f"{metric} by labels", "labels of the student's domain", f"{metric}, %"
    ) as (plot):
        for number, row in enumerate(rows):
            known = [(labels, scores[row]) for _, labels, scores in points if row in scores]
            style = (number + number // len(SERIES)) % len(_DASHES)  # the next seven differ
            colour = _SENTINELS[SERIES[number % len(SERIES)]]
            plot.axes.errorbar(
                [labels for labels, _ in known],
                [score["mean"] for _, score in known],
                yerr=[score["std"] or 0.0 for _, score in known],
                color=colour,
                linestyle=_DASHES[style],
                linewidth=1.8,
                marker=_MARKERS[style],
                markersize=5,
                elinewidth=1,
                label=row,
            )
        plot.axes.set_xscale("log")
        plot.axes.set_xticks(
            [labels for _, labels, _ in points], [name for name, *_ in points], minor=False
        )
        plot.axes.minorticks_off()
        plot.figure.legend(
            loc="outside lower left", frameon=False, ncols=1, handletextpad=0.4, columnspacing=1
        )
    return plot.svg


def generations(name: str, row: str, facts: dict) -> str:
    """Distance of each generation to its teachers, and its bound."""
    numbers = range(1, len(facts["bound"]) + 1)
    with _Plot(name, row, "generation", "distance to the teachers") as plot:
        lines = {
            "measured": [one["anchor_kl"] for one in facts["generations"]],
            f"bound, anchor {facts['held']:g}": facts["bound"],
        }
        for number, (label, values) in enumerate(lines.items()):
            plot.axes.plot(
                numbers,
                values,
                color=_SENTINELS[SERIES[number]],
                linestyle=_DASHES[number],
                marker=_MARKERS[number],
                markersize=5,
                label=label,
            )
        plot.axes.set_ylim(bottom=0)
        plot.axes.set_xticks(numbers)
        plot.figure.legend(loc="outside lower left", frameon=False, ncols=2)
    return plot.svg


def curves(terms: dict[str, dict]) -> list[str]:
    """For each row of students its weighted terms against the step, all on one logarithmic scale
    and each term in one colour throughout.

    Args:
        terms: as in the facts.
    """
    names = list(dict.fromkeys(name for facts in terms.values() for name in facts["terms"]))
    logged = [
        value
        for facts in terms.values()
        for values in facts["terms"].values()
        for value in values
        if value is not None and value > 0
    ]
    # Whole decades: both ends carry a label, however little the terms differ.
    low = math.floor(math.log10(min(logged, default=0.1)))
    high = max(low + 1, math.ceil(math.log10(max(logged, default=1.0))))
    limits = (10.0**low, 10.0**high)
    return [
        _curves(f"terms-{number}", row, facts, names, limits)
        for number, (row, facts) in enumerate(terms.items(), 1)
    ]


def _curves(
    name: str, row: str, facts: dict, names: Sequence[str], limits: tuple[float, float]
) -> str:
    with _Plot(name, row, "optimizer step", "weighted term") as plot:
        plot.axes.set_yscale("log", nonpositive="mask")
        plot.axes.set_ylim(limits)
        # The usual labels are powers set as formulas, which the page cannot show.
        plot.axes.yaxis.set_major_formatter("{x:g}")
        plot.axes.yaxis.set_minor_formatter("")
        ends = []
        for term, values in facts["terms"].items():
            number = names.index(term) % len(SERIES)
            shown = [value if value is not None and value > 0 else math.nan for value in values]
            colour = _SENTINELS[SERIES[number]]
            plot.axes.plot(
                facts["step"],
                shown,
                color=colour,
                linestyle=_DASHES[number],
                linewidth=1.8,
                marker="o",
                markersize=3.5,
                markevery=[-1],  # what a log of one step has to show
                clip_on=False,
            )
            last = [value for value in shown if not math.isnan(value)]
            if last:
                ends.append((last[-1], term, colour))
        plot.axes.set_xlim(0, facts["step"][-1])
        _label_ends(plot, ends)
    return plot.svg


def _label_ends(plot: _Plot, ends: list[tuple[float, str, str]]) -> None:
    """Names beside the ends of curves, moved apart where they would cover each other."""
    plot.figure.get_layout_engine().set(rect=(0, 0, 1 - _LABEL_ROOM, 1))
    plot.figure.canvas.draw()  # decides where the axes lie
    plot.figure.set_layout_engine("none")
    transform = plot.axes.transData
    gap = (_FONT + 2) * plot.figure.dpi / _POINTS_PER_INCH
    box = plot.axes.get_window_extent()
    height = -math.inf
    placed = []
    for value, term, colour in sorted(ends):
        height = max(transform.transform((0, value))[1], height + gap)
        placed.append([height, term, colour])
    # What was pushed over the top goes back down, and pushes in its turn.
    ceiling = box.y1
    for label in reversed(placed):
        label[0] = min(label[0], ceiling)
        ceiling = label[0] - gap
    for height, term, colour in placed:
        share = (height - box.y0) / box.height
        plot.axes.annotate(
            term,
            (1.02, share),
            xycoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def histogram(name: str, title: str, x: str, y: str, facts: dict) -> str:
    """Counts or shares over ``edges``, the mean marked.

    Args:
        name: of the plot, unique within the page.
        title: what is counted.
        x: label of the values, y of their number.
        facts: ``edges``, ``counts``, ``mean``.
    """
    with _Plot(name, title, x, y) as plot:
        colour = _SENTINELS[SERIES[0]]
        plot.axes.stairs(facts["counts"], facts["edges"], fill=True, color=colour, alpha=0.55)
        plot.axes.stairs(facts["counts"], facts["edges"], color=colour)
        plot.axes.set_ylim(0, 1.15 * max(facts["counts"]))  # the mean's label stands above them
        plot.axes.axvline(facts["mean"], color=_SENTINELS[INK], linestyle=_DASHES[1], lw=1.2)
        plot.axes.annotate(
            f"mean {facts['mean']:.3f}",
            (facts["mean"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
        )
    return plot.svg
