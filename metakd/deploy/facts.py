"""What is known of a run, gathered into one dictionary: the content of ``report.json``.

Everything a report shows is worked out here and nowhere else; what a run has not got is None.
Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import statistics
from collections.abc import Sequence

import numpy as np

from metakd.deploy import generations, labels
from metakd.deploy.formats import INT8_ENGINE, ONNX_FILES
from metakd.deploy.run_folder import RunFolder, Stage
from metakd.deploy.speedup import fastest, model_of, nearest, ratios, times
from metakd.environment import versions
from metakd.method.methods import METHODS
from metakd.method.recipe import FLAT_SCORES
from metakd.method.tasks import CONFUSION, COUNTS, by_domain
from metakd.pipeline.table import (
    ALL_DOMAINS,
    AVERAGE,
    TEACHER,
    Cell,
    shape_of,
    shapeless,
    summarise,
)

_CURVE_POINTS = 60
_SCORE_BINS = 40


def gather(run: RunFolder, command: str = "") -> dict:
    """The facts of a run, as JSON values; every score in percent.

    Args:
        run: what is there of it.
        command: that asked for the report.

    Raises:
        CheckpointError: one of its files cannot be read.
    """
    stages, students = run.stages, run.of_kind("student")
    exports = [
        {"student": stage.name, "row": stage.row, "domain": stage.domain, **stage.export}
        for stage in students
        if stage.export
    ]
    comparison = _comparison(run)
    best = _best(comparison, run)
    compared = ratios(run.latency, shape_of(best["row"]) if best else "")
    logs: dict[str, list[list[dict]]] = {}
    for stage in students:
        if stage.steps:
            logs.setdefault(stage.row, []).append(stage.steps)
    expertise = {row: _expertise(own) for row, own in logs.items()}
    facts = {
        "run": str(run.folder),
        "command": command,
        "versions": versions(),
        "labels": labels.gather(run.labels) if run.labels else None,
        "left_out": _left_out(stages),
        "generations": generations.gather(students),
        "starts": [stage.result for stage in run.of_kind("start")],
        "comparison": comparison,
        "best": best,
        "close": _close(comparison, best),
        "evaluation": run.evaluation,
        "tradeoff": _tradeoff(comparison, run.latency, exports),
        "terms": {row: curves for row, own in logs.items() if (curves := _curves(own))["terms"]},
        "scores": _scores(run),
        "expertise": {row: found for row, found in expertise.items() if found},
        "confusion": _counted(CONFUSION, best, stages),
        "classes": _counted(COUNTS, best, stages),
        "latency": run.latency,
        "ratios": compared,
        "exports": exports,
        "commands": _commands(run, exports),
        "seconds": _seconds(stages),
    }
    return facts | {"warnings": _warnings(facts) + _doubts(students, exports)}


# Accuracy


def _comparison(run: RunFolder) -> dict | None:
    """Rows x domains, from ``compare.json``, with the most labels where they were compared by
    their number, or else from whatever stages are there."""
    if run.labels:
        point = run.labels["points"][-1]
        cells = [Cell.read(cell) for cell in point["cells"]]
        facts = {"split": run.labels["split"], "summary": copy.deepcopy(point["summary"])}
    elif run.compare:
        cells = [Cell.read(cell) for cell in run.compare["cells"]]
        facts = {name: run.compare[name] for name in ("split", "summary")}
    else:
        scored = run.of_kind("teacher") + run.of_kind("student")
        split = "test" if all("test" in stage.result for stage in scored) else "validation"
        cells = [
            cell
            for stage in scored
            for scores in [stage.result[split]]
            for cell in Cell.all_of(stage.row, by_domain(scores), stage.seed, scores)
        ]
        facts = {"split": split, "summary": summarise(cells)}
    if not cells:
        return None
    domains = list(dict.fromkeys(cell.domain for cell in cells))
    # An average over other domains, or not over all seeds, compares with nothing.
    for scores in facts["summary"].values():
        if len({score["n"] for name, score in scores.items()}) > 1 or len(scores) <= len(domains):
            scores.pop(AVERAGE, None)
    return facts | {
        "metric": cells[0].metric,
        "domains": domains,
        "seeds": sorted({cell.seed for cell in cells if not cell.row.startswith(TEACHER)}),
        "teacher_seeds": sorted({cell.seed for cell in cells if cell.row.startswith(TEACHER)}),
    }


def _student_rows(comparison: dict | None) -> dict[str, dict]:
    """Rows of students that have every domain."""
    summary = comparison["summary"] if comparison else {}
    return {
        row: scores
        for row, scores in summary.items()
        if AVERAGE in scores and not row.startswith(TEACHER)
    }


def teacher_of(row: str, summary: dict) -> str | None:
    """The row of a student's teacher; of a student without one, the first teacher there is."""
    own = re.search(r"-from-(\w+)", shapeless(row))
    if own and TEACHER + own[1] in summary:
        return TEACHER + own[1]
    return next((name for name in summary if name.startswith(TEACHER)), None)


