"""The training loop on DeepSpeed: ``fit``, and ``evaluate`` beside it.

The module under training returns one loss per example; the reduction happens here, over the whole
optimizer step (all micro-batches of all ranks), so that accumulation, several ranks and one big
batch give the same gradient, ragged last step included. Three things in a step wait for the device:
DeepSpeed's check of the gradient's norm, transformers, which asks before each forward pass under
SDPA whether the batch has padding, and the log every ``logging_steps``.

A run can end at any step and go on later as if nothing had happened (``Saves``); a step whose
gradient is not finite is left out on all ranks, and ten in a row end the run.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import deepspeed
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from sklearn.metrics import confusion_matrix, f1_score
from torch import Tensor, nn

from metakd import __version__
from metakd.config import RunConfig, Sharding, TrainingConfig
from metakd.data import Split, StepSampler, prefetch
from metakd.deepspeed_schema import AUTO, resolve_deepspeed
from metakd.errors import CheckpointError, DivergedError, StoppedError, UnsupportedError
from metakd.method.taps import Features
from metakd.method.teacher import StepOutput
from metakd.training.checkpoint import (
    Checkpoints,
    HashedFiles,
    Tag,
    random_state,
    restore_random_state,
    safe_load,
)
from metakd.training.faults import SkippingAdamW, StopRequest, Watchdog
from metakd.training.log import Meter, RunLog
from metakd.training.reshard import ReshardedFiles
from metakd.training.schedule import optimizer_and_scheduler, warmup
from metakd.training.shards import own_part, put_weights, retire, shard, whole_weights
from metakd.training.world import World

Batch = dict[str, Tensor]
Collate = Callable[[list[dict]], Batch]

BEST_WEIGHTS = "best.safetensors"
_VERSIONS = {"metakd": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}
SKIPS_ALLOWED = 10
"""Steps in a row that may be left out because their loss is not finite."""


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; dropout differs between ranks through ``fit``."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def compute_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """fp32, bf16 or fp16.

    Raises:
        UnsupportedError: DeepSpeed has no fp16 on this device.
    """
    if config.fp16 and not deepspeed.get_accelerator().is_fp16_supported():
        raise UnsupportedError(
            f"fp16: true is not supported on {device}", "use bf16: true, or neither"
        )
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def deepspeed_config(
    config: RunConfig, sharding: Sharding, training: TrainingConfig | None, **facts
) -> dict:
    """What DeepSpeed is told of one run: the user's own configuration, completed.

    Args:
        config: precision, and the user's ``deepspeed`` block.
        sharding: ZeRO stage and offloading.
        training: None for a model that is not trained.
        facts: what else is known, by DeepSpeed's names, see ``resolve_deepspeed``.

    Raises:
        ConfigError: the user's block contradicts the other settings.
    """
    raw = config.deepspeed or {}
    values = config.deepspeed_values(training or TrainingConfig(), sharding)
    if training is None:
        raw = {key: value for key, value in raw.items() if key == "zero_optimization"}
        lasting = ("zero_optimization.", "bf16.", "fp16.")
        values = {key: value for key, value in values.items() if key.startswith(lasting)}
    values |= facts
    for name, used in {
        "offload_optimizer": sharding.offload and training is not None,
        "offload_param": sharding.offload and sharding.zero == 3,
    }.items():
        declared = raw.get("zero_optimization", {}).get(name, {}).get("device")
        if used or declared == AUTO:
            values[f"zero_optimization.{name}.device"] = "cpu" if used else "none"
    settings = resolve_deepspeed(raw, values)
    settings.setdefault("steps_per_print", 2**31)
    # torch's AdamW wherever its states are, so that results do not depend on offloading.
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    return settings


def _hidden_size(module: nn.Module) -> dict[str, int]:
    """H of the first part of a module that says what its H is."""
    configs = (getattr(part, "config", None) for part in module.modules())
    widths = (getattr(found, "hidden_size", None) for found in configs)
    width = next(filter(None, widths), None)
    return {} if width is None else {"hidden_size": width}


@dataclass
class Saves:
    """Where a stage's training is saved and where it goes on.

    Args:
        checkpoints: of the stage.
        start: the checkpoint to go on from; None starts afresh.
        inputs: digest of everything that decides the result; a checkpoint of others is refused.
        reshard: go on from a checkpoint of another number of processes, with as many examples in a
            step as before.
        phase: 0-based number of this ``fit`` among those of the stage.
        last_phase: is no other ``fit`` to follow?
    """

    checkpoints: Checkpoints
    start: Tag | None = None
    inputs: str = ""
    reshard: bool = False
    phase: int = 0
    last_phase: bool = True


@dataclass
class _Position:
    """Where a run is: what a checkpoint has to bring back beside weights and moments."""

    step: int = 0
    epochs_scored: int = 0
    skipped_in_a_row: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_weights: dict[str, Tensor] | None = None  # on the first rank only


def fit(
    module: nn.Module,
    split: Split,
    collate: Collate,
    *,
    config: RunConfig,
    training: TrainingConfig,
    sharding: Sharding,
    world: World,
    log: RunLog,
    title: str,
    seed: int,
    teacher: Callable[[Batch], Features] | None = None,
    columns: Callable[[int], dict[str, Tensor]] | None = None,
    score: Callable[[], dict[str, float]] | None = None,
    conclude: Callable[[], None] | None = None,
    saves: Saves | None = None,
) -> dict[str, float]:
    """Train ``module`` and leave it with the weights that scored best, whole, on ``world.device``
    (in host memory after ZeRO-3, where one device may not hold them).

    Args:
        module: ``module(batch[, features]) -> StepOutput`` with one loss per example.
        split: training examples.
        collate: examples to a padded batch.
        config: precision, logging, saving.
        training: learning rate, epochs, batch sizes.
        sharding: ZeRO stage and offloading.
        world: from ``join_world``.
        log: from ``RunLog``.
        title: of the progress bar.
        seed: of shuffling and dropout.
        teacher: gives the features a student learns from; runs outside the engine, without
            gradients.
        columns: per-example values that change every epoch (false domain labels).
        score: after each epoch; its ``accuracy`` picks the weights that are kept. None keeps the
            last.
        conclude: called once at the end, with the best weights in place and still sharded.
        saves: checkpoints; None saves nothing. A phase that the checkpoint to start from has
            behind it is not run at all.

    Returns:
        The best score with its ``epoch``; empty without ``score``.

    Raises:
        CheckpointError: a checkpoint cannot be written, or does not fit this run.
        DivergedError: ten steps in a row, or all of them, had a loss or a gradient that is not
            finite.
        StoppedError: SIGTERM or SIGINT; the last finished step is saved.
    """
    start = None if saves is None else saves.start
    if start is not None and start.facts["phase"] > saves.phase:
        return {}
    shares = _share_out(training, world, saves)
    sampler = StepSampler(
        split.lengths,
        step_size=shares.step_size,
        micro_batches=shares.accumulation * world.size,
        seed=seed,
        group_by_length=training.group_by_length,
    )
    total_steps = len(sampler) * training.num_train_epochs
    if training.max_steps > 0:
        total_steps = min(total_steps, training.max_steps)
    engine, scheduler = _start_engine(
        module, config, training, sharding, world, shares, total_steps
    )
    torch.manual_seed(seed * world.size + world.rank)  # dropout differs between ranks

    meter, position = Meter(), _Position()
    keeper = _Keeper(engine, saves, world, log, meter, position)
    keeper.restore(
        {"zero": sharding.zero, "precision": config.precision, "step_size": shares.step_size},
        {
            "micro_batches": shares.accumulation * world.size,
            "processes": shares.processes,
            "steps": total_steps,
        },
        seed,
    )
    log.start(title, total_steps, done=position.step)
    with StopRequest(world) as stop, Watchdog(world, config.step_timeout):
        loop = _Loop(engine, scheduler, keeper, stop, config, title, total_steps, teacher)
        # A checkpoint of an epoch's last step was written before the epoch was scored.
        begun = max(math.ceil(position.step / len(sampler)) - 1, 0)
        for epoch in range(begun, math.ceil(total_steps / len(sampler))):
            examples = split
            for name, values in (columns(epoch) if columns else {}).items():
                examples = examples.with_column(name, values)
            first = epoch * len(sampler)
            plan = sampler.epoch(epoch)[position.step - first : total_steps - first]
            loop.train(plan, _batches(examples, collate, plan, world), split.lengths)
            if score and epoch >= position.epochs_scored:
                loop.choose(epoch, score)
        if saves is not None and not saves.last_phase:
            keeper.save()
        if position.best:
            put_weights(module, position.best_weights, world)
        if conclude:
            loop.judge(conclude)
        if number := stop.settle():
            keeper.stop(number, title)
    log.stop()
    retire(engine)
    del engine, scheduler, keeper, loop
    gc.collect()
    module.eval()
    return position.best


class _Shares(NamedTuple):
    """How the examples of a step are shared out."""

    processes: int  # that a step is counted for: after a reshard, those that began
    step_size: int  # examples of a step, on all processes
    accumulation: int  # micro-batches of a step, on each process


def _share_out(training: TrainingConfig, world: World, saves: Saves | None) -> _Shares:
    """The shares of one phase.

    Raises:
        CheckpointError: these processes are too many for the steps that others began.
    """
    accumulation, batch = training.gradient_accumulation_steps, training.per_device_train_batch_size
    plain = _Shares(world.size, batch * accumulation * world.size, accumulation)
    if saves is None or saves.start is None:
        return plain
    start, facts = saves.start, saves.start.facts
    processes = facts.get("processes", facts["world_size"])
    was_resharded = facts["world_size"] == world.size != processes
    if not (saves.reshard or was_resharded):
        return plain
    # A phase that nobody has begun yet keeps the size of its steps, too.
    step_size, micro_batches = batch * accumulation * processes, accumulation * processes
    if facts["phase"] == saves.phase:
        step_size, micro_batches = facts["step_size"], facts["micro_batches"]
    if step_size < world.size:
        raise CheckpointError(
            f"{start.folder}: its steps of {step_size} examples are too small for "
            f"{world.size} processes",
            f"start at most {step_size}",
        )
    accumulation = min(max(1, round(micro_batches / world.size)), step_size // world.size)
    return _Shares(processes, step_size, accumulation)


def _start_engine(
    module: nn.Module,
    config: RunConfig,
    training: TrainingConfig,
    sharding: Sharding,
    world: World,
    shares: _Shares,
    total_steps: int,
):
    """DeepSpeed's engine around the module, in its place, and the schedule of its optimizer."""
    # Elsewhere DeepSpeed looks at the gradient itself.
    look = sharding.zero == 0 and config.precision == "fp32"
    optimizer, scheduler = optimizer_and_scheduler(
        module, training, total_steps, SkippingAdamW if look else torch.optim.AdamW
    )
    facts = {
        "train_micro_batch_size_per_gpu": math.ceil(
            shares.step_size / (shares.accumulation * world.size)
        ),
        "gradient_accumulation_steps": shares.accumulation,
        "optimizer.params.betas": optimizer.defaults["betas"],
        "optimizer.params.eps": optimizer.defaults["eps"],
        "scheduler.params.warmup_num_steps": warmup(training, total_steps),
        "scheduler.params.total_num_steps": total_steps,
        "world_size": world.size,
    }
    settings = deepspeed_config(config, sharding, training, **facts, **_hidden_size(module))
    if sharding.zero == 3:
        shard(module, settings, compute_dtype(config, world.device), world)
    else:
        module.to(world.device)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=scheduler, config=settings
    )
    if sharding.zero == 0:
        # In half precision DeepSpeed allocates its state by a step on zero gradients, which would
        # shift Adam's bias correction by one and shorten the first updates by a quarter.
        optimizer.state.clear()
    return engine, scheduler


