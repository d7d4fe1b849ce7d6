"""Attribution distillation: a student's answer should hang on the tokens that its teacher's does.

A token's score is the norm of integrated gradients at the input of the first layer, from a baseline
of zeros. In the m steps of a right Riemann sum,

    IG_i = E_i * 1/m sum_{k=1..m} dF(k/m E) / dE_i,    a_i = ||IG_i||,    F = -log p_c,

and the loss compares the scores of a text, which have the norm 1 then. Reading this module imports
no torch: it is part of the table of methods.

Sizes: B batch, L length, H hidden width, M classes, V views (functions F that are attributed).

Source: Wu et al. 2023, *AD-KD: Attribution-Driven Knowledge Distillation* (arXiv 2305.10010);
Sundararajan et al. 2017 (arXiv 1703.01365) for integrated gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metakd.method.tasks import SINGLE_LABEL, Task
from metakd.method.terms import Term

if TYPE_CHECKING:
    from torch import Tensor

    from metakd.models.taps import Features

CLASSES = "classes"


@dataclass(frozen=True)
class Attribution:
    """How the tokens of a text are scored.

    Args:
        steps: m; one step is gradient times input.
        top: how many of a teacher's H products of a token count, the largest; None: all. Of a
            student all do.
        views: ``label``, one function, the task's loss with the label; ``classes``, -log p of each
            class, for which no label has to be known.
        task: what labels mean.
    """

    steps: int = 1
    top: int | None = None
    views: str = "label"
    task: Task = SINGLE_LABEL

    def __str__(self) -> str:
        """What a file of such scores is called."""
        return f"{self.views}-m{self.steps}" + ("" if self.top is None else f"-top{self.top}")

    @property
    def reads_labels(self) -> bool:
        """Would other labels give other scores?"""
        return self.views != CLASSES

    def count(self, outputs: int) -> int:
        """V, of a model with so many outputs."""
        return outputs if self.views == CLASSES else 1

    def attributed(self, logits: Tensor, labels: Tensor) -> Tensor:
        """F [B, V] of logits [B, M] and labels [B]."""
        from torch import arange, inf
        from torch.nn.functional import softplus

        if not self.task.one_class:
            return self.task.loss(logits, labels)[:, None]
        # -log p_c as a function of the margin: p - 1 of a text that the model is sure of would have
        # few digits, and point elsewhere.
        classes = arange(logits.shape[-1], device=logits.device)
        own = classes == (classes[:, None] if self.views == CLASSES else labels[:, None, None])
        logits = _exact(logits)[:, None]  # [B, 1, M] beside own, [V, M] or [B, 1, M]
        others = logits.masked_fill(own, -inf).logsumexp(-1)
        return softplus(others - logits.where(own, 0.0).sum(-1))

    def scores(
        self,
        seen: Features,
        show: Callable[[Tensor], Features],
        labels: Tensor,
        *,
        is_student: bool,
    ) -> Tensor:
        """Scores [B, L, V] in at least fp32, zero at padding.

        Args:
            seen: of the texts, with the graph that leads from ``embedding`` to ``logits``.
            show: the same with this [B, L, H] in place of the embedding.
            labels: [B], all known.
            is_student: keep the graph of the scores, and all products; else the ``top`` ones.
        """
        from torch import stack
        from torch.autograd import grad

        slopes: list[Tensor] = []
        for step in range(1, self.steps + 1):
            is_whole = step == self.steps  # the right end of the line is the text itself
            shown = seen if is_whole else show(seen.embedding * (step / self.steps))
            values = self.attributed(shown.logits, labels).sum(0)  # [V]; texts do not mix
            # View after view: all at once, by a batched backward or repeated texts, took longer.
            found = [
                grad(value, shown.embedding, retain_graph=True, create_graph=is_student)[0]
                for value in values
            ]
            slopes = [a + b for a, b in zip(slopes, found)] if slopes else found
        scores = []
        for slope in slopes:
            products = _exact(seen.embedding) * _exact(slope) / self.steps
            if self.top is not None and not is_student:
                products = products.abs().topk(self.top, dim=-1).values
            scores.append(products.norm(dim=-1))
        return stack(scores, -1) * seen.mask[..., None]


def _exact(values: Tensor) -> Tensor:
    from torch import float32, promote_types

    return values.to(promote_types(values.dtype, float32))


@dataclass(frozen=True)
class AttributionTerm(Term):
    """``L_attr = sum_v sum_i (a^S_vi / ||a^S_v|| - a^T_vi / ||a^T_v||)^2``, over views v and real
    tokens i. A teacher whose scores of a text are all zero says nothing of it. The released code
    has the mean over the tokens of all texts in place of the sum over those of each."""

    attribution: Attribution = Attribution()

    name = "attribution"
    needs = frozenset({"attribution", "logits"})
    listens_to = ("attribution_steps", "attribution_top", "attribution_views")
    intermediate = False  # what an untrained head's answer hangs on is nothing to learn
    second_order = True

    @classmethod
    def configured(cls, weight, config, setup):
        task, views = setup.task, config.attribution_views
        if task.softens and not task.one_class:
            raise ValueError("attribution: a text must have one class, or a number")
        if views == CLASSES and not task.one_class:
            raise ValueError(
                "attribution_views: classes needs texts of one class each; use label, whose view "
                "is the squared error"
            )
        how = Attribution(config.attribution_steps, config.attribution_top, views, task)
        return cls(weight, backend=config.backend, attribution=how)

    def check_widths(self, student, teacher):
        top = self.attribution.top
        if top is not None and teacher is not None and top > teacher:
            raise ValueError(f"attribution_top: {top} is more than the teacher's width {teacher}")

    def rows(self, student, teacher, batch, projection):
        from torch.nn.functional import normalize

        # A model that is sure has small gradients, of which no more is lost than there is.
        sides = (student.attribution, teacher.attribution)
        own, taught = (normalize(scores, dim=1, eps=1e-20) for scores in sides)
        gaps = (own - taught).square().sum(1)  # [B, V]
        return gaps.where(taught.any(1), 0.0).sum(-1)
