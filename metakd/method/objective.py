"""The distillation objective: terms, the methods made of them, and the module that trains a student
on them.

``L_MD = mean_i lambda_i (L_embd + L_hidn + L_attn + L_pred + gamma2 L_TKD)_i``, optionally plus
hard-label cross-entropy. Each term is a dataclass that declares the features it ``needs``, so that
models collect no more, and returns one value per example: lambda multiplies rows, never a mean.
Sizes: B batch, L length, H hidden width, A heads, K domains, M classes.

Source: Meta-KD section 3.3, equations 6-11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from metakd import functional as loss
from metakd.config import DistillConfig
from metakd.method.recipe import PAPER, Recipe
from metakd.method.taps import Features, Taps, layer_map, pool
from metakd.method.teacher import DomainLayer, StepOutput, check_packed

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One summand of the objective.

    ``rows`` takes the student's and the teacher's features, the batch and the projection [H_s, H_t]
    of ``projected`` (None where widths are equal), and returns one loss per example [B].
    """

    weight: float = 1.0
    by_expertise: bool = True  # multiplied by lambda where the method has one
    backend: str = "auto"  # of the losses, see metakd.functional

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    projected: ClassVar[str | None] = None
    layers: ClassVar[Sequence[int]] = ()  # of the teacher that it reads; negative: from the top
    intermediate: ClassVar[bool] = True  # trained in the first of two stages

    def rows(
        self, student: Features, teacher: Features, batch: Batch, projection: Tensor | None
    ) -> Tensor:
        """One loss per example [B]."""
        raise NotImplementedError


@dataclass(frozen=True)
class EmbeddingTerm(Term):
    """``L_embd = MSE(E_S W_e, E_T)``."""

    name = "embedding"
    needs = frozenset({"embedding"})
    projected = "embedding"

    def rows(self, student, teacher, batch, projection):
        return loss.hidden_mse(
            student.embedding,
            teacher.embedding,
            projection=projection,
            mask=student.mask,
            reduction="none",
            backend=self.backend,
        )


@dataclass(frozen=True)
class HiddenTerm(Term):
    """``L_hidn = sum_l MSE(H_S^l W_h, H_T^g(l))``."""

    layers: Sequence[int] = ()  # g(l), 0-based

    name = "hidden"
    needs = frozenset({"hidden"})
    projected = "hidden"

    def rows(self, student, teacher, batch, projection):
        matched = [teacher.hidden[layer] for layer in self.layers]
        return loss.hidden_mse(
            student.hidden,
            matched,
            projection=projection,
            mask=student.mask,
            reduction="none",
            backend=self.backend,
        )


@dataclass(frozen=True)
class AttentionTerm(Term):
    """``L_attn = sum_l MSE(A_S^l, A_T^g(l))`` on pre-softmax scores, or MSE or KL of the
    probabilities."""

    layers: Sequence[int] = ()  # g(l), 0-based
    form: str = "scores"
    mean_over: str = "real"

    name = "attention"
    needs = frozenset({"query", "key"})

    def rows(self, student, teacher, batch, projection):
        compare = {
            "scores": loss.attention_score_mse,
            "probabilities": loss.attention_prob_mse,
            "kl": loss.attention_kl,
        }[self.form]
        options = {"key_mask": student.mask, "reduction": "none", "backend": self.backend}
        # The release masked keys only and divided by L x L.
        if self.mean_over == "all":
            options["mean_over"] = "all"
        else:
            options["query_mask"] = student.mask
        matched = [(teacher.query[layer], teacher.key[layer]) for layer in self.layers]
        return compare(list(zip(student.query, student.key)), matched, **options)


@dataclass(frozen=True)
class RelationTerm(Term):
    """MiniLMv2: KL between Q-Q, K-K and V-V relations of the last layers. Source: Wang et al. 2021,
    equations 4-7."""

    heads: int = 12

    name = "relation"
    needs = frozenset({"query", "key", "value"})
    layers = (-1,)

    def rows(self, student, teacher, batch, projection):
        last = [(seen.query[-1], seen.key[-1], seen.value[-1]) for seen in (student, teacher)]
        return loss.relation_kl(
            *last,
            relation_heads=self.heads,
            mask=student.mask,
            reduction="none",
            backend=self.backend,
        )


