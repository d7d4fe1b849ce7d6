"""What a command does not wait for: told by what a fresh process has imported, not by a clock."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from processes import unjoined
from rich.console import Console
from test_deploy import TEXTS, exported, student  # noqa: F401
from tiny_runs import write_config
from transformers import AutoTokenizer, get_scheduler

import metakd
from metakd import environment, front
from metakd.config import TrainingConfig
from metakd.deploy import Predictor, known, predictor
from metakd.environment import has_cuda
from metakd.functional import checks
from metakd.pipeline import finished
from metakd.training.schedule import optimizer_and_scheduler

ROOT = Path(__file__).resolve().parents[1]
# Where torch's build leaves open whether there is a GPU, it is asked.
ASKED = set() if "+cpu" in torch.__version__ else {"torch"}
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "sklearn", "pandas", "peft"}
PAIRS = [(TEXTS[0], TEXTS[1]), ("good", "bad"), (" ".join(TEXTS), TEXTS[2]), ("good", "x" * 90)]

TOLD = """
import atexit, sys
atexit.register(lambda: print("IMPORTED", *{name.partition(".")[0] for name in sys.modules}))
"""


def alone(code: str, *words: object) -> tuple[str, set[str]]:
    """What a fresh process says that runs this, and which packages it has imported."""
    command = [sys.executable, "-c", TOLD + code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=unjoined())
    said, _, packages = done.stdout.rpartition("IMPORTED")
    assert "Traceback" not in done.stderr, done.stderr
    return said + done.stderr, set(packages.split())


COMMAND = "from metakd.cli import main; main()"


def test_a_loss_does_not_wait_for_the_compiler_of_torch():
    """A second of imports, for whoever does not compile."""
    loss = "import sys, torch, metakd; metakd.soft_kl(torch.zeros(3, 5), torch.zeros(3, 5))"
    said, _ = alone(loss + "; print(*sys.modules)")
    assert "torch" in said.split() and "torch._dynamo" not in said.split()
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked).items() <= vars(checks._has_autocast).items()


def test_a_refusal_waits_for_nothing(tmp_path):
    said, packages = alone(COMMAND, "--help")
    assert "quickstart" in said and not packages & {*HEAVY, "numpy"}
    said, packages = alone(COMMAND, "run", tmp_path / "missing.yaml")
    assert "remedy: " in said and not packages & {*HEAVY, "numpy"}


def test_training_waits_for_no_scores_nor_tables():
    """They are imported when something is scored, or is read from Parquet or the hub."""
    _, packages = alone("import metakd.pipeline.compare")
    assert "deepspeed" in packages
    assert not packages & {"sklearn", "pandas", "peft", "datasets", "pyarrow"}


def test_a_world_is_joined_without_trying_a_compiler():
    """DeepSpeed does so for each of its operators where somebody asks which of them are here."""
    code = """
from metakd.training.world import join_world, leave_world
from deepspeed.ops.op_builder import builder
def probe(*_): raise AssertionError("asked for its operators")
builder.probe_is_compatible = probe
print(join_world().size)
leave_world()
"""
    assert alone(code)[0].startswith("1\n")


def test_texts_are_read_without_torch_and_datasets(tmp_path):
    for name, content in {"a.jsonl": '{"text": "good"}\n', "a.csv": "text\ngood\n"}.items():
        (tmp_path / name).write_text(content)
        code = f"from metakd.data.reading import read_texts; print(read_texts({name!r})[0].text)"
        said, packages = alone(f"import os; os.chdir({str(tmp_path)!r})\n{code}")
        assert said == "good\n" and not packages & {*HEAVY, "pyarrow"}


class TestServing:
    def test_an_export_needs_no_torch(self, student, exported, tmp_path, monkeypatch):  # noqa: F811
        """With the same bits as before, for texts and pairs, cut, filled up and in batches."""
        texts = [*TEXTS[:9], "good", " ".join(TEXTS)]
        code = """
