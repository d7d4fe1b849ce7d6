"""Who may import whom, read from the sources, and what must work with parts of the world
missing."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import CALL

from metakd.errors import EXTRAS

PACKAGE = Path(__file__).resolve().parents[1] / "metakd"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# The parts of the package, and the parts each may import besides its own. Arrows point downwards.
ARROWS = {
    "errors": set(),
    "environment": {"__init__"},
    "reference": set(),
    "eager": {"reference"},
    "kernels": {"errors"},
    "extension": set(),
    "ops": {"errors", "extension", "kernels"},
    "functional": {"eager", "errors", "ops", "reference"},
    "verify": {"functional", "ops"},
    "table": {"__init__"},
    "diagnosis": {"environment", "errors", "extension", "ops", "training"},
    "config": {"errors", "table"},
    "data": {"errors", "config", "table", "__init__"},
    "models": {"errors", "config", "functional"},
    "method": {"errors", "config", "functional", "models", "table"},
    "training": {"errors", "config", "data", "extension", "method", "models", "__init__"},
    "pipeline": {
        "errors",
        "config",
        "data",
        "environment",
        "extension",
        "method",
        "models",
        "table",
        "training",
        "__init__",
    },
    "deploy": {
        "errors",
        "config",
        "data",
        "environment",
        "models",
        "pipeline",
        "table",
        "__init__",
    },
    "demo": {"errors", "config", "data"},
    "front": {"config", "deploy", "environment", "errors", "pipeline", "table", "training"},
    "printed": {"pipeline"},
    "cli_deploy": {
        "errors",
        "data",
        "demo",
        "deploy",
        "front",
        "printed",
        "__init__",
    },
    "cli": {
        "cli_deploy",
        "errors",
        "config",
        "demo",
        "diagnosis",
        "environment",
        "extension",
        "front",
        "ops",
        "pipeline",
        "printed",
        "verify",
        "__init__",
    },
    "__main__": {"cli"},
    "__init__": {"functional"},
}
# What the rows of the table use when they compute, and not when they are read.
LATE = {"table": {"method", "models", "torch", "numpy", "scipy", "sklearn"}}
# The table of methods is part of ``method``, and all that configurations know of it.
TABLE = {
    f"method.{name}" for name in ("methods", "terms", "attribution", "kinds", "recipe", "tasks")
}

# What of the world each may know. Below the door nothing knows of teachers, tasks or DeepSpeed.
LOW = {
    "reference": {"torch"},
    "eager": {"torch"},
    "extension": {"torch"},
    "ops": {"torch"},
    "functional": {"torch"},
    "verify": {"torch"},
    "kernels": {"torch", "triton"},
    "errors": set(),
    "environment": {"torch"},
    "table": set(),
    "config": {"pydantic", "yaml"},
}


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(
            path.read_text("utf-8")
        )
        for path in SOURCES
    }


class Imports(NamedTuple):
    """What a module imports of metakd (relative to the package) and of others (top-level names),
    when it is read and, within functions, when it runs. For annotations alone does not count."""

    own: set[str]
    foreign: set[str]
    late_own: set[str]
    late_foreign: set[str]

    @classmethod
    def of(cls, name: str, tree: ast.Module, known: set[str]) -> "Imports":
        found = cls(set(), set(), set(), set())
        found._visit(tree, name, known, late=False)
        return found

    def _visit(self, node: ast.AST, name: str, known: set[str], late: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        late = late or isinstance(node, ast.FunctionDef)
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"metakd/{name}: relative import in line {node.lineno}"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in targets:
            top, _, rest = target.partition(".")
            if top != "metakd":
                (self.late_foreign if late else self.foreign).add(top)
                continue
            while rest and rest not in known:
                rest = (
                    f"{rest}.__init__" if f"{rest}.__init__" in known else rest.rpartition(".")[0]
                )
            (self.late_own if late else self.own).add(rest or "__init__")
        for child in ast.iter_child_nodes(node):
            self._visit(child, name, known, late)


MODULES = modules()
IMPORTS = {name: Imports.of(name, tree, set(MODULES)) for name, tree in MODULES.items()}


def part(module: str) -> str:
    return "table" if module in TABLE else module.split(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name):
    own, foreign, late, late_foreign = IMPORTS[name]
    allowed = {*ARROWS[part(name)], part(name)}
    when_run = LATE.get(part(name), set())
    crossing = {target for target in own if part(target) not in allowed}
    crossing |= {target for target in late if part(target) not in allowed | when_run}
    assert not crossing, f"metakd/{name} must not import {sorted(crossing)}"
    if part(name) == "kernels":
        kernels = {target for target in own | late if part(target) == "kernels"}
        assert kernels <= {"kernels.shared"}, "a kernel imports a kernel"
    if part(name) in LOW:
        extra = (foreign | late_foreign - when_run) - LOW[part(name)] - set(sys.stdlib_module_names)
        assert not extra, f"metakd/{name} must not know of {sorted(extra)}"


def test_only_training_needs_deepspeed():
    """What serves, exports, reports or computes a loss reaches no training, not even late."""
    knowing = {
        name for name, found in IMPORTS.items() if "deepspeed" in found.foreign | found.late_foreign
    }
    assert {part(name) for name in knowing} == {"pipeline", "training"}

    def reached(name: str, seen: set[str]) -> set[str]:
        if name not in seen:
            seen.add(name)
            for target in IMPORTS[name].own | IMPORTS[name].late_own if name in IMPORTS else ():
                reached(target, seen)
        return seen

    free = ("functional", "deploy", "demo", "config", "data", "models", "method", "verify")
    for name in (name for name in MODULES if part(name) in free):
        trained = knowing & reached(name, set())
        assert not trained, f"metakd/{name} reaches {sorted(trained)}"


def test_no_import_circles():
    graph = {name: (found.own | found.late_own) - {name} for name, found in IMPORTS.items()}
    TopologicalSorter(graph).prepare()


def test_no_file_is_too_long():
    """One is: kernels of one family share a derivation, and a kernel imports no kernel."""
    lengths = {p.relative_to(PACKAGE): len(p.read_text().split("\n")) for p in SOURCES}
    assert [str(p) for p, lines in lengths.items() if lines > 601] == ["kernels/soft_kl.py"]


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
        BLOCK.format(names=["triton"])
        + """
