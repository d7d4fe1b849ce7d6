"""How long a run takes, and what its processes send each other, before anything is trained.

A step of one process takes the sum of

- **compute**: O operations of a forward pass over the rate r at which layers are computed; 3 O / r
  of a model that is trained, 4 O / r with gradient checkpointing, which passes forward twice.
  O = 2 W T + 4 A T L D: T tokens, padding included, by each of the W weights in layers; queries by
  keys and maps by values, of texts padded to L tokens;
- **update**: u seconds for each weight that is trained (its gradient, the norm, AdamW), of the N-th
  part of them from ZeRO 1 on;
- **exchange**: bytes that a process sends, over the rate of its link. With P trained weights of b
  bytes, and of each the share (N - 1) / N: 2 b P at ZeRO 0 and 1, where gradients are reduced and
  what is reduced, or updated, is gathered; b P a micro-batch and b P at ZeRO 2; 3 b P a micro-batch
  at ZeRO 3, which gathers the weights for either pass, and b P_t of a frozen teacher in shards;
- **start**: of each micro-batch, what no size explains: Python, hooks, the loop.

Nothing is taken to hide behind computation, so that exchange is at its worst. Left out: losses that
are more than logits (a few percent of a step, ``benchmarks/step.py``), reading and tokenising,
checkpoints, and starts of students that are pretrained.

The rates are measured (``pipeline.probe``) or those that a maker publishes (``DEVICES``); with the
latter all of it is a prediction that nobody has checked on such a device.

Sizes: A heads, D head width, H hidden width, L tokens of a text, N processes, P parameters.

Source: Rajbhandari et al. 2020 (ZeRO), section 7, for what is sent; Kaplan et al. 2020 (arXiv
2001.08361), section 2.1, for the operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from transformers import PretrainedConfig

from metakd.config import Sharding, TrainingConfig
from metakd.data.batches import StepSampler
from metakd.data.corpus import Split
from metakd.errors import ConfigError
from metakd.method.kinds import TEACHER_KINDS
from metakd.models.sources import unallocated
from metakd.models.taps import NotShownError, encoder_layers
from metakd.pipeline import chain
from metakd.pipeline.lessons import Lesson, phases_of
from metakd.pipeline.memory import BYTES, count_embeddings, quantity
from metakd.pipeline.stages import Run

STEPS = 64  # of an epoch, from which the padding of all is taken


class Sizes(NamedTuple):
    """What of a model's shape decides how long it computes."""

    parameters: int
    words: int  # of them, in the table of words, of which a token reads a row
    matrices: int  # of them, in layers: W
    attention: int  # A D of all layers together

    @classmethod
    def of(cls, shape: PretrainedConfig) -> Sizes:
        """Of a classifier of this shape; nothing is allocated. Where layers share their weights,
        every parameter but the words counts once, and each expert of a mixture as if all were
        asked."""
        model = unallocated(shape)
        parameters, words = model.num_parameters(), 0
        with suppress(ValueError):  # an architecture without such a table
            words = count_embeddings(shape)
        try:
            matrices = sum(weight.numel() for weight in encoder_layers(model).parameters())
        except NotShownError:
            matrices = parameters - words
        head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        heads = shape.num_hidden_layers * shape.num_attention_heads
        return cls(parameters, words, matrices, heads * head)

    def operations(self, tokens: float, length: float) -> float:
        """O of a forward pass.

        Args:
            tokens: T, padding included.
            length: L, to which texts are padded.
        """
        return tokens * (2 * self.matrices + 4 * self.attention * length)


@dataclass(frozen=True)
class Rates:
    """What one process does in a second.

    Args:
        operations: r, of layers.
        update: u, seconds a trained weight.
        start: seconds a micro-batch.
        link: bytes to the next process.
        network: bytes to a process of another host; None: as ``link``.
        a_host: processes of a host.
        disk: bytes of teacher outputs written and read.
    """

    operations: float
    update: float
    start: float
    link: float = math.inf
    network: float | None = None
    a_host: int = 8
    disk: float = 1e9

    def between(self, processes: int) -> float:
        """Bytes a second of the slowest link of so many."""
        across = self.network is not None and processes > self.a_host
        return self.network if across else self.link  # type: ignore[return-value]


