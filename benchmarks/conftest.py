"""pytest-benchmark's JSON says what it ran on as the other reports do."""

import pytest
import torch

from benchmarks.run import environment


def pytest_configure():
    torch.set_num_threads(2)  # as the other benchmarks do on a CPU


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine_info["environment"] = environment(device, torch.get_num_threads())