import torch
from metakd import reference
student = torch.randn(3, 5, requires_grad=True)
reference.soft_kl(student, torch.randn(3, 5)).sum().backward()
assert student.grad.isfinite().all()
pair = lambda d: (torch.randn(2, 3, 7, d), torch.randn(2, 3, 7, d))
assert reference.attention_score_mse(pair(4), pair(8)).shape == (2,)
loaded = {name for name in sys.modules if name.startswith("metakd.")}
assert loaded == {"metakd.reference"}, loaded
"""
    )
    run_python(code)


def test_package_needs_torch_only_and_only_when_used():
    names = [
        "triton",
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
import os
os.environ["METAKD_NO_EXT"] = "1"
import metakd
assert "torch" not in sys.modules and metakd.__version__
import torch
import metakd.functional
for name in metakd.functional.__all__:
    getattr(metakd, name)
metakd.soft_kl(torch.randn(3, 5), torch.randn(3, 5))
"""
    )
    run_python(code)


def test_losses_hold_without_the_extension():
    code = """
import os, sys
os.environ["METAKD_NO_EXT"] = "1"
import pytest
from metakd import ops
assert ops.why_not("soft_kl", "cpp", "cpu") is not None
chosen = "hand or table or silently or pytorchs or masked_is_zero"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "tests/test_losses.py", "-k", chosen]))
"""
    run_python(code)


def test_the_bare_package_says_which_extra_it_lacks(tmp_path):
    config = {"output_dir": str(tmp_path / "out"), "teacher": {"model": str(tmp_path)}}
    config["data"] = {"train": "train.jsonl", "validation": "dev.jsonl"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"student": {"layers": [0]}}))
    code = (
        BLOCK.format(names=[*EXTRAS, "scipy", "pandas"])
        + CALL
        + f"""
code, said, _ = call("doctor", "--json")
assert code == 0 and "14 of 14 losses" in said, said
for words in (("run", {str(tmp_path / "config.json")!r}), ("predict", {str(tmp_path)!r}, "fine")):
    code, _, said = call(*words)
    assert code == 6 and "pip install 'metakd[" in said and "not installed" in said, (words, said)
"""
    )
    run_python(code)