def _best(comparison: dict | None, run: RunFolder) -> dict | None:
    """The row of students with the best average, its teacher, and how large both are."""
    rows = _student_rows(comparison)
    if not rows:
        return None
    row = max(rows, key=lambda name: rows[name][AVERAGE]["mean"])
    teacher = teacher_of(row, comparison["summary"])
    sizes = (stage.result.get("parameters") for stage in run.stages if stage.row == row)
    teachers = (stage.parameters for stage in run.of_kind("teacher") if stage.row == teacher)
    measured = (run.latency or {}).get("models", {}).get("teacher", {}).get("parameters")
    return {
        "row": row,
        "average": rows[row][AVERAGE],
        "teacher": teacher,
        "teacher_average": comparison["summary"].get(teacher, {}).get(AVERAGE),
        "parameters": next(filter(None, sizes), None),
        "teacher_parameters": next(filter(None, teachers), measured),
    }


def _close(comparison: dict | None, best: dict | None) -> list[dict]:
    """Rows whose average differs from the best by less than the larger spread of the two."""
    found = []
    for row, scores in _student_rows(comparison).items():
        spreads = [score["std"] for score in (scores[AVERAGE], best["average"])]
        if row == best["row"] or None in spreads:
            continue
        difference = best["average"]["mean"] - scores[AVERAGE]["mean"]
        if difference < max(spreads):
            found.append({"row": row, "difference": difference, "spread": max(spreads)})
    return found


def _counted(what: str, best: dict | None, stages: Sequence[Stage]) -> dict | None:
    """Counts of this kind by domain, summed over seeds: of the best row, or of the first that has
    any."""
    students = [stage for stage in stages if stage.kind == "student"]
    rows = dict.fromkeys(([best["row"]] if best else []) + [stage.row for stage in students])
    for row, split in itertools.product(rows, ("test", "validation")):
        domains: dict[str, np.ndarray] = {}
        own = [stage for stage in students if stage.row == row]
        for stage in own:
            for name, counts in stage.result.get(split, {}).items():
                if name.startswith(what):
                    domain = name.removeprefix(what)
                    domains[domain] = domains.get(domain, 0) + np.array(counts)
        if domains:
            size = len(next(iter(domains.values())))
            return {
                "row": row,
                "split": split,
                "seeds": sorted({stage.seed for stage in own}),
                "classes": _class_names(stages, size),
                "domains": {name: counts.tolist() for name, counts in domains.items()},
            }
    return None


def _class_names(stages: Sequence[Stage], number: int) -> list[str]:
    """From the configuration of a model that was kept, a student's first of all."""
    for stage in sorted(stages, key=lambda stage: stage.kind):
        if len(stage.class_names) == number:  # an MTL teacher has an output for each domain
            return stage.class_names
    return [f"class {index}" for index in range(number)]


# What training logged


