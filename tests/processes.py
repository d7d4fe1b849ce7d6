"""Starting runs of several processes from a test."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def unjoined() -> dict[str, str]:
    """This process's environment, less the world that it may have joined and says so there, and
    less a single GPU, which two processes cannot share."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() == 1 else {}
    kept = {name: value for name, value in os.environ.items() if name not in _RENDEZVOUS}
    return kept | hidden


def run_ranks(processes: int, script: str, *words: str) -> None:
    """Run a script of the tests under torchrun, and fail with what it said if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", script, *words]
    environment = unjoined() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
