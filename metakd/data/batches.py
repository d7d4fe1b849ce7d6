"""Batches: which examples make up each optimizer step, how they are padded, and made ahead.

Sizes: N examples of a split, B of a batch, L tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from queue import Empty, Queue

import torch
from torch import Tensor

from metakd.errors import DataError

Batch = dict[str, Tensor]
Collate = Callable[[list[dict]], Batch]

_STEPS_PER_BLOCK = 50


def collate(tokenizer, pad_to_multiple_of: int | None = None, packed: bool = False) -> Collate:
    """A function that turns examples of a ``Split`` into a batch padded to its longest example.

    Args:
        tokenizer: says how to pad.
        pad_to_multiple_of: pad on to such a length, which suits tensor cores.
        packed: add ``real_tokens``, the positions ``[T]`` of real tokens among the B x L, which
            packed models would otherwise wait for the device to find.

    Returns:
        ``list[dict] -> dict`` of ``input_ids``, ``attention_mask``, ``token_type_ids`` if the
        tokenizer has them (each ``[B, L]``), ``labels``, ``domain``, ``index`` (``[B]``) and the
        split's columns.
    """
    from transformers import DataCollatorWithPadding

    pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    def batch(examples: list[dict]) -> Batch:
        tokens = [name for name in ("input_ids", "token_type_ids") if name in examples[0]]
        padded = pad(
            [
                {n: e[n] for n in tokens} | {"attention_mask": [1] * len(e["input_ids"])}
                for e in examples
            ]
        )
        rest = {n: torch.stack([e[n] for e in examples]) for n in examples[0] if n not in tokens}
        if packed:
            rest["real_tokens"] = padded["attention_mask"].flatten().nonzero().flatten()
        return dict(padded) | rest

    return batch


def prefetch(batches: Iterable[Batch], device: torch.device, depth: int = 2) -> Generator[Batch]:
    """The same batches in the same order on ``device``, each made while earlier ones are used.

    A thread draws from ``batches`` and, for a GPU, pins what it drew; the copy starts when the
    consumer asks, on its own stream. The thread must not draw random numbers that the consumer
    draws as well; ``collate`` draws none. It ends with the iterator, also when that is closed
    early.

    Args:
        batches: drawn from in the thread; may do work for each.
        device: where the consumer wants them.
        depth: how many are made ahead, at least 1.

    Raises:
        ValueError: depth is not positive.
        Exception: what ``batches`` raises, in its place in the order.
    """
    if depth < 1:
        raise ValueError(f"depth: {depth} batches ahead; at least 1")
    return _ahead(batches, device, depth)


def _ahead(batches: Iterable[Batch], device: torch.device, depth: int) -> Generator[Batch]:
    made: Queue[tuple[Batch | None, BaseException | None]] = Queue(depth)
    stopped = threading.Event()

    def produce() -> None:
        error = None
        try:
            for batch in batches:
                if device.type == "cuda":
                    batch = {name: value.pin_memory() for name, value in batch.items()}
                made.put((batch, None))
                if stopped.is_set():
                    return
        except BaseException as raised:
            error = raised
        made.put((None, error))

    thread = threading.Thread(target=produce, name="metakd-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = made.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    finally:
        stopped.set()
        with suppress(Empty):  # room for the one batch that the thread may be waiting to hand over
            while True:
                made.get_nowait()
        thread.join()


class StepSampler:
    """Which examples make up each optimizer step, and how a step is cut into micro-batches.

    A step has exactly ``micro_batches`` micro-batches, none empty, sizes differing by at most 1,
    that hold ``step_size`` examples together; every example comes once per epoch. The last step
    holds what is left; a rest with fewer examples than micro-batches joins the step before.

    The plan depends on ``(seed, epoch)`` only, not on the world size: rank r of w takes the
    micro-batches ``step[r::w]``. So one process that accumulates and several that share a step see
    the same steps.

    Args:
        lengths: tokens of each example, N numbers.
        step_size: examples per optimizer step, over all ranks and accumulated micro-batches.
        micro_batches: ranks x accumulation.
        seed: of the shuffles.
        group_by_length: put examples of similar length in one step, which saves padding: shuffle,
            sort by length inside blocks of 50 steps, cut, shuffle the steps.

    Raises:
        DataError: if there are fewer examples than micro-batches.
        ValueError: if a step is too small for its micro-batches.
    """

    def __init__(
        self,
        lengths: list[int],
        *,
        step_size: int,
        micro_batches: int,
        seed: int,
        group_by_length: bool = True,
    ):
        if not 1 <= micro_batches <= step_size:
            raise ValueError(
                f"step_size: {step_size} examples cannot fill {micro_batches} micro-batches"
            )
        if len(lengths) < micro_batches:
            raise DataError(
                f"{len(lengths)} training examples cannot fill the {micro_batches} micro-batches "
                "of one step",
                "Lower gradient_accumulation_steps or the number of processes, or give more data.",
            )
        self.lengths = torch.tensor(lengths)
        self.step_size = step_size
        self.micro_batches = micro_batches
        self.seed = seed
        self.group_by_length = group_by_length

    def __len__(self) -> int:
        """Steps per epoch."""
        full, rest = divmod(len(self.lengths), self.step_size)
        return full + (rest >= self.micro_batches)

    def epoch(self, epoch: int) -> list[list[list[int]]]:
        """The steps of one epoch: ``[step][micro-batch][example]``, examples as positions in the
        split."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        # The rest is set aside before the sort, or it would always be the longest examples.
        full = len(order) // self.step_size
        order, rest = order[: full * self.step_size], order[full * self.step_size :]
        if self.group_by_length:
            blocks = order.split(_STEPS_PER_BLOCK * self.step_size)
            order = torch.cat([block[self.lengths[block].argsort(stable=True)] for block in blocks])
        steps = list(order.reshape(full, self.step_size))
        steps = [steps[i] for i in torch.randperm(full, generator=generator).tolist()]
        if len(rest) >= self.micro_batches:
            steps.append(rest)
        elif len(rest):
            steps[-1] = torch.cat([steps[-1], rest])
        return [[part.tolist() for part in step.tensor_split(self.micro_batches)] for step in steps]
