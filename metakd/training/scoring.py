"""Passes over all examples, shared by the ranks: batches, predictions, scores."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from metakd.data.batches import Batch, Collate, prefetch
from metakd.data.corpus import Split
from metakd.training.world import World


def own_batches(
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
    for chunk, batch in zip(plan, own_batches(split, collate, plan, world)):
        yield torch.tensor(chunk[world.rank]), batch


@torch.no_grad()
def logits_of(
    classify: Callable[[Batch], Tensor],
    split: Split,
    collate: Collate,
    *,
    num_classes: int,
    batch_size: int,
    world: World,
) -> Tensor:
    """Logits of every example [N, M] on the CPU, float32; ranks share the work."""
    # Smaller than any answer, filled row by row.
    found = torch.full((len(split), num_classes), -torch.inf, device=world.device)
    for rows, batch in in_turns(split, collate, batch_size, world):
        found[rows.to(world.device)] = classify(batch).float()
        world.progress.beat("an evaluation")
        world.progress.end_if_asked()
    if world.size > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.cpu()


def evaluate(
    classify: Callable[[Batch], Tensor],
    split: Split,
    collate: Collate,
    *,
    domains: list[str],
    num_classes: int,
    batch_size: int,
    world: World,
    one_by_one: bool = False,
) -> dict[str, float | list[list[int]] | str]:
    """Scores over all examples, as the split's task has them, and those of each domain.

    Args:
        classify: batch to logits [B, M]; the caller has put the model in eval mode.
        split: examples to score.
        collate: examples to a padded batch.
        domains: names by domain number.
        num_classes: M.
        batch_size: examples a batch.
        world: from ``join_world``.
        one_by_one: also say of each example whether it was right, for paired tests, where answers
            are right or wrong.

    Returns:
        The scores of ``Task.scores`` (``accuracy`` and ``macro_f1``, for one), and for each domain
        that occurs its metric, ``accuracy/<domain>``, and what ``Task.details`` notes of it:
        ``confusion/<domain>``, ``right/<domain>``.
    """
    logits = logits_of(
        classify, split, collate, num_classes=num_classes, batch_size=batch_size, world=world
    )
    task = split.task
    scores = task.scores(split.labels, logits)
    for number in split.domain.unique().tolist():
        own, name = split.domain == number, domains[number]
        part = split.labels[own], logits[own]
        scores[f"{task.metric}/{name}"] = task.score(*part)
        details = task.details(*part, one_by_one)
        scores |= {f"{what}{name}": found for what, found in details.items()}
    return scores
