"""The terms that objectives are made of: one dataclass each.

A term declares the features it ``needs``, so that models collect no more, and returns one value per
example: lambda multiplies rows, never a mean. Here too is ``layer_map``, which pairs student layers
with teacher layers. Reading this module imports no torch: configurations are checked against the
table of methods, and so against these terms, in well under a second.

Sizes: B batch, L length, H hidden width, A heads, M classes.

Source: Meta-KD section 3.3, equations 6-11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import metakd
from metakd.method.recipe import PAPER, Recipe
from metakd.method.tasks import SINGLE_LABEL, Task

if TYPE_CHECKING:
    from torch import Tensor

    from metakd.config import DistillConfig
    from metakd.models.taps import Features, Span

    Batch = dict[str, Tensor]


ANSWERS = frozenset({"logits", "votes"})
"""Features that say what a text is, by the mean of all teachers and by each of them."""


class Setup(NamedTuple):
    """What a term is told of the models, of the form of the method and of the labels."""

    student_layers: int
    teacher_layers: int
    recipe: Recipe = PAPER
    task: Task = SINGLE_LABEL
    # What each layer of student and teacher attends to; without, everything.
    spans: Callable[[], tuple[Sequence[Span], Sequence[Span]]] = lambda: ((), ())


@dataclass(frozen=True)
class Term:
    """One summand of the objective.

    ``rows`` takes the student's and the teacher's features, the batch and the projection [H_s, H_t]
    of ``projected`` (None where widths are equal), and returns one loss per example [B].
    """

    weight: float = 1.0
    by_expertise: bool = True  # multiplied by lambda where the method has one
    backend: str = "auto"  # of the losses, see metakd.functional
    scales: Sequence[float] = ()  # by which each layer's loss is divided; none: by nothing

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    listens_to: ClassVar[tuple[str, ...]] = ()  # keys of ``distill`` beside its weight
    projected: ClassVar[str | None] = None
    first_layer: ClassVar[int | None] = None  # of the student, 0 its embedding, if split by layer
    intermediate: ClassVar[bool] = True  # trained in the first of two stages
    needs_label: ClassVar[bool] = False  # an example without one adds nothing to it
    of_predictions: ClassVar[bool] = False  # learns what its teacher's logits are in the end
    second_order: ClassVar[bool] = False  # are gradients taken through gradients of the student?
    # What both layers of each pair attend to; none: everything.
    spans = ()  # type: Sequence[Span]
    # Of the teacher that it reads; negative: from the top. An annotation would make it a field of
    # every term, and ClassVar would forbid one, which it is in those that are told their layers.
    layers = ()  # type: Sequence[int]
    attribution = None  # an ``attribution.Attribution`` where tokens are scored

    @classmethod
    def configured(cls, weight: float, config: DistillConfig, setup: Setup) -> Self:
        """The term as a configuration wants it.

        Raises:
            ValueError: the models cannot be paired as it says.
        """
        return cls(weight, backend=config.backend)

    @property
    def compares_tokens(self) -> bool:
        """Must student and teacher read the same tokens?"""
        return bool(self.needs - ANSWERS - {"domain"})

    def by_layer(self) -> list[Self]:
        """Terms of one layer each whose sum it is."""
        return [self]

    @property
    def remark(self) -> str | None:
        """What a person should know of it, given these models."""
        return None

    def check_widths(self, student: int, teacher: int | None) -> None:
        """Can it compare hidden states of these widths? Projected ones compare any.

        Raises:
            ValueError: it cannot.
        """

    def softened(self, temperature: float) -> Self:
        """The same at this temperature, where it listens to one."""
        return self

    def rows(
        self, student: Features, teacher: Features, batch: Batch, projection: Tensor | None
    ) -> Tensor:
        """One loss per example [B]."""
        raise NotImplementedError

    def _sum(
        self, compare: Callable[..., Tensor], student: Sequence, teacher: Sequence, **options
    ) -> Tensor:
        """The losses [B] of pairs of layers, each divided by its scale, summed."""
        if not self.scales:
            return compare(student, teacher, **options)
        pairs = zip(student, teacher, self.scales, strict=True)
        rows = [compare([own], [taught], **options) / scale for own, taught, scale in pairs]
        return sum(rows[1:], rows[0])


@dataclass(frozen=True)
class EmbeddingTerm(Term):
    """``L_embd = MSE(E_S W_e, E_T)``."""

    name = "embedding"
    needs = frozenset({"embedding"})
    projected = "embedding"
    first_layer = 0

    def rows(self, student, teacher, batch, projection):
        return self._sum(
            metakd.hidden_mse,
            [student.embedding],
            [teacher.embedding],
            projection=projection,
            mask=student.mask,
            reduction="none",
            backend=self.backend,
        )


@dataclass(frozen=True)
class HiddenTerm(Term):
    """``L_hidn = sum_l MSE(H_S^l W_h, H_T^g(l))``, or 1 less the cosine between them, the mean over
    tokens (Sanh et al. 2019, *DistilBERT*, arXiv 1910.01108, section 2)."""

    layers: Sequence[int] = ()  # g(l), 0-based
    form: str = "mse"

    name = "hidden"
    needs = frozenset({"hidden"})
    listens_to = ("layer_map", "hidden")
    projected = "hidden"
    first_layer = 1

    @classmethod
    def configured(cls, weight, config, setup):
        layers = layer_map(config.layer_map, setup.student_layers, setup.teacher_layers)
        return cls(weight, backend=config.backend, layers=tuple(layers), form=config.hidden)

    def by_layer(self):
        return [
            replace(self, layers=(layer,), scales=self.scales[number : number + 1])
            for number, layer in enumerate(self.layers)
        ]

    def rows(self, student, teacher, batch, projection):
        matched = [teacher.hidden[layer] for layer in self.layers]
        return self._sum(
            {"mse": metakd.hidden_mse, "cosine": _cosine_gap}[self.form],
            student.hidden,
            matched,
            projection=projection,
            mask=student.mask,
            reduction="none",
            backend=self.backend,
        )


def _cosine_gap(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    projection: Tensor | None,
    mask: Tensor,
    reduction: str,
    backend: str,
) -> Tensor:
    """Layers of [B, L, H_s] and [B, L, H_t] to rows [B]; eager on every backend."""
    from torch.nn.functional import cosine_similarity

    real = mask.float()
    rows = []
    for own, taught in zip(student, teacher, strict=True):
        own = own if projection is None else own @ projection.to(own.dtype)
        gap = 1 - cosine_similarity(own.float(), taught.float(), dim=-1)
        rows.append((gap * real).sum(1) / real.sum(1).clamp(min=1))
    return sum(rows[1:], rows[0])


@dataclass(frozen=True)
class AttentionTerm(Term):
    """``L_attn = sum_l MSE(A_S^l, A_T^g(l))`` on pre-softmax scores, or MSE or KL of the
    probabilities, over pairs of tokens that both layers attend to."""

    layers: Sequence[int] = ()  # g(l), 0-based
    form: str = "scores"
    mean_over: str = "real"
    spans: Sequence[Span] = ()
    remark: str | None = None

    name = "attention"
    needs = frozenset({"query", "key"})
    listens_to = ("layer_map", "attention")
    first_layer = 1

    @classmethod
    def configured(cls, weight, config, setup):
        layers = layer_map(config.layer_map, setup.student_layers, setup.teacher_layers)
        student, teacher = setup.spans()
        pairs = list(zip(student, (teacher[layer] for layer in layers))) if teacher else []
        apart = [number for number, (own, taught) in enumerate(pairs) if own != taught]
        return cls(
            weight,
            backend=config.backend,
            layers=tuple(layers),
            form=config.attention,
            mean_over=setup.recipe.attention_mean,
            spans=tuple(_both_see(*pair) for pair in pairs),
            remark=_apart(apart, pairs, layers) if apart else None,
        )

    def by_layer(self):
        return [
            replace(
                self,
                layers=(layer,),
                scales=self.scales[number : number + 1],
                spans=self.spans[number : number + 1],
            )
            for number, layer in enumerate(self.layers)
        ]

    def rows(self, student, teacher, batch, projection):
        compare = {
            "scores": metakd.attention_score_mse,
            "probabilities": metakd.attention_prob_mse,
            "kl": metakd.attention_kl,
        }[self.form]
        options = {"key_mask": student.mask, "reduction": "none", "backend": self.backend}
        # The release masked keys only and divided by L x L.
        if self.mean_over == "all":
            options["mean_over"] = "all"
        else:
            options["query_mask"] = student.mask
        own = list(zip(student.query, student.key))
        matched = [(teacher.query[layer], teacher.key[layer]) for layer in self.layers]
        spans = self.spans or [(False, None)] * len(own)
        rows = []
        for causal, window in dict.fromkeys(spans):  # most models have one
            chosen = [number for number, span in enumerate(spans) if span == (causal, window)]
            part = replace(self, scales=[self.scales[n] for n in chosen] if self.scales else ())
            pairs = [own[n] for n in chosen], [matched[n] for n in chosen]
            rows.append(part._sum(compare, *pairs, causal=causal, window=window, **options))
        return sum(rows[1:], rows[0])


def _both_see(own: Span, taught: Span) -> Span:
    windows = [span.window for span in (own, taught) if span.window is not None]
    return own._replace(causal=own.causal or taught.causal, window=min(windows, default=None))


def _apart(numbers: Sequence[int], pairs: Sequence, layers: Sequence[int]) -> str:
    listed = ", ".join(
        f"{n} ({_said(pairs[n][0])}) with the teacher's {layers[n]} ({_said(pairs[n][1])})"
        for n in numbers
    )
    return (
        f"attention: layers that attend differently are matched: {listed}; pairs of tokens that "
        "both see are compared"
    )


def _said(span: Span) -> str:
    window = "all tokens" if span.window is None else f"{span.window} tokens to each side"
    return window + (", not those after" if span.causal else "")


@dataclass(frozen=True)
class RelationTerm(Term):
    """MiniLMv2: KL between Q-Q, K-K and V-V relations of the last layers. Source: Wang et al. 2021,
    equations 4-7."""

    heads: int = 12

    name = "relation"
    needs = frozenset({"query", "key", "value"})
    listens_to = ("relation_heads",)
    layers = (-1,)

    @classmethod
    def configured(cls, weight, config, setup):
        return cls(weight, backend=config.backend, heads=config.relation_heads)

    def check_widths(self, student, teacher):
        if student % self.heads or teacher % self.heads:
            raise ValueError(
                f"relation_heads: {self.heads} must divide the student's width {student} "
                f"and the teacher's {teacher}"
            )

    def rows(self, student, teacher, batch, projection):
        last = [(seen.query[-1], seen.key[-1], seen.value[-1]) for seen in (student, teacher)]
        [scale] = self.scales or (1.0,)
        rows = metakd.relation_kl(
            *last,
            relation_heads=self.heads,
            mask=student.mask,
            reduction="none",
            backend=self.backend,
        )
        return rows / scale


@dataclass(frozen=True)
class PredictionTerm(Term):
    """``L_pred``: KL of softened predictions times T^2; the soft cross-entropy less the teacher's
    entropy, which no student weight changes. Of texts with several classes it is the mean of the
    KL of each (Yang et al. 2023, *Multi-Label Knowledge Distillation*, arXiv 2308.06453, equation
    3, has the sum), of numbers the squared difference. ``divide_by_classes`` is the release's mean
    over classes."""

    task: Task = SINGLE_LABEL
    temperature: float = 1.0
    scale_by_temperature: bool = True
    divide_by_classes: bool = False

    name = "prediction"
    needs = frozenset({"logits"})
    listens_to: ClassVar[tuple[str, ...]] = ("temperature", "scale_by_temperature")
    intermediate = False
    of_predictions = True

    @classmethod
    def configured(cls, weight, config, setup):
        recipe = setup.recipe
        return cls(
            weight,
            recipe.expertise_on_prediction_stage or config.schedule == "joint",
            config.backend,
            task=setup.task,
            temperature=config.temperature if recipe.classical_prediction else 1.0,
            scale_by_temperature=config.scale_by_temperature,
            divide_by_classes=not recipe.classical_prediction,
        )

    def softened(self, temperature):
        return replace(self, temperature=temperature)

    def rows(self, student, teacher, batch, projection):
        rows = self._divergence(
            student,
            teacher,
            temperature=self.temperature,
            scale_by_temperature=self.scale_by_temperature,
        )
        return rows / student.logits.shape[-1] if self.divide_by_classes else rows

    def _divergence(self, student, teacher, **options):
        given = student.logits, teacher.logits
        return self.task.divergence(*given, backend=self.backend, **options)


@dataclass(frozen=True)
class DecoupledTerm(PredictionTerm):
    """``L_DKD = TCKD + beta NCKD``, times T^2: the KL of the target class against all others, and
    that within the others, which the plain KL weights by what the teacher leaves them, 1 - p_t. The
    target is the label, or the teacher's choice where there is none. Of two classes it is the plain
    KL: there is nothing within the other. Source: Zhao et al. 2022, *Decoupled Knowledge
    Distillation* (arXiv 2203.08679), equation 7, alpha being the weight."""

    non_target: float = 8.0

    name = "decoupled"
    listens_to = ("non_target", "temperature", "scale_by_temperature")

    @classmethod
    def configured(cls, weight, config, setup):
        if not setup.task.one_class:
            raise ValueError("decoupled: a text must have one class, which is the target")
        return replace(super().configured(weight, config, setup), non_target=config.non_target)

    def rows(self, student, teacher, batch, projection):
        from torch import arange, cat

        target = self.task.presumed(batch["labels"], teacher.logits)[:, None]
        rest = arange(student.logits.shape[-1] - 1, device=target.device)
        rest = rest + (rest >= target)  # [B, M - 1], the classes that are not the target

        def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
            logits = logits.float() / self.temperature
            others = logits.gather(1, rest)
            return cat([logits.gather(1, target), others.logsumexp(1, keepdim=True)], 1), others

        (binary, others), (taught, taught_others) = parts(student.logits), parts(teacher.logits)
        rows = metakd.soft_kl(binary, taught, reduction="none", backend=self.backend)
        if others.shape[-1] > 1:
            within = metakd.soft_kl(others, taught_others, reduction="none", backend=self.backend)
            rows = rows + self.non_target * within
        return rows * self.temperature**2 if self.scale_by_temperature else rows


@dataclass(frozen=True)
class GatedTerm(PredictionTerm):
    """``KL(sum_m a_m p_m || p_S) - beta H(a)``, the first times T^2: the student follows a mixture
    of its teachers' softened predictions, of which a gate gives each its share a_m by the text
    (``gate.Gate``). It is trained by this loss, and so listens to whom the student can follow; the
    entropy keeps it from listening to one alone. Source: Haase, da Silva, *HPM-KD* (arXiv
    2512.09886)."""

    entropy: float = 0.1

    name = "gated"
    needs = frozenset({"votes"})
    listens_to = ("gate_entropy", "gate_dropout", "temperature", "scale_by_temperature")

    @classmethod
    def configured(cls, weight, config, setup):
        if not setup.task.softens:
            raise ValueError(
                f"gated: {setup.task.name} has no probabilities to mix; a method that takes the "
                "mean of several teachers takes numbers too"
            )
        return replace(super().configured(weight, config, setup), entropy=config.gate_entropy)

    def rows(self, student, teacher, batch, projection):
        from metakd.method.gate import entropy

        rows = super().rows(student, teacher, batch, projection)
        return rows - self.entropy * entropy(student.gate)

    def _divergence(self, student, teacher, **options):
        from metakd.method.gate import mixture_divergence

        given = student.logits, teacher.votes, student.gate
        return mixture_divergence(self.task, *given, **options)


@dataclass(frozen=True)
class TransferTerm(Term):
    """``L_TKD = MSE(h_d^T(X), h_d^S(X) W_d)``: the student's own domain layer follows the
    meta-teacher's."""

    name = "transfer"
    needs = frozenset({"domain"})
    projected = "domain"

    @classmethod
    def configured(cls, weight, config, setup):
        return cls(weight, setup.recipe.expertise_on_transfer, config.backend)

    def rows(self, student, teacher, batch, projection):
        return self._sum(
            metakd.hidden_mse,
            [student.domain],
            [teacher.domain],
            projection=projection,
            reduction="none",
            backend=self.backend,
        )


