"""The blocks of the YAML file: one pydantic model each.

Every key is known (``extra="forbid"``), and key names follow ``transformers.TrainingArguments``
where they mean the same thing. Imports pydantic and the table of methods, and no torch, so that a
wrong configuration is refused in well under a second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from metakd.method.kinds import DEFAULT_KIND, TEACHER_KINDS
from metakd.method.methods import DEFAULT_METHOD, METHODS
from metakd.method.tasks import SINGLE_LABEL, TASKS

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


def _classes_of(columns: list[str]) -> dict[str, str]:
    """The column of each class, whose name is the column's without what all begin with."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*columns))
    shared = re.match(r".*[\W_]", "".join(letters[0] for letters in alike))
    return {name.removeprefix(shared[0] if shared else ""): name for name in columns}


def _each_once(columns: list[str]) -> list[str]:
    if len(set(columns)) < len(columns):
        raise ValueError("a column is given twice")
    return columns


def _name_classes(columns: list[str]) -> list[str]:
    classes = _classes_of(columns)
    if len(classes) < len(columns) or "" in classes:
        raise ValueError("the columns must be called after their classes, each after another")
    return columns


ColumnName = Annotated[str, Field(min_length=1)]
SoftLabels = (
    ColumnName
    | Annotated[list[ColumnName], Field(min_length=2), AfterValidator(_name_classes)]
    | Annotated[dict[ColumnName, ColumnName], Field(min_length=2)]
)
LabelColumns = Annotated[list[ColumnName], Field(min_length=2), AfterValidator(_each_once)]
LabelCounts = Annotated[list[Count | Literal["all"]], Field(min_length=1)]
TemperatureRange = Annotated[list[Positive], Field(min_length=2, max_length=2)]
ZeroStage = Literal[0, 1, 2, 3]
Texts = Literal["own", "unlabelled", "others", "others_unlabelled"]
Transfer = (
    Literal["own", "unlabelled", "all", "all+unlabelled"]
    | Annotated[tuple[Texts, ...], Field(min_length=1)]
)


class _Later:
    """Marks a key that came after the first version: left at its default it is no input of a stage,
    so that what an earlier version has finished stays finished."""


LATER = _Later()


def _one_of(table: Mapping[str, Any]) -> BeforeValidator:
    """A name in a table, which may grow after this module was read."""

    def check(name: Any) -> Any:
        if not isinstance(name, str) or name not in table:
            *names, last = map(repr, table)
            raise ValueError(f"must be {', '.join(names)} or {last}")
        return name

    return BeforeValidator(check)


def _text_encoding(name: str) -> str:
    try:
        "a".encode(name)
    except (LookupError, UnicodeError) as error:
        raise ValueError("must be an encoding that Python knows, such as cp1252") from error
    return name


TeacherKind = Annotated[str, _one_of(TEACHER_KINDS)]
TaskName = Annotated[str, _one_of(TASKS)]
MethodName = Annotated[str, _one_of(METHODS)]


