"""What to try first: settings of the past runs on this machine that were most like this one.

A **situation** is what a student is trained in and does not choose: its features, see
``features_of``. **Settings** are how it is taught: method, kind of teacher, keys of ``distill``.
Runs of one situation can be compared with each other, and with nothing else: the gain of settings
is their mean score less the mean of the other settings tried in the same situation. Of the five
nearest situations, by the cosine of log1p of the features in standard deviations, each counts with
``(1 + cosine) / 2``; settings that a situation has not seen gained nothing there. Settings stay
together as they were tried, since they depend on one another.

Source: after Haase and da Silva 2025 (HPM-KD, arXiv 2512.09886), whose configuration prior takes
the mean of the five nearest; its gradient boosting on more than 50 runs is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.console import Console

from metakd.config import DistillConfig, RunConfig, load_config, row_label
from metakd.config.blocks import Block
from metakd.errors import ConfigError, MetakdError
from metakd.method.methods import METHODS
from metakd.method.recipe import RECIPES
from metakd.method.tasks import by_domain
from metakd.pipeline.history import PastRun
from metakd.pipeline.lessons import Lesson
from metakd.pipeline.memory import count_parameters
from metakd.pipeline.table import ALL_DOMAINS, metric_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from metakd.data.corpus import Split
    from metakd.pipeline.students import StudentStage

NEIGHBOURS = 5
ENOUGH = 5
"""So many comparable past runs make a suggestion."""

_METHOD, _KIND = "distill.method", "teacher.kind"
# Of ``distill``, what says where and for whom it is computed, and not what a student learns.
_APART = (
    *("domains", "one_student_for_all", "processes_per_student"),
    *("backend", "teacher_stream", "cache_teacher", "cache_limit_gib"),
    *(
        f"{block}.{key}"
        for block in ("training", "intermediate")
        for key in ("per_device_eval_batch_size", "gradient_checkpointing")
    ),
)


# ---- What a run was ------------------------------------------------------------------------------


def features_of(run: StudentStage, lesson: Lesson) -> dict[str, float]:
    """What a student is trained in, in numbers of at least 0."""
    corpus, config, student = run.corpus, run.config, lesson.student
    own = run.part(corpus.train, lesson.domain)
    loose = corpus.unlabelled
    unlabelled = 0 if loose is None else len(run.part(loose, lesson.domain))
    lengths = own.input_ids.lengths.numpy()
    found = {
        "labels": len(own),
        "validation": len(run.part(corpus.validation, lesson.domain)),
        "unlabelled": unlabelled,
        "other_labels": len(corpus.train) - len(own),
        "other_unlabelled": 0 if loose is None else len(loose) - unlabelled,
        "domains": len(corpus.domains),
        "classes": len(corpus.label2id),
        "balance": _balance(own),
        "tokens_mean": lengths.mean(),
        "tokens_95": np.quantile(lengths, 0.95),
        "vocabulary": own.input_ids.flat.bincount().count_nonzero() / len(run.tokenizer),
        **_size("teacher", run.outputs.taught),
        **_size("student", run.outputs.shape_of(lesson)),
        "student_frozen": student.freeze_embeddings,
        "student_random": student.preset is not None and student.pretrain is None,
        "teachers": config.teacher.ensemble,
        "form": list(RECIPES).index(config.form),
        "processes": run.world.size,
    }
    return {name: round(float(value), 6) for name, value in found.items()}


def _balance(split: Split) -> float:
    """Entropy of the classes, or of what stands for them, over that of as many equal ones."""
    counts = split.strata.unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    return (-(shares * shares.log()).sum() / np.log(max(len(counts), 2))).item()


def _size(of: str, shape: PretrainedConfig) -> dict[str, float]:
    return {
        f"{of}_parameters": count_parameters(shape),
        f"{of}_layers": shape.num_hidden_layers,
        f"{of}_width": shape.hidden_size,
    }


def settings_of(
    distill: DistillConfig, kind: str | None, layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """How a student is taught, as JSON values by the dotted keys of the configuration; without what
    its method does not listen to.

    Args:
        distill: how.
        kind: of its teacher, if it has one.
        layers: that the student copies.
    """
    method = METHODS[distill.method]
    unheard = {key for other in METHODS.values() for key in other.keys} - set(method.keys)
    if method.texts is not None:
        unheard.add("transfer")
    if distill.schedule == "joint":
        unheard.add("intermediate")
    if not distill.anchored:
        defaults = DistillConfig()
        inert = {key: getattr(defaults, key) for key in ("anchor", "anchor_by")}
        distill = distill.model_copy(update=inert)
    found = {
        f"distill.{key}": value
        for key, value in _flat(distill)
        if not unheard & {key, key.partition(".")[0]} and key not in _APART
    }
    if layers and found.get("distill.layer_map") == list(layers):
        found["distill.layer_map"] = "copied"  # holds for another student, too
    return found if kind is None else {_KIND: kind, **found}


def _flat(block: Block) -> Iterator[tuple[str, Any]]:
    """Dotted keys of a block and of the blocks in it, and their values as JSON has them; of listed
    students without the files that they are pretrained on, whose names are the user's."""
    for key, value in block.model_dump(mode="json").items():
        inner = getattr(block, key)
        if isinstance(inner, Block):
            yield from ((f"{key}.{name}", item) for name, item in _flat(inner))
        elif isinstance(inner, list) and any(isinstance(item, Block) for item in inner):
            without = {"exclude_defaults": True, "exclude": {"pretrain": {"texts"}}}
            yield key, [item.model_dump(mode="json", **without) for item in inner]
        else:
            yield key, value


