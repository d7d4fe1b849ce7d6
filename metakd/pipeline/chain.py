"""Assistants between a teacher and a student that is much smaller: each is taught by the one
before, the student by the last.

Source: Mirzadeh et al. 2020, *Improved Knowledge Distillation via Teacher Assistant*
(arXiv 1902.03393); sizes and the rule to stop as in Haase, da Silva 2025, *HPM-KD*
(arXiv 2512.09886).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from metakd.config import StudentConfig
from metakd.errors import ConfigError
from metakd.models.student import student_shape
from metakd.pipeline.context import configured
from metakd.pipeline.lessons import CHAIN, Lesson
from metakd.pipeline.memory import count_parameters
from metakd.pipeline.table import ALL_DOMAINS

if TYPE_CHECKING:
    from metakd.pipeline.students import StudentStage

FOLDER = "assistants"
"""Where they are."""


def between(
    count: int, student: StudentConfig, taught: PretrainedConfig, learning: PretrainedConfig
) -> list[StudentConfig]:
    """So many assistants, or fewer where there is no room for as many, largest first: of layers of
    the teacher, among them the student's, with parameters nearest to
    ``|T| (|S| / |T|)^(i / (count + 1))``, none with fewer layers than the student.

    Args:
        count: how many are wanted.
        student: the last of the chain.
        taught: the teacher's shape.
        learning: the student's.
    """
    shapes = (taught.to_json_string(), learning.to_json_string())
    key = str((count, student.model_dump_json(), *shapes))
    if key not in _found:
        _found[key] = _between(count, student, taught, learning)
    return _found[key]


_found: dict[str, list[StudentConfig]] = {}  # each costs a model of every depth


def _between(
    count: int, student: StudentConfig, taught: PretrainedConfig, learning: PretrainedConfig
) -> list[StudentConfig]:
    kept = student.layers or []
    sizes = {
        number: count_parameters(student_shape(StudentConfig(layers=list(range(number))), taught))
        for number in range(
            max(len(kept) + 1, learning.num_hidden_layers), taught.num_hidden_layers
        )
    }
    whole, small = count_parameters(taught), count_parameters(learning)
    found = []
    for step in range(1, count + 1):
        wanted = whole * (small / whole) ** (step / (count + 1))
        if sizes:
            nearest = min(sizes, key=lambda number: abs(sizes[number] - wanted))
            found.append(_spread(nearest, kept, taught.num_hidden_layers))
    return [
        student.model_copy(
            update={"preset": None, "model": None, "pretrain": None, "layers": list(layers)}
        )
        for layers in dict.fromkeys(found)
    ]


def _spread(number: int, kept: Sequence[int], depth: int) -> tuple[int, ...]:
    """So many of the layers, these among them, the others as far from each other as can be."""
    chosen = set(kept) or {depth - 1}
    while len(chosen) < number:
        left = [layer for layer in range(depth) if layer not in chosen]
        chosen.add(max(left, key=lambda layer: min(abs(layer - other) for other in chosen)))
    return tuple(sorted(chosen))


def steps(run: StudentStage, lesson: Lesson) -> list[Lesson]:
    """All that is to be trained for a student, one after the other: its assistants, and itself."""
    chain = lesson.distill.chain
    if chain is None or lesson.assistants:
        return [lesson]
    shapes: Sequence[StudentConfig]
    if isinstance(chain, int):
        with configured(CHAIN):
            learning = run.outputs.shape_of(lesson)
            shapes = between(chain, lesson.student, run.outputs.taught, learning)
        if not shapes:
            raise ConfigError(
                f"{CHAIN}: no number of the teacher's layers lies between it and "
                f"{lesson.student.shape}",
                "leave it out, or list the assistants",
            )
    else:
        shapes = chain
    found = []
    for number, shape in enumerate(shapes):
        # Who comes later decides nothing for it.
        alone = {"chain": None, "chain_stop": None}
        step = lesson._replace(
            student=shape,
            distill=lesson.distill.taking(shape).model_copy(update=alone),
            assistant=True,
        )
        found.append(_after(step, shapes[:number]))
    return [*found, _after(lesson, shapes)]


def _after(lesson: Lesson, assistants: Sequence[StudentConfig]) -> Lesson:
    """The lesson with the last of these in the teacher's place, if there is one."""
    if not assistants:
        return lesson
    distill = lesson.distill.through(assistants[-1])
    return lesson._replace(distill=distill, assistants=tuple(assistants))


def through(run: StudentStage, lesson: Lesson, seed: int, label: str) -> tuple[Lesson, list[Path]]:
    """Train the assistants of a student; returns what it learns, and their folders, of which the
    last is who teaches it.

    With ``distill.chain_stop`` the chain ends with the first assistant whose score on the
    validation split of the domain is not at least by this share above that of who taught it; of one
    whose teachers have no score there nothing is said.
    """
    metric, limit = run.corpus.task.metric, lesson.distill.chain_stop
    of_domain = metric if lesson.domain == ALL_DOMAINS else f"{metric}/{lesson.domain}"

    def score(*folders: Path) -> float | None:
        known = [run.store.result(place)["validation"].get(of_domain) for place in folders]
        known = [value for value in known if value is not None]
        return fmean(known) if known else None

    best = score(*run.teachers(lesson))
    *assistants, _ = steps(run, lesson)
    places: list[Path] = []
    for step in assistants:
        place, _ = run.student(step, seed, label=label, tutor=places[-1] if places else None)
        places.append(place)
        own = score(place)
        gain = (own - best) / abs(best) if own is not None and best else None
        left = len(places) < len(assistants)
        if left and limit is not None and gain is not None and gain < limit:
            run.say(
                f"{label} {lesson.domain}: the chain ends with {step.student.shape}: its {metric} "
                f"is {100 * gain:+.1f} % of who taught it, distill.chain_stop wants {limit:+.1%}"
            )
            break
        best = own
    return _after(lesson, [step.student for step in assistants[: len(places)]]), places
