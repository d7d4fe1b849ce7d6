"""What every test shares: an offline hub, Triton's interpreter without a GPU, seeds, marks."""

import os
import random
import sys
from pathlib import Path

# Before transformers, datasets and Triton are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What tests train is nothing to learn from, and the history of this machine is its user's.
os.environ["METAKD_HISTORY"] = "off"
# Threads that wait in a loop take the cores of those they wait for, as soon as these are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without it a matrix product on a GPU is an error while algorithms have to be deterministic, which
# the tests that poison new memory ask for.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(2)


# Of two processes that take a file each, neither should be left with a long one at the end.
LONG_FILES = (
    *("training", "contracts", "compile_cuda", "cli", "teacher_cache", "deploy"),
    *("sharding", "reshard", "faults", "launch"),
)


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data():
    """``shared_data(name)``: folder of a real corpus; skips the test where the corpus is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"

    def folder(name: str) -> Path:
        path = Path(os.environ.get("METAKD_DATA", beside)) / name
        if not path.is_dir():
            pytest.skip(f"no corpus {name!r}: set METAKD_DATA to the folder that holds it")
        return path

    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """``call("run", path, ...)``: exit code, standard output and standard error of ``metakd run
    path ...``."""

    from metakd import cli

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["metakd", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def tiny_bert():
    """``tiny_bert(layers=2, hidden=32, ...)``: a random BERT classifier under SDPA, in eval
    mode."""
    from transformers import BertConfig, BertForSequenceClassification

    def build(layers=2, hidden=32, heads=4, labels=2, **options):
        config = BertConfig(
            vocab_size=50,
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=2 * hidden,
            max_position_embeddings=16,
            num_labels=labels,
            initializer_range=0.2,  # with BERT's 0.02 a tiny model says almost the same of any text
            attn_implementation="sdpa",
            **options,
        )
        return BertForSequenceClassification(config).eval()

    return build


@pytest.fixture
def make_batch():
    """``make_batch(rows=4, ...)``: a padded batch of random tokens (ids below 50) with every column
    that training uses."""

    def build(rows=4, length=7, domains=3, labels=2):
        lengths = length - torch.arange(rows) % (length - 2)
        mask = (torch.arange(length) < lengths[:, None]).long()
        domain = torch.arange(rows) % domains
        return {
            "input_ids": torch.randint(1, 50, (rows, length)) * mask,
            "attention_mask": mask,
            "token_type_ids": torch.zeros(rows, length, dtype=torch.long),
            "labels": torch.randint(labels, (rows,)),
            "domain": domain,
            "false_domain": (domain + 1) % domains,
            "t": torch.rand(rows),
        }

    return build


# Of training: imported when they are asked for, as DeepSpeed takes seconds.


@pytest.fixture(scope="module")
def world():
    """A world of this process alone."""
    from metakd.training.world import join_world

    return join_world()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A corpus of 4 x 12 examples and encoders, see ``tiny_runs.make_source``."""
    from tiny_runs import make_source

    folder = tmp_path_factory.mktemp("source")
    make_source(folder)
    return folder


@pytest.fixture
def make(source, tmp_path, world):
    """``make("key=value", ...)``: a run on the tiny corpus; ``said`` of it lists what it says."""
    from rich.console import Console
    from tiny_runs import write_config

    from metakd.config import load_config
    from metakd.pipeline.stages import Run

    def build(*overrides: str, output: str = "run") -> Run:
        path = write_config(source, tmp_path, output)
        run = Run(
            load_config(str(path), list(overrides)),
            world,
            Console(quiet=True),
            command="metakd test",
        )
        run.said = []
        run.say = run.said.append
        return run

    return build