def remember(
    run: StudentStage,
    lesson: Lesson,
    seed: int,
    result: dict,
    teachers: Sequence[dict],
    seconds: float,
) -> None:
    """Leave a trained student in the history, on the first rank; none that was trained on the way
    to another. Never fails a run.

    Args:
        run: that trained it.
        lesson: what it learned.
        seed: the student's.
        result: of its stage.
        teachers: results of its teachers' stages.
        seconds: that it took.
    """
    on_the_way = lesson.generation is not None or lesson.assistant
    if not run.world.is_main or run.history.path is None or on_the_way:
        return
    try:
        score = result["validation"]
        metric = metric_of(score)
        past = PastRun(
            metric,
            features_of(run, lesson),
            settings_of(lesson.distill, lesson.teacher_kind, lesson.student.layers),
            (seed, lesson.teacher_seed if lesson.teacher_kind else None),
            score[metric],
            result.get("test", {}).get(metric),
            _taught_by(lesson, teachers, metric),
            round(seconds, 1),
        )
    except Exception as error:  # of an architecture that cannot be counted, say
        run.say(f"warning: this run is not remembered: {type(error).__name__}: {error}")
        return
    run.history.add(past)


def _taught_by(lesson: Lesson, teachers: Sequence[dict], metric: str) -> float | None:
    """What its teachers score on the validation split of its domain, in the mean."""
    scores = [result["validation"] for result in teachers]
    if lesson.domain == ALL_DOMAINS:
        found = [score[metric] for score in scores]
    else:
        known = map(by_domain, scores)
        found = [score[lesson.domain] for score in known if lesson.domain in score]
    return fmean(found) if found else None


# ---- What it says of another ---------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What settings came to in one of the nearest situations.

    Args:
        similarity: of the situation, the cosine; the largest, to any of the students.
        settings: all of them.
        runs: that had them.
        score: their mean in percent.
        gain: more than the mean of what else was tried there; None where that is nothing.
        seconds: that training took, the mean.
        changes: beside method and teacher, what the configuration has otherwise.
    """

    similarity: float
    settings: dict[str, Any]
    runs: int
    score: float
    gain: float | None
    seconds: float | None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Method and teacher, as tables call them."""
        return row_label(self.settings[_METHOD], self.settings.get(_KIND))


