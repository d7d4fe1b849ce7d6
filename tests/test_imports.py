"""Who may import whom, read from the sources, and what must work with parts of the world
missing."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "metakd"

# The parts of the package, and the parts each may import besides its own. Arrows point downwards.
ARROWS = {
    "errors": set(),
    "deepspeed_schema": {"errors"},
    "environment": {"__init__"},
    "reference": set(),
    "kernels": {"errors"},
    "ops": {"errors", "kernels", "_C"},
    "soft": {"ops", "reference"},
    "functional": {"errors", "ops", "reference", "soft"},
    "verify": {"functional", "ops"},
    "config": {"errors", "deepspeed_schema"},
    "data": {"errors", "config", "__init__"},
    "demo": {"errors", "config", "data"},
    "method": {"errors", "config", "functional"},
    "training": {
        "errors",
        "config",
        "data",
        "deepspeed_schema",
        "method",
        "functional",
        "__init__",
    },
    "deploy": {"errors", "config", "data", "environment", "method", "training", "__init__"},
    "cli": {
        "errors",
        "config",
        "data",
        "demo",
        "ops",
        "training",
        "deploy",
        "environment",
        "verify",
        "_C",
        "__init__",
    },
    "__main__": {"cli"},
    "__init__": {"functional"},
}
# reading.py is the file-format half of data.py, tensor_cache.py what it keeps between runs.
SAME_PART = {"reading": "data", "tensor_cache": "data"}

# Below the door nothing knows of teachers, tasks or DeepSpeed.
LOW = {
    "reference": {"torch"},
    "ops": {"torch"},
    "soft": {"torch"},
    "functional": {"torch"},
    "verify": {"torch"},
    "kernels": {"torch", "triton"},
    "errors": set(),
    "deepspeed_schema": set(),
    "environment": {"torch"},
    "config": {"pydantic", "yaml"},
}


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(
            path.read_text("utf-8")
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(name: str, tree: ast.Module, known: set[str]) -> tuple[set[str], set[str]]:
    """Modules of metakd (relative to the package) and top-level names of others that ``tree``
    imports anywhere."""
    own, foreign = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"metakd/{name}: relative import in line {node.lineno}"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            top, _, rest = target.partition(".")
            if top != "metakd":
                foreign.add(top)
                continue
            while rest and rest not in known and rest != "_C":
                rest = (
                    f"{rest}.__init__" if f"{rest}.__init__" in known else rest.rpartition(".")[0]
                )
            own.add(rest or "__init__")
    return own, foreign


MODULES = modules()
IMPORTS = {name: imports(name, tree, set(MODULES)) for name, tree in MODULES.items()}


def part(module: str) -> str:
    top = module.split(".")[0]
    return SAME_PART.get(top, top)


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name):
    own, foreign = IMPORTS[name]
    allowed = ARROWS[part(name)]
    crossing = {target for target in own if part(target) not in {*allowed, part(name)}}
    assert not crossing, f"metakd/{name} must not import {sorted(crossing)}"
    if part(name) == "kernels":
        kernels = {target for target in own if part(target) == "kernels"}
        assert kernels <= {"kernels.shared"}, "a kernel imports a kernel"
    if part(name) in LOW:
        extra = foreign - LOW[part(name)] - set(sys.stdlib_module_names)
        assert not extra, f"metakd/{name} must not know of {sorted(extra)}"


def test_no_import_circles():
    TopologicalSorter({name: own - {name} for name, (own, _) in IMPORTS.items()}).prepare()


def run_python(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr


BLOCK = """
import sys
for name in {names!r}:
    sys.modules[name] = None
"""


def test_reference_runs_without_triton_and_extension():
    code = (
        BLOCK.format(names=["triton", "metakd._C"])
        + """
import torch
from metakd import reference
student = torch.randn(3, 5, requires_grad=True)
reference.soft_kl(student, torch.randn(3, 5)).sum().backward()
assert student.grad.isfinite().all()
pair = lambda d: (torch.randn(2, 3, 7, d), torch.randn(2, 3, 7, d))
assert reference.attention_score_mse(pair(4), pair(8)).shape == (2,)
loaded = {name for name in sys.modules if name.startswith("metakd.")}
assert loaded == {"metakd.reference", "metakd._C"}, loaded
"""
    )
    run_python(code)


def test_package_needs_torch_only_and_only_when_used():
    names = [
        "triton",
        "metakd._C",
        "transformers",
        "datasets",
        "deepspeed",
        "pydantic",
        "yaml",
        "typer",
        "rich",
    ]
    code = (
        BLOCK.format(names=names)
        + """
import metakd
assert "torch" not in sys.modules and metakd.__version__
import torch
for name in metakd.__all__:
    getattr(metakd, name)
metakd.soft_kl(torch.randn(3, 5), torch.randn(3, 5))
"""
    )
    run_python(code)


def test_losses_hold_without_the_extension():
    code = (
        BLOCK.format(names=["metakd._C"])
        + """
import pytest
from metakd import ops
assert ops.why_not("soft_kl", "cpp", "cpu") is not None
files = ["tests/test_losses.py", "tests/test_linear_soft_kl.py"]
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *files]))
"""
    )
    run_python(code)