@dataclass
class _Loop:
    """One ``fit`` under way: its steps, and its scores between them."""

    engine: deepspeed.DeepSpeedEngine
    scheduler: torch.optim.lr_scheduler.LRScheduler
    keeper: _Keeper
    stop: StopRequest
    config: RunConfig
    title: str
    total_steps: int
    teacher: Callable[[Batch], Features] | None

    def __post_init__(self):
        self.world, self.log = self.keeper.world, self.keeper.log
        self.meter, self.position = self.keeper.meter, self.keeper.position

    def train(
        self, plan: list[list[list[int]]], batches: Iterator[Batch], lengths: list[int]
    ) -> None:
        """The steps of an epoch that are left.

        Args:
            plan: ``[step][micro-batch][example]``, of all ranks.
            batches: this rank's micro-batches of these steps.
            lengths: tokens of each example.
        """
        position, config = self.position, self.config
        self.engine.train()
        for micro in plan:
            self._take_step(micro, batches)
            self.log.advance(
                sum(map(len, micro)), sum(lengths[row] for rows in micro for row in rows)
            )
            if position.step % config.logging_steps == 0 or position.step == self.total_steps:
                rate = {"learning_rate": self.scheduler.get_last_lr()[0]}
                self.log.write(position.step, self.meter.read(self.world) | rate)
            if number := self.stop.poll():
                self.keeper.stop(number, self.title)
            if position.step % config.save_steps == 0 and position.step < self.total_steps:
                with self.log.pausing():
                    self.keeper.save()

    def _take_step(self, micro: list[list[int]], batches: Iterator[Batch]) -> None:
        """One optimizer step over the micro-batches of all ranks."""
        engine, position, world = self.engine, self.position, self.world
        seen: list[tuple[StepOutput, Tensor]] = []
        share = len(micro) / sum(map(len, micro))
        for _ in micro[world.rank :: world.size]:
            world.progress.beat(f"step {position.step + 1}")
            batch = next(batches)
            # Nothing here may hold the teacher's features longer than the step does.
            output: StepOutput = (
                engine(batch, self.teacher(batch)) if self.teacher else engine(batch)
            )
            # The engine divides by accumulation steps and averages over ranks; undone, so that the
            # sum over everything is divided by the examples of this step.
            engine.backward(output.rows.sum() * share)
            seen.append((StepOutput(output.rows.detach(), output.terms), batch["index"]))
            self._apply()
        position.step += 1
        if engine.was_step_applied():
            position.skipped_in_a_row = 0
            for output, index in seen:
                self.meter.add({"loss": output.rows.mean(), **output.terms}, len(index))
        else:
            self._note_skipped(seen)

    def _apply(self) -> None:
        try:
            self.engine.step()
        except Exception as error:  # DeepSpeed raises the base class
            if "loss scale" not in str(error):
                raise
            raise DivergedError(
                f"{self.title}: gradients overflow fp16 at the smallest loss scale, "
                f"step {self.position.step + 1}",
                "use bf16 instead of fp16, or lower the learning rate",
            ) from error

    def _note_skipped(self, seen: list[tuple[StepOutput, Tensor]]) -> None:
        """Say which examples made the step's gradient useless; end the run after too many such
        steps."""
        position, title = self.position, self.title
        own = torch.cat([index[~output.rows.isfinite()] for output, index in seen]).tolist()
        examples = sorted(chain.from_iterable(self.world.gather(own)))
        self.log.note(position.step, "skipped", examples=examples)
        if not examples and self.config.fp16 and self.engine.dynamic_loss_scale():
            return  # a step on the way to the loss scale, which ends by itself
        position.skipped_in_a_row += 1
        if position.skipped_in_a_row < min(SKIPS_ALLOWED, self.total_steps):
            return
        times = f"in {position.skipped_in_a_row} steps in a row, the last of them {position.step}"
        if not examples:
            raise DivergedError(
                f"{title}: the gradient was not finite {times}, whose losses were finite",
                "lower the learning rate, or use fp32",
            )
        shown = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
        raise DivergedError(
            f"{title}: the loss was not finite {times}, with training rows {shown}",
            "look at these rows, lower the learning rate, or use bf16 instead of fp16",
        )

    def choose(self, epoch: int, score: Callable[[], dict[str, float]]) -> None:
        """Score an epoch, and keep its weights if they are the best so far."""
        position = self.position
        with self.log.pausing():
            scored = {**self.judge(score), "epoch": epoch + 1}
            position.epochs_scored = epoch + 1
            if scored["accuracy"] > position.best.get("accuracy", -1.0):
                position.best = scored
                position.best_weights = whole_weights(self.engine.module, self.world)
        self.log.write(position.step, scored, "validation")

    def judge(self, score: Callable):
        """What ``score`` returns of the weights as they are; a signal ends it, and the run."""
        self.engine.eval()
        with self.world.progress.interruptible(self.stop.poll):
            try:
                return score()
            except StoppedError as error:
                self.keeper.stop(error.number, self.title)


