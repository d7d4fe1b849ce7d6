"""One generation of students after the other: what each learns beside its teacher's predictions,
and how far from them it comes (``method.anchoring``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metakd.data.corpus import Split
from metakd.method.anchoring import mixed
from metakd.models.reader import Reader
from metakd.models.sources import load_trained_classifier
from metakd.models.taps import model_inputs
from metakd.pipeline.context import Context
from metakd.pipeline.lessons import Lesson
from metakd.pipeline.serving import TeacherService
from metakd.training.scoring import logits_of

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

    run: Context
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
            found.append(
                self._logits(lambda b: model(**model_inputs(b, model)).logits, texts, reader)
            )
        return self._mixed(found, shares)

    def distance(self, logits: Tensor, heard: Split) -> float:
        """Mean KL between the predictions of its teachers, by their shares, and its own [N, M]."""
        shares = list(self.lesson.anchors.values())
        if not sum(shares):
            shares[0] = 1.0
        found = [
            self._said_by(folders, heard) if share else torch.zeros_like(logits)
            for folders, share in zip(self.anchors.values(), shares, strict=True)
        ]
        anchor = self._mixed(found, shares, temperature=1.0)
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
            return self._logits(lambda batch: show(batch).logits, heard, run.reader)

    def _logits(self, classify: Callable, split: Split, reader: Reader) -> Tensor:
        run = self.run
        return logits_of(
            classify,
            split,
            run.collate_of(reader),
            num_classes=len(run.corpus.label2id),
            batch_size=self.lesson.distill.training.per_device_eval_batch_size,
            world=run.world,
        )
