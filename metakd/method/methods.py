"""The table of methods: what a student can be taught by, one row each.

A row says all that tells a method from the others: its terms and the keys that weight them, which
kinds of teacher can teach it and how several of them are combined, whether lambda weights it.
Configuration, stages, cache, comparison, report and documentation read the rows; nothing else in
the package compares a method's name. A new method is a row here, and a dataclass in ``terms`` for
each term that none has yet. Reading this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from metakd.method.attribution import AttributionTerm
from metakd.method.kinds import TEACHER_KINDS
from metakd.method.recipe import PAPER, Recipe
from metakd.method.tasks import SINGLE_LABEL, Task
from metakd.method.terms import (
    ANSWERS,
    AttentionTerm,
    DecoupledTerm,
    EmbeddingTerm,
    GatedTerm,
    HardLabelTerm,
    HiddenTerm,
    PredictionTerm,
    PseudoLabelTerm,
    RelationTerm,
    Setup,
    Term,
    TransferTerm,
)

if TYPE_CHECKING:
    from metakd.config import DistillConfig
    from metakd.models.taps import Span

OWN = "own"
MEAN = "mean"
GATE = "gate"
TRAINED = "trained"
FIXED = "fixed"

TEXTS = ("own", "unlabelled", "others", "others_unlabelled")
"""What a student of a domain may learn from: its labelled texts, its unlabelled ones, and those of
the other domains."""

TRANSFER_SETS = {
    "own": ("own",),
    "unlabelled": ("own", "unlabelled"),
    "all": ("own", "others"),
    "all+unlabelled": ("own", "unlabelled", "others"),
}
"""The usual choices among ``TEXTS``, by name."""


class Weighted(NamedTuple):
    """A term of a method, and the key of ``distill`` that holds its weight; without one it is 1."""

    term: type[Term]
    key: str | None = None

    def weight(self, config: DistillConfig) -> float:
        """What the configuration gives it."""
        return 1.0 if self.key is None else attrgetter(self.key)(config)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        name: in configurations and tables.
        terms: what a student minimises.
        line: what it is, in a line.
        source: where it comes from.
        teachers: kinds that can teach it; None: every kind; empty: it has no teacher.
        combine: of teachers that know one domain each, ``own`` asks that of the student's domain,
            ``mean`` all of them, for the mean of their logits, ``gate`` all, each for itself.
        by_expertise: are terms multiplied by lambda, per example?
        by_relation: what multiplies terms of layers, per domain: a network of ``relations`` that
            is ``trained`` with the student, or stays ``fixed`` as it was drawn; None: nothing.
        texts: what it learns from, of ``TEXTS``; None: what the configuration says.
        then_own: afterwards it goes on with its own domain's labelled texts alone.
    """

    name: str
    terms: tuple[Weighted, ...]
    line: str
    source: str
    teachers: tuple[str, ...] | None = None
    combine: str = OWN
    by_expertise: bool = False
    by_relation: str | None = None
    texts: tuple[str, ...] | None = None
    then_own: bool = False

    def __post_init__(self):
        if self.combine != OWN and not all(part.term.needs <= ANSWERS for part in self.terms):
            raise ValueError(f"method {self.name}: of several teachers only logits have a mean")

    @property
    def _asks_for_logits_alone(self) -> bool:
        return all(part.term.needs <= {"logits"} for part in self.terms)

    @property
    def asks_each(self) -> bool:
        """Does it learn from each of several teachers, and not from their mean?"""
        return any("votes" in part.term.needs for part in self.terms)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of ``distill`` that it listens to, weights first."""
        weights = [term.key for term in self.terms if term.key is not None]
        return tuple(dict.fromkeys(weights + [k for t in self.terms for k in t.term.listens_to]))

    @property
    def weights(self) -> tuple[str, ...]:
        """The keys of ``distill`` that weight its terms; empty where its weights are fixed."""
        keys = tuple(term.key for term in self.terms if term.key is not None)
        return keys if len(keys) == len(self.terms) else ()

    def second_order(self, config: DistillConfig) -> bool:
        """Are gradients taken through gradients of the student, under this configuration?"""
        return any(part.term.second_order and part.weight(config) > 0 for part in self.terms)

    @property
    def possible_teachers(self) -> tuple[str, ...]:
        """The kinds of teacher that can teach it."""
        if self.teachers is not None:
            return self.teachers
        return tuple(
            name
            for name, kind in TEACHER_KINDS.items()
            if self._asks_for_logits_alone or not kind.in_data
        )

    def teacher(self, kind: str) -> str | None:
        """The kind that teaches it where ``kind`` is configured: that one if it can, else the first
        that can; None if it has no teacher."""
        possible = self.possible_teachers
        return kind if kind in possible else next(iter(possible), None)

    def why_not(self, kind: str | None) -> str | None:
        """Why this kind (None: no teacher) cannot teach it; None if it can."""
        possible = self.possible_teachers or (None,)
        if kind in possible:
            return None
        return f"method {self.name} needs teacher {' or '.join(map(str, possible))}, got {kind}"

    def learns_from(self, transfer: str | Sequence[str]) -> tuple[str, ...]:
        """Of which ``TEXTS`` a student is shown, where ``distill.transfer`` says this; unlabelled
        ones only where a term has a use for them."""
        wanted = TRANSFER_SETS[transfer] if isinstance(transfer, str) else tuple(transfer)
        if all(part.term.needs_label for part in self.terms):
            wanted = tuple(name for name in wanted if name in ("own", "others"))
        return wanted if self.texts is None else self.texts

    def mixes(self, kind: str | None) -> bool:
        """Is each student taught by the teachers of all domains, where ``kind`` has one for
        each?"""
        return kind is not None and TEACHER_KINDS[kind].per_domain and self.combine != OWN


_EMBEDDING = Weighted(EmbeddingTerm, "terms.embedding")
_HIDDEN = Weighted(HiddenTerm, "terms.hidden")
_ATTENTION = Weighted(AttentionTerm, "terms.attention")
_RELATION = Weighted(RelationTerm, "terms.attention")
_TRANSFER = Weighted(TransferTerm, "gamma2")
_PREDICTION = Weighted(PredictionTerm, "terms.prediction")
_DECOUPLED = Weighted(DecoupledTerm, "terms.prediction")
_ATTRIBUTION = Weighted(AttributionTerm, "terms.attribution")
_GATED = Weighted(GatedTerm, "terms.prediction")
_HARD_LABEL = Weighted(HardLabelTerm, "terms.hard_label")

METHODS = {
    method.name: method
    for method in (
        Method(
            "finetune",
            (Weighted(HardLabelTerm),),
            "no teacher: the student is fine-tuned on its domain's labels",
            "Devlin et al. 2019",
            teachers=(),
            texts=("own",),
        ),
        Method(
            "finetune_all",
            (Weighted(HardLabelTerm),),
            "no teacher: the student is fine-tuned on the labels of all domains",
            "Devlin et al. 2019",
            teachers=(),
            texts=("own", "others"),
        ),
        Method(
            "finetune_all_then_own",
            (Weighted(HardLabelTerm),),
            "no teacher: fine-tuned on the labels of all domains, then on its own",
            "Howard, Ruder 2018",
            teachers=(),
            texts=("own", "others"),
            then_own=True,
        ),
        Method(
            "pseudo_labels",
            (Weighted(PseudoLabelTerm),),
            "the label of each text, the teacher's choice where it has none",
            "Lee 2013",
        ),
        Method(
            "logits_kd",
            (_PREDICTION, _HARD_LABEL),
            "the teacher's softened predictions",
            "Hinton, Vinyals, Dean 2015",
        ),
        Method(
            "decoupled_kd",
            (_DECOUPLED, _HARD_LABEL),
            "the teacher's predictions, of the target and within the other classes apart",
            "Zhao et al. 2022",
        ),
        Method(
            "tinybert_kd",
            (_EMBEDDING, _HIDDEN, _ATTENTION, _PREDICTION, _HARD_LABEL),
            "embeddings, hidden states, attention scores and predictions of a teacher",
            "Jiao et al. 2020",
        ),
        Method(
            "hrkd",
            (_EMBEDDING, _HIDDEN, _ATTENTION, _PREDICTION, _HARD_LABEL),
            "as tinybert_kd, each layer weighted by domain: a graph attention network over the "
            "domains' prototypes, trained with the student",
            "Dong et al. 2021",
            by_relation=TRAINED,
        ),
        Method(
            "hrkd_random",
            (_EMBEDDING, _HIDDEN, _ATTENTION, _PREDICTION, _HARD_LABEL),
            "as hrkd, the network left as it was drawn",
            "the code of Dong et al. 2021",
            by_relation=FIXED,
        ),
        Method(
            "mtn_kd",
            (_PREDICTION, _HARD_LABEL),
            "the mean of the predictions of every domain's teacher",
            "You et al. 2017",
            teachers=("single",),
            combine=MEAN,
        ),
        Method(
            "gated_kd",
            (_GATED, _HARD_LABEL),
            "every domain's teacher, each as much as a small network says of the text",
            "Haase, da Silva 2025",
            teachers=("single",),
            combine=GATE,
        ),
        Method(
            "minilmv2",
            (_RELATION, _PREDICTION, _HARD_LABEL),
            "query, key and value relations of the last layer, and predictions",
            "Wang et al. 2021",
        ),
        Method(
            "ad_kd",
            (_ATTRIBUTION, _PREDICTION, _HARD_LABEL),
            "which tokens the teacher's answer hangs on, and its predictions",
            "Wu et al. 2023",
        ),
        Method(
            "meta",
            (_EMBEDDING, _HIDDEN, _ATTENTION, _TRANSFER, _PREDICTION, _HARD_LABEL),
            "Meta-KD: as tinybert_kd, with the meta-teacher's domain-corrupted features, each "
            "example weighted by lambda",
            "Pan et al. 2021, equations 6-11",
            teachers=("meta",),
            by_expertise=True,
        ),
    )
}
"""Every method by its name, simplest first."""

GENERAL = Method(
    "student.pretrain",
    (_EMBEDDING, _HIDDEN, _ATTENTION),
    "embeddings, hidden states and attention of the pre-trained encoder, before any task",
    "Jiao et al. 2020, section 3.2",
    teachers=(),
)
"""What a student that would begin with random weights learns first (``student.pretrain``). Not in
the table: it makes no classifier, and no teacher of a task gives it."""

DEFAULT_METHOD = "meta"
DEFAULT_ROWS: tuple[tuple[str, str | None], ...] = (
    ("finetune", None),
    ("logits_kd", "mix"),
    ("tinybert_kd", "single"),
    ("tinybert_kd", "mix"),
    ("tinybert_kd", "mtl"),
    ("mtn_kd", "single"),
    ("tinybert_kd", "meta"),
    ("meta", "meta"),
)
"""Methods and their teachers that ``metakd compare`` sets side by side, in this order."""


def build_terms(
    config: DistillConfig,
    method: Method | None = None,
    *,
    student_layers: int,
    teacher_layers: int,
    recipe: Recipe = PAPER,
    task: Task = SINGLE_LABEL,
    spans: Callable[[], tuple[Sequence[Span], Sequence[Span]]] = lambda: ((), ()),
) -> list[Term]:
    """The terms of a method, by default ``config.method``, less those of weight 0.

    Args:
        config: weights, how layers are paired.
        method: None: that of the configuration.
        student_layers: depth.
        teacher_layers: depth.
        recipe: form of the method.
        task: what labels mean.
        spans: gives, where a term has to know, what each layer of student and teacher attends to;
            nothing: everything.

    Raises:
        ValueError: the layers cannot be mapped, or no term is left.
    """
    setup = Setup(student_layers, teacher_layers, recipe, task, spans)
    method = method or METHODS[config.method]
    weights = [(part.term, part.weight(config)) for part in method.terms]
    kept = [term.configured(weight, config, setup) for term, weight in weights if weight > 0]
    if not kept:
        raise ValueError(f"terms: every weight that {method.name} has is 0")
    return kept


def as_markdown() -> str:
    """The table as the documentation shows it."""
    header = [
        "method",
        "the student learns",
        "terms",
        "teachers",
        "texts",
        "lambda",
        "relations",
        "other keys",
    ]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for method in METHODS.values():
        cells = [
            f"`{method.name}`",
            f"{method.line} ({method.source})",
            ", ".join(part.term.name for part in method.terms),
            ", ".join(method.possible_teachers) or "none",
            " and ".join(method.texts or ["as configured"]) + ", then own" * method.then_own,
            "yes" if method.by_expertise else "no",
            method.by_relation or "no",
            ", ".join(f"`{key}`" for key in method.keys if not key.startswith("terms.")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown())
