"""The configuration: one pydantic model per block of the YAML file, and ``load_config`` that reads it.

Every key is checked (``extra="forbid"``), every problem is reported at once with a did-you-mean, and
key names follow ``transformers.TrainingArguments`` where they mean the same thing.
Imports pydantic, yaml and ``metakd.errors`` only, so that a wrong config is refused in well under a second.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]

TeacherKind = Literal["meta", "mix", "mtl", "single"]
MethodName = Literal["finetune", "logits_kd", "tinybert_kd", "mtn_kd", "minilmv2", "meta"]


class Block(BaseModel):
    """A block of the YAML file: unknown keys are errors, values are immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class DataConfig(Block):
    """Where the examples are and which columns hold what.

    ``train``, ``validation`` and ``test`` are each a CSV, TSV, JSONL or Parquet file, a folder with one file
    per domain (the file's stem is the domain), or a hub id. Without ``validation``, ``validation_fraction``
    of the training split is held out, stratified by domain and label.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    domain: str = "domain"
    max_length: Annotated[int, Field(ge=4, le=8192)] = 128
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    data_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    withhold: list[str] = []


class PrototypeConfig(Block):
    """Prototype scores t (Meta-KD section 3.1): weight alpha of the own domain, and how t is rescaled."""

    alpha: Fraction = 0.5
    rescale: Literal["none", "center", "minmax", "zscore"] = "none"


class TrainingConfig(Block):
    """One optimisation run. ``warmup_steps`` below 1 is a share of all steps, as in ``TrainingArguments``."""

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


class TeacherConfig(Block):
    """The teacher: a pre-trained encoder (directory or hub id), and how it is trained on the domains."""

    model: str
    kind: TeacherKind = "meta"
    gamma1: Annotated[float, Field(ge=0.0)] = 0.2
    training: TrainingConfig = TrainingConfig()


class StudentConfig(Block):
    """The student: exactly one of a preset, teacher layers to copy (0-based), or a directory / hub id."""

    preset: Literal["tinybert-4l-312", "mini-4l-256", "tiny-2l-128"] | None = None
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    copy_from: Literal["teacher", "encoder"] = "teacher"
    model: str | None = None

    @model_validator(mode="after")
    def _one_source(self):
        given = [name for name in ("preset", "layers", "model") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of preset, layers, model (given: {', '.join(given) or 'none'})")
        return self


class TermWeights(Block):
    """Weight of each distillation term; 0 switches a term off and its features are not even collected."""

    embedding: Annotated[float, Field(ge=0.0)] = 1.0
    hidden: Annotated[float, Field(ge=0.0)] = 1.0
    attention: Annotated[float, Field(ge=0.0)] = 1.0
    prediction: Annotated[float, Field(ge=0.0)] = 1.0
    hard_label: Annotated[float, Field(ge=0.0)] = 0.0


class DistillConfig(Block):
    """How a student is taught. ``gamma2`` weights the transferable-knowledge term L_TKD.

    ``schedule: joint`` trains all terms at once (the paper's equation); ``two_stage`` trains the
    intermediate terms first (``intermediate``), then the prediction terms (``training``).
    """

    method: MethodName = "meta"
    schedule: Literal["joint", "two_stage"] = "joint"
    temperature: Positive = 1.0
    scale_by_temperature: bool = True
    gamma2: Annotated[float, Field(ge=0.0)] = 0.2
    terms: TermWeights = TermWeights()
    attention: Literal["scores", "probabilities", "kl"] = "scores"
    layer_map: Literal["uniform", "last"] | list[Annotated[int, Field(ge=0)]] = "uniform"
    relation_heads: Count = 12
    domains: list[str] | None = None
    one_student_for_all: bool = False
    training: TrainingConfig = TrainingConfig(learning_rate=5e-5)
    intermediate: TrainingConfig = TrainingConfig(
        learning_rate=5e-5, num_train_epochs=10, lr_scheduler_type="constant"
    )


class CompareRow(Block):
    """One row of the comparison: a method and the teacher it learns from (``finetune`` has none)."""

    method: MethodName
    teacher: TeacherKind | None = None
    gamma2: Annotated[float, Field(ge=0.0)] | None = None

    @model_validator(mode="after")
    def _teacher_fits(self):
        needed = {"finetune": [None], "meta": ["meta"], "mtn_kd": ["single"]}.get(
            self.method, ["single", "mix", "mtl", "meta"]
        )
        if self.teacher not in needed:
            raise ValueError(f"method {self.method} needs teacher {' or '.join(map(str, needed))}, got {self.teacher}")
        return self


class CompareConfig(Block):
    """Rows x domains x seeds. ``teacher_seeds`` fixes how many teachers are trained: with fewer teachers
    than ``seeds`` they are reused in turn, and the spread then misses part of the teacher's share."""

    rows: Annotated[list[CompareRow], Field(min_length=1)] = [
        CompareRow(method="finetune"),
        CompareRow(method="logits_kd", teacher="mix"),
        CompareRow(method="tinybert_kd", teacher="single"),
        CompareRow(method="tinybert_kd", teacher="mix"),
        CompareRow(method="tinybert_kd", teacher="mtl"),
        CompareRow(method="mtn_kd", teacher="single"),
        CompareRow(method="tinybert_kd", teacher="meta"),
        CompareRow(method="meta", teacher="meta"),
    ]
    seeds: Annotated[list[int], Field(min_length=1)] = [1, 2, 3, 4, 5]
    teacher_seeds: Count | None = None


class RunConfig(Block):
    """The whole YAML file."""

    output_dir: str
    data: DataConfig
    teacher: TeacherConfig
    student: StudentConfig
    prototypes: PrototypeConfig = PrototypeConfig()
    distill: DistillConfig = DistillConfig()
    compare: CompareConfig = CompareConfig()
    compat: Literal["paper", "easytransfer"] = "paper"
    seed: int = 42
    bf16: bool = False
    fp16: bool = False
    zero: Literal[0, 1, 2] = 0
    logging_steps: Count = 20
    report_to: list[Literal["tensorboard", "jsonl"]] = ["jsonl", "tensorboard"]

    @model_validator(mode="after")
    def _one_precision(self):
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both true: give one")
        return self
