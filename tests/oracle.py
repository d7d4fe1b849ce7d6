"""The oracle: a loss on a backend against the reference in float64, and proof that the comparison
can fail.

``check_op`` asserts what ``metakd verify`` reports. ``assert_sensitive`` shows that the budgets are
tight enough to matter: zeros, 1 % too much, a flipped sign and permuted rows must all be caught, in
the rows and in every gradient.
"""

import pytest
import torch

from metakd import ops
from metakd.verify import Case, check, judge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = ("cpp", "triton")
BACKENDS = ("eager", *COMPILED)  # what is compared with the reference


def backend_dtypes(op: str, backends=COMPILED, dtypes=None) -> list:
    """pytest parameters (backend, dtype) for ``op``; those that cannot run skip and say why."""
    found = []
    for backend in backends:
        for dtype in ops.DTYPES[backend]:
            if dtypes is not None and dtype not in dtypes:
                continue
            reason = ops.why_not(op, backend, DEVICE, dtype)
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            name = f"{backend}-{str(dtype).removeprefix('torch.')}"
            found.append(pytest.param(backend, dtype, marks=marks, id=name))
    return found


def where_parallel(op: str) -> pytest.MarkDecorator:
    """float32 on every backend, for what can only differ where several programs run at once: deep
    for Triton's interpreter, which takes one after the other."""
    found = []
    for given in backend_dtypes(op, dtypes=(torch.float32,)):
        interpreted = given.values[0] == "triton" and DEVICE == "cpu"
        marks = [*given.marks, *([pytest.mark.deep] if interpreted else [])]
        found.append(pytest.param(*given.values, marks=marks, id=given.id))
    return pytest.mark.parametrize(("backend", "dtype"), found)


def check_op(case: Case, backend: str, dtype: torch.dtype) -> None:
    for finding in check(case.moved(DEVICE), backend, dtype):
        assert finding.passed, finding


SABOTAGES = {
    "zeros": torch.zeros_like,
    "1 % too much": lambda value: 1.01 * value,
    "sign": lambda value: -value,
    "permuted rows": lambda value: value.roll(1, 0),
}


def assert_sensitive(case: Case, dtype: torch.dtype) -> None:
    """A perfect result passes, and every sabotage of it fails."""
    eager = case.quantised(dtype).results("reference")
    exact = case.quantised(dtype).quantised(torch.float64).results("reference")
    for name, value in eager.items():
        assert judge(name, value, value, exact[name], case.magnitude_of(name)).passed
        for sabotage, spoil in SABOTAGES.items():
            finding = judge(name, spoil(value), value, exact[name], case.magnitude_of(name))
            assert not finding.passed, f"{sabotage} of {name} went unseen: {finding}"