@dataclass
class _Keeper:
    """Writes the state of one ``fit`` to checkpoints and brings it back."""

    engine: deepspeed.DeepSpeedEngine
    saves: Saves | None
    world: World
    log: RunLog
    meter: Meter
    position: _Position
    _saved_step: int | None = None

    def __post_init__(self):
        # DeepSpeed would put a script beside the tags, unhashed and outside of them.
        self.engine._copy_recovery_script = lambda folder: None

    def save(self) -> None:
        """Publish a checkpoint of the last finished step."""
        if self.saves is None:
            return
        self._refuse_non_finite()
        saves, position = self.saves, self.position
        facts = {**self.facts, "phase": saves.phase, "step": position.step, "versions": _VERSIONS}
        own = {
            "random": random_state(self.world.device),
            "meter": self.meter.state(),
            "log": self.log.position(),
            "epochs_scored": position.epochs_scored,
            "skipped_in_a_row": position.skipped_in_a_row,
            "best": position.best,
        }

        def write(files: HashedFiles) -> None:
            self.engine.checkpoint_engine = files
            self.engine.save_checkpoint(
                str(files.folder.parent), tag=files.folder.name, save_latest=False
            )
            files.write(_rank_file(self.world.rank), lambda file: torch.save(own, file))
            if position.best_weights is not None:
                best = safetensors.torch.save(position.best_weights)
                files.write(BEST_WEIGHTS, lambda file: file.write(best))

        saves.checkpoints.save(f"phase{saves.phase}-step{position.step:08d}", write, facts)
        self._saved_step = position.step

    def stop(self, number: int, title: str) -> None:
        """Save, unless this step is saved, and end, on a signal."""
        if self._saved_step != self.position.step:
            self.save()
        saved = "" if self.saves is None else "saved; "
        raise StoppedError(
            f"{title}: stopped by signal {number} after step {self.position.step}",
            f"{saved}go on with the same command",
            number=number,
        )

    def restore(self, facts: dict, plan: dict, seed: int) -> None:
        """Go on from the checkpoint to start from, if it is one of this phase.

        Args:
            facts: what must be the same then and now.
            plan: what must be the same unless the number of processes has changed.
            seed: of the processes that another number of processes starts afresh.
        """
        inputs = "" if self.saves is None else self.saves.inputs
        self.facts = {**facts, **plan, "inputs": inputs}
        start = None if self.saves is None else self.saves.start
        if start is None or start.facts["phase"] != self.saves.phase:
            return
        before, changed = start.facts["world_size"], start.facts["world_size"] != self.world.size
        if changed and not self.saves.reshard:
            raise CheckpointError(
                f"{start.folder}: written by {before} processes, this run has {self.world.size}",
                f"start {before} processes (deepspeed --num_gpus {before} --module metakd ...), or "
                "convert it: the same command with --reshard",
            )
        fixed = self.facts.keys() - (plan.keys() if changed else ())
        facts = {"processes": before, **start.facts}
        wrong = [
            f"{name} was {facts.get(name)}, is {self.facts[name]}"
            for name in sorted(fixed)
            if facts.get(name) != self.facts[name]
        ]
        if wrong:
            raise CheckpointError(
                f"{start.folder}: {'; '.join(wrong)}", "start afresh with --resume never"
            )
        self.engine.checkpoint_engine = (
            ReshardedFiles(start, self.engine, self.world)
            if changed
            else HashedFiles(start.folder, self.saves.checkpoints.disk)
        )
        self.engine.load_checkpoint(str(start.folder.parent), tag=start.folder.name)
        sidecars = [self.world.rank] if not changed else range(before)
        told = [safe_load(start.folder / _rank_file(rank)) for rank in sidecars]
        own, position = told[0], self.position
        position.step = start.facts["step"]
        position.epochs_scored = own["epochs_scored"]
        position.skipped_in_a_row = own["skipped_in_a_row"]
        position.best = own["best"]
        best = start.folder / BEST_WEIGHTS
        if self.world.is_main and best.exists():
            position.best_weights = safetensors.torch.load_file(best)
        self.log.rewind(own["log"], position.step)
        if not changed:
            self.meter.include(own["meter"], self.world.device)
            restore_random_state(own["random"], self.world.device)
            return
        if self.world.is_main:
            for other in told:
                self.meter.include(other["meter"], self.world.device)
        torch.manual_seed((seed + position.step) * self.world.size + self.world.rank)

    def _refuse_non_finite(self) -> None:
        held = [own_part(p, self.world.rank) for p in self.engine.module.parameters()]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(held)])
        if not all(self.world.gather(bool(norms.isfinite().all()))):
            raise DivergedError(
                f"weights are not finite after step {self.position.step}; nothing was saved",
                "go on from the last checkpoint with a lower learning rate",
            )


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _batches(
    split: Split, collate: Collate, plan: list[list[list[int]]], world: World
) -> Generator[Batch]:
    """This rank's micro-batches of these steps, made ahead."""
    own = (rows for micro in plan for rows in micro[world.rank :: world.size])
    return prefetch((collate([split[row] for row in rows]) for rows in own), world.device)