def _curves(logs: Sequence[list[dict]]) -> dict:
    """Weighted value of each term, averaged over students at equal shares of their training, since
    domains of different sizes take different numbers of steps."""
    share = np.linspace(0, 1, _CURVE_POINTS)
    names = dict.fromkeys(
        name for steps in logs for name in steps[0] | steps[-1] if name.endswith("_weighted")
    )
    ends, curves = [], {name: [] for name in names}
    for steps in logs:
        position = _positions(steps)
        ends.append(position[-1])
        for name in names:
            # A term that another stage of the schedule trains has no value here.
            value = [row.get(name, math.nan) for row in steps]
            curves[name].append(np.interp(share * position[-1], position, value, left=math.nan))
    means = {}
    for name, values in curves.items():
        kept = np.ma.masked_invalid(values).mean(axis=0).tolist()
        means[name.removesuffix("_weighted")] = kept
    return {
        "step": (share * statistics.fmean(ends)).round(1).tolist(),
        "terms": means,
        "students": len(logs),
    }


def _positions(steps: Sequence[dict]) -> list[int]:
    """Optimizer steps since the start, through stages that each count from their own."""
    position, before, last = [], 0, 0
    for row in steps:
        if row["step"] < last:
            before += last
        last = row["step"]
        position.append(before + last)
    return position


def _scores(run: RunFolder) -> dict | None:
    """Mean, spread and histogram of the prototype scores t."""
    for stage in run.of_kind("prototypes"):
        facts = {"mean": stage.result["mean"], "std": stage.result["std"]}
        if run.prototype_scores is None:
            return facts | stage.result["histogram"]
        counts, edges = np.histogram(run.prototype_scores, bins=_SCORE_BINS)
        return facts | {"edges": edges.tolist(), "counts": counts.tolist()}
    return None