@dataclass(frozen=True)
class Choice:
    """Settings, and what they gained over the nearest situations in percent."""

    settings: dict[str, Any]
    gain: float
    runs: int
    situations: int


@dataclass(frozen=True)
class Suggestion:
    """What to try first.

    Args:
        comparable: how many past runs have this metric and these features.
        evidence: the nearest first.
        choice: what did best among them; None: the defaults stand.
        why: there is no choice or nothing to change, or the best were passed over; a line each.
        settings: all that is suggested.
        changes: of these, what the configuration has otherwise: from what, to what.
        metric: that scores are of.
    """

    comparable: int
    evidence: list[Evidence]
    choice: Choice | None
    why: list[str]
    settings: dict[str, Any]
    changes: dict[str, tuple[Any, Any]]
    metric: str


def weigh(
    past: Sequence[PastRun], wanted: Sequence[Mapping[str, float]]
) -> tuple[list[Evidence], list[Choice]]:
    """Compare settings over the situations that are nearest to those wanted.

    Args:
        past: comparable runs, at least one.
        wanted: features of each student that is to be trained, [S].

    Returns:
        What each settings came to in each situation, the nearest first; and the settings by what
        they gained, the best first, where there was something to compare.
    """
    from sklearn.metrics.pairwise import cosine_similarity
    from sklearn.preprocessing import StandardScaler

    names = sorted(wanted[0])
    situations: dict[tuple, dict[str, list[PastRun]]] = {}
    for run in past:
        tried = situations.setdefault(tuple(run.features[name] for name in names), {})
        tried.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    asked = [tuple(one[name] for name in names) for one in wanted]
    scaler = StandardScaler().fit(np.log1p(list(situations)))
    known, own = (scaler.transform(np.log1p(rows)) for rows in (list(situations), asked))
    alike = cosine_similarity(own, known)  # [S, P]
    # At the mean of all situations a direction says nothing, and the same is still the same.
    alike[np.array([[one == other for other in situations] for one in asked])] = 1.0
    weight = np.zeros(len(situations))
    for row in alike:
        nearest = np.argsort(-row, kind="stable")[:NEIGHBOURS]
        weight[nearest] += (1 + row[nearest]) / 2

    evidence, gained, whole = [], {}, 0.0
    for number, tried in enumerate(situations.values()):
        if weight[number] <= 0:
            continue
        means = {key: 100 * fmean(run.validation for run in runs) for key, runs in tried.items()}
        whole += weight[number] * (len(means) > 1)
        for key, mean in means.items():
            others = [other for name, other in means.items() if name != key]
            gain = mean - fmean(others) if others else None
            settings, runs = tried[key][0].settings, len(tried[key])
            similarity = alike[:, number].max().item()
            times = [run.seconds for run in tried[key] if run.seconds is not None]
            seconds = fmean(times) if times else None
            evidence.append(Evidence(similarity, settings, runs, mean, gain, seconds))
            if gain is not None:
                before = gained.get(key, Choice(settings, 0.0, 0, 0))
                total = before.gain + weight[number].item() * gain
                gained[key] = Choice(settings, total, before.runs + runs, before.situations + 1)
    evidence.sort(key=lambda one: (-one.similarity, -one.score))
    choices = [replace(choice, gain=choice.gain / whole) for choice in gained.values()]
    return evidence, sorted(choices, key=lambda choice: (-choice.gain, -choice.runs))