def in_turns(
    split: Split, collate: Collate, batch_size: int, world: World
) -> Iterator[tuple[Tensor, Batch]]:
    """This rank's share of a pass over all examples, longest first: rows [B] of the split, on the
    CPU, and their batch. What makes up a batch does not depend on the number of ranks.

    Every rank gets as many, some the last one twice: under ZeRO-3 a forward pass is collective.
    """
    order = torch.tensor(split.lengths).argsort(descending=True)
    chunks = order.split(batch_size)
    turns = range(0, len(chunks), world.size)
    plan = [
        [chunks[min(turn + r, len(chunks) - 1)].tolist() for r in range(world.size)]
        for turn in turns
    ]
    for chunk, batch in zip(plan, _batches(split, collate, plan, world)):
        yield torch.tensor(chunk[world.rank]), batch


@torch.no_grad()
def predict(
    classify: Callable[[Batch], Tensor],
    split: Split,
    collate: Collate,
    *,
    batch_size: int,
    world: World,
) -> Tensor:
    """Predicted class of every example [N] on the CPU; ranks share the work."""
    predicted = torch.full((len(split),), -1, device=world.device)
    for rows, batch in in_turns(split, collate, batch_size, world):
        predicted[rows.to(world.device)] = classify(batch).argmax(-1)
        world.progress.beat("an evaluation")
        world.progress.end_if_asked()
    if world.size > 1:
        dist.all_reduce(predicted, op=dist.ReduceOp.MAX)
    return predicted.cpu()


