"""The processes that train together: joining them, agreeing, and this one's place and device."""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from metakd.errors import MetakdError, StoppedError, UnsupportedError

# Ranks wait for one another while one of them reads data, or for groups that train other students.
# A hang in training is for ``faults.Watchdog`` to find, sooner than any timeout could.
_PATIENCE = timedelta(days=7)


# Below those that systems give to outgoing connections, which would take a port before it is used.
_PORTS = range(20_000, 32_000)


class Progress:
    """How often this process has gone on, and where it was last: what a watchdog looks at."""

    def __init__(self):
        self.count = 0
        self._poll: Callable[[], int] | None = None
        self.start()

    def start(self) -> None:
        """A new loop begins: pauses and warm-up are counted afresh."""
        self.where = "the start"
        self.longest_pause = 0.0  # seconds
        self._last = time.monotonic()
        self._beats = 0

    @property
    def is_warm(self) -> bool:
        """Are the first steps over, which load, compile and allocate?"""
        return self._beats > 3

    def beat(self, where: str) -> None:
        """This process goes on; ``where`` names the place for a message."""
        now = time.monotonic()
        if self.is_warm:
            self.longest_pause = max(self.longest_pause, now - self._last)
        self._last, self.where = now, where
        self.count += 1
        self._beats += 1

    @contextmanager
    def interruptible(self, poll: Callable[[], int]) -> Iterator[None]:
        """While it lasts, ``end_if_asked`` asks ``poll`` for the signal to stop on."""
        self._poll = poll
        try:
            yield
        finally:
            self._poll = None

    def end_if_asked(self) -> None:
        """Called equally often on every rank.

        Raises:
            StoppedError: all ranks are to stop.
        """
        if self._poll is not None and (number := self._poll()):
            raise StoppedError("stopped", number=number)


@dataclass(frozen=True)
class World:
    """The processes that train together, and this one's place and device.

    Args:
        rank: of this process among them.
        size: how many they are.
        device: of this process.
        control: group for agreements, on the CPU whatever the device; None for a world of one.
        progress: counted by loops, looked at by ``faults.Watchdog``.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def is_main(self) -> bool:
        """Does this process write files and talk?"""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def agree(self, value):
        """The first rank's ``value``, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.control, group_src=0)
        return box[0]

    def on_first(self, do: Callable):
        """What ``do`` returns on the first rank, which alone calls it; None on the others.

        Raises:
            MetakdError: of the first rank, on every rank.
        """
        value, problem = None, None
        if self.is_main:
            try:
                value = do()
            except MetakdError as error:
                problem = error
        if problem := self.agree(problem):
            raise problem
        return value

    def one_by_one(self, make: Callable):
        """What ``make`` returns: on the first rank before the others, which find its caches.

        Raises:
            MetakdError: of the first rank, on every rank.
        """
        value = self.on_first(make)
        return value if self.is_main else make()

    def add_up(self, values: torch.Tensor) -> None:
        """Replaces a tensor on the CPU by its sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(values, group=self.control)

    def gather(self, value) -> list:
        """Every rank's ``value``, in order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values


def join_world() -> World:
    """Join the processes started by ``deepspeed`` or ``torchrun``; a plain process becomes a world
    of one.

    Raises:
        UnsupportedError: this host has fewer GPUs than processes.
    """
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
        if local >= (count := torch.cuda.device_count()):
            raise UnsupportedError(
                f"process {local} of this host, counted from 0, has no GPU: there are {count}",
                'start a process for each GPU, or train on CPUs with CUDA_VISIBLE_DEVICES=""',
            )
        torch.cuda.set_device(local)
    elif int(os.environ["WORLD_SIZE"]) > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one host share its cores; each with a full set of threads would be slower than
        # one.
        # torchrun tells their number in the first variable, deepspeed in the second.
        sharing = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(sharing)))
    if not dist.is_initialized():
        # On a CPU DeepSpeed would now compile an operator for tensor-parallel inference, which
        # nothing here does; half a minute, and who is killed meanwhile leaves a lock that hangs
        # every later start. The list of operators is not asked for, but made here: asked, DeepSpeed
        # tries a compiler on each.
        operators = vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        operators["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo", verbose=False, timeout=_PATIENCE
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    size = dist.get_world_size()
    control = dist.new_group(backend="gloo", timeout=_PATIENCE) if size > 1 else None
    return World(dist.get_rank(), size, device, control)


def leave_world() -> None:
    """End the connections to the other processes in order, before the interpreter ends."""
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()


@contextmanager
def in_groups(world: World, size: int) -> Iterator[tuple[World, int, int]]:
    """Worlds of ``size`` processes in place of the one of all, until the end of the context.

    Each has a rendezvous of its own and knows nothing of the others, so that no collective of
    DeepSpeed can wait for a process that is doing something else. At the end all processes meet
    again, the first to be there waiting for the last; ``join_world`` then gives their world.

    Args:
        world: of all processes; not to be used any more.
        size: processes of a group; divides their number.

    Yields:
        The group's world, its number, and how many groups there are.
    """
    group, rank = divmod(world.rank, size)
    places = world.gather(_free_place())
    address, port, _ = places[group * size]
    _leave_for(address, port, rank, size)
    yield join_world(), group, world.size // size
    address, _, port = places[0]
    _leave_for(address, port, world.rank, world.size)


def _free_place() -> tuple[str, int, int]:
    """An address of this host that the others can reach, and two of its free ports."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        address = probe.getsockname()[0]
    free = filter(lambda port: _is_free(address, port), random.Random().sample(_PORTS, len(_PORTS)))
    return address, next(free), next(free)


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _leave_for(address: str, port: int, rank: int, size: int) -> None:
    leave_world()
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(size),
        # torchrun's own store is at the place that is left.
        TORCHELASTIC_USE_AGENT_STORE="False",
    )
