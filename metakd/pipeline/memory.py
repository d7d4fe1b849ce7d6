"""How much memory a run needs, per process, before anything is loaded.

Weights, gradients and AdamW's state are counted exactly, as DeepSpeed holds them at each ZeRO
stage; activations are a rough formula. Models are built from their configuration on the ``meta``
device: no weights are read and none allocated.

With P parameters, N processes and b bytes of the dtype (4 for fp32, 2 for bf16 and fp16):

- weights ``b P``, divided by N at stage 3;
- gradients ``b P``, divided by N from stage 2 on (here and below, of the P that are trained);
- optimizer ``8 P`` for two moments in fp32, and ``4 P`` more for fp32 copies of the weights, which
  DeepSpeed keeps in half precision and, whatever the dtype, from stage 1 on; all of it divided by N
  from stage 1 on;
- activations ``layers B L (17 b H + 4 A)`` of one micro-batch in which every example is as long as
  the longest. In fp32 BERT kept 0.95 to 1.13 times that (``tests/test_memory.py``); on a CPU, where
  SDPA keeps its maps under attention dropout, up to 1.8 times. With gradient checkpointing it is
  one such layer and the inputs of all, ``layers B L b H``.

``offload`` moves the optimizer's part to the host, with a gradient in fp32, and at stage 3 the
weights too. Left out: DeepSpeed's buckets, the gathered layers of stage 3, the cache of the
allocator, CUDA's context (about 0.5 GB), logits, and what only distillation needs beside its two
models: projections and domain layers, a few H x H matrices, and relations of K domains, of which
each layer has K + 9.

Sizes: A heads, B batch, H hidden width, L tokens, N processes, P parameters.

Source: Rajbhandari et al. 2020 (ZeRO), section 3; Korthikanti et al. 2022, section 4.1, for the
34 B L H bytes of a layer in half precision, without the attention maps that SDPA does not keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from metakd.config import RunConfig
from metakd.errors import ConfigError
from metakd.method.kinds import TEACHER_KINDS
from metakd.method.methods import METHODS
from metakd.models.sources import load_config, unallocated
from metakd.models.student import student_shape, word_embeddings

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Memory:
    """Bytes per process, on the device and on the host."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """All of it that lies on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations about": self.activations,
        }
        listed = ", ".join(f"{name} {quantity(size)}" for name, size in parts.items() if size)
        host = f"; on the host {quantity(self.host)}" if self.host else ""
        return f"{quantity(self.device)} ({listed}){host}"


