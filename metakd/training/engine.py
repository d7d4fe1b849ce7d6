"""The training loop on DeepSpeed: one short function, ``fit``, and ``evaluate`` beside it.

The module under training returns one loss per example; the reduction happens here, over the whole
optimizer step (all micro-batches of all ranks), so that accumulation, several ranks and one big
batch give the same gradient, ragged last step included. Nothing in the step waits for the device
except every ``logging_steps``.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from sklearn.metrics import f1_score
from torch import Tensor, nn

from metakd.config import RunConfig, TrainingConfig
from metakd.data import Split, StepSampler
from metakd.errors import DivergedError, UnsupportedError
from metakd.method.taps import Features
from metakd.method.teacher import StepOutput
from metakd.training.log import Meter, RunLog
from metakd.training.schedule import optimizer_and_scheduler

Batch = dict[str, Tensor]
Collate = Callable[[list[dict]], Batch]


@dataclass(frozen=True)
class World:
    """The processes that train together, and this one's place and device."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Does this process write files and talk?"""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def agree(self, value):
        """The first rank's ``value``, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def join_world() -> World:
    """Join the processes started by ``deepspeed`` or ``torchrun``; a plain process becomes a world
    of one."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # DeepSpeed looks for MPI where these are missing.
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    elif int(os.environ["WORLD_SIZE"]) > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one host share its cores; each with a full set of threads would be slower than
        # one.
        # torchrun tells their number in the first variable, deepspeed in the second.
        sharing = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(sharing)))
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device)


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


def deepspeed_config(config: RunConfig, training: TrainingConfig) -> dict:
    """The DeepSpeed configuration of one optimisation run."""
    return {
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": {"stage": config.zero},
        "bf16": {"enabled": config.bf16},
        "fp16": {"enabled": config.fp16},
        "steps_per_print": 2**31,
    }