def suggest(run: StudentStage) -> Suggestion:
    """Settings for the students of a run, from the history; nothing is trained.

    Raises:
        MetakdError: the run could not be started; CheckpointError: the history cannot be read.
    """
    lessons = [run.lesson_of(domain) for domain in run.student_domains]
    run.foresee(lessons)
    wanted = [features_of(run, lesson) for lesson in lessons]
    metric = run.corpus.task.metric
    past = [
        replace(one, settings=_completed(one.settings))
        for one in run.history.read()
        if one.metric == metric
        and one.features.keys() >= wanted[0].keys()
        and one.settings.get(_METHOD) in METHODS
    ]
    defaults = settings_of(_untouched(run.config), run.teacher_kind)
    if len(past) < ENOUGH:
        why = f"{len(past)} comparable past runs, a suggestion needs {ENOUGH}: the defaults stand"
        return Suggestion(len(past), [], None, [why], defaults, {}, metric)
    found, choices = weigh(past, wanted)
    evidence = [
        replace(
            one,
            changes={
                key: value
                for key, (_, value) in _changes(run.config, one.settings).items()
                if key not in (_METHOD, _KIND)
            },
        )
        for one in found
    ]
    why = []
    for choice in choices:
        if choice.gain <= 0:
            break
        changes = _changes(run.config, choice.settings)
        reason = _why_not(run, changes)
        if reason is None:
            if not changes:
                why.append("this configuration has what did best")
            return Suggestion(len(past), evidence, choice, why, choice.settings, changes, metric)
        why.append(f"{choice.gain:+.1f} points, passed over: {reason}")
    why.append("no settings did better than others that were tried: the defaults stand")
    return Suggestion(len(past), evidence, None, why, defaults, {}, metric)


def _untouched(config: RunConfig) -> DistillConfig:
    """The defaults of its method: they depend on the data, too."""
    plain = config.model_dump(mode="json", exclude_unset=True)
    return load_config(plain | {"distill": {"method": config.distill.method}}).distill


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of keys that came after they were written."""
    distill = DistillConfig(method=settings[_METHOD])
    return settings_of(distill, settings.get(_KIND)) | settings


def _changes(config: RunConfig, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    distill = config.distill.towards(config.student)
    kind = METHODS[distill.method].teacher(config.teacher.kind)
    known = {f"distill.{key}": value for key, value in _flat(distill)}
    known |= {_KIND: config.teacher.kind, **settings_of(distill, kind, config.student.layers)}
    return {
        key: (known.get(key), value)
        for key, value in settings.items()
        if key not in known or known[key] != value
    }


def _why_not(run: StudentStage, changes: Mapping[str, tuple[Any, Any]]) -> str | None:
    """Why a run cannot have these settings; None if it can."""
    try:
        config = load_config(changed(run.config, changes))
        trial = replace(run, config=config, console=Console(quiet=True))
        trial.foresee(trial.lesson_of(domain) for domain in trial.student_domains)
    except MetakdError as error:
        return error.cause
    return None


def changed(config: RunConfig, changes: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """What a file would hold of a configuration with these changes."""
    plain = config.model_dump(mode="json", exclude_unset=True)
    for key, (_, value) in changes.items():
        *blocks, name = key.split(".")
        block = plain
        for inner in blocks:
            block = block.setdefault(inner, {})
        block[name] = value
    return plain


def write_suggested(config: RunConfig, found: Suggestion, path: Path) -> Path | None:
    """Write what is suggested for a configuration beside its file, as ``NAME.suggested.yaml``.

    Args:
        config: with its overrides.
        found: what is suggested for it.
        path: its file.

    Returns:
        The new file; None where nothing is to be changed.

    Raises:
        ConfigError: there is such a file, which is left as it is, or it cannot be written.
    """
    if not found.changes:
        return None
    place = path.with_name(f"{path.stem}.suggested.yaml")
    changes = (f"{key}: {old!r} -> {new!r}" for key, (old, new) in found.changes.items())
    lines = [f"{path.name} with what `metakd suggest` found in past runs:", *changes]
    text = yaml.safe_dump(changed(config, found.changes), sort_keys=False, allow_unicode=True)
    try:
        with place.open("x", encoding="utf-8") as file:
            file.write("".join(f"# {line}\n" for line in lines) + text)
    except FileExistsError:
        raise ConfigError(f"{place}: is there already", "move it away, or take it") from None
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}", "give the rights, or make room") from error
    return place
