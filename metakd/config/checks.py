"""What no single block of a configuration can know: keys that exclude each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from metakd.config.blocks import DistillConfig, StudentConfig, TeacherConfig, TrainingConfig
from metakd.config.deepspeed import check_deepspeed, contradictions
from metakd.config.run import RunConfig
from metakd.method.kinds import TEACHER_KINDS
from metakd.method.methods import METHODS
from metakd.method.tasks import SINGLE_LABEL, TASKS

Stage = Literal["prototypes", "teacher", "students"]


def check_contradictions(config: RunConfig, last: Stage = "students") -> list[str]:
    """What no single block can know, keys that exclude each other: ``key: reason`` each.

    Args:
        config: the configuration.
        last: the last stage that it is for; what later ones alone use may be anything.
    """
    found = []
    distill, student = config.distill, config.student

    if distill.teacher_stream and config.sharding(config.teacher).zero == 3:
        found.append("distill.teacher_stream: excluded by teacher.zero: 3, which needs all streams")
    if distill.teacher_stream and distill.cache_teacher == "all":
        found.append("distill.teacher_stream: excluded by distill.cache_teacher: all")
    if config.compat == "easytransfer" and distill.cache_teacher not in ("auto", "none"):
        found.append(
            "distill.cache_teacher: excluded by compat: easytransfer, whose teacher keeps its "
            "dropout and answers otherwise each time"
        )
    if distill.domains is not None and distill.one_student_for_all:
        found.append("distill.domains: excluded by distill.one_student_for_all: true, give one")
    if config.compat == "easytransfer" and config.packed:
        found.append("packed: excluded by compat: easytransfer, which averages over padding too")
    if config.compat == "easytransfer" and distill.schedule == "joint":
        found.append("compat: easytransfer trains in two stages, set distill.schedule: two_stage")
    method = METHODS[distill.method]
    # Left out, the kind follows from the method.
    given = last == "students" and "kind" in config.teacher.model_fields_set
    if given and method.possible_teachers and (reason := method.why_not(config.teacher.kind)):
        found.append(f"teacher.kind: against distill.method: {reason}")
    if method.weights and not any(term.weight(distill) for term in method.terms):
        names = ", ".join(key.removeprefix("terms.") for key in method.weights)
        found.append(
            f"distill.terms: every weight is 0 that {distill.method} has ({names}), so the student "
            "would learn nothing"
        )

    found += _temperature(config)
    found += _transfer(config)
    found += _generations(config)
    found += _soft_labels(config)
    found += _second_order(config) if last == "students" else []
    found += _task(config)

    preset = re.search(r"-(\d+)l-", student.preset or "")
    depth = len(student.layers) if student.layers else int(preset[1]) if preset else None
    if isinstance(distill.layer_map, list) and depth not in (None, len(distill.layer_map)):
        count = len(distill.layer_map)
        found.append(f"distill.layer_map: has {count} teacher layers for {depth} of the student")

    declared = config.deepspeed or {}
    if check_deepspeed(declared):
        declared = {}  # wrong by itself, and said to be
    runs: dict[str, tuple[TrainingConfig, TeacherConfig | StudentConfig]] = {
        "teacher.training": (config.teacher.training, config.teacher),
        "distill.training": (distill.training, student),
    }
    if distill.schedule == "two_stage":
        runs["distill.intermediate"] = (distill.intermediate, student)
    for number, row in enumerate(config.compare.rows):
        taught = row.taught(distill).training
        if row.student is not None or taught != distill.training:
            runs[f"compare.rows.{number}"] = (taught, row.student or student)
    for key, shape in config.students.items():
        if shape.pretrain is not None:
            runs[f"{key}.pretrain"] = (shape.pretrain, shape)
    found += _starts(config.students)
    for key, (training, block) in runs.items():
        if training.warmup_steps >= 1 and 0 < training.max_steps < training.warmup_steps:
            warmup, limit = f"{training.warmup_steps:g}", training.max_steps
            found.append(f"{key}.warmup_steps: {warmup} is more than {key}.max_steps {limit}")
        values = config.deepspeed_values(training, config.sharding(block))
        found += [f"deepspeed.{text} ({key})" for text in contradictions(declared, values)]

    if distill.domains == []:
        found.append("distill.domains: is empty, leave it out to train a student for every domain")
    if (config.compare.teacher_seeds or 0) > len(config.compare.seeds):
        found.append(
            f"compare.teacher_seeds: {config.compare.teacher_seeds} is more than the "
            f"{len(config.compare.seeds)} of compare.seeds"
        )
    models: dict[str, TeacherConfig | StudentConfig] = {"teacher": config.teacher}
    models |= config.students
    for key, block in models.items():
        if block.offload and config.sharding(block).zero == 0:
            found.append(f"{key}.offload: needs {key}.zero of 1 to 3")
    lists: dict[str, Sequence[object]] = {
        "data.withhold": config.data.withhold,
        "distill.domains": distill.domains or [],
        "compare.seeds": config.compare.seeds,
        "compare.rows": [row.label for row in config.compare.rows],
        "report_to": config.report_to,
    }
    for key, entries in lists.items():
        twice = sorted({str(entry) for entry in entries if entries.count(entry) > 1})
        if twice:
            found.append(f"{key}: given more than once: {', '.join(twice)}")
    for key, seed in [("seed", config.seed), *(("compare.seeds", s) for s in config.compare.seeds)]:
        if not 0 <= seed < 2**32:  # what numpy's generator takes
            found.append(f"{key}: must be from 0 to 2^32 - 1 (got {seed})")
    return found


def _starts(students: dict[str, StudentConfig]) -> list[str]:
    """Students of one preset that would be pretrained in different ways: there is one start."""
    first: dict[str | None, tuple[str, dict]] = {}
    found = []
    for key, student in students.items():
        if student.pretrain is not None:
            other, wanted = first.setdefault(student.preset, (key, student.start_inputs()))
            if student.start_inputs() != wanted:
                found.append(
                    f"{key}.pretrain: one start serves all students of {student.preset}, and "
                    f"{other} asks for another"
                )
    return found


def _second_order(config: RunConfig) -> list[str]:
    """What excludes gradients through gradients."""
    distill, students = config.distill, config.students
    asked = {"distill": (distill.method, "student")}
    for number, row in enumerate(config.compare.rows):
        key = f"compare.rows.{number}"
        asked[key] = row.method, f"{key}.student" if row.student else "student"
    found = {}
    for key, (name, own) in asked.items():
        if not METHODS[name].second_order(distill):
            continue
        chained = tuple(f"{place}.chain." for place in ("distill", key))
        blocks: dict[str, TeacherConfig | StudentConfig] = {
            place: student
            for place, student in students.items()
            if place == own or place.startswith(chained)
        }
        blocks["teacher"] = config.teacher
        refused = {f"{place}.zero: 3": config.sharding(b).zero == 3 for place, b in blocks.items()}
        refused["distill.training.gradient_checkpointing"] = distill.training.gradient_checkpointing
        refused["fp16"] = config.fp16  # below whose range these gradients are lost, unscaled
        for place in (place for place, is_set in refused.items() if is_set):
            found[place] = (
                f"{place}: excluded by {key}.method: {name}, which takes gradients of gradients; "
                "change it, or set distill.terms.attribution: 0"
            )
    return list(found.values())


def _temperature(config: RunConfig) -> list[str]:
    """A temperature that moves has a range, one that is constant a value."""
    distill = config.distill
    key, rule = "distill.temperature_schedule", distill.temperature_schedule
    ends = distill.temperature_range
    if rule == "constant":
        said = f"distill.temperature_range: needs a {key} other than constant"
        return [] if ends is None else [said]
    found = []
    if distill.temperature != 1.0:
        found.append(
            f"distill.temperature: excluded by {key}: {rule}, leave it out or set "
            "distill.temperature_range"
        )
    if ends is not None and ends[0] >= ends[1]:
        found.append(
            f"distill.temperature_range: [{ends[0]:g}, {ends[1]:g}] must rise, give the lower end "
            "first"
        )
    if config.compat == "easytransfer":
        found.append(f"{key}: excluded by compat: easytransfer, which has no temperature")
    methods = [distill.method, *(row.method for row in config.compare.rows)]
    if rule == "loss" and distill.gate_entropy and any(METHODS[m].asks_each for m in methods):
        found.append(
            f"{key}: loss is excluded by distill.gate_entropy, with which losses are negative; set "
            "that to 0, or choose another"
        )
    return found


def _transfer(config: RunConfig) -> list[str]:
    """What of ``distill.transfer`` the data have not got."""
    if config.data.unlabelled or config.data.labels or config.compare.labels:
        return []
    asked = {"distill.transfer": (config.distill.method, config.distill.transfer)}
    for number, row in enumerate(config.compare.rows):
        if row.transfer is not None:
            asked[f"compare.rows.{number}.transfer"] = row.method, row.transfer
    return [
        f"{key}: {name} needs data.unlabelled, or data.labels that leave texts over"
        for key, (method, transfer) in asked.items()
        for name in METHODS[method].learns_from(transfer)
        if "unlabelled" in name
    ]


def _generations(config: RunConfig) -> list[str]:
    """What of one generation after the other, and of assistants, cannot be."""
    distill = config.distill
    given = config.compare.rows if "rows" in config.compare.model_fields_set else []
    rows = {
        f"compare.rows.{number}": (row.teacher, row.taught(distill))
        for number, row in enumerate(given)
    }
    found: dict[str, str] = {}  # by what is said, the block that it is said of first
    kind = METHODS[distill.method].teacher(config.teacher.kind)
    for block, (teacher, taught) in {"distill": (kind, distill), **rows}.items():
        for said in _beside_the_teacher(teacher, taught):
            found.setdefault(said, block)
    everybody = [distill, *(taught for _, taught in rows.values())]
    if "anchor" in distill.inputs() and not any(taught.anchored for taught in everybody):
        found["anchor: needs distill.generations of 2 or more"] = "distill"
    if distill.chain_stop is not None and not any(taught.chain for taught in everybody):
        found["chain_stop: needs distill.chain"] = "distill"
    for row, (block, (_, taught)) in zip(given, rows.items(), strict=True):
        if row.anchor is not None and not taught.anchored:
            found["anchor: needs generations of 2 or more"] = block
    return [f"{block}.{said}" for said, block in found.items()]


def _beside_the_teacher(kind: str | None, distill: DistillConfig) -> Iterator[str]:
    """Of one block, ``key: reason``."""
    method = METHODS[distill.method]
    if distill.held > 1:
        yield (
            f"anchors: the shares of all teachers sum to {distill.held:g}, with anchor "
            f"{distill.anchor:g}, and may sum to 1"
        )
    if distill.anchored and kind is None:
        yield f"generations: {method.name} has no teacher to hold them to"
    if distill.chain and kind is None:
        yield f"chain: {method.name} has no teacher, which assistants could help"
    if distill.chain and distill.anchored:
        yield "chain: excluded by distill.generations and distill.anchors, give one"
    for name in distill.anchors:
        if name == kind:
            yield f"anchors: {name} is the teacher, whose share is anchor"
        elif TEACHER_KINDS[name].in_data:
            yield f"anchors: {name} is no model, which could be asked"
    if not distill.anchored:
        return
    if method.asks_each:
        yield (
            f"method: {method.name} has a target of each teacher and no one to anchor, leave out "
            "distill.generations and distill.anchors"
        )
    if distill.temperature_schedule != "constant" and distill.anchor_by == "mixture":
        yield (
            "temperature_schedule: excluded by distill.generations and distill.anchors, as a "
            "mixture is made at one temperature; set distill.anchor_by: geometric"
        )


def _task(config: RunConfig) -> list[str]:
    """What only some kinds of task have."""
    data, task = config.data, TASKS[config.data.task]
    found = []
    if not isinstance(data.label, str) and not task.takes_columns:
        found.append(f"data.label: several columns need data.task: multi_label, got {task.name}")
    if task is not SINGLE_LABEL and config.compat == "easytransfer":
        found.append(f"data.task: {task.name} is excluded by compat: easytransfer")
    if not task.softens and data.soft_labels is not None:
        found.append(
            f"data.soft_labels: excluded by data.task: {task.name}; what a teacher elsewhere says "
            "is a label like others, in data.label"
        )
    softened = {
        "temperature": config.distill.temperature != 1.0,
        "temperature_schedule": config.distill.temperature_schedule != "constant",
    }
    found += [
        f"distill.{name}: excluded by data.task: {task.name}, whose answers are numbers and no "
        "probabilities"
        for name, is_set in softened.items()
        if is_set and not task.softens
    ]
    return found


def _soft_labels(config: RunConfig) -> list[str]:
    """What of a teacher whose logits come with the data cannot be had."""
    asked = {"teacher.kind": METHODS[config.distill.method].teacher(config.teacher.kind)}
    asked |= {f"compare.rows.{n}.teacher": row.teacher for n, row in enumerate(config.compare.rows)}
    found = []
    for key, kind in asked.items():
        if kind is None or not TEACHER_KINDS[kind].in_data:
            continue
        if config.data.soft_labels is None:
            found.append(f"{key}: {kind} needs data.soft_labels")
        trained = {"folds": config.teacher.folds, "ensemble": config.teacher.ensemble > 1}
        for name, is_set in trained.items():
            if is_set:
                found.append(f"teacher.{name}: excluded by {key}: {kind}, which trains no teacher")
    return found