@dataclass(frozen=True)
class HardLabelTerm(Term):
    """The loss with the gold label; stands outside the lambda-weighted sum. A text without a label
    adds nothing."""

    by_expertise: bool = False
    task: Task = SINGLE_LABEL

    name = "hard_label"
    needs = frozenset({"logits"})
    intermediate = False
    needs_label = True

    @classmethod
    def configured(cls, weight, config, setup):
        return cls(weight, backend=config.backend, task=setup.task)

    def rows(self, student, teacher, batch, projection):
        return self.task.loss(student.logits, batch["labels"])


@dataclass(frozen=True)
class PseudoLabelTerm(HardLabelTerm):
    """The loss with the label, or where there is none with what the teacher says. Source: Lee 2013,
    *Pseudo-Label*."""

    name = "pseudo_label"
    needs_label = False
    of_predictions = True

    def rows(self, student, teacher, batch, projection):
        labels = self.task.presumed(batch["labels"], teacher.logits)
        return self.task.loss(student.logits, labels)


def layer_map(rule: str | Sequence[int], student_layers: int, teacher_layers: int) -> list[int]:
    """Teacher layer (0-based) for each student layer.

    Args:
        rule: ``uniform`` (12 -> 4 gives the 3rd, 6th, 9th and 12th), ``last`` (the top layers), or
            the list itself.
        student_layers: depth of the student.
        teacher_layers: depth of the teacher.

    Raises:
        ValueError: a list of the wrong length or out of range, or a student deeper than the
            teacher.

    Source: TinyBERT's g(l) (Jiao et al. 2020, section 3.1), used by Meta-KD section 3.3.
    """
    if not isinstance(rule, str):
        if len(rule) != student_layers:
            raise ValueError(
                f"layer_map: {len(rule)} entries for a student of {student_layers} layers"
            )
        if any(not 0 <= layer < teacher_layers for layer in rule):
            raise ValueError(
                f"layer_map: {list(rule)} names a layer outside 0..{teacher_layers - 1}"
            )
        return list(rule)
    if student_layers > teacher_layers:
        raise ValueError(
            f"layer_map: student has {student_layers} layers, teacher only {teacher_layers}"
        )
    if rule == "last":
        return list(range(teacher_layers - student_layers, teacher_layers))
    if rule == "uniform":
        return [
            (layer + 1) * teacher_layers // student_layers - 1 for layer in range(student_layers)
        ]
    raise ValueError(f"layer_map: {rule!r} is neither uniform, last nor a list")