def fit(
    module: nn.Module,
    split: Split,
    collate: Collate,
    *,
    config: RunConfig,
    training: TrainingConfig,
    world: World,
    log: RunLog,
    title: str,
    seed: int,
    teacher: Callable[[Batch], Features] | None = None,
    columns: Callable[[int], dict[str, Tensor]] | None = None,
    score: Callable[[], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Train ``module`` and leave it with the weights that scored best.

    Args:
        module: ``module(batch[, features]) -> StepOutput`` with one loss per example.
        split: training examples.
        collate: examples to a padded batch.
        config: precision, ZeRO stage, logging.
        training: learning rate, epochs, batch sizes.
        world: from ``join_world``.
        log: from ``RunLog``.
        title: of the progress bar.
        seed: of shuffling and dropout.
        teacher: gives the features a student learns from; runs outside the engine, without
            gradients.
        columns: per-example values that change every epoch (false domain labels).
        score: after each epoch; its ``accuracy`` picks the weights that are kept. None keeps the
            last.

    Returns:
        The best score with its ``epoch``; empty without ``score``.

    Raises:
        DivergedError: the loss is not finite.
    """
    micro_batches = training.gradient_accumulation_steps * world.size
    sampler = StepSampler(
        split.lengths,
        step_size=training.per_device_train_batch_size * micro_batches,
        micro_batches=micro_batches,
        seed=seed,
        group_by_length=training.group_by_length,
    )
    steps_per_epoch = len(sampler.epoch(0))
    total_steps = steps_per_epoch * training.num_train_epochs
    if training.max_steps > 0:
        total_steps = min(total_steps, training.max_steps)

    optimizer, scheduler = optimizer_and_scheduler(module, training, total_steps)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=deepspeed_config(config, training),
    )
    if config.zero == 0:
        # In half precision DeepSpeed allocates its state by a step on zero gradients, which would
        # shift Adam's bias correction by one and shorten the first updates by a quarter.
        optimizer.state.clear()
    torch.manual_seed(seed * world.size + world.rank)  # dropout differs between ranks

    meter, best, best_state, step = Meter(), {}, None, 0
    log.start(title, total_steps)
    for epoch in range(math.ceil(total_steps / steps_per_epoch)):
        examples = split
        for name, values in (columns(epoch) if columns else {}).items():
            examples = examples.with_column(name, values)
        engine.train()
        for micro in sampler.epoch(epoch)[: total_steps - step]:
            size = sum(map(len, micro))
            for rows in micro[world.rank :: world.size]:
                batch = to_device(collate([examples[row] for row in rows]), world.device)
                output: StepOutput = engine(batch, teacher(batch)) if teacher else engine(batch)
                # The engine divides by accumulation steps and averages over ranks; undone, so that
                # the sum over everything is divided by the examples of this step.
                loss = output.rows.sum() * (micro_batches / size)
                engine.backward(loss)
                engine.step()
                meter.add({"loss": output.rows.detach().mean(), **output.terms}, len(rows))
            step += 1
            log.advance(size)
            if step % config.logging_steps == 0 or step == total_steps:
                values = meter.read()
                if not math.isfinite(values["loss"]):
                    raise DivergedError(
                        f"{title}: loss is {values['loss']} in the steps up to {step}",
                        "lower the learning rate, or use bf16 instead of fp16",
                    )
                log.write(step, {**values, "learning_rate": scheduler.get_last_lr()[0]})
        if score:
            engine.eval()
            scored = {**score(), "epoch": epoch + 1}
            log.write(step, scored, "validation")
            if scored["accuracy"] > best.get("accuracy", -1.0):
                best = scored
                best_state = {
                    name: value.detach().to("cpu", copy=True)
                    for name, value in module.state_dict().items()
                }
    log.stop()
    engine.destroy()
    # Left on the module, the hooks would keep engine and moments alive through the next run.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    del engine, optimizer, scheduler
    gc.collect()
    if best_state is not None:
        module.load_state_dict(best_state)
    module.eval()
    return best


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; pinned first for a GPU, so that nobody waits for the copy."""
    if device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


@torch.no_grad()
def predict(
    classify: Callable[[Batch], Tensor],
    split: Split,
    collate: Collate,
    *,
    batch_size: int,
    world: World,
) -> Tensor:
    """Predicted class of every example [N] on the CPU; ranks share the work, longest examples
    first."""
    order = torch.tensor(split.lengths).argsort(descending=True)
    predicted = torch.full((len(split),), -1, device=world.device)
    for rows in order.split(batch_size)[world.rank :: world.size]:
        batch = to_device(collate([split[row] for row in rows.tolist()]), world.device)
        predicted[rows.to(world.device)] = classify(batch).argmax(-1)
    if world.size > 1:
        dist.all_reduce(predicted, op=dist.ReduceOp.MAX)
    return predicted.cpu()


def evaluate(
    classify: Callable[[Batch], Tensor],
    split: Split,
    collate: Collate,
    *,
    domains: list[str],
    batch_size: int,
    world: World,
) -> dict[str, float]:
    """Accuracy and macro-F1 over all examples, and accuracy per domain.

    Args:
        classify: batch to logits [B, M]; the caller has put the model in eval mode.
        split: examples to score.
        collate: examples to a padded batch.
        domains: names by domain number.
        batch_size: examples a batch.
        world: from ``join_world``.

    Returns:
        ``accuracy``, ``macro_f1`` and ``accuracy/<domain>`` for each domain that occurs, as
        fractions.
    """
    predicted = predict(classify, split, collate, batch_size=batch_size, world=world)
    right = (predicted == split.labels).double()
    scores = {
        "accuracy": right.mean().item(),
        "macro_f1": float(f1_score(split.labels.numpy(), predicted.numpy(), average="macro")),
    }
    for number in split.domain.unique().tolist():
        scores[f"accuracy/{domains[number]}"] = right[split.domain == number].mean().item()
    return scores
