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
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from metakd.config.deepspeed import AUTO
from metakd.method.kinds import DEFAULT_KIND, TEACHER_KINDS
from metakd.method.methods import DEFAULT_METHOD, DEFAULT_ROWS, METHODS
from metakd.method.tasks import SINGLE_LABEL, TASKS

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


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


class TermWeights(Block):
    """Weight of each distillation term; 0 switches a term off and its features are not even
    collected."""

    embedding: Annotated[float, Field(ge=0.0)] = 1.0
    hidden: Annotated[float, Field(ge=0.0)] = 1.0
    attention: Annotated[float, Field(ge=0.0)] = 1.0
    prediction: Annotated[float, Field(ge=0.0)] = 1.0
    hard_label: Annotated[float, Field(ge=0.0)] = 0.0


class TransferWeights(Block):
    """Weight of each text in a student's loss, by where it comes from."""

    own: Positive = 1.0
    unlabelled: Positive = 1.0
    others: Positive = 1.0
    others_unlabelled: Positive = 1.0


class DistillConfig(Block):
    """How a student is taught. ``gamma2`` weights the transferable-knowledge term L_TKD,
    ``non_target`` what ``decoupled_kd`` compares within the classes that are not the target's.

    ``schedule: joint`` trains all terms at once (the paper's equation); ``two_stage`` trains the
    intermediate terms first (``intermediate``), then the prediction terms (``training``).
    ``backend`` computes the losses; ``teacher_stream`` runs the teacher on a CUDA stream of its
    own, beside the student's forward pass. ``processes_per_student`` spreads the students of
    several domains over the processes, so many for each, instead of training each with all.

    ``cache_teacher`` keeps what the frozen teacher says of each training example on the disk, and
    runs it no more: ``all`` keeps every signal that the terms ask for; ``logits`` keeps logits
    alone, a few bytes an example, and serves the methods and stages that ask for nothing else,
    while the teacher runs for the others as it does under ``none``. (A word where a switch might
    be: what is kept differs a thousandfold in size, so that nobody should have to guess it.) It is
    an error, before anything is computed, if all that a command's students ask for takes more than
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
    """

    method: MethodName = DEFAULT_METHOD
    schedule: Literal["joint", "two_stage"] = "joint"
    temperature: Positive = 1.0
    scale_by_temperature: bool = True
    non_target: Annotated[float, Field(ge=0.0), LATER] = 8.0
    gamma2: Annotated[float, Field(ge=0.0)] = 0.2
    terms: TermWeights = TermWeights()
    attention: Literal["scores", "probabilities", "kl"] = "scores"
    hidden: Annotated[Literal["mse", "cosine"], LATER] = "mse"
    layer_map: Literal["uniform", "last", "copied"] | list[Annotated[int, Field(ge=0)]] = "uniform"
    relation_heads: Count = 12
    backend: Literal["auto", "reference", "cpp", "triton"] = "auto"
    teacher_stream: bool = False
    cache_teacher: Literal["none", "logits", "all"] = "none"
    cache_limit_gib: Positive = 20.0
    domains: list[str] | None = None
    one_student_for_all: bool = False
    processes_per_student: Count | None = None
    transfer: Annotated[Transfer, LATER] = "own"
    transfer_weights: Annotated[TransferWeights, LATER] = TransferWeights()
    transfer_by_score: Annotated[bool, LATER] = False
    balance: Annotated[Literal["none", "variance"], LATER] = "none"
    generations: Annotated[Count, LATER] = 1
    anchor: Annotated[Share, LATER] = 0.5
    anchors: Annotated[dict[TeacherKind, Share], LATER] = {}
    anchor_by: Annotated[Literal["mixture", "geometric"], LATER] = "mixture"
    training: TrainingConfig = TrainingConfig(learning_rate=5e-5)
    intermediate: TrainingConfig = TrainingConfig(
        learning_rate=5e-5, num_train_epochs=10, lr_scheduler_type="constant"
    )

    @property
    def held(self) -> float:
        """The share of all teachers in what a generation learns: 1 less that of the one before."""
        return self.anchor + sum(self.anchors.values())

    def towards(self, student: StudentConfig) -> DistillConfig:
        """This, with the layers that the student copies in place of ``copied``."""
        if self.layer_map != "copied":
            return self
        return self.model_copy(update={"layer_map": student.layers or "uniform"})