@dataclass(frozen=True)
class PredictionTerm(Term):
    """``L_pred``: KL of softened predictions times T^2; the soft cross-entropy less the teacher's
    entropy, which no student weight changes. ``divide_by_classes`` is the release's mean over
    classes."""

    temperature: float = 1.0
    scale_by_temperature: bool = True
    divide_by_classes: bool = False

    name = "prediction"
    needs = frozenset({"logits"})
    intermediate = False

    def rows(self, student, teacher, batch, projection):
        rows = loss.soft_kl(
            student.logits,
            teacher.logits,
            temperature=self.temperature,
            scale_by_temperature=self.scale_by_temperature,
            reduction="none",
            backend=self.backend,
        )
        return rows / student.logits.shape[-1] if self.divide_by_classes else rows


@dataclass(frozen=True)
class TransferTerm(Term):
    """``L_TKD = MSE(h_d^T(X), h_d^S(X) W_d)``: the student's own domain layer follows the
    meta-teacher's."""

    name = "transfer"
    needs = frozenset({"domain"})
    projected = "domain"

    def rows(self, student, teacher, batch, projection):
        return loss.hidden_mse(
            student.domain,
            teacher.domain,
            projection=projection,
            reduction="none",
            backend=self.backend,
        )


@dataclass(frozen=True)
class HardLabelTerm(Term):
    """Cross-entropy with the gold label; stands outside the lambda-weighted sum."""

    by_expertise: bool = False

    name = "hard_label"
    needs = frozenset({"logits"})
    intermediate = False

    def rows(self, student, teacher, batch, projection):
        return F.cross_entropy(student.logits.float(), batch["labels"], reduction="none")


def build_terms(
    config: DistillConfig, *, student_layers: int, teacher_layers: int, recipe: Recipe = PAPER
) -> list[Term]:
    """The terms of ``config.method``, less those of weight 0.

    The baselines of the paper's tables are selections from the same terms: ``logits_kd`` and
    ``mtn_kd`` keep the prediction, ``tinybert_kd`` everything but L_TKD and lambda, ``minilmv2``
    relations and prediction.

    Raises:
        ValueError: the layers cannot be mapped, or no term is left.
    """
    weights = config.terms
    prediction = PredictionTerm(
        weights.prediction,
        recipe.expertise_on_prediction_stage or config.schedule == "joint",
        temperature=config.temperature if recipe.classical_prediction else 1.0,
        scale_by_temperature=config.scale_by_temperature,
        divide_by_classes=not recipe.classical_prediction,
    )
    if config.method == "finetune":
        return [HardLabelTerm(1.0)]
    terms: list[Term] = []
    if config.method in ("tinybert_kd", "meta"):
        layers = tuple(layer_map(config.layer_map, student_layers, teacher_layers))
        terms += [
            EmbeddingTerm(weights.embedding),
            HiddenTerm(weights.hidden, layers=layers),
            AttentionTerm(
                weights.attention,
                layers=layers,
                form=config.attention,
                mean_over=recipe.attention_mean,
            ),
        ]
    if config.method == "meta":
        terms.append(TransferTerm(config.gamma2, recipe.expertise_on_transfer))
    if config.method == "minilmv2":
        terms.append(RelationTerm(weights.attention, heads=config.relation_heads))
    terms += [prediction, HardLabelTerm(weights.hard_label)]
    kept = [replace(term, backend=config.backend) for term in terms if term.weight > 0]
    if not kept:
        raise ValueError(f"terms: every weight that {config.method} has is 0")
    return kept


def check_widths(terms: Sequence[Term], student: int, teacher: int | None) -> None:
    """Can these terms compare hidden states of these widths? Projected ones can compare any.

    Raises:
        ValueError: a width does not split into the relation heads.
    """
    for term in terms:
        if isinstance(term, RelationTerm) and (student % term.heads or teacher % term.heads):
            raise ValueError(
                f"relation_heads: {term.heads} must divide the student's width {student} "
                f"and the teacher's {teacher}"
            )


