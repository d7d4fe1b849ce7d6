"""Everything but training, where DeepSpeed is missing or broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import CALL
from test_config import VALID
from test_deploy import student  # noqa: F401
from test_report import make_run

ROOT = Path(__file__).resolve().parents[1]
# One process for all of it, because torch and transformers take seconds to import.
SCRIPT = (
    CALL
    + """
import json

folder, run, config = sys.argv[1:]
found = {
    "predict": call("predict", folder, "a fine book"),
    "report": call("report", run),
    "export": call("export", folder, "--out", run + "/onnx"),
    "doctor": call("doctor", config, f"teacher.model={folder}", "--json"),
    "run": call("run", config),
    "teach": call("teach", config),
    "distill": call("distill", config),
    "suggest": call("suggest", config),
    "quickstart": call("quickstart", run + "/quick"),
}
import torch, metakd
metakd.soft_kl(torch.randn(3, 5), torch.randn(3, 5))
sys.modules["deepspeed"] = None
found["missing"] = call("run", config)
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def found(student, tmp_path_factory) -> dict[str, list]:  # noqa: F811
    """Exit code, output and errors of each command beside a DeepSpeed that does not load."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "deepspeed").mkdir()
    (folder / "deepspeed" / "__init__.py").write_text('raise OSError("libcudart is lost")')
    (folder / "config.yaml").write_text(
        yaml.safe_dump(yaml.safe_load(VALID) | {"output_dir": str(folder / "out")})
    )
    places = [str(student), str(make_run(folder / "shop")), str(folder / "config.yaml")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *places],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_what_does_not_train_works(found):
    assert {name: found[name][0] for name in ("predict", "report", "export", "doctor")} == {
        "predict": 0,
        "report": 0,
        "export": 0,
        "doctor": 0,
    }, found
    assert json.loads(found["predict"][1])["text"] == "a fine book"
    doctor = json.loads(found["doctor"][1])
    assert "libcudart is lost" in doctor["training"]["DeepSpeed"]


@pytest.mark.parametrize("command", ["run", "teach", "distill", "suggest", "quickstart", "missing"])
def test_what_trains_says_what_it_needs(found, command):
    code, out, err = found[command]
    cause, remedy = err.splitlines()
    assert code == 6 and not out
    assert cause.startswith("metakd: training needs DeepSpeed, which cannot be imported (")
    assert ("halted" if command == "missing" else "libcudart is lost") in cause
    assert remedy.startswith("remedy: pip install 'metakd[train]'")
