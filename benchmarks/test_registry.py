"""The registry's small rows under pytest-benchmark: ``make bench-ci``, for regressions in CI."""

import pytest
import torch

from benchmarks.registry import ROWS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row.quick and DEVICE in row.devices],
    ids=lambda row: f"{row.op} {row.shape}",
)
def test_row(benchmark, row):
    contest = row.build(DEVICE, rivals=False)
    step = next(iter(contest.contenders.values()))

    def run():
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    run()  # what is compiled lazily is not the step's time
    benchmark(run)