import json, sys
import numpy as np
from metakd.deploy import Predictor
folder, asked, found = sys.argv[1:]
serve = Predictor(folder, engine="onnx", device="cpu", batch_tokens=200, max_length=20)
asked = json.load(open(asked))
pairs = [tuple(pair) for pair in asked["pairs"]]
np.savez(found, texts=serve.logits(asked["texts"]), pairs=serve.logits(pairs))
"""
        asked, found = tmp_path / "asked.json", tmp_path / "found.npz"
        asked.write_text(json.dumps({"texts": texts, "pairs": PAIRS}))
        for folder in (student, student / "onnx"):
            _, packages = alone(code, folder, asked, found)
            assert "onnxruntime" in packages and not packages & (HEAVY - {"transformers"})
            with monkeypatch.context() as patched:
                patched.setattr(predictor, "look_up", lambda folder: None)
                options = {"batch_tokens": 200, "max_length": 20}
                plain = Predictor(folder, engine="onnx", device="cpu", **options)
            with np.load(found) as logits:
                assert np.array_equal(logits["texts"], plain.logits(texts))
                assert np.array_equal(logits["pairs"], plain.logits(PAIRS))

    def test_the_command(self, student, exported):  # noqa: F811
        said, packages = alone(COMMAND, "predict", student, "a fine book")
        assert json.loads(said)["text"] == "a fine book"
        assert not packages & (HEAVY - {"transformers"} - ASKED)

    def test_the_tokenizer_is_the_same(self, student, exported):  # noqa: F811
        for folder in (student, student / "onnx"):
            found, shape = known.look_up(folder)
            wanted = AutoTokenizer.from_pretrained(folder)
            assert shape == known.ask(folder)[1]
            assert type(found) is type(wanted) and found.init_kwargs == wanted.init_kwargs
            for asked in (TEXTS, PAIRS):
                cut = {"truncation": True, "max_length": 12}
                assert found(asked, **cut).data == wanted(asked, **cut).data

    @pytest.mark.parametrize(
        "change",
        ["config", "tokenizer", "version", "damaged", "no tokenizer", "a module", "adapter"],
    )
    def test_what_was_noted_of_others_is_not_taken(
        self,
        change,
        student,  # noqa: F811
        exported,  # noqa: F811
        tmp_path,
    ):
        shutil.copytree(student, tmp_path / "student")
        folder = tmp_path / "student"
        assert known.look_up(folder) is not None
        report = folder / "onnx" / "export.json"
        if change == "config":
            shape = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(shape | {"pad_token_id": 1}))
        elif change == "tokenizer":
            with (folder / "tokenizer.json").open("a") as file:
                file.write(" ")
        elif change == "damaged":
            report.write_text(report.read_text()[:-20])
        elif change == "adapter":
            (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
        else:
            noted = json.loads(report.read_text())
            if change == "version":
                noted["known"]["transformers"] = "5.0.0"
            for made in noted["known"]["made"].values():
                named = {"no tokenizer": "AutoTokenizer", "a module": "utils"}
                made["tokenizer"] = named.get(change, made["tokenizer"])
            report.write_text(json.dumps(noted))
        assert known.look_up(folder) is None


@pytest.fixture(scope="module")
def run(source, tmp_path_factory, world):
    """A finished run of one student, with a model and data of its own: its configuration, and what
    it came to."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(source, folder / "own")
    config = yaml.safe_load(write_config(folder / "own", folder, "run").read_text())
    config["distill"]["domains"] = ["hiking"]
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml", metakd.run(folder / "run.yaml", console=Console(quiet=True))


