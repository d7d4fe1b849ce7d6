"""What a report says: the facts in words and tables, part by part, and each part as Markdown.

Plots are the page's alone. What a run has not got is left out, and a line says which command would
fill it.
"""

from __future__ import annotations

from collections.abc import Sequence

from metakd.deploy import generations, labels, plots
from metakd.deploy.formats import INT8_ENGINE
from metakd.deploy.parts import Section, Table
from metakd.deploy.speedup import nearest
from metakd.environment import flat, machine
from metakd.method.tasks import SINGLE_LABEL, by_domain
from metakd.pipeline.card import begins
from metakd.pipeline.table import AVERAGE, metric_of, name_of, show, title_of

_MISSING = "—"
_MOST_CLASSES = 20  # of which every pair is shown


def sections(facts: dict) -> list[Section]:
    """The parts of the report in their order, each with what there is to say."""
    return [
        *([labels.section(facts["labels"])] if facts["labels"] else []),
        _accuracy(facts),
        _tradeoff(facts),
        _terms(facts),
        _weights(facts),
        *([generations.section(facts["generations"])] if facts["generations"] else []),
        *_by_class(facts),
        _latency(facts),
        _exports(facts),
        *([_data(facts["left_out"])] if facts["left_out"] else []),
        _environment(facts),
        _reproduce(facts),
    ]


def headline(facts: dict) -> str:
    """What the best students reach, against their teacher, in one or two sentences."""
    if facts["labels"]:
        return labels.headline(facts["labels"])
    best = facts["best"]
    if best is None:
        return "No row of students is complete yet."
    domains = len(facts["comparison"]["domains"])
    over = f"on average over {domains} domains" if domains > 1 else "on its one domain"
    text = (
        f"{best['row']} reaches {show(best['average'])} % {name_of(facts['comparison'])} {over} "
        f"({facts['comparison']['split']} split)"
    )
    if best["teacher_average"]:
        gap = best["average"]["mean"] - best["teacher_average"]["mean"]
        points = f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"
        text += (
            f", {points if gap else 'as much as'} the teacher's {show(best['teacher_average'])} %"
        )
    gains = []
    if best["parameters"] and best["teacher_parameters"]:
        gains.append(
            f"{_count(best['parameters'])} parameters against "
            f"{_count(best['teacher_parameters'])} "
            f"({_times(best['teacher_parameters'] / best['parameters'])} fewer)"
        )
    if at := nearest(facts["ratios"]):
        gains.append(
            f"{_ms(at['student']['p50_ms'])} ms against {_ms(at['teacher']['p50_ms'])} ms "
            f"({_times(at['ratio'])} as fast; p50 at batch {at['batch']} and {at['length']} "
            f"tokens, {at['student']['engine']} against {at['teacher']['engine']})"
        )
    return f"{text}. " + (f"It takes {' and '.join(gains)}." if gains else "")


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times"


def _accuracy(facts: dict) -> Section:
    comparison = facts["comparison"]
    metric = title_of(comparison)
    section = Section("accuracy", f"{metric} by method and domain")
    if comparison is None:
        section.notes.append(
            "Nothing is trained yet: `metakd run CONFIG` or `metakd compare CONFIG`."
        )
        return section
    columns = [*comparison["domains"], AVERAGE]
    rows = [
        [row, *(show(scores[c]) if c in scores else _MISSING for c in columns), _seeds(scores)]
        for row, scores in comparison["summary"].items()
    ]
    section.tables.append(
        Table(
            f"{metric} in percent on the {comparison['split']} split: mean ± sample standard "
            "deviation over seeds.",
            ["", *columns, "seeds"],
            rows,
        )
    )
    for close in facts["close"]:
        section.notes.append(
            f"{facts['best']['row']} and {close['row']} differ by {close['difference']:.1f} points "
            f"on average, less than their spread over seeds ({close['spread']:.1f}): no difference "
            "is shown."
        )
    section.notes += [
        f"Students of {start['preset']} with student.pretrain begin {begins(start)}."
        for start in facts["starts"]
    ]
    if scored := facts["evaluation"]:
        section.tables.append(_evaluation(scored))
    return section


