"""``docs/results/study``: what the finished groups of ``benchmarks.study`` say, claim by claim, and
the curve over labels as a report.

A comparison counts the seeds for which all of its rows and domains are there. Intervals are those
of ``metakd.pipeline.statistics``: 95 of 100 paired draws of seeds and test examples.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import chdir
from dataclasses import replace
from statistics import fmean

from benchmarks.study_plan import (
    ALL,
    FIELD,
    KEPT,
    OTHERS_LABELS,
    PARTS,
    ROOT,
    SHORT_SIZES,
    STUDENT,
    TEACHER,
    Group,
    Results,
    groups,
)
from metakd.config import CompareRow
from metakd.deploy.facts import pareto
from metakd.deploy.report import write_report
from metakd.deploy.speedup import LATENCY_AT, fastest, model_of, times
from metakd.pipeline.labels import against_base, as_markdown, point
from metakd.pipeline.statistics import Interval, accuracy_difference
from metakd.pipeline.table import (
    AVERAGE,
    Cell,
    answers_of,
    markdown_table,
    shape_of,
    shapeless,
    show,
    show_interval,
    summarise,
)

FOLDER = KEPT.parent.relative_to(ROOT)  # as a reader of the report sees it
META = "meta-from-meta-on-unlabelled"
TINYBERT = "tinybert_kd-from-meta-on-unlabelled"
ITS_TEACHER = "teacher: meta"
# Each whole for itself: the first need no teacher, and are there long before the others.
CURVE_ROWS = (("finetune", "finetune_all"), (ITS_TEACHER, TINYBERT, META))
MAIN = ("baselines", "students", "today", "pseudo", "foreign", "mix", "then_own", "logits")
MAIN += ("labelled", "single", "methods")
APART = (*MAIN, "shapes")
CURVE_OF = "short"
SETS = ("own", "unlabelled", "all", "all+unlabelled")
CLAIMS = (
    ("Meta-KD on unlabelled texts, over fine-tuning on its labels", META, "finetune"),
    ("over fine-tuning on the labels of all domains", META, "finetune_all"),
    ("over that and then its own labels", META, "finetune_all_then_own"),
    ("over pseudo-labels", META, "pseudo_labels-from-meta-on-unlabelled"),
    ("over its teacher", META, ITS_TEACHER),
    ("over Meta-KD on labelled texts alone", META, "meta-from-meta-on-own"),
    ("over TinyBERT-KD on labelled texts alone", META, "tinybert_kd-from-meta-on-own"),
    ("over TinyBERT-KD from the same teacher on the same texts", META, TINYBERT),
    ("TinyBERT-KD: other domains' texts besides", TINYBERT.replace("un", "all+un"), TINYBERT),
    ("TinyBERT-KD: a meta-teacher over a mixed one", TINYBERT, TINYBERT.replace("meta", "mix")),
    ("TinyBERT-KD over logits alone", TINYBERT, "logits_kd-from-meta-on-unlabelled"),
)


def write(results: Results) -> None:
    """The page, from what is there."""
    parts = [_about()]
    for part in PARTS:
        wanted = [group for group in groups() if group.part == part]
        done = {group: found for group in wanted if (found := results.of(group))}
        if done:
            parts += _part(part, wanted, done)
        elif wanted:
            parts.append(f"## {part}\n\nNone of {len(wanted)} groups is done at these settings.")
    (ROOT / FOLDER / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _about() -> str:
    return (
        "# The study\n\n"
        "What students are worth with few labels, and which parts of the method help. Made by "
        "`python -m benchmarks.study train` and `report`; every cell, with its commit, is in "
        "[cells.json](cells.json), the curve over labels also in [a report](report.md). "
        "CPU, bf16; MiniLM (6 layers of 384), students of its layers 0, 2 and 5, word embeddings "
        f"frozen. Teachers: {_said(TEACHER)}. Students: {_said(STUDENT)}, batches of 32, the "
        "attention term weighted 0.1. Short texts: at most "
        f"{_said(SHORT_SIZES)} a domain (Hutto, Gilbert 2014, as `metakd quickstart` fetches "
        "them). The student's domain is scarce, in turn, its other texts unlabelled; the "
        f"others have at most {OTHERS_LABELS} labels. Of no domain are more labels looked at to "
        "choose by, if anything is chosen, than there are to train on."
    )


def _said(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _cells(done: dict[Group, dict], labels: int | str | None = None) -> dict[str, list[Cell]]:
    """By block, of those with so many labels."""
    found: dict[str, list[Cell]] = {}
    for group, result in done.items():
        if labels in (None, group.labels):
            cells = (
                Cell.read({**cell, "right": _unpacked(cell["right"])}) for cell in result["cells"]
            )
            found.setdefault(group.block.name, []).extend(cells)
    return found


def _unpacked(text: str) -> str:
    length, _, digits = text.partition(":")
    return f"{int(digits, 16):b}"[1:].zfill(int(length))


def _whole(cells: Iterable[Cell], rows: Sequence[str], domains: Sequence[str]) -> list[Cell]:
    """The cells of these rows for the seeds for which none is missing."""
    kept = list(
        dict.fromkeys(cell for cell in cells if cell.row in rows and cell.domain in domains)
    )
    there = {(cell.row, cell.domain, cell.seed) for cell in kept}
    seeds = {cell.seed for cell in kept}
    whole = {
        seed
        for seed in seeds
        if all((row, name, seed) in there for row in rows for name in domains)
    }
    return [cell for cell in kept if cell.seed in whole]


def _part(part: str, wanted: Sequence[Group], done: dict[Group, dict]) -> list[str]:
    domains = PARTS[part].domains
    at = {
        labels: [cell for block in MAIN for cell in _cells(done, labels).get(block, [])]
        for labels in dict.fromkeys(group.labels for group in wanted)
    }
    paragraphs = [f"## {part}: {', '.join(domains)}"]
    if curve := _curve(at, domains, done):
        paragraphs.append(as_markdown(curve).strip())
        if part == CURVE_OF:
            _write_report(curve)
    few = PARTS[part].few
    for labels in sorted(at, key=lambda number: (number != few, number == ALL, number)):
        sets = _sets(at[labels], domains)
        if sets:
            paragraphs += [f"### With {labels} labels", sets, _claims(at[labels], domains)]
    if field := _field(at[few], domains, done):
        paragraphs += ["### Every method", field]
    if variants := _variants(_cells(done, few), done, at[few]):
        paragraphs += ["### One change at a time", variants]
    latency = ROOT / FOLDER / "latency.json"
    if part == CURVE_OF and latency.is_file():
        cells = [*at[few], *_cells(done, few).get("shapes", [])]
        paragraphs += ["### Sizes", _sizes(cells, domains, json.loads(latency.read_text()))]
    lacking = Counter(f"{g.block.name} ({g.labels} labels)" for g in wanted if g not in done)
    missing = [f"{count} of {name}" for name, count in lacking.items()]
    hours = sum(result["seconds"] for result in done.values()) / 3600
    commits = sorted({result["commit"] for result in done.values()})
    paragraphs.append(
        f"{len(done)} of {len(wanted)} groups are done ({hours:.1f} hours of one or two threads, "
        f"commits {', '.join(commits)})." + (f" Missing: {', '.join(missing)}." if missing else "")
    )
    return [text for text in paragraphs if text]


def _write_report(curve: dict) -> None:
    (ROOT / FOLDER / "labels.json").write_text(json.dumps(curve, indent=1) + "\n")
    with chdir(ROOT):
        write_report(FOLDER, command="python -m benchmarks.study report")


def _curve(at: dict, domains: Sequence[str], done: dict[Group, dict]) -> dict | None:
    points = []
    for labels in sorted(at, key=lambda number: (number == ALL, number)):
        cells = [cell for rows in CURVE_ROWS for cell in _whole(at[labels], rows, domains)]
        if cells:
            counts = dict.fromkeys(domains, labels)
            if labels == ALL:
                counts = {
                    group.domain: result["labels"]
                    for group, result in done.items()
                    if group.labels == ALL
                }
            points.append(point(labels, counts, cells))
    if not points:
        return None
    seeds = sorted({cell["seed"] for point in points for cell in point["cells"]})
    result = {"split": "test", "seeds": seeds, "points": points, **against_base(points)}
    return result | {"command": "python -m benchmarks.study train"}


def _sets(cells: Sequence[Cell], domains: Sequence[str]) -> str:
    """Methods x transfer sets."""
    found: dict[str, dict[str, str]] = {}
    for row in dict.fromkeys(cell.row for cell in cells):
        name, _, texts = row.partition("-on-")
        whole = _whole(cells, [row], domains)
        if whole:
            score = summarise(whole)[row][AVERAGE]
            column = texts if texts in SETS else ""
            found.setdefault(name, {})[column] = f"{show(score)} ({score['n']})"
    if not found:
        return ""
    header = ["", "no set", *SETS]
    rows = [[name, *(by.get(column, "-") for column in ("", *SETS))] for name, by in found.items()]
    return (
        "Accuracy in percent, the mean over domains ± its standard deviation over seeds (number of "
        f"seeds), by method and texts that the student sees:\n\n{markdown_table(header, rows)}"
    )


def _difference(cells: Sequence[Cell], first: str, second: str, domains) -> tuple | None:
    whole = _whole(cells, (first, second), domains)
    if not whole:
        return None
    seeds = len({cell.seed for cell in whole})
    return accuracy_difference(answers_of(whole, first), answers_of(whole, second)), seeds


def _claims(cells: Sequence[Cell], domains: Sequence[str]) -> str:
    rows = []
    for text, first, second in CLAIMS:
        found = _difference(cells, first, second, domains)
        if found:
            rows.append([text, show_interval(found[0]), _verdict(found[0]), str(found[1])])
    header = ["difference in accuracy", "points (95 %)", "", "seeds"]
    return markdown_table(header, rows) if rows else ""


def _field(cells: Sequence[Cell], domains: Sequence[str], done: dict[Group, dict]) -> str:
    """Rows of ``configs/methods.yaml`` against TinyBERT-KD on the same texts."""
    rows, few = [], PARTS[CURVE_OF].few
    own = [f for g, f in done.items() if g.labels == few and g.block.name in MAIN]
    for row in FIELD:
        name = CompareRow(**row).label
        whole = _whole(cells, [name], domains)
        if not whole:
            continue
        score = summarise(whole)[name][AVERAGE]
        other = f"tinybert_kd-from-meta-on-{row['transfer']}"
        found = None if name == other else _difference(cells, name, other, domains)
        said = [show_interval(found[0]), _verdict(found[0]), str(found[1])] if found else ["-"] * 3
        took = [found["each"][name] for found in own if name in found.get("each", ())]
        seconds = f"{fmean(took):.0f}" if took else "-"
        rows.append([name, f"{show(score)} ({score['n']})", *said, seconds])
    header = ["row", "accuracy (seeds)", "over TinyBERT-KD", "", "seeds", "seconds a student"]
    about = (
        "Rows of `configs/methods.yaml`, against TinyBERT-KD from the meta-teacher on the same "
        "texts, points between what 95 of 100 paired draws lie. Seconds are those of training on "
        "one busy core, teachers apart: an order of magnitude."
    )
    return f"{about}\n\n{markdown_table(header, rows)}" if rows else ""


def _verdict(found: Interval) -> str:
    if found.low > 0:
        return "better"
    return "worse" if found.high < 0 else "no difference shown"


def _variants(by_block: dict[str, list[Cell]], done: Iterable[Group], cells: Sequence[Cell]) -> str:
    """Blocks that change a setting, each row against the same row without the change."""
    rows = []
    for block in dict.fromkeys(group.block for group in done if group.block.name not in APART):
        for row in dict.fromkeys(cell.row for cell in by_block[block.name] if "-from-" in cell.row):
            changed = [
                replace(cell, row=block.name) for cell in by_block[block.name] if cell.row == row
            ]
            found = _difference([*cells, *changed], block.name, row, block.domains or ())
            if found:
                whole = _whole(changed, [block.name], block.domains or ())
                accuracy = summarise(whole)[block.name][AVERAGE]
                said = [show(accuracy), show_interval(found[0]), _verdict(found[0]), str(found[1])]
                rows.append([row, block.name, *said])
    header = ["row", "changed", "accuracy", "points (95 %)", "", "seeds"]
    about = (
        "The same row, electronics and news, with a setting changed (`balance`: attention weighted "
        "1 besides; `VARIANTS` in `study_plan.py`):"
    )
    return f"{about}\n\n{markdown_table(header, rows)}" if rows else ""


def _sizes(cells: Sequence[Cell], domains: Sequence[str], latency: dict) -> str:
    """Accuracy against latency, by shape and engine."""
    lines, at = [], LATENCY_AT
    teacher = times(latency, model_of(latency, "teacher", ""), *at)
    known = dict.fromkeys(cell.row for cell in cells if shapeless(cell.row) == TINYBERT)
    cells = _whole(cells, (ITS_TEACHER, *known), domains)
    for row in (ITS_TEACHER, *known):
        role = "teacher" if row == ITS_TEACHER else "student"
        name = model_of(latency, role, shape_of(row))
        found = _difference(cells, row, ITS_TEACHER, domains)
        if found is None or name is None:
            continue
        took = times(latency, name, *at)
        accuracy = summarise(cells)[row][AVERAGE]["mean"]
        speeds = [f"{ms:.2f} ({teacher[e] / ms:.1f})" for e, ms in took.items() if e in teacher]
        said = "" if row == ITS_TEACHER else show_interval(found[0])
        line = [shape_of(row) or role, *speeds, f"{accuracy:.1f}", said]
        lines.append((line, (fastest(took)["p50_ms"], accuracy)))
    if not lines:
        return ""
    front = pareto([point for _, point in lines])
    rows = [[*line, "yes" if on else "no"] for (line, _), on in zip(lines, front)]
    header = ["shape", *(f"{engine}, ms (times the teacher's speed)" for engine in teacher)]
    header += ["accuracy", "over the teacher (95 %)", "Pareto front"]
    seeds = len({cell.seed for cell in cells})
    about = (
        f"TinyBERT-KD on unlabelled texts, seeds: {seeds}; p50 at batch {at[0]} and {at[1]} tokens "
        "([measured](latency.md)). Accuracy, and the front, are those of unrounded weights:"
    )
    return f"{about}\n\n{markdown_table(header, rows)}"