def evaluate(
    classify: Callable[[Batch], Tensor],
    split: Split,
    collate: Collate,
    *,
    domains: list[str],
    num_classes: int,
    batch_size: int,
    world: World,
) -> dict[str, float | list[list[int]]]:
    """Accuracy and macro-F1 over all examples, accuracy and confusion per domain.

    Args:
        classify: batch to logits [B, M]; the caller has put the model in eval mode.
        split: examples to score.
        collate: examples to a padded batch.
        domains: names by domain number.
        num_classes: M.
        batch_size: examples a batch.
        world: from ``join_world``.

    Returns:
        ``accuracy``, ``macro_f1`` and for each domain that occurs ``accuracy/<domain>``, as
        fractions, and ``confusion/<domain>``, how many examples of each class (row) were given each
        (column).
    """
    predicted = predict(classify, split, collate, batch_size=batch_size, world=world)
    right = (predicted == split.labels).double()
    scores = {
        "accuracy": right.mean().item(),
        "macro_f1": float(f1_score(split.labels.numpy(), predicted.numpy(), average="macro")),
    }
    for number in split.domain.unique().tolist():
        own = split.domain == number
        scores[f"accuracy/{domains[number]}"] = right[own].mean().item()
        scores[f"confusion/{domains[number]}"] = confusion_matrix(
            split.labels[own], predicted[own], labels=range(num_classes)
        ).tolist()
    return scores
