"""What a measurement ran on: versions, device, threads."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from metakd import __version__

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "datasets", "onnxruntime")


def versions(*packages: str) -> dict[str, str | None]:
    """Version of Python, of metakd and of each of these packages, None where it is not
    installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "metakd": __version__}
    for package in packages or PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def has_cuda() -> bool:
    """``torch.cuda.is_available()``, without the import of torch where its build or a missing
    driver say already that it is not."""
    if "torch" not in sys.modules:
        build = versions("torch")["torch"] or "+unknown"
        if "+cpu" in build:
            return False
        if sys.platform == "linux" and ("+cu" in build or "+" not in build):
            try:
                ctypes.CDLL("libcuda.so.1")
            except OSError:
                return False
    import torch

    return torch.cuda.is_available()


def has_bf16() -> bool:
    """Has the device that training takes instructions for bf16? A CPU without them computes it
    through fp32, or number by number."""
    if has_cuda():
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    told = _cpu_says("flags") or _cpu_says("Features")  # on x86, on ARM
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(told.split())


def processor() -> str:
    """The CPU: its name where the system tells it, architecture, widest vectors that torch uses."""
    import torch

    name = _cpu_says("model name")
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join(filter(None, ["CPU", name, platform.machine(), capability]))


def _cpu_says(key: str) -> str:
    """What Linux tells of the first CPU; empty where it does not."""
    if not (listing := Path("/proc/cpuinfo")).exists():
        return ""
    lines = (line.partition(":") for line in listing.read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")


def environment(device: str, threads: int, *packages: str) -> dict:
    """What a measurement on ``device`` (cpu or cuda) should record.

    Args:
        device: cpu or cuda.
        threads: that a CPU computes with.
        packages: whose versions matter; by default those that metakd stands on.
    """
    import torch

    found = {"date": datetime.date.today().isoformat(), "versions": versions(*packages)}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = ""
        with suppress(OSError):  # a container may have the GPU without the program
            driver = subprocess.run(query, capture_output=True, text=True).stdout
        gpu = {
            "device": torch.cuda.get_device_name(),
            "driver": driver.partition("\n")[0],  # one line for each GPU
            "cuda": torch.version.cuda,
        }
        return gpu | found
    return {"device": processor(), "cores": os.cpu_count(), "threads": threads} | found


def machine(environment: dict) -> str:
    """Device and threads of what ``environment`` returned, for a sentence."""
    threads = environment.get("threads")
    if not threads:
        return environment["device"]
    return f"{environment['device']}, {threads} thread{'s' if threads > 1 else ''}"


def installed(environment: dict) -> str:
    """The packages of what ``environment`` returned that are there, in one line."""
    return ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)


def flat(environment: dict) -> dict:
    """What ``environment`` returned in one level, the versions last."""
    own = {name: value for name, value in environment.items() if name != "versions"}
    return own | environment.get("versions", {})
