"""The registry's small rows under pytest-benchmark: ``make bench``, for regressions in CI."""

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
    contest = row.build(DEVICE)
    step = next(iter(contest.contenders.values()))

    def run():
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