AS_SHAPE = "-as-"
"""What comes before the shape of a row's students, where they have one of their own."""


def row_label(method: str, teacher: str | None) -> str:
    """How students of a method and a kind of teacher are called."""
    return method if teacher is None else f"{method}-from-{teacher}"


class CompareRow(Block):
    """One row of the comparison: a method and the teacher it learns from (``finetune`` has none);
    what else is given takes the place of the key of that name in ``distill`` or its ``training``,
    and ``student`` of the whole block, for this row. Training ends after the epochs or
    ``max_steps``, whichever are over first."""

    method: MethodName
    teacher: TeacherKind | None = None
    gamma2: Annotated[float, Field(ge=0.0)] | None = None
    transfer: Annotated[Transfer | None, LATER] = None
    generations: Annotated[Count | None, LATER] = None
    anchor: Annotated[Share | None, LATER] = None
    learning_rate: Annotated[Positive | None, LATER] = None
    num_train_epochs: Annotated[Count | None, LATER] = None
    max_steps: Annotated[Count | None, LATER] = None
    student: Annotated[StudentConfig | None, LATER] = None

    @model_validator(mode="after")
    def _teacher_fits(self):
        if reason := METHODS[self.method].why_not(self.teacher):
            raise ValueError(reason)
        if self.transfer is not None and METHODS[self.method].texts is not None:
            raise ValueError(f"method {self.method} has its own texts, and no transfer")
        if self.teacher is None and (self.generations or self.anchor is not None):
            raise ValueError(f"method {self.method} has no teacher, to which generations are held")
        return self

    @property
    def label(self) -> str:
        """Its name in tables and folders: ``meta-from-meta-on-unlabelled``, ``finetune``."""
        label = row_label(self.method, self.teacher)
        if self.transfer is not None:
            listed = not isinstance(self.transfer, str)
            name = "+".join(self.transfer) if listed else self.transfer
            # ``unlabelled`` is those and the labelled ones, a list of it alone is not.
            label += f"-on-{name}" + ("-alone" if listed and len(self.transfer) == 1 else "")
        if self.gamma2 is not None:
            label += f"-gamma2-{self.gamma2:g}"
        if self.generations is not None:
            label += f"-generations-{self.generations}"
        if self.anchor is not None:
            label += f"-anchor-{self.anchor:g}"
        return label + ("" if self.student is None else AS_SHAPE + self.student.shape)

    def taught(self, distill: DistillConfig) -> DistillConfig:
        """How this row's students are taught, where ``distill`` says what the row does not."""
        said = self.model_dump(exclude={"teacher", "student"}, exclude_none=True)
        of_training = said.keys() & TrainingConfig.model_fields.keys()
        training = {name: said.pop(name) for name in of_training}
        return distill.model_copy(
            update={**said, "training": distill.training.model_copy(update=training)}
        )


class CompareConfig(Block):
    """Rows x domains x seeds. ``teacher_seeds`` fixes how many teachers are trained: with fewer
    teachers than ``seeds`` they are reused in turn, and the spread then misses part of the
    teacher's share. ``keep_students`` keeps the weights of every cell, not only its scores.

    ``labels`` repeats all of it for each number of labels, ``all`` for all there are, that a
    student's domain is to have: each domain in turn, while the others keep theirs, and whatever
    ``data.labels`` says.
    """

    rows: Annotated[list[CompareRow], Field(min_length=1)] = [
        CompareRow(method=method, teacher=teacher) for method, teacher in DEFAULT_ROWS
    ]
    seeds: Annotated[list[int], Field(min_length=1)] = [1, 2, 3, 4, 5]
    teacher_seeds: Count | None = None
    keep_students: bool = False
    labels: Annotated[LabelCounts | None, LATER] = None


