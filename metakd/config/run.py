"""The whole configuration: rows of a comparison, and all blocks together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from metakd.config.blocks import (
    LATER,
    Block,
    Chain,
    Count,
    DataConfig,
    DistillConfig,
    Fraction,
    LabelCounts,
    MethodName,
    Positive,
    PrototypeConfig,
    StudentConfig,
    TeacherConfig,
    TeacherKind,
    TrainingConfig,
    Transfer,
    ZeroStage,
)
from metakd.config.deepspeed import AUTO
from metakd.method.methods import DEFAULT_ROWS, METHODS

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
    anchor: Annotated[Fraction | None, LATER] = None
    chain: Annotated[Chain | None, LATER] = None
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
        if self.teacher is None and self.chain:
            raise ValueError(f"method {self.method} has no teacher, which assistants could help")
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
        if isinstance(self.chain, int):
            label += f"-chain-{self.chain}"
        elif self.chain is not None:
            label += f"-chain-{'-'.join(shape.shape for shape in self.chain)}"
        return label + ("" if self.student is None else AS_SHAPE + self.student.shape)

    def taught(self, distill: DistillConfig) -> DistillConfig:
        """How this row's students are taught, where ``distill`` says what the row does not."""
        said = self.model_dump(exclude={"teacher", "student", "chain"}, exclude_none=True)
        if self.chain is not None:
            said["chain"] = self.chain
        if self.teacher is None:  # nobody whom generations or assistants could stand beside
            names = ("generations", "anchor", "anchors", "chain", "chain_stop")
            said |= {name: DistillConfig.model_fields[name].get_default() for name in names}
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
    otherwise. ``bf16: auto`` is true where the device has instructions for it, else false; a run
    knows only these two, see ``front.settled``. ``deepspeed`` is a DeepSpeed configuration, written
    out or the path of a JSON file; what it leaves out or calls ``auto`` comes from the other keys.
    ``packed`` runs the layers of teacher and student on real tokens only, which pays where batches
    hold much padding. A checkpoint is written every ``save_steps`` optimizer steps, and the newest
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
    bf16: bool | Literal["auto"] = False
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
        return (
            {"student": self.student}
            | {
                f"compare.rows.{number}.student": row.student
                for number, row in enumerate(self.compare.rows)
                if row.student is not None
            }
            | {
                f"{key}.chain.{number}": shape
                for key, chain in self._chains.items()
                for number, shape in enumerate(chain if isinstance(chain, list) else [])
            }
        )

    @property
    def _chains(self) -> dict[str, Chain | None]:
        rows = {f"compare.rows.{n}": row.chain for n, row in enumerate(self.compare.rows)}
        return {"distill": self.distill.chain} | rows

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
            raise ValueError("bf16 and fp16 are both asked for: give one")
        return self
