"""Whether teacher, student, objective and data fit together, asked before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from metakd.config import DistillConfig, RunConfig, StudentConfig
from metakd.errors import ConfigError
from metakd.method.kinds import TEACHER_KINDS
from metakd.method.methods import GENERAL, METHODS, Method, build_terms
from metakd.method.recipe import PAPER, Recipe
from metakd.method.terms import Term
from metakd.models.reader import Reader, open_reader, padding_of
from metakd.models.sources import (
    check_classifies,
    check_embeddings,
    check_labels,
    check_positions,
    load_config,
    unallocated,
    why_not_alike,
)
from metakd.models.student import student_shape, word_embeddings
from metakd.models.taps import TAPPED, why_not_run, why_not_shown

Batch = dict[str, Tensor]


def check_models(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    label2id: dict[str, int],
    recipe: Recipe = PAPER,
    students: bool = True,
    longest: Callable[[StudentConfig | None], tuple[Reader, Batch]] | None = None,
    compared: bool = False,
) -> None:
    """Do teacher, student, objective and data fit together, and the students of a comparison's
    rows? Reads configurations and tokenizers, no weights, so that a run can ask before it trains
    anything; small models of the same shapes are tried out.

    Args:
        config: the whole configuration.
        tokenizer: the teacher's.
        label2id: of the data.
        recipe: form of the method.
        students: False leaves them out of it.
        longest: how a student, or the teacher, reads texts, and a batch with the longest text of
            the corpus, on which models are tried out.
        compared: rows are trained, if there are any, and not the configured method.

    Raises:
        ConfigError: every pair that does not fit, with both values: number of tokens and token
            numbers, labels, positions, layers, widths, features.
    """
    problems: list[str] = []
    trials: dict[str, tuple[PretrainedConfig, StudentConfig | None, frozenset[str]]] = {}

    def tried(
        key: str, shape: PretrainedConfig, student: StudentConfig | None, terms: Sequence[Term]
    ) -> None:
        known = trials[key][2] if key in trials else frozenset()
        trials[key] = shape, student, known.union(*(term.needs & TAPPED for term in terms))

    def note(key: str, check: Callable, *arguments, **options):
        try:
            return check(*arguments, **options)
        except (OSError, ValueError) as error:
            if (problem := f"{key}: {str(error).splitlines()[0]}") not in problems:
                problems.append(problem)
            return None

    source = config.teacher.model
    taught = note("teacher.model", load_config, source)
    length = config.data.max_length
    if taught is not None:
        note("teacher.model", check_embeddings, source, taught, tokenizer)
        note("teacher.model", check_positions, source, taught, length)
        note("teacher.model", check_classifies, source, taught)
        if not TEACHER_KINDS[config.teacher.kind].head_per_domain:  # such a head is always fresh
            note("teacher.model", check_labels, source, taught, label2id)

    def check_student(
        key: str, student: StudentConfig, name: str, distill: DistillConfig, row: str = ""
    ) -> None:
        if student.model is not None:
            key = f"{key}.model"
            shape = note(key, load_config, student.model)
            if shape is not None:
                known = len(problems)
                apart = note(key, why_not_alike, student.model, tokenizer)
                if len(problems) > known:
                    pass  # nobody can tell which tokens it reads
                elif apart is None:
                    note(key, check_embeddings, student.model, shape, tokenizer)
                    note(key, padding_of, student.model, shape, tokenizer)
                elif reader := note(key, open_reader, student.model, length):
                    note(key, check_embeddings, student.model, shape, reader.tokenizer)
                note(key, check_labels, student.model, shape, label2id)
                note(key, check_positions, student.model, shape, length)
                note(key, check_classifies, student.model, shape)
        else:
            shape = None if taught is None else note(key, student_shape, student, taught, length)
            apart = None
            if shape is not None and student.preset and tokenizer.padding_side == "left":
                note(key, padding_of, f"preset {student.preset}", shape, tokenizer)
        if shape is not None and student.freeze_embeddings:
            note(key, lambda: word_embeddings(unallocated(shape)))
        if taught is None or shape is None:
            return
        method = METHODS[distill.method]
        kind = method.teacher(config.teacher.kind)
        asked = [(method, kind is not None and not TEACHER_KINDS[kind].in_data)]
        if student.pretrain is not None:
            asked.append((GENERAL, True))
        for learned, asks_a_model in asked:
            terms = note(
                row + name,
                build_terms,
                distill.towards(student),
                learned,
                student_layers=shape.num_hidden_layers,
                teacher_layers=taught.num_hidden_layers,
                recipe=recipe,
            )
            for term in terms or []:
                note(row + name, term.check_widths, shape.hidden_size, taught.hidden_size)
            shapes = {key: shape} | ({"teacher.model": taught} if asks_a_model else {})
            found = not_shown(learned, terms or [], shapes, name)
            if apart:
                found += not_alike(learned, terms or [], apart, name)
            problems.extend(row + problem for problem in found if row + problem not in problems)
            tried(key, shape, student, terms or [])
            if len(shapes) > 1:
                tried("teacher.model", taught, None, terms or [])

    rows = config.compare.rows if students else []
    if students and not (compared and rows):
        check_student("student", config.student, "distill", config.distill)
    for number, row in enumerate(rows):
        if row.student is not None:
            key = f"compare.rows.{number}"
            check_student(f"{key}.student", row.student, key, row.taught(config.distill))
        elif compared:
            named, distill = f"compare.rows.{number}: ", row.taught(config.distill)
            check_student("student", config.student, "distill", distill, named)
    if taught is not None:
        tried("teacher.model", taught, None, [])
    if longest is not None and not problems:
        for place, (shape, student, needs) in trials.items():
            reader, batch = longest(student)
            shape = copy.deepcopy(shape)
            shape.pad_token_id = reader.pad_token_id
            if reason := why_not_run(shape, needs, config.packed, batch):
                problems.append(f"{place}: {reason}")
    if problems:
        listed = "\n  ".join([f"{len(problems)} problems:", *problems])
        raise ConfigError(
            problems[0] if len(problems) == 1 else listed,
            "Choose models that fit each other and the data; nothing was trained.",
        )


def not_shown(
    method: Method,
    terms: Sequence[Term],
    shapes: Mapping[str, PretrainedConfig],
    name: str = "distill",
) -> list[str]:
    """What models do not show of what these terms compare, a line each with the key to set.

    Args:
        method: that the student learns by.
        terms: built for it.
        shapes: of teacher and student, by the key that names each.
        name: of ``distill``, where it is that of a row.
    """
    remedy = _ways_out(method, name)
    return [
        f"{place}: {term.name}: {reason}; {remedy[term.name]}"
        for place, shape in shapes.items()
        for term in terms
        if term.needs & TAPPED and (reason := why_not_shown(shape, term.needs & TAPPED))
    ]


def not_of_an_assistant(method: Method, terms: Sequence[Term], name: str = "distill") -> list[str]:
    """What terms compare that only a teacher has, a line each with the key to set; arguments as for
    ``not_shown``."""
    remedy = _ways_out(method, name)
    return [
        f"{name}.chain: {term.name} compares what an assistant does not have; {remedy[term.name]}"
        for term in terms
        if term.needs - TAPPED - {"logits"}
    ]


def not_alike(
    method: Method, terms: Sequence[Term], reason: str, name: str = "distill"
) -> list[str]:
    """What terms compare that a student which reads other tokens than its teacher does not have, a
    line each with the key to set.

    Args:
        method: that is learned.
        terms: of it.
        reason: in what their tokens differ.
        name: of the block that weights them, where it is that of a row.
    """
    remedy = _ways_out(method, name)
    return [
        f"{name}: {term.name} compares token with token, but {reason}; {remedy[term.name]}"
        for term in terms
        if term.compares_tokens
    ]


def _ways_out(method: Method, name: str) -> dict[str, str]:
    """By term."""
    other = "choose a method that does not compare it"
    if method is GENERAL:
        other = f"leave out {method.name}"
    return {part.term.name: f"set {name}.{part.key}: 0, or {other}" for part in method.terms}
