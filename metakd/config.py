"""The configuration: one pydantic model per block of the YAML file, and ``load_config`` that reads
it.

Every key is checked (``extra="forbid"``), every problem is reported at once with a did-you-mean,
and key names follow ``transformers.TrainingArguments`` where they mean the same thing. Imports
pydantic, yaml and ``metakd.errors`` only, so that a wrong config is refused in well under a second.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from metakd.deepspeed_schema import AUTO, check_deepspeed, contradictions
from metakd.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]

ZeroStage = Literal[0, 1, 2, 3]
TeacherKind = Literal["meta", "mix", "mtl", "single"]
MethodName = Literal["finetune", "logits_kd", "tinybert_kd", "mtn_kd", "minilmv2", "meta"]


class Block(BaseModel):
    """A block of the YAML file: unknown keys are errors, values are immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class DataConfig(Block):
    """Where the examples are and which columns hold what.

    ``train``, ``validation`` and ``test`` are each a CSV, TSV, JSONL or Parquet file, a folder with
    one file per domain (the file's stem is the domain), or a hub id. Without ``validation``,
    ``validation_fraction`` of the training split is held out, stratified by domain and label.
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
    """Prototype scores t (Meta-KD section 3.1): weight alpha of the own domain, and how t is
    rescaled."""

    alpha: Fraction = 0.5
    rescale: Literal["none", "center", "minmax", "zscore"] = "none"


class TrainingConfig(Block):
    """One optimisation run. ``warmup_steps`` below 1 is a share of all steps, as in
    ``TrainingArguments``."""

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


class TeacherConfig(Block):
    """The teacher: a pre-trained encoder (directory or hub id), and how it is trained on the
    domains.

    ``zero`` and ``offload`` shard its training; at ``zero: 3`` it stays sharded while it teaches,
    with its weights in host memory under ``offload``. Below that every process holds a copy.
    """

    model: str
    kind: TeacherKind = "meta"
    gamma1: Annotated[float, Field(ge=0.0)] = 0.2
    zero: ZeroStage | None = None
    offload: bool = False
    training: TrainingConfig = TrainingConfig()


class StudentConfig(Block):
    """The student: exactly one of a preset, teacher layers to copy (0-based), or a directory / hub
    id. ``zero`` and ``offload`` shard its training."""

    preset: Literal["tinybert-4l-312", "mini-4l-256", "tiny-2l-128"] | None = None
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    copy_from: Literal["teacher", "encoder"] = "teacher"
    model: str | None = None
    zero: ZeroStage | None = None
    offload: bool = False

    @model_validator(mode="after")
    def _one_source(self):
        given = [name for name in ("preset", "layers", "model") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of preset, layers, model (given: {', '.join(given) or 'none'})"
            )
        return self


class TermWeights(Block):
    """Weight of each distillation term; 0 switches a term off and its features are not even
    collected."""

    embedding: Annotated[float, Field(ge=0.0)] = 1.0
    hidden: Annotated[float, Field(ge=0.0)] = 1.0
    attention: Annotated[float, Field(ge=0.0)] = 1.0
    prediction: Annotated[float, Field(ge=0.0)] = 1.0
    hard_label: Annotated[float, Field(ge=0.0)] = 0.0


class DistillConfig(Block):
    """How a student is taught. ``gamma2`` weights the transferable-knowledge term L_TKD.

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
    backend: Literal["auto", "reference", "cpp", "triton"] = "auto"
    teacher_stream: bool = False
    cache_teacher: Literal["none", "logits", "all"] = "none"
    cache_limit_gib: Positive = 20.0
    domains: list[str] | None = None
    one_student_for_all: bool = False
    processes_per_student: Count | None = None
    training: TrainingConfig = TrainingConfig(learning_rate=5e-5)
    intermediate: TrainingConfig = TrainingConfig(
        learning_rate=5e-5, num_train_epochs=10, lr_scheduler_type="constant"
    )


# Of the other methods all weights count.
_TERMS_OF = {
    "logits_kd": ("prediction", "hard_label"),
    "mtn_kd": ("prediction", "hard_label"),
    "minilmv2": ("attention", "prediction", "hard_label"),
}


