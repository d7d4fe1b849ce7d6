"""The part of a report that says how far each generation of students is from its teacher
(``distill.generations``)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from metakd.deploy import plots
from metakd.deploy.parts import Section, Table
from metakd.deploy.run_folder import Stage


def gather(students: Sequence[Stage]) -> dict[str, dict]:
    """The facts by row: means over students of each generation's distance and score, and the bound.

    Args:
        students: finished ones, of the last generation.
    """
    found = {}
    for row in dict.fromkeys(stage.row for stage in students):
        told = [stage.result for stage in students if stage.row == row]
        told = [result for result in told if len(result.get("generations", ())) > 1]
        if not told or len({len(result["generations"]) for result in told}) > 1:
            continue
        held = told[0]["held"]
        by_number = list(zip(*(result["generations"] for result in told)))
        means = [
            {name: statistics.fmean(one[name] for one in same) for name in ("anchor_kl", "score")}
            for same in by_number
        ]
        first = means[0]["anchor_kl"]
        found[row] = {
            "held": held,
            "students": len(told),
            "generations": means,
            "bound": [(1 - held) ** number * first for number in range(len(means))],
        }
    return found


def section(facts: dict[str, dict]) -> Section:
    """Distances beside the bound, and scores."""
    found = Section("generations", "Generations")
    found.notes.append(
        "How far the predictions of each generation are from the teachers' on the validation "
        "split: KL, of numbers the squared error; the mean over students. A generation that "
        "learned its target exactly would lie under the bound (1 - anchor)^n times the first; what "
        "lies above it was not learned."
    )
    if any(one["held"] == 0 for one in facts.values()):
        found.notes.append(
            "Without an anchor each generation learns from the one before alone: it drifts."
        )
    found.plots += [
        plots.generations(f"generations-{number}", row, one)
        for number, (row, one) in enumerate(facts.items(), 1)
    ]
    found.tables.append(
        Table(
            "Distance to the teachers' predictions, its bound, and the score in percent.",
            ["", "generation", "distance", "bound", "score", "students"],
            [
                [
                    *(row, str(number + 1), f"{one['anchor_kl']:.4f}", f"{bound:.4f}"),
                    *(f"{100 * one['score']:.1f}", str(facts[row]["students"])),
                ]
                for row in facts
                for number, (one, bound) in enumerate(
                    zip(facts[row]["generations"], facts[row]["bound"])
                )
            ],
        )
    )
    return found
