"""Dropout's masks from the compiled library are PyTorch's own, to the bit."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from metakd import extension
from metakd.training import dropout
from metakd.training.dropout import WORTH, quick_masks

CPU = torch.device("cpu")
# One number, less than a block of the generator, odd numbers that leave half a pair, many blocks.
SIZES = (1, 311, 312, 313, 5, 100_001, WORTH, 4 * WORTH)
SHARES = (0.0, 1e-12, 0.1, 0.5, 0.9, 1 - 1e-12, 1.0)

needs_library = pytest.mark.skipif(
    extension.load("cpu") is not None, reason=f"no compiled library: {extension.load('cpu')}"
)


@pytest.fixture
def same():
    if not dropout._is_same():
        pytest.skip("PyTorch draws other masks on this processor")


def words(state: torch.Tensor) -> np.random.MT19937:
    """NumPy's generator in the state of PyTorch's."""
    raw = state.numpy().tobytes()
    left = int(np.frombuffer(raw, np.int32, 1, 8)[0])
    numbers = np.frombuffer(raw, np.uint64, 624, 24).astype(np.uint32)
    twister = np.random.MT19937()
    about = twister.state
    about["state"] = {"key": numbers, "pos": 625 - left}
    twister.state = about
    return twister


@needs_library
@pytest.mark.parametrize("before", [0, 1, 623, 624, 1000])
def test_the_numbers_are_those_of_a_mersenne_twister(before):
    """On every processor, whatever PyTorch draws there: 53 bits of two draws, the first the higher
    half."""
    torch.manual_seed(11)
    torch.randint(0, 2**31, (before,))  # a draw each
    state = torch.get_rng_state()
    drawn = words(state).random_raw(2 * sum(SIZES)).astype(np.uint64)
    numbers = ((drawn[0::2] << 32 | drawn[1::2]) & ((1 << 53) - 1)) * 2.0**-53
    first = 0
    for size in SIZES:
        mask = torch.empty(size)
        torch.ops.metakd.bernoulli_(mask, state, 0.3)
        assert np.array_equal(mask.numpy() == 1, numbers[first : first + size] < 0.3)
        first += size


@needs_library
def test_narrower_instruction_sets_draw_the_same():
    """The widest is the one of the other tests."""
    code = (
        "import hashlib, torch\n"
        "from metakd import extension\n"
        "extension.load('cpu')\n"
        f"torch.library.define('metakd::bernoulli_', '{dropout.SCHEMA}')\n"
        "torch.manual_seed(3); state = torch.get_rng_state()\n"
        f"for dtype in {dropout.DTYPES}:\n"
        "    mask = torch.empty(9999, dtype=dtype)\n"
        "    torch.ops.metakd.bernoulli_(mask, state, 0.7)\n"
        "    print(hashlib.sha256(mask.bool().numpy()).hexdigest())\n"
        "print(hashlib.sha256(state.numpy()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for capability in ("default", "avx2")
    }
    assert len(found) == 1


@needs_library
@pytest.mark.parametrize("dtype", dropout.DTYPES)
@pytest.mark.parametrize("p", SHARES)
def test_masks_are_pytorchs_own(same, dtype, p):
    def draw():
        torch.manual_seed(5)
        torch.rand(3)
        masks = [torch.empty(size, dtype=dtype).bernoulli_(p) for size in SIZES]
        return masks, torch.get_rng_state(), torch.rand(2), torch.randn(20)

    expected = draw()
    with quick_masks(CPU):
        found = draw()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_library
def test_a_model_trains_to_the_same_bits(same, tiny_bert):
    """Dropout of hidden states and, within SDPA, of attention."""

    def train():
        torch.manual_seed(1)
        model = tiny_bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        words = torch.arange(24 * 16).reshape(24, 16) % 30
        for _ in range(3):
            model(input_ids=words, labels=torch.arange(24) % 2).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.state_dict().values())

    expected = train()
    with quick_masks(CPU):
        found = train()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_library
def test_it_is_used_and_ends(same, monkeypatch):
    """Within it, and not after it, however it ends; never for what the library cannot fill."""
    calls = []
    own = torch.ops.metakd.bernoulli_
    monkeypatch.setattr(
        torch.ops.metakd, "bernoulli_", lambda *given: (calls.append(1), own(*given))
    )
    drop, big = nn.Dropout(0.1), torch.ones(2 * WORTH)
    with quick_masks(CPU):
        drop(big)
        assert len(calls) == 1
        drop(torch.ones(WORTH - 1))
        torch.empty(2 * WORTH, 2).t().bernoulli_(0.5)
        torch.empty(2 * WORTH).bernoulli_(0.5, generator=torch.Generator())
        torch.empty(2 * WORTH, dtype=torch.int64).bernoulli_(0.5)
        assert len(calls) == 1
        with pytest.raises(RuntimeError, match="p"):
            big.bernoulli_(1.5)
    with pytest.raises(KeyError), quick_masks(CPU):
        raise KeyError
    drop(big)
    with quick_masks(torch.device("cuda")):
        drop(big)
    assert len(calls) == 2  # the refused share asked the library


def test_without_the_library_nothing_changes(monkeypatch):
    dropout._is_same.cache_clear()
    monkeypatch.setattr(extension, "load", lambda kind: "not compiled")
    with quick_masks(CPU):
        assert nn.Dropout(0.5)(torch.ones(2 * WORTH)).unique().tolist() == [0.0, 2.0]
    dropout._is_same.cache_clear()