class CompareRow(Block):
    """One row of the comparison: a method and the teacher it learns from (``finetune`` has
    none)."""

    method: MethodName
    teacher: TeacherKind | None = None
    gamma2: Annotated[float, Field(ge=0.0)] | None = None

    @model_validator(mode="after")
    def _teacher_fits(self):
        needed = {"finetune": [None], "meta": ["meta"], "mtn_kd": ["single"]}.get(
            self.method, ["single", "mix", "mtl", "meta"]
        )
        if self.teacher not in needed:
            raise ValueError(
                f"method {self.method} needs teacher {' or '.join(map(str, needed))}, "
                f"got {self.teacher}"
            )
        return self


class CompareConfig(Block):
    """Rows x domains x seeds. ``teacher_seeds`` fixes how many teachers are trained: with fewer
    teachers than ``seeds`` they are reused in turn, and the spread then misses part of the
    teacher's share. ``keep_students`` keeps the weights of every cell, not only its scores."""

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
    keep_students: bool = False


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
    """

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
    zero: ZeroStage = 0
    logging_steps: Count = 20
    packed: bool = False
    deepspeed: dict[str, Any] | None = None
    save_steps: Count = 500
    save_total_limit: Count = 2
    step_timeout: Positive = 45.0
    report_to: list[Literal["tensorboard", "jsonl"]] = ["jsonl", "tensorboard"]

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

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


# ---- Reading -------------------------------------------------------------------------------------

KeyPath = tuple[str | int, ...]  # keys and list positions, from the top of the file down to a value


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML configuration, apply overrides, and check everything at once.

    Relative paths inside the file (data, models, ``output_dir``) start at the current directory.

    Args:
        path: the YAML file. Aliases, explicit tags and duplicate keys are refused.
        overrides: ``key.sub=value`` each, the value in YAML; applied in order, over the file.

    Raises:
        ConfigError: its cause lists every problem as ``file: key.path: reason (got VALUE)``, with
            ``command line`` in place of the file where the value came from an override.
    """
    raw, where, broken = _apply_overrides(_read_mapping(path), path, overrides)
    problems: dict[KeyPath, str] = {}
    raw = _check_tree(_with_deepspeed(raw, problems), RunConfig, (), problems)
    config, known = _validate(raw, problems), -1
    while config is None and len(problems) > known:  # with the wrong keys left out, is more wrong?
        known = len(problems)
        config = _validate(_without(raw, problems), problems)
    lines = broken + [f"{where(key)}{_dotted(key, ': ')}{text}" for key, text in problems.items()]
    if config is not None:
        # A wrong key stands at its default by now and must not be said to contradict another.
        wrong = {_dotted(key) for key in problems}
        for text in check_contradictions(config):
            if wrong.isdisjoint(re.findall(r"[\w.]+", text)):
                lines.append(f"{path}: {text}")
        if not lines:
            return config
    cause = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems:", *lines])
    raise ConfigError(cause, f"Correct {path} or the command line; nothing was run.")


