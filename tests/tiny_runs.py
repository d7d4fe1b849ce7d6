"""Runs on a corpus and encoders of the tiniest size, for the tests of training."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from processes import unjoined
from safetensors.torch import load_file

from metakd import demo
from metakd.config import DataConfig, load_config
from metakd.data.reading import read_corpus
from metakd.errors import ConfigError, DataError, StoppedError
from metakd.pipeline.stages import Run
from metakd.training import engine

SETTINGS = {
    "data": {"max_length": 24},
    "teacher": {"training": {"num_train_epochs": 1, "learning_rate": 1e-3}},
    "student": {"layers": [1]},
    "distill": {"training": {"num_train_epochs": 1, "learning_rate": 1e-3}},
    "report_to": ["jsonl"],
    "logging_steps": 1,
}


def make_source(folder: Path) -> None:
    """Write a corpus of 4 x 12 examples, an encoder of two layers, and a smaller one of the same
    vocabulary, both without dropout, so that runs can be compared."""
    demo.write_corpus(folder / "corpus", train=12, validation=4, test=6)
    texts = [row["text"] for row in rows_of(folder / "corpus" / "train.jsonl")]
    for name, hidden in {"encoder": 32, "small": 24}.items():
        demo.scratch_encoder(
            folder / name, texts, hidden_size=hidden, layers=2, heads=2, vocab_size=300, mlm_steps=0
        )
        config = folder / name / "config.json"
        shape = json.loads(config.read_text())
        config.write_text(
            json.dumps(shape | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
        )


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> str:
    """As JSONL; the path as configurations want it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refusal(**keys) -> DataError:
    """What is said of a ``data`` block that must be refused."""
    with pytest.raises(DataError) as caught:
        read_corpus(DataConfig(**keys))
    return caught.value


def small_settings(changes: dict, **distill) -> dict:
    """A small configuration with these keys, as in ``data.task``."""
    settings: dict = {
        "output_dir": "x",
        "data": {"train": "x.csv"},
        "teacher": {"model": "m"},
        "student": {"layers": [0]},
        "distill": distill,
    }
    for name, value in changes.items():
        *blocks, key = name.split(".")
        block = settings.setdefault(blocks[0], {}) if blocks else settings
        block[key] = value
    return settings


def config_refusal(changes: dict, **distill) -> ConfigError:
    """What is said of ``small_settings`` that must be refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(small_settings(changes, **distill))
    return caught.value


def write_config(source: Path, folder: Path, output: str) -> Path:
    corpus = {
        name: str(source / "corpus" / f"{name}.jsonl") for name in ("train", "validation", "test")
    }
    settings = {
        **SETTINGS,
        "output_dir": str(folder / output),
        "data": {**SETTINGS["data"], **corpus},
        "teacher": {**SETTINGS["teacher"], "model": str(source / "encoder")},
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


LAUNCHERS = {
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "-m",
        "metakd",
    ],
    "deepspeed": [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        "2",
        "--module",
        "metakd",
    ],
}


def launched(launcher: str, config: Path, *overrides: str) -> None:
    """One student by two processes of this launcher."""
    words = ["distill", str(config), "distill.domains=[hiking]", *overrides]
    command = [*LAUNCHERS[launcher], *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=unjoined())
    assert done.returncode == 0, done.stderr[-3000:]


def losses(folder: Path) -> dict[str, list[float]]:
    return {
        str(log.parent.relative_to(folder)): [
            r["loss"] for r in rows_of(log) if r["split"] == "train"
        ]
        for log in sorted(folder.rglob("log.jsonl"))
    }


def distil_until_stopped(run: Run, monkeypatch, looks: int = 4) -> None:
    """Train students until a SIGTERM that comes after so many looks for it."""
    asked = iter([0] * looks + [signal.SIGTERM])
    with monkeypatch.context() as patched:
        patched.setattr(engine.StopRequest, "poll", lambda self: next(asked))
        with pytest.raises(StoppedError):
            run.distill()


def assert_goes_on_to_the_same_bits(
    make, monkeypatch, options: list[str], looks: int = 4
) -> tuple[Path, Path]:
    """A student that is trained at a stretch, and one that is stopped and goes on, whose teacher
    was there before; returns both folders."""
    [whole] = make(*options, output="whole").distill()
    stopped = make(*options, output="stopped")
    stopped.teach()
    distil_until_stopped(stopped, monkeypatch, looks)
    resumed = make(*options, output="stopped")
    [again] = resumed.distill()
    assert any("going on from checkpoint" in line for line in resumed.said)
    assert_same_bits(whole, again)
    return whole, again


def assert_same_bits(first: Path, second: Path) -> None:
    """The models of both folders have the same weights, to the bit."""
    expected, seen = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert expected.keys() == seen.keys()
    assert all(torch.equal(value, expected[name]) for name, value in seen.items())
