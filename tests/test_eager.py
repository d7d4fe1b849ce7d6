"""The backend ``eager`` beyond what it shares with the others: when it is taken, and its blocks."""

import math

import pytest
import torch
from losses import CASES, leaves, with_grad

import metakd
from metakd import eager, ops
from metakd.errors import UnsupportedError

OWN = {name: case for name, case in CASES.items() if case.backend == "eager"}


def test_auto_takes_it_where_no_extension_is(monkeypatch):
    monkeypatch.setitem(ops._MISSING, ("cpp", "cpu"), "no C++ compiler")
    monkeypatch.setattr(ops, "_compiled_for", {"cpu"})
    for kind in ("cpu", "meta"):
        for op in ops.OPS:
            wanted = "eager" if op in ops.IMPLEMENTS["eager"] else "reference"
            assert ops.select(op, "auto", kind) == wanted
    seen = []
    monkeypatch.setattr(eager, "soft_jsd", lambda *rest: seen.append(rest) or torch.ones(2))
    assert metakd.soft_kl(torch.zeros(2, 3), torch.zeros(2, 3)) == 1 and len(seen) == 1


def test_it_says_what_it_leaves_to_the_reference():
    with pytest.raises(UnsupportedError, match="'eager' does not implement masked_mean"):
        metakd.masked_mean(torch.zeros(1, 2, 3), torch.ones(1, 2).long(), backend="eager")


@pytest.mark.parametrize("case", OWN.values(), ids=OWN.keys())
def test_blocks_change_nothing(case, monkeypatch):
    """One row to a block, and all of them in one."""
    student, teacher, options = case.inputs()
    mask = case.mask()
    mask.view(-1)[-1] = False
    found = []
    for size in (1, eager.BLOCK):
        monkeypatch.setattr(eager, "BLOCK", size)
        own = with_grad(student)
        rows = case.run(own, teacher, options, mask, reduction="none")
        found.append((rows.detach(), *torch.autograd.grad(rows.sum(), leaves(own))))
    for mine, wanted in zip(*found):
        torch.testing.assert_close(mine, wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("loss", ["soft_kl", "soft_reverse_kl", "soft_jsd"])
def test_it_keeps_one_gradient_and_none_where_nothing_learns(loss):
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        getattr(metakd, loss)(student, teacher, backend="eager")
        assert not kept
        own = student.clone().requires_grad_()
        getattr(metakd, loss)(own, teacher, backend="eager")
    assert [x.numel() for x in kept if x.data_ptr() != own.data_ptr()] == [35]


@pytest.mark.parametrize("case", OWN.values(), ids=OWN.keys())
def test_a_gradient_that_is_differentiated_again_is_the_same(case):
    student, teacher, options = case.inputs()
    own = with_grad(student)
    loss = case.run(own, teacher, options)
    first = torch.autograd.grad(loss, leaves(own), retain_graph=True)
    again = torch.autograd.grad(loss, leaves(own), create_graph=True)
    for mine, wanted in zip(again, first):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("classes", [6, 300])
@pytest.mark.parametrize("loss", ["soft_kl", "soft_reverse_kl", "soft_jsd"])
def test_an_infinite_loss_is_infinite(loss, classes):
    """No mass where the other side weighs most, in one row of two."""
    sides = {name: torch.randn(2, classes) for name in ("student", "teacher")}
    weighing, other = ("teacher", "student") if loss == "soft_kl" else ("student", "teacher")
    sides[other][0, sides[weighing][0].argmax()] = -math.inf
    rows = [
        getattr(metakd, loss)(**sides, reduction="none", backend=backend)
        for backend in ("eager", "reference")
    ]
    assert rows[0][0].isinf() == (loss != "soft_jsd")
    torch.testing.assert_close(*rows)
