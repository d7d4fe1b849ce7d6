"""Starting runs of several processes from a test.

Python's fork server has imported torch, transformers and DeepSpeed once for all tests of a process,
so that ranks begin in a fraction of a second. What a launcher adds is for ``tiny_runs.launched``.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty

import torch

ROOT = Path(__file__).resolve().parents[1]
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def unjoined() -> dict[str, str]:
    """This process's environment, less the world that it may have joined and says so there, and
    less a single GPU, which two processes cannot share."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() == 1 else {}
    kept = {name: value for name, value in os.environ.items() if name not in _RENDEZVOUS}
    return kept | hidden


def run_ranks(processes: int, work: Callable, *arguments, timeout: float = 500.0) -> None:
    """Call ``work(*arguments)`` in so many processes that can join a world, as under torchrun, and
    fail with what they said if one of them fails.

    Args:
        processes: how many.
        work: a function of a module of the tests.
        arguments: of it, to be pickled.
        timeout: seconds.
    """
    context = _fork_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    world = unjoined() | place | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    said = context.Queue()
    ranks = [
        context.Process(
            target=_rank,
            args=(world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, said, work, arguments),
        )
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    try:
        _wait(ranks, said, time.monotonic() + timeout)
    finally:  # whoever is left may wait for the one that failed, for ever
        for rank in ranks:
            rank.kill()
            rank.join()


def _wait(ranks: list, said, deadline: float) -> None:
    """Until all have ended well."""
    while any(rank.exitcode != 0 for rank in ranks):
        with suppress(Empty):
            problem = said.get(timeout=0.1)
            assert not problem, problem
        codes = [rank.exitcode for rank in ranks]
        assert not any(codes), f"ranks ended with {codes}"
        assert time.monotonic() < deadline, f"ranks have not ended: {codes}"


def run_command(*words: object) -> None:
    """``metakd WORDS`` as a rank of ``run_ranks`` gives it."""
    from metakd.cli import main

    sys.argv = ["metakd", *map(str, words)]
    try:
        main()
    except SystemExit as end:
        assert not end.code, f"exit code {end.code}"


def _fork_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metakd.pipeline.compare"])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the server imports torch; ranks share the cores
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})
    return context


def _rank(environment: dict[str, str], said, work: Callable, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    problem = ""
    try:
        work(*arguments)
        if world := sys.modules.get("metakd.training.world"):
            world.leave_world()
    except BaseException:
        problem = traceback.format_exc()
    said.put(problem)
    said.close()
    said.join_thread()


# In a process of its own: what a command of metakd ends with, and says.
CALL = """
import contextlib, io, sys
from metakd import cli

def call(*words):
    sys.argv = ["metakd", *words]
    out, err = io.StringIO(), io.StringIO()
    out.reconfigure = err.reconfigure = lambda **options: None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0, out.getvalue(), err.getvalue()
"""
