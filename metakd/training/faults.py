"""What a training loop does about the outside world: a request to stop, a rank that hangs, a
gradient that is not finite.

Each has one small class. The loop asks them between steps; none of them touches weights or files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from metakd.errors import UnsupportedError
from metakd.training.world import World

POLL_SECONDS = 1.0


class StopRequest:
    """Notes SIGTERM and SIGINT, and makes all ranks agree on the step after which to stop.

    The agreement of one step travels while the next is computed: a rank that was signalled says so
    in an asynchronous reduction on the CPU, whose result everybody reads one poll later.

    Use as a context; the handlers that were there before return at its end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, world: World):
        self._world = world
        self._asked = 0
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None
        self._before: dict = {}

    def __enter__(self) -> StopRequest:
        # Handlers are the main thread's to set; elsewhere (a notebook's worker) nobody is asked.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self._asked = number

    def poll(self) -> int:
        """The signal on which all ranks stop now, or 0. Every rank calls it equally often: after
        each optimizer step, and after each batch of an evaluation."""
        if self._world.size == 1:
            return self._asked
        stop = 0
        if self._pending is not None:
            work, told = self._pending
            work.wait()
            stop = int(told)
        told = torch.tensor(self._asked)
        work = dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        self._pending = work, told
        return stop

    def settle(self) -> int:
        """The signal that came too late for any other poll, or 0: at the end of the loop, on every
        rank."""
        stop = self.poll()
        if self._pending is not None:
            work, told = self._pending
            work.wait()
            stop = max(stop, int(told))
            self._pending = None
        return stop


class Watchdog:
    """Ends the process when some rank has stopped making progress, and says which one and where.

    A rank that waits for a dead peer sees the connection close; one that waits for a stopped or
    endlessly looping peer would wait for the backend's timeout, half an hour. So each rank counts
    what it does (``World.progress``), a thread publishes the count in the processes' key-value
    store every second, and if the counts of all ranks stand still for ``limit`` seconds, the ranks
    that can still speak name the one that is behind and end.

    Args:
        world: the processes that train together.
        limit: seconds without any progress, at least; a loop whose own beats are far apart gets ten
            times its longest pause, and the first steps, which load and compile, ten times
            ``limit``.
    """

    def __init__(self, world: World, limit: float):
        self._world = world
        self._limit = limit
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        progress = self._world.progress
        progress.start()
        if self._world.size > 1:
            self._heard = [_Sign(0, 0, progress.where)] * self._world.size
            for job in (self._exchange, self._watch):
                thread = threading.Thread(target=job, daemon=True, name="metakd-watchdog")
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(self, *_exception) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def _exchange(self) -> None:
        """Publish this rank's signs and read those of the others.

        In a thread of its own: whatever its timeout, a question to the store never ends when the
        process that hosts the store has been stopped."""
        # A connection of its own: the process group's may be busy waiting in the main thread.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        progress, alive = self._world.progress, 0
        keys = [f"metakd/{rank}" for rank in range(self._world.size)]
        while not self._end.wait(POLL_SECONDS):
            alive += 1
            own = _Sign(progress.count, alive, progress.where)
            with suppress(RuntimeError):  # the host of the store is gone
                store.set(keys[self._world.rank], json.dumps(own))
                for rank, key in enumerate(keys):
                    # Who hangs before its first word stays at the start.
                    if store.check([key]):
                        self._heard[rank] = _Sign(*json.loads(store.get(key)))

    def _watch(self) -> None:
        progress, ranks = self._world.progress, range(self._world.size)
        seen = list(self._heard)
        since = time.monotonic()
        heard_at = [since for _ in ranks]
        while not self._end.wait(POLL_SECONDS):
            moment = time.monotonic()
            now = list(self._heard)
            now[self._world.rank] = _Sign(
                progress.count, seen[self._world.rank].alive + 1, progress.where
            )
            for rank in ranks:
                if now[rank].alive != seen[rank].alive:
                    heard_at[rank] = moment
            if [s.count for s in now] != [s.count for s in seen]:
                since = moment
            seen = now
            limit = max(self._limit, 10 * progress.longest_pause)
            if moment - since > (limit if progress.is_warm else 10 * limit):
                # A stopped process does not even publish; of those that do, the one that did least
                # is behind.
                silent = [rank for rank in ranks if moment - heard_at[rank] > 4 * POLL_SECONDS]
                rank = min(silent or ranks, key=lambda r: now[r].count)
                _give_up(rank, now[rank].where, moment - since)


class _Sign(NamedTuple):
    """What a rank publishes of itself."""

    count: int
    alive: int  # grows with every publication
    where: str


def _give_up(rank: int, where: str, seconds: float) -> None:
    print(
        f"metakd: rank {rank} has made no progress for {seconds:.0f} s, last seen at {where}\n"
        "remedy: look at that rank's machine, then start again with --resume auto",
        file=sys.stderr,
        flush=True,
    )
    os._exit(UnsupportedError.exit_code)


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves out a step whose gradient is not finite, and says so in ``overflow``.

    DeepSpeed does this in half precision and at ZeRO 1 to 3 but not for a plain fp32 optimizer;
    with the attribute it counts the step as skipped and leaves the schedule where it is.
    """

    overflow = False

    def step(self, closure=None):
        """One step, or none."""
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms = torch._foreach_norm([g for g in gradients if g is not None])
        self.overflow = not bool(torch.stack([n.float() for n in norms]).isfinite().all())
        return None if self.overflow else super().step(closure)