def check_contradictions(config: RunConfig) -> list[str]:
    """What no single block can know, keys that exclude each other: ``key: reason`` each."""
    found = []
    distill, student = config.distill, config.student

    if distill.teacher_stream and config.sharding(config.teacher).zero == 3:
        found.append("distill.teacher_stream: excluded by teacher.zero: 3, which needs all streams")
    if distill.teacher_stream and distill.cache_teacher == "all":
        found.append("distill.teacher_stream: excluded by distill.cache_teacher: all")
    if config.compat == "easytransfer" and distill.cache_teacher != "none":
        found.append(
            "distill.cache_teacher: excluded by compat: easytransfer, whose teacher keeps its "
            "dropout and answers otherwise each time"
        )
    if distill.domains is not None and distill.one_student_for_all:
        found.append("distill.domains: excluded by distill.one_student_for_all: true, give one")
    if config.compat == "easytransfer" and config.packed:
        found.append("packed: excluded by compat: easytransfer, which averages over padding too")
    if config.compat == "easytransfer" and distill.schedule == "joint":
        found.append("compat: easytransfer trains in two stages, set distill.schedule: two_stage")
    if distill.method != "finetune":
        if "kind" in config.teacher.model_fields_set:  # left out, it follows from the method
            try:
                CompareRow(method=distill.method, teacher=config.teacher.kind)
            except ValidationError as error:
                reason = _reason(error.errors()[0])
                found.append(f"teacher.kind: against distill.method: {reason}")
        names = _TERMS_OF.get(distill.method, tuple(TermWeights.model_fields))
        weights = [getattr(distill.terms, name) for name in names]
        weights += [distill.gamma2] if distill.method == "meta" else []
        if not any(weights):
            found.append(
                f"distill.terms: every weight is 0 that {distill.method} has "
                f"({', '.join(names)}), so the student would learn nothing"
            )

    preset = re.search(r"-(\d+)l-", student.preset or "")
    depth = len(student.layers) if student.layers else int(preset[1]) if preset else None
    if isinstance(distill.layer_map, list) and depth not in (None, len(distill.layer_map)):
        given = len(distill.layer_map)
        found.append(f"distill.layer_map: has {given} teacher layers for {depth} of the student")

    declared = config.deepspeed or {}
    if check_deepspeed(declared):
        declared = {}  # wrong by itself, and said to be
    runs = {
        "teacher.training": (config.teacher.training, config.teacher),
        "distill.training": (distill.training, student),
    }
    if distill.schedule == "two_stage":
        runs["distill.intermediate"] = (distill.intermediate, student)
    for key, (training, block) in runs.items():
        if training.warmup_steps >= 1 and 0 < training.max_steps < training.warmup_steps:
            warmup, limit = f"{training.warmup_steps:g}", training.max_steps
            found.append(f"{key}.warmup_steps: {warmup} is more than {key}.max_steps {limit}")
        values = config.deepspeed_values(training, config.sharding(block))
        found += [f"deepspeed.{text} ({key})" for text in contradictions(declared, values)]

    if distill.domains == []:
        found.append("distill.domains: is empty, leave it out to train a student for every domain")
    if (config.compare.teacher_seeds or 0) > len(config.compare.seeds):
        found.append(
            f"compare.teacher_seeds: {config.compare.teacher_seeds} is more than the "
            f"{len(config.compare.seeds)} of compare.seeds"
        )
    for key, block in {"teacher": config.teacher, "student": config.student}.items():
        if block.offload and config.sharding(block).zero == 0:
            found.append(f"{key}.offload: needs {key}.zero of 1 to 3")
    for key, values in {
        "data.withhold": config.data.withhold,
        "distill.domains": distill.domains or [],
        "compare.seeds": config.compare.seeds,
        "compare.rows": [_row_name(row) for row in config.compare.rows],
        "report_to": config.report_to,
    }.items():
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            found.append(f"{key}: given more than once: {', '.join(twice)}")
    for key, seed in [("seed", config.seed), *(("compare.seeds", s) for s in config.compare.seeds)]:
        if not 0 <= seed < 2**32:  # what numpy's generator takes
            found.append(f"{key}: must be from 0 to 2^32 - 1 (got {seed})")
    return found


def _row_name(row: CompareRow) -> str:
    gamma2 = "" if row.gamma2 is None else f" with gamma2 {row.gamma2:g}"
    return f"{row.method} from {row.teacher}{gamma2}"


