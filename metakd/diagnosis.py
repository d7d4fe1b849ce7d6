"""What ``metakd doctor`` finds: what is installed, what computes, and what is in the way."""

from __future__ import annotations

import os
import shlex
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

from metakd import extension, ops
from metakd.environment import processor, versions
from metakd.errors import UnsupportedError


def diagnose() -> dict[str, dict[str, str]]:
    """Versions, devices, the compiled kernels, each backend with what it lacks, whether training is
    possible, and locks that are in the way."""
    devices = {"cpu": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    if not torch.cuda.is_available():
        devices["cuda"] = "none"
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    backends = {}
    for backend in ops.IMPLEMENTS:
        for kind in kinds:
            reasons = [ops.why_not(op, backend, kind) for op in ops.OPS]
            ready = reasons.count(None)
            missing = next(filter(None, reasons), None)
            backends[f"{backend} on {kind}"] = f"{ready} of {len(ops.OPS)} losses" + (
                f"; {missing}" if missing else ""
            )
    report = {
        "versions": {name: version or "not installed" for name, version in versions().items()},
        "devices": devices,
        "compiled kernels": {kind: extension.describe(kind) for kind in kinds},
        "backends": backends,
        "training": {"DeepSpeed": _training()},
    }
    return report | ({"build locks": locks} if (locks := _build_locks()) else {})


def _training() -> str:
    try:
        with redirect_stdout(sys.stderr):  # which it may write to, and a caller may want JSON
            import metakd.training  # noqa: F401
    except UnsupportedError as error:
        return error.cause
    return "ready"


def _build_locks() -> dict[str, str]:
    """Locks under torch's extension cache, where DeepSpeed compiles its operators at first use."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return {
        str(lock): f"{(time.time() - lock.stat().st_mtime) / 60:.0f} min old; a process that was "
        "killed while it compiled leaves this behind, and every later start waits for it in "
        f"silence. If nothing compiles now: rm {shlex.quote(str(lock))}"
        for lock in sorted(root.rglob("lock"))
        if lock.is_file()
    }
