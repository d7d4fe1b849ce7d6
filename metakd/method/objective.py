"""The module that trains a student on the terms of its method.

``L_MD = mean_i lambda_i (L_embd + L_hidn + L_attn + L_pred + gamma2 L_TKD)_i``, optionally plus
hard-label cross-entropy; ``method.terms`` has the terms, ``method.methods`` what each method takes
of them. In place of lambda, or beside it, ``method.relations`` weights each layer of terms by
domain. Sizes: B batch, L length, H hidden width, K domains, M classes, N layers and the embedding.

Source: Meta-KD section 3.3, equations 6-11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metakd.method.attribution import Attribution
from metakd.method.domains import DomainLayer
from metakd.method.gate import Gate, entropy
from metakd.method.methods import TRAINED
from metakd.method.recipe import PAPER, Recipe
from metakd.method.relations import Relations
from metakd.method.tasks import SINGLE_LABEL, Task
from metakd.method.teachers import StepOutput, check_packed
from metakd.method.temperature import Temperature
from metakd.method.terms import ANSWERS, Term
from metakd.models.taps import Features, Taps, pool

Batch = dict[str, Tensor]


class Distillation(nn.Module):
    """A student under training, with the projections, domain layer, relations and gate that only
    training needs.

    Args:
        student: sequence classifier; the only part that is saved.
        terms: what to minimise.
        teacher_hidden: H of the teacher; projections exist only where the student's differs.
        num_domains: K.
        num_teachers: T, whose votes a gate weights, where a term asks for them.
        gate_dropout: of the gate.
        weigh_by_expertise: multiply terms by lambda_i (meta-distillation); otherwise lambda is 1.
        by_relation: multiply the layers of terms by the weights of a network that is ``trained`` or
            ``fixed``, see ``methods.Method``.
        recipe: paper or released form.
        packed: run the student's layers on real tokens only.
        task: what labels mean.
        anchored: logits to learn from, of the teacher's [B, M] and of others' in the batch.
        temperature: takes the place of that of the terms; who trains the module moves it.

    Raises:
        ValueError: a width does not split into the relation heads.
        UnsupportedError: packed, in a recipe that counts padding.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        terms: Sequence[Term],
        *,
        teacher_hidden: int | None = None,
        num_domains: int = 1,
        num_teachers: int = 1,
        gate_dropout: float = 0.0,
        weigh_by_expertise: bool = False,
        by_relation: str | None = None,
        recipe: Recipe = PAPER,
        packed: bool = False,
        task: Task = SINGLE_LABEL,
        anchored: Callable[[Tensor, Tensor], Tensor] | None = None,
        temperature: Temperature | None = None,
    ):
        super().__init__()
        check_packed(packed, recipe)
        self.temperature = temperature
        self.packed = packed
        self.task = task
        self.anchored = anchored
        self.student = student
        self.terms = list(terms)
        self.weigh_by_expertise = weigh_by_expertise
        self.recipe = recipe
        self.needs = frozenset().union(*(term.needs for term in self.terms))
        hidden = student.config.hidden_size
        for term in self.terms:
            term.check_widths(hidden, teacher_hidden)
        self.projections = nn.ParameterDict()
        if teacher_hidden is not None and teacher_hidden != hidden:
            for name in sorted({self._projection_name(term) for term in self.terms} - {None}):
                self.projections[name] = nn.Parameter(torch.empty(hidden, teacher_hidden))
                nn.init.normal_(self.projections[name], std=hidden**-0.5)
        if "domain" in self.needs:
            self.domain_layer = DomainLayer(hidden, num_domains, recipe.tanh_on_transfer)
        if "votes" in self.needs:
            self.num_domains = num_domains
            outputs = student.config.num_labels
            self.gate = Gate(hidden, num_teachers, outputs, task, gate_dropout)
        self.relations = None
        if by_relation is not None:
            self.relations = Relations(
                hidden,
                student.config.num_hidden_layers,
                num_domains,
                dropout=getattr(student.config, "hidden_dropout_prob", 0.0),
            )
            self.relations.requires_grad_(by_relation == TRAINED)
        self._taps = self._tap()

    @property
    def attribution(self) -> Attribution | None:
        """How tokens are scored, if they are."""
        return next((term.attribution for term in self.terms if term.attribution), None)

    def _projection_name(self, term: Term) -> str | None:
        return "shared" if term.projected and self.recipe.shared_projection else term.projected

    def _tap(self) -> Taps:
        pooled = {"last_hidden"} if self.needs & {"domain", "votes"} else set()
        needs = self.needs - ANSWERS - {"domain"} | pooled
        self._relating = self.relations is not None and any(
            term.first_layer is not None for term in self.terms
        )
        if self._relating:
            needs |= {"embedding", "hidden"}
        return Taps(self.student, needs, self.packed)

    def restrict(self, terms: Sequence[Term]) -> None:
        """Train only these terms from now on (a stage of two): features of the others are no longer
        collected."""
        self._taps.remove()
        self.terms = list(terms)
        self.needs = frozenset().union(*(term.needs for term in self.terms))
        self._taps = self._tap()

    def settle(self) -> None:
        """To be called on all processes at the end of an optimizer step: what changes then and not
        with each batch, which are the prototypes of relations."""
        if self._relating:
            self.relations.settle()

    def detach(self) -> PreTrainedModel:
        """The student alone, without taps, as it was handed in."""
        self._taps.remove()
        return self.student

    def forward(self, batch: Batch, taught: Features | None = None) -> StepOutput:
        """Losses of one batch.

        Args:
            batch: model inputs, labels [B] or [B, M], domain [B]; t [B], or [B, C] by cell where a
                label may be missing, where lambda or ``foreign`` is used; weight [B] of each
                example; foreign [B], which examples t weights; opinion [B, M], logits that take the
                place of the teacher's where they are numbers; elder [B, M], logits that
                ``anchored`` takes beside the teacher's.
            taught: the teacher's features; None for a method without teacher.
        """
        seen = self._taps(batch)
        if taught is not None:
            taught.arrive()
        labels, score = self._known(batch, taught)
        logged = self._complete(seen, taught, batch, labels)
        expertise = self._settle_logits(taught, batch, labels, score, logged)
        relations = self._relate(seen, batch, logged)
        total = torch.zeros(len(seen.mask), device=seen.mask.device)
        for term in self.terms:
            if self.temperature is not None and "temperature" in term.listens_to:
                term = term.softened(self.temperature.value)
                logged["temperature"] = total.new_full((), self.temperature.value)
            rows, related = self._rows(term, seen, taught, batch, relations)
            weighted = term.weight * related
            if expertise is not None and term.by_expertise:
                weighted = expertise.to(rows.dtype) * weighted
            total = total + weighted
            logged[term.name] = rows.detach().mean()
            logged[f"{term.name}_weighted"] = weighted.detach().mean()
        if "weight" in batch:
            total = batch["weight"] * total
        if "foreign" in batch:
            total = score.clamp(min=0.0).where(batch["foreign"], 1.0) * total
        return StepOutput(total, logged)

    def _complete(
        self, seen: Features, taught: Features | None, batch: Batch, labels: Tensor
    ) -> dict[str, Tensor]:
        """Add what the modules beside the student make of its features; returns what is logged."""
        if "domain" in self.needs:
            seen.domain = self.domain_layer(pool(seen, self.recipe.pooling), batch["domain"])
        if self.attribution is not None:
            show = partial(self._taps, batch)
            seen.attribution = self.attribution.scores(seen, show, labels, is_student=True)
        return self._listen(seen, taught, batch) if "votes" in self.needs else {}

    def _settle_logits(
        self,
        taught: Features | None,
        batch: Batch,
        labels: Tensor,
        score: Tensor | None,
        logged: dict[str, Tensor],
    ) -> Tensor | None:
        """Make the teacher's logits those to learn from; returns lambda [B], if terms are weighted
        by it."""
        if taught is None or taught.logits is None:
            return None
        expertise = None
        if "opinion" in batch:
            if self.weigh_by_expertise:
                in_sample = self.task.expertise(taught.logits, labels, score)
                logged["expertise_in_sample"] = in_sample.mean()
                logged["expertise_in_sample_std"] = in_sample.std(correction=0)
            opinion = batch["opinion"].to(taught.logits)
            taught.logits = taught.logits.where(opinion.isnan(), opinion)
        if self.weigh_by_expertise:
            expertise = self.task.expertise(taught.logits, labels, score)
            logged["expertise"] = expertise.mean()
            logged["expertise_std"] = expertise.std(correction=0)
            logged["expertise_histogram"] = _histogram(expertise)
        if self.anchored is not None:
            taught.logits = self.anchored(taught.logits, batch["elder"].to(taught.logits))
        return expertise

    def _relate(self, seen: Features, batch: Batch, logged: dict[str, Tensor]) -> Tensor | None:
        """The weights of each layer and example [N, B], if there are any; notes what they are made
        of next time."""
        if not self._relating:
            return None
        self.relations.note(seen, batch["domain"])
        by_domain = self.relations()  # [N, K]
        relations = by_domain[:, batch["domain"]]
        logged["relations"] = by_domain.detach()
        logged["relations_std"] = relations.detach().std(correction=0)
        return relations

    def _rows(
        self,
        term: Term,
        seen: Features,
        taught: Features | None,
        batch: Batch,
        relations: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """A term's losses [B], and the same with each layer weighted by its relations."""
        asked = taught, batch, self.projections.get(self._projection_name(term))
        first = term.first_layer
        if relations is None or first is None:
            rows = term.rows(seen, *asked)
            return rows, rows
        parts = enumerate(term.by_layer(), first)
        by_layer = torch.stack(
            [part.rows(seen.of_layer(number, part.needs), *asked) for number, part in parts]
        )  # [layers of the term, B]
        return by_layer.sum(0), (relations[first : first + len(by_layer)] * by_layer).sum(0)

    def _listen(self, seen: Features, taught: Features, batch: Batch) -> dict[str, Tensor]:
        """Let the gate say how much the student listens to each teacher. For the log: the share of
        each teacher in all that was heard of each domain [K, T], and the mean entropy."""
        seen.gate = self.gate(pool(seen, self.recipe.pooling), taught.votes)
        shares = seen.gate.detach()
        domains = torch.arange(self.num_domains, device=shares.device)
        of_domain = (batch["domain"] == domains[:, None]).to(shares)  # [K, B]
        return {
            "gate_shares": of_domain @ shares / max(len(shares), 1),
            "gate_entropy": entropy(shares).mean(),
        }

    def _known(self, batch: Batch, taught: Features | None) -> tuple[Tensor, Tensor | None]:
        """Labels, the teacher's choice where there is none, and the scores t [B] with these labels,
        if the batch has any."""
        labels, score = batch["labels"], batch.get("t")
        if taught is not None and taught.logits is not None:
            labels = self.task.presumed(labels, taught.logits)
        if score is not None and score.dim() == 2:
            score = self.task.score_of(score, labels)
        return labels, score


EXPERTISE_BINS = 40
"""Bins of equal width over [0, 1], where lambda lies for scores t in [-1, 1]; what rescaled scores
push beyond falls into the first and the last."""


def _histogram(expertise: Tensor) -> Tensor:
    """Share of the examples in each bin, without waiting for the device."""
    number = (expertise * EXPERTISE_BINS).long().clamp(0, EXPERTISE_BINS - 1)
    bins = torch.arange(EXPERTISE_BINS, device=expertise.device)
    return (number[:, None] == bins).float().mean(0)  # [EXPERTISE_BINS]