class Sharding(NamedTuple):
    """How the state of a training run is spread: ZeRO stage, and optimizer states (at stage 3
    weights as well) in host memory."""

    zero: int = 0
    offload: bool = False


class RunConfig(Block):
    """The whole YAML file.

    ``zero`` holds for every training run unless ``teacher.zero`` or ``student.zero`` says
    otherwise. ``deepspeed`` is a DeepSpeed configuration, written out or the path of a JSON file;
    what it leaves out or calls ``auto`` comes from the other keys. ``packed`` runs the layers of
    teacher and student on real tokens only, which pays where batches hold much padding. A
    checkpoint is written every ``save_steps`` optimizer steps, and the newest
    ``save_total_limit`` are kept. Processes that train together end when one of them has made no
    progress for ``step_timeout`` seconds.

    ``compat`` asks for the method as the paper or the released code has it. Without it the
    equations are the paper's, and a student learns from the texts without labels, too, where there
    are some (``distill.transfer: unlabelled``).
    """

    output_dir: str
    data: DataConfig
    teacher: TeacherConfig
    student: StudentConfig
    prototypes: PrototypeConfig = PrototypeConfig()
    distill: DistillConfig = DistillConfig()
    compare: CompareConfig = CompareConfig()
    compat: Literal["paper", "easytransfer"] | None = None
    seed: int = 42
    bf16: bool = False
    fp16: bool = False
    zero: ZeroStage = 0
    logging_steps: Count = 20
    packed: bool = False
    deepspeed: dict[str, Any] | None = None
    save_steps: Count = 500
    save_total_limit: Count = 2
    step_timeout: Positive = 45.0
    report_to: list[Literal["tensorboard", "jsonl"]] = ["jsonl", "tensorboard"]

    @model_validator(mode="before")
    @classmethod
    def _texts_are_there_to_be_used(cls, given):
        if not isinstance(given, Mapping) or given.get("compat") is not None:
            return given
        blocks = [given.get(name) or {} for name in ("data", "compare", "distill")]
        if not all(isinstance(block, Mapping) for block in blocks):
            return given
        data, compare, distill = blocks
        unlabelled = data.get("unlabelled") or data.get("labels") or compare.get("labels")
        if "transfer" in distill or not unlabelled:
            return given
        return {**given, "distill": {**distill, "transfer": "unlabelled"}}

    @property
    def form(self) -> str:
        """Whose form the method's equations have."""
        return self.compat or "paper"

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def students(self) -> dict[str, StudentConfig]:
        """The student and those that rows of the comparison have of their own, by their keys."""
        return {"student": self.student} | {
            f"compare.rows.{number}.student": row.student
            for number, row in enumerate(self.compare.rows)
            if row.student is not None
        }

    def sharding(self, block: TeacherConfig | StudentConfig) -> Sharding:
        """How the training of the teacher or of a student is spread."""
        zero = self.zero if block.zero is None else block.zero
        if block.zero is None and "zero" not in self.model_fields_set and self.deepspeed:
            stage = self.deepspeed.get("zero_optimization", {}).get("stage", AUTO)
            zero = zero if stage == AUTO else stage
        return Sharding(zero, block.offload)

    def deepspeed_values(self, training: TrainingConfig, sharding: Sharding) -> dict[str, Any]:
        """What one training run says by the dotted names of DeepSpeed, see
        ``resolve_deepspeed``."""
        linear = training.lr_scheduler_type == "linear"
        return {
            "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "gradient_clipping": training.max_grad_norm,
            "zero_optimization.stage": sharding.zero,
            "bf16.enabled": self.bf16,
            "fp16.enabled": self.fp16,
            "optimizer.type": "AdamW",
            "optimizer.params.lr": training.learning_rate,
            "optimizer.params.weight_decay": training.weight_decay,
            "scheduler.type": "WarmupDecayLR" if linear else "WarmupLR",
        }

    @model_validator(mode="after")
    def _one_precision(self):
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both true: give one")
        return self
