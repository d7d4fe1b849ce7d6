"""The tools for a GPU that can be tried without one: the search of block shapes, on interpreted
kernels, and the reading of a profiler's table."""

import types

import pytest
import torch

from benchmarks import counters, tune
from metakd import functional, ops
from metakd.kernels import soft_kl


@pytest.fixture
def step():
    """A step of the triton backend, on logits that fit a tile."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := ops.why_not("soft_kl", "triton", device, torch.float32):
        pytest.skip(reason)
    student, teacher = torch.randn(2, 5, 40, device=device)
    student.requires_grad_()

    def run():
        loss = functional.soft_kl(student, teacher, temperature=2.0, backend="triton")
        torch.autograd.grad(loss, student)
        return loss.detach()

    return run


def test_a_faster_shape_is_found_and_nothing_is_changed(step):
    own = soft_kl.tile_shape
    rows = own(40)["ROWS"]
    asked = []

    def timer(run):
        """Pretends that fewer rows a program are faster, down to a quarter of them."""
        run()
        shape = soft_kl.tile_shape(40)
        asked.append(shape)
        return float(max(shape["ROWS"], rows // 4))

    [call] = tune.search(step, timer, rounds=3)
    assert (call["function"], call["arguments"]) == ("soft_kl.tile_shape", [40])
    assert call["shape"] == own(40) and call["ms"] == rows
    assert call["tried"][0]["ms"] == rows // 4
    assert call["tried"][0]["change"]["ROWS"] == rows // 4
    assert {shape["BLOCK"] for shape in asked} == {64}  # it must hold the row
    assert soft_kl.tile_shape is own and isinstance(own, types.FunctionType)


def test_a_shape_that_fails_or_errs_says_so(step, monkeypatch):
    launch = soft_kl._forward

    def refuse(*arguments):
        if soft_kl.tile_shape(40)["num_warps"] > 4:
            raise RuntimeError("out of resources\nand more")
        launch(*arguments)
        if soft_kl.tile_shape(40)["num_warps"] == 4:
            arguments[5].add_(1.0)  # rows

    monkeypatch.setattr(soft_kl, "_forward", refuse)
    [call] = tune.search(step, lambda run: 1.0, rounds=1)
    told = {one["change"].get("num_warps"): one["why"] for one in call["tried"]}
    assert told[8] == "RuntimeError: out of resources"
    assert "the loss is" in told[4]
    page = tune.markdown(
        {
            "op": "soft_kl",
            "environment": {
                **{"device": "d", "versions": {}, "date": "", "commit": "", "driver": ""}
            },
            "rows": [{"shape": "[5, 40]", "dtype": "float32", "calls": [call]}],
        }
    )
    assert "soft_kl.tile_shape(40)" in page and "out of resources" in page


def test_moves_change_one_number():
    shape = {"ROWS": 8, "BLOCK": 64, "num_warps": 1, "SHARED_CUT": True}
    found = list(tune.moves(shape))
    assert all(len(move) == 1 for move in found)
    assert {"ROWS": 4} in found and {"ROWS": 16} in found and {"maxnreg": 64} in found
    assert {"num_warps": 1} not in found and {"maxnreg": None} not in found
    assert not any("BLOCK" in move or "SHARED_CUT" in move for move in found)


PRINTED = """==PROF== Connected to process 7
step done
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","_soft_kl_row_kernel","GPU Speed Of Light Throughput","Duration","ns","812,345"
"0","7","_soft_kl_row_kernel","GPU Speed Of Light Throughput","DRAM Throughput","%","81.5"
"0","7","_soft_kl_row_kernel","GPU Speed Of Light Throughput","","",""
"1","7","reduce, mean","Launch Statistics","Registers Per Thread","register/thread","32"
"""


def test_counters_are_read_kernel_by_kernel():
    first, second = counters.parse(PRINTED)
    assert first == {
        **{"kernel": "_soft_kl_row_kernel", "Duration": "812,345", "DRAM Throughput": "81.5"}
    }
    assert second == {"kernel": "reduce, mean", "Registers Per Thread": "32"}
    lines = counters.markdown([first, second]).splitlines()
    assert lines[2] == "| _soft_kl_row_kernel | 812,345 | 81.5 | - | - | - | - | - |"
    with pytest.raises(ValueError, match="no permission"):
        counters.parse("==ERROR== no permission to read counters\n")
