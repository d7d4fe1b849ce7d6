"""The kinds of task: what a label is and all that follows from it, one class each.

Losses, prototypes and lambda, scores, what is served: whoever needs one of them asks the task of
the corpus or, of a saved model, that of its ``problem_type``. How labels are written in files is
``data.labels``' to know. A new task is a class here, a line in ``TASKS``, and a reader there.
Reading this module imports no torch: configurations are checked against it.

Sizes: N or B examples, M outputs (one for each class; one for a number), C cells of prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import metakd

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

NO_LABEL = -1
"""In place of the class of a text that has none; where labels are numbers it is NaN."""

CONFUSION = "confusion/"
"""With a domain: how many examples of each class (row) were given each (column)."""

COUNTS = "counts/"
"""With a domain, of each class: how many texts were given it rightly and wrongly, and how many that
have it were not."""

RIGHT = "right/"
"""With a domain, a ``1`` or a ``0`` for each example in its order, whether it was answered
right."""

_BINS = 5  # of numbers, where examples are drawn so that all sizes are among them


class Prediction(NamedTuple):
    """The likeliest class of a text, and the probability that the model gives it."""

    label: str
    score: float

    def fields(self) -> dict[str, Any]:
        """As ``metakd predict`` writes it."""
        return {"prediction": self.label, "score": self.score}


class Labels(NamedTuple):
    """The classes that a text has with a probability of more than one half, and the probability of
    every class."""

    labels: tuple[str, ...]
    scores: dict[str, float]

    def fields(self) -> dict[str, Any]:
        """As ``metakd predict`` writes it."""
        return {"prediction": list(self.labels), "scores": self.scores}


class Value(NamedTuple):
    """The number that a model gives a text."""

    value: float

    def fields(self) -> dict[str, Any]:
        """As ``metakd predict`` writes it."""
        return {"prediction": self.value}


Answer = Prediction | Labels | Value


@dataclass(frozen=True)
class Task:
    """What labels mean.

    Args:
        spread: standard deviation of the labels, where they are numbers; losses are in units of it,
            so that they weigh the same whatever is measured.
    """

    spread: float = 1.0

    name: ClassVar[str]
    line: ClassVar[str]
    problem_type: ClassVar[str]
    """As transformers calls it in the configuration of a model."""
    metric: ClassVar[str]
    """The score that models are chosen by and compared with; the larger the better, at most 1."""
    metric_title: ClassVar[str]
    softens: ClassVar[bool] = True
    """Are there probabilities, which a temperature softens?"""
    takes_columns: ClassVar[bool] = False
    """May files have a column of labels for each class?"""
    one_class: ClassVar[bool] = False
    """Has each text one class, so that the probabilities of all sum to 1?"""

    def fitted(self, labels: Tensor) -> Self:
        """The same for a corpus with these labels [N, ...] in its train split."""
        return self

    # Labels

    def classes_of(self, label: Any) -> tuple[str, ...]:
        """The classes that a label names."""
        raise NotImplementedError

    def encode(self, labels: Sequence[Any], label2id: Mapping[str, int]) -> Tensor:
        """Labels of N texts as a tensor [N] or [N, M]; None is not known."""
        raise NotImplementedError

    def told(self, soft: Sequence[float], names: Sequence[str], border: float) -> Any:
        """The label that soft labels of these M classes come to; ``border`` is what they are of a
        class that is as likely as not."""
        raise NotImplementedError

    def logits_of(self, probabilities: Tensor, smallest: float) -> Tensor:
        """Logits [N, M] that give these probabilities, none taken for smaller than this, so that
        they are finite."""
        raise NotImplementedError

    def known(self, labels: Tensor) -> Tensor:
        """[N], False for texts without a label."""
        raise NotImplementedError

    def unknown(self, labels: Tensor) -> Tensor:
        """As many labels of which none is known."""
        raise NotImplementedError

    def strata(self, labels: Tensor) -> Tensor:
        """[N], groups of examples whose shares are kept where some are drawn."""
        raise NotImplementedError

    # Method

    def num_cells(self, outputs: int) -> int:
        """C, how many prototypes a domain has."""
        raise NotImplementedError

    def cells(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of each pair of an example and a cell that it belongs to both numbers, each [P]."""
        raise NotImplementedError

    def score_of(self, by_cell: Tensor, labels: Tensor) -> Tensor:
        """Scores t [B] of examples with these labels, of those that they would have in each cell
        [B, C]."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss [B] of logits [B, M] with the labels; 0 where there is none."""
        raise NotImplementedError

    def divergence(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        temperature: float = 1.0,
        scale_by_temperature: bool = True,
        backend: str = "auto",
    ) -> Tensor:
        """Loss [B] of a student's logits [B, M] with those of a teacher."""
        raise NotImplementedError

    def presumed(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels, what a teacher of these logits [B, M] says in place of those that are not
        known."""
        raise NotImplementedError

    def expertise(self, logits: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        """lambda [B] = (1 + t) / (exp(e^2) + 1), e the error of a teacher of these logits [B, M].

        Source: Meta-KD section 3.3, of whose e = 1 - p, p the probability of the gold class, this
        is the mean square over classes or the error of a number.
        """
        return (1 + t) / (self._squared_error(logits, labels).exp() + 1)

    def _squared_error(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    # Scores

    def score(self, labels: Tensor, logits: Tensor) -> float:
        """The ``metric`` of N examples on the CPU."""
        raise NotImplementedError

    def scores(self, labels: Tensor, logits: Tensor) -> dict[str, float]:
        """Every score of them."""
        return {self.metric: self.score(labels, logits), **self._more_scores(labels, logits)}

    def _more_scores(self, labels: Tensor, logits: Tensor) -> dict[str, float]:
        raise NotImplementedError

    def details(self, labels: Tensor, logits: Tensor, one_by_one: bool) -> dict[str, Any]:
        """What else is noted of a domain, by what comes before its name: ``CONFUSION``,
        ``COUNTS``, and if asked for ``RIGHT``."""
        return {}

    # Serving

    def answers(self, logits: np.ndarray, names: Sequence[str]) -> Sequence[Answer]:
        """What is said of N texts with logits [N, M]."""
        raise NotImplementedError

    def misfit(self, outputs: int) -> str:
        """What is wrong with a model of so many outputs; empty where nothing is."""
        return "one output, which tells no classes" if outputs < 2 else ""

    def alike(self, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """[N], of which texts two models with logits [N, M] say the same; never what is not
        finite."""
        import numpy as np

        return self._alike(found, wanted) & np.isfinite(found).all(1)

    def _alike(self, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class SingleLabel(Task):
    """One of M classes."""

    name = "single_label"
    line = "each text has one class"
    problem_type = "single_label_classification"
    metric = "accuracy"
    metric_title = "accuracy"
    one_class = True

    def classes_of(self, label):
        return (label,)

    def encode(self, labels, label2id):
        import torch

        return torch.tensor([label2id.get(label, NO_LABEL) for label in labels])

    def told(self, soft, names, border):
        return names[max(range(len(soft)), key=soft.__getitem__)]

    def logits_of(self, probabilities, smallest):
        # A temperature T makes p^(1/T) of them, scaled to sum to 1.
        return probabilities.clamp(min=smallest).log()

    def known(self, labels):
        return labels != NO_LABEL

    def unknown(self, labels):
        return labels.new_full(labels.shape, NO_LABEL)

    def strata(self, labels):
        return labels

    def num_cells(self, outputs):
        return outputs

    def cells(self, labels):
        import torch

        return torch.arange(len(labels)), labels

    def score_of(self, by_cell, labels):
        return by_cell.gather(1, labels[:, None])[:, 0]

    def loss(self, logits, labels):
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits.float(), labels, reduction="none", ignore_index=NO_LABEL)

    def divergence(self, student, teacher, **options):
        return metakd.soft_kl(student, teacher, reduction="none", **options)

    def presumed(self, labels, logits):
        return logits.argmax(-1).where(labels == NO_LABEL, labels)

    def expertise(self, logits, labels, t):
        return metakd.domain_expertise(logits, labels, t)

    def score(self, labels, logits):
        return (logits.argmax(-1) == labels).double().mean().item()

    def _more_scores(self, labels, logits):
        from sklearn.metrics import f1_score

        answers = logits.argmax(-1)
        return {"macro_f1": float(f1_score(labels.numpy(), answers.numpy(), average="macro"))}

    def details(self, labels, logits, one_by_one):
        from sklearn.metrics import confusion_matrix

        answers = logits.argmax(-1)
        counts = confusion_matrix(labels, answers, labels=range(logits.shape[1]))
        found = {CONFUSION: counts.tolist()}
        if one_by_one:
            found[RIGHT] = "".join("01"[right] for right in (answers == labels).int().tolist())
        return found

    def answers(self, logits, names):
        import numpy as np

        odds = np.exp(logits - logits.max(1, keepdims=True, initial=-np.inf))
        best = odds.argmax(1) if len(odds) else []
        return [
            Prediction(names[number], float(row[number] / row.sum()))
            for number, row in zip(best, odds)
        ]

    def _alike(self, found, wanted):
        return found.argmax(1) == wanted.argmax(1)


class MultiLabel(Task):
    """Any number of M classes, each for itself. Labels [N, M] are 0 or 1.

    A text is in the cell of each of its classes, or in one more if it has none; its score t is the
    mean over them.
    """

    name = "multi_label"
    line = "each text has any number of classes, or none"
    problem_type = "multi_label_classification"
    metric = "micro_f1"
    metric_title = "micro-F1"
    takes_columns = True

    def classes_of(self, label):
        return label

    def encode(self, labels, label2id):
        import torch

        found = torch.zeros(len(labels), len(label2id))
        for row, names in zip(found, labels):
            if names is None:
                row.fill_(torch.nan)
            else:
                row[[label2id[name] for name in names]] = 1.0
        return found

    def told(self, soft, names, border):
        return tuple(sorted(name for name, value in zip(names, soft) if value > border))

    def logits_of(self, probabilities, smallest):
        return probabilities.clamp(smallest, 1 - smallest).logit()

    def known(self, labels):
        return ~labels.isnan().any(-1)

    def unknown(self, labels):
        import torch

        return torch.full_like(labels, torch.nan)

    def strata(self, labels):
        # The rarest class of each text, so that every class keeps a share.
        positive = labels > 0.5
        often = positive.sum(0)
        rarity = often.max() + 1 - often  # the larger the rarer
        rarest = (positive * rarity).argmax(-1)
        return rarest.where(positive.any(-1), labels.shape[1])

    def num_cells(self, outputs):
        return outputs + 1

    def _memberships(self, labels: Tensor) -> Tensor:
        """[N, C], which cells a text is in."""
        import torch

        positive = labels > 0.5
        return torch.cat([positive, ~positive.any(-1, keepdim=True)], -1)

    def cells(self, labels):
        return self._memberships(labels).nonzero(as_tuple=True)

    def score_of(self, by_cell, labels):
        shares = self._memberships(labels).to(by_cell)
        return (by_cell * shares).sum(-1) / shares.sum(-1)

    def loss(self, logits, labels):
        from torch.nn.functional import binary_cross_entropy_with_logits

        known = self.known(labels)
        targets = labels.nan_to_num()
        rows = binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(-1)
        return rows.where(known, 0.0)

    def divergence(self, student, teacher, **options):
        return metakd.sigmoid_kl(student, teacher, reduction="none", **options)

    def presumed(self, labels, logits):
        said = (logits > 0).to(labels.dtype)
        return said.where(~self.known(labels)[:, None], labels)

    def _squared_error(self, logits, labels):
        return (labels - logits.float().sigmoid()).square().mean(-1)

    def score(self, labels, logits):
        return float(_f1(*(each.sum() for each in _counts(*_decided(labels, logits)))))

    def _more_scores(self, labels, logits):
        from sklearn.metrics import average_precision_score

        gold, found = _decided(labels, logits)
        ranks = logits.nan_to_num().numpy()
        precision = [
            average_precision_score(gold[:, number], ranks[:, number])
            for number in gold.any(0).nonzero()[0]
        ]
        return {
            "macro_f1": float(_f1(*_counts(gold, found)).mean()),
            "mean_average_precision": float(sum(precision) / max(len(precision), 1)),
            "exact_match": float((gold == found).all(1).mean()),
        }

    def details(self, labels, logits, one_by_one):
        counts = _counts(*_decided(labels, logits))
        return {COUNTS: [list(of_class) for of_class in zip(*(c.tolist() for c in counts))]}

    def misfit(self, outputs):
        return "no outputs" if outputs < 1 else ""

    def answers(self, logits, names):
        import numpy as np

        chances = np.exp(-np.logaddexp(0.0, -logits))
        return [
            Labels(
                tuple(name for name, value in zip(names, row) if value > 0),
                dict(zip(names, map(float, chance))),
            )
            for row, chance in zip(logits, chances)
        ]

    def _alike(self, found, wanted):
        return ((found > 0) == (wanted > 0)).all(1)


class Regression(Task):
    """A number. Labels [N] are floats; there is one output and one cell, for numbers have no
    classes that a text could be typical of."""

    name = "regression"
    line = "each text has a number"
    problem_type = "regression"
    metric = "pearson"
    metric_title = "Pearson correlation"
    softens = False

    _CLOSE = 0.1  # of the spread of the answers, within which two count as the same
    _OF_SIZE, _LEAST = 0.1, 0.01  # of their size, or in all: a spread that few answers have as well

    def classes_of(self, label):
        return ()

    def fitted(self, labels):
        spread = labels.double().std(correction=0).item()
        return replace(self, spread=spread if spread > 0 else 1.0)

    def encode(self, labels, label2id):
        import torch

        return torch.tensor([math.nan if label is None else label for label in labels])

    def known(self, labels):
        return ~labels.isnan()

    def unknown(self, labels):
        import torch

        return torch.full_like(labels, torch.nan)

    def strata(self, labels):
        import torch

        # By rank: values that occur often stay together.
        values = labels.double().contiguous()
        shares = torch.linspace(0, 1, _BINS + 1, dtype=torch.double)[1:-1]
        edges = values.nanquantile(shares) if len(values) else shares
        return torch.bucketize(values, edges)

    def num_cells(self, outputs):
        return 1

    def cells(self, labels):
        import torch

        return torch.arange(len(labels)), torch.zeros(len(labels), dtype=torch.long)

    def score_of(self, by_cell, labels):
        return by_cell[:, 0]

    def loss(self, logits, labels):
        errors = self._squared_error(logits, labels.nan_to_num())
        return errors.where(self.known(labels), 0.0)

    def divergence(self, student, teacher, **options):
        return self._squared_error(student, teacher[..., 0].float())

    def presumed(self, labels, logits):
        return logits[:, 0].to(labels.dtype).where(labels.isnan(), labels)

    def _squared_error(self, logits, labels):
        return ((logits[..., 0].float() - labels) / self.spread).square()

    def score(self, labels, logits):
        return _correlation(*_numbers(labels, logits))

    def _more_scores(self, labels, logits):
        from scipy.stats import rankdata

        gold, found = _numbers(labels, logits)
        error, variance = float(((found - gold) ** 2).mean()), float(gold.var())
        scores = {"spearman": _correlation(rankdata(gold), rankdata(found)), "mse": error}
        # Of numbers that are all the same no mean could be further away.
        return scores | ({"r2": 1.0 - error / variance} if variance > 0 else {})

    def misfit(self, outputs):
        return f"{outputs} outputs for one number" if outputs != 1 else ""

    def answers(self, logits, names):
        return [Value(float(value)) for value in logits[:, 0]]

    def _alike(self, found, wanted):
        wide = float(max(wanted.std(), self._OF_SIZE * abs(wanted).mean(), self._LEAST))
        return abs(found - wanted)[:, 0] <= self._CLOSE * wide


def _decided(labels: Tensor, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Which classes N texts have, and which they are given, [N, M]."""
    return labels.numpy() > 0.5, logits.numpy() > 0


def _counts(gold: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class [M] how many of N texts were given it rightly and wrongly, and how many that
    have it were not, from [N, M]."""
    return (gold & found).sum(0), (~gold & found).sum(0), (gold & ~found).sum(0)


def _f1(right: np.ndarray, wrong: np.ndarray, missed: np.ndarray) -> np.ndarray:
    """0 where nothing was wanted and nothing given."""
    import numpy as np

    return 2 * right / np.maximum(2 * right + wrong + missed, 1)


def _numbers(labels: Tensor, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What N texts have, and what they are given, [N]; a number whatever the model says."""
    return labels.double().numpy(), logits[:, 0].nan_to_num().double().numpy()


def _correlation(gold: np.ndarray, found: np.ndarray) -> float:
    """Pearson's; 0 where one of the two is constant, or too nearly for its digits."""
    import numpy as np

    sides = [side - side.mean() for side in (gold, found)]
    sizes = [float(np.linalg.norm(side)) for side in sides]
    smallest = [1e-12 * max(1.0, float(abs(side).max())) for side in (gold, found)]
    if any(size <= least for size, least in zip(sizes, smallest)):
        return 0.0
    return float(sides[0] @ sides[1] / (sizes[0] * sizes[1]))


TASKS: dict[str, Task] = {task.name: task for task in (SingleLabel(), MultiLabel(), Regression())}
"""Every task by its name."""

SINGLE_LABEL = TASKS["single_label"]

METRICS = {task.metric: task.metric_title for task in TASKS.values()}
"""The scores that models are compared with, and what they are called in tables."""


def task_of(problem_type: str | None, outputs: int) -> Task:
    """The task of a model with so many outputs whose configuration says this; one that says
    nothing, or what cannot be, tells classes apart."""
    by_type = {task.problem_type: task for task in TASKS.values()}
    found = by_type.get(problem_type or "", SINGLE_LABEL)
    return SINGLE_LABEL if found.misfit(outputs) else found


def by_domain(scores: Mapping[str, Any]) -> dict[str, float]:
    """The metric of each domain, of scores as ``training.scoring.evaluate`` returns them."""
    parts = {name: name.partition("/") for name in scores}
    return {
        domain: scores[name]
        for name, (metric, _, domain) in parts.items()
        if domain and metric in METRICS
    }