def _expertise(logs: Sequence[list[dict]]) -> dict | None:
    """Mean and spread of lambda over all that was logged, and its histogram in shares; the spread
    is that within a batch where no histogram was kept."""
    rows = [row for steps in logs for row in steps if "expertise" in row]
    if not rows:
        return None
    facts = {"mean": statistics.fmean(row["expertise"] for row in rows)}
    shares = [row["expertise_histogram"] for row in rows if "expertise_histogram" in row]
    if not shares:
        std = statistics.fmean(row["expertise_std"] for row in rows)
        return facts | {"std": std, "within_batch": True, "edges": None, "counts": None}
    share = np.mean(shares, axis=0)
    edges = np.linspace(0, 1, len(share) + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    std = math.sqrt(np.average((middle - facts["mean"]) ** 2, weights=share))
    return facts | {
        "std": std,
        "within_batch": False,
        "edges": edges.tolist(),
        "counts": share.tolist(),
    }


# Accuracy against latency


def _tradeoff(
    comparison: dict | None, latency: dict | None, exports: Sequence[dict]
) -> dict | None:
    """Accuracy against latency at one batch and length: the teachers, every row of students, and
    int8 students where all domains of a row were exported and scored."""
    at = nearest(latency["rows"]) if latency else None
    if comparison is None or latency is None or at is None:
        return None
    points, left_out, took = [], [], {}
    for row, scores in comparison["summary"].items():
        model = model_of(latency, _role(row), shape_of(row))
        took[row] = times(latency, model, at["batch"], at["length"])
        best = fastest(took[row])
        if best is None:
            left_out.append({"name": row, "reason": "no latency of its shape"})
        elif AVERAGE in scores:
            points.append({"name": row, "score": scores[AVERAGE]["mean"]} | best)
    scored: dict[str, dict[str, list[float]]] = {}
    for export in exports:
        metric = comparison["metric"]
        score = export["formats"].get(ONNX_FILES[INT8_ENGINE], {}).get(metric)
        if score is not None:
            gain = score - export["checked"][metric]
            scored.setdefault(export["row"], {}).setdefault(export["domain"], []).append(gain)
    for row, domains in scored.items():
        if AVERAGE not in comparison["summary"].get(row, {}):
            continue
        wanted = [ALL_DOMAINS] if ALL_DOMAINS in domains else comparison["domains"]
        missing = [name for name in wanted if name not in domains]
        if missing or INT8_ENGINE not in took[row]:
            reason = f"not exported: {', '.join(missing)}" if missing else "no int8 latency"
            left_out.append({"name": f"{row}, int8", "reason": reason})
            continue
        # Exports are scored on texts and a seed of their own: what int8 costs there is what counts.
        gain = statistics.fmean(statistics.fmean(domains[name]) for name in wanted)
        score = comparison["summary"][row][AVERAGE]["mean"] + 100 * gain
        points.append(
            {"name": f"{row}, int8", "score": score}
            | {"engine": INT8_ENGINE, "p50_ms": took[row][INT8_ENGINE]}
        )
    front = pareto([(point["p50_ms"], point["score"]) for point in points])
    return {
        "batch": at["batch"],
        "length": at["length"],
        "points": [point | {"front": on} for point, on in zip(points, front)],
        "left_out": left_out,
    }


def _role(row: str) -> str:
    return "teacher" if row.startswith(TEACHER) else "student"


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of these (cost, value) no other beats: none costs as little and is worth more, or costs
    less and is worth as much."""
    return [
        not any(
            other_cost <= cost and other >= value and (other_cost, other) != (cost, value)
            for other_cost, other in points
        )
        for cost, value in points
    ]


# The rest


def _warnings(facts: dict) -> list[dict]:
    found = []
    comparison = facts["comparison"]
    summary = comparison["summary"] if comparison else {}
    untaught = {}
    for name, method in METHODS.items():
        untaught |= {} if method.possible_teachers else summary.get(name, {})
    for row, (domain, tuned) in itertools.product(summary, untaught.items()):
        taught = summary[row].get(domain)
        if row.startswith(TEACHER) and taught and taught["mean"] < tuned["mean"]:
            where = "on average" if domain == AVERAGE else f"on {domain}"
            found.append(
                {
                    "kind": "weak teacher",
                    "text": f"{row} reaches {taught['mean']:.1f} % {where}, a student that was "
                    f"fine-tuned alone {tuned['mean']:.1f} %: there it has little to teach.",
                }
            )
    if facts["scores"] and facts["scores"]["std"] < FLAT_SCORES:
        found.append(
            {
                "kind": "flat scores",
                "text": "The prototype scores t are nearly constant (standard deviation "
                f"{facts['scores']['std']:.4f}, less than {FLAT_SCORES}): weighting by them does "
                "next to nothing. Try prototypes.rescale.",
            }
        )
    if comparison and len(comparison["seeds"]) == 1:
        found.append(
            {
                "kind": "one seed",
                "text": f"All students have one seed ({comparison['seeds'][0]}): no difference "
                "between rows can be told from chance. Give compare.seeds more of them.",
            }
        )
    return found


def _doubts(students: Sequence[Stage], exports: Sequence[dict]) -> list[dict]:
    """Students that are of no use, and exports that were hardly checked."""
    found = [
        {"kind": "useless student", "text": f"{stage.name} {stage.result['doubt']}."}
        for stage in students
        if "doubt" in stage.result
    ]
    return found + [
        {"kind": "export", "text": f"{export['student']}: {remark}."}
        for export in exports
        for remark in export["checked"].get("remarks", [])
    ]


def _left_out(stages: Sequence[Stage]) -> list[dict]:
    """Rows of the sources that were not read, by file and reason, as stages recorded them."""
    found = [one for stage in stages for one in stage.record.get("left_out", [])]
    return [dict(one) for one in dict.fromkeys(tuple(one.items()) for one in found)]


def _commands(run: RunFolder, exports: Sequence[dict]) -> list[str]:
    """The commands that made all this, each once, in the order of the stages."""
    recorded = [stage.record.get("command") for stage in run.stages]
    recorded += [(report or {}).get("command") for report in (run.compare, run.latency)]
    recorded += [export.get("command") for export in exports]
    return list(dict.fromkeys(filter(None, recorded)))


def _seconds(stages: Sequence[Stage]) -> list[dict]:
    found: dict[tuple[str, str], list[Stage]] = {}
    order = ("prototypes", "start", "teacher", "student")
    for stage in sorted(stages, key=lambda stage: order.index(stage.kind)):
        found.setdefault((stage.kind, stage.row), []).append(stage)
    return [
        {
            "stage": row or kind,
            "number": len(own),
            "seconds": sum(stage.record["seconds"] for stage in own),
            "processes": sorted({stage.record["world_size"] for stage in own}),
        }
        for (kind, row), own in found.items()
    ]
