"""What every test shares: an offline hub, Triton's interpreter without a GPU, seeds, marks."""

import os
import random
from pathlib import Path

# Before transformers, datasets and Triton are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(2)


def pytest_collection_modifyitems(items):
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