class Distillation(nn.Module):
    """A student under training, with the projections and domain layer that only training needs.

    Args:
        student: sequence classifier; the only part that is saved.
        terms: what to minimise.
        teacher_hidden: H of the teacher; projections exist only where the student's differs.
        num_domains: K.
        weigh_by_expertise: multiply terms by lambda_i (meta-distillation); otherwise lambda is 1.
        recipe: paper or released form.
        packed: run the student's layers on real tokens only.

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
        weigh_by_expertise: bool = False,
        recipe: Recipe = PAPER,
        packed: bool = False,
    ):
        super().__init__()
        check_packed(packed, recipe)
        self.packed = packed
        self.student = student
        self.terms = list(terms)
        self.weigh_by_expertise = weigh_by_expertise
        self.recipe = recipe
        self.needs = frozenset().union(*(term.needs for term in self.terms))
        hidden = student.config.hidden_size
        check_widths(self.terms, hidden, teacher_hidden)
        self.projections = nn.ParameterDict()
        if teacher_hidden is not None and teacher_hidden != hidden:
            for name in sorted({self._projection_name(term) for term in self.terms} - {None}):
                self.projections[name] = nn.Parameter(torch.empty(hidden, teacher_hidden))
                nn.init.normal_(self.projections[name], std=hidden**-0.5)
        if "domain" in self.needs:
            self.domain_layer = DomainLayer(hidden, num_domains, recipe.tanh_on_transfer)
        self._taps = self._tap()

    def _projection_name(self, term: Term) -> str | None:
        return "shared" if term.projected and self.recipe.shared_projection else term.projected

    def _tap(self) -> Taps:
        needs = self.needs - {"logits", "domain"} | (
            {"last_hidden"} if "domain" in self.needs else set()
        )
        return Taps(self.student, needs, self.packed)

    def restrict(self, terms: Sequence[Term]) -> None:
        """Train only these terms from now on (a stage of two): features of the others are no longer
        collected."""
        self._taps.remove()
        self.terms = list(terms)
        self.needs = frozenset().union(*(term.needs for term in self.terms))
        self._taps = self._tap()

    def detach(self) -> PreTrainedModel:
        """The student alone, without taps, as it was handed in."""
        self._taps.remove()
        return self.student

    def forward(self, batch: Batch, taught: Features | None = None) -> StepOutput:
        """Losses of one batch.

        Args:
            batch: model inputs, labels [B], domain [B], and t [B] where lambda is used.
            taught: the teacher's features; None for a method without teacher.
        """
        seen = self._taps(batch)
        if taught is not None:
            taught.arrive()
        if "domain" in self.needs:
            seen.domain = self.domain_layer(pool(seen, self.recipe.pooling), batch["domain"])
        expertise = None
        if self.weigh_by_expertise:
            expertise = loss.domain_expertise(taught.logits, batch["labels"], batch["t"])
        total = torch.zeros(len(seen.mask), device=seen.mask.device)
        logged = {}
        for term in self.terms:
            name = self._projection_name(term)
            projection = self.projections.get(name)
            rows = term.rows(seen, taught, batch, projection)
            weighted = term.weight * rows
            if expertise is not None and term.by_expertise:
                weighted = expertise.to(rows.dtype) * weighted
            total = total + weighted
            logged[term.name] = rows.detach().mean()
            logged[f"{term.name}_weighted"] = weighted.detach().mean()
        if expertise is not None:
            logged["expertise"] = expertise.mean()
            logged["expertise_std"] = expertise.std(correction=0)
            logged["expertise_histogram"] = _histogram(expertise)
        return StepOutput(total, logged)


EXPERTISE_BINS = 40
"""Bins of equal width over [0, 1], where lambda lies for scores t in [-1, 1]; what rescaled scores
push beyond falls into the first and the last."""


def _histogram(expertise: Tensor) -> Tensor:
    """Share of the examples in each bin, without waiting for the device."""
    number = (expertise * EXPERTISE_BINS).long().clamp(0, EXPERTISE_BINS - 1)
    bins = torch.arange(EXPERTISE_BINS, device=expertise.device)
    return (number[:, None] == bins).float().mean(0)  # [EXPERTISE_BINS]