def estimate(
    parameters: int,
    *,
    zero: int,
    offload: bool,
    dtype: str,
    world_size: int,
    batch: int,
    length: int,
    layers: int,
    hidden: int,
    heads: int,
    checkpointing: bool = False,
    frozen: int = 0,
) -> Memory:
    """Memory of a model under training with AdamW.

    Args:
        parameters: P.
        zero: stage, 0 to 3.
        offload: the optimizer's part, and at stage 3 the weights, lie on the host.
        dtype: fp32, bf16 or fp16.
        world_size: N.
        batch: examples of a micro-batch per process.
        length: tokens of the longest example.
        layers: of the encoder.
        hidden: H.
        heads: A per layer.
        checkpointing: activations are computed again in the backward pass.
        frozen: of the parameters, not trained.
    """
    size = BYTES[dtype]

    def part(count: int, sharded: bool) -> int:
        """All, or the part of one process, rounded up as DeepSpeed pads it."""
        return -(-count // world_size) if sharded else count

    trained = parameters - frozen
    own = part(trained, zero >= 1)
    weights = size * part(parameters, zero >= 3)
    optimizer = (8 + 4 * (size < 4 or zero >= 1)) * own
    host = 0
    if offload:
        host = optimizer + 4 * own
        optimizer = 0
        if zero >= 3:
            host, weights = host + weights, 0
    layer = 17 * size * hidden + 4 * heads
    per_token = layers * size * hidden + layer if checkpointing else layers * layer
    return Memory(
        weights=weights,
        gradients=size * part(trained, zero >= 2),
        optimizer=optimizer,
        activations=batch * length * per_token,
        host=host,
    )


def estimate_frozen(
    parameters: int,
    *,
    zero: int,
    offload: bool,
    dtype: str,
    world_size: int,
    batch: int,
    length: int,
    layers: int,
    hidden: int,
) -> Memory:
    """Memory of a teacher that only answers: its weights, and of each layer hidden state, queries
    and keys, which the student's losses wait for. Arguments as for ``estimate``; ``zero`` 3 shards
    the weights, any other stage leaves them whole."""
    size = BYTES[dtype]
    weights = size * (-(-parameters // world_size) if zero >= 3 else parameters)
    features = 3 * size * layers * batch * length * hidden
    if offload:
        return Memory(weights=0, activations=features, host=weights)
    return Memory(weights=weights, activations=features)


def count_parameters(shape: PretrainedConfig) -> int:
    """P of a sequence classifier of this shape; nothing is allocated."""
    return sum(parameter.numel() for parameter in unallocated(shape).parameters())


def count_embeddings(shape: PretrainedConfig) -> int:
    """Numbers of its table of words."""
    table = word_embeddings(unallocated(shape))
    return sum(parameter.numel() for parameter in table.parameters())


def memory_table(config: RunConfig, world_size: int) -> dict[str, str]:
    """What ``metakd doctor CONFIG`` prints: the teacher's training, the student's and those of the
    comparison's own shapes, as configured and at every ZeRO stage (in one row where that makes no
    difference), and the frozen teacher beside the student.

    Args:
        config: the checked configuration.
        world_size: N.

    Raises:
        ConfigError: a model's configuration cannot be read.
    """
    teacher, dtype = config.sharding(config.teacher), config.precision
    students = {"student training": (config.student, config.distill.training)}
    for row in config.compare.rows:
        if row.student is not None:
            taught_as = row.taught(config.distill).training
            students[f"training of {row.student.shape}"] = row.student, taught_as
    for block in config.students.values():
        if block.pretrain is not None:
            students[f"pretraining of {block.preset}"] = block, block.pretrain
    try:
        taught = load_config(config.teacher.model)
        shapes = {
            title: student_shape(block, taught, config.data.max_length)
            for title, (block, _) in students.items()
        }
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"models: {str(error).splitlines()[0]}", "correct teacher.model and student"
        ) from error
    table = {"counted for": f"{world_size} process{'es' * (world_size > 1)}, {dtype}"}
    kind = METHODS[config.distill.method].teacher(config.teacher.kind)
    has_model = kind is None or not TEACHER_KINDS[kind].in_data
    trained = []
    if has_model:
        trained.append(("teacher training", taught, 0, teacher, config.teacher.training))
    for title, (block, training) in students.items():
        shape = shapes[title]
        held = count_embeddings(shape) if block.freeze_embeddings else 0
        trained.append((title, shape, held, config.sharding(block), training))
    for title, shape, frozen, sharding, training in trained:
        parameters = count_parameters(shape)
        table[title] = f"{parameters / 1e6:.1f} M parameters"
        needed = {
            stage: str(
                estimate(
                    parameters,
                    zero=stage,
                    offload=sharding.offload and stage == sharding.zero,
                    dtype=dtype,
                    world_size=world_size,
                    batch=training.per_device_train_batch_size,
                    length=config.data.max_length,
                    layers=shape.num_hidden_layers,
                    hidden=shape.hidden_size,
                    heads=shape.num_attention_heads,
                    checkpointing=training.gradient_checkpointing,
                    frozen=frozen,
                )
            )
            for stage in dict.fromkeys((sharding.zero, *STAGES))
        }
        if len(set(needed.values())) == 1:
            table[f"{title}, any ZeRO stage"] = needed[sharding.zero]
            continue
        for stage, memory in needed.items():
            mark = " (configured)" * (stage == sharding.zero)
            table[f"{title}, ZeRO {stage}{mark}"] = memory
    if not has_model:
        return table
    beside = "while its outputs are made for the cache"
    if config.distill.cache_teacher != "all":
        beside = "beside the student"
    table[f"frozen teacher {beside}"] = str(
        estimate_frozen(
            count_parameters(taught),
            zero=teacher.zero,
            offload=teacher.offload and teacher.zero == 3,
            dtype=dtype,
            world_size=world_size,
            batch=config.distill.training.per_device_train_batch_size,
            length=config.data.max_length,
            layers=taught.num_hidden_layers,
            hidden=taught.hidden_size,
        )
    )
    return table


def quantity(size: float) -> str:
    """Bytes as people say them."""
    power = min(int(math.log10(max(size, 1)) // 3), 5)
    return f"{size / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
