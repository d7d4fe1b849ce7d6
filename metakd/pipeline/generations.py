"""One generation of students after the other: what each learns beside its teacher's predictions,
and how far from them it comes (``method.anchoring``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from metakd.data.corpus import Split
from metakd.method.anchoring import mixed
from metakd.models.reader import Reader
from metakd.models.sources import load_trained_classifier
from metakd.models.taps import classifier
from metakd.pipeline.lessons import Lesson
from metakd.pipeline.serving import TeacherService
from metakd.pipeline.teaching import TeacherStage

FOLDER = "generations"
"""Where students are that were trained on the way to others."""


@dataclass(frozen=True)
class Generation:
    """One of several.

    Args:
        run: that it is trained in.
        lesson: what it learns.
        anchors: folders of the teachers of each kind that holds it, its own first.
        elder: folder of the generation before; None for the first.
        temperature: that its loss softens predictions by.
    """

    run: TeacherStage
    lesson: Lesson
    anchors: dict[str, Sequence[Path]]
    elder: Path | None
    temperature: float

    @property
    def anchored(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What it learns, of its teacher's logits and those of ``beside``; None where it learns
        its teacher's alone."""
        own, *others = self._shares()
        if not sum(others):
            return None
        return lambda teacher, rest: self._mixed([teacher, rest], [own, sum(others)])

    def beside(self, heard: Split, texts: Split, reader: Reader) -> Tensor | None:
        """Logits [N, M] of all but its own teacher, mixed by their shares; None where these are
        none.

        Args:
            heard: the texts, as teachers read them.
            texts: the same, as students do.
            reader: of students.
        """
        shares = self._shares()[1:]
        if not sum(shares):
            return None
        found = [self._said_by(folders, heard) for folders in list(self.anchors.values())[1:]]
        if self.elder is not None:
            model = load_trained_classifier(self.elder).to(self.run.world.device).eval()
            training = self.lesson.distill.training
            found.append(self.run.logits(classifier(model), texts, training, reader))
        return self._mixed(found, shares)

    def distance(self, logits: Tensor, heard: Split) -> float:
        """Mean KL between the predictions of its teachers, by their shares, and its own [N, M]."""
        shares = {kind: share for kind, share in self.lesson.anchors.items() if share}
        shares = shares or {next(iter(self.anchors)): 1.0}
        found = [self._said_by(self.anchors[kind], heard) for kind in shares]
        anchor = self._mixed(found, list(shares.values()), temperature=1.0)
        return self.run.corpus.task.divergence(logits, anchor).mean().item()

    def _shares(self) -> list[float]:
        """Of its teacher, of the other kinds, of the generation before."""
        shares = list(self.lesson.anchors.values())
        if self.elder is not None:
            return [*shares, max(0.0, 1.0 - self.lesson.distill.held)]
        return shares if sum(shares) else [1.0, *shares[1:]]

    def _mixed(self, parts: Sequence[Tensor], shares: Sequence[float], **options) -> Tensor:
        distill = self.lesson.distill
        settled = {"operator": distill.anchor_by, "temperature": self.temperature}
        return mixed(parts, shares, task=self.run.corpus.task, **(settled | options))

    def _said_by(self, folders: Sequence[Path], heard: Split) -> Tensor:
        run = self.run
        checked = list(map(run.store.checked, folders))
        service = TeacherService(checked, run.config, run.recipe, run.world)
        with service.showing(frozenset({"logits"})) as show:
            for teacher in service.teachers:
                teacher.eval()  # the release teaches with dropout
            training = self.lesson.distill.training
            return run.logits(lambda batch: show(batch).logits, heard, training)