def _seeds(scores: dict) -> str:
    numbers = sorted({score["n"] for score in scores.values()})
    return "–".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))


def _evaluation(scored: dict) -> Table:
    students: dict[str, float] = {}
    for scores in scored["students"].values():
        students |= by_domain(scores)
    teachers, rows = by_domain(scored["teacher"]), []
    for domain, student in students.items():
        teacher = teachers.get(domain)
        if teacher is None:
            rows.append([domain, _MISSING, f"{100 * student:.1f}", _MISSING])
        else:
            values = (teacher, student, student - teacher)
            rows.append([domain, *(f"{100 * value:.1f}" for value in values)])
    return Table(
        "The configured method once more, from its saved files in fp32: "
        f"{name_of(scored)} in percent on the {scored['split']} split.",
        ["domain", "teacher", "student", "difference"],
        rows,
    )


def _tradeoff(facts: dict) -> Section:
    metric = title_of(facts["comparison"])
    section = Section("tradeoff", f"{metric} against latency")
    trade = facts["tradeoff"]
    if trade is None:
        section.notes.append(_not_measured(facts))
        return section
    section.plots.append(plots.tradeoff(trade, metric))
    section.notes.append(
        "Filled marks are on the Pareto front: nothing else is both as fast and as accurate. "
        "One student of each shape was measured; each model runs on its fastest engine with "
        "unrounded weights."
    )
    section.notes += [
        f"{left['name']} is left out ({left['reason']})." for left in trade["left_out"]
    ]
    if not trade["left_out"] and INT8_ENGINE not in {p["engine"] for p in trade["points"]}:
        section.notes.append(
            "No int8 student is scored: `metakd export STUDENT --int8 --data FILE` with labels in "
            "FILE does that."
        )
    section.tables.append(
        Table(
            f"Average {name_of(facts['comparison'])} in percent, p50 latency in ms at batch "
            f"{trade['batch']} and {trade['length']} tokens.",
            ["", "engine", name_of(facts["comparison"]), "p50", "Pareto front"],
            [
                [
                    point["name"],
                    point["engine"],
                    f"{point['score']:.1f}",
                    _ms(point["p50_ms"]),
                    "yes" if point["front"] else "no",
                ]
                for point in trade["points"]
            ],
            names=2,
        )
    )
    return section


def _not_measured(facts: dict) -> str:
    return f"Latency is not measured yet: `metakd latency {facts['run']}`."


def _terms(facts: dict) -> Section:
    section = Section("terms", "Loss terms")
    terms = facts["terms"]
    if not terms:
        section.notes.append(
            "No log of a student is there: train with `report_to: [jsonl]`, the default."
        )
        return section
    names = list(dict.fromkeys(name for curves in terms.values() for name in curves["terms"]))
    section.notes.append(
        "Each term as it enters the loss, weighted, averaged over domains and seeds at equal "
        "shares of training."
    )
    section.plots += plots.curves(terms)
    section.tables.append(
        Table(
            "Weighted value of each term at the end of training (last logged, mean over students).",
            ["", *names, "students"],
            [
                [
                    row,
                    *(_last(curves["terms"].get(name)) for name in names),
                    str(curves["students"]),
                ]
                for row, curves in terms.items()
            ],
        )
    )
    return section


def _last(values: Sequence[float | None] | None) -> str:
    known = [value for value in values or () if value is not None]
    return f"{known[-1]:.3g}" if known else _MISSING