class Block(BaseModel):
    """A block of the YAML file: unknown keys are errors, values are immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    def inputs(self, *without: str) -> dict[str, Any]:
        """What a stage depends on, as JSON values.

        Args:
            without: keys that it does not depend on.
        """
        dumped, found = self.model_dump(mode="json"), {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            unsaid = LATER in field.metadata and value == field.default
            if name not in without and not unsaid:
                found[name] = value.inputs() if isinstance(value, Block) else dumped[name]
        return found


class DataConfig(Block):
    """Where the examples are and which columns hold what.

    ``train``, ``validation`` and ``test`` are each a CSV, TSV, JSONL or Parquet file, a folder with
    one file per domain (the file's stem is the domain), or a hub id. Without ``validation``,
    ``validation_fraction`` of the training split is held out, stratified by domain and label.

    ``unlabelled`` is a source of texts of the same domains without labels, for students to learn
    from (``distill.transfer``). ``labels`` says how many labels of a domain are used, a number or a
    share: the other rows of ``train`` count as unlabelled, and as many at most of ``validation``
    are looked at.

    ``domain: null`` is for texts that are all of one domain. ``on_problem: drop`` leaves out rows
    with which alone something is wrong (an empty text, a missing label, broken quoting or bytes),
    and counts them; ``overlap`` says what becomes of rows of ``train`` and ``unlabelled`` that
    validation or test have, too: left out (``drop_train``), or kept (``allow``) where more than a
    few are refused otherwise. ``encoding``, ``delimiter`` and ``quoting`` (``none``: a quote is
    a character like others) say how CSV and TSV are written where they are not UTF-8, separated by
    their kind's character, and quoted as CSV is.

    ``soft_labels`` are what a teacher elsewhere said of each text of ``train`` and ``unlabelled``
    (``teacher.kind: file``): a column for each class, as a list whose names without their common
    beginning are the classes or as a mapping of classes to columns, or one column of lists, in the
    order of the labels, or of objects. They are probabilities that sum to 1, or logits
    (``soft_labels_as``). Where there is no label column the likeliest class is the label.

    ``task`` says what a label is: one class of each text (``single_label``); any number of them
    (``multi_label``), as a list, in a CSV with ``label_separator`` between them, or as a column of
    0 and 1 for each class that ``label`` lists; or a number (``regression``).
    """

    train: str
    validation: str | None = None
    test: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: ColumnName | LabelColumns = "label"
    domain: str | None = "domain"
    max_length: Annotated[int, Field(ge=4, le=8192)] = 128
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    data_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    withhold: list[str] = []
    unlabelled: Annotated[str | None, LATER] = None
    labels: Annotated[dict[str, Count | Annotated[float, Field(gt=0.0, lt=1.0)]], LATER] = {}
    on_problem: Annotated[Literal["refuse", "drop"], LATER] = "refuse"
    overlap: Annotated[Literal["refuse", "drop_train", "allow"], LATER] = "refuse"
    encoding: Annotated[Annotated[str, AfterValidator(_text_encoding)] | None, LATER] = None
    delimiter: Annotated[Annotated[str, Field(pattern=r"^[^\r\n\"]$")] | None, LATER] = None
    quoting: Annotated[Literal["csv", "none"], LATER] = "csv"
    soft_labels: Annotated[SoftLabels | None, LATER] = None
    soft_labels_as: Annotated[Literal["probabilities", "logits"], LATER] = "probabilities"
    task: Annotated[TaskName, LATER] = SINGLE_LABEL.name
    label_separator: Annotated[ColumnName, LATER] = ","

    @property
    def label_columns(self) -> list[str]:
        """The columns that hold the labels."""
        return [self.label] if isinstance(self.label, str) else self.label

    @property
    def soft_columns(self) -> dict[str, str] | None:
        """Classes and the column of each; None without one for each."""
        given = self.soft_labels
        if isinstance(given, list):
            return _classes_of(given)
        return given if isinstance(given, dict) else None


class PrototypeConfig(Block):
    """Prototype scores t (Meta-KD section 3.1): weight alpha of the own domain, and how t is
    rescaled."""

    alpha: Fraction = 0.5
    rescale: Literal["none", "center", "minmax", "zscore"] = "none"


class TrainingConfig(Block):
    """One optimisation run. ``warmup_steps`` below 1 is a share of all steps, as in
    ``TrainingArguments``.

    ``selection`` says which weights are kept: ``best``, of the epoch that scores best on the
    validation split; ``last``; or ``average``, the mean of those of the last quarter of the steps.
    Only the first looks at the validation split before the end.
    """

    learning_rate: Positive = 2e-5
    num_train_epochs: Count = 3
    max_steps: Annotated[int, Field(ge=-1)] = -1
    per_device_train_batch_size: Count = 32
    per_device_eval_batch_size: Count = 64
    gradient_accumulation_steps: Count = 1
    warmup_steps: Annotated[float, Field(ge=0.0)] = 0.1
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    max_grad_norm: Positive = 1.0
    group_by_length: bool = True
    gradient_checkpointing: bool = False
    selection: Annotated[Literal["best", "last", "average"], LATER] = "best"


class TeacherConfig(Block):
    """The teacher: a pre-trained encoder (directory or hub id), and how it is trained on the
    domains.

    ``zero`` and ``offload`` shard its training; at ``zero: 3`` it stays sharded while it teaches,
    with its weights in host memory under ``offload``. Below that every process holds a copy.

    ``ensemble`` is how many teachers, of as many seeds, a student learns the mean logits of; other
    features are those of the first. With ``folds`` what a teacher thinks of a training example, its
    logits, comes from one of so many others that has not seen it: in training every teacher is
    sure of what it has learned, in lambda as in its soft labels.
    """

    model: str
    kind: TeacherKind = DEFAULT_KIND
    gamma1: Annotated[float, Field(ge=0.0)] = 0.2
    zero: ZeroStage | None = None
    offload: bool = False
    ensemble: Annotated[Count, LATER] = 1
    folds: Annotated[Annotated[int, Field(ge=2)] | None, LATER] = None
    training: TrainingConfig = TrainingConfig()


class PretrainConfig(TrainingConfig):
    """General distillation, before any task: the embeddings, hidden states and attention of the
    pre-trained encoder, weighted and matched as ``distill`` says, on all texts of the corpus and
    on those of the files ``texts``, a text a line or a row. No label is used, so that there is no
    best epoch to choose. ``cache_teacher: all`` keeps what the encoder says of them on the disk,
    within ``distill.cache_limit_gib``."""

    texts: list[str] = []
    cache_teacher: Literal["none", "all"] = "none"
    learning_rate: Positive = 1e-4
    selection: Literal["last", "average"] = "last"


class StudentConfig(Block):
    """The student: exactly one of a preset, teacher layers to copy (0-based), or a directory / hub
    id. ``freeze_embeddings`` leaves its word embeddings as they were copied, but for the rounding
    of bf16 and fp16, so that words which no training text has keep their meaning. A preset begins
    with random weights, unless ``pretrain`` says what it learns first. ``zero`` and ``offload``
    shard its training."""

    preset: Literal["tinybert-4l-312", "mini-4l-256", "tiny-2l-128"] | None = None
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    copy_from: Literal["teacher", "encoder"] = "teacher"
    model: str | None = None
    freeze_embeddings: Annotated[bool, LATER] = False
    pretrain: Annotated[PretrainConfig | None, LATER] = None
    zero: ZeroStage | None = None
    offload: bool = False

    @model_validator(mode="after")
    def _one_source(self):
        given = [name for name in ("preset", "layers", "model") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of preset, layers, model (given: {', '.join(given) or 'none'})"
            )
        if self.pretrain is not None and self.preset is None:
            raise ValueError(
                "pretrain: only a preset begins with random weights; copied layers and models know "
                "already what it would teach them"
            )
        if self.freeze_embeddings and self.preset is not None and self.pretrain is None:
            raise ValueError("freeze_embeddings: those of a preset are random, and must be trained")
        return self

    def start_inputs(self) -> dict[str, Any]:
        """Of ``inputs``, what decides the weights that pretraining leaves it with."""
        return self.inputs("copy_from", "freeze_embeddings")

    @property
    def shape(self) -> str:
        """What the rows of a comparison call it."""
        name = self.preset or PurePath(str(self.model)).name or "model"
        if self.layers is not None:
            name = "-".join(["layers", *map(str, self.layers)])
        marks = {
            "-frozen": self.freeze_embeddings,
            "-of-encoder": self.copy_from == "encoder",
            "-pretrained": self.pretrain is not None,
        }
        return name + "".join(mark for mark, is_set in marks.items() if is_set)


def _made_here(chain: list[StudentConfig]) -> list[StudentConfig]:
    if any(shape.model is not None for shape in chain):
        raise ValueError("an assistant is made of the teacher's layers, or a preset")
    if len({shape.shape for shape in chain}) < len(chain):
        raise ValueError("a shape is given twice")
    return chain


Chain = Count | Annotated[list[StudentConfig], Field(min_length=1), AfterValidator(_made_here)]


class TermWeights(Block):
    """Weight of each distillation term; 0 switches a term off and its features are not even
    collected."""

    embedding: Annotated[float, Field(ge=0.0)] = 1.0
    hidden: Annotated[float, Field(ge=0.0)] = 1.0
    attention: Annotated[float, Field(ge=0.0)] = 1.0
    prediction: Annotated[float, Field(ge=0.0)] = 1.0
    hard_label: Annotated[float, Field(ge=0.0)] = 0.0
    attribution: Annotated[Annotated[float, Field(ge=0.0)], LATER] = 1.0


class TransferWeights(Block):
    """Weight of each text in a student's loss, by where it comes from."""

    own: Positive = 1.0
    unlabelled: Positive = 1.0
    others: Positive = 1.0
    others_unlabelled: Positive = 1.0


class DistillConfig(Block):
    """How a student is taught. ``gamma2`` weights the transferable-knowledge term L_TKD,
    ``non_target`` what ``decoupled_kd`` compares within the classes that are not the target's;
    ``gate_entropy`` is the bonus of ``gated_kd`` for listening to several teachers, and
    ``gate_dropout`` the dropout of what decides to whom.

    ``temperature_schedule`` lets the temperature move within ``temperature_range``, by default
    [2, 6], in place of ``temperature``: down along a ``cosine`` over the run, down with the
    ``loss``, or low while the loss moves fast (``gradient``) or slowly (``gradient_inverse``).

    ``schedule: joint`` trains all terms at once (the paper's equation); ``two_stage`` trains the
    intermediate terms first (``intermediate``), then the prediction terms (``training``).
    ``backend`` computes the losses; ``teacher_stream`` runs the teacher on a CUDA stream of its
    own, beside the student's forward pass. ``processes_per_student`` spreads the students of
    several domains over the processes, so many for each, instead of training each with all.

    ``cache_teacher`` keeps what the frozen teacher says of each training example on the disk, and
    runs it no more: ``all`` keeps every signal that the terms ask for; ``logits`` keeps logits
    alone, a few bytes an example, and serves the methods and stages that ask for nothing else,
    while the teacher runs for the others as it does under ``none``. ``auto`` keeps what is asked
    for at least twice and is read faster than computed, by a rule that measures nothing
    (``teacher_cache.pays``), so that a run on the same kind of device decides alike. It is an
    error, before anything is computed, if all that a command's students ask for takes more than
    ``cache_limit_gib``.

    ``transfer`` says from which texts a student learns, the labelled ones of its domain (``own``),
    those and the domain's unlabelled ones (``unlabelled``), the labelled ones of all domains
    (``all``), all of these, or a list of sources; ``transfer_weights`` weights them by source, and
    ``transfer_by_score`` those of other domains by their prototype score t besides.

    ``balance: variance`` divides the loss of each matched layer by what a student of all zeros
    would have, the mean square of the teacher's target, so that every such term begins near 1;
    ``none`` is the paper's form.

    ``generations`` trains so many students one after the other, each anew: the first learns from
    the teacher, each other from predictions between the teacher's, whose share is ``anchor``, and
    those of the student before it (``anchor_by``: their ``mixture``, or the ``geometric`` mean).
    ``anchors`` gives teachers of other kinds a share as well. What terms compare beside predictions
    stays the teacher's.

    ``chain`` puts assistants between teacher and student, each taught by the one before: so many,
    of layers of the teacher, or students as in ``student``, largest first. With ``chain_stop`` the
    chain ends with the first that does not score by this share above who taught it (-0.02: that
    scores 2 % less).

    ``attribution_steps`` is m of the sum that approximates integrated gradients, 1 being gradient
    times input; ``attribution_top`` how many of a teacher's products a token count, all where it is
    left out; ``attribution_views`` what is attributed, -log p of the ``label`` or of all
    ``classes``.
    """

    method: MethodName = DEFAULT_METHOD
    schedule: Literal["joint", "two_stage"] = "joint"
    temperature: Positive = 1.0
    temperature_schedule: Annotated[
        Literal["constant", "cosine", "loss", "gradient", "gradient_inverse"], LATER
    ] = "constant"
    temperature_range: Annotated[TemperatureRange | None, LATER] = None
    scale_by_temperature: bool = True
    non_target: Annotated[float, Field(ge=0.0), LATER] = 8.0
    gate_entropy: Annotated[float, Field(ge=0.0), LATER] = 0.1
    gate_dropout: Annotated[float, Field(ge=0.0, lt=1.0), LATER] = 0.2
    gamma2: Annotated[float, Field(ge=0.0)] = 0.2
    terms: TermWeights = TermWeights()
    attention: Literal["scores", "probabilities", "kl"] = "scores"
    hidden: Annotated[Literal["mse", "cosine"], LATER] = "mse"
    layer_map: Literal["uniform", "last", "copied"] | list[Annotated[int, Field(ge=0)]] = "uniform"
    relation_heads: Count = 12
    attribution_steps: Annotated[Count, LATER] = 1
    attribution_top: Annotated[Count | None, LATER] = None
    attribution_views: Annotated[Literal["label", "classes"], LATER] = "label"
    backend: Literal["auto", "reference", "eager", "cpp", "triton"] = "auto"
    teacher_stream: bool = False
    cache_teacher: Literal["auto", "none", "logits", "all"] = "none"
    cache_limit_gib: Positive = 20.0
    domains: list[str] | None = None
    one_student_for_all: bool = False
    processes_per_student: Count | None = None
    transfer: Annotated[Transfer, LATER] = "own"
    transfer_weights: Annotated[TransferWeights, LATER] = TransferWeights()
    transfer_by_score: Annotated[bool, LATER] = False
    balance: Annotated[Literal["none", "variance"], LATER] = "none"
    generations: Annotated[Count, LATER] = 1
    anchor: Annotated[Fraction, LATER] = 0.5
    anchors: Annotated[dict[TeacherKind, Fraction], LATER] = {}
    anchor_by: Annotated[Literal["mixture", "geometric"], LATER] = "mixture"
    chain: Annotated[Chain | None, LATER] = None
    chain_stop: Annotated[Annotated[float, Field(gt=-1.0)] | None, LATER] = None
    training: TrainingConfig = TrainingConfig(learning_rate=5e-5)
    intermediate: TrainingConfig = TrainingConfig(
        learning_rate=5e-5, num_train_epochs=10, lr_scheduler_type="constant"
    )

    @property
    def anchored(self) -> bool:
        """Is there more to learn than what the teacher says?"""
        return self.generations > 1 or bool(self.anchors)

    @property
    def held(self) -> float:
        """The share of all teachers in what a generation learns: 1 less that of the one before."""
        return round(self.anchor + sum(self.anchors.values()), 9)  # 0.1 + 0.6 + 0.3 are 1

    def towards(self, student: StudentConfig) -> DistillConfig:
        """This, with the layers that the student copies in place of ``copied``."""
        if self.layer_map != "copied":
            return self
        return self.model_copy(update={"layer_map": student.layers or "uniform"})

    def taking(self, assistant: StudentConfig) -> DistillConfig:
        """This, for an assistant in the student's place."""
        listed = isinstance(self.layer_map, list)
        layers = assistant.layers or "uniform" if listed else self.layer_map
        return self.model_copy(update={"layer_map": layers})

    def through(self, assistant: StudentConfig) -> DistillConfig:
        """This, with an assistant in the teacher's place: layers of the teacher that are matched
        are those which it has of them, or ``uniform`` ones if it has not got them all."""
        if not isinstance(self.layer_map, list):
            return self
        known = assistant.layers or []
        there = set(self.layer_map) <= set(known)
        layers = [known.index(layer) for layer in self.layer_map] if there else "uniform"
        return self.model_copy(update={"layer_map": layers})
