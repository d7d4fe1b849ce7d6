"""The stages of a run: prototypes, teachers, students, evaluation; ``store`` skips what is done.

<output_dir>/prototypes/             p[k, m] and the scores t of the training examples
<output_dir>/teachers/<kind>-s<seed>[/<domain>]/
                                     save_pretrained, the domain parts beside it
<output_dir>/teachers/<kind>-s<seed>-fold<n>of<k>[/<domain>]/
                                     what those say who have not seen an example
<output_dir>/starts/<preset>-s<seed>/
                                     what students of a preset begin as (``student.pretrain``)
<output_dir>/.cache/teachers/<kind>-s<seed>[-mean|-gate]/<domain>[-on-<texts>]/
                                     what teachers say of training examples, see ``teacher_cache``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metakd.errors import ConfigError
from metakd.method.kinds import TEACHER_KINDS
from metakd.models.sources import load_trained_classifier
from metakd.models.taps import classifier
from metakd.pipeline import chain
from metakd.pipeline.finished import write
from metakd.pipeline.lessons import Lesson
from metakd.pipeline.serving import TeacherService
from metakd.pipeline.students import StudentStage
from metakd.pipeline.table import ALL_DOMAINS
from metakd.training.world import in_groups, join_world


@dataclass
class Run(StudentStage):
    """The stages of a run directory, see ``Context``."""

    # Students

    def distill(self, domains: list[str] | None = None) -> list[Path]:
        """Train the students of the configured method; returns their folders.

        Raises:
            ConfigError: the processes do not split into groups of ``processes_per_student``.
        """
        wanted = domains or self.student_domains
        lessons = list(map(self.lesson_of, wanted))
        self.foresee(lessons)
        self.spread([(lesson, {"seed": self.config.seed}) for lesson in lessons])
        return self.students(wanted)

    def students(self, domains: list[str] | None = None) -> list[Path]:
        """The folders of these students, all by default; what ``distill`` has not trained is
        trained by all processes."""
        return [self._configured_student(domain) for domain in domains or self.student_domains]

    def lesson_of(self, domain: str) -> Lesson:
        """What the configured student of a domain, or of ``all``, learns."""
        config = self.config
        distill = config.distill.towards(config.student)
        return Lesson(domain, config.student, distill, self.teacher_kind, config.seed)

    def _configured_student(self, domain: str) -> Path:
        return self.student(self.lesson_of(domain), self.config.seed)[0]

    def spread(self, students: Sequence[tuple[Lesson, dict]]) -> None:
        """Train students, each by one group of ``processes_per_student`` processes, the groups side
        by side. What they share is made before, by all. Does nothing where there is one group, or
        no student is missing.

        Args:
            students: of each its lesson, foreseen, and the other arguments of ``student``.

        Raises:
            ConfigError: the processes do not split into such groups.
        """
        size = self.config.distill.processes_per_student
        if size is None or size >= self.world.size or len(students) < 2:
            return
        if self.world.size % size:
            raise ConfigError(
                f"distill.processes_per_student: {size} does not divide the {self.world.size} "
                "processes",
                "start another number of processes, or change it",
            )
        # One that is left of several was begun by a group: only as many can go on with it. And what
        # stages need from all processes they have from here on, a group without a student too.
        left = [
            (lesson, options)
            for lesson, options in students
            if not self.store.has(*self._student_stage(lesson, **options))
        ]
        if not left or not self.store.may_build:
            return
        for lesson, _ in left:
            teachers = self.teachers(lesson)
            for step in chain.steps(self, lesson):
                self._before(step)
                if any(self.outputs.cached_phases(step)):
                    self.outputs.keep(step.place, teachers)
        with in_groups(self.world, size) as (world, group, groups):
            self.move_to(world)
            for lesson, options in left[group::groups]:
                self.student(lesson, **options)
        self.move_to(join_world())

    # Kept teacher outputs

    def cache(self) -> list[Path]:
        """Keep what the teachers of the configured students say; returns the folders.

        Raises:
            ConfigError: nothing is to be kept.
        """
        asked = map(self.lesson_of, self.student_domains)
        lessons = [step for lesson in asked for step in chain.steps(self, lesson)]
        self.foresee(lessons)
        if not any(any(self.outputs.cached_phases(lesson)) for lesson in lessons):
            some = any(lesson.asks_a_model() for lesson in lessons)
            raise ConfigError(
                f"distill.cache_teacher: {self.config.distill.cache_teacher} keeps nothing of what "
                f"{self.config.distill.method} asks a teacher for",
                "set distill.cache_teacher: all" if some else "no model is asked: leave this out",
            )
        return [
            self.outputs.keep(lesson.place, self.teachers(lesson)).folder
            for lesson in lessons
            if any(self.outputs.cached_phases(lesson))
        ]

    # Evaluation

    def evaluate(self) -> dict:
        """Score the saved teacher and students on the test split (validation without one), from
        their files.

        Returns:
            ``{"split": ..., "metric": ..., "teacher": scores, "students": {domain: scores}}``, also
            written to ``evaluation.json``.
        """
        split_name = "validation" if self.corpus.test is None else "test"
        split = getattr(self.corpus, split_name)
        training = self.config.distill.training
        scores = {
            "split": split_name,
            "metric": self.corpus.task.metric,
            "teacher": {},
            "students": {},
        }
        self.foresee(map(self.lesson_of, self.student_domains))
        exact = self.config.model_copy(update={"bf16": False, "fp16": False})
        kind = self.teacher_kind
        members = self.ensemble(kind, self.config.seed) if kind else []
        for places in zip(*members, strict=True):
            checked = list(map(self.store.checked, places))
            service = TeacherService(checked, exact, self.recipe, self.world)
            per_domain = TEACHER_KINDS[kind].per_domain
            domain = places[0].name if per_domain else ALL_DOMAINS
            part = self.part(split, domain)
            with service.showing(frozenset({"logits"})) as show:
                for teacher in service.teachers:
                    teacher.eval()  # the release teaches with dropout
                scored = self.score(lambda batch, show=show: show(batch).logits, part, training)
            # Several single teachers have no scores in common, only some per domain.
            scores["teacher"] |= {
                name: value
                for name, value in scored.items()
                if domain == ALL_DOMAINS or name.endswith(f"/{domain}")
            }
        reader = self.reader_of(self.config.student)
        own = getattr(self.corpus_of(reader), split_name)
        for place in self.distill():
            student = load_trained_classifier(self.store.checked(place))
            classify = classifier(student.to(self.world.device).eval())
            part = self.part(own, place.name)
            scores["students"][place.name] = self.score(classify, part, training, reader=reader)
        if self.world.is_main:
            write(self.folder, scores)
        return scores