def _weights(facts: dict) -> Section:
    section = Section("weights", "Prototype scores t and weights lambda")
    scores, expertise = facts["scores"], facts["expertise"]
    if scores:
        section.plots.append(
            plots.histogram(
                "scores", "Prototype scores", "score t of an example", "training examples", scores
            )
        )
    else:
        section.notes.append("No prototype scores: `metakd prototypes CONFIG` makes them.")
    rows = (
        [["t, prototype score", f"{scores['mean']:.4f}", f"{scores['std']:.4f}"]] if scores else []
    )
    for number, (row, spread) in enumerate(expertise.items(), 1):
        within = " (within a batch)" if spread["within_batch"] else ""
        values = [f"{spread['mean']:.4f}", f"{spread['std']:.4f}{within}"]
        rows.append([f"λ, {row}", *values])
        if spread["counts"]:
            title = f"Expertise of the teacher, {row}"
            section.plots.append(
                plots.histogram(
                    f"expertise-{number}", title, "weight λ of an example", "share", spread
                )
            )
    if rows:
        section.tables.append(
            Table(
                "Weights of training examples, without unit.",
                ["", "mean", "standard deviation"],
                rows,
            )
        )
    return section


def _by_class(facts: dict) -> list[Section]:
    """What is known of the classes, where there are any."""
    if facts["classes"]:
        return [_classes(facts["classes"])]
    of_classes = name_of(facts["comparison"]) == SINGLE_LABEL.metric_title
    return [_confusion(facts)] if of_classes else []


def _confusion(facts: dict) -> Section:
    section = Section("confusion", "Confusion by domain")
    confusion = facts["confusion"]
    if confusion is None:
        section.notes.append(
            "The stages here keep no confusions: those that are trained by `metakd run` now do."
        )
        return section
    seeds = ", ".join(map(str, confusion["seeds"]))
    section.notes.append(
        f"{confusion['row']}, {confusion['split']} split, examples summed over seeds ({seeds})."
    )
    if few := len(confusion["classes"]) <= _MOST_CLASSES:
        section.notes[0] += " Rows are gold labels, columns predictions."
    table = _confusion_matrix if few else _mistakes
    for domain, counts in confusion["domains"].items():
        section.tables.append(table(domain, confusion["classes"], counts))
    return section


def _confusion_matrix(
    domain: str, classes: Sequence[str], counts: Sequence[Sequence[int]]
) -> Table:
    totals = [max(1, sum(row)) for row in counts]
    return Table(
        f"{domain}: number of examples.",
        ["gold \\ predicted", *classes],
        [[name, *map(str, row)] for name, row in zip(classes, counts)],
        shares=[[count / total for count in row] for row, total in zip(counts, totals)],
    )