class Device(NamedTuple):
    """What a maker says of a device, per second: half-precision operations without sparsity, bytes
    of its memory, bytes to another of the same host and, a direction, of the host's network."""

    operations: float
    memory: float
    link: float
    network: float


# NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM (dense bf16, memory, half of NVLink's
# two directions), and of DGX A100 and H100 for eight network ports of 200 and 400 Gb/s.
DEVICES = {
    "a100": Device(312e12, 2.039e12, 300e9, 25e9),
    "h100": Device(989e12, 3.35e12, 450e9, 50e9),
    "h200": Device(989e12, 4.8e12, 450e9, 50e9),
}
REACHED = 0.4
"""The share of these operations and bytes that training is taken to reach: Korthikanti et al. 2022
(arXiv 2205.05198), table 5, have 0.42 to 0.56 for 22 to 1,000 billion parameters on A100."""
_START = 0.02  # seconds that Python takes for a micro-batch
_UPDATE_BYTES = 30  # in half precision: gradient, three states of 4 bytes read and written, weight


def published(name: str, precision: str) -> Rates:
    """Rates from what is published of a device.

    Args:
        name: in ``DEVICES``.
        precision: fp32, bf16 or fp16; fp32 on tensor cores is TF32, half as fast.
    """
    device = DEVICES[name]
    slower = BYTES[precision] / 2
    return Rates(
        operations=REACHED * device.operations / slower,
        update=_UPDATE_BYTES / (2 * REACHED * device.memory),  # which no product waits for
        start=_START,
        link=REACHED * 2 * device.link,
        network=REACHED * 2 * device.network,
    )


class Load(NamedTuple):
    """What one process is given."""

    steps: int
    micro_batches: int  # of a step
    tokens: float  # of a micro-batch, padding included
    length: float  # to which its texts are padded

    @classmethod
    def of(
        cls, lengths: Sequence[int], training: TrainingConfig, processes: int, packed: bool
    ) -> Load:
        """That of a training run over texts of these numbers of tokens.

        Raises:
            DataError: they do not fill a step.
        """
        accumulation = training.gradient_accumulation_steps
        together = accumulation * processes
        sampler = StepSampler(
            list(lengths),
            step_size=training.per_device_train_batch_size * together,
            micro_batches=together,
            seed=0,
            group_by_length=training.group_by_length,
        )
        steps = len(sampler) * training.num_train_epochs
        if training.max_steps > 0:
            steps = min(steps, training.max_steps)
        cut = [[lengths[row] for row in rows] for s in sampler.epoch(0)[:STEPS] for rows in s]
        tokens = fmean(sum(texts) if packed else max(texts) * len(texts) for texts in cut)
        return cls(steps, accumulation, tokens, fmean(map(max, cut)))


class Step(NamedTuple):
    """Seconds of an optimizer step by what they are spent on, and bytes that a process sends."""

    compute: float
    update: float
    exchange: float
    start: float
    sent: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.update + self.exchange + self.start


def step(
    model: Sizes,
    load: Load,
    rates: Rates,
    *,
    processes: int,
    zero: int,
    itemsize: int,
    held: int = 0,
    again: bool = False,
    teacher: Sizes | None = None,
    teacher_sharded: bool = False,
) -> Step:
    """One optimizer step.

    Args:
        model: that is trained.
        load: of one process.
        rates: of one process.
        processes: N.
        zero: stage, 0 to 3.
        itemsize: b.
        held: of its parameters, not trained.
        again: gradient checkpointing.
        teacher: that answers in each micro-batch.
        teacher_sharded: it lies in shards.
    """
    forward = model.operations(load.tokens, load.length)
    operations = (4 if again else 3) * forward
    trained = model.parameters - held
    whole = load.micro_batches
    gathered = {0: 2 * trained, 1: 2 * trained, 2: (whole + 1) * trained}
    sent = gathered.get(zero, whole * (2 * model.parameters + trained))
    if teacher is not None:
        operations += teacher.operations(load.tokens, load.length)
        sent += whole * teacher.parameters * teacher_sharded
    sent *= itemsize * (processes - 1) / processes
    return Step(
        compute=whole * operations / rates.operations,
        update=rates.update * trained / (processes if zero else 1),
        exchange=sent / rates.between(processes),
        start=whole * rates.start,
        sent=sent,
    )


