"""The training loop on DeepSpeed: ``fit``.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn

from metakd.config import RunConfig, Sharding, TrainingConfig
from metakd.data.batches import Batch, Collate, StepSampler
from metakd.data.corpus import Split
from metakd.errors import CheckpointError, DivergedError, StoppedError
from metakd.method.teachers import StepOutput
from metakd.method.temperature import UPDATES, Temperature
from metakd.models.taps import Features
from metakd.training.dropout import quick_masks
from metakd.training.faults import SkippingAdamW, StopRequest, Watchdog
from metakd.training.half import StepInParts
from metakd.training.log import Meter, RunLog
from metakd.training.saves import Keeper, Position, Saves
from metakd.training.schedule import optimizer_and_scheduler, warmup
from metakd.training.scoring import own_batches
from metakd.training.settings import compute_dtype, deepspeed_config, hidden_size
from metakd.training.shards import put_weights, retire, shard, whole_weights
from metakd.training.world import World

SKIPS_ALLOWED = 10
"""Steps in a row that may be left out because their loss is not finite."""

AVERAGED_SHARE, AVERAGED_TIMES = 0.25, 10
"""``selection: average`` is the mean of the weights at so many steps, evenly spaced over this last
share of them. As many as tell a mean from one of its parts: each is gathered to the first rank."""


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; dropout differs between ranks through ``fit``."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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
    settle: Callable[[], None] | None = None,
    saves: Saves | None = None,
    temperature: Temperature | None = None,
) -> dict[str, float]:
    """Train ``module`` and leave it with the weights that ``training.selection`` says, whole, on
    ``world.device`` (in host memory after ZeRO-3, where one device may not hold them).

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
        score: of the weights as they are. Where the best are to be kept it is called after each
            epoch and the task's metric picks them (without it, the last are kept), else at the end.
        conclude: called once at the end, with these weights in place and still sharded.
        settle: called at the end of each step, for what does not change within one.
        saves: checkpoints; None saves nothing. A phase that the checkpoint to start from has
            behind it is not run at all.
        temperature: of the module, which is moved as it goes.

    Returns:
        The score of these weights with the ``epoch``; empty without ``score``.

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

    meter, position = Meter(), Position()
    if temperature is not None:
        temperature.begin()
    keeper = Keeper(engine, saves, world, log, meter, position, temperature)
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
    watched = Watchdog(world, config.step_timeout)
    with StopRequest(world) as stop, watched, quick_masks(world.device):
        loop = _Loop(
            engine,
            scheduler,
            keeper,
            stop,
            config,
            title,
            total_steps,
            teacher,
            settle,
            training.selection,
        )
        # A checkpoint of an epoch's last step was written before the epoch was scored.
        begun = max(math.ceil(position.step / len(sampler)) - 1, 0)
        for epoch in range(begun, math.ceil(total_steps / len(sampler))):
            examples = split
            for name, values in (columns(epoch) if columns else {}).items():
                examples = examples.with_column(name, values)
            first = epoch * len(sampler)
            plan = sampler.epoch(epoch)[position.step - first : total_steps - first]
            loop.train(plan, own_batches(examples, collate, plan, world), split.lengths)
            if score and training.selection == "best" and epoch >= position.epochs_scored:
                loop.choose(epoch, score, split.task.metric)
        if saves is not None and not saves.last_phase:
            keeper.save()
        if position.best or position.averaged:
            put_weights(module, position.best_weights, world)
        scored = position.best  # stays as it is: a checkpoint of it has weights beside it
        if score and training.selection != "best":
            scored = loop.judge(score) | {"epoch": math.ceil(total_steps / len(sampler))}
            log.write(position.step, scored, "validation")
        if conclude:
            loop.judge(conclude)
        if number := stop.settle():
            keeper.stop(number, title)
    log.stop()
    retire(engine)
    del engine, scheduler, keeper, loop
    gc.collect()
    module.eval()
    return scored


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
    settings = deepspeed_config(config, sharding, training, **facts, **hidden_size(module))
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
        # A process alone would copy its gradients together, and apart again.
        engine.enable_backward_allreduce = world.size > 1
        if config.precision != "fp32":
            engine.optimizer.overflow_checker = _LeftToTheNorm()
            if StepInParts.fits(engine.optimizer):
                engine.optimizer.step = StepInParts(engine.optimizer)
    return engine, scheduler


class _LeftToTheNorm:
    """In the place of DeepSpeed's search for values that are not finite: two reductions of every
    gradient, before a norm that is not finite either and leaves the step out as well."""

    def check(self, param_groups=None) -> bool:
        """Never finds any."""
        return False


@dataclass
class _Loop:
    """One ``fit`` under way: its steps, and its scores between them."""

    engine: deepspeed.DeepSpeedEngine
    scheduler: torch.optim.lr_scheduler.LRScheduler
    keeper: Keeper
    stop: StopRequest
    config: RunConfig
    title: str
    total_steps: int
    teacher: Callable[[Batch], Features] | None
    settle: Callable[[], None] | None
    selection: str

    def __post_init__(self):
        self.world, self.log = self.keeper.world, self.keeper.log
        self.meter, self.position = self.keeper.meter, self.keeper.position
        self._held = max(self.total_steps // UPDATES, 1)  # steps that a temperature is held for
        self._averaged_steps: set[int] = set()
        if self.selection == "average":
            spacing = self.total_steps * AVERAGED_SHARE / AVERAGED_TIMES
            backwards = (int(number * spacing) for number in range(AVERAGED_TIMES))
            self._averaged_steps = {self.total_steps - steps for steps in backwards}

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
            if position.step % self._held == 0:
                self.keeper.move_temperature(position.step / self.total_steps)
            if position.step in self._averaged_steps:
                with self.log.pausing():
                    self._average()
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
        if self.settle:
            self.settle()
        position.step += 1
        if engine.was_step_applied():
            position.skipped_in_a_row = 0
            for output, index in seen:
                loss = {"loss": output.rows.mean()}
                self.meter.add(loss | output.terms, len(index))
                if self.keeper.temperature is not None:
                    self.keeper.heard.add(loss, len(index))
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

    def choose(self, epoch: int, score: Callable[[], dict[str, float]], metric: str) -> None:
        """Score an epoch, and keep its weights if they are the best so far by this metric."""
        position = self.position
        with self.log.pausing():
            scored = {**self.judge(score), "epoch": epoch + 1}
            position.epochs_scored = epoch + 1
            if scored[metric] > position.best.get(metric, -math.inf):
                position.best = scored
                position.best_weights = whole_weights(self.engine.module, self.world)
        self.log.write(position.step, scored, "validation")

    def _average(self) -> None:
        """Take the weights as they are into the mean."""
        position = self.position
        weights = whole_weights(self.engine.module, self.world)
        position.averaged += 1
        if weights is None:
            return
        if position.best_weights is None:
            position.best_weights = {
                name: value.float() if value.is_floating_point() else value
                for name, value in weights.items()
            }
        for name, mean in position.best_weights.items():
            if mean.is_floating_point():
                mean.lerp_(weights[name].float(), 1 / position.averaged)

    def judge(self, score: Callable):
        """What ``score`` returns of the weights as they are; a signal ends it, and the run."""
        self.engine.eval()
        with self.world.progress.interruptible(self.stop.poll):
            try:
                return score()
            except StoppedError as error:
                self.keeper.stop(error.number, self.title)