def _mistakes(domain: str, classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Table:
    """The likeliest ones: of many classes the whole matrix would be too large to look at."""
    wrong = [
        (count, gold, predicted)
        for gold, row in enumerate(counts)
        for predicted, count in enumerate(row)
        if count and gold != predicted
    ]
    wrong.sort(key=lambda mistake: (-mistake[0], mistake[1:]))
    return Table(
        f"{domain}: the most frequent mistakes of {len(classes)} classes, in examples; all "
        f"{sum(count for count, *_ in wrong):,} are in report.json.",
        ["gold", "predicted", "examples", "of gold"],
        [
            [classes[gold], classes[predicted], str(count), f"{count / sum(counts[gold]):.0%}"]
            for count, gold, predicted in wrong[:_MOST_CLASSES]
        ],
        names=2,
    )


def _classes(found: dict) -> Section:
    """Precision and recall of each class, where texts have several."""
    section = Section("confusion", "Classes by domain")
    seeds = ", ".join(map(str, found["seeds"]))
    section.notes.append(
        f"{found['row']}, {found['split']} split, texts summed over seeds ({seeds})."
    )
    for domain, counts in found["domains"].items():
        rows = []
        for name, (right, wrong, missed) in zip(found["classes"], counts):
            shares = (
                (right, right + wrong),
                (right, right + missed),
                (right, right + (wrong + missed) / 2),
            )
            rows.append(
                [
                    name,
                    *(f"{100 * a / b:.1f}" if b else _MISSING for a, b in shares),
                    str(right + missed),
                ]
            )
        header = ["class", "precision", "recall", "F1", "texts"]
        caption = f"{domain}: in percent, and texts that have it."
        section.tables.append(Table(caption, header, rows, folded=len(rows) > _MOST_CLASSES))
    return section


_TIMES = ("p50_ms", "p90_ms", "p95_ms", "p99_ms")


def _latency(facts: dict) -> Section:
    if facts["latency"] is None:
        return Section("latency", "Latency", notes=[_not_measured(facts)])
    return latency_section(facts["latency"], facts["ratios"])


def latency_section(latency: dict, ratios: Sequence[dict]) -> Section:
    """What a ``latency.json`` says.

    Args:
        latency: its content.
        ratios: of ``speedup.ratios``.
    """
    section = Section("latency", "Latency")
    section.notes.append(f"Measured on {machine(latency['environment'])}.")
    section.tables.append(_models(latency))
    if ratios:
        section.tables.append(_ratios(ratios))
    section.tables.append(
        Table(
            "Every measurement: latency of a call in ms (a percentile needs enough calls), "
            "sequences a second, GFLOP/s of the matrix products, peak memory in MiB, largest "
            "difference of a logit from PyTorch's.",
            [
                *("model", "engine", "batch", "tokens", "p50", "p50, 95 % interval"),
                *("p90", "p95", "p99", "sequences/s", "GFLOP/s", "memory", "logit error", "calls"),
            ],
            [
                [
                    row["model"],
                    row["engine"],
                    *(str(row[name]) for name in ("batch", "length")),
                    _ms(row["p50_ms"]),
                    "–".join(map(_ms, row["p50_ci95_ms"] or [None])),
                    *(_ms(row[name]) for name in _TIMES[1:]),
                    f"{row['sequences_per_s']:,.0f}",
                    f"{1e-6 * row['flops'] / row['p50_ms']:,.0f}",
                    _MISSING
                    if row["peak_memory_bytes"] is None
                    else f"{row['peak_memory_bytes'] / 2**20:,.0f}",
                    _MISSING if row["max_logit_error"] is None else f"{row['max_logit_error']:.1e}",
                    str(row["calls"]),
                ]
                for row in latency["rows"]
            ],
            names=2,
            folded=True,
        )
    )
    if latency["tokenising"]:
        section.tables.append(
            Table(
                "Tokenising, which comes on top: ms a call.",
                ["model", "batch", "tokens", "p50", "p90", "p95", "p99"],
                [
                    [
                        row["model"],
                        *(str(row[name]) for name in ("batch", "length")),
                        *(_ms(row[name]) for name in _TIMES),
                    ]
                    for row in latency["tokenising"]
                ],
                folded=True,
            )
        )
    if latency["absent"]:
        section.tables.append(
            Table(
                "Not measured, and why.",
                ["model", "engine", "reason"],
                [[row["model"], row["engine"], row["reason"]] for row in latency["absent"]],
                names=3,
            )
        )
    return section


def _ms(value: float | None) -> str:
    if value is None:
        return _MISSING
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _models(latency: dict) -> Table:
    models = latency["models"]
    engines = list(dict.fromkeys(name for model in models.values() for name in model["bytes"]))
    return Table(
        "The models: parameters, and their files' size in MB by engine.",
        ["model", "layers", "width", "parameters", *engines],
        [
            [
                name,
                str(model["layers"]),
                str(model["hidden"]),
                _count(model["parameters"]),
                *(
                    f"{model['bytes'][engine] / 1e6:.1f}" if engine in model["bytes"] else _MISSING
                    for engine in engines
                ),
            ]
            for name, model in models.items()
        ],
    )


def _ratios(ratios: Sequence[dict]) -> Table:
    teacher, student = (ratios[0][role]["model"] for role in ("teacher", "student"))
    engines = list(dict.fromkeys(engine for row in ratios for engine in row["engines"]))
    return Table(
        f"How many times as fast as the {teacher} the {student} is: on the fastest engine of each "
        "(unrounded weights; p50 in ms), and engine by engine.",
        ["batch", "tokens", teacher, student, "fastest", *engines],
        [
            [
                *(str(row[name]) for name in ("batch", "length")),
                *(f"{_ms(row[m]['p50_ms'])} {row[m]['engine']}" for m in ("teacher", "student")),
                f"{row['ratio']:.2f}×",
                *(
                    f"{row['engines'][engine]:.2f}×" if engine in row["engines"] else _MISSING
                    for engine in engines
                ),
            ]
            for row in ratios
        ],
        names=0,
    )


def _exports(facts: dict) -> Section:
    section = Section("exports", "Exported students")
    if not facts["exports"]:
        section.notes.append(
            f"None is exported: `metakd export {facts['run']}/students/... --to onnx --int8`."
        )
        return section
    checked = [
        f"{export['checked']['examples']:,} examples of {export['checked']['data']}"
        for export in facts["exports"]
    ]
    section.notes.append(f"Checked on {'; '.join(dict.fromkeys(checked))}.")
    metric = metric_of(facts["exports"][0]["checked"])
    called = name_of(facts["exports"][0]["checked"])
    rows = []
    for export in facts["exports"]:
        score = _score_percent(export["checked"].get(metric))
        rows.append([export["student"], "PyTorch fp32", _MISSING, _MISSING, score])
        rows[-1] += [_MISSING, _MISSING]
        for name, file in export["formats"].items():
            rows.append(
                [
                    export["student"],
                    name,
                    f"{file['bytes'] / 1e6:.1f}",
                    f"{100 * file['label_agreement']:.2f}",
                    _score_percent(file.get(metric)),
                    f"{file['max_logit_error']:.1e}",
                    f"{file['mean_logit_error']:.1e}",
                ]
            )
    section.tables.append(
        Table(
            "Against PyTorch in fp32: size in MB, share of examples with the same label and "
            f"{called} in percent, error of a logit.",
            [
                *("student", "file", "size", "same label", called),
                *("largest error", "mean error"),
            ],
            rows,
            names=2,
        )
    )
    return section


def _score_percent(share: float | None) -> str:
    return _MISSING if share is None else f"{100 * share:.1f}"


def _data(left_out: Sequence[dict]) -> Section:
    section = Section("data", "Rows left out")
    section.tables.append(
        Table(
            "What the sources hold and nothing here has read, as data.on_problem and data.overlap "
            "ask for.",
            ["file", "reason", "rows"],
            [[one["file"], one["reason"], _count(one["rows"])] for one in left_out],
            names=2,
        )
    )
    return section


def _environment(facts: dict) -> Section:
    section = Section("environment", "Environment")
    places: list[tuple[str, dict]] = []
    if facts["latency"]:
        places.append(("latency", facts["latency"]["environment"]))
    places += [("export", export["environment"]) for export in facts["exports"]]
    # Training keeps none, so this machine's versions are the next best where nothing was measured.
    places = places or [("this report", {"versions": facts["versions"]})]
    columns: dict[str, dict] = {}
    for place, known in places:
        known = flat(known)
        same = next((title for title in columns if columns[title] == known), None)
        if same is None:
            columns[place if place not in columns else f"{place} {len(columns) + 1}"] = known
        elif place not in same:
            columns[f"{same}, {place}"] = columns.pop(same)
    names = dict.fromkeys(name for known in columns.values() for name in known)
    section.tables.append(
        Table(
            "What was measured on what: device, threads, versions.",
            ["", *columns],
            [
                [name, *(str(known.get(name) or _MISSING) for known in columns.values())]
                for name in names
            ],
            names=1 + len(columns),
        )
    )
    return section


def _reproduce(facts: dict) -> Section:
    section = Section("reproduce", "Reproduce", commands=facts["commands"])
    if facts["seconds"]:
        rows = [
            [
                row["stage"],
                str(row["number"]),
                ", ".join(map(str, row["processes"])),
                f"{row['seconds']:,.0f}",
            ]
            for row in facts["seconds"]
        ]
        rows.append(["all", *[""] * 2, f"{sum(row['seconds'] for row in facts['seconds']):,.0f}"])
        section.tables.append(
            Table(
                "Time that the stages took: seconds, summed.",
                ["stage", "times", "processes", "seconds"],
                rows,
            )
        )
    return section