def answering(
    model: Sizes,
    tokens: float,
    length: float,
    batch: int,
    rates: Rates,
    *,
    processes: int,
    itemsize: int,
    sharded: bool,
) -> float:
    """Seconds in which a model answers to texts, in equal parts of the processes.

    Args:
        model: that answers.
        tokens: of all texts; those of a batch are about as long as each other.
        length: L.
        batch: texts of a batch.
        rates: of one process.
        processes: N.
        itemsize: b.
        sharded: it lies in shards, which are gathered for each batch.
    """
    computed = model.operations(tokens, length) / rates.operations
    batches = math.ceil(tokens / max(length, 1) / batch)
    a_batch = rates.start
    if sharded:
        sent = model.parameters * itemsize * (processes - 1) / processes
        a_batch += sent / rates.between(processes)
    return (computed + batches * a_batch) / processes


class Stage(NamedTuple):
    """A part of a run."""

    title: str
    seconds: float
    told: str = ""
    each: float = 0.0  # of its optimizer steps, in the mean

    def __str__(self) -> str:
        return f"{span(self.seconds)}{': ' * bool(self.told)}{self.told}"


RatesOf = Callable[[PretrainedConfig, Load, Sharding], Rates]


def stages(run: Run, processes: int, rates_of: RatesOf) -> list[Stage]:
    """What the configured run takes, stage by stage; none is taken to be finished.

    Args:
        run: opened, its corpus readable.
        processes: N, all of which train each teacher.
        rates_of: of a process that trains a model of this shape at this load, so sharded.

    Raises:
        ConfigError: what a run would say of configuration and data.
    """
    return list(_stages(run, processes, rates_of))


def _stages(run: Run, processes: int, rates_of: RatesOf) -> Iterable[Stage]:
    config, corpus, outputs = run.config, run.corpus, run.outputs
    lessons = list(map(run.lesson_of, run.student_domains))
    run.foresee(lessons)
    wanted = [step for lesson in lessons for step in chain.steps(run, lesson)]
    kinds = {kind for one in lessons for kind in one.anchors}
    kinds = {kind for kind in kinds if not TEACHER_KINDS[kind].in_data}
    learned, sharding = config.teacher.training, config.sharding(config.teacher)
    shape, taught = outputs.taught, Sizes.of(outputs.taught)
    scored = [split for split in (corpus.validation, corpus.test) if split is not None]

    def trained(lengths: Sequence[int], training: TrainingConfig, among: int) -> Load:
        return Load.of(lengths, training, among, config.packed)

    def passing(texts: Iterable[Split], rates: Rates) -> float:
        """Seconds in which the teacher answers to all of these."""
        return sum(
            answering(
                taught,
                tokens,
                tokens / max(1, len(split)),
                learned.per_device_eval_batch_size,
                rates,
                processes=processes,
                itemsize=BYTES[config.precision],
                sharded=sharding.zero == 3,
            )
            for split in texts
            for tokens in [sum(split.lengths)]
        )

    rates = rates_of(shape, trained(corpus.train.lengths, learned, processes), sharding)
    if any(TEACHER_KINDS[kind].by_score for kind in kinds) or any(
        one.reads_scores for one in wanted
    ):
        texts = [split for split in (corpus.train, corpus.unlabelled) if split is not None]
        yield Stage("prototypes", passing(texts, rates))
    for kind in sorted(kinds):
        parts = [corpus.train]
        if TEACHER_KINDS[kind].per_domain:
            parts = [run.part(corpus.train, domain) for domain in corpus.domains]
        times = config.teacher.ensemble * (config.teacher.folds or 1)
        loads = [trained(part.lengths, learned, processes) for part in parts]
        taken = [
            step(
                taught,
                load,
                rates,
                processes=processes,
                zero=sharding.zero,
                itemsize=BYTES[config.precision],
                again=learned.gradient_checkpointing,
            )
            for load in loads
        ]
        total = times * sum(load.steps * one.seconds for load, one in zip(loads, taken))
        count = times * sum(load.steps for load in loads)
        yield Stage(f"teacher {kind}", total, *_told(count, taken))
        judged = learned.num_train_epochs + 1 if learned.selection == "best" else 1
        yield Stage(
            f"teacher {kind}, scored",
            times * passing(judged * scored, rates),
            "",
        )
    kept = {one.place: one for one in wanted if any(outputs.cached_phases(one))}
    if kept:
        size = outputs.kept_bytes()
        asked = [run.texts(one) for one in kept.values()]
        again = sum(outputs.count(one) for one in kept.values()) / len(kept)
        seconds = again * passing(asked, rates) + size / rates.disk
        yield Stage("teacher outputs, kept", seconds, quantity(size))
    yield from _students(run, wanted, processes, rates_of, trained)


