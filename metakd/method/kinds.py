"""The kinds of teacher: one class each, with all that tells it from the others.

``method.teachers.Teacher`` is the module; what depends on its kind, it asks the kind: its outputs
and extra parts, how it answers for a domain, its loss. A new kind is a class and a line in
``TEACHER_KINDS``. Reading this module imports no torch: configurations are checked against it.

Sizes: B batch, H hidden width, K domains, M classes, N examples.

Source: Meta-KD section 3.2, equations 3-5, for the meta-teacher; its section 4.1 for the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from metakd.method.tasks import SINGLE_LABEL

if TYPE_CHECKING:
    from torch import Tensor, nn

    from metakd.method.teachers import Teacher
    from metakd.models.taps import Features

    Batch = dict[str, Tensor]


class TeacherKind:
    """What a kind of teacher does otherwise than a plain classifier, which is this class."""

    name: ClassVar[str]
    line: ClassVar[str]
    per_domain: ClassVar[bool] = False
    """Is there one for each domain, trained on that alone, or one that serves them all?"""
    head_per_domain: ClassVar[bool] = False
    """Has its classifier M outputs for each domain, K x M, or M?"""
    by_score: ClassVar[bool] = False
    """Does its loss read the prototype scores t?"""
    shows: ClassVar[frozenset[str]] = frozenset()
    """Features that its students can learn from beside those of every encoder."""
    in_data: ClassVar[bool] = False
    """Is there no model, and do its logits come with the data? It shows nothing else then."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Features of the encoder that its own answers need, see ``taps.Taps``."""

    def parts(self, teacher: Teacher) -> dict[str, nn.Module]:
        """Modules beside the encoder, by the names under which they are saved."""
        return {}

    def answer(self, teacher: Teacher, features: Features, batch: Batch) -> None:
        """Change the features of one forward pass into those that it shows: logits [B, M] of each
        example's own domain."""

    def loss(
        self, teacher: Teacher, features: Features, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What it minimises.

        Returns:
            One value per example [B], and the terms of it [B] for the log.
        """
        assert features.logits is not None, "every teacher classifies"
        rows = teacher.task.loss(features.logits, batch["labels"])
        return rows, {"ce": rows}

    def columns(
        self, teacher: Teacher, domain: Tensor, *, seed: int, epoch: int
    ) -> dict[str, Tensor]:
        """What batches of this epoch hold beside the corpus: of domain [N], columns [N, ...]."""
        return {}

    def marks(self, teacher: Teacher) -> dict[str, float]:
        """Numbers beside which its losses are to be read, for the record of its training."""
        return {}

    def remark(self, teacher: Teacher) -> str:
        """What its user should know before it is trained, if there is anything."""
        return ""


class SingleTeacher(TeacherKind):
    """A teacher of one domain."""

    name = "single"
    line = "one teacher for each domain, trained on it alone"
    per_domain = True


class MixedTeacher(TeacherKind):
    """One teacher of all domains, which it does not tell apart."""

    name = "mix"
    line = "one teacher, trained on the examples of all domains"


class MultiTaskTeacher(TeacherKind):
    """One encoder with a head for each domain."""

    name = "mtl"
    line = "one encoder with a classification head for each domain"
    head_per_domain = True

    def parts(self, teacher):
        from metakd.method.domains import HeadChoice

        seen = [name not in teacher.withheld for name in teacher.domains]
        return {"heads": HeadChoice(seen, teacher.num_classes)}

    def answer(self, teacher, features, batch):
        features.logits = teacher.heads(features.logits, batch["domain"])


class MetaTeacher(TeacherKind):
    """``L_MT = mean_i(t_i CE_i + gamma1 L_DA_i)``: prototype scores weight the classification loss,
    and a K-way domain head on the corrupted representation h_d is taught *false* domain labels, so
    that its features carry no domain."""

    name = "meta"
    line = "one teacher, its examples weighted by prototype scores, its features freed of domains"
    by_score = True
    shows = frozenset({"domain"})
    needs = frozenset({"last_hidden"})

    def parts(self, teacher):
        from torch import nn

        from metakd.method.domains import DomainLayer

        hidden, domains = teacher.model.config.hidden_size, len(teacher.domains)
        return {
            "domain_layer": DomainLayer(hidden, domains, teacher.recipe.tanh_on_transfer),
            "domain_classifier": nn.Linear(hidden, domains),
        }

    def answer(self, teacher, features, batch):
        from metakd.models.taps import pool

        if features.last_hidden is not None:
            pooled = pool(features, teacher.recipe.pooling)
            features.domain = teacher.domain_layer(pooled, batch["domain"])

    def corrupts(self, teacher: Teacher) -> bool:
        """Is L_DA part of the loss?"""
        return teacher.recipe.domain_loss and teacher.gamma1 > 0 and teacher.num_taught > 1

    def remark(self, teacher):
        if teacher.num_taught > 1:
            return ""
        return "with one domain a meta-teacher has no domain loss, and learns by its scores alone"

    def loss(self, teacher, features, batch):
        unweighted = teacher.task.loss(features.logits, batch["labels"])
        # A cosine can fall below 0; a negative weight would teach the opposite of the label.
        score = batch["t"].clamp(min=0.0)
        rows = score * unweighted
        terms = {"ce": unweighted, "ce_weighted": rows}
        if self.corrupts(teacher):
            # The release's domain classifier has the tanh that its L_TKD lacks.
            corrupted = features.domain
            corrupted = corrupted if teacher.domain_layer.tanh else corrupted.tanh()
            told = teacher.domain_classifier(corrupted)
            terms["domain_loss"] = SINGLE_LABEL.loss(told, batch["false_domain"])
            weight = score if teacher.recipe.score_weighs_domain_loss else 1.0
            rows = rows + teacher.gamma1 * weight * terms["domain_loss"]
        return rows, terms

    def columns(self, teacher, domain, *, seed, epoch):
        from metakd.method.domains import false_domains

        if not self.corrupts(teacher):
            return {}
        # Among the domains that are taught: a withheld one would be a label never true.
        taught, position = domain.unique(return_inverse=True)
        drawn = false_domains(
            position,
            len(taught),
            seed=seed * 1000 + epoch,
            always_false=teacher.recipe.false_label_always_false,
        )
        return {"false_domain": taught[drawn]}

    def marks(self, teacher):
        from metakd.method.domains import domain_loss_floor

        if not self.corrupts(teacher):
            return {}
        names = "domain_loss_ln_k", "domain_loss_ln_k_minus_1"
        return dict(zip(names, domain_loss_floor(teacher.num_taught)))


class FileTeacher(TeacherKind):
    """A teacher elsewhere, of which there are soft labels (``data.soft_labels``)."""

    name = "file"
    line = "none here: what a model elsewhere said of each text comes with the data"
    in_data = True


class PretrainedEncoder(TeacherKind):
    """No teacher of a task: the pre-trained encoder as it comes, which has no logits to show."""

    name = "encoder"
    line = "the pre-trained encoder, before any task"


ENCODER = PretrainedEncoder()
"""Who teaches ``methods.GENERAL``. Not among the others: nobody learns a task from it."""


class Assistant(TeacherKind):
    """A student that teaches another."""

    name = "assistant"
    line = "a student, between its teacher and a smaller one"


ASSISTANT = Assistant()
"""Who teaches in a chain (``distill.chain``). Not among the others: it is no teacher's student's
only teacher."""

TEACHER_KINDS: dict[str, TeacherKind] = {
    kind.name: kind
    for kind in (
        SingleTeacher(),
        MixedTeacher(),
        MultiTaskTeacher(),
        MetaTeacher(),
        FileTeacher(),
    )
}
"""Every kind by its name."""

DEFAULT_KIND = "meta"