class _Loader(yaml.SafeLoader):
    """YAML without what only an attack or a mistake needs: aliases, tags, duplicate keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not supported, write the value out",
                problem_mark=self.peek_event().start_mark,
            )
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"tags are not supported (got {event.tag})", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a date such as 2024-13-45
            raise yaml.MarkedYAMLError(
                problem=f"a value cannot be read: {error}", problem_mark=node.start_mark
            ) from None

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be one word", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    """One YAML document.

    Raises:
        ValueError: with the place as ``line:column: `` first.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ValueError(
            f"{line}:{column}: character #x{error.character:04x} is not allowed"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(filter(None, [error.context, error.problem]))
        raise ValueError(f"{mark.line + 1}:{mark.column + 1}: {reason}") from None
    except RecursionError:
        raise ValueError("1:1: nested too deeply") from None


def _read_mapping(path: str) -> dict:
    """The file as a dict; raises ``ConfigError`` where there is no mapping to check."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "Give the path of a YAML file.") from None
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise ConfigError(
            f"{path}:{line}:{column}: byte 0x{data[error.start]:02x} is not UTF-8",
            "Save the file as UTF-8.",
        ) from None
    try:
        raw = _parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}:{error}", "Correct the YAML there.") from None
    if raw is None:
        raise ConfigError(f"{path}: is empty", "Give at least output_dir, data, teacher, student.")
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: must hold keys with values (got {_shown(raw)})",
            "Write it as `key: value` lines.",
        )
    return raw


def _with_deepspeed(raw: dict, problems: dict[KeyPath, str]) -> dict:
    """The tree with the content of the JSON file that ``deepspeed`` names in its place, checked."""
    given = raw.get("deepspeed")
    if isinstance(given, str) and given.strip():
        try:
            with open(given, encoding="utf-8") as file:
                given = json.load(file)
        except OSError as error:
            problems[("deepspeed",)] = f"{error.strerror} (got {_shown(given)})"
        except ValueError as error:  # not UTF-8, or not JSON
            problems[("deepspeed",)] = f"is no JSON file: {error} (got {_shown(given)})"
        else:
            if not isinstance(given, dict):
                problems[("deepspeed",)] = f"must hold keys with values (got {_shown(given)})"
    if not isinstance(given, dict):
        return raw
    for line in check_deepspeed(given):
        key, _, reason = line.partition(": ")
        problems[("deepspeed", *key.split("."))] = reason
    return {**raw, "deepspeed": given}


def _apply_overrides(raw: dict, path: str, overrides: Sequence[str]):
    """The tree with overrides applied, a function that names a key's source, broken overrides."""
    broken, given = [], []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals or not all(keys):
            broken.append(f"command line: {override!r} is not key=value or block.key=value")
            continue
        try:
            value = _parse_yaml(text)
        except ValueError as error:
            broken.append(f"command line: {dotted}: {error} (got {text!r})")
            continue
        block = raw
        for depth, key in enumerate(keys[:-1], 1):
            block = block.setdefault(key, {})
            if not isinstance(block, dict):
                above = _dotted(keys[:depth])
                broken.append(f"command line: {dotted}: {above} holds no keys in {path}")
                break
        else:
            block[keys[-1]] = value
            given.append(keys)

    def where(key: KeyPath) -> str:
        overridden = any(key[: len(keys)] == keys for keys in given)
        return "command line: " if overridden else f"{path}: "

    return raw, where, broken


# ---- Checking ------------------------------------------------------------------------------------


def _check_tree(value: Any, annotation: Any, path: KeyPath, problems: dict[KeyPath, str]) -> Any:
    """Reports what pydantic lets pass or reports poorly, and returns the tree with typos mended.

    A misspelt key goes on under the name it was most likely meant for, so that its value is checked
    and the right key is not reported as missing too.
    """
    block = _block_in(annotation)
    if isinstance(value, list):
        return [_check_tree(v, annotation, (*path, i), problems) for i, v in enumerate(value)]
    if isinstance(value, dict) and block:
        fields = block.model_fields
        mended = {}
        for key, item in value.items():
            name, text = key, str(key)
            if key not in fields:
                free = [field for field in fields if field not in value]
                close = difflib.get_close_matches(text, free, n=1)
                elsewhere = _KEYS.get(text) or ([] if close else _close_elsewhere(text))
                means = " or ".join(close + elsewhere)
                hint = f"did you mean {means}?" if means else f"known here: {', '.join(fields)}"
                problems[(*path, text)] = f"unknown key, {hint} (got {_shown(item)})"
                if elsewhere or not close:
                    continue
                name = close[0]
            mended[name] = _check_tree(item, fields[name].annotation, (*path, name), problems)
        return mended
    if isinstance(value, bool) and annotation is not bool:
        problems[path] = f"must not be true or false, quote the word if it is one (got {value})"
    elif isinstance(value, float) and not math.isfinite(value):
        problems[path] = f"must be a finite number (got {value})"
    elif isinstance(value, str) and re.fullmatch(r"\s*[+-]?(inf|infinity|nan)\s*", value, re.I):
        problems[path] = f"must be a finite number (got {value!r})"  # float() reads these words
    elif isinstance(value, str) and not value.strip():
        problems[path] = "must not be blank"
    return value


def _block_in(annotation: Any) -> type[Block] | None:
    """The block that an annotation holds: itself, or the items of a list of blocks."""
    if args := get_args(annotation):
        return next(filter(None, map(_block_in, args)), None)
    is_block = isinstance(annotation, type) and issubclass(annotation, Block)
    return annotation if is_block else None


def _all_keys(block: type[Block], prefix: str = "") -> dict[str, list[str]]:
    """Every key of a block and of the blocks in it -> its dotted places."""
    places: dict[str, list[str]] = {}
    for name, field in block.model_fields.items():
        places.setdefault(name, []).append(prefix + name)
        inner = _block_in(field.annotation)
        if inner is not None and inner is field.annotation:  # items of a list have no dotted name
            for key, found in _all_keys(inner, f"{prefix}{name}.").items():
                places.setdefault(key, []).extend(found)
    return places


_KEYS = _all_keys(RunConfig)
_MISSING = "required key is missing"


def _close_elsewhere(key: str) -> list[str]:
    return [place for near in difflib.get_close_matches(key, _KEYS, n=1) for place in _KEYS[near]]


def _validate(raw: dict, problems: dict[KeyPath, str]) -> RunConfig | None:
    """The configuration, or None after adding pydantic's findings to ``problems``."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    reasons: dict[KeyPath, list[str]] = {}
    for item in errors:
        reasons.setdefault(_place(raw, item), []).append(_reason(item))
    for path, texts in reasons.items():
        # Of a union (`layer_map`: a word or a list), what fits best is the branch that got deepest.
        if any(deeper[: len(path)] == path and deeper != path for deeper in reasons):
            continue
        value = _at(raw, path)
        text = " or ".join(texts)
        if text != _MISSING and not isinstance(value, dict):
            text += f" (got {_shown(value)})"
        problems.setdefault(path, text)
    return None


def _place(raw: dict, item: dict) -> KeyPath:
    """Where in the file an error is: pydantic's location without the branches of a union."""
    path: KeyPath = ()
    for key in item["loc"]:
        if key in raw if isinstance(raw, dict) else isinstance(key, int):
            raw, path = raw[key], (*path, key)
    return (*path, item["loc"][-1]) if item["type"] == "missing" else path


def _reason(item: dict) -> str:
    if item["type"] == "missing":
        return _MISSING
    if item["type"] == "model_type":
        return "must hold keys with values"
    return item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def _without(raw: dict, problems: Iterable[KeyPath]) -> dict:
    """The tree without the values in question, and with stand-ins for what has no default."""
    kept = copy.deepcopy(raw)
    for path in problems:
        if not path:  # the one rule between top-level keys: bf16 excludes fp16
            kept.pop("fp16")
            continue
        # A list goes as a whole, and so does the student, whose keys depend on one another.
        keys = tuple(takewhile(lambda key: isinstance(key, str), path))
        keys = keys[:1] if keys[0] == "student" else keys
        block = _at(kept, keys[:-1])
        if isinstance(block, dict):
            block.pop(keys[-1], None)
    kept = {"output_dir": "?", "data": {}, "teacher": {}, "student": {"model": "?"}} | kept
    kept["data"] = {"train": "?"} | kept["data"]
    kept["teacher"] = {"model": "?"} | kept["teacher"]
    return kept


def _at(tree: Any, path: KeyPath) -> Any:
    """The value at a path; None where the path ends early."""
    for key in path:
        if isinstance(tree, dict):
            tree = tree.get(key)
        else:
            tree = tree[key] if isinstance(tree, list) and isinstance(key, int) else None
    return tree


def _dotted(path: KeyPath, end: str = "") -> str:
    return ".".join(map(str, path)) + end if path else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