def _students(
    run: Run, wanted: Sequence[Lesson], processes: int, rates_of: RatesOf, trained: Callable
) -> Iterable[Stage]:
    config, outputs = run.config, run.outputs
    among = min(config.distill.processes_per_student or processes, processes)
    groups = max(1, processes // among)
    total, count, taken = 0.0, 0, []
    for one in wanted:
        shape, block = outputs.shape_of(one), one.student
        sizes, sharding = Sizes.of(shape), config.sharding(block)
        cached = outputs.cached_phases(one)
        for phase, is_cached in zip(phases_of(one.distill, outputs.terms(one)), cached):
            lengths = run.texts(one, phase.texts).lengths
            load = trained(lengths, phase.training, among)
            rates = rates_of(shape, load, sharding)
            asks = one.asks_a_model() and not is_cached
            found = step(
                sizes,
                load,
                rates,
                processes=among,
                zero=sharding.zero,
                itemsize=BYTES[config.precision],
                held=sizes.words if block.freeze_embeddings else 0,
                again=phase.training.gradient_checkpointing,
                teacher=Sizes.of(outputs.taught_of(one)) if asks else None,
                teacher_sharded=config.sharding(config.teacher).zero == 3,
            )
            times = one.distill.generations
            total += times * load.steps * found.seconds
            count += times * load.steps
            taken.append(found)
    students = f"{len(wanted)} student{'s' * (len(wanted) != 1)}"
    if groups > 1:
        total *= math.ceil(len(wanted) / groups) / len(wanted)
        students += f", {groups} side by side"
    yield Stage(students, total, *_told(count, taken))


def _told(steps: int, taken: Sequence[Step]) -> tuple[str, float]:
    mean = Step(*map(fmean, zip(*taken, strict=True)))
    parts = {name: getattr(mean, name) for name in ("compute", "update", "exchange", "start")}
    shares = ", ".join(
        f"{name} {100 * part / mean.seconds:.0f} %" for name, part in parts.items() if part
    )
    sent = f", {quantity(mean.sent)} sent" if mean.sent else ""
    return f"{steps:,} steps of {mean.seconds:.3g} s ({shares}{sent})", mean.seconds


def as_table(found: Sequence[Stage], processes: int, price: float | None = None) -> dict[str, str]:
    """What ``metakd doctor CONFIG --plan`` prints.

    Args:
        found: the stages.
        processes: N.
        price: of a device for an hour.
    """
    table = {stage.title: str(stage) for stage in found}
    total = sum(stage.seconds for stage in found)
    hours = processes * total / 3600
    cost = "" if price is None else f", at {price:g} an hour {hours * price:,.2f}"
    return table | {"all": f"{span(total)}, {hours:,.3g} device hours{cost}"}


def checked_device(name: str | None) -> str | None:
    """The name of a device in ``DEVICES``, or None.

    Raises:
        ConfigError: it is not there.
    """
    if name is not None and name not in DEVICES:
        raise ConfigError(
            f"--on: nothing is known of {name!r}",
            f"use one of {', '.join(DEVICES)}, or leave it out to measure on this machine",
        )
    return name


def span(seconds: float) -> str:
    """A time as people say it."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
