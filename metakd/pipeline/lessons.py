"""What students learn, from whom, in which phases; and what is kept of what their teachers say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig

from metakd.config import DistillConfig, StudentConfig, TrainingConfig, row_label
from metakd.data.corpus import Split
from metakd.errors import ConfigError
from metakd.method.fit import not_alike, not_of_an_assistant, not_shown
from metakd.method.kinds import TEACHER_KINDS
from metakd.method.methods import METHODS, Method, build_terms
from metakd.method.recipe import Recipe
from metakd.method.teachers import Teacher
from metakd.method.terms import Term
from metakd.models.sources import load_config, why_not_alike
from metakd.models.student import student_shape
from metakd.models.taps import attention_spans
from metakd.pipeline.context import Context, configured
from metakd.pipeline.memory import BYTES
from metakd.pipeline.serving import TeacherService
from metakd.pipeline.teacher_cache import (
    GIB,
    KeptOutputs,
    Signal,
    bytes_of,
    is_kept,
    pays,
    signals_of,
)


class Lesson(NamedTuple):
    """Who teaches which student what.

    ``domain`` is the student's, or ``all``; ``teacher_kind`` None for fine-tuning alone;
    ``generation`` counts from 0, None is the last, which is the one that is wanted. ``assistant``
    is one of a chain; ``assistants`` are those before it, once they are known, the last of which
    teaches it in the teacher's place.
    """

    domain: str
    student: StudentConfig
    distill: DistillConfig
    teacher_kind: str | None
    teacher_seed: int
    generation: int | None = None
    assistant: bool = False
    assistants: tuple[StudentConfig, ...] = ()

    @property
    def number(self) -> int:
        """Of its generation."""
        return self.distill.generations - 1 if self.generation is None else self.generation

    @property
    def elder(self) -> Lesson | None:
        """That of the generation before."""
        return self._replace(generation=self.number - 1) if self.number else None

    @property
    def anchors(self) -> dict[str, float]:
        """The share of each kind of teacher, its own first, in what it learns."""
        distill = self.distill
        if self.teacher_kind is None:
            return {}
        others = {k: share for k, share in distill.anchors.items() if k != self.teacher_kind}
        return {self.teacher_kind: distill.anchor} | others

    @property
    def method(self) -> Method:
        """The row of the table that it follows."""
        return METHODS[self.distill.method]

    @property
    def label(self) -> str:
        """What its row is called, if nothing else tells it from others."""
        return row_label(self.distill.method, self.teacher_kind)

    @property
    def place(self) -> str:
        """Where in the cache the outputs of its teachers are."""
        mixed = f"-{self.method.combine}" if self.method.mixes(self.teacher_kind) else ""
        texts = "" if self.texts == ("own",) else f"-on-{'+'.join(self.texts)}"
        return f"teachers/{self.teacher_kind}-s{self.teacher_seed}{mixed}/{self.domain}{texts}"

    @property
    def texts(self) -> tuple[str, ...]:
        """From which it learns, of ``methods.TEXTS``."""
        return self.method.learns_from(self.distill.transfer)

    @property
    def reads_scores(self) -> bool:
        """Do its losses read prototype scores t, and with them what the teacher thinks?"""
        foreign = any(name.startswith("others") for name in self.texts)
        return self.method.by_expertise or (foreign and self.distill.transfer_by_score)

    def asks_a_model(self) -> bool:
        """Is there a teacher whose answers are not in the data?"""
        if self.has_tutor:
            return True
        return self.teacher_kind is not None and not TEACHER_KINDS[self.teacher_kind].in_data

    @property
    def has_tutor(self) -> bool:
        """Does an assistant teach it?"""
        return bool(self.distill.chain or self.assistants)

    @property
    def tutor(self) -> StudentConfig | None:
        """The shape of that, once it is known."""
        return self.assistants[-1] if self.assistants else None

    def load_teacher(self, folder: Path, recipe: Recipe) -> Teacher:
        """Who teaches it, from one of the folders."""
        return (Teacher.assistant if self.has_tutor else Teacher.load)(folder, recipe)

    def is_of_one_domain(self) -> bool:
        """Does the teacher of its domain teach it, and no other?"""
        kind = self.teacher_kind
        return kind is not None and TEACHER_KINDS[kind].per_domain and not self.method.mixes(kind)


CHAIN = "distill.chain"


class Phase(NamedTuple):
    """What is trained together, and from which texts."""

    terms: list[Term]
    training: TrainingConfig
    texts: tuple[str, ...]  # of ``methods.TEXTS``


def phases_of(distill: DistillConfig, terms: Sequence[Term]) -> list[Phase]:
    """What is trained one after the other."""
    method = METHODS[distill.method]
    texts = method.learns_from(distill.transfer)
    early = [term for term in terms if term.intermediate]
    late = [term for term in terms if not term.intermediate]
    if distill.schedule == "joint" or not early:
        phases = [Phase(list(terms), distill.training, texts)]
    else:
        phases = [Phase(early, distill.intermediate, texts)]
        phases += [Phase(late, distill.training, texts)] if late else []
    return phases + ([phases[-1]._replace(texts=("own",))] if method.then_own else [])


class Asked(NamedTuple):
    """What is to be kept in a place of the cache, and of which texts."""

    place: str
    texts: Callable[[], Split]
    signals: frozenset[Signal]
    teachers: int = 1


def attention_inputs(terms: Iterable[Term]) -> dict:
    """What terms add to the inputs of a stage where layers do not attend to every token."""
    spans = [term.spans for term in terms if term.spans]
    if any(span.causal or span.window is not None for layers in spans for span in layers):
        return {"attends": spans}
    return {}


class TeacherOutputs:
    """What the lessons of a run ask their teachers for, and what is kept of it.

    Args:
        run: whose lessons they are.
    """

    def __init__(self, run: Context):
        self._run = run
        # By place in the cache: all that is asked for; what was found or made.
        self._asked: dict[str, Asked] = {}
        self._kept: dict[str, KeptOutputs] = {}
        self._shapes: dict[str, PretrainedConfig] = {}

    def forget(self) -> None:
        """Look for everything again, after other processes have been at work."""
        self._kept.clear()

    def foresee(self, lessons: Iterable[Lesson], others: Iterable[Asked] = ()) -> None:
        """Note what these lessons will ask for, so that one pass over the examples can keep it for
        all of them.

        Args:
            lessons: of students.
            others: what is to be kept beside.

        Raises:
            ConfigError: what is to be kept takes more room than ``distill.cache_limit_gib``, or
                depends on the batch.
        """
        grown = False
        asked = [
            Asked(lesson.place, partial(self._run.texts, lesson), signals, self.count(lesson))
            for lesson in lessons
            for signals, cached in zip(self.asked_of(lesson), self.cached_phases(lesson))
            if cached
        ]
        for one in [*asked, *others]:
            known = self._asked.setdefault(one.place, one._replace(signals=frozenset()))
            grown |= not one.signals <= known.signals
            self._asked[one.place] = known._replace(signals=known.signals | one.signals)
        if grown and self._run.store.may_build:
            self._check_cache()

    def _check_cache(self) -> None:
        run, config = self._run, self._run.config
        if run.tokenizer.padding_side == "left":
            raise ConfigError(
                f"distill.cache_teacher: the tokenizer of {config.teacher.model} pads on the left, "
                "so that a token's position, and what a teacher says of it, differs from batch to "
                "batch",
                "set distill.cache_teacher: none",
            )
        size = self.kept_bytes()
        limit = config.distill.cache_limit_gib
        if size > limit * GIB:
            raise ConfigError(
                f"distill.cache_teacher: what teachers say takes about {size / GIB:.3g} GiB in "
                f"{run.cache_root}, distill.cache_limit_gib is {limit:g}",
                "raise the limit, or keep less: cache_teacher: logits or none, bf16: true, fewer "
                "matched layers",
            )

    def kept_bytes(self) -> int:
        """What all that was foreseen takes on the disk."""
        return sum(
            self._bytes(asked.signals, asked.texts(), asked.teachers)
            for asked in self._asked.values()
        )

    def count(self, lesson: Lesson) -> int:
        """How many teachers are asked."""
        config, domains = self._run.config, self._run.corpus.domains
        alike = config.teacher.ensemble
        if not lesson.method.mixes(lesson.teacher_kind):
            return alike
        return alike * len(set(domains) - set(config.data.withhold))

    @cached_property
    def taught(self) -> PretrainedConfig:
        """The teacher's configuration."""
        with configured("teacher.model"):
            return load_config(self._run.config.teacher.model)

    def taught_of(self, lesson: Lesson) -> PretrainedConfig:
        """The configuration of who teaches it: the teacher, or an assistant in its place."""
        return self.taught if lesson.tutor is None else self._learning(lesson.tutor, CHAIN)

    def shape_of(self, lesson: Lesson) -> PretrainedConfig:
        """The configuration of its student."""
        return self._learning(lesson.student, CHAIN if lesson.assistant else "student")

    def _learning(self, student: StudentConfig, named: str = "student") -> PretrainedConfig:
        """The student's configuration, read once."""
        key = student.model_dump_json()
        if key not in self._shapes:
            with configured(named):
                self._shapes[key] = student_shape(
                    student, self.taught, self._run.config.data.max_length
                )
        return self._shapes[key]

    def terms(self, lesson: Lesson) -> list[Term]:
        """What the student minimises."""
        return self.terms_of(lesson.method, lesson.student, lesson.distill, self.taught_of(lesson))

    def terms_of(
        self,
        method: Method,
        student: StudentConfig,
        distill: DistillConfig,
        taught: PretrainedConfig,
    ) -> list[Term]:
        """What a student of this shape minimises that learns by this method of that model."""
        learning = self._learning(student)
        with configured("distill"):
            return build_terms(
                distill,
                method,
                student_layers=learning.num_hidden_layers,
                teacher_layers=taught.num_hidden_layers,
                recipe=self._run.recipe,
                task=self._run.corpus.task,
                spans=lambda: (attention_spans(learning), attention_spans(taught)),
            )

    def asked_of(self, lesson: Lesson) -> list[frozenset[Signal]]:
        """What each phase asks the teacher for."""
        depth = self.taught_of(lesson).num_hidden_layers
        phases = phases_of(lesson.distill, self.terms(lesson))
        return [signals_of(phase.terms, lesson.reads_scores, depth) for phase in phases]

    def check(self, lesson: Lesson) -> None:
        """Do teacher and student show what its terms compare?

        Raises:
            ConfigError: they do not.
        """
        shapes = {"student": self.shape_of(lesson)}
        if lesson.tutor is not None:
            shapes[CHAIN] = self.taught_of(lesson)
        elif lesson.asks_a_model():
            shapes["teacher.model"] = self.taught
        terms, model = self.terms(lesson), lesson.student.model
        problems = not_shown(lesson.method, terms, shapes)
        if lesson.tutor is not None:
            problems += not_of_an_assistant(lesson.method, terms)
        apart = self._run.reader_of(lesson.student).tokenizer is not self._run.tokenizer
        if apart and any(term.compares_tokens for term in terms):
            reason = why_not_alike(str(model), self._run.tokenizer) or "their tokenizers differ"
            problems += not_alike(lesson.method, terms, reason)
        if lesson.tutor is not None:
            widths = self.shape_of(lesson).hidden_size, self.taught_of(lesson).hidden_size
            with configured(CHAIN):
                for term in terms:
                    term.check_widths(*widths)
        if problems:
            raise ConfigError(f"{lesson.label}: {'; '.join(problems)}", "nothing was trained")

    def cached_phases(self, lesson: Lesson) -> list[bool]:
        """Which phases learn from kept outputs; an assistant's are not kept."""
        asks = lesson.asks_a_model() and not lesson.has_tutor
        mode = lesson.distill.cache_teacher if asks else "none"
        asked = self.asked_of(lesson)
        if mode != "auto":
            return [is_kept(signals, mode) for signals in asked]
        phases = phases_of(lesson.distill, self.terms(lesson))
        return [self._pays(lesson, *one) for one in zip(asked, phases, strict=True)]

    def _pays(self, lesson: Lesson, signals: frozenset[Signal], phase: Phase) -> bool:
        """Does ``cache_teacher: auto`` keep what this phase asks for?"""
        run, training = self._run, phase.training
        changing = run.tokenizer.padding_side == "left" or run.config.compat == "easytransfer"
        if changing or lesson.distill.teacher_stream or not signals:
            return False
        texts, count = run.texts(lesson), self.count(lesson)
        passes = float(training.num_train_epochs)
        if training.max_steps > 0:
            a_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
            passes = min(passes, training.max_steps * a_step / max(1, len(texts)))
        size = self._bytes(signals, texts, count)
        if size > lesson.distill.cache_limit_gib * GIB:
            return False
        tokens = count * int(texts.input_ids.lengths.sum())
        return pays(size, tokens, self.taught, passes, run.world.device.type)

    def _bytes(self, signals: frozenset[Signal], texts: Split, teachers: int) -> int:
        itemsize = BYTES[self._run.config.precision]
        classes = len(self._run.corpus.label2id)
        return bytes_of(signals, texts, self.taught, classes, itemsize, teachers)

    def keep(
        self, place: str, teachers: Sequence[Path] = (), encoder: str | None = None
    ) -> KeptOutputs:
        """What was foreseen to be asked in this place; what is not there is made.

        Args:
            place: in the cache.
            teachers: their folders.
            encoder: in their place, the pre-trained one, by its folder or hub id.
        """
        run, config = self._run, self._run.config
        teachers = list(map(run.store.checked, teachers))
        batch_size = config.teacher.training.per_device_eval_batch_size
        if place not in self._kept:
            settings = {
                "precision": config.precision,
                "packed": config.packed,
                "batch_size": batch_size,
                **({} if encoder is None else {"encoder": encoder}),
            }
            self._kept[place] = KeptOutputs(
                run.cache_root,
                place,
                teachers if encoder is None else [Path(encoder)],
                settings,
                self._asked[place].texts(),
                self.taught.num_hidden_layers,
                run.world,
                run.say,
            )
        kept = self._kept[place]
        if missing := kept.missing(self._asked[place].signals):
            service = self.service(teachers, encoder)
            needs = frozenset(signal.feature for signal in missing)
            how = next((signal.how for signal in missing if signal.how), None)  # one a run
            with service.showing(needs, attribution=how) as show:
                kept.make(missing, show, run.collate, batch_size)
        return kept

    def service(self, teachers: Sequence[Path], encoder: str | None = None) -> TeacherService:
        """These teachers at work, or the pre-trained encoder in their place."""
        run = self._run
        if encoder is None:
            return TeacherService(teachers, run.config, run.recipe, run.world)
        with configured("teacher.model"):
            return TeacherService([encoder], run.config, run.recipe, run.world, Teacher.pretrained)
