"""What the documents promise: the example runs, and each named test exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_example_learns(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(import torch\n.*?)```", readme, re.DOTALL).group(1)
    assert len(example.splitlines()) == 15
    exec(compile(example, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) < 1e-3


def test_every_test_named_in_the_method_exists():
    written = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:::|`)(test_\w+)`", method)
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in written] == []


def test_linked_files_exist():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), link
