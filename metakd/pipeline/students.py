"""Students: what each learns and from whom, how it is trained, and what is noted of it.

<output_dir>/assistants/<shape>/<method>[-from-<teacher>]...-s<seed>/<domain>/
<output_dir>/generations/<n>/<method>[-from-<teacher>]...-s<seed>/<domain>/
                                     students that those below were trained after
<output_dir>/students/<method>[-from-<teacher>]...-s<seed>/<domain>/
                                     a plain AutoModelForSequenceClassification
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from metakd.data.batches import Collate
from metakd.data.corpus import Split
from metakd.errors import ConfigError, DataError
from metakd.method.attribution import Attribution
from metakd.method.objective import Distillation
from metakd.method.teachers import told
from metakd.method.temperature import Temperature
from metakd.models.student import build_student
from metakd.models.taps import classifier
from metakd.pipeline import chain
from metakd.pipeline.card import origin, write_card
from metakd.pipeline.context import configured
from metakd.pipeline.doubts import doubt
from metakd.pipeline.generations import FOLDER, Generation
from metakd.pipeline.history import History, history_file
from metakd.pipeline.lessons import Lesson, attention_inputs, phases_of
from metakd.pipeline.prior import remember
from metakd.pipeline.readings import as_teacher_reads, read_twice, reread
from metakd.pipeline.serving import TeacherService
from metakd.pipeline.starts import StartStage
from metakd.pipeline.table import ALL_DOMAINS
from metakd.pipeline.teacher_cache import CachedTeacher
from metakd.pipeline.texts import texts_of
from metakd.training.engine import fit, seed_everything
from metakd.training.saves import Saves
from metakd.training.settings import recompute_activations

# Say which students are made, by whom, and what is kept on the way. That a teacher's outputs come
# from the cache is an input of its own, see ``Run.student``.
NOT_OF_A_STUDENT = (
    *("domains", "processes_per_student", "cache_teacher", "cache_limit_gib"),
    "generations",
)


@dataclass
class StudentStage(StartStage):
    """The students of a run directory, one at a time, see ``Context``."""

    def texts(self, lesson: Lesson, names: Sequence[str] | None = None) -> Split:
        """What a student learns from: all of it, or these of ``methods.TEXTS`` with what batches of
        them have to carry for its losses."""
        if names is None:
            return texts_of(self.corpus, lesson.domain, lesson.texts, lesson.distill)
        scores = self.scores() if lesson.reads_scores else None
        opinions = self._opinions(lesson)
        return texts_of(self.corpus, lesson.domain, names, lesson.distill, scores, opinions)

    def _opinions(self, lesson: Lesson) -> Tensor | None:
        if lesson.teacher_kind is None or lesson.has_tutor:
            return None
        domain = lesson.domain if lesson.is_of_one_domain() else ALL_DOMAINS
        return self.opinions(lesson.teacher_kind, lesson.teacher_seed, domain)

    @cached_property
    def history(self) -> History:
        """Where finished students are remembered, for ``metakd suggest``."""
        return History(history_file(), self.say)

    def foresee(self, lessons: Iterable[Lesson]) -> None:
        """Look at lessons before anything is computed for them, and note what they will ask their
        teachers for, so that one pass over the examples can keep it for all of them.

        Raises:
            ConfigError: the domain does not exist, or its single teacher is withheld; what is to be
                kept takes more room than ``distill.cache_limit_gib``, or depends on the batch; see
                also ``foresee_starts``.
        """
        lessons = [step for lesson in lessons for step in chain.steps(self, lesson)]
        for lesson in lessons:
            self._check_lesson(lesson)
        starts = self.foresee_starts(lesson.student for lesson in lessons)
        self.outputs.foresee(lessons, starts)

    def _check_lesson(self, lesson: Lesson) -> None:
        domain = lesson.domain
        if domain not in (ALL_DOMAINS, *self.corpus.domains):
            raise ConfigError(
                f"domain: {domain} is not among {', '.join(self.corpus.domains)}",
                "correct the name",
            )
        if not self.has_teacher(lesson):
            raise ConfigError(
                f"{lesson.distill.method}: there is no {lesson.teacher_kind} teacher of {domain}",
                "name another teacher: the domain is withheld, or the student serves them all",
            )
        for kind in lesson.anchors:
            if not self.has_teacher(lesson._replace(teacher_kind=kind)):
                raise ConfigError(
                    f"distill.anchors: there is no {kind} teacher of {domain}",
                    "leave it out: the domain is withheld, or the student serves them all",
                )
        self.outputs.check(lesson)
        terms = self.outputs.terms(lesson)
        if lesson.distill.anchored and not any(term.of_predictions for term in terms):
            raise ConfigError(
                f"distill.generations: {lesson.label} learns no predictions of its teacher",
                "give terms.prediction a weight, or leave out generations and anchors",
            )
        if lesson.distill.anchors and self.config.teacher.folds:
            raise ConfigError(
                "distill.anchors: excluded by teacher.folds, whose opinions are those of one kind",
                "leave out one of them",
            )
        if "own" not in lesson.texts:
            self.texts(lesson)  # raises where there are none
        if self.config.teacher.folds and lesson.method.mixes(lesson.teacher_kind):
            raise ConfigError(
                f"teacher.folds: {lesson.distill.method} learns from several teachers, which have "
                "each seen other examples",
                "leave out teacher.folds, or this method",
            )

    def has_teacher(self, lesson: Lesson) -> bool:
        """Is there a teacher for this student, if it needs that of its own domain?"""
        if not lesson.is_of_one_domain():
            return True
        withheld = self.config.data.withhold
        return lesson.domain in self.corpus.domains and lesson.domain not in withheld

    def teachers(self, lesson: Lesson) -> list[Path]:
        """The folders of those who teach it, trained if they are not there."""
        kind = lesson.teacher_kind
        members = self.ensemble(kind, lesson.teacher_seed) if kind else []
        teachers = [place for places in members for place in places]
        if lesson.is_of_one_domain():
            teachers = [place for place in teachers if place.name == lesson.domain]
        return teachers

    def student(
        self,
        lesson: Lesson,
        seed: int,
        keep: bool = True,
        label: str | None = None,
        tutor: Path | None = None,
    ) -> tuple[Path, dict]:
        """Train one student.

        Args:
            lesson: what it learns, and from whom.
            seed: of the student.
            keep: keep the weights, or the scores alone.
            label: row name; by default from method and teacher.
            tutor: folder of the assistant that teaches it, if that was settled.

        Returns:
            Its folder and its result: validation and test scores, parameters.

        Raises:
            ConfigError: see ``foresee``.
        """
        label = label or lesson.label
        self.foresee([lesson])
        place, inputs, keep = self._student_stage(lesson, seed, keep, label)
        teachers, elder = self.teachers(lesson), None
        is_new = not self.store.has(place, inputs, keep)
        wanted, known = lesson, teachers
        made: list[Path] = []  # on the way to it
        if is_new:
            self._before(lesson)
            if lesson.elder is not None:
                elder, _ = self.student(lesson.elder, seed, label=label)
                made.append(elder)
            if lesson.has_tutor and tutor is None:
                lesson, made = chain.through(self, lesson, seed, label)
                tutor = made[-1]
                self.foresee([lesson])
            if tutor is not None:
                teachers = [tutor]
        result = self.store.get(
            place,
            inputs,
            lambda folder, saves: (
                self._build_student(folder, saves, lesson, teachers, elder, seed, label)
                | self._seconds_before(made)
            ),
            keep,
        )
        if is_new:
            scored = [self.store.result(teacher) for teacher in known]
            remember(self, wanted, seed, result, scored, self.seconds(place))
        return place, result

    def seconds(self, place: Path) -> float:
        """What the training of a student took, with those that were made on the way to it."""
        return self.store.seconds(place) + self.store.result(place).get("seconds_before", 0.0)

    def _seconds_before(self, made: Sequence[Path]) -> dict[str, float]:
        return {"seconds_before": round(sum(map(self.seconds, made)), 1)} if made else {}

    def _before(self, lesson: Lesson) -> None:
        """Make what its texts carry and what it begins as, beside its teachers."""
        if lesson.reads_scores:
            self.prototypes()
        self._opinions(lesson)
        for kind in lesson.anchors:
            self.teachers(lesson._replace(teacher_kind=kind))
        self.start(lesson.student)

    def _student_stage(
        self, lesson: Lesson, seed: int, keep: bool = True, label: str | None = None
    ) -> tuple[Path, dict, bool]:
        """Folder and inputs of what ``student`` makes, and whether its files are kept."""
        domain, student, distill, teacher_kind, teacher_seed, *_ = lesson
        label = label or lesson.label
        lineage = f"s{seed}"
        if teacher_kind and teacher_seed != seed:
            lineage += f"-t{teacher_seed}"
        where = Path("students")
        if lesson.generation is not None:
            where = Path(FOLDER, str(lesson.generation))
        if lesson.assistant:
            where = Path(chain.FOLDER, student.shape)
        place = self.folder / where / f"{label}-{lineage}" / domain
        inputs = {
            "stage": "student",
            "domain": domain,
            "distill": distill.inputs(*NOT_OF_A_STUDENT),
            "student_seed": seed,
            "teacher_seed": teacher_seed if teacher_kind else None,
            "teacher_kind": teacher_kind,
            "encoder": self.config.teacher.model,
            "student_content": self.content_of(student.model),
            "student": student.inputs(),
            **self.start_inputs(student),
            **self.settings(
                *(["teacher"] if teacher_kind else []),
                *(["prototypes"] if teacher_kind or lesson.reads_scores else []),
            ),
        }
        if distill.generations > 1:
            inputs["generation"] = lesson.number
        if lesson.assistant:
            inputs["assistants"] = [shape.inputs() for shape in lesson.assistants]
        inputs |= self.padding_inputs(student) | attention_inputs(self.outputs.terms(lesson))
        if teacher_kind and (taught := self.padding_inputs()):
            inputs["teacher_padding"] = taught
        cached = self.outputs.cached_phases(lesson)
        if any(cached):  # computed in other batches than the student's, and rounded otherwise
            inputs["cached_phases"] = cached
        return place, inputs, keep

    def _build_student(
        self,
        folder: Path,
        saves: Saves,
        lesson: Lesson,
        teacher_folders: list[Path],
        elder: Path | None,
        seed: int,
        label: str,
    ) -> dict:
        domain, shape, distill, *_ = lesson
        generation = self._generation(lesson, elder)
        reader = self.reader_of(shape)
        apart = reader.tokenizer is not self.tokenizer
        corpus = self.corpus_of(reader)
        teacher_folders = list(map(self.store.checked, teacher_folders))
        validation = self.part(corpus.validation, domain)
        labelled = len(self.part(corpus.train, domain))
        if not labelled or not len(validation):
            raise DataError(
                f"domain {domain}: no {'validation' if labelled else 'training'} examples",
                "add some",
            )

        asked, cached = self.outputs.asked_of(lesson), self.outputs.cached_phases(lesson)
        kept = self.outputs.keep(lesson.place, teacher_folders) if any(cached) else None
        service = None
        if teacher_folders and not all(cached):
            if distill.cache_teacher == "logits" and not lesson.has_tutor:
                self.say(f"{label} {domain}: asks for more than logits, so its teacher runs")
            load = lesson.load_teacher
            service = TeacherService(teacher_folders, self.config, self.recipe, self.world, load)
        start = self.checked_start(shape)
        seed_everything(seed)
        student = self._begun(lesson, start)
        if shape.preset is not None and start is None:
            self.say(
                f"{label} {domain}: preset {shape.preset} begins with random weights and needs far "
                "more texts and steps than student.layers, which copies a teacher's, or "
                "student.pretrain, which teaches it the encoder first"
            )
        taught = self.outputs.taught_of(lesson) if teacher_folders else student.config
        terms = self.outputs.terms(lesson)
        for term in terms:
            if term.remark:
                self.say(f"{label} {domain}: {term.remark}")
        if lesson.method.by_relation and len(self.texts(lesson).domain.unique()) < 2:
            self.say(
                f"{label} {domain}: its texts are of one domain, which has no relations to weigh "
                "losses by; distill.transfer: all or one_student_for_all shows it others"
            )
        softens = any("temperature" in term.listens_to for term in terms)
        with configured("distill"):
            module = Distillation(
                student,
                terms,
                teacher_hidden=taught.hidden_size,
                num_domains=len(corpus.domains),
                num_teachers=len(teacher_folders),
                gate_dropout=distill.gate_dropout,
                weigh_by_expertise=lesson.method.by_expertise,
                by_relation=lesson.method.by_relation,
                recipe=self.recipe,
                packed=self.config.packed,
                task=corpus.task,
                anchored=generation.anchored if generation else None,
                temperature=Temperature.configured(distill) if softens else None,
            )

        classify, scales = classifier(student), {}

        def score() -> dict[str, float]:
            return self.score(classify, validation, distill.training, reader=reader)

        phases = phases_of(distill, terms)
        result = {
            "label": label,
            "domain": domain,
            "parameters": sum(p.numel() for p in student.parameters()),
        }
        examples = len(self.texts(lesson))
        origins = self.start_facts(shape)
        if self.world.is_main:
            origins |= origin(self.config, seed, examples)
        result["origin"] = origins

        def conclude() -> None:
            if corpus.test is not None:
                part = self.part(corpus.test, domain)
                result["test"] = self.score(classify, part, distill.training, True, reader)
            if generation and lesson.asks_a_model():
                own = self.logits(classify, validation, distill.training, reader)
                heard = self.part(self.corpus.validation, domain)
                result["anchor_kl"] = generation.distance(own, heard)

        with self.open_log(folder) as log:
            for number, phase in enumerate(phases):
                log.begin_phase(number)
                heard = texts = self.texts(lesson, phase.texts)
                if apart:
                    texts = reread(heard, corpus)
                recompute_activations(student, [done.training for done in phases[: number + 1]])
                is_last = number == len(phases) - 1
                module.restrict(phase.terms)
                if generation and "logits" in module.needs:
                    beside = generation.beside(heard, texts, reader)
                    texts = texts if beside is None else texts.with_column("elder", beside)
                needs = module.needs | ({"logits"} if lesson.reads_scores else set())
                part = f", stage {number + 1} of {len(phases)}" if len(phases) > 1 else ""
                if distill.generations > 1:
                    part = f", generation {lesson.number + 1} of {distill.generations}{part}"
                answers = kept.teacher(asked[number]) if cached[number] else None
                asks = needs, module.attribution
                with self._listening(lesson, answers, service, asks, heard) as (teacher, pad):
                    if distill.balance != "none" and teacher is not None:
                        module.restrict(self.balanced(phase.terms, texts, pad, teacher))
                        scales |= {term.name: list(term.scales) for term in module.terms}
                    result["validation"] = fit(
                        module,
                        texts,
                        pad,
                        config=self.config,
                        training=phase.training,
                        sharding=self.config.sharding(shape),
                        world=self.world,
                        log=log,
                        teacher=teacher,
                        score=score if is_last else None,
                        conclude=conclude if is_last else None,
                        settle=module.settle,
                        saves=replace(saves, phase=number, last_phase=is_last),
                        seed=seed,
                        title=f"{label} {domain}{part}",
                        temperature=module.temperature,
                    )
        if lesson.tutor is not None:
            result["tutor"] = lesson.tutor.shape
        if "anchor_kl" in result:
            before = self.store.result(elder)["generations"] if elder else []
            scores = result.get("test", result["validation"])
            own = {"anchor_kl": result["anchor_kl"], "score": scores[corpus.task.metric]}
            result |= {"generations": [*before, own], "held": distill.held}
        if found := doubt(result.get("test", result["validation"])):
            result["doubt"] = found
            self.say(f"warning: {label} {domain}: {found}")
        if scales:
            result["scales"] = {name: values for name, values in scales.items() if values}
        student = module.detach().float()
        if self.world.is_main:
            student.config.dtype = torch.float32
            student.save_pretrained(folder)
            reader.tokenizer.save_pretrained(folder)
            write_card(folder, result, self.command)
        return result

    def _generation(self, lesson: Lesson, elder: Path | None) -> Generation | None:
        """What to know of it where there are several, or several kinds of teacher hold it."""
        if not lesson.distill.anchored:
            return None
        anchors = {k: self.teachers(lesson._replace(teacher_kind=k)) for k in lesson.anchors}
        softened = [getattr(term, "temperature", 1.0) for term in self.outputs.terms(lesson)]
        temperature = max(softened)  # 1, and that of the term which has one
        return Generation(self, lesson, anchors, elder and self.store.checked(elder), temperature)

    def _begun(self, lesson: Lesson, start: Path | None) -> PreTrainedModel:
        """The student before its first step."""
        shape, reader = lesson.student, self.reader_of(lesson.student)
        teachers = self.teachers(lesson)
        one = bool(teachers) and not lesson.method.mixes(lesson.teacher_kind)
        copied = teachers[0] if one and shape.copy_from == "teacher" else None
        with configured("student"):
            return build_student(
                shape,
                source=str(copied or self.config.teacher.model),
                tokenizer=reader.tokenizer,
                label2id=self.corpus.label2id,
                max_length=self.config.data.max_length,
                problem_type=self.corpus.task.problem_type,
                pad_token_id=reader.pad_token_id,
                start=start,
            )

    @contextmanager
    def _listening(
        self,
        lesson: Lesson,
        answers: CachedTeacher | None,
        service: TeacherService | None,
        asks: tuple[frozenset[str], Attribution | None],
        heard: Split,
    ) -> Iterator[tuple[Callable | None, Collate]]:
        """What teaches while it lasts, and how examples become its batches.

        Args:
            lesson: what is learned.
            answers: kept ones, in place of a teacher.
            service: the teachers, if any are asked.
            asks: for which features, and how tokens are scored.
            heard: the texts as the teacher reads them.
        """
        reader = self.reader_of(lesson.student)
        pad = self.collate_of(reader)
        if answers is not None:
            yield answers, answers.collate(pad)
        elif service is None:
            yield None if lesson.teacher_kind is None else told, pad
        else:
            needs, how = asks
            with service.showing(needs, lesson.distill.teacher_stream, how) as teacher:
                if reader.tokenizer is self.tokenizer:
                    yield teacher, pad
                else:
                    yield as_teacher_reads(teacher), read_twice(pad, self.collate, heard)