class TestFinished:
    def test_a_run_is_not_opened_again(self, run, monkeypatch):
        """It says and returns what it says and returns when it is."""
        config, first = run
        folder = config.with_suffix("")
        written = (folder / "evaluation.json").read_text()
        (folder / "evaluation.json").unlink()
        said, packages = alone(COMMAND, "run", config)
        assert not packages & (HEAVY - ASKED)
        assert (folder / "evaluation.json").read_text() == written
        assert "students/meta-from-meta-s42/hiking: inputs unchanged, skipped\n" in said
        assert f"student is in {folder}/students/meta-from-meta-s42/hiking\n" in said
        told = [StringIO(), StringIO()]
        assert metakd.run(config, console=Console(file=told[0])) == first
        with monkeypatch.context() as patched:
            patched.setattr(finished, "look_up", lambda *_: None)
            assert metakd.run(config, console=Console(file=told[1])) == first
        assert told[0].getvalue() == told[1].getvalue() != ""

    def opens(self, monkeypatch, config: Path, *overrides: str) -> bool:
        """Does a run go on to what opens it?"""
        seen = []

        def note(*_, **__):
            seen.append(True)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(front, "open_run", note)
            with suppress(KeyboardInterrupt):
                metakd.run(config, overrides, console=Console(quiet=True))
        return bool(seen)

    @pytest.mark.parametrize(
        "file",
        [
            "own/corpus/train.jsonl",
            "own/corpus/test.jsonl",
            "own/encoder/model.safetensors",
            "own/encoder/config.json",
            "run/teachers/meta-s42/model.safetensors",
            "run/teachers/meta-s42/stage.json",
            "run/students/meta-from-meta-s42/hiking/model.safetensors",
            "run/students/meta-from-meta-s42/hiking/tokenizer.json",
            "run/.cache/finished.json",
        ],
    )
    def test_every_changed_byte_is_seen(self, run, monkeypatch, file):
        config, _ = run
        path = config.parent / file
        before = path.read_bytes()
        assert not self.opens(monkeypatch, config)
        try:
            path.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
            assert self.opens(monkeypatch, config)
            path.unlink()
            assert self.opens(monkeypatch, config)
        finally:
            path.write_bytes(before)
        assert not self.opens(monkeypatch, config)

    def test_settings_versions_code_and_processes(self, run, monkeypatch):
        config, _ = run
        assert self.opens(monkeypatch, config, "distill.training.per_device_eval_batch_size=3")
        assert self.opens(monkeypatch, config, "logging_steps=7")
        for name, other in {
            "versions": lambda *_: {"torch": "1.0"},
            "has_cuda": lambda: not has_cuda(),
            "content_key": lambda *parts: "another",
        }.items():
            with monkeypatch.context() as patched:
                patched.setattr(finished, name, other)
                assert self.opens(patched, config)
        with monkeypatch.context() as patched:
            patched.setitem(os.environ, "WORLD_SIZE", "2")
            assert self.opens(patched, config)


@pytest.mark.parametrize(
    ("build", "driver", "asked"),
    [
        ("2.13.0+cpu", True, False),
        ("2.13.0+cu130", False, False),
        ("2.13.0", False, False),
        ("2.13.0", True, True),
        ("2.13.0+rocm7.1", False, True),
        (None, False, True),
    ],
)
def test_torch_is_asked_for_a_gpu_where_there_may_be_one(monkeypatch, build, driver, asked):
    def library(name):
        if not driver:
            raise OSError(name)

    fresh = SimpleNamespace(modules={}, platform="linux")
    for name, other in {"sys": fresh, "versions": lambda _: {"torch": build}}.items():
        monkeypatch.setattr(environment, name, other)
    monkeypatch.setattr(environment.ctypes, "CDLL", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert has_cuda() == asked


@pytest.mark.parametrize("warm", [0, 3, 0.25, 12])
@pytest.mark.parametrize("kind", ["linear", "constant"])
def test_the_rate_is_that_of_transformers(kind, warm):
    """Written out, as the module that has it imports peft, which training does not need."""
    steps, module = 12, torch.nn.Linear(2, 2)
    config = TrainingConfig(lr_scheduler_type=kind, warmup_steps=warm, learning_rate=0.3)
    optimizer, own = optimizer_and_scheduler(module, config, steps)
    other = torch.optim.AdamW(module.parameters(), lr=0.3)
    name = {"constant": "constant_with_warmup"}.get(kind, kind)
    theirs = get_scheduler(name, other, int(warm if warm >= 1 else warm * steps), steps)
    for _ in range(steps + 2):
        assert own.get_last_lr()[0] == theirs.get_last_lr()[0]
        for each in (optimizer, other, own, theirs):
            each.step()
    assert own.state_dict()["lr_lambdas"] == [{}] * len(optimizer.param_groups)
